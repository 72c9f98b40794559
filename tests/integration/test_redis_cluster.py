"""Redis Cluster: all keys in one slot, the broker at the node that has it, and where it goes when the slot moves."""

import time
from collections.abc import Iterator
from uuid import UUID

import pytest
from redis.crc import key_slot

from pmqd import doctor
from pmqd.broker import Broker
from pmqd.config import RedisSettings, Settings
from pmqd.embedded import RedisServer
from pmqd.errors import BrokerUnavailable
from tests.fix_proxy import MakeProxy
from tests.fix_redis_ha import Cluster, client, hand_over
from tests.fix_servers import WaitUntil

EPOCH = UUID(int=99)
PREFIX = "{pmqd}:"
SLOT = key_slot(b"pmqd")


@pytest.fixture
def broker(cluster: Cluster) -> Iterator[Broker]:
    """A broker that knows all nodes, with the epoch set."""
    made = Broker(RedisSettings(url=cluster.url, prefix=PREFIX), "test")
    made.set_epoch(EPOCH)
    yield made
    made.close()


def pop(broker: Broker, keys: list[str]) -> list[UUID]:
    """A whole pop."""
    broker.pop_start(keys, 10, 0.3)
    return [hint.id for hint in broker.pop_finish()]


def answers(broker: Broker) -> bool:
    """Whether a write succeeds now."""
    try:
        broker.set_epoch(EPOCH)
    except BrokerUnavailable:
        return False
    return True


def move(cluster: Cluster, target: RedisServer) -> None:
    """Give the slot with all its keys to another node, as a resharding tool does."""
    source = cluster.owner(SLOT)
    cluster.set_slot(SLOT, target, "IMPORTING", source)
    cluster.set_slot(SLOT, source, "MIGRATING", target)
    hand_over(source, target, SLOT)
    for node in (target, source, *cluster.nodes):
        cluster.set_slot(SLOT, node, "NODE", target)


def test_all_keys_are_in_the_slot_of_the_hash_tag(broker: Broker, cluster: Cluster) -> None:
    """Several lists in one pop and one script work, and nothing of ours is on another node."""
    keys = [broker.queue_key(name, band) for name in ("a", "b") for band in ("high", "normal", "low")]
    lengths = broker.push(EPOCH, [(key, [UUID(int=n)]) for n, key in enumerate(keys)])
    assert set(lengths.values()) == {1}
    assert broker.lengths(keys) == dict.fromkeys(keys, 1)
    assert [pop(broker, keys) for _ in keys] == [[UUID(int=n)] for n in range(6)]
    assert broker.reoffer(EPOCH, keys[0], [UUID(int=9)]) == 1
    broker.give_back([(keys[1], b"x"), (keys[2], b"y")])
    owner = cluster.owner(SLOT)
    for node in cluster.nodes:
        with client(node) as asked:
            assert asked.dbsize() == (4 if node is owner else 0)
    broker.clear_lists(keys)


@pytest.mark.parametrize("known", range(3))
def test_one_node_of_the_url_is_enough(known: int, cluster: Cluster) -> None:
    """Whichever node is asked tells who has the slot."""
    url = f"redis://127.0.0.1:{cluster.nodes[known].port}/0"
    made = Broker(RedisSettings(url=url, prefix=PREFIX), "test")
    made.set_epoch(EPOCH)
    assert made.server_life()[1] == EPOCH
    assert pop(made, [made.queue_key("mail", "normal")]) == []
    made.close()


def test_dead_and_silent_nodes_of_the_url_are_passed_over(cluster: Cluster, proxy: MakeProxy) -> None:
    """A refusing and a silent node before the good one cost one timeout, and only the first time."""
    owner = cluster.owner(SLOT)
    others = [node for node in cluster.nodes if node is not owner]
    wire = proxy(others[1])
    wire.hold()
    others[0].kill()
    with client(owner) as asked:
        asked.config_set("cluster-require-full-coverage", "no")
    url = f"redis://127.0.0.1:{others[0].port},127.0.0.1:{wire.port},127.0.0.1:{owner.port}/0"
    settings = RedisSettings(url=url, prefix=PREFIX)
    Broker(settings, "test").set_epoch(EPOCH)
    started = time.monotonic()
    Broker(settings, "test").ping()
    assert time.monotonic() - started < 1.0


