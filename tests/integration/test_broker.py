"""The broker against a real server: hints in and out, the epoch, and every way in which Redis can fail it."""

import select
import time
from collections.abc import Iterator
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
import redis
from redis.connection import Connection

from pmqd import live
from pmqd.broker import Broker, EpochMismatch
from pmqd.config import RedisSettings
from pmqd.embedded import RedisServer
from pmqd.errors import BrokerUnavailable, EnqueueError
from pmqd.hints import Hint, hinted_id
from pmqd.job import Action, Job, JobPort, Outcome
from tests.fix_proxy import MakeProxy
from tests.fix_servers import WaitUntil
from tests.jobs import NOW, a_claim

EPOCH = UUID(int=99)


def readable(broker: Broker, seconds: float) -> bool:
    """Whether the answer to a pop comes in time; not by `select`, which knows the first 1,024 descriptors only."""
    poller = select.poll()
    poller.register(broker.pop_fileno(), select.POLLIN)
    return bool(poller.poll(seconds * 1000))


OTHER = UUID(int=98)


@pytest.fixture
def raw(redis_url: str) -> Iterator[Any]:
    """A client that looks."""
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def broker(redis_url: str) -> Iterator[Broker]:
    """A broker on an empty server that has the epoch."""
    made = Broker(RedisSettings(url=redis_url), "test")
    made.set_epoch(EPOCH)
    yield made
    made.close()


def ids(count: int) -> list[UUID]:
    """Ids in order."""
    return [UUID(int=n) for n in range(1, count + 1)]


def members(raw: Any, key: str) -> list[str]:
    """The ids in a list, next to be popped first."""
    found: Any = raw.lrange(key, 0, -1)
    return [member.decode() for member in reversed(found)]


def pop(broker: Broker, keys: list[str], n: int = 10, seconds: float = 1.0) -> list[Hint]:
    """A whole pop, waited for as a worker does."""
    broker.pop_start(keys, n, seconds)
    assert readable(broker, seconds + 1)
    assert broker.pop_ready()
    return broker.pop_finish()


def test_keys_are_those_of_the_contract(redis_url: str) -> None:
    """`queue:NAME:high`, `queue:NAME`, `queue:NAME:low`, the prefix first."""
    broker = Broker(RedisSettings(url=redis_url, prefix="{pmqd}:"), "test")
    keys = [broker.queue_key("email-sending", band) for band in ("high", "normal", "low")]
    assert keys == [
        "{pmqd}:queue:email-sending:high",
        "{pmqd}:queue:email-sending",
        "{pmqd}:queue:email-sending:low",
    ]


def test_hostile_names_become_no_key(broker: Broker) -> None:
    """A name that no queue may have, or an unknown band, is an error before Redis is asked."""
    for name in ("a b", "x:high", "{x}", "a\n"):
        with pytest.raises(EnqueueError, match="queue name"):
            broker.queue_key(name, "high")
    with pytest.raises(ValueError, match="band 'middle'"):
        broker.queue_key("a", "middle")


def test_what_is_pushed_is_popped_in_order(broker: Broker) -> None:
    """First pushed, first popped; several lists in one call, with their lengths."""
    high, normal = broker.queue_key("mail", "high"), broker.queue_key("mail", "normal")
    assert broker.push(EPOCH, [(normal, ids(3)), (high, [str(UUID(int=7))])]) == {normal: 3, high: 1}
    assert broker.lengths([high, normal, "queue:none"]) == {high: 1, normal: 3, "queue:none": 0}
    assert [hint.id for hint in pop(broker, [high, normal])] == [UUID(int=7)]
    assert [hint.id for hint in pop(broker, [high, normal], 2)] == ids(2)
    assert pop(broker, [high, normal]) == [Hint(normal, UUID(int=3), str(UUID(int=3)).encode())]


def test_a_list_longer_than_luas_stack(broker: Broker, raw: Any) -> None:
    """20,000 hints in one push arrive in order."""
    key = broker.queue_key("mail", "normal")
    assert broker.push(EPOCH, [(key, ids(20_000))]) == {key: 20_000}
    assert members(raw, key) == [str(made) for made in ids(20_000)]


