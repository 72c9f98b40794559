"""Whatever a job, a payload's text or an error puts into a record: one line of the log, that says what it says."""

import io
import json
import logging
import re
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmqd import logs
from pmqd.settings import LogSettings
from tests.fix_daemon import MakeDaemon
from tests.history import enqueue
from tests.jobs import a_claim, running

TEXTS = [
    "\n<0>emerg",
    "<0>emerg",
    "\r\n<2>crit: fake",
    '"}\n{"level":"info","message":"fake"}',
    "\x1b[2J\x1b]0;x\x07",
    "\0after",
    "\x85next\u2028line\u2029",
    "\x9b31m",
    "\ud800",
    "a\tb\vc\fd",
    "x" * 100_000,
    "%s %d %(name)s {0}",
]


@pytest.fixture
def root() -> Any:
    """The root logger, put back afterwards."""
    root = logging.getLogger()
    level = root.level
    yield root
    root.setLevel(level)
    logging.captureWarnings(capture=False)


def lines_of(form: str, message: str, extra: dict[str, Any], error: BaseException | None = None) -> list[str]:
    """What one record is written as."""
    stream, root = io.StringIO(), logging.getLogger()
    handlers = root.handlers[:]
    root.handlers.clear()  # pytest keeps what it captures, and cannot pass half a surrogate pair on to its reports
    try:
        logs.configure(LogSettings(level="debug", format=form), "worker 1", stream)  # type: ignore[arg-type]
        logging.getLogger("app").error(message, exc_info=error, extra=extra)
    finally:
        root.handlers[:] = handlers
    text = stream.getvalue()
    text.encode()  # valid UTF-8
    assert text.endswith("\n")
    return text[:-1].split("\n")


def raised(text: str) -> ValueError:
    """An error with this text and a traceback."""
    try:
        int(f"x{text[:50]}")
    except ValueError as error:
        return ValueError(text).with_traceback(error.__traceback__)
    raise AssertionError


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_log_injection_json_is_one_line(root: Any, text: str) -> None:
    """In the message, in a field, in the job's kind, in an exception: one JSON object, whole, in ASCII."""
    with running(a_claim(kind=text)):
        [line] = lines_of("json", text.replace("%", "%%"), {"field": text, "more": [text]}, raised(text))
    assert line.isascii()
    assert line.isprintable()
    assert len(line) <= logs.MAX_BYTES
    assert json.loads(line)["level"] == "error"


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_log_injection_console_lines_begin_with_the_time(root: Any, text: str) -> None:
    """A record's line begins with its time, those of its traceback with blanks: none can look like another record."""
    with running(a_claim(kind=text)):
        first, *rest = lines_of("console", text.replace("%", "%%"), {"field": text}, raised(text))
    assert re.match(r"\d\d:\d\d:\d\d\.\d\d\d ERROR ", first)
    assert all(line.startswith("    ") for line in rest)
    assert all(line.isprintable() for line in (first, *rest))


@given(st.text(), st.text())
def test_log_injection_of_any_text(message: str, value: str) -> None:
    """Any text gives one printable line in both forms."""
    record = logging.makeLogRecord({"msg": message, "levelname": "INFO", "field": value})
    [line] = logs.JsonFormatter("c").format(record).split("\n")
    assert isinstance(json.loads(line), dict)
    assert line.isascii()
    [line] = logs.ConsoleFormatter("c", colours=False).format(record).split("\n")
    assert line.isprintable()


def test_log_injection_no_priority_can_be_forged() -> None:
    """The unit tells journald to read no `<N>` at the beginning of a line: a job's print() cannot cry wolf either."""
    unit = (Path(__file__).parents[2] / "systemd" / "pmqd.service").read_text()
    assert re.search(r"^SyslogLevelPrefix=no$", unit, re.MULTILINE)


def test_log_injection_by_a_jobs_error(
    daemon: MakeDaemon, connection: psycopg.Connection[Any], wait_until: Any
) -> None:
    """A real daemon's log stays one JSON object a line while jobs fail with hostile texts, kinds and unknown names."""
    running = daemon({"log": {"level": "debug"}, "workers": [{"app": "tests.security.hostile_app:app"}]})
    ids = [
        enqueue(connection, "raises", queue="hostile", attempts=1, text=text)
        for text in TEXTS
        if text.isascii() and "\0" not in text
    ]
    for text in TEXTS[:5]:
        connection.execute(
            "insert into pmqd.jobs (queue_name, kind, payload) values ('hostile', %s, '{}')",
            [text.replace("\0", "")],
        )
    wait_until(
        lambda: (
            connection.execute(
                "select count(*) from pmqd.jobs where id = any(%s) and status = 'failed'", [ids]
            ).fetchone()
            == (len(ids),)
        ),
        20,
        "all have failed",
    )
    running.stop()
    ours = [line for line in running.log.splitlines() if not line.startswith("printed by a job")]
    for line in ours:
        assert isinstance(json.loads(line), dict), line
