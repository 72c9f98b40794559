"""JSON in and out: what goes in comes out as it was, or is refused by its path."""

import enum
import json
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from types import MappingProxyType
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, TypeAdapter

from pmqd import codec


class Colour(enum.Enum):
    """An enum."""

    RED = "red"


@dataclass
class Address:
    """A dataclass with what JSON does not know."""

    street: str
    since: date


class Person(BaseModel):
    """A model with an alias."""

    name: str = Field(alias="fullName")
    balance: Decimal


Pair = namedtuple("Pair", "left right")  # noqa: PYI024 - the untyped form is what users have too
ADDRESS = Address("Main", date(2026, 1, 2))
PERSON = Person(fullName="Ada", balance=Decimal("1.10"))


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (UUID(int=5), UUID),
        (datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC), datetime),
        (date(2026, 1, 2), date),
        (Decimal("0.10000000000000000000000001"), Decimal),
        (timedelta(seconds=1.5), timedelta),
        (Colour.RED, Colour),
        (ADDRESS, Address),
        (PERSON, Person),
        ([ADDRESS], list[Address]),
        ({"a": PERSON}, dict[str, Person]),
        ({1, 2}, set[int]),
        ((1, "a"), tuple[int, str]),
        ({UUID(int=1): 2}, dict[UUID, int]),
        ({7: Decimal(1)}, dict[int, Decimal]),
        (OrderedDict(a=1), dict[str, int]),
    ],
)
def test_comes_out_as_annotated(value: Any, kind: Any) -> None:
    """What was written is read back by its annotation as the same value."""
    assert TypeAdapter(kind).validate_python(codec.loads(codec.dumps(value))) == value


def test_tuples_with_names_and_mappings() -> None:
    """Named tuples become arrays, any mapping an object."""
    assert codec.dumps(Pair(1, 2)) == b"[1,2]"
    assert codec.dumps(MappingProxyType({"a": 1})) == b'{"a":1}'


class Odd:
    """Has no JSON form."""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": [1, Odd()]}, r"\$\.a\[1\]: a value of type .*Odd has no JSON form"),
        ({"a": b"bytes"}, r"\$\.a: a value of type bytes has no JSON form"),
        ({"a": 1j}, r"\$\.a: a value of type complex"),
        ({Odd(): 1}, r"\$ \(key\): a value of type .*Odd"),
    ],
)
def test_types_without_a_form_are_named_with_their_path(value: object, text: str) -> None:
    """The error says which type, and where."""
    with pytest.raises(TypeError, match=text):
        codec.dumps(value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": ["x", "b\0c"]}, r"\$\.a\[1\]: a NUL"),
        ({"a\0": 1}, r"\$ \(key\): a NUL"),
        ({"a": float("nan"), "b": None}, r"\$\.a: NaN and infinity"),
        ([None, float("-inf")], r"\$\[1\]: NaN and infinity"),
        (Address("a\0", date(2026, 1, 1)), r"\$\.street: a NUL"),
        ({"a": "\ud800"}, r"\$\.a: the text holds half a surrogate"),
        ({"a": 2**64}, r"\$\.a: an integer of 65 bits"),
        ({"a": 10**10000}, r"\$\.a: an integer of 33220 bits"),
    ],
)
def test_values_that_jsonb_does_not_take_are_named_with_their_path(value: object, text: str) -> None:
    """What PostgreSQL would refuse, or JSON change silently, is refused here."""
    with pytest.raises(ValueError, match=text):
        codec.dumps(value)


def test_a_written_out_escape_is_no_nul() -> None:
    r"""The six characters \u0000 in a text are harmless and pass."""
    for text in ("\\u0000", "\\\\u0000", "a\\u0000b"):
        assert codec.loads(codec.dumps({"a": text})) == {"a": text}
    with pytest.raises(ValueError, match="NUL"):
        codec.dumps("\\\0")


def test_null_and_plain_values_pass() -> None:
    """None is null and no cause for complaint."""
    assert codec.dumps({"a": None, "b": [None, 0.5, True]}) == b'{"a":null,"b":[null,0.5,true]}'


def test_endless_values_are_errors() -> None:
    """A list that holds itself is an error, not a crash."""
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(TypeError):
        codec.dumps(endless)


def test_no_json_is_a_value_error() -> None:
    """What cannot be read is a ValueError."""
    with pytest.raises(json.JSONDecodeError):
        codec.loads(b"{")


def test_long_integers_of_others_are_exact() -> None:
    """What another producer wrote with more than 64 bits is not rounded."""
    for text in ('{"a":123456789012345678901234567890}', b"[-18446744073709551617]"):
        assert codec.loads(text) == json.loads(text)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=15,
)


@given(json_values)
def test_every_json_value_survives_or_holds_a_nul(value: Any) -> None:
    """Any JSON value is written so that another reader reads the same, unless jsonb could not hold it."""
    if "\\u0000" in json.dumps(value).replace("\\\\", ""):
        with pytest.raises(ValueError, match="NUL"):
            codec.dumps(value)
    else:
        assert json.loads(codec.dumps(value)) == value