def test_ids_in_one_text_are_pushed_as_they_would_be_one_by_one(broker: Broker, raw: Any) -> None:
    """More than Lua's stack holds, a thousand to the id, and one: all arrive in order, with the lists' lengths."""
    sizes = {broker.queue_key("mail", "normal"): 20_001, broker.queue_key("mail", "low"): 1000, "queue:x": 1}
    texts = {key: " ".join(map(str, ids(size))) for key, size in sizes.items()}
    assert broker.push_ids(EPOCH, list(texts.items())) == sizes
    for key, size in sizes.items():
        assert members(raw, key) == [str(made) for made in ids(size)]


def test_large_items_are_pushed_in_parts(broker: Broker, raw: Any) -> None:
    """Full items of 200 KiB each do not become one call of ten megabytes, and keep their order."""
    key, other = broker.queue_key("mail", "normal"), broker.queue_key("other", "normal")
    items = [b'{"id": "%s", "payload": "%s"}' % (str(made).encode(), b"x" * 200_000) for made in ids(50)]
    assert broker.push(EPOCH, [(key, items), (other, [b"x"])]) == {key: 50, other: 1}
    assert [hint.id for hint in pop(broker, [key], 100)] == ids(50)


@pytest.mark.parametrize("epoch_in_redis", [None, OTHER])
def test_the_wrong_epoch_lets_nothing_in(broker: Broker, raw: Any, epoch_in_redis: UUID | None) -> None:
    """A Redis that lost its data, or belongs to another leader, takes neither a push nor a reoffer."""
    raw.flushall()
    if epoch_in_redis:
        broker.set_epoch(epoch_in_redis)
    key = broker.queue_key("mail", "normal")
    with pytest.raises(EpochMismatch):
        broker.push(EPOCH, [(key, ids(1))])
    with pytest.raises(EpochMismatch):
        broker.push_ids(EPOCH, [(key, str(UUID(int=1)))])
    with pytest.raises(EpochMismatch):
        broker.reoffer(EPOCH, key, ids(1))
    assert raw.llen(key) == 0


def test_server_life_changes_with_restart_and_flush(own_redis: RedisServer) -> None:
    """A new server has another run id, an empty one no epoch; garbage is no epoch either."""
    broker = Broker(RedisSettings(url=own_redis.url), "test")
    broker.set_epoch(EPOCH)
    run_id, epoch = broker.server_life()
    assert len(run_id) == 40
    assert epoch == EPOCH
    own_redis.restart()
    broker.reset()
    again, epoch = broker.server_life()
    assert again != run_id
    assert epoch is None
    with redis.Redis.from_url(own_redis.url) as raw:
        raw.set("pmqd:epoch", "\xff not a uuid")
    assert broker.server_life()[1] is None
    broker.close()


def test_which_server_it_is_is_asked_once_per_connection(broker: Broker, raw: Any) -> None:
    """None outlives its server; a new connection asks again. Whether a push would be taken is tried each time."""
    broker.set_epoch(EPOCH)
    first = broker.server_life()
    raw.config_resetstat()
    assert [broker.server_life() for _ in range(3)] == [first] * 3
    calls = {name: each["calls"] for name, each in raw.info("commandstats").items()}
    assert (calls.get("cmdstat_lpushx"), calls.get("cmdstat_get"), calls.get("cmdstat_info")) == (3, 3, None)
    for each in raw.client_list():
        if each["name"] == "pmqd:test":
            raw.client_kill_filter(_id=each["id"])
    assert broker.server_life() == first
    assert raw.info("commandstats")["cmdstat_info"]["calls"] == 2  # one of them was ours
    assert raw.exists("pmqd:probe") == 0


def test_reoffer_pushes_only_what_is_missing_and_first(broker: Broker, raw: Any) -> None:
    """Missing rows go to the pop end in their order; ids and JSON items that are there are found, in any spelling."""
    key = broker.queue_key("mail", "normal")
    made = ids(6)
    mission = b'{"id" : "%s", "payload": {"id": "x"}}' % str(made[3]).encode()
    foreign = b'{"payload": {"id": "%s"}, "id": "%s"}' % (
        str(made[1]).encode(),
        str(made[4]).upper().encode(),
    )
    broker.push(EPOCH, [(key, [made[2], mission, foreign, b"[garbage"])])
    assert broker.reoffer(EPOCH, key, made) == 3
    assert members(raw, key)[:4] == [str(made[n]) for n in (0, 1, 5, 2)]
    assert broker.reoffer(EPOCH, key, made) == 0


