"""pmqd beside its peers, in turns, on private servers with default durability.

`python -m benchmarks --peers graphile-worker,pgqueuer --work drain,pickup --rounds 5 --json FILE`
Exit codes: 0 all was measured; 1 something could not be; 2 a wrong argument; 130 interrupted.
"""

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks import machine, report
from benchmarks.peers.field import FIELD
from benchmarks.peers.tools import install
from benchmarks.turns import Plan, Result, run
from benchmarks.works import WORKS
from benchmarks.works.work import OURS, Scale, Work, is_ours

FAILED, INTERRUPTED = 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what the command line asks for; the exit code."""
    plan, file = read(arguments)
    foreign = any(not is_ours(name) for work in plan.works if not work.own for name in plan.contestants(work))
    if foreign:
        install()
    print(machine.describe(peers=foreign), flush=True)
    print(_told(plan), flush=True)
    result, code = Result(), 0
    try:
        with _ending_in_order():
            run(plan, result, partial(report.write_json, file) if file else lambda _rows: None)
    except KeyboardInterrupt:
        print("interrupted: what follows is what there is so far", flush=True)
        code = INTERRUPTED
    if file:
        report.write_json(file, result.rows)
    print("\n" + report.as_text(result.rows), flush=True)
    for failure in result.failures:
        print(f"FAILED {failure}", flush=True)
    return code or (FAILED if result.failures else 0)


def _told(plan: Plan) -> str:
    """What will be done, and by whom."""
    works = [f"{work.name}: {work.about}\n    by {', '.join(plan.contestants(work))}" for work in plan.works]
    names = dict.fromkeys(name for work in plan.works for name in plan.contestants(work))
    setups = [f"{name}: {FIELD[name].setup}" for name in names if name in FIELD]
    return "\n".join([*works, *setups])


def read(arguments: Sequence[str] | None) -> tuple[Plan, Path | None]:
    """The plan, and where the JSON goes; a wrong argument ends the program with 2 before anything is started."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    peers = _all_peers()
    parser.add_argument(
        "--peers",
        metavar="NAMES",
        help=f"beside pmqd, which is always there, with commas: {', '.join(peers)}. Without: all."
        " Where no pmqd… is named, all variants of pmqd are measured too; `pmqd` names none of them",
    )
    parser.add_argument("--work", metavar="NAMES", help=f"with commas: {', '.join(WORKS)}. Without: all")
    parser.add_argument("--rounds", metavar="N", default="5", help="how often everybody has a turn (5)")
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help="the figures go there, also when it is interrupted"
    )
    parser.add_argument("--jobs", metavar="N", help="instead of each work's own number, for a quick try")
    parser.add_argument("--seconds", metavar="S", help="likewise for works that last a time")
    given = parser.parse_args(arguments)
    try:
        works = [WORKS[name] for name in _names("--work", given.work, list(WORKS))]
        rounds = int(_number("--rounds", given.rounds, whole=True))
        jobs = int(_number("--jobs", given.jobs, whole=True)) if given.jobs is not None else None
        seconds = _number("--seconds", given.seconds) if given.seconds is not None else None
        plan = Plan(works, _chosen(given.peers, works), rounds, Scale(jobs, seconds))
        if given.json:
            _check_writable(given.json)
    except ValueError as error:
        parser.error(str(error))
    return plan, given.json


def _all_peers() -> list[str]:
    """Who can be chosen."""
    return list(dict.fromkeys(name for work in WORKS.values() if not work.own for name in work.peers))


def _names(option: str, text: str | None, allowed: Sequence[str]) -> list[str]:
    if text is None:
        return list(allowed)
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in allowed:
            raise ValueError(f"{option} {name!r} is unknown; allowed are {', '.join(allowed)}")
    return names


def _chosen(text: str | None, works: Sequence[Work]) -> list[str]:
    """The contestants: pmqd in any case, and its variants unless some name of pmqd is listed."""
    every = _all_peers()
    names = _names("--peers", text, every)
    for name in names if text is not None else ():
        if not any(name in work.peers for work in works):
            able = ", ".join(work.name for work in WORKS.values() if name in work.peers)
            raise ValueError(
                f"--peers {name!r} has no part in {', '.join(work.name for work in works)}; it has in {able}"
            )
    variants = [] if any(is_ours(name) for name in names) else [name for name in every if is_ours(name)]
    return [OURS, *variants, *names]


def _number(option: str, text: str, *, whole: bool = False) -> float:
    allowed = "a whole number from 1 on" if whole else "a number above 0"
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        raise ValueError(f"{option} {text!r} is not allowed: {allowed}") from None
    if not (value >= 1 if whole else 0 < value < float("inf")):
        raise ValueError(f"{option} {text!r} is not allowed: {allowed}")
    return value


def _check_writable(path: Path) -> None:
    try:
        report.write_json(path, [])
    except OSError as error:
        raise ValueError(
            f"--json {str(path)!r} cannot be written: {error.strerror}; allowed is a file in a folder that is there"
        ) from None


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """SIGTERM ends the servers and writes the figures as Ctrl-C does."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
