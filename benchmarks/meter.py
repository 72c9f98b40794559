"""A stopwatch for parts of pmqd: wall time, and the CPU time of this process and of the servers that work for it."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Spent:
    """What one part has cost so far, in microseconds, and for how many jobs."""

    jobs: int = 0
    wall: float = 0.0
    cpu: dict[str, float] = field(default_factory=dict)

    def figures(self) -> list[tuple[str, float]]:
        """Per job."""
        each = 1 / max(1, self.jobs)
        return [
            ("µs per job", self.wall * each),
            *((f"µs of {who}'s CPU", used * each) for who, used in self.cpu.items()),
        ]


class Meter:
    """Adds up what parts cost. Parts may lie within each other; then both have the inner one's cost.

    Args:
        servers: the processes whose work counts, by the name that is shown.
    """

    def __init__(self, servers: Mapping[str, int]) -> None:
        self._servers = dict(servers)
        self._counts = True
        self.parts: dict[str, Spent] = {}

    @contextmanager
    def warming(self) -> Iterator[None]:
        """Nothing in this block counts: connections are made, statements prepared, caches filled."""
        self._counts = False
        try:
            yield
        finally:
            self._counts = True

    @contextmanager
    def measured(self, part: str, jobs: int) -> Iterator[None]:
        """Measures the block, which does this part for so many jobs."""
        before = self._cpu()
        begun = time.perf_counter_ns()
        try:
            yield
        finally:
            wall = time.perf_counter_ns() - begun
            after = self._cpu()
            if self._counts:
                spent = self.parts.setdefault(part, Spent())
                spent.jobs += jobs
                spent.wall += wall / 1000
                for who, used in after.items():
                    spent.cpu[who] = spent.cpu.get(who, 0.0) + (used - before[who]) / 1000

    def _cpu(self) -> dict[str, int]:
        """Nanoseconds so far; of a server those of its first thread, which does the work."""
        own = {"Python": time.process_time_ns()}
        return own | {who: _run_ns(pid) for who, pid in self._servers.items()}


def _run_ns(pid: int) -> int:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])
