"""A real master over stub children: forked, killed, drained. The stubs and what they do are in master_stubs.py."""

import itertools
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.process import master_family
from tests.process.master_family import Family, StartFamily, gone, wait_until
from tests.processes import zombies

pytestmark = pytest.mark.timeout(60)
start_family = master_family.start_family  # the fixture


def wait_replaced(family: Family, kind: str, before: int, timeout: float = 2.0) -> None:
    """Wait for a child of this kind with another pid."""
    wait_until(lambda: family.last("ready", kind=kind)["pid"] != before, timeout, f"a new {kind}")


def test_starts_every_kind_and_stops_with_zero(start_family: StartFamily) -> None:
    """SIGTERM: all stop by themselves, maintenance after it has seen the workers' ends; exit 0, nothing is left."""
    family = start_family("normal", processes=2)
    family.wait_ready(workers=2)
    kinds = sorted(event["kind"] for event in family.events("ready"))
    assert kinds == ["maintenance", "migrator", "web", "worker", "worker"]
    assert family.stop() == 0
    deaths = family.events("death")
    assert [death["reason"] for death in deaths] == ["drained", "drained"]
    last = (
        family.events()[-1] if family.events()[-1]["kind"] == "maintenance" else family.events("stopped")[-1]
    )
    assert last["event"] == "stopped"
    assert max(death["at"] for death in deaths) <= family.last("stopped", kind="maintenance")["at"]


def test_process_titles_and_groups(start_family: StartFamily) -> None:
    """Each child is named after what it is, and is the leader of a process group of its own."""
    family = start_family("normal")
    family.wait_ready()
    worker = family.last("ready", kind="worker")
    assert worker["title"] == f"pmqd: worker {worker['slot']} (stub)"
    assert psutil.Process(family.process.pid).cmdline()[0] == "pmqd: master"
    for event in family.events("ready"):
        assert os.getpgid(event["pid"]) == event["pid"]


def test_children_inherit_only_what_they_need(start_family: StartFamily) -> None:
    """A stray file descriptor of the starter does not reach the children; the web child alone has the socket."""
    stray = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(stray, True)
    high = os.dup2(stray, 90)
    try:
        family = start_family("normal", pass_fds=(high,))
        family.wait_ready()
    finally:
        os.close(stray)
        os.close(high)
    migrator, web = family.last("ready", kind="migrator"), family.last("ready", kind="web")
    assert "90" not in migrator["fds"]
    assert (migrator["socket"], web["socket"]) == (False, True)
    assert len(web["fds"]) == len(migrator["fds"]) + 1


@pytest.mark.parametrize("kind", ["worker", "migrator", "web", "maintenance"])
def test_a_killed_child_is_replaced_within_a_second(start_family: StartFamily, kind: str) -> None:
    """SIGKILL from outside, five times in a row: the place is filled again each time, in less than a second."""
    family = start_family("normal")
    family.wait_ready()
    master = psutil.Process(family.process.pid)
    descriptors = master.num_fds()
    for _ in range(5):
        before = family.last("ready", kind=kind)["pid"]
        began = time.monotonic()
        os.kill(before, signal.SIGKILL)
        wait_replaced(family, kind, before, 1.0)
        assert time.monotonic() - began < 1.0
    family.wait_log("SIGKILL, reason signal")
    wait_until(lambda: master.num_fds() == descriptors, 2, "no more file descriptors than before")
    assert family.stop() == 0


def test_a_dead_workers_slot_waits_for_its_rescue(start_family: StartFamily) -> None:
    """Without rescue no slot is used twice; once maintenance has done it, the lowest ones are used again."""
    family = start_family("normal", processes=1)
    family.wait_ready()
    family.order("no-rescue")
    slots = []
    for _ in range(3):
        worker = family.last("ready", kind="worker")
        slots.append(worker["slot"])
        os.kill(worker["pid"], signal.SIGKILL)
        wait_replaced(family, "worker", worker["pid"])
    assert slots == [0, 1, 2]
    family.revoke("no-rescue")
    wait_until(lambda: len(family.events("death")) == 3, 2, "three rescues")
    os.kill(family.last("ready", kind="worker")["pid"], signal.SIGKILL)
    wait_until(lambda: family.last("ready", kind="worker")["slot"] == 0, 2, "slot 0 used again")


