"""English sentences and their Spanish translations, from a lexicon and rules of agreement; and the formats they come in.

Every English text has one translation and no two have the same, so a model that learns the rules can be right always.
"""

import random
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

Texts = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Noun:
    """English and Spanish, singular and plural; `feminine` decides articles and adjectives."""

    english: tuple[str, str]
    spanish: tuple[str, str]
    feminine: bool


@dataclass(frozen=True)
class Verb:
    """English base and third person; Spanish for I, he or she, we, they."""

    english: tuple[str, str]
    spanish: tuple[str, str, str, str]


@dataclass(frozen=True)
class Phrase:
    """A noun with its article and perhaps an adjective."""

    english: str
    spanish: str
    feminine: bool
    plural: bool


def nouns(text: str) -> tuple[Noun, ...]:
    """From lines of `house houses casa casas f`."""
    rows = [line.split() for line in text.strip().splitlines()]
    return tuple(Noun((a, b), (c, d), gender == "f") for a, b, c, d, gender in rows)


PEOPLE = nouns("""
    woman women mujer mujeres f
    man men hombre hombres m
    girl girls niña niñas f
    boy boys niño niños m
    teacher teachers maestra maestras f
    doctor doctors médico médicos m
    neighbour neighbours vecino vecinos m
    queen queens reina reinas f
    king kings rey reyes m
    friend friends amiga amigas f
""")
ANIMALS = nouns("""
    dog dogs perro perros m
    cat cats gato gatos m
    horse horses caballo caballos m
    cow cows vaca vacas f
    hen hens gallina gallinas f
    bird birds pájaro pájaros m
""")
PLACES = nouns("""
    house houses casa casas f
    table tables mesa mesas f
    tree trees árbol árboles m
    church churches iglesia iglesias f
    bridge bridges puente puentes m
    school schools escuela escuelas f
    garden gardens jardín jardines m
    door doors puerta puertas f
""")
TEXTS = nouns("""
    book books libro libros m
    letter letters carta cartas f
    newspaper newspapers periódico periódicos m
    story stories historia historias f
    poem poems poema poemas m
""")
FOOD = nouns("""
    apple apples manzana manzanas f
    orange oranges naranja naranjas f
    tomato tomatoes tomate tomates m
    pear pears pera peras f
    fish fishes pescado pescados m
    cake cakes pastel pasteles m
""")
THINGS = nouns("""
    chair chairs silla sillas f
    car cars coche coches m
    lamp lamps lámpara lámparas f
    hat hats sombrero sombreros m
    bottle bottles botella botellas f
    mirror mirrors espejo espejos m
    key keys llave llaves f
    clock clocks reloj relojes m
""")
READ = Verb(("read", "reads"), ("leo", "lee", "leemos", "leen"))
WRITE = Verb(("write", "writes"), ("escribo", "escribe", "escribimos", "escriben"))
EAT = Verb(("eat", "eats"), ("como", "come", "comemos", "comen"))
CUT = Verb(("cut", "cuts"), ("corto", "corta", "cortamos", "cortan"))
BUY = Verb(("buy", "buys"), ("compro", "compra", "compramos", "compran"))
SELL = Verb(("sell", "sells"), ("vendo", "vende", "vendemos", "venden"))
SEE = Verb(("see", "sees"), ("veo", "ve", "vemos", "ven"))
WANT = Verb(("want", "wants"), ("quiero", "quiere", "queremos", "quieren"))
SEEK = Verb(("look for", "looks for"), ("busco", "busca", "buscamos", "buscan"))
HAVE = Verb(("have", "has"), ("tengo", "tiene", "tenemos", "tienen"))
USES = {READ: TEXTS, WRITE: TEXTS, EAT: FOOD, CUT: FOOD} | dict.fromkeys(
    (BUY, SELL, SEE, WANT, SEEK, HAVE), (*TEXTS, *FOOD, *THINGS)
)
"""What each verb may have as its object."""
COLOURS = {
    "red": ("rojo", "roja"), "black": ("negro", "negra"), "white": ("blanco", "blanca"), "yellow": ("amarillo", "amarilla"),
    "green": ("verde", "verde"), "blue": ("azul", "azul"),
}  # fmt: skip
QUALITIES = {
    "small": ("pequeño", "pequeña"), "old": ("viejo", "vieja"), "new": ("nuevo", "nueva"), "beautiful": ("hermoso", "hermosa"),
    "big": ("grande", "grande"), "expensive": ("caro", "cara"), "strange": ("extraño", "extraña"),
}  # fmt: skip
HUMAN = {
    "tall": ("alto", "alta"), "young": ("joven", "joven"), "famous": ("famoso", "famosa"), "kind": ("amable", "amable"),
    "poor": ("pobre", "pobre"),
}  # fmt: skip
STATES = {
    "tired": ("cansado", "cansada"), "ill": ("enfermo", "enferma"), "happy": ("contento", "contenta"), "alone": ("solo", "sola"),
}  # fmt: skip
"""What Spanish says with `estar`; the others go with `ser`."""
DETERMINERS = {
    "the": ("el", "la", "los", "las"),
    "this": ("este", "esta", "estos", "estas"),
    "that": ("ese", "esa", "esos", "esas"),
    "my": ("mi", "mi", "mis", "mis"),
    "our": ("nuestro", "nuestra", "nuestros", "nuestras"),
    "a": ("un", "una", "unos", "unas"),
}
PLURALS = {"this": "these", "that": "those", "a": "some"}
PLACING = {
    "under": "debajo de", "behind": "detrás de", "near": "cerca de", "in front of": "delante de", "far from": "lejos de",
}  # fmt: skip
SUBJECTS = {"I": 0, "we": 2, "they": 3}  # Spanish leaves these pronouns out


