"""Faults of Redis: killed, forgetful, rolled back, full, read-only, loading, deaf, slow, busy."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import redis

from pmqd.chaos.faults import (
    Action,
    Area,
    Growth,
    Kind,
    Missed,
    Scene,
    Watch,
    always,
    never,
    redis_of,
    wait_until,
)
from pmqd.embedded import RedisServer

LOOK_SECONDS: Final = 1.5
"""How long a fault waits for hints to be in the lists."""
JUNK_DATABASE: Final = 1
JUNK_KEYS: Final = 2000

_COUNT: Final = """
local n = 0
for _, key in ipairs(redis.call('KEYS', ARGV[1])) do
  if redis.call('TYPE', key).ok == 'list' then n = n + redis.call('LLEN', key) end
end
if n > 0 and ARGV[2] == 'flush' then redis.call('FLUSHALL') end
return n
"""
_SPIN: Final = """
local function now() local t = redis.call('TIME') return t[1] * 1000 + t[2] / 1000 end
local till = now() + tonumber(ARGV[1])
while now() < till do end
return 1
"""


@contextlib.contextmanager
def redis_client(scene: Scene) -> Iterator[Any]:
    """The same client without redis-py's unions of plain and awaited answers."""
    with redis_of(scene) as client:
        yield client


def hints(client: Any, scene: Scene, then: str = "") -> int:
    """How many hints lie in the lists, counted (and flushed, if so wanted) in one script."""
    return int(client.eval(_COUNT, 0, f"{scene.world.prefix}queue:*", then))


def popping(client: Any) -> int:
    """How many pops are outstanding."""
    return sum(1 for each in client.client_list() if each.get("cmd", "").lower() == "blmpop")


def daemons(client: Any) -> int:
    """How many connections of pmqd's children there are."""
    return sum(1 for each in client.client_list() if each.get("name", "").startswith("pmqd:"))


def errors(client: Any, name: str) -> int:
    """How often the server has answered with this error."""
    found = client.info("errorstats").get(f"errorstat_{name}", {})
    return int(found.get("count", 0))


def server_of(scene: Scene) -> RedisServer:
    """The private server."""
    assert scene.world.redis is not None, "only on private servers"
    return scene.world.redis


def _forget_snapshot(server: RedisServer) -> None:
    (server.directory / "dump.rdb").unlink(missing_ok=True)


def kill(scene: Scene) -> Action:
    """SIGKILL without a snapshot; it comes back empty."""
    server, at = server_of(scene), time.time()
    with redis_client(scene) as client:
        wait_until(lambda: hints(client, scene) > 0, LOOK_SECONDS, 0.003)
        waiting, pops = hints(client, scene), popping(client)
    scene.undo.callback(server.start)
    _forget_snapshot(server)
    server.kill()
    return Action(
        "Redis",
        f"{waiting} hints were in the lists, {pops} pops outstanding",
        always if waiting or pops else never,
        scene.between(0.1, 4.0),
        watch=Watch("gap", at),
    )


def roll_back(scene: Scene) -> Action:
    """A snapshot, more pushes, SIGKILL, and a start from that snapshot: what came after it is forgotten."""
    server, at = server_of(scene), time.time()
    scene.undo.callback(_forget_snapshot, server)
    with redis_client(scene) as client:
        wait_until(lambda: hints(client, scene) > 0, LOOK_SECONDS, 0.003)
        client.save()
        kept = hints(client, scene)
        later = Growth(lambda: _calls(client, "evalsha"))
        time.sleep(scene.between(0.2, 1.0))
        pushed = later.grown()
    scene.undo.callback(server.start)
    server.kill()
    return Action(
        "Redis",
        f"about {kept} hints in the snapshot, and scripts {'ran' if pushed else 'did not run'} after it",
        always if pushed else never,
        scene.between(0.0, 1.5),
        watch=Watch("gap", at),
    )


def _calls(client: Any, command: str) -> int:
    return int(client.info("commandstats").get(f"cmdstat_{command}", {}).get("calls", 0))