def test_out_of_slots_a_worker_waits_and_says_so(start_family: StartFamily) -> None:
    """All slots dead and nobody rescues: the master says so once and goes on as soon as it can."""
    family = start_family("normal", processes=1)
    family.wait_ready()
    family.order("no-rescue")
    for left in range(7, -1, -1):
        pid = family.last("ready", kind="worker")["pid"]
        os.kill(pid, signal.SIGKILL)
        if left:
            wait_replaced(family, "worker", pid)
    family.wait_log("waits for a slot")
    family.revoke("no-rescue")
    wait_until(lambda: len(family.events("started")) == 9, 2, "the ninth worker")
    assert family.log.count("waits for a slot") == 1


def test_the_death_record_names_the_job(start_family: StartFamily) -> None:
    """What a killed worker was running is readable for maintenance after its death, with the reason."""
    family = start_family("stubborn")
    family.wait_ready()
    os.kill(family.last("ready", kind="worker")["pid"], signal.SIGKILL)
    death = wait_until(lambda: family.last("death"), 2, "the death")
    assert (death["reason"], death["code"]) == ("signal", -signal.SIGKILL)
    assert len(death["running"]) == 1
    assert death["culprit"] is None


def test_an_overdue_job_costs_its_worker_only(start_family: StartFamily) -> None:
    """Past the hard deadline the whole process is killed with reason timeout, and the job is named as culprit."""
    family = start_family("overdue", processes=2)
    wait_until(lambda: family.last("death"), 15, "the death")
    death = family.last("death")
    assert (death["reason"], death["code"]) == ("timeout", -signal.SIGKILL)
    assert death["culprit"] == "00000000-0000-0000-0000-000000000007"
    assert len(death["running"]) == 2
    family.wait_ready(workers=3)
    assert len(family.events("death")) == 1


def test_a_hung_worker_is_aborted_with_its_stack_in_the_log(start_family: StartFamily) -> None:
    """No progress and no job: SIGABRT, which dumps where it stands, then another takes its place."""
    family = start_family("hung")
    death = wait_until(lambda: family.last("death"), 15, "the death")
    assert (death["reason"], death["code"]) == ("hung", -signal.SIGABRT)
    assert "Fatal Python error: Aborted" in family.log
    assert "in hung" in family.log
    wait_until(lambda: len(family.events("ready", kind="worker")) == 2, 15, "a new worker")


def test_a_child_that_does_not_start_is_killed(start_family: StartFamily) -> None:
    """Not ready within boot_seconds: killed, reason boot, tried again."""
    family = start_family("slow_boot", boot_seconds=0.5)
    family.wait_ready()
    death = wait_until(lambda: family.last("death"), 15, "the death")
    assert death["reason"] == "boot"
    family.wait_log("did not become ready within 0.5 s")


def test_a_crash_loop_backs_off_and_stops_nobody_else(start_family: StartFamily) -> None:
    """A worker that dies at its start is tried ever more rarely; the other children stay as they are."""
    family = start_family("crash")
    wait_until(lambda: len(family.events("death")) >= 5, 10, "five deaths")
    times = [event["at"] for event in family.events("started")]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert gaps[0] < 0.5
    assert gaps[3] > gaps[1]
    assert len(family.events("ready", kind="migrator")) == 1
    assert {death["reason"] for death in family.events("death")} == {"boot"}
    assert family.stop() == 0


def test_a_configuration_error_of_a_child_ends_the_master(start_family: StartFamily) -> None:
    """Exit code 78 from a child is the master's exit code, after all others have stopped."""
    family = start_family("refuse")
    assert family.process.wait(10) == 78
    assert "refuses everything" in family.log
    assert family.last("stopped", kind="maintenance")


