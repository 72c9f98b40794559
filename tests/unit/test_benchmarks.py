"""The benchmarks' own reckoning: what a command line may ask for, turns, medians and ratios, and the JSON; no servers."""

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks import report
from benchmarks.peers import slots
from benchmarks.peers.arena import Failure
from benchmarks.report import Row
from benchmarks.turns import Plan, Result, run
from benchmarks.watch import Watch
from benchmarks.works import WORKS
from benchmarks.works.work import Figures, Scale, Work, rate


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a wrong command line is told."""
    with pytest.raises(SystemExit) as ended:
        command.read(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def work(name: str, **peers: Callable[[Scale], Figures]) -> Work:
    """A work with contestants of a test; `_` in their names stands for `-`."""
    return Work(name, "a test", {peer.replace("_", "-"): measure for peer, measure in peers.items()})


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--peers", "celery,sidekiq"], "--peers 'sidekiq' is unknown; allowed are pmqd, "),
        (["--work", "drian"], "--work 'drian' is unknown; allowed are drain, "),
        (["--work", ""], "--work '' is unknown"),
        (["--rounds", "0"], "--rounds '0' is not allowed: a whole number from 1 on"),
        (["--rounds", "2.5"], "--rounds '2.5' is not allowed"),
        (["--jobs", "-3"], "--jobs '-3' is not allowed"),
        (["--seconds", "nan"], "--seconds 'nan' is not allowed: a number above 0"),
        (["--json", "/nowhere/at/all.json"], "--json '/nowhere/at/all.json' cannot be written: No such file"),
        (
            ["--work", "backlog", "--peers", "celery"],
            "--peers 'celery' has no part in backlog; it has in drain, ",
        ),
    ],
)
def test_a_wrong_argument_is_named_with_its_value_and_what_is_allowed(
    capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    """Before anything is started, each wrong value is told together with what would be right."""
    assert told in refused(capsys, *arguments)


def test_pmqd_is_always_there_and_its_variants_unless_one_is_named() -> None:
    """Naming only peers brings all of pmqd; naming pmqd itself brings nothing else of it."""
    plan, file = command.read(["--peers", "celery", "--work", "drain"])
    assert plan.contestants(WORKS["drain"]) == ["pmqd", "pmqd-full", "pmqd-direct", "celery"]
    assert file is None
    plan, _ = command.read(["--peers", "pmqd,celery", "--work", "drain"])
    assert plan.contestants(WORKS["drain"]) == ["pmqd", "celery"]
    plan, _ = command.read(["--peers", "pmqd-full", "--work", "drain"])
    assert plan.contestants(WORKS["drain"]) == ["pmqd", "pmqd-full"]


def test_a_work_of_pmqd_alone_is_whole_whatever_the_peers() -> None:
    """Without its other half such a work would say nothing."""
    plan, _ = command.read(["--peers", "pmqd,celery", "--work", "drain,snapshot,enqueue"])
    assert plan.contestants(WORKS["snapshot"]) == ["pmqd", "pmqd-snapshot"]
    assert plan.contestants(WORKS["enqueue"]) == ["pmqd", "copy", "copy-ready", "insert"]


def test_pmqd_comes_first_in_every_work() -> None:
    """Every work measures it: else there would be nothing to compare with."""
    assert all(next(iter(each.peers)) == "pmqd" for each in WORKS.values())


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    """One round on a slow machine changes both sides of its ratio, and so not the result."""
    ours, theirs = [100.0, 50.0, 90.0], [50.0, 20.0, 60.0]
    rows = [Row("w", "peer", n, "u", value) for n, value in enumerate(theirs, 1)]
    rows += [Row("w", "pmqd", n, "u", value) for n, value in enumerate(ours, 1)]
    first, second = report.lines(rows, "w", "u")
    assert (first.peer, first.median, first.least, first.most, first.ratio) == ("pmqd", 90, 50, 100, None)
    assert (second.median, second.least, second.most) == (50, 20, 60)
    assert (second.ratio, second.inverse, second.of_medians) == (2.0, 0.5, 1.8)


def test_a_round_that_one_of_both_lacks_makes_no_ratio() -> None:
    """Rounds are compared with themselves only; a division by nothing is left out."""
    rows = [
        Row("w", "pmqd", 1, "u", 3.0),
        Row("w", "peer", 2, "u", 4.0),
        Row("w", "pmqd", 1, "v", 3.0),
        Row("w", "peer", 1, "v", 0.0),
    ]
    assert report.lines(rows, "w", "u")[1].ratio is None
    line = report.lines(rows, "w", "v")[1]
    assert (line.ratio, line.inverse) == (None, 0.0)
    assert "peer" in report.as_text(rows)


def test_the_json_is_a_list_of_rows(tmp_path: Path) -> None:
    """Each has exactly these five keys; the file is replaced as a whole."""
    file = tmp_path / "out.json"
    report.write_json(file, [])
    assert json.loads(file.read_text()) == []
    report.write_json(file, [Row("drain", "pmqd", 1, "µs", 2.5)])
    found = json.loads(file.read_text())
    assert found == [{"work": "drain", "peer": "pmqd", "round": 1, "unit": "µs", "value": 2.5}]
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_turns_alternate_and_one_failure_is_not_the_others() -> None:
    """Every second round goes the other way round; who fails is told, and the rest goes on."""
    order: list[str] = []
    kept: list[int] = []

    def measure(name: str) -> Callable[[Scale], Figures]:
        def go(_scale: Scale) -> Figures:
            order.append(name)
            if name == "b" and len(order) == 2:
                raise Failure("it ended")
            return [("u", 1.0)]

        return go

    one = work("w", pmqd=measure("a"), peer=measure("b"), other=measure("c"))
    result = Result()
    run(
        Plan([one], ["pmqd", "peer", "other"], 2, Scale()),
        result,
        lambda rows: kept.append(len(rows)),
    )
    assert order == ["a", "b", "c", "c", "b", "a"]
    assert result.failures == ["round 1 of 2, w, peer: Failure: it ended"]
    assert kept == [1, 1, 2, 3, 4, 5]


def test_an_interrupted_run_leaves_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C ends it with 130; the figures so far are printed and in the file."""

    def interrupted(_scale: Scale) -> Figures:
        raise KeyboardInterrupt

    one = work("drain", pmqd=lambda _scale: [("jobs/s", 7.0)], pmqd_full=interrupted)
    monkeypatch.setattr(command, "WORKS", {"drain": one})
    monkeypatch.setattr("benchmarks.machine.describe", lambda **_: "a machine")
    file = tmp_path / "out.json"
    assert command.main(["--json", str(file)]) == 130
    assert [row["value"] for row in json.loads(file.read_text())] == [7.0]
    assert "drain: jobs/s" in capsys.readouterr().out


