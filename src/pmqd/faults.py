"""What is wrong with the settings, in words: one line per fault with the setting's name, its value, what is allowed."""

import difflib
import json
import re
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from pmqd.address import hash_tag
from pmqd.settings import (
    Allowed,
    PoolSettings,
    QueueSettings,
    RedisSettings,
    Secret,
    Section,
    Settings,
    masked,
)

_TLS_SETTINGS = {"ca_file": "", "cert_file": "", "key_file": "", "tls_verify": "full"}

Place = tuple[str | int, ...]
"""Where a value stands: ("workers", 0, "processes")."""

_SHOWN = 100


def fault_lines(error: ValidationError, origins: Mapping[Place, str], file: str) -> list[str]:
    """One line per fault that pydantic found.

    Args:
        error: what `Settings.model_validate` raised.
        origins: the places that something other than the file set, and the name that it goes by there.
        file: the file that the rest comes from, or "".
    """
    details = error.errors(include_url=False, include_context=False)
    return [_line(fault, origins, f"{file}: " if file else "") for fault in details]


def _line(fault: ErrorDetails, origins: Mapping[Place, str], file: str) -> str:
    place: Place = tuple(fault["loc"])
    if place[-1] == "[key]":  # the name of a table in `queues`
        return f"{_written(place[:-1], origins, file)}: allowed as a queue's name is {allowed(_queue_name())}"
    name = _written(place, origins, file)
    if fault["type"] == "extra_forbidden":
        # Without its value: it may be a password under a misspelt name.
        return f"{name}: there is no such setting{hint(str(place[-1]), settings_of(_model_of(place[:-1])))}"
    if fault["type"] == "missing":
        return f"{name} is missing: allowed is {_allowed_at(place)}"
    return f"{name} = {_shown(place, fault['input'])}: allowed is {_allowed_at(place)}"


def _written(place: Place, origins: Mapping[Place, str], file: str) -> str:
    """A setting's name as the user wrote it: the variable's where the environment set it."""
    for length in range(len(place), 0, -1):
        origin = origins.get(place[:length])
        if origin is not None:
            rest = [str(step).upper() for step in place[length:] if isinstance(step, str)]
            return "__".join([origin, *rest])
    return file + place_name(place)


def place_name(place: Place) -> str:
    """The dotted name of a place as TOML writes it: workers[0].processes, queues."email-sending".max_attempts."""
    text = ""
    for step in place:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            bare = re.fullmatch(r"[A-Za-z0-9_-]+", step) and text != "queues"
            text += ("." if text else "") + (step if bare else json.dumps(step))
    return text


def hint(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them if none is near."""
    names = list(known)
    near = difflib.get_close_matches(name.lower(), [other.lower() for other in names], n=1, cutoff=0.6)
    if near:
        return f"; did you mean {next(other for other in names if other.lower() == near[0])}?"
    return f"; allowed are {', '.join(names)}" if len(names) <= 16 else "; docs/configuration.md lists all"


def settings_of(model: type[Section]) -> dict[str, FieldInfo]:
    """The settings of a section by the names that users write."""
    return {info.alias or name: info for name, info in model.model_fields.items()}


def allowed(info: FieldInfo) -> str:
    """What a setting may be, from its own words, or from its type and limits."""
    for note in info.metadata:
        if isinstance(note, Allowed):
            return note.text
    kinds = _plain(info.annotation)
    limits = {key: getattr(note, key) for note in info.metadata for key in ("ge", "le") if hasattr(note, key)}
    if int in kinds or float in kinds:
        return f"a {'whole ' if int in kinds else ''}number from {limits['ge']:g} to {limits['le']}"
    if list in kinds:
        return "a list of queue names"
    return " or ".join(json.dumps(choice) for choice in kinds)


def _plain(annotation: Any) -> dict[Any, None]:
    """The plain types or choices in an annotation: int of `int | None`, list of `list[str]`, "id" of Literal["id"]."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return {
            kind: None for part in get_args(annotation) for kind in _plain(part) if kind is not type(None)
        }
    if origin is Literal:
        return dict.fromkeys(get_args(annotation))
    return {origin or annotation: None}


def _queue_name() -> FieldInfo:
    """The rule of queue names, as that of one entry of a pool's list."""
    return FieldInfo.from_annotation(get_args(PoolSettings.model_fields["queues"].annotation)[0])


def _model_of(place: Place) -> type[Section]:
    """The model of the table at a place."""
    if not place:
        return Settings
    if place[0] in ("workers", "queues"):
        return PoolSettings if place[0] == "workers" else QueueSettings
    found = Settings.model_fields[str(place[0])].annotation
    return found if isinstance(found, type) and issubclass(found, Section) else Settings


def _allowed_at(place: Place) -> str:
    tables = {
        "workers": "tables, each begun with [[workers]]",
        "queues": 'tables, each begun with [queues."NAME"]',
    }
    section = str(place[0])
    if len(place) == 1 and section in tables:
        return tables[section]
    if _is_table(place):
        return f"a table with {', '.join(settings_of(_model_of(place)))}"
    if len(place) == 4:  # an entry of a pool's `queues`
        return allowed(_queue_name())
    return allowed(_info_at(place))


def _is_table(place: Place) -> bool:
    named = place[0] in ("workers", "queues")
    return len(place) == 2 if named else len(place) == 1 and _model_of(place) is not Settings


def _info_at(place: Place) -> FieldInfo:
    last = [step for step in place if isinstance(step, str)][-1]
    return settings_of(_model_of(place[:-1]))[last]


def _shown(place: Place, value: Any) -> str:
    if (
        isinstance(value, dict | list)
        or _is_table(place)
        or (len(place) == 1 and place[0] in ("workers", "queues"))
    ):
        return _kind(value)  # a whole connection string may stand where a table should
    secret = (
        next((note for note in _info_at(place).metadata if isinstance(note, Secret)), None)
        if len(place) < 4
        else None
    )
    if secret is not None:
        return "***" if secret.whole or not isinstance(value, str) else repr(masked(value))
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _kind(value: Any) -> str:
    names = {
        dict: "a table",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "a date or time")


# --- what several settings of [redis] say together


def redis_contradictions(redis: RedisSettings) -> list[str]:
    """Faults that only several of the settings in `[redis]` make, one line each."""
    found = []
    address = redis.address
    if len(address.places) > 1 and not address.master and not hash_tag(redis.prefix):
        found.append(
            f"redis.prefix = {redis.prefix!r}: several servers in redis.url are the nodes of a cluster, which needs a hash"
            ' tag here; allowed is such as "{pmqd}:"'
        )
    if redis.key_file and not redis.cert_file:
        found.append("redis.key_file: allowed is one only beside redis.cert_file, whose key it is")
    if not address.tls:
        found += [
            f"redis.{name} = {getattr(redis, name)!r}: allowed is it only with rediss:// in redis.url; without TLS nothing"
            " would be checked"
            for name, default in _TLS_SETTINGS.items()
            if getattr(redis, name) != default
        ]
    return found


def redis_warnings(redis: RedisSettings) -> list[str]:
    """What is legal but unwise in `[redis]`, one line each."""
    if redis.tls_verify == "none":
        return ['redis.tls_verify = "none": somebody in between can pass for Redis, and reads its password']
    if redis.tls_verify == "ca" and not redis.ca_file:
        return [
            'redis.tls_verify = "ca" without redis.ca_file: any server passes for Redis that has any public certificate'
        ]
    return []
