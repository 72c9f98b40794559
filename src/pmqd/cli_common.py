"""What all commands share: options, settings, stores that are opened late, reading arguments, writing answers.

The stores are imported inside functions: `pmqd run` turns this process into the master, which must not have
loaded them.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import orjson
import typer

from pmqd import config, job
from pmqd.config import Settings
from pmqd.errors import ConfigError, EnqueueError, NotFound, UsageError
from pmqd.logs import escaped

if TYPE_CHECKING:
    from rich.console import Console

    from pmqd.broker import Broker
    from pmqd.store import Store

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        help="Configuration file. Default: $PMQD_CONFIG, /etc/pmqd/pmqd.toml, ./pmqd.toml.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SETTING=VALUE",
        help="One setting over file and environment, as postgres.dsn=… or workers.mail.processes=4. Repeatable.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object or array on stdout.")]
QueueOption = Annotated[str | None, typer.Option("--queue", "-q", metavar="QUEUE", help="Only this queue.")]
KindOption = Annotated[str | None, typer.Option("--kind", "-k", metavar="KIND", help="Only this kind.")]


# --- settings and stores -------------------------------------------------------------------------------------

_before_command: Path | None = None


def remember_config(path: Path | None) -> None:
    """Keeps the `--config` that stood before the command's name; called once per command line."""
    global _before_command  # noqa: PLW0603 - one command per process
    _before_command = path


def chosen_config(path: Path | None) -> Path | None:
    """The `--config` after the command's name, else the one before it, absolute: the daemon may be asked again."""
    found = path or _before_command
    return found.absolute() if found else None


def load_settings(path: Path | None, assignments: Sequence[str] | None = None) -> Settings:
    """The settings for a command: file, environment, then `--set`.

    Args:
        path: the file of `--config`, or None for the usual places.
        assignments: `SETTING=VALUE` texts.

    Raises:
        ConfigError: a setting is unknown or its value is not allowed.
        UsageError: an assignment has no `=`.
    """
    try:
        return config.load(chosen_config(path), environ={**os.environ, **as_environment(assignments)})
    except ConfigError as error:
        raise ConfigError(_named_as_given(str(error), assignments)) from error


def _named_as_given(faults: str, assignments: Sequence[str] | None) -> str:
    """The faults, with what `--set` named under the name that stood there and not under the variable's."""
    names = [text.partition("=")[0] for text in assignments or ()]
    given = {_variable(name): f"--set {name}" for name in names}
    return "\n".join(
        re.sub(r"^PMQD_[^\s:=]*", lambda found: given.get(found[0], found[0]), line)
        for line in faults.splitlines()
    )


def as_environment(assignments: Sequence[str] | None) -> dict[str, str]:
    """The variables that say the same as `--set`: one set of rules for reading texts, and children inherit them.

    Raises:
        UsageError: an assignment has no `=`.
    """
    found = {}
    for text in assignments or ():
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageError(f"--set {text!r} is not SETTING=VALUE, as redis.prefix=app: is")
        found[_variable(name)] = value
    return found


def _variable(name: str) -> str:
    """`workers.mail.processes` as the environment names it: a name in the middle keeps its case and its dots."""
    section, *rest = name.split(".")
    middle, key = ".".join(rest[:-1]), rest[-1] if rest else ""
    return "__".join(
        ["PMQD_" + section.upper(), *([middle] if middle else []), *([key.upper()] if key else [])]
    )


@contextmanager
def open_store(settings: Settings) -> "Iterator[Store]":
    """A store for one command, closed at its end."""
    from pmqd.store import Store  # noqa: PLC0415 - the master must not load it

    store = Store(settings.postgres, "cli")
    try:
        yield store
    finally:
        store.close()


@contextmanager
def open_broker(settings: Settings) -> "Iterator[Broker]":
    """A broker for one command, closed at its end."""
    from pmqd.broker import Broker  # noqa: PLC0415 - the master must not load it

    broker = Broker(settings.redis, "cli")
    try:
        yield broker
    finally:
        broker.close()


def check_queue(store: "Store", queue: str) -> None:
    """Passes if the store knows the queue.

    Raises:
        NotFound: it does not; names those that there are.
    """
    known = [row["name"] for row in store.list_queues()]
    if queue not in known:
        raise NotFound(f"there is no queue {queue!r}; there are {', '.join(known[:20]) or 'none yet'}")


# --- reading arguments ---------------------------------------------------------------------------------------

