"""Giant and hostile payloads: refused early by the client, and harmless when a foreign producer brought them in by SQL."""

import math
import tracemalloc
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pmqd import App, Job, codec, rows
from pmqd.config import PostgresSettings
from pmqd.errors import EnqueueError
from pmqd.job import MAX_PAYLOAD_BYTES
from pmqd.store import Store
from tests.fix_servers import wait_until
from tests.worker_family import Bank, Family, family, open_bank

app = App()


@app.task(queue="q", name="take")
def take(job: Job, value: Any = None) -> str:
    """Takes whatever it is given."""
    return type(value).__name__


@app.task(queue="q", name="strict")
def strict(job: Job, count: int) -> int:
    """Takes a number."""
    return count


@app.handler("whole")
def whole(job: Job) -> str:
    """Takes any payload."""
    return type(job.payload).__name__


@pytest.fixture
def bank(database: str, redis_url: str) -> Iterator[Bank]:
    """The test's look at the stores."""
    with open_bank(database, redis_url) as bank:
        yield bank


@pytest.fixture
def workers(database: str, redis_url: str, tmp_path: Path) -> Iterator[Family]:
    """A family that runs the tasks above."""
    with family(database, redis_url, app, tmp_path, pool={"queues": ["q", "whole"]}) as workers:
        yield workers


def nested(depth: int) -> list[Any]:
    """A list in a list in a list."""
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


# --- the client ----------------------------------------------------------------------------------------------

REFUSED = {
    "a NUL": {"value": "a\0b"},
    "half a surrogate pair": {"value": "\ud800"},
    "a key of half a pair": {"value": {"\ud800": 1}},
    "NaN": {"value": math.nan},
    "infinity": {"value": [-math.inf]},
    "an integer of 4,300 digits": {"value": 10**4300},
    "an integer of 65 bits": {"value": 2**64},
    "100,000 lists in each other": {"value": nested(100_000)},
    "what has no form": {"value": object()},
    "300 KiB": {"value": "x" * 300_000},
    "300 KiB in pieces": {"value": ["x" * 1000] * 300},
    "300 KiB of blanks after commas": {"value": [0] * 100_000},
}


@pytest.mark.parametrize("payload", REFUSED.values(), ids=REFUSED)
def test_hostile_payloads_are_refused_by_the_client(payload: dict[str, Any]) -> None:
    """Each is one EnqueueError with a short text, from both ways in; nothing is sent."""
    with pytest.raises(EnqueueError) as caught:
        rows.payload_of(payload)
    assert len(str(caught.value)) < 500
    with pytest.raises(EnqueueError) as caught:
        rows.checked_payload(take.arguments(**payload))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("shape", ["value", "list", "wrong type", "wrong name", "kind", "tag"])
def test_hostile_payloads_of_a_gigabyte_are_refused_before_they_are_copied(shape: str) -> None:
    """A text of any size is refused at its length: neither its JSON nor its repr is built."""
    text = "x" * (64 << 20)
    tries: dict[str, Any] = {
        "value": lambda: take.arguments(value=text),
        "list": lambda: rows.payload_of({"a": [{"b": text}]}),
        "wrong type": lambda: strict.arguments(count=text),
        "wrong name": lambda: strict.arguments(count=1, other=text),
        "kind": lambda: rows.row_of("q", text, b"{}", {}, None),
        "tag": lambda: rows.row_of("q", "k", b"{}", {"id": text}, None),
    }
    tracemalloc.start()
    try:
        with pytest.raises(EnqueueError) as caught:
            tries[shape]()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20
    assert len(str(caught.value)) < 500


def test_hostile_payloads_may_be_as_large_as_allowed() -> None:
    """The early look refuses nothing that PostgreSQL would take."""
    text = "x" * (MAX_PAYLOAD_BYTES - 13)
    assert len(rows.payload_of({"value": text})) == MAX_PAYLOAD_BYTES - 1
    assert len(take.arguments(value=[text[:100_000], text[:100_000]])) > 200_000


def test_hostile_payloads_as_text_are_a_value_error() -> None:
    """What is read from a store or a list is data or a ValueError, never another error."""
    digits = b"1" * 20
    for text in (
        b"[" * 100_000,
        b"[" * 100_000 + digits + b"]" * 100_000,
        b'{"a":' * 50_000 + digits + b"}" * 50_000,
        b"[" + b"1" * 5000 + b"]",
        b'"\xff"',
        b'"\\ud800"'[:-1],
        b"NaN",
        b"",
    ):
        with pytest.raises(ValueError, match=r"\w"):
            codec.loads(text)


# --- a foreign producer --------------------------------------------------------------------------------------

