"""The command `penguinmails`: start a campaign, see what becomes of it, decide about held mails; and its schema."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID, uuid4

import psycopg
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from penguinmails import held, schema
from penguinmails.accounts import AccountError
from penguinmails.app import CAMPAIGN, SENDING
from penguinmails.campaign import (
    CampaignError,
    Recipients,
    check_template,
    create_campaign,
    read_recipients,
    request_campaign,
    start_campaign,
)
from penguinmails.cli_common import connected, print_json
from penguinmails.cli_returns import inbound, suppressions
from penguinmails.cli_warmup import warmups
from penguinmails.message import MessageError
from penguinmails.processing import RawMailError
from penguinmails.ramps import WarmupError
from penguinmails.report import Report, read_report
from penguinmails.settings import given_variables, mail_settings
from penguinmails.smtp import account_named
from pmqd.config import producer_settings
from pmqd.errors import ExitCode, PmqdError

cli = typer.Typer(
    name="penguinmails",
    help="E-mail campaigns on pmqd.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Exit codes: 0 ok, 1 failed, 2 usage, 69 store unreachable, 78 configuration, 79 schema.",
)
campaigns = typer.Typer(name="campaign", help="Campaigns.", no_args_is_help=True)
holds = typer.Typer(name="held", help="Mails of which nobody knows whether they were sent.")
schemas = typer.Typer(name="schema", help="The tables of penguinmails in PostgreSQL.", no_args_is_help=True)
for _part in (campaigns, holds, schemas, suppressions, warmups):
    cli.add_typer(_part)
cli.command("inbound")(inbound)

# Typer ships its own Click, whose errors have no other public name.
_ClickError: type[Exception] = typer.BadParameter.__bases__[0].__bases__[0]


@cli.callback()
def root() -> None:
    """E-mail campaigns on pmqd."""


FileArgument = Annotated[
    Path, typer.Argument(metavar="CSV", help="UTF-8, a header with `email` and perhaps `name`.")
]
TemplateOption = Annotated[str, typer.Option("--template", "-t", metavar="NAME", help="The template's name.")]
PriorityOption = Annotated[
    int | None,
    typer.Option("--priority", "-p", min=1, max=32767, help="Lower runs first; default: the queue's."),
]
AccountOption = Annotated[
    str | None,
    typer.Option("--account", metavar="NAME", help="Send over this account of PENGUINMAILS_ACCOUNTS."),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Check file and template; enqueue nothing.")]
CampaignOption = Annotated[
    UUID | None, typer.Option("--campaign", metavar="ID", help="All held mails of this campaign.")
]
IdsArgument = Annotated[
    list[UUID] | None, typer.Argument(metavar="DELIVERY...", help="As `penguinmails held` lists them.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@cli.command()
def send(
    file: FileArgument,
    *,
    template: TemplateOption,
    priority: PriorityOption = None,
    account: AccountOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Enqueue one mail for each line of a CSV file, in one transaction: all of them, or none.

    Other columns than email and name are variables of the template. The database is that of pmqd
    (PMQD_POSTGRES__DSN or pmqd.toml); the SMTP account is a matter of the workers (PENGUINMAILS_*).
    """
    recipients = _checked(file, template, account)
    if dry_run:
        return _tell_dry_run(recipients)
    with connected() as conn, _bar("enqueueing", len(recipients.people)) as progress:
        campaign = start_campaign(
            conn, recipients, template=template, priority=priority, account=account, progress=progress
        )
    count = len(recipients.people)
    typer.echo(
        f"campaign {campaign}: {count} mails in {SENDING}, {recipients.repeated} repeated lines left out"
    )
    return None


