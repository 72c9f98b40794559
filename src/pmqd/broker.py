"""Redis, the delivery: lists of hints, the epoch, the live status of jobs. Nothing here is a truth.

A hint may be missing, stale, doubled or forged at any instant; the guarded claim in PostgreSQL decides. So every
method may be repeated after an error, and after any timeout the connection is dropped: the reply of one command
must never be read as that of the next.
"""

from __future__ import annotations

import select
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from hashlib import sha1
from importlib.resources import files
from typing import Any, Final
from uuid import UUID

import redis

from pmqd import live, resp
from pmqd.config import RedisSettings
from pmqd.errors import BrokerUnavailable, PmqdError
from pmqd.hints import Hint, hinted_id, ids_of, uuid_or_none
from pmqd.job import BAND_RANGES, check_queue_name
from pmqd.route import Route

Member = bytes | str | UUID

_TIMEOUT_SECONDS: Final = 1.5
_PUSH_BYTES: Final = 4 * 1024 * 1024  # of one script call; full items are up to 256 KiB each
_REOFFER_IDS: Final = 2000
_TOLD_AT_ONCE: Final = 500
_RECENT_SECONDS: Final = 3600
_RECENT_MOST: Final = 10_000
_HASH_TAG: Final = (
    'this is a cluster: redis.prefix needs a hash tag, such as "{pmqd}:", so that one node has all keys'
)
_ADVICE: Final[tuple[tuple[type[Exception] | str, str], ...]] = (
    (redis.exceptions.ReadOnlyError, "redis.url must lead to the primary, this is a replica"),
    (redis.exceptions.BusyLoadingError, "it is still loading its data"),
    (
        redis.exceptions.MasterDownError,
        "it is a replica that has lost its primary; redis.url must lead to the primary",
    ),
    (redis.exceptions.OutOfMemoryError, "it has reached maxmemory; maxmemory-policy should be noeviction"),
    (
        redis.exceptions.NoPermissionError,
        "the user in redis.url needs more rights: docs/high-availability.md lists them",
    ),
    (redis.exceptions.AuthenticationError, "redis.url needs the right user and password"),
    (redis.exceptions.ClusterCrossSlotError, _HASH_TAG),
    (redis.exceptions.ClusterDownError, "the cluster does not serve our keys now"),
    (redis.exceptions.TryAgainError, "our keys are on their way to another node"),
    (redis.exceptions.MovedError, _HASH_TAG),
    (redis.exceptions.AskError, "our keys are on their way to another node"),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "redis.ca_file must hold its authority, and redis.url its name as in its certificate",
    ),
    ("MISCONF", "it cannot save its data, and refuses writes: make room on its disk"),
    ("NOREPLICAS", "it has fewer replicas than min-replicas-to-write"),
    ("BUSY ", "a script of somebody else's runs there"),
    ("UNBLOCKED", "its role has changed"),
)


class EpochMismatch(PmqdError):  # noqa: N818 - named like its siblings in errors.py: a state, not a fault
    """Redis is not the one it was: it lost its data, or another leader has set a new epoch. Nothing was pushed."""


