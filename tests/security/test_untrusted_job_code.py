"""What a job can do to the daemon that runs it, as docs/security.md has it: nothing here keeps it from what its user may."""

import re
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.fix_daemon import MakeDaemon
from tests.fix_servers import WaitUntil
from tests.history import enqueue, job

ROOT = Path(__file__).parents[2]
UNIT = (ROOT / "systemd" / "pmqd.service").read_text()
CONFINED = {
    "NoNewPrivileges": "yes",
    "CapabilityBoundingSet": "",
    "AmbientCapabilities": "",
    "UMask": "0077",
    "LimitCORE": "0",
    "ProtectSystem": "full",
    "ProtectProc": "invisible",
    "ProtectKernelTunables": "yes",
    "RestrictNamespaces": "yes",
    "RestrictSUIDSGID": "yes",
    "SystemCallFilter": "@system-service",
    "SystemCallArchitectures": "native",
    "User": "pmqd",
    "SyslogLevelPrefix": "no",
}
HOSTILE = {"workers": [{"app": "tests.security.hostile_app:app", "processes": 1}]}


@pytest.mark.parametrize("setting", CONFINED)
def test_untrusted_job_code_the_unit_confines_it(setting: str) -> None:
    """The shipped unit says so; `@system-service` does not hold ptrace, which is in `@debug`."""
    [value] = re.findall(rf"^{setting}=(.*)$", UNIT, re.MULTILINE)
    assert value == CONFINED[setting]


def test_untrusted_job_code_may_trace_the_master_of_its_own_user(
    daemon: MakeDaemon, connection: psycopg.Connection[Any], wait_until: WaitUntil
) -> None:
    """Without the unit nothing forbids it (or the kernel does): either way the master lives on and jobs run."""
    running = daemon(HOSTILE)
    tried = enqueue(connection, "traces", queue="hostile", pid=running.pid)
    wait_until(lambda: job(connection, tried)["status"] == "completed", 30, "the attempt")
    assert job(connection, tried)["result"]["traced"] in (0, -1)
    after = enqueue(connection, "nothing", queue="hostile")
    wait_until(lambda: job(connection, after)["status"] == "completed", 30, "the next job")
    assert running.process.poll() is None


def test_untrusted_job_code_that_kills_the_master_ends_with_it(
    daemon: MakeDaemon, connection: psycopg.Connection[Any], wait_until: WaitUntil
) -> None:
    """The same user may kill the master. Nothing of the family survives that, and the next daemon gives the job back, charged
    or failed: it does not run for ever.
    """
    running = daemon(HOSTILE)
    killer = enqueue(connection, "kills", queue="hostile", pid=running.pid)
    wait_until(lambda: running.process.poll() is not None, 30, "the master's end")
    running.check_nothing_left()
    # A new instance takes the lease over; the job has one attempt, so it may end or be given back as interrupted.
    assert job(connection, killer)["status"] in ("running", "failed")


def test_untrusted_job_code_is_documented() -> None:
    """docs/security.md says what workers are not, and what to do about it."""
    text = " ".join((ROOT / "docs" / "security.md").read_text().split())
    for words in ("no sandbox", "a user of its own", "ptrace", "NoNewPrivileges", "/proc"):
        assert words in text
