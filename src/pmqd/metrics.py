"""Counters and histograms of the children, and the page that adds them up.

Every child writes its own two value files, `counter_SLOT.db` and `histogram_SLOT.db`, in prometheus-client's
multiprocess format. SLOT is the child's place in the arena and not its pid: a restarted child opens the file
of the one before it and counts on, so counters never fall and the number of files is the number of slots.
The files are memory maps: what was counted survives `kill -9`.

Gauges are not kept in files at all. Whoever renders the page measures them at that moment (the web child does),
so a dead child cannot leave one behind.

Before `start()` every function here does nothing: producers and tests need no directory.
"""

import contextlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric

from pmqd.books import (
    MAX_PAIRS,
    OTHER,
    PAIR,
    Book,
    Count,
    OutcomeLike,
    Receipt,
    RescuedLike,
    merge,
    readable,
    write_again,
)

__all__ = ["MAX_PAIRS", "OTHER", "Book", "Count"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


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


_book: Book | None = None


def start(directory: Path, identifier: str) -> None:
    """Opens this process's value files; the first thing in a child, after the fork.

    Args:
        directory: `state_dir/metrics`; made if it is missing.
        identifier: the stable name of the slot, such as `worker-3`: no two living processes may share it.
    """
    global _book  # noqa: PLW0603 - one book per process, opened once after the fork
    stop()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _book = Book(directory, identifier)


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


def count_outcomes(
    outcomes: Iterable[OutcomeLike],
    statuses: Mapping[UUID, str] | None = None,
    receipt: Receipt | None = None,
) -> None:
    """Counts settles that PostgreSQL has acknowledged: started, completed, failed, retried, and durations.

    Args:
        outcomes: what was settled.
        statuses: what the settle answered (job id -> new status). Outcomes that are not in it were refused and
            are skipped (count them with `count_stale`); the new status decides over the wished action, because
            a cancel request or used-up interruptions may have changed it.
        receipt: makes the count happen once, though this process may die in the middle.
    """
    post(Count().outcomes(outcomes, statuses) if _book else Count(), receipt)


def post(count: Count, receipt: Receipt | None = None, identifier: str | None = None) -> None:
    """Counts what belongs together.

    Args:
        count: what.
        receipt: makes it happen once.
        identifier: of the slot in whose files it is counted, when no process has them open; None: this process's own.
    """
    if _book is None:
        if receipt is not None:
            receipt.begin(b"")
            receipt.end()
    elif identifier is None or identifier == _book.identifier:
        _book.post(count, receipt)
    else:
        with contextlib.closing(Book(_book.directory, identifier)) as book:
            book.post(count, receipt)


def identifier() -> str:
    """Of this process's own files; empty before `start`."""
    return _book.identifier if _book else ""


def post_again(identifier: str, changes: bytes) -> None:
    """Repeats a count that a dead process had begun: see `books`."""
    if _book:
        write_again(_book.directory, identifier, changes)


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
    post(Count().rescued(rescued))


def count_reoffered(queue: str, n: int) -> None:
    """Counts n hints that were pushed again (`pmqd_reoffered_total`)."""
    _count_queue("pmqd_reoffered", queue, n)


def count_stolen(queue: str, n: int) -> None:
    """Counts n jobs claimed without a hint (`pmqd_stolen_total`)."""
    _count_queue("pmqd_stolen", queue, n)


def count_stale(n: int = 1) -> None:
    """Counts n settles that were refused (`pmqd_stale_settles_total`)."""
    post(Count().stale(n))


def _count_queue(name: str, queue: str, n: int) -> None:
    if _book and n:
        _book.add({(name, (_book.queue(queue),)): n})


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
        families = merge(paths)
    except (OSError, RuntimeError, ValueError, struct.error):
        families = merge([path for path in paths if readable(path)])
    for family in families:
        _bound(family)
    return sorted(families, key=lambda family: family.name)


def _bound(family: Metric) -> None:
    """Folds the series beyond the bound into "other": each process keeps to it, their union need not."""
    seen: set[tuple[str, str]] = set()
    folded: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for sample in family.samples:
        pair = (sample.labels.get("queue", ""), sample.labels.get("kind", ""))
        labels = dict(sample.labels)
        if pair not in seen and len(seen) >= MAX_PAIRS:
            labels.update({name: OTHER for name in PAIR if name in labels})
        else:
            seen.add(pair)
        key = (sample.name, tuple(labels.items()))
        folded[key] = folded.get(key, 0.0) + sample.value
    family.samples = []
    for (name, items), value in folded.items():
        family.add_sample(name, dict(items), value)
