"""PostgreSQL: the record of all jobs and the only arbiter. One SQL file per method in `sql/queries`.

Every method may raise `StoreUnavailable` (the connection is dropped; what was sent may or may not be committed) and
`SchemaError`. What a worker may do with a job is decided by guards in the statements, never here.
"""

import logging
import os
import select
import socket
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any
from uuid import UUID

import orjson
import psycopg
from psycopg import sql
from psycopg.rows import tuple_row

from pmqd.config import MaintenanceSettings, QueueSettings
from pmqd.job import Claimed, Outcome
from pmqd.sql_files import channel
from pmqd.store_partitions import PartitionReport, keep_partitions
from pmqd.store_reads import Depth
from pmqd.store_rescue import StoreRescue
from pmqd.store_rows import (
    Settle,
    claimed_rows,
    claiming,
    queue_pulse,
    rounds,
    settle_columns,
)
from pmqd.store_session import LostLead, StatementError
from pmqd.store_types import (
    Beat,
    Best,
    Fate,
    Marked,
    MarkedList,
    Position,
    QueuePulse,
    Rescued,
    Room,
    ServedQueue,
)

__all__ = [
    "Beat",
    "Best",
    "Depth",
    "Fate",
    "LostLead",
    "Marked",
    "MarkedList",
    "PartitionReport",
    "Position",
    "QueuePulse",
    "Rescued",
    "Room",
    "ServedQueue",
    "StatementError",
    "Store",
]


log = logging.getLogger(__name__)


