"""The command `python -m pmqd.chaos`: one run, its tables, its exit code.

Exit codes: 0 every invariant held under every planned fault; 1 an invariant broke, or a host did not end as it should;
2 nothing is proved: a planned fault never hit its window, the run could not be made, or an argument is wrong;
69 a server that was named does not answer; 130 Ctrl-C.
"""

import json as json_text
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from pmqd.chaos.plan import Plan, command_line, keep, make_plan, remove_folder, remove_servers
from pmqd.chaos.report import as_json, as_text
from pmqd.chaos.run import Outcome, Stopped, run, stopping
from pmqd.cli_common import print_table, say
from pmqd.errors import ExitCode, PmqdError

NOTHING_PROVED = 2
STOPPED = 130

_UsageError = typer.BadParameter.__bases__[0]
_ClickError: type[Exception] = _UsageError.__bases__[0]

app = typer.Typer(
    name="python -m pmqd.chaos",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command(
    epilog="Exit codes: 0 held, 1 an invariant broke, 2 nothing proved (or a wrong argument), 69 server unreachable."
)
def chaos(
    jobs: Annotated[
        int | None, typer.Option(metavar="N", help="Jobs to be acknowledged. Default: 20000.")
    ] = None,
    faults: Annotated[int | None, typer.Option(metavar="M", help="Faults among them. Default: 40.")] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="S", help="Decides what is enqueued, broken and when. Default: a new one."),
    ] = None,
    hosts: Annotated[int | None, typer.Option(metavar="N", help="Masters. Default: 2.")] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Worker processes for quick jobs per host. Default: 2.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="KIND,KIND", help="Choose faults from these kinds only.")
    ] = None,
    mutant: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Run a variant of pmqd that is broken on purpose; it must end with 1."
        ),
    ] = None,
    replay: Annotated[
        str | None,
        typer.Option(
            metavar="SEED|FOLDER",
            help="Do a run again whose folder was kept: its jobs, faults, seed, hosts, mutant, where no option says otherwise.",
        ),
    ] = None,
    postgres: Annotated[
        str | None,
        typer.Option(
            metavar="DSN", help="Your PostgreSQL instead of an own one: in schemas that are made and removed."
        ),
    ] = None,
    redis: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Your Redis instead of an own one: under a prefix of its own."),
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as JSON, too.")] = None,
    folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Work here and leave everything here; must be empty or missing."),
    ] = None,
) -> int:
    """Prove that no job is lost and none is done twice, whatever breaks.

    Runs the real daemon, breaks what can break while jobs go through, and checks every invariant from outside. The
    folder of a run that did not hold is kept and named: it holds the history, logs, configurations and final state.
    """
    given = {
        "jobs": jobs, "faults": faults, "seed": seed, "hosts": hosts, "workers": workers, "mutant": mutant,
        "postgres": postgres, "redis": redis, "json": json, "folder": folder,
        "only": None if only is None else tuple(name.strip() for name in only.split(",")),
    }  # fmt: skip
    if json is not None and not json.absolute().parent.is_dir():
        raise typer.BadParameter(f"--json {json}: there is no folder {json.absolute().parent}")
    plan = make_plan(given, replay)
    keep(plan)
    return _run(plan, json)


def _run(plan: Plan, json: Path | None) -> int:
    """Run it, tell what came out, and leave a folder only where there is something to look into."""
    say(command_line(plan))
    outcome: Outcome | None = None
    stopped = False
    try:
        with stopping() as wish:
            outcome = run(plan, wish)
    except (Stopped, KeyboardInterrupt):
        stopped = True
        say("stopped")
        return STOPPED
    finally:
        useful = (
            not stopped and (outcome is None or outcome.exit_code != 0) and (plan.folder / "hosts").exists()
        )
        _leave(plan, useful=useful)
    print_table(as_text(outcome))
    if json is not None:
        json.write_text(json_text.dumps(as_json(outcome), indent=2) + "\n")
    return outcome.exit_code


def _leave(plan: Plan, *, useful: bool) -> None:
    if not plan.keep and not useful:
        remove_folder(plan)
        return
    if not plan.keep:
        remove_servers(plan)
    say(f"history, logs and final state: {plan.folder} (again: python -m pmqd.chaos --replay {plan.folder})")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command.

    Args:
        arguments: without the program's name; default: the process's own.

    Returns:
        The exit code.
    """
    command = typer.main.get_command(app)
    try:
        return int(
            command.main(
                arguments and list(arguments), prog_name="python -m pmqd.chaos", standalone_mode=False
            )
            or 0
        )
    except _ClickError as error:
        text = error.format_message() if hasattr(error, "format_message") else str(error)
        say(f"pmqd.chaos: {text.rstrip('.')}; see python -m pmqd.chaos --help")
        return NOTHING_PROVED
    except PmqdError as error:
        say(f"pmqd.chaos: {' '.join(str(error).split())}")
        return NOTHING_PROVED if error.exit_code == ExitCode.FAILED else int(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        return STOPPED
    except Exception:  # noqa: BLE001 - an error of the run's own is no verdict about the product
        traceback.print_exc()
        return NOTHING_PROVED


if __name__ == "__main__":
    sys.exit(main())