def adjective(forms: tuple[str, str], feminine: bool, plural: bool) -> str:
    """The form that agrees: -s after a vowel, -es after a consonant (`joven` gains an accent)."""
    word = forms[feminine]
    if not plural:
        return word
    return "jóvenes" if word == "joven" else word + ("s" if word[-1] in "aeo" else "es")


def phrase(rng: random.Random, among: Sequence[Noun], adjectives: dict, definite: bool = False) -> Phrase:
    """Article and noun; in half of all cases an adjective, which Spanish puts after the noun."""
    noun, plural = rng.choice(among), rng.random() < 0.4
    determiner = rng.choice([word for word in DETERMINERS if not (definite and word == "a")])
    english = PLURALS.get(determiner, determiner) if plural else determiner
    words = [DETERMINERS[determiner][2 * plural + noun.feminine], noun.spanish[plural]]
    name = noun.english[plural]
    if rng.random() < 0.5:
        chosen = rng.choice(sorted(adjectives))
        name = f"{chosen} {name}"
        words.append(adjective(adjectives[chosen], noun.feminine, plural))
    english = "an" if english == "a" and name[0] in "aeiou" else english
    return Phrase(f"{english} {name}", " ".join(words), noun.feminine, plural)


def someone(rng: random.Random, definite: bool = False) -> Phrase:
    """A person or an animal."""
    if rng.random() < 0.7:
        return phrase(rng, PEOPLE, HUMAN, definite)
    return phrase(rng, ANIMALS, COLOURS | {"old": QUALITIES["old"]}, definite)


def something(rng: random.Random, among: Sequence[Noun], definite: bool = False) -> Phrase:
    """A thing or a place."""
    return phrase(rng, among, QUALITIES | (COLOURS if among is THINGS else {}), definite)


def act(rng: random.Random) -> tuple[str, str]:
    """Somebody does something, or does not, or is asked about."""
    verb = rng.choice(list(USES))
    thing = something(rng, USES[verb])
    way = rng.choice(("says", "denies", "asks", "pronoun"))
    if way == "pronoun":
        subject = rng.choice(list(SUBJECTS))
        not_, no = rng.choice((("", ""), ("do not ", "no ")))
        return (
            f"{subject} {not_}{verb.english[0]} {thing.english}.",
            f"{no}{verb.spanish[SUBJECTS[subject]]} {thing.spanish}.",
        )
    who = phrase(rng, PEOPLE, HUMAN)
    do = "do" if who.plural else "does"
    spanish = verb.spanish[3 if who.plural else 1]
    if way == "denies":
        return (
            f"{who.english} {do} not {verb.english[0]} {thing.english}.",
            f"{who.spanish} no {spanish} {thing.spanish}.",
        )
    if way == "asks":
        return (
            f"{do} {who.english} {verb.english[0]} {thing.english}?",
            f"¿{who.spanish} {spanish} {thing.spanish}?",
        )
    return (
        f"{who.english} {verb.english[not who.plural]} {thing.english}.",
        f"{who.spanish} {spanish} {thing.spanish}.",
    )


