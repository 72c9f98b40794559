"""An application of jobs that mean harm, or carry secrets; for the tests of what they cannot do."""

import ctypes
import os
import random
import signal
import sys
import time
from types import FrameType

from pmqd import App, Job
from pmqd.slot import Family, Slot

app = App()


def own_record() -> tuple[Slot, Family]:
    """What the worker that runs this job has of the shared memory, found in the frames that called the job."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        found = getattr(frame.f_locals.get("self"), "slot", None)
        if isinstance(found, Slot):
            return found, found.arena
        frame = frame.f_back
    raise LookupError("no slot in the frames")


@app.task(queue="hostile", name="raises", max_attempts=1)
def raises(job: Job, text: str) -> None:
    """Fails with a text, and prints one."""
    sys.stdout.write("printed by a job\n")
    sys.stdout.flush()
    raise ValueError(text)


@app.task(queue="hostile", name="nothing")
def nothing(job: Job) -> str:
    """Does its work."""
    return "done"


@app.task(queue="hostile", name="typed", max_attempts=1)
def typed(job: Job, secret: int) -> None:
    """Wants a number; whoever sends a text gets it back in the error."""


@app.task(queue="hostile", name="dies", max_attempts=1)
def dies(job: Job, secret: str) -> None:
    """Ends its process while a secret is in its memory."""
    os.kill(os.getpid(), signal.SIGABRT)


@app.task(queue="hostile", name="vandal", max_attempts=1)
def vandal(job: Job, seed: int, seconds: float) -> None:
    """Writes random bytes over its own worker's record in the shared memory, again and again."""
    slot, arena = own_record()
    chance = random.Random(seed)
    start, size = slot.base * 8, slot.size(arena.entries, arena.tokens) * 8
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        piece = chance.choice([8, 64, 512, 4096])
        at = start + chance.randrange(0, min(size, 65536) - piece)
        arena.memory[at : at + piece] = chance.choice(
            [chance.randbytes(piece), b"\xff" * piece, bytes(piece)]
        )
        time.sleep(0.001)
    if seed % 2:
        os.kill(os.getpid(), signal.SIGKILL)


@app.task(queue="hostile", name="traces", max_attempts=1)
def traces(job: Job, pid: int) -> dict[str, int]:
    """Tries to trace the master, to read its memory and to signal processes that are not its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    attach = 16
    traced = libc.ptrace(attach, pid, 0, 0)
    if traced == 0:
        os.waitpid(pid, 0x40000000)
        detach = 17
        libc.ptrace(detach, pid, 0, 0)
    return {"traced": traced, "uid": os.getuid(), "no_new_privs": libc.prctl(39, 0, 0, 0, 0)}


@app.task(queue="hostile", name="kills", max_attempts=1)
def kills(job: Job, pid: int) -> None:
    """Kills the master: the same user may."""
    os.kill(pid, signal.SIGKILL)
    time.sleep(30)