FAIL = {
    "deep": ("take", '{"value": ' + "[" * 3000 + "]" * 3000 + "}", "nested|recursion|depth"),
    "deep beside a long number": (
        "take",
        '{"long": 123456789012345678901234567890, "value": ' + "[" * 3000 + "]" * 3000 + "}",
        "nested",
    ),
    "an integer of 5,000 digits": ("take", '{"value": ' + "1" * 5000 + "}", "digits"),
    "a number of 100,000 digits": ("take", '{"value": 1e100000}', "digits"),
    "no object": ("take", "[1]", "no JSON object"),
    "null": ("take", "null", "no JSON object"),
    "a parameter that there is not": ("take", '{"__class__": "x", "conn": 1}', "__class__"),
    "a text for a number": ("strict", '{"count": "1; drop table jobs"}', "count"),
    "1e400 for a number": ("strict", '{"count": 1e400}', "count|digits|cannot be stored"),
}
COMPLETE = {
    "an object as a value": ("take", '{"value": {"__proto__": {"a": 1}, "constructor": 1}}'),
    "100,000 keys": ("take", '{"value": {' + ",".join(f'"{n}":0' for n in range(20_000)) + "}}"),
    "control characters": ("take", '{"value": "\\u001b[2J\\u0007\\u009b\\r\\n<0>"}'),
    "1e400": ("take", '{"value": 1e400}'),
    "a tiny number": ("take", '{"value": 1e-400}'),
}


def insert(bank: Bank, kind: str | None, payload: str, queue: str = "q", **columns: Any) -> Any:
    """One job as a foreign producer inserts it: the JSON as it is."""
    given = {"queue_name": queue, "kind": kind, "payload": payload, "max_attempts": 1, **columns}
    row = bank.connection.execute(
        f"insert into pmqd.jobs ({', '.join(given)}) values ({', '.join(['%s'] * len(given))}) returning id",
        list(given.values()),
    ).fetchone()
    assert row is not None
    return row["id"]


def failed(bank: Bank, job_id: Any) -> tuple[int, str]:
    """Waits until a job has failed; its attempts and its error. Without its payload, which nobody here could read."""
    asked = "select attempt_count, last_error_message from pmqd.jobs where id = %s and status = 'failed'"
    row = wait_until(lambda: bank.connection.execute(asked, [job_id]).fetchone(), 20, f"the end of {job_id}")
    assert row is not None
    return row["attempt_count"], row["last_error_message"]


def test_hostile_payloads_by_sql_end_with_their_cause(bank: Bank, workers: Family) -> None:
    """A real worker takes them all beside an honest job: what cannot be read fails at once, uncrashed, with a clear cause."""
    failing = {name: insert(bank, kind, text, max_attempts=3) for name, (kind, text, _) in FAIL.items()}
    passing = {name: insert(bank, kind, text) for name, (kind, text) in COMPLETE.items()}
    passing |= {text: insert(bank, None, text, "whole") for text in ("null", "[]", '"x"', "1", "true")}
    honest = bank.enqueue("strict", {"count": 7})
    slot = workers.start()
    assert bank.wait(honest, watch=workers.logged)["result"] == 7
    for name, job_id in passing.items():
        assert bank.wait(job_id, watch=workers.logged), name
    for name, job_id in failing.items():
        attempts, said = failed(bank, job_id)
        assert attempts == 1, name
        assert any(word in said for word in FAIL[name][2].split("|")), said
    assert workers.process(slot).is_alive()
    assert workers.stop(slot) == 0


TIMES = ["-infinity", "infinity", "0044-03-15 BC", "9999-12-30 23:59:59+00", "10000-01-01", "294276-12-31"]


@pytest.mark.parametrize("column", ["run_at", "created_at"])
@pytest.mark.parametrize("moment", TIMES)
def test_hostile_payloads_with_an_impossible_time_are_refused(
    bank: Bank, database: str, column: str, moment: str
) -> None:
    """A time that Python cannot read would stop whoever claims or lists the row: PostgreSQL refuses it, or all can read it."""
    try:
        insert(bank, "take", "{}", **{column: moment})
        if column == "run_at":
            bank.connection.execute("select pmqd.enqueue('q', '{}', run_at => %s::timestamptz)", [moment])
    except psycopg.errors.CheckViolation:
        return
    store = Store(PostgresSettings(dsn=database), "test")
    try:
        listed, _ = store.list_jobs("q", None, 10, None)
        assert listed
        assert store.show_job(listed[0]["id"]) is not None
    finally:
        store.close()


def test_hostile_payloads_beside_odd_columns(bank: Bank, workers: Family) -> None:
    """Tags with nulls and several dimensions, a kind that steers terminals: the worker goes on."""
    for tags in (["a", None], [["a", "b"], ["c", "d"]], ["\x1b[2J", ""]):
        insert(bank, "take", "{}", tags=tags)
    insert(bank, "\x1b]0;x\x07\r\n<0>" + "k" * 100_000, "{}")
    insert(bank, "", "{}")
    old = insert(bank, "take", "{}", run_at=datetime(1, 1, 2, tzinfo=UTC))
    slot = workers.start()
    bank.wait(old, watch=workers.logged)
    honest = bank.enqueue("strict", {"count": 1})
    bank.wait(honest, watch=workers.logged)
    assert workers.stop(slot) == 0
