"""Redis under sentinels: the broker finds the master, and finds the new one after a failover."""

import time
from collections.abc import Iterator
from uuid import UUID

import pytest

from pmqd.broker import Broker
from pmqd.config import RedisSettings
from pmqd.errors import BrokerUnavailable
from tests.fix_proxy import MakeProxy
from tests.fix_redis_ha import MASTER_NAME, Watched, client
from tests.fix_servers import WaitUntil

EPOCH = UUID(int=99)


@pytest.fixture
def broker(watched: Watched) -> Iterator[Broker]:
    """A broker that is told of the sentinels only; the master has the epoch."""
    made = Broker(RedisSettings(url=watched.url), "test")
    made.set_epoch(EPOCH)
    yield made
    made.close()


def pop(broker: Broker, key: str) -> list[UUID]:
    """A whole pop."""
    broker.pop_start([key], 10, 1.0)
    return [hint.id for hint in broker.pop_finish()]


def answers(broker: Broker) -> bool:
    """Whether a write succeeds now."""
    try:
        broker.set_epoch(EPOCH)
    except BrokerUnavailable:
        return False
    return True


def test_the_master_is_found_and_no_sentinel_is_kept_busy(broker: Broker, watched: Watched) -> None:
    """Hints go to the master, and no connection to a sentinel stays open."""
    key = broker.queue_key("mail", "normal")
    broker.push(EPOCH, [(key, [UUID(int=1)])])
    with client(watched.master()) as master:
        assert master.llen(key) == 1
    assert pop(broker, key) == [UUID(int=1)]
    for sentinel in watched.sentinels:
        with client(sentinel) as asked:
            names = [each["name"] for each in asked.client_list()]
        assert "pmqd:test" not in names


def test_a_database_and_a_password_are_those_of_the_master(watched: Watched) -> None:
    """User, password and database in the URL are for the servers; the sentinels are asked without them."""
    for node in watched.nodes:
        with client(node) as asked:
            asked.config_set("masterauth", "hush")
            asked.config_set("requirepass", "hush")
    for sentinel in watched.sentinels:
        with client(sentinel) as asked:
            asked.execute_command("SENTINEL", "SET", MASTER_NAME, "auth-pass", "hush")
    broker = Broker(RedisSettings(url=watched.url.replace("//", "//:hush@") + "/3"), "test")
    broker.set_epoch(EPOCH)
    with client(watched.master(), password="hush", db=3) as asked:
        assert asked.get("pmqd:epoch") == str(EPOCH).encode()
    broker.close()
    with pytest.raises(BrokerUnavailable, match="right user and password"):
        Broker(RedisSettings(url=watched.url), "test").ping()


def test_sentinels_with_a_password_of_their_own(watched: Watched) -> None:
    """What the sentinels ask for stands in the URL's options."""
    for sentinel in watched.sentinels:
        with client(sentinel) as asked:
            asked.execute_command("ACL", "SETUSER", "default", "resetpass", ">s3ntinel")
    url = f"{watched.url}?sentinel_password=s3ntinel"
    Broker(RedisSettings(url=url), "test").ping()
    with pytest.raises(BrokerUnavailable) as caught:
        Broker(RedisSettings(url=watched.url + "?sentinel_password=wr0ng"), "test").ping()
    assert "wr0ng" not in str(caught.value)


def test_dead_and_silent_sentinels_are_passed_over(watched: Watched, proxy: MakeProxy) -> None:
    """One that refuses and one that is silent cost less than the broker's own patience; afterwards the good one is first."""
    wire = proxy(watched.sentinels[1])
    watched.sentinels[0].kill()
    wire.hold()
    ports = (watched.sentinels[0].port, wire.port, watched.sentinels[2].port)
    url = f"redis+sentinel://{','.join(f'127.0.0.1:{port}' for port in ports)}/{MASTER_NAME}"
    started = time.monotonic()
    Broker(RedisSettings(url=url), "test").ping()
    assert time.monotonic() - started < 1.5
    started = time.monotonic()
    Broker(RedisSettings(url=url), "test").ping()
    assert time.monotonic() - started < 0.4, "the one that answered is asked first"


def test_an_unknown_name_and_no_sentinel_at_all_are_told(watched: Watched) -> None:
    """The message names the sentinels and the master's name."""
    with pytest.raises(BrokerUnavailable, match="No master found for 'other'"):
        Broker(RedisSettings(url=watched.url.replace(MASTER_NAME, "other")), "test").ping()
    for sentinel in watched.sentinels:
        sentinel.kill()
    with pytest.raises(BrokerUnavailable, match=f"{MASTER_NAME} of the sentinels 127.0.0.1:"):
        Broker(RedisSettings(url=watched.url), "test").ping()


def test_a_replica_that_sentinels_name_is_not_taken_for_the_master(watched: Watched) -> None:
    """In the middle of a failover the sentinels may be ahead of, or behind, the servers: a replica is not used."""
    for sentinel in watched.sentinels:
        with client(sentinel) as asked:
            asked.execute_command("SENTINEL", "REMOVE", MASTER_NAME)
            asked.execute_command("SENTINEL", "MONITOR", MASTER_NAME, "127.0.0.1", watched.nodes[0].port, 3)
    with client(watched.nodes[1]) as second:
        second.replicaof("NO", "ONE")
    with client(watched.nodes[0]) as first:
        first.replicaof("127.0.0.1", str(watched.nodes[1].port))
        with pytest.raises(BrokerUnavailable, match="which is no master"):
            Broker(RedisSettings(url=watched.url), "test").ping()


@pytest.mark.parametrize("how", ["kill", "graceful"])
def test_after_a_failover_the_new_master_is_used(
    how: str, broker: Broker, watched: Watched, wait_until: WaitUntil
) -> None:
    """Killed or told to hand over, the master is another one after a while; both connections follow, and its run id is new."""
    key = broker.queue_key("mail", "normal")
    old = watched.master()
    run_id, _ = broker.server_life()
    broker.pop_start([key], 1, 30.0)
    if how == "kill":
        old.kill()
    else:
        watched.ask("FAILOVER", MASTER_NAME)
    wait_until(broker.pop_ready, timeout=30, what="the pop hears of it")
    with pytest.raises(BrokerUnavailable):
        broker.pop_finish()
    wait_until(lambda: watched.master() is not old, timeout=30, what="the failover")
    wait_until(lambda: answers(broker), timeout=30, what="the new master answers")
    assert broker.server_life()[0] != run_id
    broker.push(EPOCH, [(key, [UUID(int=7)])])
    with client(watched.master()) as master:
        assert master.llen(key) == 1
    assert pop(broker, key) == [UUID(int=7)]
