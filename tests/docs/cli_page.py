"""Writes docs/cli.md from the program itself: `python -m tests.docs.cli_page > docs/cli.md`."""

import sys
from collections.abc import Iterator
from typing import Any

import typer

from pmqd import cli

HEAD = """\
# Command line

Made from the program by `python -m tests.docs.cli_page > docs/cli.md`; `pmqd COMMAND --help` says the same.

- **Answers** are on stdout, all else is on stderr. Tables are for people; scripts take `--json`: one object or array, fields named as the SQL columns,
  times in RFC 3339, and `display_status` beside a job's `status`.
- **Settings** come from the file of `--config`, over it the environment, over it `--set`; see [configuration](configuration.md). `--config` may stand
  before the command as well.
- **Times** are RFC 3339 with an offset (`2026-01-31T08:00:00Z`) or a span from now (`+10m`, `-2h`). **Spans** are a number with `ms`, `s`, `m`, `h` or `d`.
- **Lists** that go on name the next page on stderr: `more: --cursor ...`. With `--status` they may have a short page, or an empty one, and still go on.
- **Exit codes**: 0 ok, 1 failed (not found, conflict), 2 usage, 69 a store is away, 75 timed out, 78 configuration, 79 schema. An error is one line on
  stderr (one per fault for the configuration and the schema); `pmqd --debug COMMAND` shows its traceback.
"""


def commands() -> Iterator[tuple[str, Any]]:
    """Every command by its full name, in the program's order; the program itself first."""

    def walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
        inner = getattr(command, "commands", None)
        if inner is None or name == "pmqd":
            yield name, command
        for word, each in (inner or {}).items():
            yield from walk(f"{name} {word}", each)

    return walk("pmqd", typer.main.get_command(cli.app))


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(_section(name, command) for name, command in commands())])


def _section(name: str, command: Any) -> str:
    parameters = list(command.params)
    arguments = [each for each in parameters if each.param_type_name == "argument"]
    options = [each for each in parameters if each.param_type_name == "option" and each.name != "help"]
    words = [f"{each.metavar}" if each.required else f"[{each.metavar}]" for each in arguments]
    inner = "COMMAND" if hasattr(command, "commands") else ""
    usage = " ".join([name, *(["[OPTIONS]"] if options else []), *words, *filter(None, [inner])])
    text = " ".join(str(command.help or "").split())
    rows = [f"| `{each.metavar}` | {_cell(each)} |" for each in arguments]
    rows += [f"| {_names(each)} | {_cell(each)} |" for each in options]
    table = ["| | |", "|---|---|", *rows, ""] if rows else []
    return "\n".join([f"## {name}", "", f"`{usage}`", "", text, "", *table])


def _names(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in sorted(option.opts, key=len))
    return names if option.is_flag else f"{names} `{option.metavar}`"


def _cell(parameter: Any) -> str:
    text = " ".join(str(parameter.help).split()).replace("|", "\\|")
    if parameter.param_type_name == "option" and parameter.required:
        text += " Required."
    shown = parameter.default not in (None, False) and not callable(parameter.default)
    return (
        f"{text} Default: {parameter.default}." if shown and parameter.param_type_name == "option" else text
    )


if __name__ == "__main__":
    sys.stdout.write(page())
