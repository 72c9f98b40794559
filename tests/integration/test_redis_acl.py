"""The documented rights of pmqd's user in Redis are enough, and each of them is needed."""

import re
from typing import Any
from uuid import UUID

import psycopg
import pytest
import redis

from pmqd import live
from pmqd.broker import Broker
from pmqd.config import RedisSettings
from pmqd.embedded import RedisServer
from pmqd.errors import BrokerUnavailable
from tests.fix_daemon import ROOT, MakeDaemon
from tests.fix_redis_ha import client
from tests.fix_servers import WaitUntil
from tests.history import enqueue, statuses
from tests.jobs import a_claim
from tests.load import mode

EPOCH = UUID(int=99)


def documented() -> list[str]:
    """The words of the ACL command on the page."""
    page = (ROOT / "docs" / "high-availability.md").read_text()
    found = re.search(r"^ACL SETUSER pmqd (.*?)\n```", page, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1].replace("\\\n", " ").split()


COMMANDS = [word for word in documented() if word.startswith("+")]


@pytest.fixture
def guarded(own_redis: RedisServer) -> str:
    """The URL of a server with that user, where the default user may do nothing."""
    with client(own_redis) as asked:
        asked.execute_command("ACL", "SETUSER", "admin", "on", ">adm", "~*", "&*", "+@all")
        asked.execute_command("ACL", "SETUSER", "pmqd", *documented())
        asked.execute_command("ACL", "SETUSER", "default", "off")
    return own_redis.url.replace("//", "//pmqd:PASSWORD@")


def everything(url: str, *, prefix: str = "") -> None:
    """All that pmqd asks of Redis, once."""
    broker = Broker(RedisSettings(url=url, prefix=prefix), "test")
    key = broker.queue_key("mail", "normal")
    broker.ping()
    broker.server_life()
    broker.set_epoch(EPOCH)
    broker.push(EPOCH, [(key, [UUID(int=1)])])
    broker.reoffer(EPOCH, key, [UUID(int=1), UUID(int=2)])
    broker.hint("mail", [UUID(int=3)], longest=10)
    broker.lengths([key])
    broker.pop_start([key], 1, 1.0)
    broker.give_back([(hint.key, hint.member) for hint in broker.pop_finish()])
    broker.pop_start([broker.queue_key("none", "low")], 1, 30.0)
    broker.pop_cancel()
    broker.offered("mail", [UUID(int=n) for n in range(10_002)])
    broker.tell([live.processing(a_claim(), "w1"), live.Event(UUID(int=1), None)])
    broker.status_of(UUID(int=1))
    broker.info()
    broker.clear_lists([key])
    broker.close()


def as_admin(server: RedisServer) -> Any:
    """A client that may do everything."""
    path = str(server.socket_folder / server.socket_name)
    return redis.Redis(unix_socket_path=path, username="admin", password="adm", protocol=2)


def test_the_documented_rights_are_enough(guarded: str, own_redis: RedisServer) -> None:
    """Everything works with them, scripts being loaded anew too, and nothing was refused on the way."""
    everything(guarded)
    with as_admin(own_redis) as admin:
        admin.script_flush()
        everything(guarded)
        assert admin.execute_command("ACL", "LOG") == []


def test_the_documented_rights_are_not_more_than_needed(guarded: str, own_redis: RedisServer) -> None:
    """Each command taken away is missed; without the keys, or the other way round, nothing of others is reached."""
    with as_admin(own_redis) as admin:
        for right in COMMANDS:
            admin.execute_command("ACL", "SETUSER", "pmqd", right.replace("+", "-", 1))
            admin.execute_command("ACL", "LOG", "RESET")
            admin.script_flush()
            try:
                everything(guarded)
                missed = bool(
                    admin.execute_command("ACL", "LOG")
                )  # redis-py goes without some that it asks for
            except BrokerUnavailable:
                missed = True
            assert missed, f"{right} is not needed"
            admin.execute_command("ACL", "SETUSER", "pmqd", right)
    everything(guarded)
    with pytest.raises(BrokerUnavailable, match="needs more rights"):
        everything(guarded, prefix="other:")


def test_the_user_may_do_nothing_dangerous(guarded: str) -> None:
    """Neither change the server nor read what is not pmqd's."""
    with redis.Redis.from_url(guarded) as stranger:
        for command in (
            "FLUSHALL",
            "CONFIG GET *",
            "KEYS *",
            "ACL LIST",
            "SHUTDOWN",
            "MONITOR",
            "GET other",
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                stranger.execute_command(*command.split())


def test_the_daemon_works_with_the_documented_rights(
    guarded: str,
    daemon: MakeDaemon,
    connection: psycopg.Connection[Any],
    own_redis: RedisServer,
    wait_until: WaitUntil,
) -> None:
    """A whole daemon, with every status written: Redis is used, and nothing is refused."""
    running = daemon({"redis": {"url": guarded, "job_status": "all"}})
    for _ in range(30):
        enqueue(connection, "nothing")
    wait_until(lambda: statuses(connection) == {"completed": 30}, what="the jobs")
    assert mode(running) == "ok"
    assert "pmqd_redis_up 1.0" in running.get("/metrics").text
    assert running.stop() == 0
    with as_admin(own_redis) as admin:
        assert admin.execute_command("ACL", "LOG") == []