def being(rng: random.Random) -> tuple[str, str]:
    """Something is small, somebody is tired."""
    state = rng.random() < 0.4
    among = STATES if state else QUALITIES
    who = someone(rng, definite=True) if state else something(rng, (*PLACES, *THINGS), definite=True)
    word = rng.choice([word for word in among if f" {word} " not in who.english])
    is_ = "are" if who.plural else "is"
    es = (("es", "son"), ("está", "están"))[state][who.plural]
    return (
        f"{who.english} {is_} {word}.",
        f"{who.spanish} {es} {adjective(among[word], who.feminine, who.plural)}.",
    )


def placed(rng: random.Random) -> tuple[str, str]:
    """Somebody is somewhere, or where is he? `de el` becomes `del`."""
    who = someone(rng, definite=True)
    is_, es = ("are", "están") if who.plural else ("is", "está")
    if rng.random() < 0.2:
        return f"where {is_} {who.english}?", f"¿dónde {es} {who.spanish}?"
    where, there = rng.choice(list(PLACING)), something(rng, PLACES)
    spanish = f"{PLACING[where]} {there.spanish}".replace(" de el ", " del ")
    return f"{who.english} {is_} {where} {there.english}.", f"{who.spanish} {es} {spanish}."


def capital(text: str) -> str:
    """With a capital letter at the beginning, after a Spanish question mark too."""
    first = 1 if text.startswith("¿") else 0
    return text[:first] + text[first].upper() + text[first + 1 :]


@cache
def sentences(n: int = 4000, seed: int = 0) -> list[tuple[str, str]]:
    """Different English sentences with different translations, drawn from a seed; do not change the list.

    Args:
        n: How many; there are millions.
        seed: Of the choice.
    """
    rng, found, seen = random.Random(seed), [], set()
    while len(found) < n:
        english, spanish = (capital(text) for text in rng.choice((act, act, being, placed))(rng))
        if english not in seen and spanish not in seen:
            found.append((english, spanish))
            seen |= {english, spanish}
    return found


# Formats; each writer returns the name that loads what it wrote


def as_tsv(path: Path, pairs: Texts | None = None) -> str:
    """A pair per line."""
    path.write_text("".join(f"{one}\t{other}\n" for one, other in texts(pairs)), encoding="utf-8")
    return f"tsv:{path}"


def as_aligned(folder: Path, pairs: Texts | None = None) -> str:
    """`text.en` and `text.es`."""
    files = folder / "text.en", folder / "text.es"
    for file, side in zip(files, zip(*texts(pairs), strict=True), strict=True):
        file.write_text("".join(f"{text}\n" for text in side), encoding="utf-8")
    return f"aligned:{files[0]}:{files[1]}"


def as_moses(path: Path, pairs: Texts | None = None, name: str = "Sentences") -> str:
    """A zip as OPUS packs it."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("README", "Sentences made from a lexicon.\n")
        archive.writestr("LICENSE", "Apache-2.0\n")
        for language, side in zip(("en", "es"), zip(*texts(pairs), strict=True), strict=True):
            archive.writestr(f"{name}.en-es.{language}", "".join(f"{text}\n" for text in side))
    return f"moses:{path}:en-es"


HEADER = "Language: es\nMIME-Version: 1.0\nContent-Type: text/plain; charset=UTF-8\nContent-Transfer-Encoding: 8bit\n"


def as_po(path: Path, pairs: Texts | None = None) -> str:
    """A catalogue for translators."""
    entries = [("", HEADER), *texts(pairs)]
    blocks = [f"msgid {quoted(one)}\nmsgstr {quoted(other)}\n" for one, other in entries]
    path.write_bytes("\n".join(blocks).encode())  # as it is: no line end is translated
    return f"gettext:{path}"


def quoted(text: str) -> str:
    """A text as a .po has it."""
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return '"' + "".join(escapes.get(c, c) for c in text) + '"'


def as_mo(path: Path, pairs: Texts | None = None, order: str = "<") -> str:
    """A catalogue for programs: magic, revision, count, two tables of length and offset; messages in order."""
    entries = sorted((one.encode(), other.encode()) for one, other in [("", HEADER), *texts(pairs)])
    at = 28 + 16 * len(entries)
    tables, strings = [], []
    for side in (0, 1):
        for entry in entries:
            tables += [len(entry[side]), at]
            strings.append(entry[side] + b"\0")
            at += len(entry[side]) + 1
    n = len(entries)
    head = struct.pack(f"{order}7I", 0x950412DE, 0, n, 28, 28 + 8 * n, 0, at)
    path.write_bytes(head + struct.pack(f"{order}{len(tables)}I", *tables) + b"".join(strings))
    return f"gettext:{path}"


def texts(pairs: Texts | None) -> Texts:
    """The pairs, or the usual corpus."""
    return sentences() if pairs is None else pairs
