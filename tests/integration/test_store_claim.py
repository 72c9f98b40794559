import threading
import time
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import psycopg
import pytest

from pmqd.job import Action
from pmqd.store import LostLead, Room, Store
from tests.fix_servers import WaitUntil
from tests.store_tools import QUEUE, WORKER, Bench, best, outcome

EVERY = Room(QUEUE, 1, 32767, 100)


def later(seconds: float) -> datetime:
    """So many seconds from now."""
    return datetime.now(UTC) + timedelta(seconds=seconds)


def test_a_claim_charges_the_attempt_and_returns_the_row(bench: Bench) -> None:
    """A claimed row is running under the token, charged, and returned whole with its payload as JSON text."""
    [job_id] = bench.insert(payload='{"to": "ä"}', kind="send", tags=["x", "y"], priority=7)
    token = uuid4()
    [job] = bench.claim([job_id], token)
    row = bench.row(job_id)
    assert (row["status"], row["ready"], row["attempt_count"], row["claim_token"], row["worker_id"]) == (
        "running",
        False,
        1,
        token,
        WORKER,
    )
    assert (job.id, job.kind, job.priority, job.payload, tuple(job.tags)) == (
        job_id,
        "send",
        7,
        '{"to": "ä"}',
        ("x", "y"),
    )
    assert (job.attempt_count, job.max_attempts, job.token, job.alone) == (1, 3, token, False)
    assert abs(job.claimed_at - time.time()) < 60
    assert bench.count("pmqd.claims where token = %s and ids = array[%s::uuid]", token, job_id) == 1


def test_a_claim_on_a_new_connection_reads_as_before(bench: Bench) -> None:
    """What is kept for the statements of one connection goes with it."""
    for payload in ('{"a": 1}', '{"b": 2}'):
        [job_id] = bench.insert(payload=payload)
        [job] = bench.claim([job_id])
        assert (job.id, job.payload) == (job_id, payload)
        bench.store.reset()


def test_a_claim_wins_only_what_is_claimable(bench: Bench) -> None:
    """Unknown, future, running, ended and paused jobs are not won, nor reported; nothing is written for them."""
    [good] = bench.insert()
    [future] = bench.insert(run_at=later(60))
    taken = bench.running()
    done = bench.running()
    bench.store.settle([outcome(done, Action.COMPLETE)], [])
    bench.store.sync_queues({}, ["other"])
    bench.store.pause("other")
    [paused] = bench.insert(queue_name="other")
    won = bench.claim([paused, uuid4(), future, taken.id, done.id, good])
    assert [job.id for job in won] == [good]
    before = bench.count("pmqd.claims")
    assert bench.claim([future, uuid4()]) == []
    assert bench.count("pmqd.claims") == before
    bench.store.resume("other")
    assert [job.id for job in bench.claim([paused])] == [paused]


def test_a_claim_returns_jobs_in_order(bench: Bench) -> None:
    """Whatever the order of the hints: (priority, run_at, id)."""
    [low] = bench.insert(priority=200)
    first, second = bench.insert(2, priority=10)
    [old] = bench.insert(priority=10, run_at=later(-100))
    won = bench.claim([low, second, first, old])
    assert [job.id for job in won] == [old, first, second, low]


@pytest.mark.parametrize("age", [25, 26])
def test_a_claim_needs_five_ticks_of_lease(bench: Bench, age: int) -> None:
    """Claim and steal refuse an instance whose lease has less than five ticks left, or that has none."""
    [one, two] = bench.insert(2)
    bench.set_tick(age)
    won = bench.claim([one]) + bench.steal()
    assert [job.id for job in won] == ([one, two] if age == 25 else [])
    stranger = uuid4()
    assert not bench.store.claim([one, two], token=uuid4(), worker_id=WORKER, instance_id=stranger)
    assert not bench.store.claim(best(9), token=uuid4(), worker_id=WORKER, instance_id=stranger)