def test_maintenance_that_dies_while_draining_comes_back(start_family: StartFamily) -> None:
    """What is cut off at the drain's end is rescued even where maintenance was killed meanwhile."""
    family = start_family("stubborn", drain_seconds=1.0)
    family.wait_ready()
    family.signal(signal.SIGTERM)
    family.wait_log("running -> draining")
    os.kill(family.last("ready", kind="maintenance")["pid"], signal.SIGKILL)
    assert family.process.wait(10) == 0
    assert len(family.events("ready", kind="maintenance")) == 2
    assert family.last("death")["reason"] == "drained"


def test_another_error_of_a_child_does_not_end_the_master(start_family: StartFamily) -> None:
    """An error that is none of the fatal ones is tried again."""
    family = start_family("fail")
    wait_until(lambda: len(family.events("death")) >= 2, 10, "two deaths")
    assert family.process.poll() is None


def test_recycling_by_jobs_starts_the_spare_first(start_family: StartFamily) -> None:
    """After max_jobs (give or take a tenth) another worker is ready before the old one is told to go."""
    family = start_family("counting", max_jobs=20)
    stopped = wait_until(lambda: family.last("stopped", kind="worker"), 10, "a recycled worker")
    spare = family.events("ready", kind="worker")[1]
    assert spare["at"] < stopped["at"]
    assert 18 <= family.events("ready", kind="worker")[0]["max_jobs"] <= 22
    wait_until(lambda: family.last("death"), 2, "its death")
    assert family.last("death")["reason"] == "recycled"


def test_recycling_by_memory(start_family: StartFamily) -> None:
    """A worker that holds more than max_memory_mb gives way to a fresh one."""
    family = start_family("eating", max_memory_mb=75)
    death = wait_until(lambda: family.last("death"), 10, "the death")
    assert (death["reason"], death["code"]) == ("recycled", 0)


def test_drain_waits_for_the_running_job(start_family: StartFamily) -> None:
    """A job that ends within drain_seconds ends by itself; maintenance and web are there meanwhile."""
    family = start_family("busy", job="1.0")
    family.wait_ready()
    family.signal(signal.SIGTERM)
    assert family.process.wait(10) == 0
    assert family.last("job done")["at"] <= family.last("stopped", kind="web")["at"]
    assert family.last("death")["reason"] == "drained"


def test_drain_deadline_kills_without_a_culprit(start_family: StartFamily) -> None:
    """A job that outlasts drain_seconds is cut: reason drained, nobody's fault, rescued before maintenance goes."""
    family = start_family("stubborn", drain_seconds=0.5)
    family.wait_ready()
    began = time.monotonic()
    assert family.stop() == 0
    assert 0.5 <= time.monotonic() - began < 5
    death = family.last("death")
    assert (death["reason"], death["code"], death["culprit"]) == ("drained", -signal.SIGKILL, None)
    assert len(death["running"]) == 1


def test_a_second_signal_stops_now(start_family: StartFamily) -> None:
    """SIGTERM and then SIGINT: nobody waits for the job, but its worker is still rescued; exit 0."""
    family = start_family("stubborn", drain_seconds=60)
    family.wait_ready()
    family.signal(signal.SIGTERM)
    family.wait_log("running -> draining")
    began = time.monotonic()
    family.signal(signal.SIGINT)
    assert family.process.wait(10) == 0
    assert time.monotonic() - began < 3
    assert family.last("death")["reason"] == "drained"


def test_nothing_outlives_a_killed_master(start_family: StartFamily) -> None:
    """SIGKILL to the master: a second later no child lives, nor what jobs started, in sessions of their own either."""
    family = start_family("parent", processes=2)
    family.wait_ready(workers=2)
    pids = [event["pid"] for event in family.events("ready")]
    pids += [pid for event in family.events("ready", kind="worker") for pid in event["offspring"]]
    assert all(psutil.pid_exists(pid) for pid in pids)
    family.process.kill()
    wait_until(lambda: gone(pids), 1.0, "the end of all descendants")
    family.process.wait(5)


