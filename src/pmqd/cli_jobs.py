"""Commands about single jobs and dead ones: `jobs list|show|retry|cancel|wait`, `dead list|replay`."""

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from pmqd.cli_common import (
    ConfigOption,
    JsonOption,
    KindOption,
    QueueOption,
    SetOption,
    check_queue,
    load_settings,
    open_broker,
    open_store,
    print_json,
    print_table,
    read_queue,
    read_span,
    read_time,
    read_uuid,
    say,
    utc_now,
    whole,
    with_display_status,
)
from pmqd.config import Settings
from pmqd.errors import BrokerUnavailable, ExitCode, NotFound, PmqdError, StoreUnavailable, UsageError
from pmqd.job import TERMINAL, Status

if TYPE_CHECKING:
    from pmqd.store import Store

jobs = typer.Typer(name="jobs", help="Look at jobs, retry, cancel, wait for them.", no_args_is_help=True)
dead = typer.Typer(name="dead", help="Failed jobs: list them, run them again.", no_args_is_help=True)

IdArgument = Annotated[str, typer.Argument(metavar="ID", help="The job's id.")]
IdsArgument = Annotated[list[str], typer.Argument(metavar="ID…", help="Ids of jobs.")]
LimitOption = Annotated[
    int, typer.Option("--limit", "-n", metavar="N", parser=whole("--limit", 1, 1000), help="At most so many.")
]
CursorOption = Annotated[
    str | None, typer.Option("--cursor", metavar="CURSOR", help="Where the page before ended.")
]

MOST_REPLAYED = 1_000_000
_POLL_FIRST, _POLL_MOST = 0.05, 1.0


def add_to(app: typer.Typer) -> None:
    """Puts the commands into the program."""
    app.add_typer(jobs)
    app.add_typer(dead)


@jobs.command("list")
def list_(
    queue: QueueOption = None,
    status: Annotated[
        str | None, typer.Option("--status", "-s", metavar="STATUS", help=f"One of {', '.join(Status)}.")
    ] = None,
    limit: LimitOption = 50,
    cursor: CursorOption = None,
    *,
    json: JsonOption = False,
    config: ConfigOption = None,
    assign: SetOption = None,
) -> None:
    """List jobs.

    Newest first; with --status queued or migrated_to_redis in the order in which they will run, with --status failed
    the last failed first.
    """
    if status is not None and status not in list(Status):
        raise UsageError(f"--status {status!r} is not one of {', '.join(Status)}")
    _list(config, assign, queue and read_queue(queue), status, limit=limit, cursor=cursor, json=json)


@jobs.command()
def show(
    job_id: IdArgument, *, json: JsonOption = False, config: ConfigOption = None, assign: SetOption = None
) -> None:
    """Show one job: why it waits, what each attempt said."""
    wanted = read_uuid(job_id)
    settings = load_settings(config, assign)
    with open_store(settings) as store:
        row = _found(store, wanted)
        row["reason"] = store.why(row)
    if row["status"] == Status.RUNNING:
        row["live"] = _live(settings, wanted)
    now = utc_now()
    if json:
        print_json(with_display_status(row, now))
        return
    from pmqd import render  # noqa: PLC0415 - rich is loaded for people only

    print_table(render.job(with_display_status(row, now), now))


@jobs.command()
def retry(job_ids: IdsArgument, config: ConfigOption = None, assign: SetOption = None) -> int:
    """Start ended jobs anew, and waiting ones at once.

    Failed and cancelled jobs get a new life with all their attempts.
    """
    return _each(job_ids, config, assign, lambda store, job_id: store.retry_job(job_id), "will run again")


@jobs.command()
def cancel(job_ids: IdsArgument, config: ConfigOption = None, assign: SetOption = None) -> int:
    """Cancel jobs.

    A running one is interrupted; if it finishes first, it stays completed.
    """
    return _each(
        job_ids, config, assign, lambda store, job_id: store.cancel_job(job_id), "is being cancelled"
    )


@jobs.command()
def wait(
    job_id: IdArgument,
    timeout: Annotated[
        str | None,
        typer.Option("--timeout", "-t", metavar="SPAN", help="Give up after this, as 30s. Default: never."),
    ] = None,
    *,
    json: JsonOption = False,
    config: ConfigOption = None,
    assign: SetOption = None,
) -> int:
    """Wait until a job has ended.

    Ends with 0 if it completed, 1 if it failed or was cancelled, 75 after the timeout.
    """
    wanted = read_uuid(job_id)
    seconds = (
        read_span(timeout if timeout[-1:].isalpha() else f"{timeout}s", "--timeout") if timeout else None
    )
    deadline = None if seconds is None else time.monotonic() + seconds
    with open_store(load_settings(config, assign)) as store:
        row = _await_end(store, wanted, deadline)
    shown = with_display_status(row, utc_now())
    if json:
        print_json(shown)
    else:
        typer.echo(f"{shown['id']} {shown['display_status']}")
    if row["status"] not in TERMINAL:
        say(f"pmqd: job {wanted} is still {shown['display_status']} after {seconds:g} s")
        return ExitCode.TIMED_OUT
    return ExitCode.OK if row["status"] == Status.COMPLETED else ExitCode.FAILED