def test_reoffer_is_bounded(broker: Broker) -> None:
    """However many ids are given, 2,000 are offered, and repeating it adds none."""
    key = broker.queue_key("mail", "normal")
    assert broker.reoffer(EPOCH, key, ids(5000)) == 2000
    assert broker.reoffer(EPOCH, key, ids(5000)) == 0
    assert broker.reoffer(EPOCH, key, []) == 0


def test_what_is_given_back_is_next(broker: Broker, raw: Any) -> None:
    """Hints of several lists that are given back stand as if they had never been popped."""
    high, normal = broker.queue_key("mail", "high"), broker.queue_key("mail", "normal")
    broker.push(EPOCH, [(high, ids(3)), (normal, ids(2))])
    popped = pop(broker, [high], 2) + pop(broker, [normal], 1)
    broker.give_back([(hint.key, hint.member) for hint in popped])
    assert members(raw, high) == [str(made) for made in ids(3)]
    assert members(raw, normal) == [str(made) for made in ids(2)]
    broker.give_back([])


BAD = [
    b"",
    b"x",
    b"x" * 36,
    b"\xff" * 36,
    b"[1]",
    b"{",
    b"null",
    b'{"id": 7}',
    b'{"id": "x"}',
    b'{"no": 1}',
    b'{"id": ["a"]}',
    b"\xff\xfe",
    b'"' + b"y" * 2_000_000 + b'"',
]


@pytest.mark.parametrize("member", BAD, ids=range(len(BAD)))
def test_members_that_are_no_hints_name_no_job(member: bytes) -> None:
    """Nothing that may stand in a list raises; what names no job is none."""
    assert hinted_id(member) is None


def test_bad_members_are_dropped_and_counted(broker: Broker, raw: Any) -> None:
    """A foreign producer's garbage does not hide the hints around it, and `LPUSH` of an id or JSON is served."""
    key = broker.queue_key("mail", "high")
    good = uuid4()
    for member in (str(good), *BAD, b'{"x": 1, "id": "%s"}' % str(good).encode()):
        raw.lpush(key, member)
    popped = pop(broker, [key], 100)
    assert [hint.id for hint in popped] == [good, good]
    assert broker.dropped == len(BAD)


def test_a_pop_waits_for_the_first_hint(broker: Broker, raw: Any) -> None:
    """Before a hint comes nothing is readable; when it comes, it is there at once."""
    key = broker.queue_key("mail", "normal")
    broker.pop_start([key], 5, 5.0)
    assert not broker.pop_ready()
    raw.lpush(key, str(UUID(int=1)))
    started = time.monotonic()
    assert readable(broker, 2)
    assert time.monotonic() - started < 0.5
    assert broker.popping
    assert [hint.id for hint in broker.pop_finish()] == ids(1)


def test_a_pop_without_a_hint_ends_empty(broker: Broker) -> None:
    """When the time is up the answer is no hint, and the next pop works."""
    key = broker.queue_key("mail", "normal")
    assert pop(broker, [key], seconds=0.05) == []
    assert pop(broker, [key], seconds=0) == []
    broker.push(EPOCH, [(key, ids(1))])
    assert len(pop(broker, [key])) == 1


def test_a_cancelled_pop_loses_nothing(broker: Broker, raw: Any) -> None:
    """Cancelled while it waits, a pop leaves later hints alone; cancelled after it got some, it hands them over."""
    key = broker.queue_key("mail", "normal")
    broker.pop_start([key], 5, 30.0)
    started = time.monotonic()
    assert broker.pop_cancel() == []
    assert time.monotonic() - started < 1
    broker.push(EPOCH, [(key, ids(2))])
    assert raw.llen(key) == 2
    broker.pop_start([key], 1, 30.0)
    assert [hint.id for hint in broker.pop_cancel()] == ids(1)
    assert broker.pop_cancel() == []