class Store(StoreRescue):
    """The statements of the daemon's children."""

    _locked = False  # whether this session holds the leader's lock
    _heard: tuple[int, ...] = ()  # senders of wake-ups that came beside an answer

    # --- worker

    def claim(
        self, wanted: Sequence[UUID] | Best, *, token: UUID, worker_id: str, instance_id: UUID
    ) -> list[Claimed]:
        """Makes jobs this worker's: those whose hints it holds and that nobody else took, or the best ones without a hint.

        Args:
            wanted: Ids from hints, of which unknown, taken, paused and not yet due ones are no error; or which of the best.
            token: Fresh and random, for this call alone.
            worker_id: Who claims.
            instance_id: Its instance; without a lease that lasts five more ticks nothing is claimed.

        Returns:
            The rows won: of ids in (priority, run_at, id) order, else best first.
        """
        if not isinstance(wanted, Best) and not wanted:
            return []
        name, parameters = claiming(wanted, token, worker_id, instance_id)
        query = self._queries[name]
        return self.attempt(
            lambda connection: claimed_rows(self.raw_cursor(connection).execute(query, parameters), token)
        )

    def candidates(self, queues: Sequence[str], limit: int, without: Sequence[UUID]) -> list[UUID]:
        """What a steal would look at, best first, without some jobs; nothing is claimed.

        Args:
            queues: Best first.
            limit: Rows at most.
            without: Jobs to be passed over.
        """
        given = {"queues": list(queues), "limit": limit, "without": list(without)}
        return [row[0] for row in self.run("candidates", given)]

    def settle(self, outcomes: Sequence[Outcome], closed_tokens: Iterable[UUID]) -> dict[UUID, str]:
        """Ends attempts, with their log rows.

        Args:
            outcomes: Of several for one job at most one can be under its token; it is found.
            closed_tokens: Claims of which nothing is left to settle after this.

        Returns:
            The new status of each job that was still its owner's; who is missing was taken away.
        """
        *earlier, last = rounds(outcomes)
        statuses: dict[UUID, str] = {}
        for batch in earlier:
            statuses |= self._settle(batch, ())
        return statuses | self._settle(last, closed_tokens)

    def _settle(self, outcomes: Sequence[Outcome], closed_tokens: Iterable[UUID]) -> dict[UUID, str]:
        settle = Settle(outcomes, closed_tokens)
        query = self._queries[settle.query]
        return self.attempt(
            lambda connection: settle.statuses(
                self.plain_cursor(connection).execute(query, settle.parameters)
            )
        )

    def settle_and_claim(
        self,
        outcomes: Sequence[Outcome],
        closed_tokens: Iterable[UUID],
        wanted: Sequence[UUID] | Best,
        *,
        token: UUID,
        worker_id: str,
        instance_id: UUID,
    ) -> tuple[dict[UUID, str], list[Claimed]]:
        """`settle`, then `claim`, in one transaction and one round trip: both happen, or neither."""
        *earlier, last = rounds(outcomes)
        statuses = self.settle([each for batch in earlier for each in batch], ()) if earlier else {}
        settle = Settle(last, closed_tokens)
        settling = self._queries[settle.query]
        name, parameters = claiming(wanted, token, worker_id, instance_id)
        claim = self._queries[name]

        def work(connection: psycopg.Connection[Any]) -> tuple[dict[UUID, str], list[Claimed]]:
            with connection.pipeline(), connection.transaction():
                settled = self.plain_cursor(connection).execute(settling, settle.parameters)
                claimed = self.raw_cursor(connection).execute(claim, parameters)
            return statuses | settle.statuses(settled), claimed_rows(claimed, token)

        return self.attempt(work)

    def settle_on(
        self, conn: psycopg.Connection[Any], outcome: Outcome, closed_tokens: Iterable[UUID]
    ) -> bool:
        """Settles one job in the caller's transaction.

        Returns:
            False when the job was taken away: the caller rolls back.

        Raises:
            psycopg.Error: As it comes: the transaction is the caller's.
        """
        with conn.cursor(row_factory=tuple_row) as cursor:
            settle = Settle([outcome], closed_tokens)
            cursor.execute(self._queries[settle.query], settle.parameters)
            return outcome.job_id in settle.statuses(cursor)

    def settled_ids(self, outcomes: Sequence[Outcome]) -> dict[tuple[UUID, UUID], str]:
        """Of settles whose answer was lost: those that were committed, by job and claim token, with the status that it made."""
        columns = settle_columns(outcomes)
        return {(row[0], row[1]): row[2] for row in self.run("settled_ids", columns)}

    def claimed(self, token: UUID) -> list[Claimed]:
        """After a claim whose answer was lost: what it won after all, as it would have answered."""
        query = self._queries["claimed"]
        return self.attempt(
            lambda connection: claimed_rows(
                self.raw_cursor(connection).execute(query, {"token": token}), token
            )
        )

    # --- migrator

    def lead(self) -> int | None:
        """Becomes the leading migrator, if there is none that lives: takes the session's lock and opens a new term.

        Returns:
            The term, or None while another one leads. The lead ends with the connection.
        """
        holder = f"{socket.gethostname()}:{os.getpid()}"
        rows = self.run("lead", {"holder": holder, "lock": self._lead_lock})
        if not rows:
            return None
        self._locked = bool(rows[0][1])
        return int(rows[0][0])

    def keep_lead(self, term: int) -> None:
        """Gives the leader's sign of life; without one for more than five ticks another takes the lead, lock or not.

        Raises:
            LostLead: The term has ended.
        """
        rows = self.run("keep_lead", {"term": term, "locked": self._locked, "lock": self._lead_lock})
        if not rows:
            raise LostLead(f"term {term} has ended")
        self._locked = bool(rows[0][0])

    @property
    def _lead_lock(self) -> str:
        return f"pmqd lead {self._postgres.schema_name}"

    def listen(self) -> None:
        """Hears wake-ups from now on, on this connection."""

        def work(connection: psycopg.Connection[Any]) -> None:
            connection.add_notify_handler(self._hear)  # what comes beside the answer to a statement
            connection.execute(sql.SQL("listen {}").format(self._channel))

        self.attempt(work)

    def notifications(self, timeout: float) -> tuple[int, int]:
        """Waits for wake-ups, at most `timeout` seconds; returns how many came from others, and how many were pings of our own.

        Straight from libpq: psycopg's own way costs as much as a statement, and a worker waits meanwhile.
        """

        def work(connection: psycopg.Connection[Any]) -> tuple[int, int]:
            if timeout and not self._heard:
                poller = select.poll()
                poller.register(connection, select.POLLIN)
                poller.poll(timeout * 1000)
            connection.pgconn.consume_input()
            senders = [each.be_pid for each in iter(connection.pgconn.notifies, None)]
            senders, self._heard = [*self._heard, *senders], ()
            own = senders.count(connection.info.backend_pid)
            return len(senders) - own, own

        return self.attempt(work)

    def _hear(self, notify: psycopg.Notify) -> None:
        self._heard = (*self._heard, notify.pid)

    def ping_self(self) -> None:
        """Notifies the channel: a listening connection that does not hear it is dead."""
        self.attempt(lambda connection: connection.execute(sql.SQL("notify {}").format(self._channel)))

    @property
    def _channel(self) -> sql.Identifier:
        return sql.Identifier(channel(self._postgres.schema_name))

    def mark(self, term: int, rooms: Sequence[Room], *, most: int | None = None, full: bool) -> list[Marked]:
        """Marks due rows where there is room.

        Args:
            term: The leader's.
            rooms: In the order in which they are filled; a paused queue is skipped.
            most: How many at most in all.
            full: Whether the whole item is wanted.

        Returns:
            The rows, in (priority, run_at, id) order.

        Raises:
            LostLead: The term has ended.
        """
        rows = self.run("mark", {**_mark_parameters(term, rooms, most), "full": full})
        return [Marked(*row) for row in rows]

    def mark_ids(self, term: int, rooms: Sequence[Room], *, most: int | None = None) -> dict[int, MarkedList]:
        """As `mark`, for lists of ids.

        Args:
            term: The leader's.
            rooms: In the order in which they are filled; a paused queue is skipped. One that begins behind a row misses what
                was committed late before it, unless it is not filled so.
            most: How many at most in all.

        Returns:
            What each room gets that gets something, by its place among the rooms.

        Raises:
            LostLead: The term has ended.
        """
        parameters = _mark_parameters(term, rooms, most)
        return {
            place - 1: MarkedList(
                ids,
                dict(zip(kinds, numbers, strict=True)),
                last=Position(priority, run_at, ids[-36:]),
            )
            for place, ids, kinds, numbers, priority, run_at in self.run("mark_ids", parameters)
        }

    def marked(self, queue_name: str, low: int, high: int, limit: int = 2000) -> list[UUID]:
        """The ids of marked rows of a stretch of priorities, in order."""
        parameters = {"queue_name": queue_name, "low": low, "high": high, "limit": limit}
        return [row[0] for row in self.run("marked", parameters)]

    def redis_epoch(self) -> UUID:
        """The life of Redis that the marks belong to."""
        epoch: UUID = self.run("redis_epoch")[0][0]
        return epoch

    def new_redis_epoch(self, term: int) -> UUID:
        """Names a new life of Redis.

        Raises:
            LostLead: The term has ended.
        """
        rows = self.run("new_redis_epoch", {"term": term})
        if not rows:
            raise LostLead(f"term {term} has ended")
        epoch: UUID = rows[0][0]
        return epoch

    def stay_awake(self, term: int, seconds: float) -> None:
        """For so long inserts need not notify: this migrator looks by itself. Nothing where the term has ended."""
        self.run("stay_awake", {"term": term, "seconds": seconds})

    def fall_asleep(self, term: int) -> None:
        """From now on inserts notify. One look after this call finds what was inserted during it."""
        self.run("fall_asleep", {"term": term})

    def served_queues(self) -> list[ServedQueue]:
        """The queues that live instances serve."""
        return [ServedQueue(*row) for row in self.run("served_queues")]

    def sync_queues(self, settings: Mapping[str, QueueSettings], names: Iterable[str]) -> None:
        """Makes rows in `job_queues` for all these queues, and writes the settings of those that have some."""
        every = sorted({*names, *settings})
        given = [settings.get(name, QueueSettings()) for name in every]
        self.run(
            "sync_queues",
            {
                "names": every,
                "configured": sorted(settings),
                "priorities": [each.default_priority for each in given],
                "attempts": [each.max_attempts for each in given],
                "timeouts": [each.timeout_seconds for each in given],
                "bases": [each.retry_base_seconds for each in given],
                "maxima": [each.retry_max_seconds for each in given],
            },
        )

    # --- maintenance

    def register(
        self,
        instance_id: UUID,
        host: str,
        pid: int,
        queues: Sequence[str],
        kinds: Sequence[str],
        pools: Mapping[str, Any],
    ) -> None:
        """Gives an instance its lease; for one that has it, only what it serves is written anew.

        Args:
            instance_id: New at every start.
            host: Where it runs.
            pid: Of its master.
            queues: All that its pools serve.
            kinds: All that its applications know.
            pools: name -> {"queues": […], "processes": n, "concurrency": n}.
        """
        self.run(
            "register",
            {
                "instance_id": instance_id,
                "host": host,
                "pid": pid,
                "queues": list(queues),
                "kinds": list(kinds),
                "pools": orjson.dumps(pools).decode(),
            },
        )

    def beat(self, instance_id: UUID, *, holding: bool, stalled_tick: int | None) -> Beat:
        """Renews the lease, ticks if it is this instance's to do, and hears what is to be done. Once a second.

        Args:
            instance_id: Whose lease.
            holding: This instance made the last tick as far as the caller knows; the database decides.
            stalled_tick: The tick that it has seen unchanged for two seconds of its own clock, or None.
        """
        parameters = {
            "instance_id": instance_id,
            "holding": holding,
            "stalled_tick": stalled_tick,
            "lossless": self._postgres.standby == "synchronous",
        }
        row = self.run("beat", parameters)[0]
        lost, ticking, tick, workers, ids, tokens, orphans, pulse, now, claims_in, held = row
        return Beat(
            lost=lost,
            ticking=ticking,
            tick=tick,
            claim_workers=sorted(set(workers)),
            claims=list(zip(held, workers, strict=True)),
            cancels=list(zip(ids, tokens, strict=True)),
            orphans=orphans,
            pulse=[queue_pulse(entry, now) for entry in pulse],
            claims_in=claims_in,
        )

    def keep_partitions(
        self, retention: MaintenanceSettings, *, budget_seconds: float = 10.0
    ) -> PartitionReport:
        """Makes months ahead, drops those that are over, and cleans the default partitions for a while.

        Args:
            retention: How long finished jobs and logs are kept.
            budget_seconds: How long it may clean, in batches; the next call goes on where this one ended.
        """
        return keep_partitions(self._postgres, retention, budget_seconds, self._newest)


def _mark_parameters(term: int, rooms: Sequence[Room], most: int | None) -> dict[str, Any]:
    return {**_room_arrays(tuple(rooms)), "term": term, "most": most}


@lru_cache(maxsize=8)  # while little is to be done, the rooms are the same each time
def _room_arrays(rooms: tuple[Room, ...]) -> dict[str, str]:
    # Arrays as PostgreSQL writes them: psycopg's own way costs more than all the rest of a look that finds nothing.
    afters = [room.after for room in rooms]
    return {
        "queues": _array(f'"{room.queue_name}"' for room in rooms),
        "lows": _array(str(room.low) for room in rooms),
        "highs": _array(str(room.high) for room in rooms),
        "limits": _array(str(room.limit) for room in rooms),
        "after_priorities": _array("null" if each is None else str(each.priority) for each in afters),
        "after_times": _array("null" if each is None else f'"{each.run_at}"' for each in afters),
        "after_ids": _array("null" if each is None else each.id for each in afters),
    }


def _array(values: Iterable[str]) -> str:
    return "{" + ",".join(values) + "}"
