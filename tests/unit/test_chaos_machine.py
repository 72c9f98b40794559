"""What a chaos run asks the machine and writes for its hosts: processes, ports, deaths, configurations, crash points."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from pmqd import config, crashpoints
from pmqd.chaos import application
from pmqd.chaos.deaths import DeathWatch
from pmqd.chaos.family import ending, to_toml
from pmqd.chaos.machine import children_of, facts, free_port, kind_of, send, session_of, state_of
from pmqd.chaos.world import POINTS, dsn_through, redis_through
from tests.fix_servers import wait_until

PARENT = """
import setproctitle, subprocess, sys, time
setproctitle.setproctitle("pmqd: master")
child = [sys.executable, "-c", "import setproctitle, time; setproctitle.setproctitle('pmqd: worker 3 (quick)'); time.sleep(600)"]
children = [subprocess.Popen(child) for _ in range(2)]
print("up", flush=True)
for each in children:
    each.wait()
time.sleep(600)
"""


@pytest.fixture
def family() -> Iterator["subprocess.Popen[bytes]"]:
    """A parent in a session of its own, with two children that call themselves workers."""
    process = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, start_new_session=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        wait_until(lambda: workers(process.pid), 20, "the workers have their titles")
        yield process
        os.killpg(process.pid, signal.SIGKILL)


def workers(master: int) -> list[int]:
    """Both workers, once they say that they are some."""
    found = [pid for pid in session_of(master) if kind_of(pid, master) == "worker"]
    return found if len(found) == 2 else []


def test_a_family_is_found_by_its_session(family: "subprocess.Popen[bytes]") -> None:
    """Members by session and kind, children by parent, states by letter; the dead are in none of them."""
    found = workers(family.pid)
    assert sorted(session_of(family.pid)) == sorted([family.pid, *found])
    assert sorted(children_of(family.pid)) == sorted(found)
    assert kind_of(family.pid, family.pid) == "master"
    send(found, signal.SIGSTOP)
    wait_until(lambda: [state_of(pid) for pid in found] == ["T", "T"], what="both stand still")
    family.kill()
    wait_until(lambda: state_of(family.pid) == "Z", what="the parent is dead")
    assert sorted(session_of(family.pid)) == sorted(found), "found also without their leader"
    send(found, signal.SIGKILL)
    wait_until(lambda: not session_of(family.pid), what="nobody is left")
    send(found, signal.SIGKILL)  # passed over


def test_every_death_is_noted_soon_and_once(family: "subprocess.Popen[bytes]", tmp_path: Path) -> None:
    """A child's and the parent's end are noted after they died, within a moment, with kind and host."""
    watch = DeathWatch(tmp_path / "deaths")
    try:
        watch.master(family.pid, "a")
        first, second = workers(family.pid)
        wait_until(lambda: watch.watched == 3, what="all three are watched")
        for pid, kind in ((first, "worker"), (second, "worker"), (family.pid, "master")):
            before = time.monotonic_ns()
            os.kill(pid, signal.SIGKILL)
            line = wait_until(partial(noted, tmp_path, pid), what=f"the death of {pid}")[0]
            assert [line[0], *line[3:]] == ["D", "a", kind]
            assert before <= int(line[2]) <= time.monotonic_ns()
    finally:
        watch.close()
    assert all(len(noted(tmp_path, pid)) == 1 for pid in (first, second, family.pid))


def noted(folder: Path, pid: int) -> list[list[str]]:
    """The lines about one process."""
    lines = [line.split() for line in (folder / "deaths").read_text().splitlines()]
    return [line for line in lines if line[1] == str(pid)]


def test_a_port_stays_free_below_those_of_clients() -> None:
    """What is chosen can be listened on, again and again, and no outgoing connection gets it by chance."""
    port = free_port()
    assert port < 32768
    for _ in range(2):
        with socket.create_server(("127.0.0.1", port)):
            pass


def test_a_hosts_configuration_is_read_as_it_was_meant(tmp_path: Path) -> None:
    """Pools, queues and sections of the run's application come out of the file as they went in."""
    file = tmp_path / "pmqd.toml"
    pools = [{"app": "pmqd.chaos.application:app", **pool} for pool in application.pools(3)]
    dsn = 'postgresql://u:"q\\x@h/d'
    file.write_text(
        to_toml(
            {
                "state_dir": str(tmp_path),
                "drain_seconds": 3.0,
                "postgres": {"dsn": dsn},
                "redis": {"url": "redis://127.0.0.1:1/0"},
                "queues": application.QUEUES,
                "workers": pools,
            }
        )
    )
    settings = config.load(file, environ={"PMQD_CHAOS_HISTORY": "/x", "PMQD_CRASHPOINT": "a=kill"})
    assert settings.postgres.dsn == dsn
    assert settings.drain_seconds == 3.0
    assert [pool.model_dump(exclude_unset=True) for pool in settings.workers] == pools
    assert set(settings.queues) == set(application.QUEUES)


def test_the_way_through_a_wire_keeps_the_rest_of_an_address() -> None:
    """User, database, options and the name in a certificate stay; host and port become the wire's."""
    assert "host=127.0.0.1" in dsn_through("postgresql://u@/d?host=/run/pg", 7)
    through = dsn_through("postgresql://u:p@db.example:6432/d?sslmode=verify-full", 7)
    for part in (
        "host=db.example",
        "hostaddr=127.0.0.1",
        "port=7",
        "user=u",
        "password=p",
        "sslmode=verify-full",
    ):
        assert part in through.split()
    assert redis_through("redis://:p@cache.example:6380/3", 7) == "redis://:p@127.0.0.1:7/3"
    assert redis_through("unix:///run/redis.sock?db=2", 7) == "redis://127.0.0.1:7/2"


def test_all_crash_points_of_the_product_are_known() -> None:
    """A host is started with each of them."""
    assert set(POINTS) == set(crashpoints.POINTS)


def test_an_ending_is_told_in_words() -> None:
    """Exit codes and signals."""
    assert (ending(78), ending(-11)) == ("exit code 78", "signal SIGSEGV")


def test_the_facts_of_the_machine_are_there() -> None:
    """Figures mean nothing without them."""
    found = facts()
    assert int(found["cores"]) >= 1
    assert int(found["memory_mb"]) > 0
