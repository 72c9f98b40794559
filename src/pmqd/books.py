"""The value files of one slot: counters and histograms in prometheus-client's multiprocess format, and how a count happens once.

A count touches many cells of two files, and a process may die between any two of them. So a count that must be exact
is written down first as what each cell is going to hold (to a receipt, which keeps it in the arena): to write these
figures again changes nothing, whoever does it, as long as nobody else has counted in the same book meanwhile.
"""

import json
import math
import os
import struct
import threading
from array import array
from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol
from uuid import UUID

from prometheus_client.metrics_core import Metric
from prometheus_client.mmap_dict import MmapedDict as _MmapedDict
from prometheus_client.mmap_dict import mmap_key
from prometheus_client.multiprocess import MultiProcessCollector as _MultiProcessCollector
from prometheus_client.utils import floatToGoString as _FloatToGoString

# The package is typed, these parts of it are not.
MmapedDict: Any = _MmapedDict
MultiProcessCollector: Any = _MultiProcessCollector
float_to_go_string: Any = _FloatToGoString

MAX_PAIRS: Final = 200
"""Distinct (queue, kind) pairs that get series of their own; later ones are counted under "other"."""
OTHER: Final = "other"

DURATION_BUCKETS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
PICKUP_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

PAIR = ("queue", "kind")
COUNTERS: Final[dict[str, tuple[tuple[str, ...], str]]] = {
    "pmqd_jobs_migrated": (PAIR, "Jobs marked and offered to Redis."),
    "pmqd_jobs_started": (PAIR, "Attempts whose user code started."),
    "pmqd_jobs_completed": (PAIR, "Jobs that completed."),
    "pmqd_jobs_failed": (PAIR, "Jobs that ended as failed."),
    "pmqd_jobs_retried": (PAIR, "Attempts that ended with a later retry."),
    "pmqd_rescued": (("queue",), "Attempts given back because their process or host was gone."),
    "pmqd_poisoned": (("queue",), "Jobs that failed because they ended the process they ran in."),
    "pmqd_reoffered": (("queue",), "Hints pushed again because Redis did not have them."),
    "pmqd_stolen": (("queue",), "Jobs claimed without a hint."),
    "pmqd_stale_settles": ((), "Settles refused because the job had been taken from its owner."),
}
HISTOGRAMS: Final[dict[str, tuple[tuple[float, ...], str]]] = {
    "pmqd_job_duration_seconds": (DURATION_BUCKETS, "How long an attempt ran."),
    "pmqd_job_pickup_seconds": (PICKUP_BUCKETS, "From ready (run_at) to the start of the handler."),
}


class OutcomeLike(Protocol):
    """What `count_outcomes` reads of a `pmqd.job.Outcome`."""

    @property
    def job_id(self) -> UUID: ...  # noqa: D102 - named as the column
    @property
    def action(self) -> str: ...  # noqa: D102 - named as the field
    @property
    def started(self) -> object: ...  # noqa: D102 - named as the column
    @property
    def duration_seconds(self) -> float: ...  # noqa: D102 - named as the field
    @property
    def queue_name(self) -> str: ...  # noqa: D102 - named as the column
    @property
    def kind(self) -> str | None: ...  # noqa: D102 - named as the column


class RescuedLike(Protocol):
    """What `count_rescued` reads of a rescued job."""

    @property
    def queue_name(self) -> str: ...  # noqa: D102 - named as the column
    @property
    def kind(self) -> str | None: ...  # noqa: D102 - named as the column
    @property
    def status(self) -> str: ...  # noqa: D102 - named as the column
    @property
    def fate(self) -> str: ...  # noqa: D102 - named as the field


class Receipt(Protocol):
    """Keeps what a count is about to write where the death of this process does not reach it."""

    def begin(self, changes: bytes) -> None:
        """These changes are about to be written: from now on whoever comes later writes them, if need be."""

    def end(self) -> None:
        """They are written."""


