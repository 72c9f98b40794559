"""Log records: one line each, whatever is in them."""

import io
import json
import logging
import os
import pty
import re
import threading
import uuid
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest

from pmqd import logs
from pmqd.settings import LogSettings
from tests.jobs import a_claim, running

logger = logging.getLogger("trial")


@pytest.fixture(autouse=True)
def root_as_before() -> Iterator[None]:
    """The root logger goes back to what pytest made of it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)


@pytest.fixture
def stream() -> io.StringIO:
    """Where this test's records go."""
    return io.StringIO()


def as_json(stream: io.StringIO, level: Any = "info") -> None:
    """Log JSON lines into the stream."""
    logs.configure(LogSettings(format="json", level=level), "worker 3", stream)


def records(stream: io.StringIO) -> list[dict[str, Any]]:
    """The JSON records, each of which must be one line."""
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def fail(text: str) -> None:
    """An error with this text."""
    raise ValueError(text)


def test_a_record_has_its_fields(stream: io.StringIO) -> None:
    """Time (RFC 3339, UTC), level, child, message, and what `extra=` gave."""
    as_json(stream)
    logger.warning(
        "%d jobs", 3, extra={"queue": "mail", "ids": [1], "id": uuid.UUID(int=1), "rate": float("inf")}
    )
    (record,) = records(stream)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record.pop("time"))
    assert record == {
        "level": "warning",
        "child": "worker 3",
        "message": "3 jobs",
        "queue": "mail",
        "ids": [1],
        "id": "00000000-0000-0000-0000-000000000001",
        "rate": "inf",
    }


def test_records_inside_a_job_carry_it(stream: io.StringIO) -> None:
    """The job is named on every record made while its handler runs, and on none after."""
    as_json(stream)
    with running(a_claim(attempt_count=2)):
        logger.info("in")
    with running(a_claim(kind=None)):
        logger.info("in")
    logger.info("out")
    first, second, third = records(stream)
    assert (first["job_id"], first["attempt"], first["queue"], first["kind"]) == (
        str(UUID(int=1)),
        2,
        "mail",
        "send",
    )
    assert "kind" not in second
    assert "job_id" not in third


@pytest.mark.parametrize("form", ["json", "console"])
def test_nothing_in_a_message_steers_the_terminal(stream: io.StringIO, form: Any) -> None:
    """Control characters, line breaks and lone surrogates are written as escapes; the output is valid UTF-8."""
    logging.getLogger().handlers.clear()  # a report of the raw record could not be encoded
    logs.configure(LogSettings(format=form), "master", stream)
    logger.info("a\x1b[2Jb\nc\rd\x00e\u202ef\ud800g", extra={"kind": "x\x1b\ny"})
    text = stream.getvalue()
    text.encode()
    assert text.count("\n") == 1
    assert not set(text) & {"\x1b", "\x00", "\r", "\u202e"}
    assert r"\u001b[2Jb\nc" in text


def test_a_long_record_is_cut(stream: io.StringIO) -> None:
    """A record is at most 8 KiB and still JSON; of a traceback the end is kept."""
    logging.getLogger().handlers.clear()  # nobody wants to see these records in a report
    as_json(stream)
    logger.info("x" * 100_000)
    logger.info("\x00" * 100_000)
    logger.info("many", extra={f"field{n}": "y" * 1000 for n in range(500)})
    try:
        fail("z" * 20_000 + " the end")
    except ValueError:
        logger.exception("failed")
    assert [len(line) <= logs.MAX_BYTES for line in stream.getvalue().splitlines()] == [True] * 4
    plain, _, many, failed = records(stream)
    assert plain["message"].endswith("…[cut]")
    assert many["message"] == "many"
    assert failed["error"].endswith(" the end")


def test_a_long_record_is_cut_on_a_terminal_too(stream: io.StringIO) -> None:
    """The limit holds for text as well, in bytes."""
    logs.configure(LogSettings(format="console"), "master", stream)
    logger.info("ä" * 100_000)
    assert len(stream.getvalue().encode()) <= logs.MAX_BYTES + 1


def test_a_bad_record_hurts_nobody(stream: io.StringIO) -> None:
    """Arguments that do not fit, objects whose text raises, circles: the record is written all the same."""

    class Hostile:
        def __str__(self) -> str:
            raise RuntimeError("no")

    circle: list[Any] = []
    circle.append(circle)
    logging.getLogger().handlers.clear()  # pytest's own handlers raise what they meet
    as_json(stream)
    logger.info("%d", "three")
    logger.info("%s", Hostile())
    logger.info("ok", extra={"hostile": Hostile(), "circle": circle})
    first, second, third = records(stream)
    assert first["message"] == "%d [arguments do not fit: TypeError]"
    assert "RuntimeError" in second["message"]
    assert third["hostile"] == "<Hostile: RuntimeError>"
    assert third["circle"] == "[[...]]"


def test_a_log_that_nobody_reads_hurts_nobody() -> None:
    """A closed pipe or stream does not raise into the code that logs."""
    reading, writing = os.pipe()
    os.close(reading)
    broken = os.fdopen(writing, "w")
    logs.configure(LogSettings(format="json"), "master", broken)
    logger.info("to nobody")
    with pytest.raises(BrokenPipeError):
        broken.close()
    logger.info("to nobody")


def test_the_level_counts(stream: io.StringIO) -> None:
    """Less serious records are not written."""
    as_json(stream, "warning")
    logger.info("no")
    logger.warning("yes")
    assert [record["message"] for record in records(stream)] == ["yes"]


def test_configure_again_replaces(stream: io.StringIO) -> None:
    """After a fork or a reload each record is still written once, in the new form."""
    as_json(stream)
    as_json(stream, "error")
    logger.error("once")
    assert len(records(stream)) == 1


def test_auto_looks_for_a_terminal(stream: io.StringIO) -> None:
    """Without a terminal JSON, with one coloured text."""
    logs.configure(LogSettings(), "master", stream)
    logger.info("to a file")
    assert records(stream)[0]["message"] == "to a file"
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        logs.configure(LogSettings(), "master", terminal)
        logger.warning("to a terminal", extra={"queue": "mail"})
        shown = os.read(ours, 4096).decode()
    os.close(ours)
    assert "\x1b[33mWARNING\x1b[0m master       to a terminal" in shown
    assert "queue=mail" in shown


def test_console_shows_a_traceback_below(stream: io.StringIO) -> None:
    """The error's lines follow the record, set in."""
    logs.configure(LogSettings(format="console"), "master", stream)
    try:
        int("bad")
    except ValueError:
        logger.exception("failed", extra={"why": "two words"})
    first, *others = stream.getvalue().splitlines()
    assert first.endswith('failed  why="two words"')
    assert others[-1] == "    ValueError: invalid literal for int() with base 10: 'bad'"


def test_an_edge_is_told_once(stream: io.StringIO) -> None:
    """However often a condition is looked at, its beginning and its end are one record each."""
    as_json(stream)
    edge = logs.Edge(logger, "Redis does not answer", "Redis answers again")
    changes = [edge.set(holds, "refused") for holds in (False, True, True, True, False, False, True)]
    assert changes == [False, True, False, False, True, False, True]
    assert bool(edge)
    told = [(record["level"], record["message"]) for record in records(stream)]
    away = ("warning", "Redis does not answer: refused")
    assert told == [away, ("info", "Redis answers again"), away]


def test_logging_starts_no_thread(stream: io.StringIO) -> None:
    """The master forks: no thread may exist because of the log."""
    before = threading.active_count()
    as_json(stream)
    logger.info("x")
    assert threading.active_count() == before
