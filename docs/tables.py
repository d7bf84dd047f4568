"""Writes the tables of README.md from the cards: `python docs/tables.py`; `tests/test_docs.py` holds it to them."""

import re
from pathlib import Path

from attnzoo.core import Family
from attnzoo.zoo import Zoo

README = Path(__file__).parent.parent / "README.md"


def tables() -> str:
    """What the built-in plugin offers, as Markdown."""
    zoo = Zoo.of()
    lines = []
    for family in Family:
        cards = [entry.value.card for entry in zoo.mechanisms.values() if entry.value.card.family is family]
        if not cards:
            continue
        lines += [f"**`{family}`**: {family.question}", ""]
        lines += ["| mechanism | what it does | grows | masks | paper |", "|---|---|---|---|---|"]
        for card in sorted(cards, key=lambda card: card.name):
            masks = ", ".join(kind for kind in ("keys", "causal", "pairs") if kind in card.masks) or "none"
            source = (card.paper.authors, str(card.paper.year or ""), card.paper.ref) if card.paper else ()
            paper = ", ".join(part for part in source if part)
            lines.append(f"| `{card.name}` | {card.summary} | {card.grows} | {masks} | {paper} |")
        lines.append("")
    lines += ["| fusion | what it does | laws |", "|---|---|---|"]
    for name, entry in zoo.fusions.items():
        card = entry.value.card
        lines.append(f"| `{name}` | {card.summary} | {', '.join(sorted(card.laws))} |")
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """The README with fresh tables between its two markers."""
    begin, end = "<!-- tables: python docs/tables.py -->", "<!-- end of tables -->"
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{tables()}\n{end}", text, flags=re.S)


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
