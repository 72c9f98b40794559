"""Tables for people: from rows to rich renderables. Nothing is read or printed here."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

_STYLES = {
    "running": "cyan",
    "completed": "green",
    "failed": "red",
    "cancelled": "yellow",
    "retry_scheduled": "magenta",
}
_LATE_SECONDS, _VERY_LATE_SECONDS = 5.0, 60.0
_WIDE = 150
"""From this many columns on, a list of jobs has one line a job."""


def seconds_text(seconds: float | None) -> str:
    """A time span as people say it: `1.2 ms`, `0.25 s`, `12 s`, `3 min`, `2.5 h`, `4 d`."""
    if seconds is None:
        return "-"
    size = abs(seconds)
    if 0 < size < 0.01:
        return f"{seconds * 1000:.1f} ms"
    if size < 10:
        return f"{seconds:.2f} s"
    if size < 120:
        return f"{seconds:.0f} s"
    if size < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if size < 172800 else f"{seconds / 86400:.0f} d"


def when_text(when: datetime | None, now: datetime) -> str:
    """A time as seen from now: `in 3 min`, `12 s ago`."""
    if when is None:
        return "-"
    seconds = (when - now).total_seconds()
    return f"in {seconds_text(seconds)}" if seconds > 0 else f"{seconds_text(-seconds)} ago"


def time_text(when: datetime | None) -> str:
    """A time to the second, in UTC."""
    return when.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ") if when else "-"


def plain(text: object, limit: int = 10_000) -> Text:
    """A value from outside as text: no markup, control characters shown, bounded."""
    shown = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(text))
    return Text(shown if len(shown) <= limit else shown[: limit - 1] + "…")


def table(*columns: str, right: Sequence[str] = (), whole: Sequence[str] = ()) -> Table:
    """An empty table.

    Args:
        columns: their names.
        right: those that hold numbers; they are never broken into lines.
        whole: others that are never broken.
    """
    made = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold", padding=(0, 1, 0, 0)
    )
    for name in columns:
        unbroken = name == "id" or name in right or name in whole
        made.add_column(name, justify="right" if name in right else "left", overflow="fold", no_wrap=unbroken)
    return made


@dataclass
class _Noted:
    """A table of short cells whose rows may have a line of prose beneath: a column for it would be too narrow."""

    rows: Table
    notes: list[Text] = field(default_factory=list)

    def add(self, *cells: str | Text, note: Text) -> None:
        self.rows.add_row(*cells)
        self.notes.append(note)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for column in self.rows.columns:  # one line a row: the notes stand between them
            column.no_wrap, column.overflow = True, "ellipsis"
        lines = console.render_lines(self.rows, options, pad=False)
        head = len(lines) - len(self.notes)
        for place, line in enumerate(lines):
            yield from line
            yield Segment.line()
            if place >= head and self.notes[place - head]:
                note = self.notes[place - head].copy()
                note.pad_left(4)
                note.truncate(options.max_width, overflow="ellipsis")
                yield note


@dataclass(frozen=True)
class _ByWidth:
    """One of two forms of the same, by how much room there is."""

    narrow: RenderableType
    wide: RenderableType

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.wide if options.max_width >= _WIDE else self.narrow


def status_text(status: str) -> Text:
    """A status in its colour."""
    return Text(status, style=_STYLES.get(status, ""))


# --- jobs ----------------------------------------------------------------------------------------------------

_TIMES = {
    "running": "started_at",
    "completed": "completed_at",
    "failed": "failed_at",
    "cancelled": "cancelled_at",
}
_HIDDEN = ("logs", "reason", "display_status", "claim_token", "live")


def jobs(rows: Sequence[Mapping[str, Any]], now: datetime) -> RenderableType:
    """A list of jobs; `when` is the time that belongs to the status: due, started, or ended."""
    short = ("status", "prio", "attempts", "when")
    right = ("prio", "attempts")
    narrow = _Noted(table("id", *short, right=right))
    wide = table("id", "queue", "kind", *short, "error", right=right, whole=("status", "when"))
    for row in rows:
        cells = (
            status_text(row["display_status"]),
            str(row["priority"]),
            f"{row['attempt_count']}/{row['max_attempts']}",
            when_text(row.get(_TIMES.get(row["display_status"], "")) or row["run_at"], now),
        )
        queue, kind = plain(row["queue_name"]), plain(row["kind"] or "-", 40)
        error = (row.get("last_error_message") or "").partition("\n")[0]
        wide.add_row(str(row["id"]), queue, kind, *cells, plain(error, 60))
        note = Text.assemble(queue, " ", kind, *((": ", plain(error, 200)) if error else ()))
        narrow.add(str(row["id"]), *cells, note=note)
    return _ByWidth(narrow, wide)


def job(row: Mapping[str, Any], now: datetime) -> RenderableType:
    """One job: its columns, why it waits, how far it is, and what each attempt said."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in row.items():
        if name in _HIDDEN or value is None or value is False or value == []:
            continue
        shown = status_text(row["display_status"]) if name == "status" else _value(name, value, now)
        facts.add_row(Text(name, style="bold"), shown)
    parts: list[RenderableType] = [facts]
    if row.get("live"):
        parts.append(Text.assemble(("\nprogress ", "bold"), _progress(row["live"])))
    if row.get("reason"):
        parts.append(Text.assemble(("\nwaits because ", "bold"), plain(row["reason"])))
    if row.get("logs"):
        parts += [Text("\nlog", style="bold"), _logs(row["logs"])]
    return Group(*parts)


