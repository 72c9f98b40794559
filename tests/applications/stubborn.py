"""Jobs for the regression tests of bugs that other queues had: they hold the interpreter, start programs, boot slowly.

Where STUBBORN_GATE names a file, the module's import waits for as long as it exists.
"""

import ctypes
import os
import subprocess
import time
from pathlib import Path

from pmqd import App, Job
from tests.applications.trial import note

_gate = os.environ.get("STUBBORN_GATE")
while _gate and Path(_gate).exists():
    time.sleep(0.01)

app = App()


@app.task(queue="trial", name="holds")
def holds(job: Job, seconds: float) -> str:
    """Sits in C with the interpreter's lock: no other thread of this process runs meanwhile."""
    note("S", job)
    ctypes.PyDLL(None).usleep(int(seconds * 1_000_000))
    note("E", job)
    return "done"


@app.task(queue="trial", name="exits")
def exits(job: Job, times: int) -> list[int]:
    """Starts programs that end with 7, and one that is left behind by its parent; asks for the ends of its own."""
    note("S", job)
    found = []
    for _ in range(times):
        subprocess.run(["sh", "-c", "sleep 0.02 & exit 0"], check=True)
        found.append(subprocess.run(["sh", "-c", "exit 7"], check=False).returncode)
    note("E", job)
    return found
