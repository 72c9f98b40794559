"""What a chaos run says: its exit code, its tables, its JSON, its line of progress, what it must have seen."""

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
from rich.console import Console

from pmqd.chaos import __main__ as command
from pmqd.chaos.checker import Report
from pmqd.chaos.conditions import SIGNS, Condition, conditions
from pmqd.chaos.faults import kinds
from pmqd.chaos.nemesis import FaultRecord
from pmqd.chaos.plan import Plan
from pmqd.chaos.progress import Line, Tally
from pmqd.chaos.report import as_json, as_text
from pmqd.chaos.run import Outcome, Standstill

PLAN = Plan(jobs=100, faults=2, seed=7, folder=Path("/nowhere"))
HIT = FaultRecord("redis_kill", target="Redis", hit=True, window="3 hints in it", recovery_seconds=0.75)
MISS = FaultRecord("worker_kill", target="host a", hit=False, window="nobody was there")
DSN = "postgresql://me:hunter2@db/app"


def held() -> Outcome:
    """A run in which everything held."""
    return Outcome(
        PLAN,
        report=Report(jobs=100, re_executed=3, slowest_recovery=1.5),
        records=[HIT],
        conditions=[Condition("jobs rescued from the dead", 4, expected=True)],
        seconds={"load": 3.2},
        facts={"cores": 2},
    )


def broken() -> Outcome:
    """A run that lost two jobs."""
    report = Report(jobs=100)
    report.counts["lost"] = 2
    report.first["lost"] = ["job 1: acknowledged, no row", "+ 1 17"]
    return replace(held(), report=report)


def text_of(outcome: Outcome) -> str:
    """The tables as they are printed."""
    console = Console(width=200)
    with console.capture() as captured:
        console.print(as_text(outcome))
    return captured.get()


def test_a_run_that_held_ends_with_zero() -> None:
    """All counts zero, all kinds hit, all expected states seen."""
    assert held().exit_code == 0


@pytest.mark.parametrize(
    "outcome",
    [
        broken(),
        replace(held(), complaints=["host a: exit code 1 after SIGTERM"]),
        replace(broken(), unmet=["redis_kill"]),
    ],
)
def test_a_broken_run_ends_with_one(outcome: Outcome) -> None:
    """A violation, or a host that did not end as it should; also where faults were missing besides."""
    assert outcome.exit_code == 1


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome(PLAN),
        replace(held(), unmet=["worker_kill"]),
        replace(held(), conditions=[Condition("a new epoch of Redis", 0, expected=True)]),
    ],
)
def test_a_run_that_proves_nothing_ends_with_two(outcome: Outcome) -> None:
    """No check, a kind of fault that never hit, an expected state that was never seen."""
    assert outcome.exit_code == 2


def test_a_state_that_no_fault_implies_may_be_missing() -> None:
    """What was not to be expected is shown and not asked for."""
    outcome = replace(held(), conditions=[Condition("leases that ran out", 0, expected=False)])
    assert outcome.exit_code == 0
    assert "leases that ran out" in text_of(outcome)


def test_the_table_names_everything() -> None:
    """Jobs, faults by kind with what they hit and how long recovery took, every count, re-executions, the verdict."""
    told = text_of(
        replace(held(), records=[HIT, MISS], unmet=["worker_kill"], refused={"redis_full": "not ours"})
    )
    for words in (
        "--jobs 100 --faults 2",
        "redis_kill",
        "0.75 s",
        "Redis: 3 hints in it",
        "worker_kill",
        "never",
        "left out: not ours",
        *(name.replace("_", " ") for name in Report().counts),
        "executed again",
        "slowest recovery",
        "1.50 s",
        "never hit: worker_kill",
        "exit code 2",
    ):
        assert words in told, words


def test_the_first_histories_of_a_violation_are_shown() -> None:
    """What broke is told with the job's own lines."""
    told = text_of(broken())
    assert "lost: 2" in told
    assert "    job 1: acknowledged, no row" in told
    assert "BROKEN (exit code 1)" in told


def test_the_json_says_the_same_and_no_secret() -> None:
    """Everything of the tables is in the JSON; addresses are not."""
    plan = replace(PLAN, postgres=DSN, redis="redis://:hunter2@cache")
    told = as_json(replace(broken(), plan=plan))
    text = json.dumps(told)
    assert "hunter2" not in text
    assert told["exit_code"] == 1
    assert told["plan"]["staging"] is True
    assert told["report"]["counts"]["lost"] == 2
    assert told["faults"][0]["recovery_seconds"] == 0.75
    assert told["machine"] == {"cores": 2}


