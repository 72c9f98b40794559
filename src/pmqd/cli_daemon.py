"""Commands that start things: `run`, `dev`, `demo`; and `schema apply|check`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from pmqd.cli_common import (
    ConfigOption,
    JsonOption,
    SetOption,
    as_environment,
    chosen_config,
    load_settings,
    print_json,
    say,
)

schemas = typer.Typer(name="schema", help="The tables and functions in PostgreSQL.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    """Puts the commands into the program."""
    app.command()(run)
    app.command()(dev)
    app.command()(demo)
    app.add_typer(schemas)


def run(config: ConfigOption = None, assign: SetOption = None) -> int:
    """Run the daemon in the foreground.

    SIGTERM and SIGINT drain, then stop; a second one stops now. SIGHUP reloads the configuration.
    """
    from pmqd import master  # noqa: PLC0415 - needed by this command only

    # A reload reads the file and the environment again: what --set said must still be there, over both.
    os.environ.update(as_environment(assign))
    return master.run(load_settings(config, assign), chosen_config(config))


def dev(
    app: Annotated[str, typer.Option("--app", metavar="MODULE:ATTRIBUTE", help="Your application.")],
    directory: Annotated[
        Path | None,
        typer.Option(
            "--directory",
            "-d",
            metavar="DIR",
            help="Where the private servers keep their data. Default: .pmqd/dev.",
        ),
    ] = None,
) -> int:
    """Run your application on private servers.

    PostgreSQL and Redis are started in a directory of their own and stopped at the end; the workers are replaced when
    code changes. Ctrl-C ends it.
    """
    from pmqd import dev as development  # noqa: PLC0415 - needed by this command only

    return development.run(app, directory)


def demo(
    *, chaos: Annotated[bool, typer.Option("--chaos", help="Kill a worker and Redis on the way.")] = False
) -> int:
    """Send a campaign of 1,000 mails on private servers.

    Ends with 0 only if every recipient is accounted for and nobody got two mails.
    """
    from pmqd import demo as demonstration  # noqa: PLC0415 - needed by this command only

    return int(demonstration.run(chaos))


@schemas.command("apply")
def apply_schema(config: ConfigOption = None, assign: SetOption = None) -> None:
    """Make the schema, or bring it up to date."""
    from pmqd import schema  # noqa: PLC0415 - the master must not load the stores

    postgres = load_settings(config, assign).postgres
    done = schema.apply(postgres.direct, schema=postgres.schema_name)
    say(f"schema {postgres.schema_name}: {done}")


@schemas.command("check")
def check_schema(*, json: JsonOption = False, config: ConfigOption = None, assign: SetOption = None) -> None:
    """Compare the schema with this version's.

    Ends with 79 if they differ.
    """
    from pmqd import schema  # noqa: PLC0415 - the master must not load the stores

    postgres = load_settings(config, assign).postgres
    found = schema.check(postgres.direct, schema=postgres.schema_name)
    if json:
        print_json({"schema": postgres.schema_name, "version": found})
    else:
        typer.echo(f"{postgres.schema_name} {found}")
