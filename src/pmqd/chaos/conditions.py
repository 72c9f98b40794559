"""Interesting states of the product that a run must have seen, or it has proved nothing about them."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pmqd.chaos.nemesis import FaultRecord


@dataclass(frozen=True)
class Condition:
    """One state.

    Attributes:
        name: in words.
        seen: how often, by what the hosts have counted or logged.
        expected: faults have hit that bring it about; without them it may be missing.
    """

    name: str
    seen: int
    expected: bool


@dataclass(frozen=True)
class Sign:
    """How a state is known: by a counter of /metrics or by words in the hosts' logs.

    Attributes:
        name: the state in words.
        counter: the counter's name, or "".
        words: of the log record, or "".
        kinds: the faults that bring it about.
        anyway: so often it comes about in a run without faults.
    """

    name: str
    counter: str
    words: str
    kinds: frozenset[str]
    anyway: int = 0


_REDIS_GONE = frozenset({"redis_kill", "wire_redis_cut", "wire_redis_held"})
_REDIS_EMPTY = frozenset({"redis_kill", "redis_flush"})
_WORKER_DIED = frozenset(
    {"worker_kill", "worker_kill_all", "host_kill", "host_kill_all", "worker_crash_claimed"}
)
_POSTGRES_GONE = frozenset(
    {"postgres_crash", "wire_postgres_cut", "wire_postgres_held", "postgres_terminate_role"}
)

SIGNS: Final = (
    Sign("jobs claimed without a hint", "pmqd_stolen_total", "", _REDIS_GONE),
    Sign("hints offered again", "pmqd_reoffered_total", "", frozenset({"redis_flush"})),
    Sign("jobs rescued from the dead", "pmqd_rescued_total", "", _WORKER_DIED),
    Sign("settles refused as stale", "pmqd_stale_settles_total", "", frozenset({"host_outlives_lease"})),
    Sign("workers without Redis", "", "claiming from PostgreSQL", _REDIS_GONE),
    Sign("a new epoch of Redis", "", "new epoch", _REDIS_EMPTY, anyway=1),
    Sign("hosts without PostgreSQL", "", "PostgreSQL is away", _POSTGRES_GONE),
    Sign("leases that ran out", "", "was lost; going on as instance", frozenset({"host_outlives_lease"})),
)


def conditions(
    records: Iterable["FaultRecord"], pages: Sequence[str], logs: Iterable[Path]
) -> list[Condition]:
    """What was seen of each state.

    Args:
        records: the faults.
        pages: texts of /metrics that together tell of all lives.
        logs: the hosts' logs.
    """
    hit = {record.kind for record in records if record.hit}
    texts = [path.read_bytes() for path in logs if path.exists()]
    return [
        Condition(sign.name, max(0, _times(sign, pages, texts) - sign.anyway), bool(sign.kinds & hit))
        for sign in SIGNS
    ]


def _times(sign: Sign, pages: Sequence[str], texts: Sequence[bytes]) -> int:
    if sign.counter:
        return sum(_total(page, sign.counter) for page in pages)
    return sum(text.count(sign.words.encode()) for text in texts)


def _total(page: str, counter: str) -> int:
    """The sum over all series of a counter."""
    found = re.findall(rf"^{counter}(?:\{{.*\}})? ([0-9.e+]+)$", page, re.MULTILINE)
    return int(sum(float(value) for value in found))
