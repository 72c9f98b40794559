"""A row that PostgreSQL refuses to have written, by a customer's trigger: it costs no other job, and nobody says it each second."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest

from pmqd import App, metrics
from pmqd.config import PostgresSettings
from pmqd.desk import Desk, Finished
from pmqd.errors import StoreUnavailable
from pmqd.job import Action, Claimed, Outcome
from pmqd.ledger import Ledger
from pmqd.slot import Slot
from pmqd.store import Fate, Store
from tests.store_tools import QUEUE, WORKER, Bench, open_bench, outcome
from tests.worker_family import family, open_bank

pytest_plugins = ["tests.role_fixtures"]


@pytest.fixture
def ledger(bench: Bench, slot: Slot) -> Ledger:
    """The worker's account."""
    store = Store(PostgresSettings(dsn=bench.dsn), "worker")
    bench.others.append(store)
    return make_ledger(bench, store, slot)


def make_ledger(bench: Bench, store: Store, slot: Slot, ask_for_seconds: float = 15.0) -> Ledger:
    """An account over a store."""
    desk = Desk(4, slot, lambda: None)
    return Ledger(
        store, desk, slot, WORKER, lambda: bench.instance_id, lambda _: None, ask_for_seconds=ask_for_seconds
    )


def refuse(bench: Bench, *ids: UUID, when: str = "true") -> None:
    """From now on nothing is to be written to these rows."""
    names = ", ".join(f"'{job_id}'" for job_id in ids)
    bench.connection.execute(
        "create or replace function pmqd.refuse() returns trigger language plpgsql as $$ begin"
        f" if new.id in ({names}) and {when} then raise exception 'the customer says no'; end if; return new; end $$"
    )
    bench.connection.execute(
        "create trigger refuse before update on pmqd.jobs for each row execute function pmqd.refuse()"
    )


def ended(ledger: Ledger, slot: Slot, *outcomes: Outcome) -> None:
    """These jobs have ended, noted as a runner notes them."""
    ledger.owe([Finished(None, each, time.monotonic(), places=(slot.notes.put(each),)) for each in outcomes])