def test_close_gives_back_what_was_popped(redis_url: str, raw: Any, wait_until: WaitUntil) -> None:
    """A worker that ends while a pop has been answered leaves the list as it was."""
    broker = Broker(RedisSettings(url=redis_url), "test")
    broker.set_epoch(EPOCH)
    key = broker.queue_key("mail", "normal")
    broker.push(EPOCH, [(key, ids(5))])
    broker.pop_start([key], 3, 1.0)
    wait_until(lambda: raw.llen(key) == 2, what="three hints popped")
    broker.close()
    assert members(raw, key) == [str(made) for made in ids(5)]


def test_an_idle_pop_connection_that_the_server_ended_is_replaced(broker: Broker, raw: Any) -> None:
    """A connection that was closed while the worker was busy costs no pop."""
    key = broker.queue_key("mail", "normal")
    pop(broker, [key], seconds=0.05)
    raw.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    broker.push(EPOCH, [(key, ids(1))])
    assert len(pop(broker, [key])) == 1


def test_a_server_killed_under_a_pop(own_redis: RedisServer) -> None:
    """The end of the server is readable at once, an error, and over when the server is back."""
    broker = Broker(RedisSettings(url=own_redis.url), "test")
    key = broker.queue_key("mail", "normal")
    broker.pop_start([key], 5, 30.0)
    own_redis.kill()
    assert readable(broker, 2)
    with pytest.raises(BrokerUnavailable):
        broker.pop_finish()
    assert not broker.popping
    with pytest.raises(BrokerUnavailable):
        broker.pop_start([key], 5, 1.0)
    with pytest.raises(BrokerUnavailable):
        broker.push(EPOCH, [(key, ids(1))])
    own_redis.start()
    broker.set_epoch(EPOCH)
    broker.push(EPOCH, [(key, ids(1))])
    assert len(pop(broker, [key])) == 1
    broker.close()


def test_a_silent_wire_is_an_error_in_time(
    redis_server: RedisServer, broker: Broker, proxy: MakeProxy
) -> None:
    """A reply that does not come is given up after the timeout; coming late, it is not read as another command's."""
    wire = proxy(redis_server)
    behind = Broker(RedisSettings(url=wire.url), "test")
    assert behind.server_life()[1] == EPOCH
    wire.hold()
    started = time.monotonic()
    with pytest.raises(BrokerUnavailable, match="Timeout"):
        behind.status_of(UUID(int=1))
    assert 1.0 < time.monotonic() - started < 2.5
    wire.heal()
    assert behind.server_life()[1] == EPOCH
    assert behind.status_of(UUID(int=1)) == {}
    behind.close()


def test_a_pop_over_a_silent_wire(
    redis_server: RedisServer, broker: Broker, proxy: MakeProxy, wait_until: WaitUntil
) -> None:
    """A worker whose wire goes silent under a pop can give it up and close in time; a reoffer finds what is lost."""
    wire = proxy(redis_server)
    behind = Broker(RedisSettings(url=wire.url), "test")
    key = behind.queue_key("mail", "normal")
    behind.pop_start([key], 5, 1.0)
    wait_until(lambda: broker.info()["blocked_clients"] == 1, what="the pop at the server")
    wire.hold()
    broker.push(EPOCH, [(key, ids(2))])
    assert not behind.pop_ready()
    started = time.monotonic()
    behind.close()
    assert time.monotonic() - started < 4
    wire.heal()
    # Until the server has seen the end of that connection, it would hand what is offered to the dead.
    wait_until(lambda: broker.info()["blocked_clients"] == 0, what="the end of the pop at the server")
    broker.reoffer(EPOCH, key, ids(2))
    assert [hint.id for hint in pop(broker, [key])][:2] == ids(2)


def test_an_overdue_pop_is_told_and_given_up(broker: Broker, wait_until: WaitUntil) -> None:
    """The caller learns from the clock that an answer is overdue, and can go on after giving it up."""
    key = broker.queue_key("mail", "normal")
    broker.pop_start([key], 1, 30.0)
    now = time.monotonic()
    assert not broker.pop_overdue(now + 20)
    assert broker.pop_overdue(now + 40)
    broker.pop_abort()
    assert not broker.pop_overdue(now + 99)
    # Until the server has seen the end of the connection it may still pop for it: a reoffer would find that hint.
    wait_until(lambda: broker.info()["blocked_clients"] == 0, what="the given up pop ended")
    broker.push(EPOCH, [(key, ids(1))])
    assert len(pop(broker, [key])) == 1


