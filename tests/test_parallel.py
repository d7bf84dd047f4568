"""Parallel text: every format gives the same pairs, no text is on both sides of a split, and bad input is named."""

import gettext
import hashlib
import io
import struct
import sys
import urllib.error
import urllib.request
import zipfile
from email.message import Message
from pathlib import Path

import parallel_corpus
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parallel_corpus import as_aligned, as_mo, as_moses, as_po, as_tsv, sentences

from attnzoo.data.pairs import Pairs, padded
from attnzoo.data.parallel import (
    Corpus,
    Line,
    Tokens,
    clean,
    is_pairs,
    load_pairs,
    moses,
    opus,
    prepared,
    read_corpus,
    split,
)
from attnzoo.data.parallel.catalogue import parse_mo, parse_po
from attnzoo.data.vocabulary import BOS, EOS, PAD, UNK, Vocabulary
from attnzoo.errors import DataError

SMALL = sentences(60, 1)
WORDS = Tokens(use="word", min_frequency=1)
TINY = Tokens(size=300)


def fault(call, *args, **kwargs) -> DataError:
    with pytest.raises(DataError) as error:
        call(*args, **kwargs)
    assert len(error.value.diagnostics) == 1
    return error.value


def place(error: DataError) -> tuple[str, int, int]:
    spot = error.diagnostics[0].place
    return Path(spot.file).name, spot.line, spot.column


def pairs_of(corpus: Corpus) -> list[tuple[str, str]]:
    return [line[:2] for line in corpus.lines]


