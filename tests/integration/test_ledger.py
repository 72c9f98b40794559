"""A worker's account with PostgreSQL where answers are lost: what is in doubt is asked for and never forgotten."""

import time
from collections.abc import Sequence
from uuid import UUID

import pytest

from pmqd.config import PostgresSettings
from pmqd.desk import Desk, Finished
from pmqd.errors import StoreUnavailable
from pmqd.job import Action, Claimed
from pmqd.ledger import Ledger
from pmqd.retry import release
from pmqd.slot import Slot
from pmqd.store import Best, Store
from tests.store_tools import QUEUE, WORKER, Bench, outcome


class Flaky(Store):
    """A store whose answers can be lost.

    Attributes:
        claims_unheard: claims are committed and their answers lost.
        claims_doubled: each job that was won is named twice.
        questions: how often a claim in doubt was asked for; the second time the connection is lost.
    """

    claims_unheard = True
    claims_doubled = False
    questions = 0

    def claim(
        self, wanted: Sequence[UUID] | Best, *, token: UUID, worker_id: str, instance_id: UUID
    ) -> list[Claimed]:
        """Claims, and may not tell."""
        claimed = super().claim(wanted, token=token, worker_id=worker_id, instance_id=instance_id)
        if self.claims_unheard:
            raise StoreUnavailable("the answer was lost")
        return claimed * 2 if self.claims_doubled else claimed

    def claimed(self, token: UUID) -> list[Claimed]:
        """Asks, but for the second time."""
        self.questions += 1
        if self.questions == 2:
            raise StoreUnavailable("the connection was lost")
        return super().claimed(token)


@pytest.fixture
def ledger(bench: Bench, slot: Slot) -> Ledger:
    """The worker's account."""
    store = Flaky(PostgresSettings(dsn=bench.dsn), "worker")
    bench.others.append(store)
    desk = Desk(4, slot, lambda: None)
    return Ledger(store, desk, slot, WORKER, lambda: bench.instance_id, lambda _: None)


def test_a_claim_found_again_survives_the_loss_of_the_next_question(bench: Bench, ledger: Ledger) -> None:
    """Two claims in doubt: the first is found, the connection is lost before the second is. Both come to the worker: a job
    forgotten here would run under a living worker for ever.
    """
    ids = bench.insert(2)
    for job_id in ids:
        with pytest.raises(StoreUnavailable):
            ledger.claim([job_id])
    found: list[UUID] = []
    deadline = time.monotonic() + 10
    while len(found) < 2:
        assert time.monotonic() < deadline, f"only {found} of {ids} were handed out"
        try:
            found += [job.id for job in ledger.read_back(time.monotonic()).claimed]
        except StoreUnavailable:
            continue
    assert sorted(found) == sorted(ids)


def test_what_never_started_is_not_noted_as_done(bench: Bench, ledger: Ledger, slot: Slot) -> None:
    """A job given back unstarted whose settle is owed is no part of a crash: nothing waits for it, and nothing is noted of it."""
    done, unstarted = bench.claim(bench.insert(2))
    ledger.owe([Finished(None, release(unstarted, WORKER), 0.0)])
    ledger.owe([Finished(None, outcome(done, Action.COMPLETE), 0.0, acknowledged=True)])
    assert slot.noted() == []
    assert ledger.owes


def test_a_steal_takes_along_what_is_owed(bench: Bench, ledger: Ledger) -> None:
    """The settles and the claim without hints are one commit; what was won is held, so that nobody takes it for lost."""
    done = bench.running()
    [waiting] = bench.insert()
    ledger.owe([Finished(None, outcome(done, Action.COMPLETE), 0.0)])
    answer = ledger.steal([QUEUE], 5, "bands")
    assert [status for _, status in answer.settled] == ["completed"]
    assert [job.id for job in answer.claimed] == [waiting]
    assert (
        bench.count("pmqd.job_logs l join pmqd.jobs j on l.created = j.started_at where j.id = %s", waiting)
        == 1
    )
    assert not ledger.owes


def test_a_job_that_a_claim_names_twice_is_handed_out_once(
    bench: Bench, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the statement answers: both would run, and both ends would bear the right token."""
    monkeypatch.setattr(Flaky, "claims_unheard", False)
    monkeypatch.setattr(Flaky, "claims_doubled", True)
    ids = bench.insert(2)
    assert [job.id for job in ledger.claim(ids).claimed] == ids
    assert "twice" in caplog.text


def test_a_steal_whose_answer_is_lost_is_found_again(bench: Bench, ledger: Ledger) -> None:
    """What it won comes to the worker, once."""
    [waiting] = bench.insert()
    with pytest.raises(StoreUnavailable):
        ledger.steal([QUEUE], 5, "bands")
    assert [job.id for job in ledger.read_back(time.monotonic()).claimed] == [waiting]
