"""What `pmqd demo --chaos` breaks: a worker at the worst moment at which "exactly once" can be kept, and Redis.

A mail is an effect outside PostgreSQL: of a worker that dies between its intent and the settle nobody knows whether the
server has said yes, so the mail is held for a person. The kill is aimed at a worker that has handed over a whole mail and
waits for the answer, and whose earlier mails are all settled. The receiving server never says yes to that mail. The demo
plays the person too: it knows that the mail did not arrive, and releases it.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg

from penguinmails import held
from penguinmails.demo.receiver import Hold, Receiver
from pmqd.embedded import RedisServer

KILL_WORKER_AT = 250  # mails received
KILL_REDIS_AT = 500
REDIS_AWAY_SECONDS = 1.0
SETTLE_SECONDS = 5.0

# The worker whose mail is held: how many jobs it has running, and the database's time.
HOLDER = """
select worker_id, count(*), clock_timestamp() from pmqd.jobs
 where status = 'running'
   and worker_id = (select worker_id from pmqd.jobs where status = 'running' and payload ->> 'email' = %(email)s)
 group by worker_id
"""
AGAIN = """
select l.worker_id, extract(epoch from l.started - %(killed)s)::float8
  from pmqd.jobs j join pmqd.job_logs l on l.job_id = j.id
 where j.payload ->> 'email' = %(email)s and l.status = 'success'
"""


@dataclass
class Chaos:
    """The two faults, each brought about when its time has come."""

    receiver: Receiver
    redis: RedisServer
    db: psycopg.Connection[Any]
    master_pid: int
    say: Callable[[str], None]
    killed: tuple[str, str, datetime] | None = None  # recipient, worker, time
    redis_killed_at: float = 0.0
    redis_received: int = 0
    redis_back: bool = False
    _held_since: float = field(default=0.0, repr=False)
    _first: int = field(default=0, repr=False)

    def begin(self) -> None:
        """The campaign begins: count from here on."""
        self._first = self.receiver.count
        self.receiver.hold_at = self._first + KILL_WORKER_AT

    def step(self) -> None:
        """Do what is due now."""
        hold = self.receiver.hold
        if hold is not None and self.killed is None:
            self._kill_worker(hold)
        elif self.killed and not self.redis_killed_at and self.receiver.count >= self._first + KILL_REDIS_AT:
            self._kill_redis()
        elif (
            self.redis_killed_at
            and not self.redis_back
            and time.monotonic() > self.redis_killed_at + REDIS_AWAY_SECONDS
        ):
            self._restart_redis()

    def release(self) -> bool:
        """Decide about the mail that is held: it is sent again. Whether there was one."""
        with self.db.transaction():
            found = held.read_held(self.db)
            if found:
                held.release(self.db, [each.id for each in found])
        for each in found:
            self.say(f"the mail to {each.email} is held, and released: penguinmails held release {each.id}")
        return bool(found)

    def faults(self) -> list[str]:
        """What did not happen as planned; nothing if both faults fell into the campaign."""
        return [
            *([] if self.killed else ["no worker was killed: the campaign was over too soon"]),
            *(
                []
                if self.redis_back
                else ["Redis was not killed and restarted: the campaign was over too soon"]
            ),
        ]

    def lines(self) -> list[str]:
        """What was killed, and what became of it."""
        if not self.killed:
            return []
        email, worker, at = self.killed
        row = self.db.execute(AGAIN, {"email": email, "killed": at}).fetchone()
        if row is None:
            return [f"chaos       the mail that worker {short(worker)} had in hand was not sent again"]
        return [
            f"chaos       the mail in hand was held; once released it was sent by {short(row[0])}, {row[1]:,.1f} s after the kill"
        ]

    def _kill_worker(self, hold: Hold) -> None:
        """SIGKILL once the held mail is all that the worker has: what it sent before is settled then."""
        self._held_since = self._held_since or time.monotonic()
        row = self.db.execute(HOLDER, {"email": hold.recipient}).fetchone()
        if row is None or row[1] != 1:
            if time.monotonic() > self._held_since + SETTLE_SECONDS:
                raise RuntimeError(
                    f"the worker that sends to {hold.recipient} did not settle its other jobs: {row}"
                )
            return
        pid = client_pid(hold.client_port, self.receiver.port)
        if _parent(pid) != self.master_pid:
            raise RuntimeError(
                f"process {pid} talks to the SMTP server but is no worker of {self.master_pid}"
            )
        os.kill(pid, signal.SIGKILL)
        self.killed = (hold.recipient, row[0], row[2])
        self.say(
            f"kill -9 of worker {short(row[0])} (pid {pid}) after {self.receiver.count - self._first} mails: it had handed over the mail"
            f" to {hold.recipient} and waited for the answer, which never came"
        )
        hold.release()

    def _kill_redis(self) -> None:
        self.redis_received = self.receiver.count
        pid = self.redis.pid
        self.redis.kill()
        self.redis_killed_at = time.monotonic()
        self.say(f"kill -9 of the Redis server (pid {pid}) after {self.redis_received - self._first} mails")

    def _restart_redis(self) -> None:
        meanwhile = self.receiver.count - self.redis_received
        self.redis.start()
        self.redis_back = True
        away = time.monotonic() - self.redis_killed_at
        self.say(f"Redis is back, empty, after {away:.1f} s; {meanwhile} mails arrived meanwhile")


def short(worker_id: str) -> str:
    """The worker's own part of its id: host:instance:w2.1 is w2.1."""
    return worker_id.rpartition(":")[2]


def client_pid(port: int, server_port: int) -> int:
    """The process that holds the connection from this port to that server's, both on this machine.

    The socket's inode, then who has it open (proc(5)). The kernel gives one port to several connections, also to such as
    are over, if their other ends differ.

    Raises:
        RuntimeError: no process that we may look into has it.
    """
    inode = _inode(port, server_port)
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for descriptor in (folder / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if str(descriptor.readlink()) == f"socket:[{inode}]":
                        return int(folder.name)
    raise RuntimeError(f"no process with the connection from port {port} to {server_port} was found")


def _inode(port: int, server_port: int) -> str:
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        parts = line.split()
        if [int(end.rpartition(":")[2], 16) for end in parts[1:3]] == [port, server_port]:
            return parts[9]
    raise RuntimeError(f"the connection from port {port} to {server_port} is gone")


def _parent(pid: int) -> int:
    # The name in brackets may hold spaces; the parent is the second word after it.
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
