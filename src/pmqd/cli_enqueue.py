"""The command `enqueue`: one job from the command line, or a file of them."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import orjson
import typer

from pmqd.cli_common import (
    ConfigOption,
    JsonOption,
    SetOption,
    console,
    load_settings,
    print_json,
    read_queue,
    read_time,
    read_uuid,
    utc_now,
    whole,
)
from pmqd.config import Settings
from pmqd.errors import EnqueueError, UsageError
from pmqd.job import MAX_ATTEMPTS_LIMIT, MAX_PAYLOAD_BYTES
from pmqd.rows import ROW_OPTIONS, payload_of, row_of

LINE_KEYS = ("queue_name", "payload", "kind", "priority", "run_at", "max_attempts", "tags", "id")


@dataclass(frozen=True, slots=True)
class Entry:
    """One job to be written."""

    queue_name: str
    payload: Any
    kind: str | None = None
    priority: int | None = None
    run_at: datetime | None = None
    max_attempts: int | None = None
    tags: tuple[str, ...] = ()
    id: UUID | None = None


def add_to(app: typer.Typer) -> None:
    """Puts the command into the program."""
    app.command()(enqueue)


def enqueue(
    queue: Annotated[str | None, typer.Argument(metavar="QUEUE", help="The queue's name.")] = None,
    payload: Annotated[
        str | None, typer.Argument(metavar="PAYLOAD", help="JSON, or - for stdin. Default: {}.")
    ] = None,
    *,
    kind: Annotated[str | None, typer.Option("--kind", "-k", metavar="KIND", help="The task's name.")] = None,
    priority: Annotated[
        int | None,
        typer.Option(
            "--priority",
            "-p",
            metavar="N",
            parser=whole("--priority", 1, 32767),
            help="Lower runs first. Default: the queue's.",
        ),
    ] = None,
    run_at: Annotated[
        str | None,
        typer.Option("--run-at", metavar="TIME", help="Not before: 2026-01-31T08:00:00Z, or +10m."),
    ] = None,
    max_attempts: Annotated[
        int | None,
        typer.Option(
            "--max-attempts",
            metavar="N",
            parser=whole("--max-attempts", 1, MAX_ATTEMPTS_LIMIT),
            help="Attempts before it is failed. Default: the queue's.",
        ),
    ] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", metavar="TAG", help="A tag. Repeatable.")] = None,
    job_id: Annotated[
        str | None, typer.Option("--id", metavar="UUID", help="Your own id: doing it again does nothing.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            "-f",
            metavar="JOBS.JSONL",
            help=f"One JSON object a line, with {', '.join(LINE_KEYS)}; - for stdin. The other options are defaults.",
        ),
    ] = None,
    json: JsonOption = False,
    config: ConfigOption = None,
    assign: SetOption = None,
) -> None:
    """Enqueue one job, or a file of them.

    Prints the job's id, or the number of jobs in the file. A file is checked as a whole before anything is written, and
    written in one transaction.
    """
    when = read_time(run_at, "--run-at", utc_now()) if run_at else None
    number = read_uuid(job_id, "--id") if job_id else None
    name = read_queue(queue) if queue else None
    rest = (kind, priority, when, max_attempts, tuple(tag or ()))
    if file is not None:
        if payload is not None or number is not None:
            raise UsageError("--file does not go with PAYLOAD or --id: each line has its own")
        entries = read_file(file, Entry(name or "", None, *rest))
        written = _write(load_settings(config, assign), entries)
        print_json({"enqueued": written}) if json else typer.echo(written)
        return
    if name is None:
        raise UsageError("enqueue needs the name of a QUEUE, or --file")
    entry = Entry(name, _payload(payload), *rest, number)
    made = _enqueue(load_settings(config, assign), entry)
    print_json({"id": made}) if json else typer.echo(made)


def _payload(text: str | None) -> Any:
    raw = (
        sys.stdin.buffer.read(MAX_PAYLOAD_BYTES + 1)
        if text == "-"
        else (text or "{}").encode(errors="replace")
    )
    if len(raw) > MAX_PAYLOAD_BYTES:
        raise UsageError(
            f"PAYLOAD is larger than {MAX_PAYLOAD_BYTES // 1024} KiB, the most that a job may carry"
        )
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        shown = raw[:60].decode(errors="replace")
        raise UsageError(f"PAYLOAD {shown!r} is not JSON: {error}") from None


def _enqueue(settings: Settings, entry: Entry) -> UUID:
    from pmqd.client import App  # noqa: PLC0415 - the master must not load the stores

    options = {name: getattr(entry, name) for name in ROW_OPTIONS}
    app = App(settings)
    try:
        return app.enqueue(entry.queue_name, entry.payload, kind=entry.kind, **options)
    except EnqueueError as error:
        raise UsageError(str(error)) from None
    finally:
        app.close()


# --- a file --------------------------------------------------------------------------------------------------


def read_file(path: Path, defaults: Entry) -> list[Entry]:
    """All lines of a file, checked before anything is written.

    Args:
        path: the file; `-` is stdin.
        defaults: what a line does not say.

    Raises:
        UsageError: names the line and what is wrong with it.
    """
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise UsageError(f"--file {path}: {error.strerror}") from None
    lines = [(number, line) for number, line in enumerate(data.splitlines(), 1) if line.strip()]
    entries = [_entry(path, number, line, defaults) for number, line in _shown(lines, "reading")]
    if not entries:
        raise UsageError(f"--file {path}: there is no job in it")
    return entries


def _entry(path: Path, number: int, line: bytes, defaults: Entry) -> Entry:
    try:
        return line_entry(line, defaults)
    except (UsageError, EnqueueError) as error:
        raise UsageError(f"--file {path}: line {number}: {error}; nothing was written") from None


def line_entry(line: bytes, defaults: Entry) -> Entry:
    """The job in one line.

    Raises:
        UsageError: what is wrong with it.
        EnqueueError: the same, found by the client's own checks.
    """
    try:
        found = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise UsageError(f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UsageError(f"a JSON object is needed, with {', '.join(LINE_KEYS)}")
    if unknown := sorted(set(found) - set(LINE_KEYS)):
        raise UsageError(f"unknown field {unknown[0]!r}; allowed are {', '.join(LINE_KEYS)}")
    if "payload" not in found:
        raise UsageError("the field payload is missing")
    entry = Entry(
        queue_name=read_queue(_text(found, "queue_name", defaults.queue_name)),
        payload=found["payload"],
        kind=_text(found, "kind", defaults.kind),
        priority=_number(found, "priority", defaults.priority, 32767),
        run_at=_time(found, defaults.run_at),
        max_attempts=_number(found, "max_attempts", defaults.max_attempts, MAX_ATTEMPTS_LIMIT),
        tags=_tags(found, defaults.tags),
        id=read_uuid(str(found["id"]), "id") if found.get("id") is not None else None,
    )
    options = {name: getattr(entry, name) for name in ROW_OPTIONS}
    row_of(entry.queue_name, entry.kind, payload_of(entry.payload), options, UUID(int=0))
    return entry


def _text(found: Mapping[str, Any], name: str, default: Any) -> Any:
    value = found.get(name, default)
    if value is not None and not isinstance(value, str):
        raise UsageError(f"{name} {value!r} is not a text")
    if name == "queue_name" and not value:
        raise UsageError("queue_name is missing, in the line and on the command line")
    return value


def _number(found: Mapping[str, Any], name: str, default: int | None, most: int) -> int | None:
    value = found.get(name, default)
    if value is not None and (type(value) is not int or not 1 <= value <= most):
        raise UsageError(f"{name} {value!r} is not a whole number from 1 to {most}")
    return value


def _time(found: Mapping[str, Any], default: datetime | None) -> datetime | None:
    value = found.get("run_at")
    if value is None:
        return default
    if not isinstance(value, str):
        raise UsageError(f"run_at {value!r} is not a time, as 2026-01-31T08:00:00Z is")
    return read_time(value, "run_at", utc_now())


def _tags(found: Mapping[str, Any], default: tuple[str, ...]) -> tuple[str, ...]:
    value = found.get("tags")
    if value is None:
        return default
    if not isinstance(value, list) or not all(isinstance(tag, str) for tag in value):
        raise UsageError(f"tags {value!r} is not a list of texts")
    return tuple(value)


def _write(settings: Settings, entries: list[Entry]) -> int:
    """Writes all entries by COPY in one transaction.

    Raises:
        StoreUnavailable: PostgreSQL is away; nothing was written, or nobody knows.
    """
    from pmqd.client import App  # noqa: PLC0415 - the master must not load the stores

    app = App(settings)
    try:
        return len(app.copy_many(_shown(entries, "writing")))
    finally:
        app.close()


def _shown(items: list[Any], doing: str) -> Iterator[Any]:
    """The items, with a progress bar on stderr while a terminal looks on."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn  # noqa: PLC0415 - for people only

    out = console(stderr=True)
    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=out, disable=not out.is_terminal) as progress:
        yield from progress.track(items, total=len(items))