@dead.command("list")
def list_dead(
    queue: QueueOption = None,
    limit: LimitOption = 50,
    cursor: CursorOption = None,
    *,
    json: JsonOption = False,
    config: ConfigOption = None,
    assign: SetOption = None,
) -> None:
    """List failed jobs, newest first."""
    _list(config, assign, queue and read_queue(queue), Status.FAILED, limit=limit, cursor=cursor, json=json)


@dead.command()
def replay(
    queue: QueueOption = None,
    kind: KindOption = None,
    since: Annotated[
        str | None,
        typer.Option(
            "--since", metavar="TIME", help="Only what failed since then: 2026-01-31T08:00:00Z, or -2h."
        ),
    ] = None,
    limit: Annotated[
        int,
        typer.Option(
            "--limit", "-n", metavar="N", parser=whole("--limit", 1, MOST_REPLAYED), help="At most so many."
        ),
    ] = MOST_REPLAYED,
    *,
    everything: Annotated[bool, typer.Option("--all", help="All failed jobs, without a filter.")] = False,
    config: ConfigOption = None,
    assign: SetOption = None,
) -> None:
    """Give failed jobs a new life.

    They get all their attempts again. Prints how many there were.
    """
    if not (queue or kind or since or everything):
        raise UsageError("dead replay needs --queue, --kind or --since, or --all for every failed job")
    after = read_time(since, "--since", datetime.now(UTC)) if since else None
    name = read_queue(queue) if queue else None
    with open_store(load_settings(config, assign)) as store:
        replayed = store.replay(name, kind, after, limit)
        if name and not replayed:
            check_queue(store, name)
    typer.echo(replayed)


# --- the work ------------------------------------------------------------------------------------------------


def _list(
    config: Path | None,
    assign: Sequence[str] | None,
    queue: str | None,
    status: str | None,
    *,
    limit: int,
    cursor: str | None,
    json: bool,
) -> None:
    with open_store(load_settings(config, assign)) as store:
        try:
            rows, more = store.list_jobs(queue, status, limit, cursor)
        except ValueError as error:
            raise UsageError(str(error)) from error
        if not rows and queue:
            check_queue(store, queue)
    now = utc_now()
    shown = [with_display_status(row, now) for row in rows]
    if json:
        print_json(shown)
    else:
        from pmqd import render  # noqa: PLC0415 - rich is loaded for people only

        print_table(render.jobs(shown, now))
    if more:
        say(f"more: --cursor {more}")


def _live(settings: Settings, job_id: UUID) -> dict[str, str] | None:
    """What a running job said last about how far it is; None where Redis knows nothing of it or is away."""
    try:
        with open_broker(settings) as broker:
            found = broker.status_of(job_id)
    except BrokerUnavailable:
        return None
    return {name: found[name] for name in ("progress", "note") if name in found} or None


def _found(store: "Store", job_id: UUID) -> dict[str, Any]:
    row = store.show_job(job_id)
    if row is None:
        raise NotFound(f"there is no job {job_id}")
    return dict(row)


def _each(
    texts: list[str],
    config: Path | None,
    assign: Sequence[str] | None,
    act: Callable[["Store", UUID], object],
    done: str,
) -> int:
    """Does the same to each job; one that cannot be is told, and the others are done all the same."""
    wanted = [read_uuid(text) for text in texts]
    code = ExitCode.OK
    with open_store(load_settings(config, assign)) as store:
        for job_id in wanted:
            try:
                act(store, job_id)
            except StoreUnavailable:
                raise
            except PmqdError as error:
                say(f"pmqd: {error}")
                code = error.exit_code
            else:
                say(f"{job_id} {done}")
    return code


def _await_end(store: "Store", job_id: UUID, deadline: float | None) -> dict[str, Any]:
    """Looks until the job has ended or the deadline is over; a store that goes away meanwhile is waited for."""
    row, pause = _found(store, job_id), _POLL_FIRST
    while row["status"] not in TERMINAL and (deadline is None or time.monotonic() < deadline):
        left = pause if deadline is None else min(pause, deadline - time.monotonic())
        time.sleep(max(0.0, left))
        pause = min(_POLL_MOST, pause * 1.5)
        try:
            row = _found(store, job_id)
        except StoreUnavailable:
            if deadline is not None and time.monotonic() >= deadline:
                raise
    return row
