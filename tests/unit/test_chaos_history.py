"""What chaos runs record outside both stores, and how the checker reads it again."""

import json
import math
import os
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from pmqd import Job
from pmqd.chaos import application, checks_history, history, producer_mix
from pmqd.chaos.checks_history import EPOCH_US
from pmqd.chaos.checks_job import asked
from pmqd.chaos.checks_runs import executions
from pmqd.chaos.history import ProducerLog
from tests.jobs import a_claim

NOW = datetime(2026, 11, 1, tzinfo=UTC)


class Port:
    """Nothing of what a worker gives a job."""

    def progress(self, job: Job, fraction: float, note: str) -> None:
        """Nobody looks."""

    def settling(self, job: Job, outcome: object, result: object) -> None:
        """Nobody asks."""

    def transaction(self, job: Job) -> None:
        """Nobody asks."""


def job_of(attempt: int = 1) -> Job:
    """A job as a handler gets it."""
    claimed = a_claim(id=uuid4(), queue_name="chaos-mail", kind="quick", attempt_count=attempt)
    return Job(claimed, {}, "w", Port())  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A history's folder, known to handlers."""
    monkeypatch.setenv(history.ENVIRONMENT, str(tmp_path))
    monkeypatch.setattr(history, "_handlers", None)
    return tmp_path


def test_what_handlers_record_is_read_back(folder: Path) -> None:
    """A start and its end become one execution, under the claim's token; a start without an end stays open."""
    job, cut = job_of(), job_of(2)
    history.start(job)
    history.end(job, "ok")
    history.start(cut)
    lines = checks_history.lines_by_job([folder / history.HANDLERS])
    [run] = executions([line for line in lines if str(job.id).encode() in line])
    assert (run.token, run.attempt, run.pid, run.how) == (job.claim_token.bytes, 1, os.getpid(), "ok")
    assert run.end is not None
    assert run.start <= run.end
    [run] = executions([line for line in lines if str(cut.id).encode() in line])
    assert (run.token, run.attempt, run.end) == (cut.claim_token.bytes, 2, None)


def test_lines_of_many_processes_stay_whole(folder: Path) -> None:
    """Processes that write at once, a fork's child with the parent's descriptor among them, tear no line apart."""
    jobs = [job_of() for _ in range(4)]
    history.start(jobs[0])
    children = []
    for job in jobs:
        child = os.fork()
        if child == 0:
            try:
                for _ in range(500):
                    history.start(job)
                    history.end(job, "ok")
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    lines = (folder / history.HANDLERS).read_bytes().splitlines()
    assert len(lines) == 4001
    assert {(len(line.split()), line[:1]) for line in lines} == {(7, b"S"), (8, b"E")}


def test_a_handler_of_the_application_records_itself(folder: Path) -> None:
    """The quick job writes its two lines, and nothing else happens."""
    job = job_of()
    application.quick(job)
    assert [line[:1] for line in checks_history.lines_by_job([folder / history.HANDLERS])] == [b"S", b"E"]


@pytest.mark.parametrize(
    ("attempt", "how"), [(1, "error"), (2, "ok")], ids=["an attempt that fails", "one that works"]
)
def test_every_end_is_recorded(folder: Path, attempt: int, how: str) -> None:
    """A handler that raises leaves its end as well."""
    job = job_of(attempt)
    if how == "ok":
        application.flaky(job, failures=1)
    else:
        with pytest.raises(RuntimeError):
            application.flaky(job, failures=1)
    [run] = executions(checks_history.lines_by_job([folder / history.HANDLERS]))
    assert run.how == how


