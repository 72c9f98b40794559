"""Commands about queues and workers: `queues list|pause|resume`, `workers`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from pmqd.cli_common import (
    ConfigOption,
    JsonOption,
    SetOption,
    check_queue,
    load_settings,
    open_store,
    print_json,
    print_table,
    read_queue,
    say,
    utc_now,
)
from pmqd.errors import PmqdError, StoreUnavailable

queues = typer.Typer(name="queues", help="Look at queues, pause and resume them.", no_args_is_help=True)

NamesArgument = Annotated[list[str], typer.Argument(metavar="QUEUE…", help="Names of queues.")]


def add_to(app: typer.Typer) -> None:
    """Puts the commands into the program."""
    app.add_typer(queues)
    app.command()(workers)


@queues.command("list")
def list_(*, json: JsonOption = False, config: ConfigOption = None, assign: SetOption = None) -> None:
    """List queues, their depths, and why what waits waits."""
    from pmqd import overview  # noqa: PLC0415 - the master must not load the stores

    settings = load_settings(config, assign)
    with open_store(settings) as store:
        rows = overview.queues(store)
    if trouble := overview.add_lengths(settings, rows):
        say(f"warning: {' '.join(trouble.split())}")
    if json:
        print_json(rows)
        return
    from pmqd import render  # noqa: PLC0415 - rich is loaded for people only

    print_table(render.queues(rows))


@queues.command()
def pause(names: NamesArgument, config: ConfigOption = None, assign: SetOption = None) -> int:
    """Stop serving queues; running jobs finish."""
    return _switch(names, config, assign, active=False)


@queues.command()
def resume(names: NamesArgument, config: ConfigOption = None, assign: SetOption = None) -> int:
    """Serve paused queues again."""
    return _switch(names, config, assign, active=True)


def workers(*, json: JsonOption = False, config: ConfigOption = None, assign: SetOption = None) -> None:
    """List living instances and what their workers run."""
    from pmqd import overview  # noqa: PLC0415 - the master must not load the stores

    with open_store(load_settings(config, assign)) as store:
        rows = overview.instances_with_jobs(store)
    if json:
        print_json(rows)
        return
    from pmqd import render  # noqa: PLC0415 - rich is loaded for people only

    print_table(render.workers(rows, utc_now()))


def _switch(names: Sequence[str], config: Path | None, assign: Sequence[str] | None, *, active: bool) -> int:
    """Pauses or resumes each queue; one that does not exist is told, and the others are done all the same."""
    wanted = [read_queue(name) for name in names]
    code = 0
    with open_store(load_settings(config, assign)) as store:
        for name in wanted:
            try:
                check_queue(store, name)
                (store.resume if active else store.pause)(name)
            except StoreUnavailable:
                raise
            except PmqdError as error:
                say(f"pmqd: {error}")
                code = int(error.exit_code)
            else:
                say(f"{name} is {'served again' if active else 'paused'}")
    return code
