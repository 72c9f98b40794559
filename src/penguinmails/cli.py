"""The command `penguinmails`: start a campaign."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import psycopg
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress

from penguinmails.app import SENDING
from penguinmails.campaign import CampaignError, check_template, read_recipients, start_campaign
from penguinmails.settings import given_variables, mail_settings
from pmqd.config import producer_settings
from pmqd.errors import ExitCode, PmqdError

cli = typer.Typer(
    name="penguinmails",
    help="E-mail campaigns on pmqd.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Exit codes: 0 ok, 1 failed, 2 usage, 69 store unreachable, 78 configuration.",
)

# Typer ships its own Click, whose errors have no other public name.
_ClickError: type[Exception] = typer.BadParameter.__bases__[0].__bases__[0]


@cli.callback()
def root() -> None:
    """E-mail campaigns on pmqd."""


@cli.command()
def send(
    file: Annotated[
        Path, typer.Argument(metavar="CSV", help="UTF-8, a header with `email` and perhaps `name`.")
    ],
    *,
    template: Annotated[str, typer.Option("--template", "-t", metavar="NAME", help="The template's name.")],
    priority: Annotated[
        int | None,
        typer.Option("--priority", "-p", min=1, max=32767, help="Lower runs first; default: the queue's."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check file and template; enqueue nothing.")
    ] = False,
) -> None:
    """Enqueue one mail for each line of a CSV file: all of them, or none.

    Other columns than email and name are variables of the template. The database is that of pmqd
    (PMQD_POSTGRES__DSN or pmqd.toml); the SMTP account is a matter of the workers (PENGUINMAILS_*).
    """
    recipients = read_recipients(file)
    settings = mail_settings()
    check_template(settings.templates, template, recipients, given=given_variables(settings))
    count = len(recipients.people)
    if dry_run:
        typer.echo(f"{count} recipients, {recipients.repeated} repeated lines left out; nothing enqueued")
        return
    dsn = producer_settings().postgres.dsn
    with (
        psycopg.connect(dsn, connect_timeout=5) as conn,
        Progress(console=Console(stderr=True), transient=True) as bar,
    ):
        task = bar.add_task("enqueueing", total=count)
        campaign = start_campaign(
            conn,
            recipients,
            template=template,
            priority=priority,
            progress=lambda written: bar.update(task, completed=written),
        )
    typer.echo(
        f"campaign {campaign}: {count} mails in {SENDING}, {recipients.repeated} repeated lines left out"
    )


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
        return _fail("stopped; nothing was enqueued", 130)
    except (CampaignError, ValidationError, PmqdError, psycopg.Error) as error:
        return _fail(*_explained(error))


def _explained(error: Exception) -> tuple[str, int]:
    """The error in words, and its exit code."""
    match error:
        case ValidationError():
            return "\n".join(_fault(fault["loc"], fault["msg"]) for fault in error.errors()), ExitCode.CONFIG
        case psycopg.OperationalError():
            return f"PostgreSQL: {str(error).strip().splitlines()[0]}", ExitCode.UNREACHABLE
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
