"""The checker sees: every broken variant of the product ends a run with exit code 1 and the right word for what broke."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pmqd.chaos.mutants import MUTANTS

SEED = 5
RUN_SECONDS = 110.0
"""A run's own limit on a busy machine; on a free one the slowest takes less than a minute."""


@dataclass(frozen=True)
class Size:
    """A run in which a mutant is caught without fail, and no larger."""

    jobs: int = 800
    faults: int = 0
    only: str = ""
    hosts: int = 1
    workers: int = 2


def size(name: str) -> Size:
    """A few faults of those that bring a mutant out; none where the load alone does."""
    mutant = MUTANTS[name]
    if name in SIZES:
        return SIZES[name]
    hosts = 2 if name in TWO_HOSTS else 1
    return Size(1200 if mutant.faults else 800, 3 * len(mutant.faults), ",".join(mutant.faults), hosts)


SIZES = {
    "claim_closed_early": Size(3000, 16, "worker_kill,worker_kill_all"),
    "dead_not_credited": Size(2400, 10, "worker_crash_settled"),
    "claim_of_the_running": Size(2400, 12, "wire_push_unanswered,redis_flush,redis_kill"),
    "lease_by_wall_clock": Size(4000, 12, "postgres_crash,wire_postgres_cut,wire_postgres_held", hosts=2),
    "newest_first": Size(8000, workers=1),
    "rescue_of_the_living": Size(3000, 10, "maintenance_freeze", hosts=2),
    "settle_repeated": Size(1200, 6, "wire_settle_unanswered"),
}
"""Where three of each fault are not enough, or too many, or the load has to be another."""

TWO_HOSTS = frozenset(
    {
        "attempt_as_token",
        "lease_by_wall_clock",
        "settle_without_token",
    }
)
"""Those that need somebody else to take over."""


def run(folder: Path, name: str | None, wanted: Size) -> tuple[int, dict[str, Any], str]:
    """One run; its exit code, its report, what it printed."""
    report = folder / "report.json"
    command = [sys.executable, "-m", "pmqd.chaos", "--seed", str(SEED), "--jobs", str(wanted.jobs)]
    command += ["--faults", str(wanted.faults), "--json", str(report), "--folder", str(folder / "run")]
    command += ["--workers", str(wanted.workers), "--hosts", str(wanted.hosts)]
    command += ["--only", wanted.only] if wanted.only else []
    command += ["--mutant", name] if name else []
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=RUN_SECONDS, check=False, env=dict(os.environ)
    )
    text = done.stdout + done.stderr
    return done.returncode, json.loads(report.read_text()) if report.exists() else {}, text


def counts(report: dict[str, Any]) -> dict[str, int]:
    """How often each invariant broke."""
    found: dict[str, int] = (report.get("report") or {}).get("counts", {"no report": 1})
    return found


@pytest.mark.timeout(150)
@pytest.mark.parametrize("name", sorted(name for name, mutant in MUTANTS.items() if mutant.broken))
def test_mutant_is_caught(name: str, tmp_path: Path) -> None:
    """A run of this variant, with the faults that bring it out, ends with 1 and counts what the variant breaks."""
    code, report, text = run(tmp_path, name, size(name))
    found = {count for count, number in counts(report).items() if number}
    assert code == 1, text[-4000:]
    assert found & set(MUTANTS[name].caught_by), f"{found}\n{text[-4000:]}"


EVERY_FAULT = sorted({fault for mutant in MUTANTS.values() if mutant.broken for fault in mutant.faults})


@pytest.mark.timeout(200)
@pytest.mark.parametrize("mutant", [None, "short_lease"])
def test_the_product_holds_under_the_same_faults(mutant: str | None, tmp_path: Path) -> None:
    """What catches the mutants is not the faults: under all of them the product holds, with its own lease and a shorter one."""
    faults = (
        MUTANTS["short_lease"].faults
        if mutant
        else [name for name in EVERY_FAULT if name != "host_outlives_lease"]
    )
    code, report, text = run(tmp_path, mutant, Size(3000, len(faults), ",".join(faults), hosts=2))
    assert not {count: number for count, number in counts(report).items() if number}, text[-4000:]
    assert code == 0, text[-4000:]
