"""The plan of a chaos run: what a command line may ask for, what is kept of it, how it is done again."""

import json
from pathlib import Path
from typing import Any

import pytest

from pmqd.chaos import __main__ as command
from pmqd.chaos.plan import FILE, Plan, command_line, keep, make_plan, remove_servers
from pmqd.errors import UsageError

DSN = "postgresql://me:hunter2@db.example/app"
URL = "redis://:hunter2@cache.example/3"


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of runs are made here."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_bare_command_line_is_a_whole_run(tmp_path: Path) -> None:
    """Without options: 20,000 jobs, 40 faults, two hosts, a seed of its own, own servers, a folder that goes again."""
    first, second = make_plan({}), make_plan({})
    assert (first.jobs, first.faults, first.hosts, first.workers) == (20_000, 40, 2, 2)
    assert not first.staging
    assert not first.keep
    assert first.seed != second.seed
    assert first.folder.parent == tmp_path
    assert first.folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"jobs": 0}, "--jobs 0 is not a whole number from 1 to"),
        ({"faults": -1}, "--faults -1"),
        ({"seed": 2**63}, "--seed"),
        ({"hosts": 9}, "--hosts 9 is not a whole number from 1 to 8"),
        ({"workers": 0}, "--workers 0"),
        ({"postgres": DSN}, "--postgres is given and --redis is not"),
        ({"redis": URL}, "--redis is given and --postgres is not"),
        ({"postgres": "host=a =", "redis": URL}, "--postgres: not a connection string"),
        ({"postgres": DSN, "redis": "http://:hunter2@cache"}, "--redis"),
        (
            {"postgres": DSN, "redis": "rediss://cache.example/0"},
            "--redis: a run puts wires before one plain server",
        ),
        ({"postgres": "host=a,b", "redis": URL}, "--postgres: a run puts its wires before one server"),
        ({"mutant": "nobody"}, "--mutant 'nobody' is none of"),
        ({"only": ("earthquake",)}, "--only 'earthquake' is none of"),
        ({"folder": Path("a,b")}, "has no comma"),
    ],
)
def test_what_cannot_be_is_refused(
    given: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each fault of a command line is named with the option; no password is shown, and no folder is left."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        make_plan(given)
    assert told in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert not list(tmp_path.glob("pmqd-chaos-*"))


def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path) -> None:
    """A folder that holds anything is refused; an empty or missing one is taken and stays."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").touch()
    with pytest.raises(UsageError, match="is not empty"):
        make_plan({"folder": tmp_path / "full"})
    plan = make_plan({"folder": tmp_path / "new" / "one"})
    assert plan.keep
    assert plan.folder.is_dir()


def test_a_replay_takes_what_the_kept_plan_says() -> None:
    """By seed or by folder: jobs, faults, seed, hosts, workers; an option of the command line wins."""
    before = make_plan(
        {"jobs": 700, "faults": 3, "seed": 11, "hosts": 1, "workers": 4, "only": ("redis_kill",)}
    )
    keep(before)
    for replay in ("11", str(before.folder)):
        again = make_plan({"faults": 5}, replay)
        assert (again.jobs, again.faults, again.seed, again.hosts, again.workers) == (700, 5, 11, 1, 4)
        assert again.only == ("redis_kill",)
        assert again.folder != before.folder


def test_a_replay_by_seed_takes_the_latest_run(tmp_path: Path) -> None:
    """Of several kept runs with one seed the one that was kept last."""
    for number, jobs in enumerate((100, 200)):
        folder = tmp_path / f"pmqd-chaos-7-{number}"
        folder.mkdir()
        keep(Plan(jobs=jobs, faults=1, seed=7, folder=folder))
    assert make_plan({}, "7").jobs == 200


@pytest.mark.parametrize("replay", ["12345", "/nowhere/at/all"])
def test_a_replay_of_nothing_says_what_to_do(replay: str) -> None:
    """A seed of which no run was kept and a folder that is none are named."""
    with pytest.raises(UsageError, match=replay):
        make_plan({}, replay)


def test_a_replay_and_another_seed_do_not_go_together() -> None:
    """The seed of a replay is that of the run."""
    keep(make_plan({"seed": 5}))
    with pytest.raises(UsageError, match="of seed 5 and --seed is 6"):
        make_plan({"seed": 6}, "5")


@pytest.mark.parametrize("text", ["{", "[]", '{"jobs": 1}', '{"jobs": "x", "faults": 1, "seed": 1}'])
def test_a_kept_plan_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    """A file that cannot be read, or says too little or nonsense, is an error in words."""
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UsageError):
        make_plan({}, str(tmp_path))


def test_what_is_kept_holds_no_secret() -> None:
    """Addresses of staging servers are in no file and in no command line; a replay there names them again."""
    plan = make_plan({"postgres": DSN, "redis": URL, "seed": 3})
    keep(plan)
    assert plan.staging
    assert "hunter2" not in (plan.folder / FILE).read_text()
    assert json.loads((plan.folder / FILE).read_text())["seed"] == 3
    assert "--postgres … --redis …" in command_line(plan)
    assert "hunter2" not in command_line(plan) + repr(plan)


def test_the_command_line_is_the_plan() -> None:
    """The line that a run prints makes the same plan."""
    plan = make_plan({"jobs": 5, "faults": 1, "seed": 9, "only": ("redis_kill", "worker_kill")})
    assert command_line(plan) == (
        "python -m pmqd.chaos --jobs 5 --faults 1 --hosts 2 --workers 2 --only redis_kill,worker_kill --seed 9"
    )


def test_the_servers_data_goes_and_the_history_stays() -> None:
    """What a kept folder is for is the history."""
    plan = make_plan({})
    for name in ("pg", "redis", "history"):
        (plan.folder / name).mkdir()
    remove_servers(plan)
    assert [path.name for path in plan.folder.iterdir()] == ["history"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--jobs", "many"], "--jobs"),
        (["--no-such"], "--no-such"),
        (["--hosts", "99"], "--hosts 99"),
        (["--json", "/nowhere/at/all/report.json"], "there is no folder /nowhere/at/all"),
        (["--replay", "99"], "no run of this seed"),
    ],
)
def test_the_command_says_what_is_wrong(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bad argument is one line on standard error, names what is wrong, and nothing is proved: exit code 2."""
    assert command.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert told in captured.err
    assert captured.err.count("\n") == 1


def test_help_ends_with_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    """--help names every option and what the exit codes mean."""
    assert command.main(["--help"]) == 0
    told = capsys.readouterr().out
    for option in ("--jobs", "--faults", "--seed", "--json", "--mutant", "--postgres", "--redis", "--replay"):
        assert option in told
    assert "Exit codes" in told
