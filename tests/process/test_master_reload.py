"""SIGHUP on a real master over stub children: what must not happen to the old generation, and what must to the new."""

import os
import signal
import socket

import pytest

from tests.process import master_family
from tests.process.master_family import Family, StartFamily, wait_until

pytestmark = pytest.mark.timeout(60)
start_family = master_family.start_family  # the fixture


def ready_pids(family: Family, generation: int) -> list[int]:
    """Workers of a generation that reported ready."""
    return [event["pid"] for event in family.events("ready", kind="worker", generation=generation)]


def hang_up(family: Family, ends: str) -> None:
    """SIGHUP, and wait until the master says how it ended."""
    times = family.log.count(ends)
    family.signal(signal.SIGHUP)
    family.wait_log(ends, times + 1)


def test_a_broken_file_keeps_the_old_configuration(start_family: StartFamily) -> None:
    """A file that does not parse, or names an unknown setting, is refused with its fault; nobody is replaced."""
    family = start_family("normal")
    family.wait_ready()
    family.config.write_text("[workers")
    hang_up(family, "reload refused")
    family.write("normal", top="no_such_setting = 1")
    hang_up(family, "reload refused")
    assert "no_such_setting" in family.log
    assert len(family.events("started")) == 1
    assert family.stop() == 0


def test_one_worker_more_and_another_log_level(start_family: StartFamily) -> None:
    """Both are in force after the reload; workers and services are new, the old ones ended by themselves."""
    family = start_family("normal", processes=1)
    family.wait_ready()
    old = ready_pids(family, 1)
    family.write("normal", processes=2, top='[log]\nlevel = "debug"\n')
    hang_up(family, "reload done")
    assert len(ready_pids(family, 2)) == 2
    assert {event["level"] for event in family.events("started", generation=2)} == {"debug"}
    wait_until(lambda: family.events("stopped", pid=old[0]), 15, "the old worker's own end")
    wait_until(lambda: family.last("ready", kind="web")["level"] == "debug", 15, "a new web child")
    wait_until(lambda: family.last("ready", kind="maintenance")["generation"] == 2, 15, "a new maintenance")
    maintenance = family.events("stopped", kind="maintenance", generation=1)[0]
    assert maintenance["at"] < family.last("ready", kind="maintenance")["at"]
    assert '"level":"debug","child":"master"' in family.log
    assert family.stop() == 0


def test_services_stay_when_only_workers_change(start_family: StartFamily) -> None:
    """A reload that concerns pools alone does not touch migrator and web; maintenance, which registers the pools, is renewed."""
    family = start_family("normal")
    family.wait_ready()
    family.write("normal", processes=3)
    hang_up(family, "reload done")
    assert len(ready_pids(family, 2)) == 3
    wait_until(lambda: family.last("ready", kind="maintenance")["generation"] == 2, 15, "a new maintenance")
    assert [len(family.events("ready", kind=kind)) for kind in ("migrator", "web")] == [1, 1]


@pytest.mark.parametrize("mode", ["crash", "refuse", "slow_boot"])
def test_a_failing_canary_keeps_the_old_generation(start_family: StartFamily, mode: str) -> None:
    """The first worker of the new generation dies, refuses or never starts: the old one works on, the master too."""
    family = start_family("normal", processes=2, boot_seconds=0.7)
    family.wait_ready(workers=2)
    family.write(mode, processes=2, top="boot_seconds = 0.7")
    hang_up(family, "reload failed, the old generation stays")
    assert family.events("stopped") == []
    assert family.process.poll() is None
    # and it still is the old configuration that fills an empty place
    os.kill(family.last("ready", kind="worker")["pid"], signal.SIGKILL)
    wait_until(lambda: len(ready_pids(family, 1)) == 3, 15, "a worker of the old generation")
    assert family.stop() == 0