def test_two_owners_race_and_each_job_has_one(bench: Bench) -> None:
    """Eight connections claim and steal the same 400 jobs at once: each job is won exactly once, charged once."""
    ids = bench.insert(400)
    stores = [bench.another() for _ in range(8)]
    won: list[list[UUID]] = [[] for _ in stores]
    gate = threading.Barrier(len(stores))

    def take(number: int) -> None:
        store, worker = stores[number], f"w{number}"
        gate.wait()
        for at in range(0, 400, 50):
            mine = ids[at : at + 50] if number % 2 else ids[at : at + 50][::-1]
            if number < 4:
                jobs = store.claim(mine, token=uuid4(), worker_id=worker, instance_id=bench.instance_id)
            else:
                jobs = store.claim(best(50), token=uuid4(), worker_id=worker, instance_id=bench.instance_id)
            won[number] += [job.id for job in jobs]

    threads = [threading.Thread(target=take, args=[number]) for number in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    everything = [job_id for each in won for job_id in each]
    assert len(everything) == len(set(everything)) == 400
    assert bench.count("pmqd.jobs where status = 'running' and attempt_count = 1") == 400


def test_a_claim_waits_for_nobody_who_stole_and_rolled_back(bench: Bench) -> None:
    """A job whose other claim is rolled back is won: the row decides, after the other transaction."""
    [job_id] = bench.insert()
    with psycopg.connect(bench.dsn) as other:
        other.execute("select from pmqd.jobs where id = %s for update", [job_id])
        claimed = []
        thread = threading.Thread(target=lambda: claimed.extend(bench.claim([job_id])))
        thread.start()
        other.rollback()
        thread.join()
    assert [job.id for job in claimed] == [job_id]


def test_steal_goes_by_bands_or_by_queues(bench: Bench) -> None:
    """order="bands": all high first, then normal, then low, queues in their order; order="queues": one queue after the other."""
    names = {}
    for queue in ("a", "b"):
        for band, priority in (("low", 200), ("high", 5), ("normal", 100)):
            [job_id] = bench.insert(queue_name=queue, priority=priority)
            names[job_id] = f"{queue}:{band}"
    by_bands = bench.steal(6, queues=["b", "a"], order="bands")
    assert [names[job.id] for job in by_bands] == [
        "b:high",
        "a:high",
        "b:normal",
        "a:normal",
        "b:low",
        "a:low",
    ]
    bench.store.settle([outcome(job, Action.RELEASE) for job in by_bands], [by_bands[0].token])
    by_queues = bench.steal(6, queues=["b", "a"], order="queues")
    assert [names[job.id] for job in by_queues] == [
        "b:high",
        "b:normal",
        "b:low",
        "a:high",
        "a:normal",
        "a:low",
    ]


def test_steal_takes_marked_rows_and_skips_locked_and_paused_ones(bench: Bench) -> None:
    """A marked row is as good as a queued one; what somebody else is about to take is passed over."""
    ids = bench.insert(3)
    term = bench.store.lead()
    assert term is not None
    assert len(bench.store.mark(term, [Room(QUEUE, 51, 150, 1)], full=False)) == 1
    with psycopg.connect(bench.dsn) as other:
        other.execute("select from pmqd.jobs where id = %s for update", [ids[1]])
        assert [job.id for job in bench.steal(9)] == [ids[0], ids[2]]
    bench.store.pause(QUEUE)
    assert bench.steal(9) == []


def test_steal_takes_along_those_whose_hints_the_worker_has(bench: Bench) -> None:
    """Marked rows of its queues, beside as many others as it may take, and before them; what cannot be claimed is left as it is."""
    first, second, third, fourth = bench.insert(4)
    [urgent] = bench.insert(priority=1)
    [other] = bench.insert(queue_name="other")
    [later] = bench.insert(run_at=datetime.now(UTC) + timedelta(hours=1))
    mark(bench, second, third, other, later)
    hinted = [third, uuid4(), fourth, other, later, second]
    won = bench.steal(2, marked=False, hinted=hinted)
    assert [job.id for job in won] == [second, third, urgent, first]
    mark(bench, fourth)
    bench.store.pause(QUEUE)
    assert bench.steal(2, marked=False, hinted=[fourth]) == []
    assert {bench.row(job_id)["status"] for job_id in (fourth, other, later)} == {"migrated_to_redis"}


def test_a_job_is_won_once_though_it_is_wanted_by_its_hint_and_as_one_of_the_best(bench: Bench) -> None:
    """Its row came twice, and it ran twice, where Redis went away between the pop and the claim."""
    ids = bench.insert(3)
    mark(bench, *ids[:2])
    won = bench.steal(5, marked=True, hinted=[ids[0], ids[0]])
    assert [job.id for job in won] == [ids[0], ids[2]]
    assert [job.id for job in bench.steal(5, marked=True)] == [ids[1]]


def mark(bench: Bench, *ids: UUID) -> None:
    """As the migrator does."""
    bench.connection.execute(
        "update pmqd.jobs set status = 'migrated_to_redis' where id = any(%s)", [list(ids)]
    )


def test_mark_takes_due_rows_in_order_up_to_each_room(bench: Bench) -> None:
    """Rooms do not share space; rows that are not due, not queued or of a paused queue are left."""
    term = bench.store.lead()
    assert term is not None
    normal = bench.insert(3)
    high = bench.insert(3, priority=10)
    [old] = bench.insert(run_at=later(-5))
    bench.insert(run_at=later(60))
    bench.insert(queue_name="paused")
    bench.store.sync_queues({}, ["paused"])
    bench.store.pause("paused")
    rooms = [Room(QUEUE, 1, 50, 2), Room(QUEUE, 51, 150, 3), Room("paused", 51, 150, 3)]
    marked = bench.store.mark(term, rooms, full=False)
    assert [each.id for each in marked] == [*high[:2], old, *normal[:2]]
    assert {(each.item, each.kind) for each in marked} == {(None, None)}
    assert bench.store.marked(QUEUE, 51, 150) == [old, *normal[:2]]
    assert bench.store.marked(QUEUE, 51, 150, 1) == [old]
    assert [each.id for each in bench.store.mark(term, rooms, full=False)] == [high[2], normal[2]]


def test_mark_gives_the_missions_item(bench: Bench) -> None:
    """full=True: the JSON of the mission, `id` first."""
    term = bench.store.lead()
    assert term is not None
    [job_id] = bench.insert(payload='{"a": [1]}', kind="send")
    [marked] = bench.store.mark(term, [EVERY], full=True)
    assert marked.item is not None
    assert marked.kind == "send"
    assert marked.item.startswith(f'{{"id" : "{job_id}"'.encode())
    for name in ("queue_name", "priority", "payload", "created_at", "attempt_count", "max_attempts"):
        assert f'"{name}" : '.encode() in marked.item


def test_a_mark_needs_the_term_of_the_day(bench: Bench, wait_until: WaitUntil) -> None:
    """Whoever was followed by another leader marks nothing, names no epoch, and is told so."""
    bench.insert()
    first = bench.store.lead()
    assert first is not None
    other = bench.another()
    assert other.lead() is None, "the lock is held"
    bench.store.reset()
    second = wait_until(other.lead, what="the backend of the former leader has ended")
    assert second is not None
    assert second > first
    with pytest.raises(LostLead):
        bench.store.mark(first, [EVERY], full=False)
    with pytest.raises(LostLead):
        bench.store.new_redis_epoch(first)
    epoch = other.redis_epoch()
    assert other.new_redis_epoch(second) == bench.store.redis_epoch() != epoch
    assert len(other.mark(second, [EVERY], full=False)) == 1


def test_a_leader_without_signs_of_life_is_succeeded_though_it_holds_the_lock(bench: Bench) -> None:
    """Five ticks without a word are allowed; with the sixth another leads without the lock, and every write of the former is refused.
    Once the former's session has ended, the living leader has the lock.
    """
    ghost = bench.store.lead()
    assert ghost is not None
    heir, third = bench.another(), bench.another()
    bench.set_tick(5)
    assert heir.lead() is None
    bench.store.keep_lead(ghost)
    bench.set_tick(10)
    assert heir.lead() is None, "it gave a sign of life at tick 5"
    bench.set_tick(11)
    term = heir.lead()
    assert term == ghost + 1
    assert third.lead() is None, "only one succeeds"
    bench.insert()
    bench.store.stay_awake(ghost, 60)
    assert bench.count("pmqd.leader where awake_until < now()") == 1, "the ghost silences no insert"
    for write in (
        lambda: bench.store.keep_lead(ghost),
        lambda: bench.store.mark(ghost, [EVERY], full=False),
        lambda: bench.store.new_redis_epoch(ghost),
    ):
        with pytest.raises(LostLead):
            write()
    assert len(heir.mark(term, [EVERY], full=False)) == 1
    heir.keep_lead(term)
    bench.store.reset()
    wait_until_locked(bench, heir, term)
    assert third.lead() is None


def wait_until_locked(bench: Bench, leader: Store, term: int) -> None:
    """Keep the lead until its session holds the lock."""
    deadline = time.monotonic() + 5
    held = f"pg_locks where locktype = 'advisory' and granted and pid = {leader.connection.info.backend_pid}"
    while bench.count(held) != 1:
        assert time.monotonic() < deadline, "the lock was not taken"
        leader.keep_lead(term)


def test_only_the_mark_is_not_durable(bench: Bench) -> None:
    """The mark's setting ends with its transaction: the next commit of the same session waits for the disk."""
    term = bench.store.lead()
    bench.insert()
    connection = bench.store.connection
    with connection.transaction():
        connection.execute("select pmqd.mark_ids(%s, '{mail}', '{1}', '{32767}', '{9}', 9)", [term])
        inside = connection.execute("show synchronous_commit").fetchone()
        planner = connection.execute("show enable_bitmapscan").fetchone()
    after = connection.execute("show synchronous_commit").fetchone()
    assert (inside, planner, after) == (("off",), ("on",), ("on",))


def test_inserts_wake_only_a_sleeping_migrator(bench: Bench) -> None:
    """While awake_until lies ahead nobody notifies; asleep, every way of inserting does, and so does a release."""
    store = bench.store
    term = store.lead()
    assert term is not None
    store.listen()
    store.stay_awake(term, 60)
    bench.insert()
    assert store.notifications(0.2) == (0, 0)
    store.fall_asleep(term)
    bench.insert()
    assert store.notifications(5) == (1, 0)
    bench.connection.execute("select pmqd.enqueue('mail', '{}')")
    assert store.notifications(5) == (1, 0)
    with (
        bench.connection.cursor() as cursor,
        cursor.copy("copy pmqd.jobs (queue_name, payload) from stdin") as copy,
    ):
        copy.write("mail\t{}\n")
    assert store.notifications(5) == (1, 0)
    [job] = bench.another().claim(
        bench.insert(), token=uuid4(), worker_id=WORKER, instance_id=bench.instance_id
    )
    assert store.notifications(5) == (1, 0)
    bench.another().settle([outcome(job, Action.RELEASE)], [job.token])
    assert store.notifications(5) == (1, 0)
    store.ping_self()
    assert store.notifications(5) == (0, 1)
    assert store.notifications(0) == (0, 0)


def test_ids_that_are_no_uuid7_are_served_too(bench: Bench) -> None:
    """A job with a random id lies in the default partition and is marked, claimed and settled beside the others."""
    mixed = [*bench.insert(2), *bench.insert(1, id=uuid4()), *bench.insert(1, id=UUID(int=5))]
    term = bench.store.lead()
    assert term is not None
    marked = [each.id for each in bench.store.mark(term, [EVERY], full=False)]
    assert sorted(marked) == sorted(mixed)
    assert bench.count("pmqd.jobs_default") == 2
    won = bench.claim(marked)
    assert len(won) == 4
    assert len(bench.store.settle([outcome(job, Action.COMPLETE) for job in won], [won[0].token])) == 4


def test_what_a_lost_claim_won_is_found_by_its_token(bench: Bench) -> None:
    """`claimed` gives the rows that still run under a token, as the claim would have."""
    token = uuid4()
    won = bench.claim(bench.insert(3), token)
    bench.store.settle([outcome(won[0], Action.COMPLETE)], [])
    found = bench.store.claimed(token)
    assert [job.id for job in found] == [job.id for job in won[1:]]
    assert found[0].payload == won[1].payload
    assert bench.store.claimed(uuid4()) == []
