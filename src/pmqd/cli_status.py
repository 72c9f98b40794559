"""Commands that show the whole: `status` once, `top` live."""

import sys
import time
from typing import Annotated

import typer

from pmqd.cli_common import (
    ConfigOption,
    JsonOption,
    SetOption,
    console,
    load_settings,
    open_store,
    print_json,
    print_table,
    read_span,
    whole,
)
from pmqd.errors import ExitCode


def add_to(app: typer.Typer) -> None:
    """Puts the commands into the program."""
    app.command()(status)
    app.command()(top)


def status(*, json: JsonOption = False, config: ConfigOption = None, assign: SetOption = None) -> int:
    """Show at a glance what runs, what waits and why.

    Ends with 69 if PostgreSQL is away.
    """
    from pmqd import overview, render  # noqa: PLC0415 - the master must not load the stores

    settings = load_settings(config, assign)
    with open_store(settings) as store:
        seen, _ = overview.look(settings, store)
    if json:
        print_json(seen)
    else:
        print_table(render.status(seen))
    return ExitCode.OK if seen["postgres"]["up"] else ExitCode.UNREACHABLE


def top(
    *,
    interval: Annotated[
        str, typer.Option("--interval", "-i", metavar="SPAN", help="Time between looks.")
    ] = "1s",
    looks: Annotated[
        int,
        typer.Option(
            "--looks",
            metavar="N",
            parser=whole("--looks", 0, 1_000_000),
            help="End after so many looks; 0: at Ctrl-C.",
        ),
    ] = 0,
    json: JsonOption = False,
    config: ConfigOption = None,
    assign: SetOption = None,
) -> int:
    """Show the same live, with rates.

    With --json or without a terminal it shows it once.
    """
    pause = read_span(interval, "--interval")
    if json or not (sys.stdout.isatty() or looks):
        return status(json=json, config=config, assign=assign)
    from rich.live import Live  # noqa: PLC0415 - rich is loaded for people only

    from pmqd import overview, render  # noqa: PLC0415 - the master must not load the stores

    settings = load_settings(config, assign)
    screen = console()
    with (
        open_store(settings) as store,
        Live(console=screen, screen=screen.is_terminal, auto_refresh=False) as live,
    ):
        seen, page = overview.look(settings, store)
        live.update(render.status(seen), refresh=True)
        done = 1
        while done != looks:
            time.sleep(pause)
            seen, page = overview.look(settings, store, page)
            live.update(render.status(seen), refresh=True)
            done += 1
    return ExitCode.OK
