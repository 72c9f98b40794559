"""Commands about what comes back: `penguinmails inbound` hands raw mails in, `penguinmails suppress` is the list of who is not written to."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from penguinmails.addresses import checked_address
from penguinmails.cli_common import connected, print_json
from penguinmails.deliveries import Suppression, suppress, suppressed, unsuppress
from penguinmails.mime import MAX_MESSAGE_BYTES
from penguinmails.processing import RawMailError, checked_size, leave_raw, read_raw, request_inbound
from penguinmails.queues import INBOUND

STDIN = Path("-")
DEFAULT_LIMIT = 100

suppressions = typer.Typer(name="suppress", help="Addresses that are not written to.", no_args_is_help=True)

AddressesArgument = Annotated[list[str], typer.Argument(metavar="ADDRESS...", help="In whatever case.")]


def inbound(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Raw mails (RFC 5322); - is stdin.")],
    *,
    mailbox: Annotated[str, typer.Option("--mailbox", metavar="ADDRESS", help="At which they arrived.")] = "",
    store: Annotated[
        bool, typer.Option("--store", help="Put them into the database, for workers on other hosts.")
    ] = False,
) -> None:
    """Enqueue one job in email:processing for each raw mail, in one transaction: all of them, or none.

    A job names its file, which must stay until a worker has read it. Stdin and, with --store, all mails go into the database.
    """
    with connected() as conn:
        for file in files:
            raw = _stdin() if file == STDIN else _read(file)
            if store or file == STDIN:
                request_inbound(conn, content=leave_raw(conn, raw), mailbox=mailbox)
            else:
                request_inbound(conn, path=file, mailbox=mailbox)
    typer.echo(f"{len(files)} mails in {INBOUND}")


@suppressions.command("list")
def list_suppressed(
    *,
    reason: Annotated[Suppression | None, typer.Option("--reason", help="Only these.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="So many at most.")] = DEFAULT_LIMIT,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List suppressed addresses, the newest first."""
    with connected() as conn:
        found = suppressed(conn, reason, limit)
    if json:
        print_json([{name: getattr(each, name) for name in each.__slots__} for each in found])
        return
    table = Table(box=None, pad_edge=False)
    for title in ("address", "reason", "since", "told by"):
        table.add_column(title, no_wrap=title != "told by")
    for each in found:
        table.add_row(each.address, each.reason, f"{each.created_at:%Y-%m-%d %H:%M:%S}", each.source)
    if found:
        Console(soft_wrap=True, markup=False, highlight=False).print(table)
    typer.echo(f"{len(found)} suppressed")


@suppressions.command("add")
def add(addresses: AddressesArgument) -> None:
    """Write to these addresses no more. One that is suppressed already keeps its reason."""
    checked = [checked_address(each) for each in addresses]
    with connected() as conn:
        number = sum(suppress(conn, each, Suppression.MANUAL, "penguinmails suppress") for each in checked)
    typer.echo(f"{number} added")


@suppressions.command("remove")
def remove(addresses: AddressesArgument) -> None:
    """Write to these addresses again, from the next campaign or attempt on."""
    with connected() as conn:
        number = sum(unsuppress(conn, each.strip()) for each in addresses)
    typer.echo(f"{number} removed")


def _read(file: Path) -> bytes:
    try:
        return read_raw(file)
    except OSError as error:
        raise RawMailError(f"{file}: {error.strerror}") from error


def _stdin() -> bytes:
    return checked_size(sys.stdin.buffer.read(MAX_MESSAGE_BYTES + 1), "stdin")
