"""The machine's facts, on which every figure depends."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

from benchmarks.peers.tools import ROOT, versions
from pmqd.chaos.machine import facts
from pmqd.programs import postgres_programs, redis_program, run


def describe(*, peers: bool) -> str:
    """The machine, the servers, pmqd, and where wanted the peers; a few lines."""
    known = facts()
    lines = [
        f"{_cpu()}, {known['cores']} cores, {int(known['memory_mb']) / 1024:.0f} GiB, load {os.getloadavg()[0]:.1f}",
        f"{platform.system()} {known['kernel']}, Python {known['python']}",
        f"{_said(str(postgres_programs() / 'postgres'))} with fsync and synchronous_commit; {_said(str(redis_program()))} without persistence",
        f"pmqd {version('pmqd')} at {_commit()}",
    ]
    if peers:
        lines.append(", ".join(f"{name} {number}" for name, number in sorted(versions().items())))
    return "\n".join(lines)


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _said(program: str) -> str:
    return run([program, "--version"], seconds=10)[1].partition("sha=")[0].strip()


def _commit() -> str:
    """The commit of this checkout, with a + where files differ from it."""
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return told.stdout.strip() or "no commit"