_SPAN = re.compile(r"^(\d{1,9}(?:\.\d{1,6})?)(ms|s|m|h|d)$")
_SPAN_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def read_uuid(text: str, what: str = "job id") -> UUID:
    """The id in an argument.

    Raises:
        UsageError: it is no UUID.
    """
    try:
        return UUID(text)
    except ValueError:
        raise UsageError(
            f"{what} {text!r} is not a UUID, as 0198c0de-0000-7000-8000-000000000001 is"
        ) from None


def whole(name: str, low: int, high: int) -> Callable[[str | int], int]:
    """A parser for an option that is a whole number within limits; typer's own does not say what was given."""

    def read(given: str | int) -> int:
        text = str(given)  # a default comes as the number that it is
        if re.fullmatch(r"-?[0-9]{1,12}", text) and low <= int(text) <= high:
            return int(text)
        raise UsageError(f"{name} {text!r} is not a whole number from {low} to {high}")

    return read


def read_queue(text: str) -> str:
    """The queue's name in an argument.

    Raises:
        UsageError: it cannot be a queue's name.
    """
    try:
        job.check_queue_name(text)
    except EnqueueError as error:
        raise UsageError(str(error)) from None
    return text


def read_span(text: str, what: str) -> float:
    """Seconds of a time span such as `90s`, `10m`, `2h`, `1d`, `250ms`.

    Raises:
        UsageError: it is none.
    """
    match = _SPAN.match(text)
    if match is None:
        raise UsageError(f"{what} {text!r} is not a time span: a number with ms, s, m, h or d, as 90s is")
    return float(match[1]) * _SPAN_SECONDS[match[2]]


def read_time(text: str, what: str, now: datetime) -> datetime:
    """The time in an argument: RFC 3339 with an offset, or a span from now as `+10m` or `-2h`.

    Raises:
        UsageError: it is neither.
    """
    if text[:1] in "+-" and text[1:]:
        seconds = read_span(text[1:], what)
        try:
            return now + timedelta(seconds=seconds if text[0] == "+" else -seconds)
        except OverflowError:
            raise UsageError(f"{what} {text!r} is beyond the year 1 or 9999") from None
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        when = None
    if when is None or when.tzinfo is None:
        raise UsageError(
            f"{what} {text!r} is neither a time with an offset (2026-01-31T08:00:00Z) nor a span (+10m)"
        )
    return when


# --- writing answers -----------------------------------------------------------------------------------------


_PIPED_WIDTH = 300


def with_display_status(row: Mapping[str, Any], now: datetime) -> dict[str, Any]:
    """A job's row, with `display_status` beside its columns."""
    shown = job.display_status(row["status"], row["attempt_count"], row["run_at"], now)
    return {**row, "display_status": str(shown)}


_STEERING = re.compile(
    "[\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
"""What JSON allows as it is, and yet steers a terminal or hides what stands there."""


def to_json(value: object) -> bytes:
    """JSON as the commands write it: times in RFC 3339 and UTC, indented, one newline at the end; nothing steers a terminal."""
    options = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS
    options |= orjson.OPT_PASSTHROUGH_DATETIME
    text = orjson.dumps(value, default=_plain, option=options)
    if text.isascii() and b"\x7f" not in text:
        return text
    return _STEERING.sub(lambda found: json.dumps(found[0])[1:-1], text.decode()).encode()


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, bytes):
        return orjson.Fragment(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    return str(value)


def print_json(value: object) -> None:
    """Writes one JSON value to stdout."""
    sys.stdout.write(to_json(value).decode())
    sys.stdout.flush()


def say(text: str) -> None:
    """Text for people, to stderr: stdout is for data. It may quote a server's words: nothing in it steers a terminal."""
    sys.stderr.write("".join(f"{escaped(line)}\n" for line in text.split("\n")))
    sys.stderr.flush()


def console(*, stderr: bool = False) -> "Console":
    """A rich console; tables go to stdout, progress bars to stderr."""
    from rich.console import Console  # noqa: PLC0415 - 50 ms that `--json` and `run` need not pay

    return Console(stderr=stderr, soft_wrap=False, highlight=False)


def print_table(renderable: Any) -> None:
    """A table on stdout, as wide as the terminal; piped, as wide as its text and without spaces at the ends."""
    out = console()
    if out.is_terminal:
        out.print(renderable)
        return
    out.width = max(out.width, _PIPED_WIDTH)
    with out.capture() as captured:
        out.print(renderable)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))
    sys.stdout.flush()


def utc_now() -> datetime:
    """This machine's clock: for showing times only, jobs go by the database's."""
    return datetime.now(UTC)