class Broker:
    """One process's connections to Redis; opened when first used, after the fork. Not for several threads.

    Every method raises `BrokerUnavailable` when Redis does not do what was asked, for whatever reason; the
    connection is dropped then and made anew by the next call.
    """

    def __init__(
        self, settings: RedisSettings, role: str, *, timeout_seconds: float = _TIMEOUT_SECONDS
    ) -> None:
        """Takes the settings, the child's role (for the server's client list) and the longest wait for a reply."""
        self.dropped = 0
        """List members met so far that were no hints."""
        self._prefix = settings.prefix
        self._timeout_seconds = timeout_seconds
        route = Route(settings, role, timeout_seconds)
        self._where, self._led = str(route), route.led
        self._client = redis.Redis(connection_pool=route.pool())
        # Scripts have a connection of their own: a pool's, and all that a client does beside, costs four times the call.
        self._line = route.connection()
        self._pop = route.connection()
        self._pop_client_id = 0
        self._pop_until: float | None = None
        self._life_socket: Any = None
        self._server = ""

    def queue_key(self, name: str, band: str) -> str:
        """The key of a list.

        Args:
            name: The queue.
            band: "high", "normal" or "low".

        Raises:
            EnqueueError: No queue may have this name.
            ValueError: There is no such band.
        """
        return _queue_key(self._prefix, name, band)

    def push(self, epoch: UUID, items: Sequence[tuple[str, Sequence[Member]]]) -> dict[str, int]:
        """Pushes hints, first to run first. Repeating it makes doubles, which are harmless.

        Args:
            epoch: What Redis must have.
            items: Keys (`queue_key`) and their members: ids, or JSON objects with `id`.

        Returns:
            Each key's length afterwards.

        Raises:
            EpochMismatch: Redis has another epoch or none.
        """
        lengths: dict[str, int] = {}
        for part in _parts(items):
            arguments: list[Any] = [str(epoch)]
            for _, members in part:
                arguments += [len(members), *members]
            keys = [key for key, _ in part]
            lengths |= zip(keys, self._run("push", [self._epoch_key, *keys], arguments), strict=True)
        return lengths

    def push_ids(self, epoch: UUID, items: Sequence[tuple[str, str]]) -> dict[str, int]:
        """As `push`, for ids that stand in one text already.

        Args:
            epoch: What Redis must have.
            items: Keys (`queue_key`) and their ids, each with a space between them.

        Returns:
            Each key's length afterwards.

        Raises:
            EpochMismatch: Redis has another epoch or none.
        """
        keys = [key for key, _ in items]
        arguments = [epoch, *(ids for _, ids in items)]
        return dict(zip(keys, self._run("push_ids", [self._epoch_key, *keys], arguments), strict=True))

    def lengths(self, keys: Sequence[str]) -> dict[str, int]:
        """How many hints wait in each list."""
        return dict(zip(keys, self._run("lengths", keys, []), strict=True)) if keys else {}

    def reoffer(self, epoch: UUID, key: str, ids: Sequence[UUID]) -> int:
        """Pushes those marked rows that are not in the list, at the pop end.

        Args:
            epoch: What Redis must have.
            key: The list (`queue_key`).
            ids: Marked rows in order, at most 2,000; more are left out.

        Returns:
            How many were missing.

        Raises:
            EpochMismatch: Redis has another epoch or none.
        """
        if not ids:
            return 0
        arguments = [str(epoch), *map(str, ids[:_REOFFER_IDS])]
        return int(self._run("reoffer", [self._epoch_key, key], arguments))

    def hint(self, name: str, ids: Sequence[UUID], *, longest: int) -> int:
        """A producer's own hints for high-band jobs that it has committed; see `lua/hint.lua`.

        Args:
            name: The queue.
            ids: Jobs, first to run first.
            longest: A list as long as this gets no more.

        Returns:
            How many were pushed.
        """
        key = self.queue_key(name, "high")
        return int(self._run("hint", [self._epoch_key, key], [longest, *map(str, ids)]))

    def give_back(self, items: Sequence[tuple[str, bytes]]) -> None:
        """Puts hints back to where they were popped.

        Args:
            items: Keys and members in the order in which they were popped.
        """
        members: dict[str, list[bytes]] = {}
        for key, member in reversed(items):  # the one popped first must be the next again
            members.setdefault(key, []).append(member)
        if not members:
            return
        with self._guard(), self._client.pipeline(transaction=False) as pipe:
            for key, group in members.items():
                pipe.rpush(key, *group)
            pipe.execute()

    def server_life(self) -> tuple[str, UUID | None]:
        """Which server this is, and which epoch its data belong to; an error where it would refuse a push.

        Returns:
            The server's `run_id` (new at every start) and the epoch, None where there is none.
        """
        pool = self._client.connection_pool
        with self._guard():
            connection: Any = pool.get_connection()
            socket = connection._sock  # noqa: SLF001 - as `_pop_socket`
            pool.release(connection)
            if socket is not self._life_socket:  # asked once per connection: none outlives its server
                info: Any = self._client.info("server")
                self._life_socket, self._server = socket, str(info.get("run_id", ""))
        epoch = self._run("server_life", [self._epoch_key, f"{self._prefix}pmqd:probe"], [])
        return self._server, uuid_or_none(epoch)

    def set_epoch(self, epoch: UUID) -> None:
        """Binds what is in Redis from now on to an epoch."""
        with self._guard():
            self._client.set(self._epoch_key, str(epoch))

    def clear_lists(self, keys: Sequence[str]) -> None:
        """Removes lists; the rows behind their hints stay marked and are offered again."""
        if keys:
            with self._guard():
                self._client.unlink(*keys)

    @property
    def popping(self) -> bool:
        """Whether a pop is under way."""
        return self._pop_until is not None

    def pop_start(self, keys: Sequence[str], n: int, timeout_seconds: float) -> None:
        """Asks for hints without waiting for them: watch `pop_fileno`, then call `pop_finish`.

        Args:
            keys: Lists (`queue_key`), first to serve first.
            n: Most hints to pop; all come from one list.
            timeout_seconds: How long Redis may hold the request while all lists are empty.
        """
        assert self._pop_until is None, "a pop is under way"
        held = max(timeout_seconds, 0.001)  # 0 would mean for ever
        with self._guard(pop=True):
            self._open_pop()
            self._pop.send_command("BLMPOP", f"{held:.3f}", len(keys), *keys, "RIGHT", "COUNT", n)
        self._pop_until = time.monotonic() + max(self._timeout_seconds, held + 0.5)

    def pop_fileno(self) -> int:
        """The descriptor that becomes readable when the answer to a pop has come."""
        return int(self._pop_socket.fileno())

    def pop_ready(self) -> bool:
        """Whether the answer to a pop has come (or its connection has ended)."""
        return self.popping and _readable(self.pop_fileno())

    def pop_overdue(self, now: float) -> bool:
        """Whether an answer should have come long ago: then `pop_abort`, as the wire or the server is dead.

        Args:
            now: `time.monotonic()`.
        """
        return self._pop_until is not None and now > self._pop_until

    def pop_left(self, now: float) -> float:
        """Seconds until that, while a pop is under way.

        Args:
            now: `time.monotonic()`.
        """
        return 0.0 if self._pop_until is None else self._pop_until - now

    def pop_finish(self) -> list[Hint]:
        """The hints that came, in order; none when the time was up. Members that are no hints are dropped."""
        with self._guard(pop=True):
            answer = self._pop.read_response()
        self._pop_until = None
        return [] if answer is None else self._hints(*answer)

    def pop_abort(self) -> None:
        """Gives up a pop and its connection. What Redis may have popped meanwhile is found by a reoffer."""
        self._pop_until = None
        self._pop.disconnect()

    def pop_cancel(self) -> list[Hint]:
        """Ends a pop before its time, without losing what it may have popped.

        Returns:
            The hints that had come already: to be claimed or given back.
        """
        if not self.popping:
            return []
        deadline = time.monotonic() + self._timeout_seconds
        while not self.pop_ready() and time.monotonic() < deadline:
            with self._guard(pop=True):
                if self._client.client_unblock(self._pop_client_id):
                    break
            time.sleep(0.002)  # the pop went over another connection: the server may not have read it yet
        return self.pop_finish()

    def tell(self, events: Sequence[live.Event]) -> None:
        """Writes what people look at, in one round trip for some hundreds of events.

        Args:
            events: From `pmqd.live`, in their order.
        """
        for start in range(0, len(events), _TOLD_AT_ONCE):
            commands, count = live.commands(events[start : start + _TOLD_AT_ONCE], self._prefix)
            with self._guard(), self._in_step():
                self._open(self._line)
                resp.send(self._line, commands, count)

    def offered(self, name: str, ids: Sequence[UUID]) -> None:
        """Adds jobs to those of a queue that were offered lately; see `lua/offered.lua`."""
        for start in range(0, len(ids), _TOLD_AT_ONCE):
            some = ids[start : start + _TOLD_AT_ONCE]
            self._run(
                "offered", [f"{self._prefix}recent_jobs:{name}"], [_RECENT_SECONDS, _RECENT_MOST, *some]
            )

    def status_of(self, job_id: UUID) -> dict[str, str]:
        """The live status of a job (`job:ID`); empty where none is kept."""
        with self._guard():
            found: Any = self._client.hgetall(f"{self._prefix}job:{job_id}")
        return {key.decode(errors="replace"): value.decode(errors="replace") for key, value in found.items()}

    def ping(self) -> float:
        """Asks for a sign of life; returns how long it took, in seconds."""
        started = time.monotonic()
        with self._guard():
            self._client.ping()
        return time.monotonic() - started

    def info(self) -> dict[str, Any]:
        """The server's INFO, as redis-py reads it: what `pmqd doctor` judges."""
        with self._guard():
            found: Any = self._client.info()
        return dict(found)

    def reset(self) -> None:
        """Drops both connections; the next call makes them anew. Never raises."""
        self.pop_abort()
        self._drop()

    def close(self) -> None:
        """Gives back what a pop under way may have got, and ends the connections. Never raises."""
        with suppress(BrokerUnavailable):
            self.give_back([(hint.key, hint.member) for hint in self.pop_cancel()])
        self.reset()

    @property
    def _pop_socket(self) -> Any:
        """The socket of the pop's connection, None while there is none."""
        return _socket_of(self._pop)

    @property
    def _epoch_key(self) -> str:
        return f"{self._prefix}pmqd:epoch"

    def _run(self, script: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        values = [str(value) if isinstance(value, UUID) else value for value in arguments]
        text, digest = _scripts()[script]
        with self._guard():
            self._open(self._line)
            try:
                return self._call("EVALSHA", digest, len(keys), *keys, *values)
            except redis.exceptions.NoScriptError:  # a server that has started since, or another one
                self._call("SCRIPT LOAD", text)
                return self._call("EVALSHA", digest, len(keys), *keys, *values)

    def _call(self, *command: Any) -> Any:
        """One command and its answer, on the connection of the scripts."""
        with self._in_step():
            self._line.send_command(*command)
            return self._line.read_response()

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """Ends the connection of the scripts where an answer may be outstanding: the next call must not read it."""
        try:
            yield
        except redis.ResponseError:  # an answer too
            raise
        except BaseException:
            self._line.disconnect()
            raise

    @contextmanager
    def _guard(self, *, pop: bool = False) -> Iterator[None]:
        """Turns whatever redis-py raises into one error, and never lets a connection be used after it."""
        try:
            yield
        except (redis.RedisError, OSError) as error:
            if "PMQEPOCH" in str(error):
                raise EpochMismatch(f"Redis at {self._where} has another epoch: its data were lost") from None
            if pop:
                self.pop_abort()
            self._drop()
            raise BrokerUnavailable(self._explained(error)) from error

    def _drop(self) -> None:
        """Ends all connections but that of the pop."""
        with suppress(redis.RedisError, OSError):
            self._line.disconnect()
            self._client.connection_pool.disconnect()

    def _explained(self, error: Exception) -> str:
        advice = next((f" ({text})" for sign, text in _ADVICE if _shows(error, sign)), "")
        return f"Redis at {self._where} did not answer as it should: {type(error).__name__}: {error}{advice}"

    def _open(self, connection: Any) -> None:
        """Connects, unless the connection is there and silent: something to read can only be its end."""
        socket = _socket_of(connection)
        if socket is not None and _readable(socket.fileno()):
            connection.disconnect()
        if _socket_of(connection) is None or self._led:
            connection.connect()

    def _open_pop(self) -> None:
        before = self._pop_socket
        self._open(self._pop)
        if self._pop_socket is not before:
            self._pop.send_command("CLIENT", "ID")
            self._pop_client_id = int(self._pop.read_response())

    def _hints(self, key: bytes, members: Sequence[bytes]) -> list[Hint]:
        name = key.decode()
        ids = ids_of(members)
        if ids is not None:
            return [Hint(name, *each) for each in zip(ids, members, strict=True)]
        hints = []
        for member in members:
            job_id = hinted_id(member)
            if job_id is None:
                self.dropped += 1
            else:
                hints.append(Hint(name, job_id, member))
        return hints


@lru_cache(maxsize=4096)
def _queue_key(prefix: str, name: str, band: str) -> str:
    check_queue_name(name)
    if band not in BAND_RANGES:
        raise ValueError(f"band {band!r} is not allowed: {', '.join(BAND_RANGES)}")
    return f"{prefix}queue:{name}" if band == "normal" else f"{prefix}queue:{name}:{band}"


def _parts(items: Sequence[tuple[str, Sequence[Member]]]) -> Iterator[list[tuple[str, list[Member]]]]:
    """Cuts a push into calls of bounded size; order within a list stays."""
    part: list[tuple[str, list[Member]]] = []
    size = 0
    for key, members in items:
        group: list[Member] = []
        for member in members:
            length = 36 if isinstance(member, UUID) else len(member)
            if size and size + length > _PUSH_BYTES:
                yield [*part, (key, group)] if group else part
                part, group, size = [], [], 0
            group.append(member)
            size += length
        if group:
            part.append((key, group))
    if part:
        yield part


def _shows(error: Exception, sign: type[Exception] | str) -> bool:
    return sign in str(error) if isinstance(sign, str) else isinstance(error, sign)


def _socket_of(connection: Any) -> Any:
    return connection._sock  # noqa: SLF001 - redis-py has no public way to wait for two things


def _readable(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


_SCRIPTS: Final = ("push", "push_ids", "lengths", "reoffer", "hint", "offered", "server_life")


def _lua(name: str) -> str:
    return (files("pmqd") / "lua" / f"{name}.lua").read_text()


@lru_cache(maxsize=1)
def _scripts() -> dict[str, tuple[str, str]]:
    """The text of each script, and the digest that Redis knows it by."""
    texts = {name: _lua(name) for name in _SCRIPTS}
    return {name: (text, sha1(text.encode()).hexdigest()) for name, text in texts.items()}  # noqa: S324 - its name there