def test_no_old_worker_stops_before_the_canary_is_ready(start_family: StartFamily) -> None:
    """Every pool's canary is ready before the first old worker of any pool ends."""
    pools = '[[workers]]\nname = "other"\napp = "stub:normal"\nprocesses = 2\n'
    family = start_family("normal", processes=2)
    family.write("normal", processes=2, pools=pools)
    family.wait_ready(workers=2)
    hang_up(family, "reload done")
    hang_up(family, "reload done")
    canaries = family.events("ready", kind="worker", generation=3)[:2]
    wait_until(lambda: len(family.events("stopped", generation=2)) == 4, 15, "the end of generation 2")
    first = min(event["at"] for event in family.events("stopped", generation=2))
    assert max(event["at"] for event in canaries) < first


def test_a_pool_that_is_gone_is_drained(start_family: StartFamily) -> None:
    """A pool that the new configuration does not have any more ends, once the rest is ready."""
    pools = '[[workers]]\nname = "other"\napp = "stub:normal"\nprocesses = 1\n'
    family = start_family("normal")
    family.wait_ready()
    family.write("normal", pools=pools)
    hang_up(family, "reload done")
    family.write("normal")
    hang_up(family, "reload done")
    wait_until(lambda: len(family.events("stopped", kind="worker")) == 3, 15, "the end of the others")
    assert len(family.events("ready", kind="worker", generation=3)) == 1


def test_a_running_job_outlives_the_reload(start_family: StartFamily) -> None:
    """An old worker ends its job in its own time, longer than drain_seconds, while the new generation works."""
    family = start_family("busy", job="1.5", drain_seconds=0.3)
    family.wait_ready()
    family.write("normal", top="drain_seconds = 0.3")
    hang_up(family, "reload done")
    wait_until(lambda: family.events("job done"), 15, "the end of the job")
    wait_until(lambda: family.last("death"), 15, "the end of its worker")
    assert (family.last("death")["reason"], family.last("death")["code"]) == ("drained", 0)


def test_more_than_the_arena_holds_is_refused(start_family: StartFamily) -> None:
    """Processes or concurrency beyond what was set aside at the start: refused with the limit, nothing changes."""
    family = start_family("normal")
    family.wait_ready()
    family.write("normal", processes=30)
    hang_up(family, "reload refused")
    assert "30 processes; at most 7 without a restart" in family.log
    family.write("normal", pool="concurrency = 500")
    hang_up(family, "reload refused")
    assert "at most 32 without a restart" in family.log
    assert len(family.events("started")) == 1


def test_sigterm_wins_over_a_reload(start_family: StartFamily) -> None:
    """SIGTERM while a canary starts: all stop, exit 0."""
    family = start_family("normal", boot_seconds=20)
    family.wait_ready()
    family.write("slow_boot", top="boot_seconds = 20\ndrain_seconds = 0.5")
    family.signal(signal.SIGHUP)
    wait_until(lambda: family.events("started", generation=2), 15, "the canary")
    assert family.stop() == 0


def test_a_second_hangup_waits_for_the_first(start_family: StartFamily) -> None:
    """Two SIGHUPs give two reloads, one after the other."""
    family = start_family("normal")
    family.wait_ready()
    family.signal(signal.SIGHUP)
    family.wait_log("running -> reloading")
    family.signal(signal.SIGHUP)
    family.wait_log("reload done", 2)
    assert len(ready_pids(family, 3)) == 1


def test_a_first_configuration_that_does_not_work_can_be_replaced(start_family: StartFamily) -> None:
    """A worker that never starts keeps the master from being ready; SIGHUP with a better file makes it so."""
    family = start_family("crash")
    wait_until(lambda: len(family.events("death")) >= 2, 10, "two deaths")
    family.write("normal")
    family.signal(signal.SIGHUP)
    family.wait_ready()
    assert family.stop() == 0


def test_the_web_socket_stays_or_moves(start_family: StartFamily) -> None:
    """An unchanged address accepts through a reload; a taken one is refused; a free one is bound, the old one given up."""
    family = start_family("normal")
    family.wait_ready()
    hang_up(family, "reload done")
    before = family.port
    assert _accepts(before)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        family.port = taken.getsockname()[1]
        family.write("normal")
        hang_up(family, "reload refused")
        assert "Address already in use" in family.log
    assert _accepts(before)
    family.port = master_family.free_port()
    family.write("normal")
    hang_up(family, "reload done")
    assert _accepts(family.port)
    wait_until(lambda: not _accepts(before), 15, "the end of the old address")


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
