"""`attnzoo plugins`: who provides what."""

from attnzoo.cli.list import AsJson


def plugins(as_json: AsJson = False) -> None:
    """Show the installed plugins, what they offer and whether they work."""
    from attnzoo.cli.render import Column, say_json, say_next, table
    from attnzoo.zoo import load_zoo

    zoo = load_zoo()
    rows = []
    for provider in zoo.providers:
        offers = {
            registry.kind + "s": [entry.name for entry in registry.values() if entry.plugin == provider.name]
            for registry in (zoo.mechanisms, zoo.fusions, zoo.recipes)
        }
        problems = [f"{p.code}: {p.reason}" for p in zoo.problems if p.plugin == provider.name]
        rows.append(vars(provider) | offers | {"problems": problems})
    if as_json:
        say_json(rows)
        return
    table(
        [
            Column("plugin"),
            Column("distribution", rank=3),
            Column("version", rank=2),
            Column("status"),
            *(Column(kind, rank=1, wrap=12) for kind in ("mechanisms", "fusions", "recipes")),
        ],
        [
            [r["name"], r["dist"], r["version"], r["status"]]
            + [_few(r[kind]) for kind in ("mechanisms", "fusions", "recipes")]
            for r in rows
        ],
    )
    broken = any(r["problems"] for r in rows)
    say_next("attnzoo doctor" if broken else "attnzoo new plugin mine", "attnzoo list --plugin NAME")


def _few(names: list[str]) -> str:
    """The names, or their number where there are many: `attnzoo list --plugin NAME` has them."""
    return ", ".join(names) if len(names) <= 3 else str(len(names))