@dataclass(eq=False)
class Count:
    """What is to be counted together, before anybody knows in which book.

    Attributes:
        cells: counter name and its (queue, kind), (queue,) or () -> how many.
        seconds: histogram name, queue and kind -> what was observed.
    """

    cells: Tally[tuple[str, tuple[str | None, ...]]] = field(default_factory=Tally)
    seconds: dict[tuple[str, str, str | None], list[float]] = field(default_factory=dict)

    def outcomes(
        self, outcomes: Iterable[OutcomeLike], statuses: Mapping[UUID, str] | None = None
    ) -> "Count":
        """Settles, those alone that were answered; see `metrics.count_outcomes`."""
        if statuses is None:
            return self.settled((outcome, None) for outcome in outcomes)
        return self.settled((each, statuses[each.job_id]) for each in outcomes if each.job_id in statuses)

    def settled(self, settled: Iterable[tuple[OutcomeLike, str | None]]) -> "Count":
        """Settles that PostgreSQL has, and their new status: started, completed, failed, retried, and durations."""
        durations: dict[tuple[str, str | None], list[float]] = {}
        for outcome, status in settled:
            pair = (outcome.queue_name, outcome.kind)
            ended = "pmqd_jobs_completed" if status == "completed" else _ended(outcome, status)
            if ended:
                self.cells[ended, pair] += 1
            if outcome.started is not None and outcome.action != "release":
                durations.setdefault(pair, []).append(outcome.duration_seconds)
        for pair, seconds in durations.items():
            self.cells["pmqd_jobs_started", pair] += len(seconds)
            self.seconds.setdefault(("pmqd_job_duration_seconds", *pair), []).extend(seconds)
        return self

    def rescued(self, rescued: Iterable[RescuedLike]) -> "Count":
        """Jobs given back after a death; see `metrics.count_rescued`."""
        for job in rescued:
            if job.fate == "unstarted":
                continue
            pair = (job.queue_name, job.kind)
            self.cells["pmqd_rescued", (job.queue_name,)] += 1
            self.cells["pmqd_jobs_started", pair] += 1
            if job.status == "failed":
                self.cells["pmqd_jobs_failed", pair] += 1
                self.cells["pmqd_poisoned", (job.queue_name,)] += 1
        return self

    def stale(self, number: int) -> "Count":
        """Settles that were refused."""
        if number:
            self.cells["pmqd_stale_settles", ()] += number
        return self


class Book:
    """The two value files of one slot. One lock: the clerk thread and the main thread both count."""

    def __init__(self, directory: Path, identifier: str) -> None:
        """Opens the files, which are made if they are missing."""
        self.directory, self.identifier = directory, identifier
        self._lock = threading.Lock()
        self._counters, self._histograms = (_open(path) for path in paths(directory, identifier))
        self._pairs: set[tuple[str, str]] = set(_pairs_of(self._counters))
        self._keys: dict[tuple[str, tuple[str, ...]], str] = {}
        self._bucket_keys: dict[tuple[str, str, str], tuple[list[str], str]] = {}
        self.add(Tally({("pmqd_stale_settles", ()): 0}))

    def add(self, counts: Mapping[tuple[str, tuple[str, ...]], int]) -> None:
        """Adds each number to the counter of that name and those label values."""
        with self._lock:
            for cell, number in counts.items():
                key = self._keys.get(cell) or self._counter_key(cell)
                _increase(self._counters, key, number)

    def observe(self, name: str, queue: str, kind: str, seconds: Iterable[float]) -> None:
        """Puts each duration into its bucket of the histogram: one write per bucket touched, one for the sum."""
        with self._lock:
            for key, number in self._buckets(name, queue, kind, seconds):
                _increase(self._histograms, key, number)

    def post(self, count: Count, receipt: Receipt | None = None) -> None:
        """Counts; with a receipt it happens once, whoever dies in the middle."""
        with self._lock:
            sums = self._sums(count)
            if receipt is None:
                for files, key, number in sums:
                    _increase(files, key, number)
                return
            changes = [(files, key, files.read_value(key)[0] + number) for files, key, number in sums]
            receipt.begin(self._packed(changes))
            for files, key, value in changes:
                files.write_value(key, value, 0.0)
            receipt.end()

    def _sums(self, count: Count) -> list[tuple[Any, str, float]]:
        """What is to be added to which cell, each of them once."""
        counts: Tally[tuple[str, tuple[str, ...]]] = Tally()
        for (name, labels), number in count.cells.items():
            counts[name, self._labels(labels)] += number
        sums: dict[tuple[int, str], float] = {}
        for cell, number in counts.items():
            sums[0, self._keys.get(cell) or self._counter_key(cell)] = number
        for (name, queue, kind), seconds in count.seconds.items():
            for key, more in self._buckets(name, *self.pair(queue, kind), seconds):
                sums[1, key] = sums.get((1, key), 0.0) + more
        both = (self._counters, self._histograms)
        return [(both[place], key, number) for (place, key), number in sums.items()]

    def _labels(self, labels: tuple[str | None, ...]) -> tuple[str, ...]:
        if len(labels) == 2:
            return self.pair(labels[0] or "", labels[1])
        return (self.queue(labels[0] or ""),) if labels else ()

    def _packed(self, changes: Iterable[tuple[Any, str, float]]) -> bytes:
        """Where each value stands in which file (the lowest bit), then the values."""
        places, values = array("q"), array("d")
        for files, key, value in changes:
            files.read_value(key)  # makes the cell, if it is new
            places.append(files._positions[key] * 2 + (files is self._histograms))  # noqa: SLF001 - nothing else tells
            values.append(value)
        return places.tobytes() + values.tobytes()

    def _buckets(
        self, name: str, queue: str, kind: str, seconds: Iterable[float]
    ) -> Iterator[tuple[str, float]]:
        keys = self._bucket_keys.get((name, queue, kind)) or self._histogram_keys(name, queue, kind)
        buckets, total = HISTOGRAMS[name][0], 0.0
        found: Tally[int] = Tally()
        for each in seconds:
            total += each
            found[bisect_left(buckets, each)] += 1
        yield from ((keys[0][place], number) for place, number in found.items())
        yield keys[1], total

    def pair(self, queue: str, kind: str | None) -> tuple[str, str]:
        """The label values for a queue and a kind: themselves, or "other" beyond the bound."""
        wanted = (queue, kind or "")
        if wanted in self._pairs:
            return wanted
        if len(self._pairs) >= MAX_PAIRS:
            return (OTHER, OTHER)
        self._pairs.add(wanted)
        return wanted

    def queue(self, queue: str) -> str:
        """The label value for a queue alone."""
        return self.pair(queue, None)[0]

    def close(self) -> None:
        """Closes both files."""
        self._counters.close()
        self._histograms.close()

    def _counter_key(self, cell: tuple[str, tuple[str, ...]]) -> str:
        name, values = cell
        labels, text = COUNTERS[name]
        key = mmap_key(name, f"{name}_total", list(labels), list(values), text)
        return self._keys.setdefault(cell, key)

    def _histogram_keys(self, name: str, queue: str, kind: str) -> tuple[list[str], str]:
        buckets, text = HISTOGRAMS[name]
        edges = [float_to_go_string(edge) for edge in (*buckets, math.inf)]
        names, values = [*PAIR, "le"], [queue, kind]
        keys = [mmap_key(name, f"{name}_bucket", names, [*values, edge], text) for edge in edges]
        for key in keys:
            # Every bucket exists from the first observation on: a histogram with holes is not one.
            self._histograms.read_value(key)
        total = mmap_key(name, f"{name}_sum", list(PAIR), values, text)
        return self._bucket_keys.setdefault((name, queue, kind), (keys, total))