def flush(scene: Scene) -> Action:
    """FLUSHALL, at an instant with hints in the lists."""
    lost = 0

    def flushed() -> bool:
        nonlocal lost
        lost = hints(client, scene, "flush")
        return lost > 0

    with redis_client(scene) as client:
        hit = wait_until(flushed, LOOK_SECONDS, 0.003)
        if not hit:
            client.flushall()
    return Action("Redis", f"{lost} hints were in the lists", always if hit else never, watch=_gap())


def _gap() -> Watch:
    return Watch("gap", time.time())


def _asking(scene: Scene, read: Callable[[Any], int]) -> Callable[[], int]:
    def asked() -> int:
        with redis_client(scene) as client:
            return read(client)

    return asked


def _errors_grow(scene: Scene, name: str) -> Growth:
    return Growth(_safely(_asking(scene, lambda client: errors(client, name))))


def _safely(read: Callable[[], int]) -> Callable[[], int]:
    def safe() -> int:
        try:
            return read()
        except Missed:
            return 0

    return safe


def forget_scripts(scene: Scene) -> Action:
    """SCRIPT FLUSH; the next call of each script is refused."""
    refused = _errors_grow(scene, "NOSCRIPT")
    with redis_client(scene) as client:
        client.script_flush()
    return Action("Redis", "scripts were asked for after it", refused.grown, over=refused.grown, patience=3.0)


def kill_clients(scene: Scene) -> Action:
    """CLIENT KILL of all connections."""
    with redis_client(scene) as client:
        there, pops = daemons(client), popping(client)
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    return Action(
        "Redis",
        f"{there} connections of pmqd, {pops} pops among them",
        always if there else never,
        watch=_gap(),
    )


def pause_clients(scene: Scene) -> Action:
    """CLIENT PAUSE: every command waits."""
    seconds = scene.between(0.3, 3.5)
    with redis_client(scene) as client:
        there = daemons(client)
        client.execute_command("CLIENT", "PAUSE", str(int(seconds * 1000)), "ALL")
    return Action(
        "Redis",
        f"{there} connections of pmqd waited {seconds:.1f} s",
        always if there else never,
        seconds,
        watch=_gap(),
    )


def _configured(scene: Scene, name: str, value: str, normal: str) -> None:
    with redis_client(scene) as client:
        scene.undo.callback(_set, scene, name, normal)
        client.config_set(name, value)


def _set(scene: Scene, name: str, value: str) -> None:
    with redis_client(scene) as client:
        client.config_set(name, value)


def fill(scene: Scene) -> Action:
    """Out of memory: writes are refused (maxmemory of one byte, noeviction)."""
    refused, at = _errors_grow(scene, "OOM"), _gap()
    _configured(scene, "maxmemory-policy", "noeviction", "noeviction")
    _configured(scene, "maxmemory", "1", "0")
    return Action(
        "Redis",
        "writes were refused",
        refused.grown,
        scene.between(0.5, 3.0),
        over=refused.grown,
        patience=3.0,
        watch=at,
    )


def demote(scene: Scene) -> Action:
    """Read-only: a replica of a master that is not there."""
    refused, at = _errors_grow(scene, "READONLY"), _gap()

    def promote() -> None:
        with redis_client(scene) as client:
            client.replicaof("NO", "ONE")

    with redis_client(scene) as client:
        scene.undo.callback(promote)
        client.replicaof("127.0.0.1", 1)
    return Action(
        "Redis",
        "writes were refused",
        refused.grown,
        scene.between(0.5, 3.0),
        over=refused.grown,
        patience=3.0,
        watch=at,
    )


def load(scene: Scene) -> Action:
    """A restart that reads its snapshot for a while and answers LOADING meanwhile."""
    server, at = server_of(scene), _gap()
    seconds = scene.between(1.0, 2.5)
    slow = {
        "key-load-delay": str(int(seconds * 1e6 / JUNK_KEYS)),
        "loading-process-events-interval-bytes": "1024",
    }
    scene.undo.callback(_clear_junk, scene)
    scene.undo.callback(_forget_snapshot, server)
    with redis_client(scene) as client:
        _write_junk(client)
    server.kill()
    normal = dict(server.settings)
    scene.undo.callback(_restore, server, normal)
    server.settings.update(slow)
    seen = threading.Event()
    coming = threading.Thread(target=server.start, name="chaos-loading", daemon=True)
    coming.start()
    _watch_loading(scene, seen, coming)
    return Action(
        "Redis",
        "it answered LOADING",
        seen.is_set,
        over=lambda: not coming.is_alive(),
        patience=30.0,
        watch=at,
    )