def test_the_states_are_counted_from_pages_and_logs(tmp_path: Path) -> None:
    """Counters are added over series and lives, words over logs; expected is what a fault that hit implies."""
    log = tmp_path / "log"
    log.write_text(
        '{"message":"new epoch 1"}\n{"message":"new epoch 2"}\n{"message":"Redis is away, claiming from PostgreSQL"}\n'
    )
    page = (
        'pmqd_stolen_total{queue="a"} 3.0\npmqd_stolen_total{queue="b"} 1.0\npmqd_stale_settles_total 2.0\n'
    )
    found = {each.name: each for each in conditions([HIT, MISS], [page, page], [log, tmp_path / "none"])}
    assert found["jobs claimed without a hint"].seen == 8
    assert found["settles refused as stale"].seen == 4
    assert found["a new epoch of Redis"].seen == 1, "the first one is there in every run"
    assert found["workers without Redis"].seen == 1
    assert found["workers without Redis"].expected, "redis_kill hit"
    assert not found["jobs rescued from the dead"].expected, "worker_kill did not hit"


def test_the_signs_are_those_of_the_product() -> None:
    """Counters and log words exist in the source, and the kinds in the table of faults."""
    source = "".join(file.read_text() for file in files("pmqd").iterdir() if file.name.endswith(".py"))
    for sign in SIGNS:
        assert sign.kinds <= set(kinds()), sign.name
        assert (sign.counter.removesuffix("_total") or sign.words) in source, sign.name


def test_progress_is_counted_from_the_growing_history(tmp_path: Path) -> None:
    """Acknowledged and ended jobs are counted once each, whole lines only, over all producers."""
    tally = Tally(tmp_path)
    tally.look()
    assert (tally.acknowledged, tally.finished, tally.backlog) == (0, 0, 0)
    (tmp_path / "producers-0").write_text("? 1 1 quick q 3 100 0\n+ 1 2\n+ 2 2\n- 3 4\n+ 4")
    (tmp_path / "producers-1").write_text("+ 5 2\n")
    (tmp_path / "handlers").write_text("S 1 1 t 9 1 1\nE 1 1 t 9 2 2 ok\nE 2 1 t 9 2 2 retry\n")
    tally.look()
    assert (tally.acknowledged, tally.finished, tally.backlog) == (3, 1, 2)
    with (tmp_path / "producers-0").open("a") as file:
        file.write(" 17\n")
    tally.look()
    assert tally.acknowledged == 4
    tally.left = 1
    assert tally.backlog == 1, "what PostgreSQL says"


def test_the_line_tells_how_far_the_run_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Phase, jobs, rate, faults, backlog; on a pipe one line per phase."""
    with Line(Tally(tmp_path), 1000, 5, lambda: 2) as line:
        line.phase("load")
        line.show()
        assert line.text().startswith(
            "load   0/1,000 acknowledged, 0 finished, 0/s, faults 2/5, backlog 0, 0:00"
        )
    assert capsys.readouterr().err.count("\n") == 1


def test_an_error_of_the_run_is_no_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A run that cannot be made ends with 2 and its reason, and leaves nothing behind."""

    def fail(*_: object) -> Outcome:
        raise RuntimeError("the dog ate it")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(command, "run", fail)
    assert command.main(["--jobs", "10", "--faults", "0"]) == 2
    assert "the dog ate it" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_run_writes_its_json_and_keeps_its_folder_only_if_it_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The folder of a broken run stays, without the servers' data; that of one that held goes."""

    def play(plan: Plan, _wish: object) -> Outcome:
        for name in ("hosts", "pg"):
            (plan.folder / name).mkdir()
        return replace(held() if plan.jobs == 10 else broken(), plan=plan)

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(command, "run", play)
    assert command.main(["--jobs", "10", "--json", str(tmp_path / "good.json")]) == 0
    assert command.main(["--jobs", "11", "--json", str(tmp_path / "bad.json")]) == 1
    assert json.loads((tmp_path / "good.json").read_text())["exit_code"] == 0
    assert json.loads((tmp_path / "bad.json").read_text())["verdict"] == "BROKEN"
    [kept] = tmp_path.glob("pmqd-chaos-*")
    assert {path.name for path in kept.iterdir()} == {"hosts", "plan.json"}
    assert str(kept) in capsys.readouterr().err


def test_the_drain_ends_when_nothing_is_left_or_nothing_moves() -> None:
    """Every job that ends gives the others their whole patience again; a job that is due later is waited for."""
    still = Standstill(10.0)
    assert not still.over(5, 0.0, 100.0)
    assert not still.over(5, 0.0, 109.0)
    assert not still.over(4, 3.0, 109.5)
    assert not still.over(4, 3.0, 122.0)
    assert still.over(4, 0.0, 122.6)
    assert Standstill(10.0).over(0, 0.0, 100.0)
