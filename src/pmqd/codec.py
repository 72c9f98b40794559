"""Payloads and results to JSON text and back. Pure."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from itertools import islice
from pathlib import PurePath
from typing import Any
from uuid import UUID

import orjson
from pydantic import BaseModel

_LOOKED_AT = 100
_NUL = b"\\u0000"
_LONG_NUMBER = b"0" * 20
_DIGITS = bytes(ord("0") if chr(each).isdigit() and each < 128 else ord(" ") for each in range(256))
"""For `bytes.translate`: every digit a zero. So a search for twenty of them is ten times as fast as a regular expression."""
_TEXTS = (str, bytes, bytearray)
_LISTS = (list, tuple)
_PLAIN = (str, int, float, bool, type(None), UUID, datetime, date, time, Enum)


def dumps(value: Any) -> bytes:
    """Writes JSON text.

    UUID, datetime, date, time, enums and dataclasses are written as one expects, Decimal as text (so that
    nothing is rounded), timedelta as seconds, sets and tuples as arrays, pydantic models by their aliases.

    Args:
        value: What to write.

    Returns:
        JSON text in UTF-8 that PostgreSQL's jsonb takes.

    Raises:
        TypeError: Something in it has no JSON form; names its type and its path.
        ValueError: Something in it has no place in jsonb (NUL, half a surrogate pair, NaN, a too large
            integer); names its path.
    """
    try:
        text = orjson.dumps(value, default=_default)
    except (TypeError, ValueError, RecursionError) as error:
        text = _second_try(value, error)
    if _NUL in text and _has_nul(text):
        raise ValueError(f"{_path_of(value, _is_nul)}: a NUL character cannot be stored in jsonb")
    if b"null" in text:  # orjson writes NaN and infinity as null: nothing is changed silently here
        path = _path_of(value, _is_not_finite, otherwise="")
        if path:
            raise ValueError(f"{path}: NaN and infinity have no JSON form")
    return text


def loads(text: bytes | str) -> Any:
    """Reads JSON text.

    Raises:
        ValueError: It is no JSON, nested too deeply, or an integer in it has more than 4,300 digits.
    """
    if _LONG_NUMBER not in (text.encode() if isinstance(text, str) else text).translate(_DIGITS):
        return orjson.loads(text)
    try:
        return json.loads(text)  # slower, but exact: orjson reads an integer of over 64 bits as a float
    except RecursionError:  # it may come from Redis: one error for whoever reads
        raise ValueError("nested too deeply") from None


def is_surely_longer(value: Any, limit: int) -> bool:
    """Whether the JSON of a value has more than `limit` bytes, as far as a quick look at its first texts can tell.

    What has a gigabyte is refused so before it is copied; what is missed here is measured once it is written.

    Args:
        value: What is to be written.
        limit: Bytes.
    """
    parts, size = [value], 0
    for looked, part in enumerate(parts):  # which grows meanwhile
        if looked == _LOOKED_AT:
            break
        if isinstance(part, _TEXTS):  # a tuple: `str | bytes` would be made anew each time
            size += len(part)
            if size > limit:
                return True
        elif isinstance(part, dict):
            parts.extend(islice(part.values(), _LOOKED_AT))
        elif isinstance(part, _LISTS):
            parts.extend(part[:_LOOKED_AT])
    return False


def _second_try(value: Any, error: Exception) -> bytes:
    # Keys that are no text (int, UUID, date) are rare and slower to write, so they are a second try.
    try:
        return orjson.dumps(value, default=_default, option=orjson.OPT_NON_STR_KEYS)
    except (TypeError, ValueError, RecursionError) as second:
        raise _named(value, second) from error


def _named(value: Any, error: Exception) -> TypeError | ValueError:
    """The error with the path of what caused it."""
    for path, leaf in _walk(value, "$", 0):
        if isinstance(leaf, int) and not isinstance(leaf, bool | Enum) and not -(2**63) <= leaf < 2**64:
            return ValueError(
                f"{path}: an integer of {leaf.bit_length()} bits cannot be written, at most 64 can"
            )
        if isinstance(leaf, str) and not _is_unicode(leaf):
            return ValueError(f"{path}: the text holds half a surrogate pair, which UTF-8 cannot write")
        if isinstance(leaf, list | tuple | dict):  # where the walk gave up
            return TypeError(f"{path[:60]}…: nested too deeply")
        if not isinstance(leaf, _PLAIN):
            kind = f"{type(leaf).__module__}.{type(leaf).__qualname__}".removeprefix("builtins.")
            return TypeError(f"{path}: a value of type {kind} has no JSON form")
    return TypeError(f"the value has no JSON form: {error}")


def _default(value: Any) -> Any:
    """What orjson does not write by itself; raises TypeError for what has no form."""
    match value:
        case Decimal() | PurePath():
            return str(value)
        case timedelta():
            return value.total_seconds()
        case set() | frozenset() | tuple():
            return list(value)
        case BaseModel():
            return value.model_dump(mode="json", by_alias=True)
        case Mapping():
            return dict(value)
    raise TypeError(type(value).__qualname__)


def _walk(value: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    """Every leaf with its path, as far as any depth that can be written."""
    if depth > 250:
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield f"{path} (key)", key
            yield from _walk(item, f"{path}.{key}", depth + 1)
    elif isinstance(value, list | tuple | set | frozenset):
        for index, item in enumerate(value):
            yield from _walk(item, f"{path}[{index}]", depth + 1)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for item in dataclasses.fields(value):
            yield from _walk(getattr(value, item.name, None), f"{path}.{item.name}", depth + 1)
    else:
        yield from _written(value, path, depth)


def _written(value: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    if isinstance(value, _PLAIN):
        yield path, value
        return
    try:
        yield from _walk(_default(value), path, depth + 1)
    except TypeError:
        yield path, value


def _path_of(value: Any, bad: Any, otherwise: str = "$") -> str:
    return next((path for path, leaf in _walk(value, "$", 0) if bad(leaf)), otherwise)


def _is_nul(leaf: Any) -> bool:
    return isinstance(leaf, str) and "\0" in leaf


def _is_not_finite(leaf: Any) -> bool:
    return isinstance(leaf, float) and not math.isfinite(leaf)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _has_nul(text: bytes) -> bool:
    """Whether a NUL is really in it: an even number of backslashes before means a written-out backslash."""
    start = text.find(_NUL)
    while start >= 0:
        before = len(text[:start]) - len(text[:start].rstrip(b"\\"))
        if before % 2 == 0:
            return True
        start = text.find(_NUL, start + 1)
    return False