def corpus_of(pairs, name="tsv:x") -> Corpus:
    lines = tuple(Line(*pair, f"x:{i}") for i, pair in enumerate(pairs, start=1))
    return Corpus(name, ("en", "es"), lines)


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def zipped(path: Path, members: dict[str, str | bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


MEMBERS = {"B.en-es.en": "one\ntwo\n", "B.en-es.es": "uno\ndos\n"}


# The corpus itself


def test_the_sentences_are_many_distinct_and_repeatable():
    pairs = sentences()
    assert len(pairs) == 4000
    for side in zip(*pairs, strict=True):
        assert len(set(side)) == 4000
    parallel_corpus.sentences.cache_clear()
    assert sentences() == pairs and sentences(50, seed=7) != sentences(50, seed=8)


def test_the_sentences_agree():
    """Rules of Spanish that a slip in the generator would break."""
    for english, spanish in sentences():
        words = spanish.strip("¿?.").lower().split()
        assert " de el " not in spanish and (english[-1] == "?") == spanish.startswith("¿")
        for article, noun in zip(words, words[1:], strict=False):
            if article in ("los", "las", "unos", "unas", "mis", "nuestros", "nuestras"):
                assert noun.endswith("s"), spanish
            if article in ("el", "la", "un", "una", "mi", "nuestro", "nuestra"):
                assert not noun.endswith("s"), spanish
    assert parallel_corpus.adjective(("joven", "joven"), True, True) == "jóvenes"
    assert parallel_corpus.adjective(("azul", "azul"), False, True) == "azules"
    assert parallel_corpus.adjective(("rojo", "roja"), True, True) == "rojas"


# Formats


@pytest.mark.parametrize("pairs", [None, SMALL], ids=["4000", "60"])
def test_every_format_gives_the_same_texts(pairs, tmp_path):
    expected = list(sentences() if pairs is None else pairs)
    names = {
        "tsv": as_tsv(tmp_path / "s.tsv", pairs),
        "aligned": as_aligned(tmp_path, pairs),
        "moses": as_moses(tmp_path / "s.zip", pairs),
        "po": as_po(tmp_path / "s.po", pairs),
        "mo": as_mo(tmp_path / "s.mo", pairs),
        "big-endian": as_mo(tmp_path / "b.mo", pairs, order=">"),
    }
    for format, name in names.items():
        assert is_pairs(name)
        found = pairs_of(read_corpus(name))
        if format in ("mo", "big-endian"):  # a .mo is sorted
            expected_here = sorted(expected, key=lambda pair: pair[0].encode())
            assert found == expected_here, format
        else:
            assert found == expected, format


def test_the_languages_and_the_places(tmp_path):
    corpus = read_corpus(as_aligned(tmp_path, SMALL))
    assert corpus.languages == ("en", "es") and corpus.lines[4].place == f"{tmp_path / 'text.en'}:5"
    assert read_corpus(as_moses(tmp_path / "s.zip", SMALL)).languages == ("en", "es")
    assert read_corpus(as_tsv(tmp_path / "s.tsv", SMALL)).languages == ("source", "target")
    assert read_corpus(as_po(tmp_path / "s.po", SMALL)).languages == ("messages", "es")
    assert read_corpus(as_mo(tmp_path / "s.mo", SMALL)).languages == ("messages", "es")


def test_tsv_ignores_further_columns_and_quotes_and_has_no_header(tmp_path):
    path = written(tmp_path / "a:b.tsv", 'english\tspanish\n"a\tb"\tattribution\tmore\r\n\n \t c \n')
    corpus = read_corpus(f"tsv:{path}")
    assert pairs_of(corpus) == [("english", "spanish"), ('"a', 'b"'), ("", ""), (" ", " c ")]
    assert corpus.lines[1].place == f"{path}:2"


def test_a_byte_order_mark_and_windows_line_ends_are_no_text(tmp_path):
    path = written(tmp_path / "a.tsv", b"\xef\xbb\xbfone\tuno\r\ntwo\tdos\r\n")
    assert pairs_of(read_corpus(f"tsv:{path}")) == [("one", "uno"), ("two", "dos")]


def test_the_last_line_may_lack_its_end_and_other_separators_are_text(tmp_path):
    path = written(tmp_path / "a.tsv", "one\u2028more\tuno\x0c\ntwo\tdos")
    assert len(read_corpus(f"tsv:{path}").lines) == 2


# Moses


def test_the_pair_says_what_is_the_source(tmp_path):
    path = zipped(tmp_path / "b.zip", MEMBERS)
    assert pairs_of(read_corpus(f"moses:{path}")) == [("one", "uno"), ("two", "dos")]
    assert pairs_of(read_corpus(f"moses:{path}:es-en")) == [("uno", "one"), ("dos", "two")]
    assert read_corpus(f"moses:{path}:es-en").languages == ("es", "en")


def test_a_zip_with_several_pairs_needs_one(tmp_path):
    more = {"B.en-pt_BR.en": "one\n", "B.en-pt_BR.pt_BR": "um\n", "B.en-pt_BR.ids": "1\n"}
    path = zipped(tmp_path / "b.zip", MEMBERS | more)
    error = fault(read_corpus, f"moses:{path}")
    assert error.code == "AZ712" and "`en-es`, `en-pt_BR`" in str(error)
    assert pairs_of(read_corpus(f"moses:{path}:pt_BR-en")) == [("um", "one")]
    error = fault(read_corpus, f"moses:{path}:en-ex")
    assert error.code == "AZ712" and "did you mean `en-es`?" in str(error)
    assert "it has `en-es`" in str(fault(read_corpus, f"moses:{path}:fi-sv"))


def test_names_that_climb_out_of_the_folder_are_harmless(tmp_path):
    """Members are read where they lie, so a name is only a name."""
    (tmp_path / "in").mkdir()
    path = zipped(
        tmp_path / "in" / "b.zip",
        {"../../etc/B.en-es.en": "one\n", "../../etc/B.en-es.es": "uno\n", "/tmp/x": "x", "../up": "x"},
    )
    before = sorted(tmp_path.rglob("*"))
    assert pairs_of(read_corpus(f"moses:{path}")) == [("one", "uno")]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_zip_bomb_is_refused_before_it_unpacks(tmp_path, monkeypatch):
    path = zipped(tmp_path / "b.zip", MEMBERS | {"B.en-es.en": b"a" * 3_000_000})
    assert path.stat().st_size < 10_000
    monkeypatch.setattr(moses, "LIMIT", 2_000_000)
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *args: pytest.fail("it was opened"))
    error = fault(read_corpus, f"moses:{path}")
    assert error.code == "AZ714" and "more than 2,000,000 bytes" in str(error)


def test_a_bomb_that_lies_about_its_size_gives_no_more_than_it_states(tmp_path, monkeypatch):
    path = zipped(tmp_path / "b.zip", MEMBERS | {"B.en-es.en": b"a" * 3_000_000})
    raw = path.read_bytes().replace(struct.pack("<I", 3_000_000), struct.pack("<I", 10))
    taken = []
    read1 = zipfile.ZipExtFile._read1
    monkeypatch.setattr(
        zipfile.ZipExtFile, "_read1", lambda self, n: taken.append(data := read1(self, n)) or data
    )
    error = fault(read_corpus, f"moses:{written(path, raw)}")
    assert error.code == "AZ714" and "not a sound zip" in str(error)
    assert sum(map(len, taken)) <= 10


def test_damaged_zips(tmp_path):
    error = fault(read_corpus, f"moses:{written(tmp_path / 'a.zip', b'no zip')}")
    assert error.code == "AZ714" and "not a sound zip" in str(error)
    whole = zipped(tmp_path / "b.zip", MEMBERS).read_bytes()
    for at in range(
        len(whole)
    ):  # every byte changed, every length cut: an error that is ours, or the same pairs
        for raw in (whole[:at], whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]):
            path = written(tmp_path / "c.zip", raw)
            try:
                assert pairs_of(read_corpus(f"moses:{path}")) == [("one", "uno"), ("two", "dos")]
            except DataError as error:
                assert error.code in ("AZ709", "AZ714"), str(error)


@pytest.mark.parametrize(
    "members,said",
    [
        ({"README": "x"}, "no members"),
        ({"B.en-es.en": "x"}, "0 members in `es`"),
        (MEMBERS | {"C.en-es.en": "x", "C.en-es.es": "x"}, "2 members in `en`"),
    ],
)
def test_zips_without_the_members(members, said, tmp_path):
    error = fault(read_corpus, f"moses:{zipped(tmp_path / 'b.zip', members)}")
    assert error.code == "AZ714" and said in str(error)


def test_members_of_unequal_length(tmp_path):
    path = zipped(tmp_path / "b.zip", MEMBERS | {"B.en-es.es": "uno\ndos\ntres\n"})
    error = fault(read_corpus, f"moses:{path}")
    assert error.code == "AZ710" and place(error) == ("b.zip:B.en-es.es", 3, 1)


# Aligned files


