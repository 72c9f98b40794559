"""Tables for people: from rows to rich renderables. Nothing is read or printed here."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich import box
from rich.console import Group, RenderableType
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


def seconds_text(seconds: float | None) -> str:
    """A time span as people say it: `0.25 s`, `12 s`, `3 min`, `2.5 h`, `4 d`."""
    if seconds is None:
        return "-"
    size = abs(seconds)
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


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """An empty table; the columns in `right` hold numbers."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for name in columns:
        whole = name == "id" or name in right
        made.add_column(name, justify="right" if name in right else "left", overflow="fold", no_wrap=whole)
    return made


def status_text(status: str) -> Text:
    """A status in its colour."""
    return Text(status, style=_STYLES.get(status, ""))


# --- jobs ----------------------------------------------------------------------------------------------------


def jobs(rows: Iterable[Mapping[str, Any]], now: datetime) -> Table:
    """A list of jobs."""
    made = table(
        "id", "queue", "kind", "status", "prio", "attempts", "run_at", "error", right=("prio", "attempts")
    )
    for row in rows:
        error = (row.get("last_error_message") or "").partition("\n")[0]
        made.add_row(
            str(row["id"]),
            plain(row["queue_name"]),
            plain(row["kind"] or "-", 40),
            status_text(row["display_status"]),
            str(row["priority"]),
            f"{row['attempt_count']}/{row['max_attempts']}",
            when_text(row["run_at"], now),
            plain(error, 60),
        )
    return made


def job(row: Mapping[str, Any], now: datetime) -> RenderableType:
    """One job: its columns, why it waits, and what each attempt said."""
    facts = Table.grid(padding=(0, 2))
    for name, value in row.items():
        if name in ("logs", "reason") or value is None or value == []:
            continue
        facts.add_row(Text(name, style="bold"), _value(name, value, now))
    parts: list[RenderableType] = [facts]
    if row.get("reason"):
        parts.append(Text.assemble(("\nwaits because ", "bold"), plain(row["reason"])))
    if row.get("logs"):
        parts += [Text("\nlog", style="bold"), _logs(row["logs"])]
    return Group(*parts)


def _value(name: str, value: object, now: datetime) -> Text:
    if isinstance(value, datetime):
        return Text(f"{time_text(value)}  ({when_text(value, now)})")
    if name in ("status", "display_status"):
        return status_text(str(value))
    return plain(value)


def _logs(rows: Iterable[Mapping[str, Any]]) -> Table:
    made = table(
        "attempt", "status", "started", "duration", "worker", "message", right=("attempt", "duration")
    )
    for row in rows:
        made.add_row(
            str(row["attempt_number"]),
            status_text(row["status"]),
            time_text(row["started"]),
            seconds_text(row["duration"]),
            plain(row["worker_id"] or "-"),
            plain((row["log_message"] or "").partition("\n")[0], 120),
        )
    return made


# --- queues, workers, the whole ------------------------------------------------------------------------------


def queues(rows: Iterable[Mapping[str, Any]]) -> Table:
    """The queues with their depths, how late they are and why what waits waits."""
    numbers = ("late", "ready", "scheduled", "in redis", "running", "failed", "done/s")
    made = table("queue", *numbers, "why it waits", right=numbers)
    for row in rows:
        made.add_row(
            plain(row["name"]),
            _late(row["oldest_ready_seconds"]),
            *(_number(row.get(name)) for name in ("ready", "scheduled", "in_redis", "running", "failed")),
            _number(row.get("completed_per_second")),
            plain(row.get("reason") or ""),
        )
    return made


def _late(seconds: float) -> Text:
    style = "red" if seconds > _VERY_LATE_SECONDS else "yellow" if seconds > _LATE_SECONDS else ""
    return Text(seconds_text(seconds) if seconds else "-", style=style)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def workers(rows: Iterable[Mapping[str, Any]], now: datetime) -> Table:
    """The instances and what their workers run."""
    made = table("instance", "host", "pid", "started", "pools", "queues", "running", right=("pid", "running"))
    for row in rows:
        made.add_row(
            str(row["id"]),
            plain(row["host"]),
            str(row["pid"]),
            when_text(row["started_at"], now),
            plain(_pools(row.get("pools") or {})),
            plain(", ".join(row.get("queues") or ())),
            str(len(row["jobs"])),
        )
        for worker_id, held in _by_worker(row["jobs"]).items():
            first = min(held, key=lambda job: str(job["started_at"]))
            what = plain(f"{first['queue_name']} {first['kind'] or ''}".strip())
            since = when_text(first["started_at"], now)
            made.add_row("", Text(worker_id), "", since, "", what, str(len(held)))
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
    head = Table.grid(padding=(0, 2))
    for name in ("postgres", "redis"):
        part = seen[name]
        text = Text("up", "green") if part["up"] else Text(f"down: {part['error']}", "red")
        head.add_row(Text(name, style="bold"), text)
    mode = seen["mode"]
    head.add_row(Text("mode", style="bold"), Text(mode or "-", "" if mode == "redis" else "yellow"))
    head.add_row(Text("instances", style="bold"), Text(_instances(seen["instances"])))
    if seen["workers"]:
        states = ", ".join(f"{n} {state}" for state, n in seen["workers"].items() if n)
        head.add_row(Text("workers here", style="bold"), Text(states or "none"))
    return Group(head, Text(), queues(seen["queues"]))


def _instances(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "none: no daemon runs, so nothing is worked on (pmqd run)"
    return f"{len(rows)} on {', '.join(sorted({row['host'] for row in rows}))}"
