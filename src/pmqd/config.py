"""Where the settings are read from: a file (TOML), over it variables PMQD_SECTION__KEY, over them the command line.

Everything that is wrong is told at once, one line per fault, with the name as the user wrote it.
"""

import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from pmqd.address import is_loopback
from pmqd.errors import ConfigError
from pmqd.faults import (
    Place,
    fault_lines,
    hint,
    place_name,
    redis_contradictions,
    redis_warnings,
    settings_of,
)
from pmqd.settings import (
    LogSettings,
    MaintenanceSettings,
    MigratorSettings,
    PoolSettings,
    PostgresSettings,
    QueueSettings,
    RedisSettings,
    Section,
    Settings,
    WebSettings,
    masked,
    split_listen,
)

__all__ = [
    "LogSettings",
    "MaintenanceSettings",
    "MigratorSettings",
    "PoolSettings",
    "PostgresSettings",
    "QueueSettings",
    "RedisSettings",
    "Settings",
    "WebSettings",
    "find_file",
    "is_loopback",
    "load",
    "masked",
    "producer_settings",
    "split_listen",
    "warnings",
]

SYSTEM_FILE = Path("/etc/pmqd/pmqd.toml")
LOCAL_FILE = Path("pmqd.toml")

_PREFIX = "PMQD_"
# Variables of that prefix that are no settings: where the file is, what tests steer.
_NO_SETTING = re.compile(r"PMQD_(CONFIG|CRASHPOINT.*|CHAOS_.*|TEST_.*)")
_PRODUCER_SECTIONS = ("postgres", "redis", "queues")


