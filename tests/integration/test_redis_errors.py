"""Every way in which a Redis that is there can refuse: the work goes on without it, why is said once, and it is used again after."""

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
import redis

from pmqd.broker import Broker
from pmqd.config import RedisSettings
from pmqd.embedded import RedisServer
from pmqd.errors import BrokerUnavailable
from tests.fix_daemon import MakeDaemon
from tests.fix_redis_ha import client
from tests.fix_servers import WaitUntil, wait_until
from tests.history import enqueue, statuses
from tests.load import mode

EPOCH = UUID(int=99)


class Loading(RedisServer):
    """A server that counts as started while it still loads its data."""

    def _ready(self) -> bool:
        try:
            with client(self) as asked:
                return bool(asked.ping())
        except redis.exceptions.BusyLoadingError:
            return True
        except redis.RedisError:
            return False


@dataclass(frozen=True)
class Refusal:
    """A state of the server in which it refuses.

    Attributes:
        says: what its error begins with, and what we add.
        begin: brings it about; returns what ends it.
        settings: with which the server has to be started.
    """

    says: tuple[str, str]
    begin: Callable[[RedisServer], Callable[[], Any]]
    settings: dict[str, str]


def configured(**values: str) -> Callable[[RedisServer], Callable[[], Any]]:
    """Settings of the server changed at run time, and changed back."""

    def begin(server: RedisServer) -> Callable[[], Any]:
        with client(server) as asked:
            names = [name.replace("_", "-") for name in values]
            before = {name: asked.config_get(name)[name] for name in names}
            for name, value in zip(names, values.values(), strict=True):
                asked.config_set(name, value)
        return lambda: [client(server).config_set(name, value) for name, value in before.items()]

    return begin


def replica_of_nobody(server: RedisServer) -> Callable[[], Any]:
    """A replica whose primary is not there."""
    client(server).replicaof("127.0.0.1", "1")
    return lambda: client(server).replicaof("NO", "ONE")


def lonely_replica(server: RedisServer) -> Callable[[], Any]:
    """The same, and it refuses to answer with old data."""
    client(server).config_set("replica-serve-stale-data", "no")
    return replica_of_nobody(server)


def failed_save(server: RedisServer) -> Callable[[], Any]:
    """Its data cannot be written: the folder is gone."""
    shutil.rmtree(server.settings["dir"])
    with client(server) as asked:
        asked.config_set("save", "3600 1")
        asked.bgsave()
        wait_until(
            lambda: asked.info("persistence")["rdb_last_bgsave_status"] == "err", what="the save has failed"
        )
    return lambda: client(server).config_set("stop-writes-on-bgsave-error", "no")


def endless_script(server: RedisServer) -> Callable[[], Any]:
    """Somebody's script that does not end."""

    def run() -> None:
        with pytest.raises(redis.RedisError):
            client(server).eval("while true do end", 0)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def end() -> None:
        client(server).script_kill()
        thread.join(10)

    return end


def user_without(rule: str) -> Callable[[RedisServer], Callable[[], Any]]:
    """A right is taken from the user at run time."""

    def begin(server: RedisServer) -> Callable[[], Any]:
        admin: Any = client(server)  # its execute_command has no types
        admin.execute_command("ACL", "SETUSER", "admin", "on", ">adm", "~*", "&*", "+@all")
        admin.execute_command("ACL", "SETUSER", "default", rule)

        def end() -> None:
            with redis.Redis(
                unix_socket_path=str(server.socket_folder / server.socket_name),
                username="admin",
                password="adm",
            ) as asked:
                asked.execute_command("ACL", "SETUSER", "default", "nopass", "+@all")

        return end

    return begin


def shut_out(server: RedisServer) -> Callable[[], Any]:
    """A password is asked for that nobody told us, from now on."""
    end = user_without("resetpass")(server)
    with redis.Redis(
        unix_socket_path=str(server.socket_folder / server.socket_name), username="admin", password="adm"
    ) as asked:
        asked.execute_command("ACL", "SETUSER", "default", ">new")
        asked.execute_command("CLIENT", "KILL", "TYPE", "normal")
    return end


def loads(server: RedisServer) -> Callable[[], Any]:
    """Restarted, it loads for some seconds."""
    with client(server) as asked:
        asked.mset({f"other:{n}": "x" * 100 for n in range(5000)})
        asked.save()
    server.kill()
    server.start()
    return lambda: None


SLOW_LOAD = {"key-load-delay": "1000", "loading-process-events-interval-bytes": "1024"}
REFUSALS = {
    "READONLY": Refusal(("ReadOnlyError", "must lead to the primary"), replica_of_nobody, {}),
    "MASTERDOWN": Refusal(("MasterDownError", "lost its primary"), lonely_replica, {}),
    "OOM": Refusal(("OutOfMemoryError", "noeviction"), configured(maxmemory="1"), {}),
    "MISCONF": Refusal(("MISCONF", "cannot save"), failed_save, {"dir": ""}),
    "BUSY": Refusal(("BUSY", "script"), endless_script, {"busy-reply-threshold": "100"}),
    "NOREPLICAS": Refusal(("NOREPLICAS", "min-replicas"), configured(min_replicas_to_write="1"), {}),
    "NOAUTH": Refusal(("AuthenticationError", "the right user and password"), shut_out, {}),
    "NOPERM to pop": Refusal(("NoPermissionError", "more rights"), user_without("-blmpop"), {}),
    "NOPERM to push": Refusal(("NoPermissionError", "more rights"), user_without("-evalsha"), {}),
    "LOADING": Refusal(("Redis is away", "ConnectionError"), loads, SLOW_LOAD),  # it was gone before that
}


