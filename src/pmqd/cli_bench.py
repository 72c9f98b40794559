"""The command `bench`."""

from dataclasses import asdict
from typing import Annotated

import typer

from pmqd.cli_common import ConfigOption, JsonOption, SetOption, load_settings, print_json, say, whole


def add_to(app: typer.Typer) -> None:
    """Puts the command into the program."""
    app.command()(bench)


def bench(
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs", "-n", metavar="N", parser=whole("--jobs", 1, 1_000_000), help="Length of the backlog."
        ),
    ] = 20_000,
    processes: Annotated[
        int,
        typer.Option(
            "--processes", metavar="N", parser=whole("--processes", 1, 512), help="Worker processes."
        ),
    ] = 2,
    *,
    json: JsonOption = False,
    config: ConfigOption = None,
    assign: SetOption = None,
) -> None:
    """Measure your servers with jobs that do nothing.

    Runs in a schema, under a Redis prefix and with a daemon that are made for it and removed after it; the user must be
    allowed to create schemas and roles.
    """
    from pmqd.bench import run  # noqa: PLC0415 - the master must not load the stores

    result = run(load_settings(config, assign), jobs, processes, say)
    if json:
        print_json(asdict(result))
        return
    typer.echo(f"enqueue (COPY)   {result.enqueue_per_second:>10,.0f} jobs/s")
    typer.echo(
        f"backlog          {result.jobs_per_second:>10,.0f} jobs/s with {processes} workers, {jobs:,} jobs"
    )
    typer.echo(f"pickup, idle     {result.pickup_p50_seconds * 1000:>10.1f} ms p50")
    typer.echo(f"                 {result.pickup_p99_seconds * 1000:>10.1f} ms p99")