def test_files_of_unequal_length(tmp_path):
    one, other = written(tmp_path / "a.en", "1\n2\n3\n4\n"), written(tmp_path / "a.es", "1\n2\n")
    error = fault(read_corpus, f"aligned:{one}:{other}")
    assert error.code == "AZ710" and "a.en` has 4 lines" in str(error) and "a.es` has 2" in str(error)
    assert place(error) == ("a.en", 3, 1)
    assert place(fault(read_corpus, f"aligned:{other}:{one}")) == ("a.en", 3, 1)


@pytest.mark.parametrize("name", ["aligned:", "aligned:a", "aligned:a:", "aligned:C:/a:b", "aligned::a"])
def test_a_colon_in_a_path_cannot_be_told_from_the_one_between_paths(name):
    error = fault(read_corpus, name)
    assert error.code == "AZ712"
    if name.count(":") == 3:
        assert "names 3 files, not 2" in str(error) and "no path may hold" in str(error)


# Files that cannot be read


@pytest.mark.parametrize(
    "name",
    [
        "tsv:gone",
        "aligned:gone:gone",
        "moses:gone.zip:en-es",
        "moses:gone",
        "gettext:gone.po",
        "gettext:gone",
        "tsv:~nobody/gone",
    ],
)
def test_missing_files(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = fault(read_corpus, name)
    assert error.code == "AZ709" and "there is no file `" in str(error) and "gone" in str(error)


@pytest.mark.parametrize("name", ["tsv:.", "aligned:.:.", "moses:.", "tsv:\0", "moses:\0", "gettext:\0"])
def test_what_is_no_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fault(read_corpus, name).code == "AZ709"


@pytest.mark.parametrize("name", ["tsv:", "moses:", "gettext:", "tsv", "moses"])
def test_names_without_a_path(name):
    assert fault(read_corpus, name).code == "AZ712"


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    as_tsv(tmp_path / "s.tsv", SMALL)
    assert len(read_corpus("tsv:~/s.tsv").lines) == len(SMALL)


def test_wrong_encoding_has_its_line_and_byte(tmp_path):
    path = written(tmp_path / "a.tsv", "one\tuno\nyear\taño\n".encode("latin-1"))
    error = fault(read_corpus, f"tsv:{path}")
    assert error.code == "AZ711" and "byte 7 of line 2 is 0xF1: this is not UTF-8" in str(error)
    assert place(error) == ("a.tsv", 2, 7)
    accented = written(tmp_path / "b.tsv", "é\t".encode() + b"\xff")
    assert place(fault(read_corpus, f"tsv:{accented}")) == ("b.tsv", 1, 3)  # columns are characters
    utf16 = written(tmp_path / "c.tsv", "one\tuno\n".encode("utf-16"))
    assert fault(read_corpus, f"tsv:{utf16}").code == "AZ711"
    unmarked = written(tmp_path / "d.tsv", "one\tuno\n".encode("utf-16-le"))  # valid UTF-8, with zeros
    error = fault(read_corpus, f"tsv:{unmarked}")
    assert error.code == "AZ711" and "byte 2 of line 1 is 0x00" in str(error)
    zipped_ = zipped(tmp_path / "b.zip", MEMBERS | {"B.en-es.es": b"uno\nd\xf3s\n"})
    assert place(fault(read_corpus, f"moses:{zipped_}")) == ("b.zip:B.en-es.es", 2, 2)


def test_a_line_without_a_tab(tmp_path):
    error = fault(read_corpus, f"tsv:{written(tmp_path / 'a.tsv', 'one	uno' + chr(10) + 'two dos')}")
    assert error.code == "AZ714" and place(error) == ("a.tsv", 2, 1) and "two dos" in str(error)


# Catalogues


PO = r"""# The header.
msgid ""
msgstr ""
"Language: es\n"
"Content-Type: text/plain; charset=UTF-8\n"

#. for translators
#: file.c:12
msgctxt "menu"
msgid "Open"
msgstr "Abrir"

#, fuzzy, c-format
#| msgid "Old"
msgid "Not \"sure\""
msgstr "No \"seguro\""

msgid ""
"Two lines,\n"
"one\ttext \\ \x41\101"
msgstr "Dos líneas"
msgid "%d file"
msgid_plural "%d files"
msgstr[0] "%d archivo"
msgstr[1] "%d archivos"

#, fuzzy
#~ msgid "gone"
#~ msgstr "ido"

msgid "untranslated"
msgstr ""
"""


def test_a_catalogue_line_by_line(tmp_path):
    path = written(tmp_path / "a.po", PO)
    corpus = read_corpus(f"gettext:{path}")
    assert [(*pair, place.rpartition(":")[2]) for *pair, place in corpus.lines] == [
        ("Open", "Abrir", "9"),
        ("Two lines,\none\ttext \\ AA", "Dos líneas", "18"),
        ("%d file", "%d archivo", "22"),
        ("%d files", "%d archivos", "22"),
        ("untranslated", "", "31"),  # not fuzzy: that comment was of an obsolete entry
    ]
    assert corpus.notes == ("fuzzy entries left out: 1",) and corpus.languages == ("messages", "es")


def test_plurals_pair_with_the_first_and_the_last_form(tmp_path):
    plural = 'msgid "file"\nmsgid_plural "files"\n'
    many = "".join(f'msgstr[{i}] "f{i}"\n' for i in range(4))
    one = 'msgstr[0] "f0"\n'
    for forms, last in ((many, "f3"), (one, "f0")):
        path = written(tmp_path / "a.po", plural + forms)
        assert pairs_of(read_corpus(f"gettext:{path}")) == [("file", "f0"), ("files", last)]
    as_mo(tmp_path / "a.mo", [("menu\4file\0files", "f0\0f1\0f2")])
    assert pairs_of(read_corpus(f"gettext:{tmp_path / 'a.mo'}")) == [("file", "f0"), ("files", "f2")]


@pytest.mark.parametrize(
    "text,line,said",
    [
        ('msgid "a"\nmsgstr "b', 2, "not in quotes from end to end"),
        ('msgid "a" b\nmsgstr "b"', 1, "not in quotes from end to end"),
        ('msgid "a"b"\nmsgstr "b"', 1, "not in quotes from end to end"),
        ('msgid "a\\"\nmsgstr "b"', 1, "not in quotes from end to end"),
        ('msgid "a\\q"\nmsgstr "b"', 1, "has `\\q`, which means nothing"),
        ('msgid "\\xff"\nmsgstr "b"', 1, "has `\\xff`"),
        ('msgid "\\x"\nmsgstr "b"', 1, "has `\\x`"),
        ('msgstr "b"', 1, "`msgstr` after nothing"),
        ('\n"b"', 2, "a text that has not begun"),
        ('msgid "a"\nmsgid "b"', 2, "`msgid` after `msgid`"),
        ('msgid "a"\nmsgstr "b"\nmsgstr "c"', 3, "`msgstr` after `msgstr`"),
        ('msgid "a"\nmsgstr[0] "b"', 2, "`msgstr[0]` after `msgid`"),
        ('msgid "a"\nmsgid_plural "b"\nmsgstr "c"', 3, "`msgstr` after `msgid_plural`"),
        ('msgid "a"\nmsgid_plural "b"\nmsgstr[0] "c"\nmsgstr[2] "d"', 4, "`msgstr[2]` after `msgstr[0]`"),
        ('msgid "a"\nmsgctxt "b"', 2, "`msgctxt` after `msgid`"),
        ('msgid "a"\nmsgstr "b"\n\nmsgid "c"\n', 4, "ends the file after `msgid`"),
        ("just text", 1, "is not of a catalogue"),
        ("msgid a", 1, "is not of a catalogue"),
        ('msgfoo "a"', 1, "is not of a catalogue"),
    ],
)
def test_wrong_syntax_has_its_line(text, line, said, tmp_path):
    error = fault(read_corpus, f"gettext:{written(tmp_path / 'a.po', text)}")
    assert error.code == "AZ714" and said in str(error) and place(error) == ("a.po", line, 1)


def test_a_catalogue_in_its_own_charset(tmp_path):
    head = 'msgid ""\nmsgstr "Content-Type: text/plain; charset={}\\n"\n\nmsgid "year"\nmsgstr "año"\n'
    for charset in ("ISO-8859-1", "utf-8", "cp1252"):
        path = written(tmp_path / "a.po", head.format(charset).encode(charset))
        assert pairs_of(read_corpus(f"gettext:{path}")) == [("year", "año")]
    template = written(tmp_path / "a.po", head.format("CHARSET"))
    assert pairs_of(read_corpus(f"gettext:{template}")) == [("year", "año")]
    shift = 'msgid ""\nmsgstr "Content-Type: text/plain; charset=Shift_JIS\\n"\nmsgid "table"\nmsgstr "表"\n'
    assert b"\x5c" in "表".encode("shift_jis")  # its second byte is a backslash's
    path = written(tmp_path / "a.po", shift.encode("shift_jis"))
    assert pairs_of(read_corpus(f"gettext:{path}")) == [("table", "表")]
    error = fault(
        read_corpus, f"gettext:{written(tmp_path / 'a.po', head.format('UTF-8').encode('latin-1'))}"
    )
    assert error.code == "AZ711" and place(error) == ("a.po", 5, 10)
    error = fault(read_corpus, f"gettext:{written(tmp_path / 'a.po', head.format('ASCII'))}")
    assert error.code == "AZ711" and "this is not ASCII" in str(error)


@pytest.mark.parametrize(
    "charset", ["nonsense", "rot13", "idna", "undefined", "zlib", "utf-16", "unicode_escape"]
)
@pytest.mark.parametrize("ending", ["po", "mo"])
def test_charsets_that_are_none(charset, ending, tmp_path, monkeypatch):
    header = f"Content-Type: text/plain; charset={charset}\n"
    monkeypatch.setattr(parallel_corpus, "HEADER", header)
    write = {"po": as_po, "mo": as_mo}[ending]
    error = fault(read_corpus, write(tmp_path / f"a.{ending}", SMALL))
    assert error.code == "AZ711" and f"names `{charset}` as its charset" in str(error)


def test_a_folder_of_catalogues_is_read_in_order(tmp_path):
    for folder, pair in (("b", ("two", "dos")), ("a/deep", ("one", "uno"))):
        (tmp_path / folder).mkdir(parents=True)
        as_po(tmp_path / folder / "x.po", [pair])
    as_mo(tmp_path / "c.mo", [("three", "tres")])
    written(tmp_path / "notes.txt", "no catalogue")
    corpus = read_corpus(f"gettext:{tmp_path}")
    assert pairs_of(corpus) == [("one", "uno"), ("two", "dos"), ("three", "tres")]


def test_a_folder_of_several_languages_is_refused(tmp_path, monkeypatch):
    as_po(tmp_path / "es.po", SMALL)
    monkeypatch.setattr(parallel_corpus, "HEADER", "Language: es_MX\n")
    as_po(tmp_path / "es_MX.po", SMALL)
    assert len(read_corpus(f"gettext:{tmp_path}").lines) == 2 * len(SMALL)
    monkeypatch.setattr(parallel_corpus, "HEADER", "Language: de\n")
    as_po(tmp_path / "de.po", SMALL)
    error = fault(read_corpus, f"gettext:{tmp_path}")
    assert error.code == "AZ712" and "`de`" in str(error) and "`es`" in str(error)


def test_what_is_no_catalogue(tmp_path):
    (tmp_path / "empty").mkdir()
    assert fault(read_corpus, f"gettext:{tmp_path / 'empty'}").code == "AZ709"
    assert fault(read_corpus, f"gettext:{written(tmp_path / 'a.txt', PO)}").code == "AZ714"
    assert fault(read_corpus, f"gettext:{written(tmp_path / 'a.mo', PO)}").code == "AZ714"


def test_damaged_mo_files(tmp_path):
    as_mo(path := tmp_path / "a.mo", SMALL[:2])
    whole = path.read_bytes()
    for at in range(len(whole) - 1):  # the last byte is the zero that ends the last text
        assert fault(read_corpus, f"gettext:{written(path, whole[:at])}").code == "AZ714"
    for at in range(len(whole)):
        try:
            parse_mo(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        except DataError as error:
            assert error.code in ("AZ711", "AZ714")
    for field, value in ((4, 5 << 16), (8, 2**31), (12, 2**31)):  # revision, count, where the table is
        broken = whole[:field] + struct.pack("<I", value) + whole[field + 4 :]
        assert fault(parse_mo, broken).code == "AZ714"


def test_a_mo_whose_texts_overlap_does_not_grow():
    """A thousand entries that are each the whole file would be a thousand times its size."""
    n = 1000
    size = 28 + 8 * n
    head = struct.pack("<7I", 0x950412DE, 0, n, 28, 28, 0, 0)
    assert fault(parse_mo, head + struct.pack("<2I", size, 0) * n).code == "AZ714"


TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\4"), min_size=1, max_size=20)


@given(pairs=st.dictionaries(TEXT, TEXT, max_size=5))
def test_po_and_mo_are_read_as_the_standard_library_reads_them(pairs, tmp_path_factory):
    """Our .po parser and our .mo reader on arbitrary text, and the standard library's .mo reader."""
    folder = tmp_path_factory.mktemp("catalogues")
    as_po(folder / "a.po", list(pairs.items()))
    as_mo(folder / "a.mo", list(pairs.items()))
    po, mo = parse_po((folder / "a.po").read_bytes()), parse_mo((folder / "a.mo").read_bytes())
    assert {entry.message: entry.forms[0] for entry in po.entries} == pairs
    assert {entry.message: entry.forms[0] for entry in mo.entries} == pairs
    assert po.header == mo.header == parallel_corpus.HEADER
    with (folder / "a.mo").open("rb") as stream:
        theirs = gettext.GNUTranslations(stream)
    assert all(theirs.gettext(message) == translation for message, translation in pairs.items())


@given(
    raw=st.binary(max_size=200)
    | st.text(st.sampled_from('msgidtrcx_plual[0]"\\ \n#,~a'), max_size=80).map(str.encode)
)
def test_no_bytes_break_the_parsers(raw):
    for parse in (parse_po, parse_mo):
        try:
            parse(raw)
        except DataError as error:
            assert error.code in ("AZ711", "AZ714")


# Cleaning and splitting


def test_clean():
    assert clean("  a\u0301\u00a0b \t") == "á\u00a0b"
    assert clean("one\n two\r\n\nthree\u2028") == "one two three" and clean(" \n\u3000") == ""


def test_empty_lines_and_duplicates_are_left_out_and_counted():
    pairs = [
        ("a", "b"),
        ("", "x"),
        ("y", " "),
        ("a", "b"),
        (" a", "b "),
        ("cafe\u0301", "c"),
        ("café", "c"),
        ("d", "e"),
    ]
    data = prepared(corpus_of(pairs), WORDS, 16, 0)
    texts = [*zip(data.train.source_texts, data.train.target_texts, strict=True), *zip(data.test.source_texts, data.test.target_texts, strict=True)]  # fmt: skip
    assert sorted(texts) == [("a", "b"), ("café", "c"), ("d", "e")]
    notes = "\n".join(data.notes)
    assert "en to es: 2 pairs to train on, 1 to test on" in notes
    assert "2 pairs left out because a side is empty, the first at x:2" in notes
    assert "3 pairs left out because the same pair came before" in notes


@pytest.mark.parametrize(
    "pairs", [[], [("", "a"), ("b", "")], [("a", "b")], [("a", "b"), ("a", "c"), ("d", "c")]]
)
def test_too_little_is_an_error(pairs):
    assert fault(prepared, corpus_of(pairs), WORDS, 16, 0).code == "AZ713"


def test_an_empty_file_is_an_error(tmp_path):
    name = f"tsv:{written(tmp_path / 'a.tsv', '')}"
    error = fault(load_pairs, name, tokens=WORDS, max_length=16)
    assert error.code == "AZ713" and "0 lines" in str(error)


SHORT = st.text("abcdef", min_size=1, max_size=2)


@given(
    pairs=st.lists(st.tuples(SHORT, SHORT), min_size=1, max_size=60, unique=True), seed=st.integers(0, 2**40)
)
def test_no_text_is_on_both_sides(pairs, seed):
    """Many share a text here, on the same side or across."""
    try:
        testing = split(pairs, seed)
    except DataError as error:
        assert error.code == "AZ713"
        return
    sides = {
        side: [pair for pair, test in zip(pairs, testing, strict=True) if test is side]
        for side in (True, False)
    }
    assert sides[True] and sides[False]
    train = {text for pair in sides[False] for text in pair}
    assert not any(text in train for pair in sides[True] for text in pair)


def test_the_split_is_a_twentieth_and_a_function_of_the_seed():
    pairs = sentences()
    testing = split(pairs, 3)
    assert sum(testing) == 200 and split(pairs, 3) == testing and split(pairs, 4) != testing
    assert sum(split(SMALL, 0)) == 3 and sum(split(SMALL[:2], 0)) == 1
    assert sum(testing[:2000]) in range(70, 131)  # spread over the file


def test_large_groups_are_trained_on():
    pairs = [("yes", f"sí {i}") for i in range(50)] + [(f"{i}", f"n{i}") for i in range(50)]
    for seed in range(5):
        assert sum(split(pairs, seed)) == 5 and not any(split(pairs, seed)[:50])


# Tokens


def test_the_tokenizer_sees_the_training_side_only():
    pairs = [(f"only{i} here", f"solo{i} aquí") for i in range(200)]
    for shared in (True, False):
        data = prepared(corpus_of(pairs), Tokens(use="word", min_frequency=1, shared=shared), 16, 0)
        for vocabulary, train, test in (
            (data.source, data.train.source_texts, data.test.source_texts),
            (data.target, data.train.target_texts, data.test.target_texts),
        ):
            assert len(test) == 10
            for text in train:
                assert UNK not in vocabulary.encode(text)
            for text in test:
                assert vocabulary.encode(text)[0] == UNK and vocabulary.encode(text)[1] != UNK
        assert (data.source is data.target) is shared
        assert "10 of 20 source tokens to test on unknown to the vocabulary" in data.notes
        assert "10 of 20 target tokens to test on unknown to the vocabulary" in data.notes
        assert data.source.size == 4 + (2 if shared else 1) * 191


def test_bytes_pairs_know_everything_and_give_the_text_back():
    data = prepared(corpus_of(sentences()), Tokens(size=1000), 64, 0)
    assert data.source is data.target and data.source.size == 1000
    assert not any("unknown" in note or "cut" in note for note in data.notes)
    for pairs in (data.train, data.test):
        for ids, text in zip(pairs.targets, pairs.target_texts, strict=True):
            assert data.target.decode(ids) == text
    assert data.target.decode(data.target.encode("日本 ☃")) == "日本 ☃"
    again = prepared(corpus_of(sentences()), Tokens(size=1000), 64, 0)
    assert again.source.as_data() == data.source.as_data() and again.train == data.train
    assert Vocabulary.of(data.source.as_data()).encode("The house.") == data.source.encode("The house.")


def test_special_tokens_in_a_text_are_text():
    pairs = [(f"a </s> b{i} <pad>", f"c{i} <s>") for i in range(30)]
    for tokens in (TINY, WORDS):
        data = prepared(corpus_of(pairs), tokens, 64, 0)
        for side in (data.train, data.test):
            for row in (*side.sources, *side.targets):
                assert not {PAD, BOS, EOS} & set(row)


def test_long_texts_are_cut_and_counted():
    long = "word " * 30
    pairs = [(f"a{i}", f"b{i}") for i in range(40)] + [(f"{long}{i}", f"c{i}") for i in range(4)]
    pairs += [(f"d{i}", f"{long}e{i}") for i in range(3)]
    data = prepared(corpus_of(pairs), WORDS, 10, 0)
    sides = {"train": data.train, "test": data.test}
    cut = {name: sum("word word" in a + b for a, b in zip(side.source_texts, side.target_texts, strict=True)) for name, side in sides.items()}  # fmt: skip
    assert sum(cut.values()) == 7
    for name, n in cut.items():
        noun = "pair" if n == 1 else "pairs"
        assert not n or f"{n} {noun} to {name} on cut to 10 tokens on a side" in data.notes
    for side in sides.values():
        assert int(side.lengths.max()) <= 10
        assert max(map(len, side.sources)) <= 8
    assert int(data.train.lengths.max()) == 10
    whole = next(t for t in (*data.train.source_texts, *data.test.source_texts) if t.startswith("word"))
    assert len(whole.split()) == 31  # the text stays whole


@pytest.mark.parametrize(
    "options", [{"use": "byte"}, {"size": 299}, {"min_frequency": 0}, {"sizes": 1}, {"shared": "yes"}]
)
def test_wrong_options_of_tokens(options):
    with pytest.raises(ValueError):
        Tokens(**options)


def test_without_the_library_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert fault(prepared, corpus_of(SMALL), WORDS, 16, 0).code == "AZ708"


# Batches


def test_a_batch_is_padded_to_its_longest():
    pairs = Pairs(((4, 5, 6), (7,), ()), ((8,), (9, 10), (11,)), ("", "", ""), ("", "", ""))
    source, target = pairs.batch(torch.tensor([1, 0]))
    assert source.tolist() == [[BOS, 7, EOS, PAD, PAD], [BOS, 4, 5, 6, EOS]]
    assert target.tolist() == [[BOS, 9, 10, EOS], [BOS, 8, EOS, PAD]]
    assert source.dtype == target.dtype == torch.int64 and len(pairs) == 3
    assert pairs.lengths.tolist() == [[5, 3], [3, 4], [2, 3]]
    assert pairs.batch(torch.tensor([2]))[0].tolist() == [[BOS, EOS]]
    assert padded([]).shape == (0, 2) and Pairs((), (), (), ()).lengths.shape == (0, 2)
    source, _ = pairs.batch(torch.tensor([2, 2, 1]))
    assert source.tolist() == [[BOS, EOS, PAD], [BOS, EOS, PAD], [BOS, 7, EOS]]


def test_batches_of_a_corpus(tmp_path):
    data = load_pairs(as_moses(tmp_path / "s.zip"), tokens=Tokens(size=500), max_length=40, seed=2)
    assert data.name == f"moses:{tmp_path / 's.zip'}:en-es" and (len(data.train), len(data.test)) == (
        3800,
        200,
    )
    indices = torch.arange(64)
    source, target = data.train.batch(indices)
    lengths = data.train.lengths[indices]
    assert source.shape == (64, lengths[:, 0].max()) and target.shape == (64, lengths[:, 1].max())
    for batch, side in ((source, 0), (target, 1)):
        assert (batch != PAD).sum(1).tolist() == lengths[:, side].tolist()
        assert (batch[:, 0] == BOS).all()
        assert (batch.gather(1, lengths[:, side, None] - 1) == EOS).all()
    assert data.target.decode(target[5].tolist()) == data.train.target_texts[5]


def test_every_format_prepares_alike(tmp_path):
    names = [as_tsv(tmp_path / "s.tsv", SMALL), as_aligned(tmp_path, SMALL), as_po(tmp_path / "s.po", SMALL)]
    first, *others = (load_pairs(name, tokens=WORDS, max_length=32) for name in names)
    for other in others:
        assert (other.train, other.test) == (first.train, first.test)
    mo = load_pairs(
        as_mo(tmp_path / "s.mo", SMALL), tokens=WORDS, max_length=32
    )  # sorted, so split otherwise
    assert {*mo.train.source_texts, *mo.test.source_texts} == {one for one, _ in SMALL}


# Names


def test_names():
    assert is_pairs("copy") and is_pairs("reverse:symbols=8") and is_pairs("opus_books:en-es")
    assert not any(map(is_pairs, ("digits", "folder:tsv", "tsvv:x", "", "recall:pairs=8")))
    error = fault(load_pairs, "tvs:x", tokens=TINY, max_length=16)
    assert error.code == "AZ701" and "did you mean `tsv`?" in str(error)
    assert "the data sets of pairs are `copy`" in str(fault(read_corpus, "qqqqqq"))


def test_strings_of_symbols_go_to_their_own_loader():
    data = load_pairs("reverse", tokens=TINY, max_length=64, seed=3)
    ids, answer = data.train.batch(torch.tensor([0]))
    assert ids[0, 1:-1].flip(0).tolist() == answer[0, 1:-1].tolist()


@pytest.mark.parametrize(
    "name,hint",
    [
        ("opus_books:en_es", "did you mean `en-es`?"),
        ("opus_books:EN>ES", "did you mean `en-es`?"),
        ("opus_books:enes", "such as `en-es`"),
        ("opus_books:", "the end of `opus_books:`"),
        ("opus_books", "the end of `opus_books`"),
        ("opus_books:en-en", "the same language"),
        ("opus_books:en-sp", "did you mean `en-"),
        ("opus_books:ca-sv", "with ca it has de, en, hu, nl"),
        ("opus_books:xx-yy", "no texts in xx"),
        ("opus_books:v2:en-es", "`opus_books:en-es`"),
        ("opus:en-es", "`opus:CORPUS/VERSION:en-es`"),
        ("opus:Books:en-es", "`opus:CORPUS/VERSION:en-es`"),
        ("opus:Books/v1", "`opus:CORPUS/VERSION:en-es`"),
        ("opus:../v1:en-es", "`opus:CORPUS/VERSION:en-es`"),
        ("opus:Books/v1/x:en-es", "`opus:CORPUS/VERSION:en-es`"),
        ("opus:Books/v1:en-zz", "OPUS Books has no pair `en-zz`"),
        ("opus:Tatoeba/v1:en-es-fr", "no pair of languages"),
        ("moses:b.zip:en", "no pair of languages"),
        ("moses:b.zip:", "the end of"),
    ],
)
def test_wrong_language_pairs(name, hint, tmp_path):
    error = fault(read_corpus, name, root=tmp_path, download=False)
    assert error.code == "AZ712" and hint in str(error) and not list(tmp_path.iterdir())


# OPUS


class Response(io.BytesIO):
    """What the network answers."""

    def __init__(self, content: bytes, size: int | None = None):
        super().__init__(content)
        self.headers = {} if size is None else {"Content-Length": str(size)}


def answering(monkeypatch, answer) -> list[str]:
    """Have the network give `answer`; the addresses that were asked for."""
    asked = []

    def urlopen(request, timeout):
        asked.append(request.full_url)
        if isinstance(answer, Exception):
            raise answer
        return answer()

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


def test_a_corpus_is_downloaded_once_and_its_checksum_recorded(tmp_path, monkeypatch):
    content = zipped(tmp_path / "made.zip", MEMBERS).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    asked = answering(monkeypatch, lambda: Response(content, len(content)))
    root = tmp_path / "new"
    corpus = read_corpus("opus:Tatoeba/v2023-04-12:es-en", root=root)
    assert asked == ["https://object.pouta.csc.fi/OPUS-Tatoeba/v2023-04-12/moses/en-es.txt.zip"]
    assert pairs_of(corpus) == [("uno", "one"), ("dos", "two")] and corpus.languages == ("es", "en")
    assert (
        f"no SHA-256 of opus-Tatoeba-v2023-04-12-en-es.zip is published; {digest} was recorded"
        in corpus.notes[0]
    )
    record = root / "opus-Tatoeba-v2023-04-12-en-es.zip.sha256"
    assert record.read_text() == f"{digest}  opus-Tatoeba-v2023-04-12-en-es.zip\n"
    assert sorted(file.name for file in root.iterdir()) == [record.stem, record.name]
    monkeypatch.setenv("ATTNZOO_DATA", str(root))
    again = read_corpus("opus:Tatoeba/v2023-04-12:en-es", download=False)
    assert len(asked) == 1 and "the one recorded when it was first read" in again.notes[0]
    zipped(root / record.stem, MEMBERS | {"B.en-es.en": "one\nchanged\n"})
    error = fault(read_corpus, "opus:Tatoeba/v2023-04-12:en-es", download=False)
    assert error.code == "AZ703" and f"but {digest} was recorded" in str(error)


def test_books_must_have_the_published_checksum(tmp_path, monkeypatch):
    assert opus.BOOKS_SHA256["en-es"] == "81917fa2df54b0472434d9eae7d1dc54556d5d0bf6ea265ac5a9edb30e7acfc2"
    assert len(opus.BOOKS_SHA256) == 62 and all(
        "-".join(sorted(k.split("-"))) == k for k in opus.BOOKS_SHA256
    )
    content = zipped(tmp_path / "made.zip", MEMBERS).read_bytes()
    asked = answering(monkeypatch, lambda: Response(content))
    root = tmp_path / "new"
    error = fault(read_corpus, "opus_books:en-es", root=root)
    assert asked == ["https://object.pouta.csc.fi/OPUS-Books/v1/moses/en-es.txt.zip"]
    assert error.code == "AZ703" and "81917fa2" in str(error) and not list(root.iterdir())
    monkeypatch.setitem(opus.BOOKS_SHA256, "en-es", hashlib.sha256(content).hexdigest())
    for name in ("opus_books:en-es", "opus:Books/v1:en-es"):
        corpus = read_corpus(name, root=root)
        assert corpus.name == name and len(corpus.lines) == 2 and "is the published one" in corpus.notes[0]
    assert [file.name for file in root.iterdir()] == ["opus-Books-v1-en-es.zip"] and len(asked) == 2
    data = load_pairs("opus_books:en-es", root=root, tokens=TINY, max_length=16)
    assert corpus.notes[0] in data.notes and data.name == "opus_books:en-es"


def test_offline_it_says_where_to_put_the_file(tmp_path, monkeypatch):
    answering(monkeypatch, urllib.error.URLError("no route"))
    for root, download in ((tmp_path / "new", True), (tmp_path / "new", False)):
        error = fault(read_corpus, "opus_books:en-es", root=root, download=download)
        assert error.code == "AZ702"
        address = "https://object.pouta.csc.fi/OPUS-Books/v1/moses/en-es.txt.zip"
        assert f"put {address} into {root} as opus-Books-v1-en-es.zip" in str(error)
    assert not list((tmp_path / "new").iterdir())


def http(code: int) -> urllib.error.HTTPError:
    return urllib.error.HTTPError("https://x", code, "no", Message(), io.BytesIO())


def test_what_opus_does_not_have(tmp_path, monkeypatch):
    answering(monkeypatch, http(404))
    error = fault(read_corpus, "opus:Tatoeba/v1:en-qq", root=tmp_path)
    assert error.code == "AZ712" and "OPUS has no pair `en-qq` in Tatoeba v1" in str(error)
    answering(monkeypatch, http(500))
    assert fault(read_corpus, "opus:Tatoeba/v1:en-qq", root=tmp_path).code == "AZ702"


@pytest.mark.parametrize(
    "answer,code",
    [
        (lambda: Response(b"half", 100), "AZ702"),
        (lambda: Response(b"", 2**40), "AZ714"),
        (OSError(28, "No space left"), "AZ702"),
    ],
)
def test_a_download_that_fails_leaves_nothing(answer, code, tmp_path, monkeypatch):
    answering(monkeypatch, answer)
    assert fault(read_corpus, "opus:A/v1:en-es", root=tmp_path).code == code
    assert not list(tmp_path.iterdir())


def test_what_is_no_corpus_is_not_recorded(tmp_path, monkeypatch):
    answering(monkeypatch, lambda: Response(b"<html>come back later</html>"))
    error = fault(read_corpus, "opus:A/v1:en-es", root=tmp_path)
    assert error.code == "AZ714" and not list(tmp_path.glob("*.sha256"))