@contextmanager
def server_with(folder: Path, settings: dict[str, str]) -> Iterator[RedisServer]:
    """A server with these settings; `dir` empty stands for a folder of its own that a test may remove."""
    if "dir" in settings:
        (folder / "gone").mkdir()
        settings = settings | {"dir": str(folder / "gone")}
    with Loading(folder / "redis", tcp=True, settings=settings) as server:
        yield server


@pytest.mark.parametrize("name", REFUSALS)
def test_a_redis_that_refuses_does_not_stop_the_work(
    name: str,
    daemon: MakeDaemon,
    connection: psycopg.Connection[Any],
    short_folder: Path,
    wait_until: WaitUntil,
) -> None:
    """The daemon goes to direct mode, in which both workers are busy, says why once per process, and comes back."""
    refusal = REFUSALS[name]
    pool = {"app": "tests.applications.trial:app", "processes": 2}

    def done(count: int) -> Callable[[], bool]:
        return lambda: statuses(connection) == {"completed": count}

    with server_with(short_folder, refusal.settings) as server:
        running = daemon({"redis": {"url": server.url}, "workers": [pool]})
        for _ in range(20):
            enqueue(connection, "nothing")
        wait_until(done(20), what="the first jobs")
        wait_until(lambda: mode(running) == "ok", what="Redis in use")
        end = refusal.begin(server)
        wait_until(lambda: mode(running) == "degraded", timeout=15, what="direct mode")
        for _ in range(
            60
        ):  # two at a time they take 4.5 s; stolen once a second, a minute. Slow enough to be told of
            enqueue(connection, "nap", seconds=0.15)
        wait_until(done(80), timeout=20, what="jobs done without Redis")
        end()
        wait_until(lambda: mode(running) == "ok", timeout=20, what="Redis in use again")
        for _ in range(20):
            enqueue(connection, "nothing")
        wait_until(done(100), what="the last jobs")
        error, advice = refusal.says
        told = [each for each in running.records if error in each["message"] and advice in each["message"]]
        assert told, [each["message"] for each in running.records]
        assert len(told) == len({each["child"] for each in told}), "once for each process"
        assert running.stop() == 0


def test_scripts_that_are_gone_are_no_outage(
    daemon: MakeDaemon, connection: psycopg.Connection[Any], own_redis: RedisServer, wait_until: WaitUntil
) -> None:
    """NOSCRIPT: after SCRIPT FLUSH nothing is slower or louder than before."""
    running = daemon({"redis": {"url": own_redis.url}})
    enqueue(connection, "nothing")
    wait_until(lambda: statuses(connection) == {"completed": 1}, what="the first job")
    with client(own_redis) as asked:
        asked.script_flush()
    for _ in range(20):
        enqueue(connection, "nothing")
    wait_until(lambda: statuses(connection) == {"completed": 21}, what="the others")
    assert mode(running) == "ok"
    assert not [each for each in running.records if "away" in each["message"]]


def test_a_wrong_password_is_said_and_does_not_stop_the_work(
    daemon: MakeDaemon, connection: psycopg.Connection[Any], own_redis: RedisServer, wait_until: WaitUntil
) -> None:
    """WRONGPASS from the start: the daemon becomes ready and works; the log says what is wrong, without the password."""
    with client(own_redis) as asked:
        asked.config_set("requirepass", "right")
    running = daemon({"redis": {"url": own_redis.url.replace("//", "//:wr0ng-one@")}})
    enqueue(connection, "nothing")
    wait_until(lambda: statuses(connection) == {"completed": 1}, what="a job")
    assert mode(running) == "degraded"
    assert [
        each for each in running.records if "redis.url needs the right user and password" in each["message"]
    ]
    assert "wr0ng-one" not in running.log


def test_a_pop_whose_server_changes_its_role(own_redis: RedisServer, wait_until: WaitUntil) -> None:
    """UNBLOCKED: a pop that waits is told at once, and pops work again when the server is a primary again."""
    broker = Broker(RedisSettings(url=own_redis.url), "test")
    key = broker.queue_key("mail", "normal")
    broker.pop_start([key], 1, 30.0)
    with client(own_redis) as asked:
        wait_until(lambda: asked.info("clients")["blocked_clients"], what="the pop waits")
        asked.replicaof("127.0.0.1", "1")
        wait_until(broker.pop_ready, timeout=2, what="the pop is told")
        with pytest.raises(BrokerUnavailable, match=r"UNBLOCKED.*role has changed"):
            broker.pop_finish()
        asked.replicaof("NO", "ONE")
    broker.set_epoch(EPOCH)
    broker.push(EPOCH, [(key, [UUID(int=1)])])
    broker.pop_start([key], 1, 1.0)
    assert [hint.id for hint in broker.pop_finish()] == [UUID(int=1)]
    broker.close()