def paths(directory: Path, identifier: str) -> tuple[Path, Path]:
    """The files of a slot: counters, histograms."""
    return directory / f"counter_{identifier}.db", directory / f"histogram_{identifier}.db"


def write_again(directory: Path, identifier: str, changes: bytes) -> None:
    """Writes what somebody who died was about to write, or has written, into a slot's files.

    Args:
        directory: of the metric files.
        identifier: of the slot.
        changes: as its receipt was given them.
    """
    if len(changes) % 16:
        return  # not as it was given: a job has written over it
    half = len(changes) // 2
    places, values = array("q", changes[:half]), array("d", changes[half:])
    for number, path in enumerate(paths(directory, identifier)):
        if path.exists():  # else somebody has emptied the folder
            last = path.stat().st_size - 16
            with path.open("r+b") as file:
                for place, value in zip(places, values, strict=True):
                    if place % 2 == number and 0 <= place // 2 <= last:
                        os.pwrite(file.fileno(), struct.pack("dd", value, 0.0), place // 2)


def _ended(outcome: OutcomeLike, status: str | None) -> str | None:
    """The counter of the way an attempt ended, or None for the ways that have none (snooze, release, cancel)."""
    if status is None:
        return _BY_ACTION.get(outcome.action)
    if status == "queued":
        return "pmqd_jobs_retried" if outcome.action == "retry" else None
    return _BY_STATUS.get(status)


_BY_ACTION = {"complete": "pmqd_jobs_completed", "fail": "pmqd_jobs_failed", "retry": "pmqd_jobs_retried"}
_BY_STATUS = {"completed": "pmqd_jobs_completed", "failed": "pmqd_jobs_failed"}


def merge(found: Sequence[Path]) -> list[Metric]:
    """The sums over value files."""
    return list(MultiProcessCollector.merge([str(path) for path in found], accumulate=True))


def readable(path: Path) -> bool:
    """Whether a value file is whole; a broken one must not take the page down with it."""
    try:
        merge([path])
    except (OSError, RuntimeError, ValueError, struct.error):
        return False
    return True


def _open(path: Path) -> Any:
    """The value file; one that cannot be read (a machine that lost power in the middle) starts anew."""
    if path.exists() and not readable(path):
        path.unlink()
    return MmapedDict(str(path))


def _pairs_of(cells: Any) -> Iterable[tuple[str, str]]:
    """The pairs that the process before this one had: the bound holds for the slot, not for the process."""
    for key, _, _ in cells.read_all_values():
        labels = json.loads(key)[2]
        if "queue" in labels and labels["queue"] != OTHER:
            yield (labels["queue"], labels.get("kind", ""))


def _increase(cells: Any, key: str, number: float) -> None:
    value, _ = cells.read_value(key)
    cells.write_value(key, value + number, 0.0)
