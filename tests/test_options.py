"""Options: a constructor's keyword-only parameters as something that can be validated and shown."""

from typing import Literal

import pytest
from pydantic import ValidationError

from attnzoo.core import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, option_texts, options_of
from attnzoo.fusions.add import Add
from attnzoo.fusions.low_rank import LowRank
from attnzoo.mechanisms.additive.soft import Soft
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.zoo import load_zoo


class Probe:
    """Something with options.

    Args:
        site: Not an option.
        width: In channels; the text goes on
            in a second line.
        share: From 0 to 1.
        mode: One of two.

    Raises:
        ValueError: never.
    """

    def __init__(
        self,
        site,
        *,
        width: PositiveInt,
        skip: NonNegativeInt = 0,
        share: Fraction = 0.5,
        scale: PositiveFloat = 1.0,
        mode: Literal["a", "b"] = "a",
        deep: bool = False,
        rank: PositiveInt | None = None,
    ):
        pass


class Inherits(Probe):
    """Its own words.

    Args:
        mode: Said anew.
    """


def test_keyword_only_parameters_are_the_options():
    fields = options_of(Probe).model_fields
    assert list(fields) == ["width", "skip", "share", "scale", "mode", "deep", "rank"]
    assert fields["width"].is_required() and not fields["skip"].is_required()
    assert fields["width"].description == "In channels; the text goes on in a second line."
    assert fields["skip"].description == ""


def test_defaults():
    assert options_of(Probe)(width=3).model_dump() == {
        "width": 3, "skip": 0, "share": 0.5, "scale": 1.0, "mode": "a", "deep": False, "rank": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    "given",
    [
        {"width": 1}, {"width": 65536}, {"width": 1, "skip": 0}, {"width": 1, "share": 0}, {"width": 1, "share": 1},
        {"width": 1, "scale": 1e-9}, {"width": 1, "mode": "b"}, {"width": 1, "deep": True}, {"width": 1, "rank": None},
    ],
)  # fmt: skip
def test_good_values(given):
    made = options_of(Probe)(**given).model_dump()
    assert made | given == made


@pytest.mark.parametrize(
    "given,where",
    [
        ({}, "width"), ({"width": 0}, "width"), ({"width": -1}, "width"), ({"width": 65537}, "width"),
        ({"width": "3"}, "width"), ({"width": 3.0}, "width"), ({"width": True}, "width"), ({"width": None}, "width"),
        ({"width": 1, "skip": -1}, "skip"), ({"width": 1, "share": 1.1}, "share"), ({"width": 1, "share": -0.1}, "share"),
        ({"width": 1, "share": float("nan")}, "share"), ({"width": 1, "scale": 0}, "scale"),
        ({"width": 1, "scale": float("inf")}, "scale"), ({"width": 1, "scale": float("nan")}, "scale"),
        ({"width": 1, "mode": "c"}, "mode"), ({"width": 1, "deep": 1}, "deep"), ({"width": 1, "deep": "yes"}, "deep"),
        ({"width": 1, "rank": 0}, "rank"), ({"width": 1, "with": 2}, "with"), ({"width": 1, "site": 2}, "site"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_where_they_are(given, where):
    with pytest.raises(ValidationError) as caught:
        options_of(Probe)(**given)
    assert {error["loc"][0] for error in caught.value.errors()} == {where}


def test_all_faults_at_once():
    with pytest.raises(ValidationError) as caught:
        options_of(Probe)(width=0, mode="c", depth=1)
    assert {error["loc"][0] for error in caught.value.errors()} == {"width", "mode", "depth"}


def test_options_are_frozen_and_made_once():
    made = options_of(Probe)(width=1)
    with pytest.raises(ValidationError):
        made.width = 2
    assert options_of(Probe) is options_of(Probe)


def test_texts_are_inherited_and_said_anew():
    texts = option_texts(Inherits)
    assert texts["mode"] == "Said anew." and texts["share"] == "From 0 to 1."
    assert set(option_texts(Probe)) == {"site", "width", "share", "mode"}
    assert option_texts(object) == {}


def test_built_in_options():
    assert list(options_of(Softmax).model_fields) == []
    assert list(options_of(Soft).model_fields) == ["variant", "hidden", "gate_scale"]
    assert list(options_of(Add).model_fields) == ["start"]  # inherited
    assert list(options_of(LowRank).model_fields) == ["rank", "activation", "start"]


def test_every_built_in_option_is_explained():
    zoo, count = load_zoo(), 0
    for entry in (*zoo.mechanisms.values(), *zoo.fusions.values()):
        if entry.plugin == "attnzoo":
            for name, field in options_of(entry.value).model_fields.items():
                assert field.description and field.description.endswith("."), (entry.name, name)
                count += 1
    assert count > 20