def test_memory_and_rights_are_named(own_redis: RedisServer) -> None:
    """Out of memory, a replica and a missing right are errors that say what to do; a password is in none."""
    broker = Broker(RedisSettings(url=own_redis.url), "test")
    broker.set_epoch(EPOCH)
    with redis.Redis.from_url(own_redis.url) as raw:
        raw.config_set("maxmemory", "1")
        with pytest.raises(BrokerUnavailable, match="maxmemory-policy should be noeviction"):
            broker.push(EPOCH, [("queue:x", ids(1))])
        raw.config_set("maxmemory", "0")
        raw.replicaof("127.0.0.1", "1")
        with pytest.raises(BrokerUnavailable, match="must lead to the primary"):
            broker.set_epoch(EPOCH)
        raw.replicaof("NO", "ONE")
        raw.config_set("requirepass", "hush-hush")
    broker.reset()
    with pytest.raises(BrokerUnavailable, match="the right user and password"):
        broker.ping()
    host = own_redis.url.partition("//")[2]
    wrong = Broker(RedisSettings(url=f"redis://:wrong-pass@{host}"), "test")
    with pytest.raises(BrokerUnavailable) as caught:
        wrong.ping()
    assert "wrong-pass" not in str(caught.value)
    Broker(RedisSettings(url=f"redis://:hush-hush@{host}"), "test").ping()


def test_scripts_survive_their_loss(broker: Broker, raw: Any) -> None:
    """After SCRIPT FLUSH, or a restart, a call loads its script again."""
    key = broker.queue_key("mail", "normal")
    broker.push(EPOCH, [(key, ids(1))])
    raw.script_flush()
    assert broker.push(EPOCH, [(key, ids(1))]) == {key: 2}


