"""docs/metrics.md has every metric that the code exposes, and no other."""

import re
from uuid import uuid4

from pmqd import books, metrics
from pmqd.arena import Arena, State
from pmqd.backend import Figures, RedisFigures
from pmqd.config import PoolSettings, Settings
from pmqd.gauges import BusyRatio, exit_counters, measure
from tests.fix_daemon import ROOT

PAGE = ROOT / "docs" / "metrics.md"
OPERATIONS = ROOT / "docs" / "operations.md"
Row = tuple[str, tuple[str, ...], str]


def exposed() -> dict[str, Row]:
    """Type, labels and help of every metric by its name, from the tables of the counters and from a measurement."""
    found: dict[str, Row] = {}
    for name, (labels, text) in books.COUNTERS.items():
        found[f"{name}_total"] = ("counter", labels, text)
    for name, (_, text) in books.HISTOGRAMS.items():
        found[name] = ("histogram", ("queue", "kind"), text)
    arena = full_arena()
    for counter in exit_counters(arena):
        found[f"{counter.name}_total"] = ("counter", tuple(counter.samples[0][0]), counter.help)
    for gauge in gauges(arena):
        found[gauge.name] = ("gauge", tuple(gauge.samples[0][0]), gauge.help)
    return found


def full_arena() -> Arena:
    """Shared memory with one idle worker and a lease."""
    arena = Arena.create(2, 2)
    arena.instance_id = uuid4()
    arena.lease_renewed()
    arena.slots[0].open("worker", "here:x:w0.1", pool="mail", pool_index=0)
    arena.slots[0].state = State.IDLE
    return arena


def gauges(arena: Arena) -> list[metrics.Gauge]:
    """All gauges, measured where each has a sample."""
    settings = Settings(workers=[PoolSettings(name="mail", app="a:b")])
    depths = {"ready": 1, "scheduled": 1, "running": 1, "failed": 1, "oldest_ready_seconds": 1.0}
    redis = RedisFigures({"mails": 1}, {"used_memory": 1, "connected_clients": 1}, up=True, at=1.0)
    return measure(settings, arena, Figures({"mails": depths}, 1.0), redis, busy=BusyRatio(), now=2.0)


def documented() -> dict[str, Row]:
    """The rows of the page's tables."""
    found: dict[str, Row] = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `pmqd_"):
            assert len(cells) == 5, line
            labels = tuple(re.findall(r"`(\w+)`", cells[2]))
            assert cells[4], f"{cells[0]} answers nothing"
            found[cells[0].strip("`")] = (cells[1], labels, cells[3])
    return found


def test_the_page_has_each_metric_and_no_other() -> None:
    """Name, type, labels and help are those of /metrics."""
    assert documented() == exposed()


def test_the_values_of_labels_are_on_the_pages() -> None:
    """States, modes and reasons are named where they are explained."""
    arena = full_arena()
    page, operations = PAGE.read_text(), OPERATIONS.read_text()
    samples = {gauge.name: [labels for labels, _ in gauge.samples] for gauge in gauges(arena)}
    for name, label in (("pmqd_workers", "state"), ("pmqd_queue_depth", "state"), ("pmqd_mode", "mode")):
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` "))
        assert all(f"`{labels[label]}`" in row for labels in samples[name])
    assert all(f"| `{reason}` |" in operations for reason in arena.exits())


def test_metrics_that_other_pages_name_exist() -> None:
    """A metric in the README, the docs or the rules is one of the page."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    named = {
        name
        for page in pages
        for name in re.findall(r"\bpmqd_[a-z_]+_(?:total|seconds|ratio|up|bytes)\b", page.read_text())
    }
    assert named <= set(exposed())
