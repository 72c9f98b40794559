"""The commands `penguinmails warmup ...`: start and stop an account's ramp, and see how it stands."""

import dataclasses
from typing import Annotated

import orjson
import psycopg
import typer

from penguinmails import ramps
from penguinmails.settings import mail_settings
from penguinmails.warmup import request_plan
from pmqd.config import producer_settings

warmups = typer.Typer(name="warmup", help="Sending accounts that are being warmed up.", no_args_is_help=True)

AccountArgument = Annotated[
    str, typer.Argument(metavar="ACCOUNT", help="`default`, or a name in PENGUINMAILS_ACCOUNTS.")
]
NUMBERS = ("planned", "sent", "bounced", "complained", "received", "engaged", "volume")
COLUMNS = ("account", "state", "day", *NUMBERS, "decision", "reason")


@warmups.command("start")
def start(
    account: AccountArgument,
    *,
    first: Annotated[
        int | None, typer.Option("--from", metavar="N", min=1, help="Letters on the first day; default 20.")
    ] = None,
    growth: Annotated[
        float | None,
        typer.Option(
            "--growth", metavar="F", min=1, max=10, help="A day's over the day before; default 1.2."
        ),
    ] = None,
    ceiling: Annotated[
        int | None, typer.Option("--ceiling", metavar="N", min=1, help="Letters a day; default 1000.")
    ] = None,
) -> None:
    """Start an account's ramp, change it, or go on with one that was stopped; what is not given stays as it was.

    The working hours are those of PENGUINMAILS_WARMUP_TIME_ZONE, _FROM_HOUR and _TO_HOUR, as they are now.
    """
    with psycopg.connect(producer_settings().postgres.dsn, connect_timeout=5) as conn:
        warming = ramps.start(conn, mail_settings(), account, first=first, growth=growth, ceiling=ceiling)
        day, at = request_plan(conn, warming)
    ramp = warming.ramp
    typer.echo(
        f"{account}: {warming.volume} letters a day, times {ramp.growth:g} a day, at most {ramp.ceiling};"
        f" {day} is planned at {at:%Y-%m-%d %H:%M} UTC"
    )


@warmups.command("stop")
def stop(account: AccountArgument) -> None:
    """Stop an account's ramp, and skip its letters that have not gone out; `start` goes on with it."""
    with psycopg.connect(producer_settings().postgres.dsn, connect_timeout=5) as conn:
        skipped = ramps.stop(conn, account)
    typer.echo(f"{account}: stopped, {skipped} letters skipped")


@warmups.command("status")
def status(*, json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show each ramp: its newest day and what has become of that day's mails, its volume, and the newest decision."""
    with psycopg.connect(producer_settings().postgres.dsn, connect_timeout=5) as conn:
        found = ramps.standings(conn)
    if json:
        typer.echo(orjson.dumps([dataclasses.asdict(each) for each in found]).decode())
        return
    rows = [COLUMNS, *([_shown(getattr(each, name)) for name in COLUMNS] for each in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows if found else ():
        cells = zip(COLUMNS, row, widths, strict=True)
        line = "  ".join(f"{cell:{'>' if name in NUMBERS else '<'}{width}}" for name, cell, width in cells)
        typer.echo(line.rstrip())
    typer.echo(f"{len(found)} accounts")


def _shown(value: object) -> str:
    return "" if value is None else str(value)
