"""Commands that examine: `check` the configuration alone, `doctor` the live servers too."""

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from pmqd import config as configuration
from pmqd.cli_common import (
    ConfigOption,
    JsonOption,
    SetOption,
    chosen_config,
    load_settings,
    print_json,
    print_table,
    say,
)
from pmqd.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from pmqd.doctor import Finding


def add_to(app: typer.Typer) -> None:
    """Puts the commands into the program."""
    app.command()(check)
    app.command()(doctor)


def check(*, json: JsonOption = False, config: ConfigOption = None, assign: SetOption = None) -> None:
    """Validate the configuration, without the stores.

    Nothing is started. Warns about what is legal but unwise; ends with 78 if it is not valid.
    """
    try:
        settings = load_settings(config, assign)
    except ConfigError as error:
        if json:
            print_json({"valid": False, "errors": str(error).splitlines(), "warnings": []})
        raise
    file = configuration.find_file(chosen_config(config))
    found = configuration.warnings(settings, file)
    if json:
        print_json({"valid": True, "errors": [], "warnings": found})
        return
    for text in found:
        say(f"warning: {text}")
    typer.echo(
        f"{file or 'defaults and environment'}: valid, {len(found)} warning{'' if len(found) == 1 else 's'}"
    )


def doctor(*, json: JsonOption = False, config: ConfigOption = None, assign: SetOption = None) -> int:
    """Look at both live servers and say what to mend.

    Each finding comes with the statement that mends it. Ends with 1 if something is wrong, 69 if a server is away.
    """
    from pmqd.doctor import Level, examine  # noqa: PLC0415 - the master must not load the stores

    found = examine(load_settings(config, assign))
    if json:
        print_json([asdict(finding) for finding in found])
    else:
        _print(found)
    levels = {finding.level for finding in found}
    if Level.UNREACHABLE in levels:
        return ExitCode.UNREACHABLE
    return ExitCode.FAILED if Level.WRONG in levels else ExitCode.OK


def _print(found: "list[Finding]") -> None:
    from pmqd import render  # noqa: PLC0415 - rich is loaded for people only

    rows = [(str(finding.level), finding.what, finding.found, finding.do) for finding in found]
    print_table(render.findings(rows))
