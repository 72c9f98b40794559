"""`pmqd` as a user calls it: a process of its own."""

import subprocess
import sys
from pathlib import Path
from uuid import UUID

from tests.fix_daemon import ROOT, clean_environ


def pmqd(config: Path | None, *arguments: str, timeout: float = 30.0) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    given = [] if config is None else ["--config", str(config)]
    return subprocess.run(
        [sys.executable, "-m", "pmqd", *arguments, *given],
        check=False,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=timeout,
        cwd=ROOT,
        env=clean_environ(),
    )


def show(config: Path, job_id: UUID) -> str:
    """What `pmqd jobs show` prints for people."""
    done = pmqd(config, "jobs", "show", str(job_id))
    assert done.returncode == 0, done.stderr
    return done.stdout