@dataclass
class _Input:
    """What was read, before it is checked; `origins` tells which places the environment set, by which variable."""

    values: dict[str, Any]
    file: Path | None
    origins: dict[Place, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def load(
    path: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Settings:
    """Read and check all settings.

    Args:
        path: the file; without it PMQD_CONFIG, /etc/pmqd/pmqd.toml or pmqd.toml here, whichever comes first.
        overrides: settings of the command line, by their dotted names or as nested tables; None leaves one as it is.
        environ: the environment.

    Raises:
        ConfigError: the file cannot be read, or a setting is unknown or bad; one line per fault.
    """
    return _checked(_read(path, overrides or {}, environ))


def producer_settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings of a program that only enqueues: those that concern the daemon are neither read nor checked.

    Raises:
        ConfigError: as `load`.
    """
    given = _read(None, {}, environ)
    ignored = set(settings_of(Settings)) - set(_PRODUCER_SECTIONS)
    given.values = {name: value for name, value in given.values.items() if name not in ignored}
    return _checked(given)


def find_file(path: Path | None = None, environ: Mapping[str, str] = os.environ) -> Path | None:
    """The configuration file that `load` reads, or None if there is none."""
    named = path or (Path(environ["PMQD_CONFIG"]) if environ.get("PMQD_CONFIG") else None)
    return named or next((file for file in (SYSTEM_FILE, LOCAL_FILE) if file.exists()), None)


def _checked(given: _Input) -> Settings:
    faults = list(given.faults)
    try:
        settings = Settings.model_validate(given.values)
    except ValidationError as error:
        faults += fault_lines(error, given.origins, str(given.file) if given.file else "")
    else:
        faults += _contradictions(settings)
    if faults:
        raise ConfigError("\n".join(faults))
    return settings


def _contradictions(settings: Settings) -> list[str]:
    """Faults that only several settings together make."""
    found = redis_contradictions(settings.redis)
    host, _ = split_listen(settings.web.listen)
    if not is_loopback(host) and not settings.web.token:
        found.append(
            f"web.listen = {settings.web.listen!r}: an address beyond loopback needs web.token; allowed without one are"
            " 127.0.0.1:PORT, [::1]:PORT and localhost:PORT"
        )
    names: set[str] = set()
    for number, pool in enumerate(settings.workers):
        if pool.name.lower() in names:
            found.append(
                f"workers[{number}].name = {pool.name!r}: another pool has this name; each needs its own"
            )
        names.add(pool.name.lower())
        found += [
            f"workers[{number}].queues: {queue!r} is listed twice; allowed is once"
            for queue in dict.fromkeys(pool.queues)
            if pool.queues.count(queue) > 1
        ]
    for name, queue_settings in settings.queues.items():
        base, most = queue_settings.retry_base_seconds, queue_settings.retry_max_seconds
        if base is not None and most is not None and base > most:
            found.append(
                f"{place_name(('queues', name, 'retry_base_seconds'))} = {base:g}: allowed is at most its"
                f" retry_max_seconds, {most:g}"
            )
    return found


def _read(path: Path | None, overrides: Mapping[str, Any], environ: Mapping[str, str]) -> _Input:
    file = find_file(path, environ)
    given = _Input(_parsed(file) if file is not None else {}, file)
    for name in sorted(environ):
        if name.startswith(_PREFIX) and not _NO_SETTING.fullmatch(name):
            _take_variable(given, name, environ[name])
    for dotted, value in overrides.items():
        _take_override(given, tuple(dotted.split(".")), value)
    return given


def _parsed(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_bytes().decode())
    except OSError as error:
        raise ConfigError(
            f"configuration file {_printable(file)}: {error.strerror}; allowed is a readable TOML file"
        ) from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # no UTF-8, no TOML, nested without end, a zero byte in the path
        raise ConfigError(f"configuration file {_printable(file)}: not valid TOML: {error}") from error


def _printable(text: object) -> str:
    """Bytes that are no UTF-8, and control characters, as escapes: the message goes to a terminal or a log."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(text))


def _take_override(given: _Input, names: tuple[str, ...], value: Any) -> None:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _take_override(given, (*names, name), inner)
    elif value is not None:
        place: Place = names[:-1]
        if names[0] in ("workers", "queues") and len(names) > 2:
            place, _ = _named_place(given, names[0], names[1])
        table = _table_at(given.values, place)
        if table is not None:
            table[names[-1]] = value
            given.origins[*place, names[-1]] = f"{'.'.join(names)} (command line)"


# --- the environment


def _take_variable(given: _Input, name: str, text: str) -> None:
    parts = name.removeprefix(_PREFIX).split("__")
    section = parts[0].lower()
    model: type[Section] | None
    if section in ("workers", "queues") and len(parts) >= 3:
        place, model = _named_place(given, section, "__".join(parts[1:-1]))
    elif len(parts) == 2 and _section_model(section) is not None:
        place, model = (section,), _section_model(section)
    elif len(parts) == 1 and section in _single_settings():
        place, model = (), Settings
    else:
        place, model = (), None
    key = parts[-1].lower()
    # A pool's name is in the variable's own name: it finds the pool, and does not rename it.
    if model is None or key not in settings_of(model) or (model is PoolSettings and key == "name"):
        given.faults.append(f"{_printable(name)}: there is no such setting{hint(name, _variables())}")
        return
    table = _table_at(given.values, place)
    if table is not None:
        table[key] = _from_text(settings_of(model)[key], text)
        given.origins[*place, key] = name


def _single_settings() -> set[str]:
    """The settings outside every section."""
    several = {"workers", "queues"}
    return {name for name in settings_of(Settings) if name not in several and _section_model(name) is None}


def _variables() -> list[str]:
    """The names of all variables, with NAME for those of a pool or queue."""
    names = []
    for section in settings_of(Settings):
        named: dict[str, type[Section]] = {"workers": PoolSettings, "queues": QueueSettings}
        model = named.get(section) or _section_model(section)
        name = "__NAME" if section in ("workers", "queues") else ""
        keys = (
            [f"{name}__{key.upper()}" for key in settings_of(model) if key != "name"]
            if model is not None
            else [""]
        )
        names += [f"{_PREFIX}{section.upper()}{key}" for key in keys]
    return names


def _section_model(name: str) -> type[Section] | None:
    info = Settings.model_fields.get(name)
    found = info.annotation if info is not None else None
    return found if isinstance(found, type) and issubclass(found, Section) else None


def _named_place(given: _Input, section: str, name: str) -> tuple[Place, type[Section]]:
    """A pool or queue by the name in a variable; one that is not in the file is added."""
    if section == "queues":
        return ("queues", _same_name(name, _queue_names(given.values))), QueueSettings
    pools = given.values.setdefault("workers", [])
    names = [pool.get("name", "default") if isinstance(pool, dict) else "" for pool in pools]
    known = _same_name(name, [found for found in names if isinstance(found, str)])
    if known not in names:
        pools.append({"name": name})
        given.origins["workers", len(names)] = f"{_PREFIX}WORKERS__{name}"
        names.append(name)
    return ("workers", names.index(known)), PoolSettings


def _queue_names(values: Mapping[str, Any]) -> list[str]:
    tables = values.get("queues")
    pools = values.get("workers")
    names = list(tables) if isinstance(tables, dict) else []
    for pool in pools if isinstance(pools, list) else []:
        listed = pool.get("queues") if isinstance(pool, dict) else None
        names += [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    return names


def _same_name(name: str, known: list[str]) -> str:
    """The known name that a variable means: shells allow neither - nor : in variables, and like capitals."""
    if name in known:
        return name
    plain = re.sub(r"[^a-z0-9]", "_", name.lower())
    return next((other for other in known if re.sub(r"[^a-z0-9]", "_", other.lower()) == plain), name)


def _table_at(values: dict[str, Any], place: Place) -> dict[str, Any] | None:
    """The table at a place, made when missing; None if the file has something else there, which is told later."""
    found: Any = values
    for step in place:
        if isinstance(found, dict):
            found = found.setdefault(step, {})
        else:
            found = found[step] if isinstance(found, list) and isinstance(step, int) else None
    return found if isinstance(found, dict) else None


def _from_text(info: FieldInfo, text: str) -> Any:
    """A variable's text as the type of its setting; unchanged where it does not fit, so that the check tells it."""
    kinds = _kinds(info.annotation)
    try:
        if int in kinds:
            return int(text)
        if float in kinds:
            return float(text)
        if list in kinds and text.lstrip().startswith("["):
            return json.loads(text)
    except (ValueError, RecursionError):
        return text
    if list in kinds:
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


def _kinds(annotation: Any) -> set[Any]:
    """The plain types in an annotation: {int, NoneType} of `int | None`, {list} of `list[str]`."""
    origin = get_origin(annotation)
    if origin is not None and hasattr(annotation, "__metadata__"):
        return _kinds(get_args(annotation)[0])
    if origin is list:
        return {list}
    return (
        {kind for arg in get_args(annotation) for kind in _kinds(arg)} if origin is not None else {annotation}
    )


# --- what is legal but unwise


def warnings(settings: Settings, file: Path | None = None) -> list[str]:
    """What is legal but unwise, one line each.

    Args:
        settings: what `load` returned.
        file: the file that it read (`find_file`); whether others may read passwords there is looked at too.
    """
    found = [*_general_warnings(settings), *_pool_warnings(settings), *_queue_warnings(settings)]
    if file is not None and file.stat().st_mode & 0o002:
        found.append(
            f"{file}: every user of this machine may change it, and with it what runs here: chmod o-w"
        )
    if file is not None and file.stat().st_mode & 0o004 and _passwords_in(_parsed(file)):
        names = ", ".join(_passwords_in(_parsed(file)))
        found.append(
            f"{file}: every user of this machine can read it, and {names} holds a password: chmod o-r"
        )
    return found


def _passwords_in(values: Mapping[str, Any]) -> list[str]:
    """The settings of a (valid) file that hold a password."""
    at = {
        f"{section}.{key}": str(values.get(section, {}).get(key, ""))
        for section, key in (("postgres", "dsn"), ("redis", "url"), ("web", "token"))
    }
    return [name for name, value in at.items() if (value if name == "web.token" else "***" in masked(value))]


def _general_warnings(settings: Settings) -> list[str]:
    found = redis_warnings(settings.redis)
    if not settings.postgres.dsn:
        found.append(
            "postgres.dsn is empty: libpq looks for a server in its own places (PGHOST, a local socket …)"
        )
    if settings.drain_seconds > 80:
        found.append(
            f"drain_seconds = {settings.drain_seconds:g}: systemd kills a service 90 s after the stop by default;"
            " set TimeoutStopSec= in the unit to at least 10 s more than drain_seconds"
        )
    if 0 < len(settings.web.token) < 16:
        found.append(f"web.token has {len(settings.web.token)} characters: less than 16 can be guessed")
    return found


def _pool_warnings(settings: Settings) -> list[str]:
    found = [] if settings.workers else ["workers: there is no pool, so this instance runs no jobs"]
    for pool in settings.workers:
        if pool.processes * pool.concurrency > 2000:
            found.append(
                f'pool "{pool.name}": {pool.processes} x {pool.concurrency} jobs at once is very much'
            )
        if pool.max_jobs == 1:
            found.append(f'pool "{pool.name}": max_jobs = 1 starts a new process for each job')
        if 0 < pool.max_memory_mb < 64:
            found.append(
                f'pool "{pool.name}": max_memory_mb = {pool.max_memory_mb} is about what an idle process holds, so each'
                " job may end one"
            )
    return found


def _queue_warnings(settings: Settings) -> list[str]:
    found = []
    served = {name for pool in settings.workers for name in pool.queues}
    for name, queue in settings.queues.items():
        if settings.workers and all(pool.queues for pool in settings.workers) and name not in served:
            found.append(f'queues."{name}": no pool of this instance serves this queue')
        elif (queue.timeout_seconds or 0) > settings.drain_seconds:
            found.append(
                f'queues."{name}".timeout_seconds = {queue.timeout_seconds:g} is longer than drain_seconds ='
                f" {settings.drain_seconds:g}: a stop may cut such a job off (it runs again, uncharged)"
            )
    return found
