"""The command `pmqd`: puts the commands together, and turns every error into one line and an exit code."""

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from pmqd import cli_bench, cli_daemon, cli_doctor, cli_enqueue, cli_jobs, cli_queues, cli_status
from pmqd.cli_common import ConfigOption, remember_config, say
from pmqd.errors import ConfigError, ExitCode, PmqdError, SchemaError

app = typer.Typer(
    name="pmqd",
    help="Background jobs on PostgreSQL and Redis at once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Exit codes: 0 ok, 1 failed, 2 usage, 69 store unreachable, 75 timed out, 78 configuration, 79 schema.",
)

_UsageError = typer.BadParameter.__bases__[0]
_ClickError: type[Exception] = _UsageError.__bases__[0]
_debug = False


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pmqd {version('pmqd')}")
        raise typer.Exit


@app.callback()
def root(
    config: ConfigOption = None,
    *,
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Background jobs on PostgreSQL and Redis at once."""
    global _debug  # noqa: PLW0603 - one command per process
    del show_version
    _debug = debug
    remember_config(config)


for _module in (cli_daemon, cli_enqueue, cli_jobs, cli_queues, cli_status, cli_doctor, cli_bench):
    _module.add_to(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: without the program's name; default: the process's own.

    Returns:
        The exit code.
    """
    command = typer.main.get_command(app)
    try:
        return int(command.main(arguments and list(arguments), prog_name="pmqd", standalone_mode=False) or 0)
    except _ClickError as error:
        return _usage(error)
    except PmqdError as error:
        return _fail(str(error), error.exit_code, error)
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        # The reader of a pipe went away: nothing more can be said there, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED
    except Exception as error:  # noqa: BLE001 - whatever it was, a person gets one line and a code
        return _fail(f"{type(error).__name__}: {error} (pmqd --debug shows where)", ExitCode.FAILED, error)


def _usage(error: Exception) -> int:
    """A usage error in one line, with the command whose help explains it."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "pmqd"
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    if not text or type(error).__name__ == "NoArgsIsHelpError":
        if context:
            say(context.get_help())
        return ExitCode.USAGE
    joint = "? See" if text.endswith("?") else "; see"
    return _fail(f"{text.rstrip('.?')}{joint} {path} --help", ExitCode.USAGE, None)


def _fail(text: str, code: int, error: Exception | None) -> int:
    if _debug and error is not None:
        sys.excepthook(type(error), error, error.__traceback__)
        return int(code)
    # Faults of the configuration and differences of the schema are one line each; anything else is one line in all.
    several = isinstance(error, ConfigError | SchemaError)
    for line in text.splitlines() if several else [" ".join(text.split())]:
        if line.strip():
            say(f"pmqd: {line.strip()}")
    return int(code)