def _progress(live: Mapping[str, str]) -> Text:
    """`50 %, thinking`: what the job said last."""
    share, note = live.get("progress", ""), live.get("note", "")
    try:
        done = f"{float(share):.0%}".replace("%", " %")
    except ValueError:
        done = share
    return plain(", ".join(filter(None, (done, note))), 200)


def _value(name: str, value: object, now: datetime) -> Text:
    if isinstance(value, datetime):
        return Text(f"{time_text(value)}  ({when_text(value, now)})")
    if name in ("payload", "result"):
        return plain(json.dumps(value, ensure_ascii=False, default=str))
    return plain(", ".join(map(str, value)) if isinstance(value, list) else value)


def _logs(rows: Iterable[Mapping[str, Any]]) -> RenderableType:
    made = _Noted(table("attempt", "status", "started", "duration", right=("attempt", "duration")))
    for row in rows:
        message = (row["log_message"] or "").partition("\n")[0]
        made.add(
            str(row["attempt_number"]),
            status_text(row["status"]),
            time_text(row["started"]),
            seconds_text(row["duration"]),
            note=plain(": ".join(filter(None, (row["worker_id"], message))), 300),
        )
    return made


# --- queues, workers, the whole ------------------------------------------------------------------------------


def queues(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """The queues with their depths, how late they are, and beneath them why what waits waits."""
    numbers = ["late", "ready", "scheduled", "in redis", "running", "failed"]
    rates = any(row.get("completed_per_second") is not None for row in rows)
    if rates:
        numbers.append("done/s")
    made = table("queue", *numbers, right=numbers)
    reasons = Table.grid(padding=(0, 2))
    reasons.add_column(overflow="fold")
    reasons.add_column(overflow="fold")
    for row in rows:
        made.add_row(
            plain(row["name"]),
            _late(row["oldest_ready_seconds"]),
            *(_number(row.get(name)) for name in ("ready", "scheduled", "in_redis", "running", "failed")),
            *([_number(row.get("completed_per_second"))] if rates else []),
        )
        if row.get("reason"):
            reasons.add_row(plain(row["name"]), plain(row["reason"]))
    if not rows:
        return Text("no queues yet")
    return Group(made, Text("\nwhy they wait", style="bold"), reasons) if reasons.row_count else made


def _late(seconds: float) -> Text:
    style = "red" if seconds > _VERY_LATE_SECONDS else "yellow" if seconds > _LATE_SECONDS else ""
    return Text(seconds_text(seconds) if seconds else "-", style=style)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def workers(rows: Sequence[Mapping[str, Any]], now: datetime) -> RenderableType:
    """The instances and what their workers run."""
    parts: list[RenderableType] = []
    for row in rows:
        facts = Table.grid(padding=(0, 2))
        about = f"{row['host']}, pid {row['pid']}, started {when_text(row['started_at'], now)}"
        for name, text in (
            ("instance", str(row["id"])),
            ("on", about),
            ("pools", _pools(row.get("pools") or {})),
            ("queues", ", ".join(row.get("queues") or ()) or "none"),
            ("running", str(len(row["jobs"]))),
        ):
            facts.add_row(Text(name, style="bold"), plain(text))
        parts += [*([Text()] if parts else []), facts]
        if row["jobs"]:
            parts += [Text(), _running(row["jobs"], now)]
    return (
        Group(*parts)
        if parts
        else Text("no instance lives: no daemon runs, so nothing is worked on (pmqd run)")
    )


def _running(jobs: Iterable[Mapping[str, Any]], now: datetime) -> Table:
    made = table("worker", "jobs", "since", "first of them", right=("jobs",), whole=("worker", "since"))
    for worker_id, held in _by_worker(jobs).items():
        first = min(held, key=lambda job: str(job["started_at"]))
        what = f"{first['queue_name']} {first['kind'] or '-'}"
        made.add_row(plain(worker_id), str(len(held)), when_text(first["started_at"], now), plain(what))
    return made


def _by_worker(jobs: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """A worker's jobs together: where they are quick it claims many at once, and one line tells of all."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for job in jobs:
        found.setdefault(job["worker_id"] or "-", []).append(job)
    return dict(sorted(found.items()))


def _pools(pools: Mapping[str, Mapping[str, Any]]) -> str:
    """`mail 2 x 10`: a pool, its processes, and the jobs that each runs at once."""
    sizes = {
        name: f"{pool.get('processes', '?')} x {pool.get('concurrency', '?')}" for name, pool in pools.items()
    }
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def status(seen: Mapping[str, Any]) -> RenderableType:
    """The whole at a glance: stores and mode, instances and workers, queues."""
    known = seen["postgres"]["up"]
    head = Table.grid(padding=(0, 2))
    for name in ("postgres", "redis"):
        part = seen[name]
        text = (
            Text("up", "green")
            if part["up"]
            else Text(f"down: {plain(' '.join(str(part['error']).split())).plain}", "red")
        )
        head.add_row(Text(name, style="bold"), text)
    mode = seen["mode"]
    head.add_row(Text("mode", style="bold"), Text(mode or "-", "" if mode == "redis" else "yellow"))
    head.add_row(Text("instances", style="bold"), _instances(seen["instances"]) if known else _unknown())
    if seen["workers"]:
        states = ", ".join(f"{n} {state}" for state, n in seen["workers"].items() if n)
        head.add_row(Text("workers here", style="bold"), Text(states or "none"))
    elif seen["instances"]:
        head.add_row(
            Text("workers here", style="bold"), Text("not known: no daemon answers at web.listen", "yellow")
        )
    return Group(
        head,
        Text(),
        queues(seen["queues"]) if known else Text("queues are not known while PostgreSQL is away"),
    )


def _instances(rows: Sequence[Mapping[str, Any]]) -> Text:
    if not rows:
        return Text("none: no daemon runs, so nothing is worked on (pmqd run)", "yellow")
    return plain(f"{len(rows)} on {', '.join(sorted({row['host'] for row in rows}))}")


def _unknown() -> Text:
    return Text("not known while PostgreSQL is away", "yellow")


def findings(rows: Iterable[tuple[str, str, str, str]]) -> Table:
    """What `pmqd doctor` found: how bad, what, what was found, and beneath that what mends it."""
    styles = {"ok": "green", "warning": "yellow", "wrong": "red", "unreachable": "red"}
    made = table("", "what", "found", whole=("",))
    for level, what, found, do in rows:
        mend = Text.assemble("\n→ ", (plain(do).plain, "bold")) if do else Text()
        made.add_row(Text(level, styles[level]), plain(what), Text.assemble(plain(found), mend))
    return made