def test_a_row_that_cannot_be_claimed_is_left_and_said_once(
    bench: Bench, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    """Two of fifty are refused: the others are claimed at once, the two are as they were; asked again, nothing is tried or said."""
    ids = bench.insert(50)
    bad = [ids[7], ids[31]]
    refuse(bench, *bad)
    claimed = ledger.claim(ids).claimed
    assert sorted(job.id for job in claimed) == sorted(set(ids) - set(bad))
    assert [bench.row(job_id)["status"] for job_id in bad] == ["queued", "queued"]
    assert ledger.claim(bad).claimed == []
    assert caplog.text.count("cannot be claimed") == 2


def test_a_row_that_cannot_be_claimed_does_not_stop_stealing(bench: Bench, ledger: Ledger) -> None:
    """Without Redis the best row is asked for first, each time: the one that is refused is passed over, all others are had."""
    ids = bench.insert(12)
    refuse(bench, ids[0])
    claimed: list[Claimed] = []
    for _ in range(4):
        claimed += ledger.steal([QUEUE], 5, "bands").claimed
    assert [job.id for job in claimed] == ids[1:]


def test_a_claim_refused_beside_settles_costs_neither(bench: Bench, ledger: Ledger, slot: Slot) -> None:
    """One transaction for both is refused: what is owed is settled, and what can be claimed is."""
    done = bench.running()
    ids = bench.insert(3)
    refuse(bench, ids[1])
    ended(ledger, slot, outcome(done, Action.COMPLETE))
    answer = ledger.claim(ids)
    assert [status for _, status in answer.settled] == ["completed"]
    assert [job.id for job in answer.claimed] == [ids[0], ids[2]]
    assert (ledger.owes, slot.noted()) == (False, [])


def test_an_end_that_cannot_be_written_waits_and_costs_no_other(
    bench: Bench, ledger: Ledger, slot: Slot, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither as it ended nor as failed: all others are settled, the worker goes on, the job stays claimed and noted, and is
    completed when its row can be written again.
    """
    jobs = bench.claim(bench.insert(5))
    refuse(bench, jobs[2].id)
    ended(ledger, slot, *(outcome(job, Action.COMPLETE) for job in jobs))
    assert len(ledger.settle().settled) == 4
    assert not ledger.owes
    assert [note.outcome.job_id for note in slot.noted()] == [jobs[2].id]
    ledger._stuck_at = 0.0
    assert ledger.read_back(time.monotonic()).settled == []
    assert caplog.text.count("cannot be written") == 1
    bench.connection.execute("drop trigger refuse on pmqd.jobs")
    ledger._stuck_at = 0.0
    [(settled, status)] = ledger.read_back(time.monotonic()).settled
    assert (settled.outcome.job_id, status, slot.noted()) == (jobs[2].id, "completed", [])
    assert bench.row(jobs[2].id)["status"] == "completed"


def test_a_result_that_cannot_be_written_fails_its_job(bench: Bench, ledger: Ledger, slot: Slot) -> None:
    """The trigger minds the completion, and not the failure: the job ends as failed, with the reason."""
    jobs = bench.claim(bench.insert(2))
    refuse(bench, jobs[0].id, when="new.status = 'completed'")
    ended(ledger, slot, *(outcome(job, Action.COMPLETE) for job in jobs))
    ledger.settle()
    assert [bench.row(job.id)["status"] for job in jobs] == ["failed", "completed"]
    assert "the customer says no" in bench.row(jobs[0].id)["last_error_message"]


def test_two_outcomes_of_one_job_count_once(bench: Bench, ledger: Ledger, slot: Slot, counters: Path) -> None:
    """The lease was lost, the job came back to the same worker: the older outcome is refused and not counted, the newer is."""
    [first] = bench.claim(bench.insert(1))
    back = "update pmqd.jobs set status = 'queued', ready = true, claim_token = null where id = %s"
    bench.connection.execute(back, [first.id])
    [second] = bench.claim([first.id])
    ended(ledger, slot, outcome(first, Action.COMPLETE), outcome(second, Action.COMPLETE))
    assert len(ledger.settle().settled) == 1
    assert [each["status"] for each in bench.logs(first.id)] == ["success"]
    page = metrics.render(counters).decode()
    assert 'pmqd_jobs_completed_total{kind="",queue="mail"} 1.0' in page
    assert "pmqd_stale_settles_total 1.0" in page
    assert (slot.noted(), ledger.owes) == ([], False)


def make_app() -> App:
    """One handler."""
    app = App()

    @app.task(queue="q")
    def plain() -> None:
        """Nothing."""

    return app


class Late(Store):
    """A store whose claims are not answered, and are committed when the test says so."""

    claims_lost = True
    waiting: Callable[[], list[Claimed]]

    def claim(self, ids: list[UUID], *, token: UUID, worker_id: str, instance_id: UUID) -> list[Claimed]:  # type: ignore[override]
        """Sends nothing yet."""
        if self.claims_lost:
            self.waiting = lambda: super(Late, self).claim(
                ids, token=token, worker_id=worker_id, instance_id=instance_id
            )
            raise StoreUnavailable("the answer was lost")
        return super().claim(ids, token=token, worker_id=worker_id, instance_id=instance_id)


def test_a_claim_that_commits_after_it_was_given_up_is_nobodys(bench: Bench, slot: Slot) -> None:
    """Asked for as long as it may appear, then forgotten: its token leaves the arena, which is how maintenance sees it."""
    store = Late(PostgresSettings(dsn=bench.dsn), "worker")
    bench.others.append(store)
    ledger = make_ledger(bench, store, slot, ask_for_seconds=0.2)
    [job_id] = bench.insert(1)
    with pytest.raises(StoreUnavailable):
        ledger.claim([job_id])
    assert len(slot.tokens()) == 1
    assert ledger.read_back(time.monotonic()).claimed == []
    assert ledger.read_back(time.monotonic() + 2).claimed == []
    assert slot.tokens() == []
    assert len(store.waiting()) == 1
    assert ledger.read_back(time.monotonic() + 4).claimed == []
    assert bench.row(job_id)["status"] == "running", "until maintenance has seen it for a few beats"


def test_a_worker_lives_with_a_row_that_cannot_be_claimed(
    database: str, redis_url: str, short_folder: Path
) -> None:
    """A real worker, the bad row at the head of its list and then at the head of the table: it works on, and says so once."""
    with (
        open_bank(database, redis_url) as bank,
        family(database, redis_url, make_app(), short_folder) as workers,
        open_bench(database) as bench,
    ):
        bad = bank.enqueue("plain", hint=False)
        refuse(bench, bad)
        slot = workers.start()
        bank.hint(bad)
        for _ in range(3):
            bank.wait(bank.enqueue("plain"), watch=workers.logged)
        bank.hint(bad)
        bank.wait(bank.enqueue("plain", hint=False), watch=workers.logged)
        assert bank.status(bad) == "queued"
        assert len(workers.records("cannot be claimed")) == 1
        bench.connection.execute("drop trigger refuse on pmqd.jobs")
        assert workers.stop(slot) == 0


def test_a_row_that_cannot_be_given_back_is_said_once(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """Each second another try, and one line in all; its neighbours are given back at once, the claim keeps the rest alone."""
    jobs = bench.claim(bench.insert(3))
    refuse(bench, jobs[1].id)
    with caplog.at_level(logging.ERROR):
        found = [bench.store.rescue(WORKER, fates={}, default=Fate.UNSTARTED, cause="dead") for _ in range(4)]
    assert [len(each) for each in found] == [2, 0, 0, 0]
    assert caplog.text.count("cannot be given back") == 1
    assert bench.connection.execute("select ids from pmqd.claims").fetchall() == [{"ids": [jobs[1].id]}]