def test_a_prefix_with_a_hash_tag_is_fine_without_a_cluster(redis_url: str) -> None:
    """The same settings work on a plain server."""
    made = Broker(RedisSettings(url=redis_url, prefix=PREFIX), "test")
    made.set_epoch(EPOCH)
    key = made.queue_key("mail", "normal")
    made.push(EPOCH, [(key, [UUID(int=1)])])
    assert pop(made, [key]) == [UUID(int=1)]
    made.close()


def test_without_a_hash_tag_it_is_said_what_is_missing(cluster: Cluster, database: str) -> None:
    """A prefix without one cannot work; the error and the doctor name the setting and a good value."""
    for node in cluster.nodes:
        url = f"redis://127.0.0.1:{node.port}/0"
        plain = Broker(RedisSettings(url=url), "test")
        with pytest.raises(BrokerUnavailable, match=r"redis\.prefix needs a hash tag"):
            plain.push(EPOCH, [(plain.queue_key("mail", "normal"), [UUID(int=1)])])
        with pytest.raises(BrokerUnavailable, match=r"redis\.prefix needs a hash tag"):
            pop(plain, [plain.queue_key("a", "high"), plain.queue_key("b", "high")])
        redis = RedisSettings(url=url)
        found = {each.what: each for each in doctor.redis_findings(redis)}
        assert (found["Redis Cluster"].level, found["Redis Cluster"].do) == (
            doctor.Level.WRONG,
            'set redis.prefix = "{pmqd}:"',
        )
    good = Settings(redis=RedisSettings(url=cluster.url, prefix=PREFIX)).redis
    others = [
        each for each in doctor.redis_findings(good) if each.what != "Redis latency"
    ]  # that is the machine's
    assert [each for each in others if each.level != doctor.Level.OK] == []


def test_a_moved_slot_is_followed(broker: Broker, cluster: Cluster, wait_until: WaitUntil) -> None:
    """The slot goes to another node while a pop waits: the pop hears of it, all connections follow, hints come along."""
    key = broker.queue_key("mail", "normal")
    other = broker.queue_key("other", "normal")
    broker.push(EPOCH, [(key, [UUID(int=n) for n in range(5)])])
    broker.pop_start([other], 1, 30.0)
    source = cluster.owner(SLOT)
    target = next(node for node in cluster.nodes if node is not source)
    move(cluster, target)
    wait_until(broker.pop_ready, timeout=10, what="the pop hears of it")
    with pytest.raises(BrokerUnavailable):
        broker.pop_finish()
    wait_until(lambda: answers(broker), timeout=10, what="the new owner answers")
    assert broker.server_life()[1] == EPOCH
    assert pop(broker, [key]) == [UUID(int=n) for n in range(5)]
    with client(target) as asked:
        assert [each["name"] for each in asked.client_list()].count("pmqd:test") == 3


def test_a_slot_half_way_is_an_error_that_says_so(broker: Broker, cluster: Cluster) -> None:
    """While keys are on their way neither node can serve all of them: that is told, and over when they have arrived."""
    key = broker.queue_key("mail", "normal")
    broker.push(EPOCH, [(key, [UUID(int=1)])])
    source = cluster.owner(SLOT)
    target = next(node for node in cluster.nodes if node is not source)
    cluster.set_slot(SLOT, target, "IMPORTING", source)
    cluster.set_slot(SLOT, source, "MIGRATING", target)
    with pytest.raises(BrokerUnavailable, match="on their way"):
        broker.push(EPOCH, [(broker.queue_key("none", "normal"), [UUID(int=1)])])
    hand_over(source, target, SLOT)
    with pytest.raises(BrokerUnavailable, match="on their way"):
        broker.set_epoch(EPOCH)
    for node in (target, source, *cluster.nodes):
        cluster.set_slot(SLOT, node, "NODE", target)
    assert pop(broker, [key]) == [UUID(int=1)]


def test_a_cluster_that_is_down_is_told(broker: Broker, cluster: Cluster, wait_until: WaitUntil) -> None:
    """With a node gone the others refuse (CLUSTERDOWN), and serve again when it is back."""
    owner = cluster.owner(SLOT)
    lost = next(node for node in cluster.nodes if node is not owner)
    lost.kill()
    wait_until(lambda: not answers(broker), timeout=20, what="the cluster refuses")
    with pytest.raises(BrokerUnavailable, match="the cluster does not serve our keys now"):
        broker.set_epoch(EPOCH)
    lost.start()
    wait_until(lambda: answers(broker), timeout=30, what="the cluster serves again")
