"""A master over stub children, run as a program: `python master_stubs.py CONFIG`.

The stubs need no store. What a worker does is named by its pool's `app`, "stub:MODE"; every child appends what happens
to it to `events.jsonl` in the folder named by STUB_DIR, and looks there for files that tell it to behave otherwise.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from uuid import UUID, uuid4

from pmqd import config, master
from pmqd.arena import Kind, State
from pmqd.children import ChildSpec
from pmqd.crashpoints import checkpoint
from pmqd.errors import ConfigError, PmqdError
from pmqd.process import ChildContext, run_loop

DIR = Path(os.environ["STUB_DIR"])
JOB = UUID(int=7)


def tell(context: ChildContext, event: str, **more: object) -> None:
    """Append one event; a line is written whole."""
    line = {
        "event": event,
        "pid": os.getpid(),
        "kind": context.kind,
        "slot": context.slot.index,
        "generation": context.slot.generation,
        "worker_id": context.worker_id,
        "at": time.monotonic(),
        **more,
    }
    with (DIR / "events.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def service(context: ChildContext) -> None:
    """A migrator or web stub: reports ready, turns."""
    if (DIR / f"{context.kind}-fails").exists():
        sys.exit(3)
    tell(
        context,
        "ready",
        socket=context.web_socket is not None,
        fds=sorted(entry.name for entry in Path("/proc/self/fd").iterdir()),
        level=context.settings.log.level,
    )
    context.report_ready()
    run_loop(context, lambda _: 0.2)
    tell(context, "stopped")


def maintenance(context: ChildContext) -> None:
    """Maintenance's stub: notes each death, acknowledges it."""
    previous = " ".join(map(str, context.previous_instances)) or None
    tell(context, "ready", previous=previous, instance=str(context.arena.instance_id))
    context.report_ready()

    def poll(_: float) -> float:
        context.arena.lease_renewed()
        for slot in context.arena.slots:
            death = slot.death()
            if (
                slot.kind == Kind.WORKER
                and death
                and slot.state == State.DEAD
                and not (DIR / "no-rescue").exists()
            ):
                tell(
                    context,
                    "death",
                    of=slot.worker_id,
                    reason=death.reason,
                    code=death.exit_code,
                    culprit=str(death.culprit) if death.culprit else None,
                    running=[str(job.job_id) for job in slot.running()],
                )
                slot.rescued()
        return 0.2

    run_loop(context, poll)
    tell(context, "stopped")


def worker(context: ChildContext) -> int | None:
    """A worker's stub."""
    assert context.pool is not None
    tell(context, "started", mode=context.pool.app, level=context.settings.log.level)
    checkpoint("boot")
    return MODES[context.pool.app.partition(":")[2]](context)


def normal(context: ChildContext) -> None:
    """Works until it is told to stop."""
    tell(context, "ready", title=Path("/proc/self/cmdline").read_bytes().split(b"\0")[0].decode())
    context.report_ready()
    run_loop(context, lambda _: 0.2)
    tell(context, "stopped")


def counting(context: ChildContext) -> None:
    """Does a job each turn."""

    def poll(_: float) -> float:
        context.slot.jobs_done += 1
        return 0.02

    tell(context, "ready", max_jobs=context.max_jobs)
    context.report_ready()
    run_loop(context, poll)
    tell(context, "stopped", jobs=context.slot.jobs_done)


def eating(context: ChildContext) -> None:
    """Holds 60 MiB more than it needs."""
    tell(context, "ready")
    context.report_ready()
    held = bytearray(b"x") * (60 << 20) if not (DIR / "eaten").exists() else b""
    (DIR / "eaten").touch()
    run_loop(context, lambda _: 0.2)
    tell(context, "stopped", held=len(held))


def busy(context: ChildContext) -> None:
    """Runs one job as long as the file `job` says, drains by waiting for it."""
    tell(context, "ready")
    context.report_ready()
    seconds = float((DIR / "job").read_text())
    context.slot.begin(0, JOB, uuid4(), time.monotonic() + seconds + 60)
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        context.slot.progress()
        time.sleep(0.02)
    context.slot.end(0)
    tell(context, "job done")
    run_loop(context, lambda _: 0.2)
    tell(context, "stopped")


def overdue(context: ChildContext) -> None:
    """The first process runs a job past its hard deadline, in a loop that hears nothing."""
    if _first("overdue"):
        context.report_ready()
        context.slot.begin(1, uuid4(), uuid4(), None)
        context.slot.begin(0, JOB, uuid4(), time.monotonic() + 0.3)
        tell(context, "ready")
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        time.sleep(60)
    normal(context)


def hung(context: ChildContext) -> None:
    """The first process reports ready and then nothing more."""
    tell(context, "ready")
    context.report_ready()
    if _first("hung"):
        time.sleep(60)
    run_loop(context, lambda _: 0.2)


def slow_boot(context: ChildContext) -> None:
    """The first process never becomes ready."""
    if _first("slow"):
        time.sleep(60)
    normal(context)


def crash(context: ChildContext) -> int:
    """Dies before it is ready."""
    return 3


def refuse(context: ChildContext) -> None:
    """Finds the configuration bad."""
    raise ConfigError("workers.stub.app = 'stub:refuse': refuses everything")


def fail(context: ChildContext) -> None:
    """Ends with an error on purpose that is none of the fatal ones."""
    raise PmqdError("cannot go on")


def stubborn(context: ChildContext) -> None:
    """Runs a job without end, hears no stop."""
    context.report_ready()
    context.slot.begin(0, JOB, uuid4(), None)
    tell(context, "ready")
    while True:
        context.slot.progress()
        time.sleep(0.05)


def parent(context: ChildContext) -> None:
    """Has started programs, one of them in a session of its own, and a fork."""
    children = [
        subprocess.Popen(["sleep", "60"]),
        subprocess.Popen(["sleep", "60"], start_new_session=True),
    ]
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    context.slot.begin(0, JOB, uuid4(), None)
    tell(context, "ready", offspring=[pid, *(child.pid for child in children)])
    context.report_ready()
    run_loop(context, lambda _: 0.2)


def environment(context: ChildContext) -> None:
    """Tells which variables a program that it starts has."""
    names = subprocess.run(["env"], capture_output=True, check=True, text=True).stdout
    tell(context, "ready", environ=[line.partition("=")[0] for line in names.splitlines()])
    context.report_ready()
    run_loop(context, lambda _: 0.2)


def _first(name: str) -> bool:
    try:
        (DIR / f"first-{name}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


MODES = {
    "normal": normal,
    "counting": counting,
    "eating": eating,
    "busy": busy,
    "overdue": overdue,
    "hung": hung,
    "slow_boot": slow_boot,
    "crash": crash,
    "refuse": refuse,
    "fail": fail,
    "stubborn": stubborn,
    "parent": parent,
    "environment": environment,
}

SPECS = {
    spec.kind: spec
    for spec in (
        ChildSpec(Kind.MAINTENANCE, maintenance, overlap=False, stop_seconds=3.0, metrics=False),
        ChildSpec(Kind.MIGRATOR, service, metrics=False),
        ChildSpec(
            Kind.WORKER, worker, hung_seconds=2.5, must_progress=True, stop_seconds=None, metrics=False
        ),
        ChildSpec(Kind.WEB, service, metrics=False),
    )
}

if __name__ == "__main__":
    try:
        path = Path(sys.argv[1])
        sys.exit(master.run(config.load(path), path, specs=SPECS))
    except PmqdError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
