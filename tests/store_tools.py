"""What the store's tests share: a store with a lease, rows, outcomes, and looks at the database."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID, uuid4

import psycopg
from psycopg.rows import dict_row

from pmqd.config import PostgresSettings
from pmqd.job import Action, Claimed, Outcome
from pmqd.store import Best, Store
from pmqd.store_rows import Order, stretches

QUEUE = "mail"
WORKER = "host:12345678:w0.1"


def best(limit: int, queues: Sequence[str] = (QUEUE,), order: Order = "bands") -> Best:
    """What a claim without hints is for."""
    return Best(stretches(queues, order), limit)


@dataclass
class Bench:
    """A store whose instance has a lease, and a connection that looks."""

    dsn: str
    store: Store
    connection: psycopg.Connection[dict[str, Any]]
    instance_id: UUID
    term: int = 0
    others: list[Store] = field(default_factory=list)

    def another(self, role: str = "other") -> Store:
        """One more store on the same database."""
        store = Store(PostgresSettings(dsn=self.dsn), role)
        self.others.append(store)
        return store

    def insert(self, count: int = 1, **columns: Any) -> list[UUID]:
        """Jobs with these columns, in one statement; ids in their order."""
        given = {"queue_name": QUEUE, "payload": "{}", **columns}
        values = ", ".join(f"%({name})s" for name in given)
        rows = self.connection.execute(
            f"insert into pmqd.jobs ({', '.join(given)}) select {values} from generate_series(1, {count}) returning id",
            given,
        ).fetchall()
        return [row["id"] for row in rows]

    def claim(self, ids: list[UUID], token: UUID | None = None, worker_id: str = WORKER) -> list[Claimed]:
        """Claims for this bench's instance."""
        return self.store.claim(
            ids, token=token or uuid4(), worker_id=worker_id, instance_id=self.instance_id
        )

    def steal(self, limit: int = 1, worker_id: str = WORKER, **more: Any) -> list[Claimed]:
        """Steals for this bench's instance."""
        usual = {"queues": [QUEUE], "order": "bands", "after": None, "marked": True, "hinted": ()}
        given = {**usual, "token": uuid4(), **more}
        wanted = best(limit, given.pop("queues"), given.pop("order"))
        wanted = replace(wanted, **{name: given.pop(name) for name in ("after", "marked", "hinted")})
        return self.store.claim(wanted, worker_id=worker_id, instance_id=self.instance_id, **given)

    def running(self, **columns: Any) -> Claimed:
        """One job that runs."""
        [job] = self.claim(self.insert(**columns))
        return job

    def row(self, job_id: UUID) -> dict[str, Any]:
        """A job's row."""
        found = self.connection.execute("select * from pmqd.jobs where id = %s", [job_id]).fetchone()
        assert found is not None
        return found

    def logs(self, job_id: UUID) -> list[dict[str, Any]]:
        """A job's log rows, oldest first."""
        return self.connection.execute(
            "select * from pmqd.job_logs where job_id = %s order by id", [job_id]
        ).fetchall()

    def count(self, what: str, *parameters: Any) -> int:
        """How many rows `from <what>` gives."""
        found = self.connection.execute(f"select count(*) as n from {what}", parameters).fetchone()
        assert found is not None
        return int(found["n"])

    def set_tick(self, tick: int) -> None:
        """Moves the lease clock."""
        self.connection.execute("update pmqd.ticker set tick = %s", [tick])


@contextmanager
def open_bench(dsn: str) -> Iterator[Bench]:
    """A bench on a database with the schema."""
    store = Store(PostgresSettings(dsn=dsn), "test")
    instance_id = uuid4()
    with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as connection:
        bench = Bench(dsn, store, connection, instance_id)
        try:
            store.register(instance_id, "host", 1, [QUEUE], [], {})
            store.sync_queues({}, [QUEUE])
            yield bench
        finally:
            for each in [store, *bench.others]:
                each.close()


def outcome(job: Claimed, action: Action, worker_id: str = WORKER, **more: Any) -> Outcome:
    """What a worker would settle a claimed job with."""
    given: dict[str, Any] = {"started": job.claimed_at, "duration_seconds": 0.25, **more}
    return Outcome(
        job_id=job.id,
        token=job.token,
        action=action,
        attempt_number=job.attempt_count,
        queue_name=job.queue_name,
        kind=job.kind,
        worker_id=worker_id,
        **given,
    )