def test_without_a_folder_nothing_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Who imports the application by hand gets no files."""
    monkeypatch.delenv(history.ENVIRONMENT, raising=False)
    monkeypatch.setattr(history, "_handlers", None)
    monkeypatch.chdir(tmp_path)
    history.start(job_of())
    assert list(tmp_path.iterdir()) == []


def test_what_producers_record_is_read_back(tmp_path: Path) -> None:
    """The enqueue as it was asked for, each answer, a cancel and a replay."""
    log = ProducerLog(tmp_path, 3)
    known, unknown, refused = uuid4(), uuid4(), uuid4()
    log.attempt((job_id, "quick", "chaos-mail", 3, 60, EPOCH_US + 7) for job_id in (known, unknown, refused))
    log.note("+", [known])
    log.note("-", [refused])
    for mark in "hcCrR":
        log.note(mark, [known])
    log.close()
    lines = checks_history.lines_by_job([tmp_path / "producers-3"])

    def of(job_id: UUID) -> list[bytes]:
        return [line for line in lines if str(job_id).encode() in line]

    found = asked(of(known))
    assert (found.queue, found.max_attempts, found.priority, found.run_at) == ("chaos-mail", 3, 60, 7)
    assert found.acknowledged > 0
    assert found.cancelled >= found.acknowledged
    assert (found.replays_asked, found.replays_done, found.refused) == (1, 1, False)
    assert (found.hinted, asked(of(unknown)).hinted) == (True, False)
    assert (asked(of(unknown)).acknowledged, asked(of(unknown)).refused) == (0, False)
    assert asked(of(refused)).refused


def test_deaths_and_faults_are_read(tmp_path: Path) -> None:
    """Of deaths the earliest after a start counts; a fault that stops processes is a pause of each; one without an end lasts to the last."""
    (tmp_path / history.DEATHS).write_text(
        "D 7 5000000 a worker\nD 7 9000000 b worker\nD 8 6000000 a master\n"
    )
    stop = {"area": "processes", "pids": [7, 9], "stopped": True}
    lines = [
        {"at": 1000, "fault": "worker_freeze", "phase": "begin", "target": "a", "hit": False, "detail": stop},
        {"at": 3000, "fault": "redis_kill", "phase": "begin", "target": "r", "hit": False, "detail": {"area": "redis"}},
        {"at": 4000, "fault": "worker_freeze", "phase": "end", "target": "a", "hit": True, "detail": stop},
    ]  # fmt: skip
    (tmp_path / history.NEMESIS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert checks_history.surroundings(tmp_path).drained == math.inf
    (tmp_path / history.DRAINED).write_text("17\n")
    seen = checks_history.surroundings(tmp_path)
    assert (seen.death_after(7, 1), seen.death_after(7, 6000), seen.death_after(7, 9001)) == (
        5000,
        9000,
        None,
    )
    assert seen.masters == [6000]
    assert seen.drained == 17
    assert seen.pauses == {7: [(1, 4)], 9: [(1, 4)]}
    assert [(fault.name, fault.area, fault.began, fault.ended) for fault in seen.faults] == [
        ("worker_freeze", "processes", 1, 4),
        ("redis_kill", "redis", 3, 4),
    ]


# --- what there is to do -------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1_000, 20_000, 1_000_000])
def test_the_difficult_jobs_are_few(jobs: int) -> None:
    """Their number grows with the root of the number of jobs, and is never more than a fortieth."""
    found = producer_mix.specials(jobs, 1)
    assert len(found) <= jobs * producer_mix.SPECIAL_SHARE * 1.3
    assert len(found) <= 6 * jobs**0.5
    assert found == producer_mix.specials(jobs, 1)
    assert found != producer_mix.specials(jobs, 2)


def test_every_kind_is_handled_and_served() -> None:
    """What producers enqueue is known to the application, fits its handler, and lies in a queue that a pool serves."""
    served = {name for pool in application.pools(2) for name in pool["queues"]}
    assert served == set(application.QUEUES)
    kinds = set()
    for wish in producer_mix.specials(20_000, 1):
        task = application.app.registry.find(wish.queue, wish.kind)
        assert task is not None
        assert task.arguments(**wish.arguments)
        assert wish.queue in served
        kinds.add(wish.kind)
    assert kinds >= set(application.app.registry.kinds()) - {"quick_bulk", "quick_async"}
