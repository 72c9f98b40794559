"""What `status`, `top`, `queues list` and `workers` look at: both stores, and the web child of this host's daemon.

Everything here answers with plain rows; what is away is said in them and does not raise, so that one glance shows
all that can be seen.
"""

import http.client
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from pmqd.backend import lengths_by_queue, queue_rows
from pmqd.broker import Broker
from pmqd.config import Settings, split_listen
from pmqd.errors import BrokerUnavailable, PmqdError, StoreUnavailable
from pmqd.store import Store

RUNNING_SHOWN = 500
_HTTP_SECONDS = 1.0


# --- PostgreSQL ----------------------------------------------------------------------------------------------


def queues(store: Store) -> list[dict[str, Any]]:
    """The queues with depths and the reason why ready jobs wait, where there is one.

    Raises:
        StoreUnavailable: PostgreSQL is away.
    """
    rows = list(queue_rows(store.list_queues(), store.depths()).values())
    served = served_queues(store.instances())
    return [{**row, "reason": waiting_reason(row, served)} for row in rows]


def served_queues(instances: Iterable[Mapping[str, Any]]) -> set[str]:
    """All queues that a living instance serves."""
    return {name for instance in instances for name in instance.get("queues") or ()}


def waiting_reason(row: Mapping[str, Any], served: set[str]) -> str | None:
    """Why the jobs of a queue wait, as far as the queue itself tells; None where nothing holds them up.

    Args:
        row: the queue's row with its depths.
        served: names of the queues that a living instance serves.
    """
    if not row["ready"] and not row["scheduled"]:
        return None
    if not row["is_active"]:
        return f"paused: pmqd queues resume {row['name']}"
    if row["name"] not in served:
        return "nobody serves it: no running instance has it in a pool"
    return "not due yet" if not row["ready"] and not row["running"] else None


def instances_with_jobs(store: Store) -> list[dict[str, Any]]:
    """The living instances, each with the jobs that its workers run (`jobs`, at most 500 in all).

    Raises:
        StoreUnavailable: PostgreSQL is away.
    """
    running, _ = store.list_jobs(None, "running", RUNNING_SHOWN, None)
    columns = ("id", "queue_name", "kind", "worker_id", "started_at", "attempt_count")
    jobs = [{name: row.get(name) for name in columns} for row in running]
    return [
        {**instance, "jobs": [job for job in jobs if _belongs(job["worker_id"], instance["id"])]}
        for instance in store.instances()
    ]


def _belongs(worker_id: str | None, instance_id: object) -> bool:
    """A worker's id holds the last 8 digits of its instance's: `host:INSTANCE:wSLOT.SEQUENCE`."""
    parts = (worker_id or "").rsplit(":", 2)
    return len(parts) == 3 and parts[1] == str(instance_id).replace("-", "")[-8:]


# --- Redis ---------------------------------------------------------------------------------------------------


def add_lengths(settings: Settings, rows: Sequence[dict[str, Any]]) -> str | None:
    """Puts `in_redis` into each queue's row; None there where Redis is away.

    Returns:
        What is wrong with Redis, or None.
    """
    for row in rows:
        row["in_redis"] = None
    broker = Broker(settings.redis, "cli")
    try:
        broker.ping()
        lengths = lengths_by_queue(broker, [row["name"] for row in rows])
    except BrokerUnavailable as error:
        return str(error)
    finally:
        broker.close()
    for row in rows:
        row["in_redis"] = lengths[row["name"]]
    return None


# --- the daemon of this host ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Page:
    """The samples of one look at `/metrics`: (name, labels) -> value, and when it was."""

    samples: Mapping[tuple[str, frozenset[tuple[str, str]]], float]
    at: float

    def total(self, name: str, **labels: str) -> float:
        """The sum over all series of a name that carry these labels."""
        wanted = set(labels.items())
        return sum(value for (found, each), value in self.samples.items() if found == name and wanted <= each)

    def by(self, name: str, label: str) -> dict[str, float]:
        """The values of a name by one of its labels."""
        found: Counter[str] = Counter()
        for (each, labels), value in self.samples.items():
            if each == name:
                found[dict(labels).get(label, "")] += value  # type: ignore[assignment]  # floats add up as well
        return dict(found)


def read_page(settings: Settings) -> Page | None:
    """The `/metrics` of the daemon that listens where the settings say; None if none answers."""
    host, port = split_listen(settings.web.listen)
    link = http.client.HTTPConnection(_reachable(host), port, timeout=_HTTP_SECONDS)
    try:
        link.request("GET", "/metrics")
        answer = link.getresponse()
        text = answer.read(32 << 20).decode()
        families = list(text_string_to_metric_families(text)) if answer.status == 200 else []
    except (OSError, ValueError, http.client.HTTPException):
        return None
    finally:
        link.close()
    samples = {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}
    return Page(samples, time.monotonic()) if samples else None


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - nothing is bound here


# --- all of it -----------------------------------------------------------------------------------------------


def look(settings: Settings, store: Store, before: Page | None = None) -> tuple[dict[str, Any], Page | None]:
    """Everything that `status` shows, and the page that the next look compares with.

    Args:
        settings: the configuration.
        store: kept between looks by `top`.
        before: the page of the look before, for rates.
    """
    seen: dict[str, Any] = {"postgres": {"up": True, "error": None}, "queues": [], "instances": []}
    try:
        seen["instances"], seen["queues"] = instances_with_jobs(store), queues(store)
    except StoreUnavailable as error:
        seen["postgres"] = {"up": False, "error": str(error)}
    trouble = add_lengths(settings, seen["queues"])
    seen["redis"] = {"up": trouble is None, "error": trouble}
    # With no instance in the database, whoever answers at web.listen works for another one.
    page = read_page(settings) if seen["instances"] or not seen["postgres"]["up"] else None
    seen["workers"] = (
        {state: int(n) for state, n in page.by("pmqd_workers", "state").items()} if page else None
    )
    seen["mode"] = _mode(page, redis_up=trouble is None)
    _add_rates(seen["queues"], before, page)
    with suppress(PmqdError):
        _add_kinds(store, seen["queues"])
    return seen, page


def _mode(page: Page | None, *, redis_up: bool) -> str | None:
    """What the daemon here says; without one, what its workers would do."""
    if page is None:
        return "redis" if redis_up else "direct"
    return "direct" if page.total("pmqd_mode", mode="direct") else "redis"


def _add_rates(rows: Sequence[dict[str, Any]], before: Page | None, page: Page | None) -> None:
    for row in rows:
        row["completed_per_second"] = None
        if before is not None and page is not None and page.at > before.at:
            more = page.total("pmqd_jobs_completed_total", queue=row["name"])
            more -= before.total("pmqd_jobs_completed_total", queue=row["name"])
            row["completed_per_second"] = max(0.0, more / (page.at - before.at))


def _add_kinds(store: Store, rows: Sequence[dict[str, Any]]) -> None:
    """For a queue where nothing explains the waiting, what the store says about one of its waiting jobs."""
    for row in rows:
        if row["reason"] == "not due yet" or (row["reason"] is None and row["ready"] and not row["running"]):
            waiting, _ = store.list_jobs(row["name"], "queued", 1, None)
            row["reason"] = (store.why(waiting[0]) if waiting else None) or row["reason"]
