"""The fixtures that other tests trust: a daemon starts and ends, and what it leaves is found."""

import signal
import subprocess
import sys

import psutil
import pytest

from tests.fix_daemon import MakeDaemon, _own_children
from tests.fix_servers import WaitUntil


def test_a_daemon_starts_answers_and_ends(daemon: MakeDaemon) -> None:
    """A ready daemon has one child of each kind and two workers, ends with 0 on SIGTERM, and leaves none of them."""
    instance = daemon()
    assert instance.get("/healthz").status_code == 200
    kinds = {kind: len(instance.children(kind)) for kind in ("migrator", "maintenance", "web", "worker")}
    assert kinds == {"migrator": 1, "maintenance": 1, "web": 1, "worker": 2}
    family = instance.family()
    assert instance.stop() == 0
    instance.check_nothing_left(0.0)
    assert not any(process.is_running() for process in family)
    assert all(record["child"] for record in instance.records)


def test_a_daemon_that_cannot_start_is_told(daemon: MakeDaemon) -> None:
    """Waiting for a daemon that ended fails at once, with its exit code and what it said."""
    instance = daemon({"web": {"listen": "nonsense"}}, wait=False)
    with pytest.raises(pytest.fail.Exception, match=r"ended with 78:\n.*web\.listen = 'nonsense'"):
        instance.wait_ready()


def test_what_outlives_a_daemon_is_found(daemon: MakeDaemon) -> None:
    """A process that stays in the daemon's session after its end fails the check, and is ended by it."""
    instance = daemon({"web": {"listen": "nonsense"}}, wait=False)
    instance.process.wait()
    # What a leaked grandchild would be: alive, in a session whose leader is the daemon.
    leaked = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True
    )
    instance.process.pid = leaked.pid
    with pytest.raises(pytest.fail.Exception, match=rf"live on: \['{leaked.pid} "):
        instance.check_nothing_left(0.1)
    assert leaked.wait(5) == -signal.SIGKILL
    leaked.communicate()


def test_a_forgotten_child_is_found(wait_until: WaitUntil) -> None:
    """The check after each test sees a child that runs, and one that nobody waited for."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert [process.pid for process in _own_children()] == [child.pid]
        child.kill()
        wait_until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE, 5, "the zombie")
        assert [process.pid for process in _own_children()] == [child.pid]
    assert _own_children() == []