def _watch_loading(scene: Scene, seen: threading.Event, coming: threading.Thread) -> None:
    """Looks, until the server is up, whether it answers that it loads."""

    def look() -> None:
        while coming.is_alive() and not seen.is_set():
            client = scene.world.redis_client()
            try:
                client.get("x")
            except redis.BusyLoadingError:
                seen.set()
            except (redis.RedisError, OSError):
                time.sleep(0.02)
            finally:
                client.close()

    thread = threading.Thread(target=look, name="chaos-look", daemon=True)
    thread.start()


def _write_junk(client: Any) -> None:
    """Keys in a database that pmqd does not use, for a snapshot that takes long to read."""
    pipe = client.pipeline(transaction=False)
    pipe.execute_command("SELECT", JUNK_DATABASE)
    for number in range(JUNK_KEYS):
        pipe.set(f"chaos:junk:{number}", "x" * 200)
    pipe.execute_command("SELECT", 0)
    pipe.execute()
    client.save()


def _clear_junk(scene: Scene) -> None:
    with redis_client(scene) as client:
        pipe = client.pipeline(transaction=False)
        pipe.execute_command("SELECT", JUNK_DATABASE)
        pipe.execute_command("FLUSHDB")
        pipe.execute_command("SELECT", 0)
        pipe.execute()


def _restore(server: RedisServer, settings: dict[str, str]) -> None:
    server.settings.clear()
    server.settings.update(settings)
    server.start()


def _spin(scene: Scene, milliseconds: int) -> threading.Thread:
    """A script that occupies the server, as DEBUG SLEEP does where that is allowed; sent by a thread of its own."""

    def run() -> None:
        client = scene.world.redis_client()
        with contextlib.suppress(redis.RedisError, OSError):
            client.eval(_SPIN, 0, str(milliseconds))
        client.close()

    thread = threading.Thread(target=run, name="chaos-spin", daemon=True)
    thread.start()
    return thread


def slow(scene: Scene) -> Action:
    """The server is busy with something else and answers nobody."""
    seconds = scene.between(0.3, 2.5)
    with redis_client(scene) as client:
        there = daemons(client)
    at = _gap()
    thread = _spin(scene, int(seconds * 1000))
    return Action(
        "Redis",
        f"{there} connections of pmqd waited {seconds:.1f} s",
        always if there else never,
        seconds,
        over=lambda: not thread.is_alive(),
        patience=5.0,
        watch=at,
    )


def busy(scene: Scene) -> Action:
    """A script runs too long: everything else is answered BUSY."""
    refused, at = _errors_grow(scene, "BUSY"), _gap()
    _configured(scene, "busy-reply-threshold", "50", "5000")
    thread = _spin(scene, int(scene.between(0.6, 1.8) * 1000))
    return Action(
        "Redis",
        "commands were answered BUSY",
        refused.grown,
        0.5,
        over=lambda: not thread.is_alive(),
        patience=6.0,
        watch=at,
    )


_kind = functools.partial(Kind, area=Area.REDIS, own_servers=True)

KINDS: Final = (
    _kind("redis_kill", begin=kill, weight=2.0),
    _kind("redis_rollback", begin=roll_back, weight=1.5),
    _kind("redis_flush", begin=flush, weight=2.0),
    _kind("redis_scripts", begin=forget_scripts, weight=0.7),
    _kind("redis_clients", begin=kill_clients, weight=1.0),
    _kind("redis_pause", begin=pause_clients, weight=1.0),
    _kind("redis_full", begin=fill, weight=1.0),
    _kind("redis_readonly", begin=demote, weight=1.0),
    _kind("redis_loading", begin=load, weight=0.7),
    _kind("redis_slow", begin=slow, weight=1.0),
    _kind("redis_busy", begin=busy, weight=0.7),
)