def test_a_rate_counts_the_gaps_and_may_leave_the_ends_out() -> None:
    """Eleven starts in ten steps of 0.1 s are ten a second; the middle leaves a slow end out."""
    times = [n * 100_000_000 for n in range(11)]
    assert rate(times) == pytest.approx(10.0)
    assert rate([*times[:-1], 10**11], 0.8) == pytest.approx(10.0)


def test_the_watch_sees_the_stretch_that_it_was_given(tmp_path: Path) -> None:
    """Slots before and after it do not count."""
    jobs = 4
    path = tmp_path / "slots"
    values = [9, 9, 0, 0, 5, 5, 5, 5, *[0] * jobs * (slots.REGIONS - 2)]
    path.write_bytes(struct.pack(f"={len(values)}q", *values))
    arena: Any = SimpleNamespace(slots=path, jobs=jobs)
    workers: Any = SimpleNamespace(check=lambda: None)
    starts, ends, first = (
        Watch(arena, workers),
        Watch(arena, workers, jobs, jobs),
        Watch(arena, workers, 0, 2),
    )
    assert (starts.count(), ends.count(), first.count()) == (2, 4, 2)
    assert not starts.until_all(0.0)
    assert ends.until_all()
    assert first.until_all()
    for watch in (starts, ends, first):
        watch.close()


def test_what_is_kept_is_all_that_was_measured() -> None:
    """The plan's works are those that were named, in their order."""
    plan, _ = command.read(
        ["--work", "memory,drain,memory", "--jobs", "10", "--seconds", "0.5", "--rounds", "2"]
    )
    names: Sequence[str] = [each.name for each in plan.works]
    assert names == ["memory", "drain"]
    assert (plan.rounds, plan.scale) == (2, Scale(10, 0.5))