def test_a_stuck_family_does_not_outlive_its_master(start_family: StartFamily) -> None:
    """The same where every child is stopped (SIGSTOP) but one service, whose watcher is enough."""
    family = start_family("parent")
    family.wait_ready()
    pids = {event["kind"]: event["pid"] for event in family.events("ready")}
    everybody = [*pids.values(), *family.last("ready", kind="worker")["offspring"]]
    for kind in ("worker", "migrator", "web"):
        os.kill(pids[kind], signal.SIGSTOP)
    family.process.kill()
    wait_until(lambda: gone(everybody), 1.0, "the end of all descendants")
    family.process.wait(5)


def test_what_a_dead_worker_started_dies_with_it(start_family: StartFamily) -> None:
    """Killing one worker ends the programs that its jobs started, in sessions of their own too, and no zombie stays."""
    family = start_family("parent", processes=2)
    family.wait_ready(workers=2)
    first, second = family.events("ready", kind="worker")
    os.kill(first["pid"], signal.SIGKILL)
    wait_until(lambda: gone([first["pid"], *first["offspring"]]), 1.0, "the end of its offspring")
    assert not gone(second["offspring"][:1])
    master = psutil.Process(family.process.pid)

    wait_until(lambda: not zombies(master.children(recursive=True)), 2.0, "no zombies")


def test_a_second_instance_on_the_same_folder_is_refused(start_family: StartFamily) -> None:
    """The lock is held: the second waits a while and then names the folder; exit 78."""
    family = start_family("normal")
    family.wait_ready()
    other = start_family("normal", state_dir=family.state_dir)
    assert other.process.wait(10) == 78
    assert f"state_dir {family.state_dir}: another pmqd runs with it" in other.log
    assert family.process.poll() is None


def test_the_next_master_learns_the_old_identity(start_family: StartFamily) -> None:
    """After a kill the next master waits for the dying family, takes a new identity and passes the old one on."""
    family = start_family("normal")
    family.wait_ready()
    before = family.last("ready", kind="maintenance")
    assert before["previous"] is None
    settles = family.state_dir / "settles"
    settles.mkdir()
    (family.state_dir / "metrics" / "counter_worker-0.db").touch()
    family.process.kill()
    after = start_family("normal", state_dir=family.state_dir)
    after.wait_ready()
    fresh = after.last("ready", kind="maintenance")
    assert fresh["previous"] == before["instance"] != fresh["instance"]
    assert settles.is_dir()
    assert not (family.state_dir / "metrics" / "counter_worker-0.db").exists()


def test_signals_resize_the_first_pool_and_dump_the_state(start_family: StartFamily) -> None:
    """SIGTTIN adds a worker, SIGTTOU takes one away (never the last), SIGUSR1 writes everything to the log."""
    family = start_family("normal")
    family.wait_ready()
    family.signal(signal.SIGTTIN)
    family.wait_ready(workers=2)
    family.signal(signal.SIGTTOU)
    wait_until(lambda: len(family.events("stopped", kind="worker")) == 1, 15, "one worker less")
    family.signal(signal.SIGTTOU)
    family.wait_log("the first pool stays as it is")
    family.signal(signal.SIGUSR1)
    family.wait_log("state: running, generation 1")
    family.wait_log("state: worker")


def test_a_crash_point_acts_once(start_family: StartFamily) -> None:
    """PMQD_CRASHPOINT kills one process at the named place, and not the one after it."""
    flag = None

    def prepare(family: Family) -> dict[str, str]:
        nonlocal flag
        flag = family.dir / "flag"
        flag.touch()
        return {"PMQD_CRASHPOINT": f"boot=kill@{flag}"}

    family = start_family("normal", environ=prepare)
    family.wait_ready()
    assert [event["event"] for event in family.events(kind="worker")][:3] == ["started", "started", "ready"]
    assert flag is not None
    assert not flag.exists()


def test_the_master_loads_no_store() -> None:
    """Importing the master brings in neither store, nor broker, nor metrics, and starts no thread."""
    program = """
import sys, os, pmqd.master
found = {"pmqd.store", "pmqd.broker", "pmqd.client", "pmqd.metrics", "prometheus_client", "uvicorn"} & set(sys.modules)
assert not found, found
assert len(os.listdir("/proc/self/task")) == 1
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False, timeout=30)
    assert done.returncode == 0, done.stderr
