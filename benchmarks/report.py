"""What was measured: rows, their medians, spreads and ratios, as a table and as JSON."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from benchmarks.works.work import OURS

_LEGEND = "pmqd/peer and peer/pmqd: medians of the ratios within each round. of medians: pmqd's median to the peer's."


@dataclass(frozen=True)
class Row:
    """One figure of one contestant in one round."""

    work: str
    peer: str
    round: int
    unit: str
    value: float


@dataclass(frozen=True)
class Line:
    """What the rounds of one contestant say together.

    Attributes:
        peer: who.
        median: of the rounds.
        least: of the rounds.
        most: of the rounds.
        ratio: pmqd's figure to this one's, the median over the rounds that have both; None for pmqd itself.
        inverse: this one's figure to pmqd's, likewise.
        of_medians: the ratio of pmqd's median to this one's.
    """

    peer: str
    median: float
    least: float
    most: float
    ratio: float | None = None
    inverse: float | None = None
    of_medians: float | None = None


def lines(rows: Sequence[Row], work: str, unit: str) -> list[Line]:
    """One line per contestant, in the order in which they were measured first."""
    values: dict[str, dict[int, float]] = {}
    for row in rows:
        if (row.work, row.unit) == (work, unit):
            values.setdefault(row.peer, {})[row.round] = row.value
    ours = values.get(OURS, {})
    return [_line(peer, values[peer], ours) for peer in sorted(values, key=lambda peer: peer != OURS)]


def _line(peer: str, theirs: dict[int, float], ours: dict[int, float]) -> Line:
    found = list(theirs.values())
    middle, least, most = median(found), min(found), max(found)
    both = [number for number in theirs if number in ours]
    if peer == OURS or not both:
        return Line(peer, middle, least, most)
    return Line(
        peer,
        middle,
        least,
        most,
        _median_ratio([(ours[number], theirs[number]) for number in both]),
        _median_ratio([(theirs[number], ours[number]) for number in both]),
        _median_ratio([(median(ours.values()), middle)]),
    )


def _median_ratio(pairs: Sequence[tuple[float, float]]) -> float | None:
    """The median of the ratios; None where one would be a division by nothing."""
    return median(a / b for a, b in pairs) if all(b for _, b in pairs) else None


def as_text(rows: Sequence[Row]) -> str:
    """All tables, one per work and unit."""
    return "\n\n".join([_LEGEND, *(_table(rows, work, unit) for work, unit in _tables(rows))])


def _tables(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    yield from dict.fromkeys((row.work, row.unit) for row in rows)


def _table(rows: Sequence[Row], work: str, unit: str) -> str:
    found = lines(rows, work, unit)
    width = max(20, *(len(line.peer) for line in found))
    head = f"{work}: {unit}"
    told = [
        f"{head}\n{'':<{width}}{'median':>12}{'min - max':>26}{'pmqd/peer':>12}{'peer/pmqd':>12}{'of medians':>12}"
    ]
    for line in found:
        spread = f"{_number(line.least)} - {_number(line.most)}"
        ratios = "".join(
            f"{_number(each) if each is not None else '-':>12}"
            for each in (line.ratio, line.inverse, line.of_medians)
        )
        told.append(f"{line.peer:<{width}}{_number(line.median):>12}{spread:>26}{ratios}")
    return "\n".join(told)


def _number(value: float) -> str:
    """Three digits that count, or whole thousands with commas."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def as_json(rows: Sequence[Row]) -> str:
    """The list that `--json` writes."""
    return json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False) + "\n"


def write_json(path: Path, rows: Sequence[Row]) -> None:
    """Writes it whole or not at all.

    Raises:
        OSError: it cannot be written there.
    """
    if path.exists() and not path.is_file():  # /dev/stdout
        path.write_text(as_json(rows))
        return
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(as_json(rows))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
