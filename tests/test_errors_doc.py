"""docs/errors.md: a section for every code in the source, and every example gives its code."""

import re
from pathlib import Path

import pytest

from attnzoo.errors import ZooError
from attnzoo.recipe import compose

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "errors.md"


def sections() -> dict[str, str]:
    """The page, code by code."""
    parts = re.split(r"^## (AZ\d{3}): .*\n", PAGE.read_text(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def examples() -> dict[str, tuple[str, str]]:
    """Language and text of the example of each code."""
    found = {
        code: re.search(r"^```(yaml|python)\n(.*?)^```$", text, re.M | re.S)
        for code, text in sections().items()
    }
    return {code: (match[1], match[2]) for code, match in found.items() if match}


def printed_by(language: str, text: str) -> tuple[list[str], str]:
    """Codes and text of what an example raises, or of the problems in its zoo."""
    names: dict = {"__name__": "example"}
    try:
        if language == "yaml":
            compose(text)
        else:
            exec(compile(text, "example", "exec"), names)  # our own page
    except ZooError as error:
        return [fault.code for fault in error.diagnostics], str(error)
    problems = names["zoo"].problems
    return [p.code for p in problems], "\n".join(f"{p.code} {p.plugin}: {p.reason}" for p in problems)


def test_every_code_has_a_section_and_every_section_a_code():
    source = "\n".join(path.read_text() for path in (ROOT / "attnzoo").rglob("*.py"))
    assert set(re.findall(r"[\"']AZ\d{3}[\"']", source)) == {f'"{code}"' for code in sections()}


def test_every_section_says_what_to_do_and_what_is_printed():
    for code, text in sections().items():
        assert "**What to do.**" in text, code
        printed = re.search(r"^```text\n(.*?)^```$", text, re.M | re.S)
        assert printed and code in printed[1], code
        assert not re.search(r"/(home|work|tmp|root)/", printed[1]), code
    assert examples().keys() == sections().keys()


@pytest.mark.parametrize("code", examples())
@pytest.mark.sample(3)
def test_example_gives_its_code(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["example"])
    monkeypatch.delenv("ATTNZOO_FORCE", raising=False)
    codes, shown = printed_by(*examples()[code])
    assert set(codes) == {code}, shown
