"""Counters and histograms of the children, and the page that adds them up.

Every child writes its own two value files, `counter_SLOT.db` and `histogram_SLOT.db`, in prometheus-client's
multiprocess format. SLOT is the child's place in the arena and not its pid: a restarted child opens the file
of the one before it and counts on, so counters never fall and the number of files is the number of slots.
The files are memory maps: what was counted survives `kill -9`.

Gauges are not kept in files at all. Whoever renders the page measures them at that moment (the web child does),
so a dead child cannot leave one behind.

Before `start()` every function here does nothing: producers and tests need no directory.
"""

import json
import math
import struct
import threading
from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.mmap_dict import MmapedDict as _MmapedDict
from prometheus_client.mmap_dict import mmap_key
from prometheus_client.multiprocess import MultiProcessCollector as _MultiProcessCollector
from prometheus_client.utils import floatToGoString as _FloatToGoString

# The package is typed, these parts of it are not.
MmapedDict: Any = _MmapedDict
MultiProcessCollector: Any = _MultiProcessCollector
float_to_go_string: Any = _FloatToGoString

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_PAIRS = 200
"""Distinct (queue, kind) pairs that get series of their own; later ones are counted under "other"."""
OTHER = "other"

DURATION_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
PICKUP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

_PAIR = ("queue", "kind")
_COUNTERS: dict[str, tuple[tuple[str, ...], str]] = {
    "pmqd_jobs_migrated": (_PAIR, "Jobs marked and offered to Redis."),
    "pmqd_jobs_started": (_PAIR, "Attempts whose user code started."),
    "pmqd_jobs_completed": (_PAIR, "Jobs that completed."),
    "pmqd_jobs_failed": (_PAIR, "Jobs that ended as failed."),
    "pmqd_jobs_retried": (_PAIR, "Attempts that ended with a later retry."),
    "pmqd_rescued": (("queue",), "Attempts given back because their process or host was gone."),
    "pmqd_poisoned": (("queue",), "Jobs that failed because they ended the process they ran in."),
    "pmqd_reoffered": (("queue",), "Hints pushed again because Redis did not have them."),
    "pmqd_stolen": (("queue",), "Jobs claimed without a hint."),
    "pmqd_stale_settles": ((), "Settles refused because the job had been taken from its owner."),
}
_HISTOGRAMS: dict[str, tuple[tuple[float, ...], str]] = {
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


@dataclass(frozen=True)
class Gauge:
    """One gauge of the page, measured when it is rendered: name, help, and (labels, value) samples."""

    name: str
    help: str
    samples: Sequence[tuple[Mapping[str, str], float]]


@dataclass(frozen=True)
class CounterSamples:
    """A counter that is kept elsewhere (the arena): name without `_total`, help, (labels, value) samples."""

    name: str
    help: str
    samples: Sequence[tuple[Mapping[str, str], float]]


# --- counting, in the children -------------------------------------------------------------------------------


class _Book:
    """The two value files of this process. One lock: the clerk thread and the main thread both count."""

    def __init__(self, directory: Path, identifier: str) -> None:
        self._lock = threading.Lock()
        self._counters = _open(directory / f"counter_{identifier}.db")
        self._histograms = _open(directory / f"histogram_{identifier}.db")
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
            keys = self._bucket_keys.get((name, queue, kind)) or self._histogram_keys(name, queue, kind)
            buckets, total = _HISTOGRAMS[name][0], 0.0
            found: Tally[int] = Tally()
            for each in seconds:
                total += each
                found[bisect_left(buckets, each)] += 1
            for place, number in found.items():
                _increase(self._histograms, keys[0][place], number)
            _increase(self._histograms, keys[1], total)

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
        labels, text = _COUNTERS[name]
        key = mmap_key(name, f"{name}_total", list(labels), list(values), text)
        return self._keys.setdefault(cell, key)

    def _histogram_keys(self, name: str, queue: str, kind: str) -> tuple[list[str], str]:
        buckets, text = _HISTOGRAMS[name]
        edges = [float_to_go_string(edge) for edge in (*buckets, math.inf)]
        names, values = [*_PAIR, "le"], [queue, kind]
        keys = [mmap_key(name, f"{name}_bucket", names, [*values, edge], text) for edge in edges]
        for key in keys:
            # Every bucket exists from the first observation on: a histogram with holes is not one.
            self._histograms.read_value(key)
        total = mmap_key(name, f"{name}_sum", list(_PAIR), values, text)
        return self._bucket_keys.setdefault((name, queue, kind), (keys, total))


_book: _Book | None = None


def start(directory: Path, identifier: str) -> None:
    """Opens this process's value files; the first thing in a child, after the fork.

    Args:
        directory: `state_dir/metrics`; made if it is missing.
        identifier: the stable name of the slot, such as `worker-3`: no two living processes may share it.
    """
    global _book  # noqa: PLW0603 - one book per process, opened once after the fork
    stop()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _book = _Book(directory, identifier)


def stop() -> None:
    """Closes this process's value files; what was counted stays in them. From here on nothing is counted."""
    global _book  # noqa: PLW0603 - see start
    if _book:
        _book.close()
    _book = None


def count_migrated(queue: str, kind: str | None = None, n: int = 1) -> None:
    """Counts n jobs of a queue as marked and offered (`pmqd_jobs_migrated_total`)."""
    if _book:
        _book.add({("pmqd_jobs_migrated", _book.pair(queue, kind)): n})


def count_outcomes(outcomes: Iterable[OutcomeLike], statuses: Mapping[UUID, str] | None = None) -> None:
    """Counts settles that PostgreSQL has acknowledged: started, completed, failed, retried, and durations.

    Args:
        outcomes: what was settled.
        statuses: what the settle answered (job id -> new status). Outcomes that are not in it were refused and
            are skipped (count them with `count_stale`); the new status decides over the wished action, because
            a cancel request or used-up interruptions may have changed it.
    """
    if not _book:
        return
    counts: Tally[tuple[str, tuple[str, ...]]] = Tally()
    durations: dict[tuple[str, str], list[float]] = {}
    for outcome in outcomes:
        if statuses is not None and outcome.job_id not in statuses:
            continue
        pair = _book.pair(outcome.queue_name, outcome.kind)
        ended = _ended(outcome, statuses)
        if ended:
            counts[(ended, pair)] += 1
        if outcome.started is not None and outcome.action != "release":
            counts[("pmqd_jobs_started", pair)] += 1
            durations.setdefault(pair, []).append(outcome.duration_seconds)
    _book.add(counts)
    for (queue, kind), seconds in durations.items():
        _book.observe("pmqd_job_duration_seconds", queue, kind, seconds)


def observe_pickup(queue: str, kind: str | None, seconds: float) -> None:
    """Observes how long a job was ready before its handler started (`pmqd_job_pickup_seconds`)."""
    observe_pickups(queue, kind, (seconds,))


def observe_pickups(queue: str, kind: str | None, seconds: Sequence[float]) -> None:
    """The same for several jobs of one queue and kind: cheaper than one by one."""
    if _book and seconds:
        _book.observe(
            "pmqd_job_pickup_seconds", *_book.pair(queue, kind), [max(0.0, each) for each in seconds]
        )


def count_rescued(rescued: Iterable[RescuedLike]) -> None:
    """Counts jobs given back after a death, as `job_logs` has them.

    An attempt that had started has a `crashed` row, and counts as started and rescued; one that had not leaves no
    row and counts as nothing. A rescue that used up the attempts counts as failed too.
    """
    if not _book:
        return
    counts: Tally[tuple[str, tuple[str, ...]]] = Tally()
    for job in rescued:
        if job.fate == "unstarted":
            continue
        pair = _book.pair(job.queue_name, job.kind)
        counts[("pmqd_rescued", (_book.queue(job.queue_name),))] += 1
        counts[("pmqd_jobs_started", pair)] += 1
        if job.status == "failed":
            counts[("pmqd_jobs_failed", pair)] += 1
    _book.add(counts)


def count_poisoned(queue: str, n: int = 1) -> None:
    """Counts n jobs that failed because they ended their process each time (`pmqd_poisoned_total`)."""
    _count_queue("pmqd_poisoned", queue, n)


def count_reoffered(queue: str, n: int) -> None:
    """Counts n hints that were pushed again (`pmqd_reoffered_total`)."""
    _count_queue("pmqd_reoffered", queue, n)


def count_stolen(queue: str, n: int) -> None:
    """Counts n jobs claimed without a hint (`pmqd_stolen_total`)."""
    _count_queue("pmqd_stolen", queue, n)


def count_stale(n: int = 1) -> None:
    """Counts n settles that were refused (`pmqd_stale_settles_total`)."""
    if _book and n:
        _book.add({("pmqd_stale_settles", ()): n})


def _count_queue(name: str, queue: str, n: int) -> None:
    if _book and n:
        _book.add({(name, (_book.queue(queue),)): n})


def _ended(outcome: OutcomeLike, statuses: Mapping[UUID, str] | None) -> str | None:
    """The counter of the way an attempt ended, or None for the ways that have none (snooze, release, cancel)."""
    if statuses is None:
        return _BY_ACTION.get(outcome.action)
    status = statuses[outcome.job_id]
    if status == "queued":
        return "pmqd_jobs_retried" if outcome.action == "retry" else None
    return _BY_STATUS.get(status)


_BY_ACTION = {"complete": "pmqd_jobs_completed", "fail": "pmqd_jobs_failed", "retry": "pmqd_jobs_retried"}
_BY_STATUS = {"completed": "pmqd_jobs_completed", "failed": "pmqd_jobs_failed"}


def _open(path: Path) -> Any:
    """The value file; one that cannot be read (a machine that lost power in the middle) starts anew."""
    if path.exists() and not _readable(path):
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


# --- the page, in the web child ------------------------------------------------------------------------------


@dataclass(eq=False)
class _Page:
    """A prometheus collector over what `render` was given."""

    families: list[Metric] = field(default_factory=list)

    def collect(self) -> list[Metric]:
        return self.families


def render(directory: Path, gauges: Sequence[Gauge] = (), counters: Sequence[CounterSamples] = ()) -> bytes:
    """The text of `/metrics`: all value files added up, then what was measured just now.

    Args:
        directory: where the children's value files are.
        gauges: measured by the caller.
        counters: kept by the caller (worker exits in the arena).
    """
    page = _Page(_merged(directory))
    page.families += [_family(each, "counter") for each in counters]
    page.families += [_family(each, "gauge") for each in gauges]
    registry = CollectorRegistry(auto_describe=False)
    registry.register(page)
    return generate_latest(registry)


def _family(given: Gauge | CounterSamples, kind: str) -> Metric:
    family = Metric(given.name, given.help, kind)
    name = f"{given.name}_total" if kind == "counter" else given.name
    for labels, value in given.samples:
        family.add_sample(name, dict(labels), value)
    return family


def _merged(directory: Path) -> list[Metric]:
    """The sums over all readable value files, sorted by name."""
    paths = sorted(directory.glob("*.db"))
    try:
        families = _merge(paths)
    except (OSError, RuntimeError, ValueError, struct.error):
        families = _merge([path for path in paths if _readable(path)])
    for family in families:
        _bound(family)
    return sorted(families, key=lambda family: family.name)


def _merge(paths: Sequence[Path]) -> list[Metric]:
    return list(MultiProcessCollector.merge([str(path) for path in paths], accumulate=True))


def _readable(path: Path) -> bool:
    """Whether a value file is whole; a broken one must not take the page down with it."""
    try:
        _merge([path])
    except (OSError, RuntimeError, ValueError, struct.error):
        return False
    return True


def _bound(family: Metric) -> None:
    """Folds the series beyond the bound into "other": each process keeps to it, their union need not."""
    seen: set[tuple[str, str]] = set()
    folded: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for sample in family.samples:
        pair = (sample.labels.get("queue", ""), sample.labels.get("kind", ""))
        labels = dict(sample.labels)
        if pair not in seen and len(seen) >= MAX_PAIRS:
            labels.update({name: OTHER for name in _PAIR if name in labels})
        else:
            seen.add(pair)
        key = (sample.name, tuple(labels.items()))
        folded[key] = folded.get(key, 0.0) + sample.value
    family.samples = []
    for (name, items), value in folded.items():
        family.add_sample(name, dict(items), value)