def test_a_call_that_was_interrupted_leaves_no_answer_to_the_next(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A producer's thread may be interrupted after the question: the next call reads its own answer."""
    one, two = broker.queue_key("mail", "normal"), broker.queue_key("bulk", "normal")
    broker.push(EPOCH, [(one, ids(7))])
    with monkeypatch.context() as patched:
        patched.setattr(Connection, "read_response", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            broker.lengths([one])
    assert broker.lengths([two, one]) == {two: 0, one: 7}


def _interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_scripts_go_on_after_the_server_has_ended_their_connection(broker: Broker, raw: Any) -> None:
    """An idle connection that the server has closed is made anew, without an error."""
    key = broker.queue_key("mail", "normal")
    broker.push(EPOCH, [(key, ids(1))])
    raw.client_kill_filter(skipme=True, _type="normal")
    assert broker.push(EPOCH, [(key, ids(1))]) == {key: 2}


def test_a_key_of_another_type_is_an_error(broker: Broker, raw: Any) -> None:
    """Somebody's own key in the way is told, not hidden."""
    raw.set("queue:mail", "x")
    with pytest.raises(BrokerUnavailable, match="WRONGTYPE"):
        broker.lengths(["queue:mail"])


def test_a_producers_own_hints(broker: Broker, raw: Any) -> None:
    """They go to the high list, up to its limit, and nowhere while Redis has no epoch."""
    key = broker.queue_key("mail", "high")
    assert broker.hint("mail", ids(3), longest=4) == 3
    assert broker.hint("mail", ids(3), longest=4) == 1
    assert broker.hint("mail", ids(3), longest=4) == 0
    assert members(raw, key) == [str(UUID(int=n)) for n in (1, 2, 3, 1)]
    raw.flushall()
    assert broker.hint("mail", ids(3), longest=4) == 0
    assert raw.dbsize() == 0


def test_clear_lists(broker: Broker, raw: Any) -> None:
    """Lists go, the epoch stays."""
    key = broker.queue_key("mail", "normal")
    broker.push(EPOCH, [(key, ids(3))])
    broker.clear_lists([key, broker.queue_key("mail", "low")])
    broker.clear_lists([])
    assert raw.keys("*") == [b"pmqd:epoch"]


def _outcome(action: Action, **changes: Any) -> Outcome:
    fields: dict[str, Any] = {
        "attempt_number": 1,
        "duration_seconds": 0.2,
        "started": NOW.timestamp(),
        **changes,
    }
    return Outcome(
        job_id=UUID(int=1),
        token=UUID(int=2),
        action=action,
        queue_name="mail",
        kind=None,
        worker_id="w1",
        **fields,
    )


def test_tell_writes_what_people_look_at(redis_url: str, raw: Any) -> None:
    """A job's whole life in `job:ID`, bounded in time."""
    broker = Broker(RedisSettings(url=redis_url, prefix="p:"), "test")
    broker.tell([live.migrated(UUID(int=n), "mail", 100, NOW.timestamp()) for n in (1, 2)])
    broker.offered("mail", [UUID(int=n) for n in (1, 2)])
    assert broker.status_of(UUID(int=1))["status"] == "migrated"
    broker.tell([live.processing(a_claim(), "w1")])
    assert broker.status_of(UUID(int=1))["worker_id"] == "w1"
    broker.tell([live.ended(_outcome(Action.RETRY, delay_seconds=4), "queued")] * 1200)
    found = broker.status_of(UUID(int=1))
    assert (found["status"], found["attempt_count"]) == ("retry_scheduled", "1")
    broker.tell([live.ended(_outcome(Action.COMPLETE), "completed")])
    assert broker.status_of(UUID(int=1))["status"] == "completed"
    assert 55 < raw.ttl(f"p:job:{UUID(int=1)}") <= 60
    broker.tell([live.ended(_outcome(Action.RELEASE), "queued")])
    assert broker.status_of(UUID(int=1)) == {}
    assert raw.smembers("p:recent_jobs:mail") == {str(UUID(int=n)).encode() for n in (1, 2)}
    assert 3500 < raw.ttl("p:recent_jobs:mail") <= 3600
    assert all(raw.ttl(key) > 0 for key in raw.keys("p:*"))
    broker.close()


def test_a_live_status_holds_any_text(broker: Broker) -> None:
    """What a handler reports may be long, or in any script; its length counts in bytes."""
    note = "zähle \N{SNOWMAN} 😀\r\n$3\r\n" * 100
    job = Job(a_claim(), {}, "w1", cast(JobPort, None))
    broker.tell([live.progress(job, 0.5, note)] * 3)
    assert broker.status_of(job.id)["note"] == note
    assert broker.status_of(job.id)["progress"] == "0.5"


def test_a_refused_status_is_told_and_leaves_nothing_behind(broker: Broker, raw: Any) -> None:
    """One that Redis refuses is an error by name; the answers of the others are not taken for those of what comes next."""
    raw.set(f"job:{UUID(int=1)}", "no hash")
    events = [live.Event(UUID(int=n), "processing") for n in range(3)]
    with pytest.raises(BrokerUnavailable, match="WRONGTYPE"):
        broker.tell(events)
    assert broker.lengths([broker.queue_key("mail", "normal")]) == {"queue:mail": 0}
    broker.tell(events[2:])
    assert broker.status_of(UUID(int=2)) == {"status": "processing"}


def test_recent_jobs_do_not_grow(redis_url: str, raw: Any) -> None:
    """However many ids are offered, 10,000 at most are kept."""
    broker = Broker(RedisSettings(url=redis_url), "test")
    for start in range(0, 12_000, 3000):
        broker.offered("mail", [UUID(int=n) for n in range(start, start + 3000)])
    assert raw.scard("recent_jobs:mail") == 10_000
    broker.close()


def test_info_and_ping(broker: Broker) -> None:
    """What the doctor reads is there."""
    info = broker.info()
    assert {"redis_version", "maxmemory_policy", "aof_enabled", "maxclients"} <= set(info)
    assert broker.ping() < 1


def test_over_a_unix_socket(redis_server: RedisServer, broker: Broker) -> None:
    """The same over a Unix socket."""
    socket = redis_server.socket_folder / redis_server.socket_name
    other = Broker(RedisSettings(url=f"unix://{socket}"), "test")
    key = other.queue_key("mail", "normal")
    other.push(EPOCH, [(key, ids(1))])
    assert len(pop(other, [key])) == 1
    other.close()
