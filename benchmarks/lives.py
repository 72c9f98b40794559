"""Ten thousand worker lives: `python -m benchmarks.lives [--lives 10000]`.

One daemon whose workers are replaced after two jobs each; a part of them is killed (SIGKILL) instead. Before and after, what
could grow is counted: the master's descriptors, memory and threads, zombies, shared memory, temporary files, files in
state_dir, and the series on /metrics.
"""

import argparse
import contextlib
import platform
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from benchmarks.recovery import Rig, rig, wait
from tests.fix_daemon import Daemon
from tests.history import statuses

PROCESSES = 6
JOBS_PER_LIFE = 2
KILL_EVERY_SECONDS = 1.0
WARM_LIVES = 200
"""After so many lives everything that is made once has been made."""
GROWTH_KB = 2048


@dataclass(frozen=True)
class Look:
    """What could have grown."""

    master_fds: int
    master_threads: int
    master_kb: int
    zombies: int
    processes: int
    shared_memory: int
    temporary: int
    state_files: int
    series: int


def look(daemon: Daemon) -> Look:
    """Counts it now."""
    master = psutil.Process(daemon.pid)
    family = daemon.family()
    children = master.children(recursive=True)
    return Look(
        master.num_fds(),
        master.num_threads(),
        master.memory_info().rss // 1024,
        sum(process.status() == psutil.STATUS_ZOMBIE for process in children),
        len(family),
        _entries("/dev/shm"),
        _entries(str(daemon.config.parent / "tmp")),
        sum(1 for path in Path(daemon.settings["state_dir"]).rglob("*") if path.is_file()),
        sum(1 for line in daemon.get("/metrics", 30).text.splitlines() if line and not line.startswith("#")),
    )


def _entries(folder: str) -> int:
    return sum(1 for _ in Path(folder).iterdir())


def lived(daemon: Daemon) -> int:
    """How many workers have ended so far."""
    lines = daemon.get("/metrics", 30).text.splitlines()
    return int(
        sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("pmqd_worker_exits_total{"))
    )


def feed(one: Rig, stop: threading.Event) -> None:
    """Keeps jobs coming."""
    with one.connect() as connection:
        while not stop.wait(0.2):
            found = connection.execute("select count(*) from pmqd.jobs where ready").fetchone()
            if found is not None and found[0] < 100:
                connection.execute(
                    "insert into pmqd.jobs (queue_name, kind, payload)"
                    " select 'trial', 'nothing', '{}' from generate_series(1, 100)"
                )


def kill_some(daemon: Daemon, stop: threading.Event) -> None:
    """SIGKILL to some worker every second."""
    while not stop.wait(KILL_EVERY_SECONDS):
        for process in daemon.children("worker")[:1]:
            with contextlib.suppress(psutil.NoSuchProcess):  # its life was over by itself
                process.kill()


def in_background(*works: Callable[[], None]) -> list[threading.Thread]:
    """Starts each in a thread."""
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    return threads


def main() -> None:
    """Lives, looks, compares.

    Raises:
        SystemExit: something grew, or a job was lost or done twice.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lives", description=__doc__)
    parser.add_argument("--lives", type=int, default=10_000)
    lives = parser.parse_args().lives
    print(f"{platform.platform()}, Python {platform.python_version()}", flush=True)
    with rig() as one:
        pool = {"app": "tests.applications.trial:app", "processes": PROCESSES, "max_jobs": JOBS_PER_LIFE}
        daemon = one.daemon(workers=[pool], log={"format": "json", "level": "warning"}).wait_ready(60)
        stop = threading.Event()
        threads = in_background(lambda: feed(one, stop), lambda: kill_some(daemon, stop))
        try:
            begun = time.monotonic()
            wait(lambda: lived(daemon) >= WARM_LIVES, 600, f"{WARM_LIVES} lives")
            before = look(daemon)
            while (count := lived(daemon)) < lives:
                print(f"  {count} lives", file=sys.stderr, flush=True)
                time.sleep(5)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        with one.connect() as connection:
            wait(lambda: set(statuses(connection)) == {"completed"}, 120, "all completed")
        after = look(daemon)
        print(f"{lived(daemon)} worker lives in {time.monotonic() - begun:.0f} s")
        grown = compare(before, after)
        if daemon.stop() != 0 or grown:
            sys.exit(f"grown: {', '.join(grown) or 'nothing'}; exit code {daemon.process.returncode}")


def compare(before: Look, after: Look) -> list[str]:
    """Prints both, and says what grew. Processes come and go; memory may move by 2 MiB."""
    grown = []
    for name, first in asdict(before).items():
        last = asdict(after)[name]
        print(f"  {name:<16}{first:>10}{last:>10}")
        allowed = {"master_kb": GROWTH_KB, "processes": PROCESSES, "zombies": 1}.get(name, 0)
        if last > first + allowed:
            grown.append(name)
    return grown


if __name__ == "__main__":
    main()