@campaigns.command("start")
def start(
    file: FileArgument,
    *,
    template: TemplateOption,
    name: Annotated[str, typer.Option("--name", help="For people.")] = "",
    campaign_id: Annotated[
        UUID | None,
        typer.Option(
            "--id", metavar="UUID", help="The campaign's id; the same one again starts nothing twice."
        ),
    ] = None,
    priority: PriorityOption = None,
    account: AccountOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Store the list of a CSV file, with one job that makes a mail of each line: all of them, or none.

    As `send`, but the jobs are made by a worker that serves campaign:process.
    """
    recipients = _checked(file, template, account)
    if dry_run:
        return _tell_dry_run(recipients)
    made = campaign_id or uuid4()
    with connected() as conn, _bar("storing", len(recipients.people)) as progress:
        create_campaign(
            conn,
            recipients,
            template=template,
            campaign_id=made,
            name=name,
            priority=priority,
            account=account,
            progress=progress,
        )
        job = request_campaign(conn, made)
    count = len(recipients.people)
    typer.echo(
        f"campaign {made}: {count} recipients, {recipients.repeated} repeated lines left out; job {job} in {CAMPAIGN}"
    )
    return None


@cli.command("report")
def report(
    campaign: Annotated[UUID, typer.Argument(metavar="CAMPAIGN", help="Its id.")], *, json: JsonOption = False
) -> None:
    """What has become of a campaign's mails."""
    with connected() as conn:
        found = read_report(conn, campaign)
    if found is None:
        raise CampaignError(f"there is no campaign {campaign}")
    if json:
        return print_json(_as_json(found))
    title = f"campaign {found.id} {found.name or ''}".rstrip()
    typer.echo(f"{title}: {found.state}, {found.total:,} deliveries")
    for state, number in found.deliveries.items():
        typer.echo(f"{state:<11}{number:>11,}")
    return None


@holds.callback(invoke_without_command=True)
def list_held(context: typer.Context, *, campaign: CampaignOption = None, json: JsonOption = False) -> None:
    """List the mails of which nobody knows whether they were sent; `release` sends them again, `drop` does not."""
    if context.invoked_subcommand:
        return
    with connected() as conn:
        found = held.read_held(conn, campaign, pmqd=_pmqd())
    if json:
        print_json([{name: getattr(each, name) for name in each.__slots__} for each in found])
        return
    table = Table(box=None, pad_edge=False)
    for title in ("delivery", "address", "attempted", "why"):
        table.add_column(title, no_wrap=title != "why")
    for each in found:
        when = f"{each.attempted_at:%Y-%m-%d %H:%M:%S}" if each.attempted_at else ""
        table.add_row(str(each.id), each.email, when, each.reason or "")
    if found:
        Console(soft_wrap=True, markup=False, highlight=False).print(table)
    typer.echo(f"{len(found)} held")


@holds.command("release")
def release(ids: IdsArgument = None, *, campaign: CampaignOption = None) -> None:
    """Send held mails again. A recipient whose mail had been sent after all gets it twice, with the same Message-ID."""
    with connected() as conn:
        number = held.release(conn, _chosen(conn, ids, campaign), pmqd=_pmqd())
    typer.echo(f"{number} released: they are in {SENDING} again")


@holds.command("drop")
def drop(ids: IdsArgument = None, *, campaign: CampaignOption = None) -> None:
    """Leave held mails unsent: they are skipped."""
    with connected() as conn:
        number = held.drop(conn, _chosen(conn, ids, campaign))
    typer.echo(f"{number} dropped")


@schemas.command("apply")
def apply_schema() -> None:
    """Make the schema, or bring it up to date; after `pmqd schema apply`, in the same database."""
    typer.echo(f"schema {schema.NAME}: {schema.apply(producer_settings().postgres.direct)}")


@schemas.command("check")
def check_schema() -> None:
    """Compare the schema with this version's; exit code 79 and the differences if it is another."""
    typer.echo(f"{schema.NAME} {schema.check(producer_settings().postgres.direct)}")


def _checked(file: Path, template: str, account: str | None) -> Recipients:
    settings = mail_settings()
    account_named(settings, account)
    recipients = read_recipients(file)
    check_template(settings.templates, template, recipients, given=given_variables(settings))
    return recipients


def _tell_dry_run(recipients: Recipients) -> None:
    count = len(recipients.people)
    typer.echo(f"{count} recipients, {recipients.repeated} repeated lines left out; nothing enqueued")


def _pmqd() -> str:
    return producer_settings().postgres.schema_name


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, and the function that it is told by."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda written: bar.update(task, completed=written)


def _chosen(conn: psycopg.Connection[Any], ids: list[UUID] | None, campaign: UUID | None) -> list[UUID]:
    if bool(ids) == (campaign is not None):
        raise typer.BadParameter("give deliveries, or --campaign for all of one campaign")
    if ids:
        return ids
    return [each.id for each in held.read_held(conn, campaign, pmqd=_pmqd())]


def _as_json(found: Report) -> dict[str, Any]:
    return {
        "id": found.id,
        "name": found.name,
        "template": found.template,
        "state": found.state,
        "created_at": found.created_at,
        "started_at": found.started_at,
        "deliveries": found.deliveries,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; every foreseeable error is one line and an exit code.

    Args:
        arguments: without the program's name; None is the process's own.

    Returns:
        The exit code.
    """
    command = typer.main.get_command(cli)
    try:
        given = None if arguments is None else list(arguments)
        return int(command.main(given, prog_name="penguinmails", standalone_mode=False) or 0)
    except _ClickError as error:
        return _usage(error)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("stopped; nothing was changed", 130)
    except (
        AccountError,
        CampaignError,
        held.HeldError,
        RawMailError,
        MessageError,
        WarmupError,
        ValidationError,
        PmqdError,
        psycopg.Error,
    ) as error:
        return _fail(*_explained(error))


def _explained(error: Exception) -> tuple[str, int]:
    """The error in words, and its exit code."""
    match error:
        case ValidationError():
            return "\n".join(_fault(fault["loc"], fault["msg"]) for fault in error.errors()), ExitCode.CONFIG
        case psycopg.OperationalError():
            return f"PostgreSQL: {str(error).strip().splitlines()[0]}", ExitCode.UNREACHABLE
        case psycopg.errors.UndefinedTable():
            missing = error.diag.message_primary
            return f"PostgreSQL: {missing}; run `penguinmails schema apply`", ExitCode.SCHEMA
        case psycopg.Error():
            return f"PostgreSQL: {error.diag.message_primary or error}", ExitCode.FAILED
        case PmqdError():
            return str(error), error.exit_code
    return str(error), ExitCode.FAILED


def _usage(error: Exception) -> int:
    """A wrong call in one line; a call without anything gets the help."""
    context = getattr(error, "ctx", None)
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    if type(error).__name__ == "NoArgsIsHelpError" and context:
        sys.stderr.write(f"{context.get_help()}\n")
        return ExitCode.USAGE
    path = context.command_path if context else "penguinmails"
    return _fail(f"{text.rstrip('.')}; see {path} --help", ExitCode.USAGE)


def _fault(location: tuple[int | str, ...], message: str) -> str:
    name = (
        "PENGUINMAILS_" + "_".join(str(part) for part in location).upper() if location else "PENGUINMAILS_*"
    )
    return f"{name}: {message.removeprefix('Value error, ')}"


def _fail(text: str, code: int) -> int:
    for line in text.splitlines():
        sys.stderr.write(f"penguinmails: {line}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
