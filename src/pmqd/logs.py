"""Log records on standard error: JSON lines for machines, coloured lines for people.

No threads and no queues: the master forks, and a lock held by another thread would stay shut in the child for ever.
"""

import contextvars
import datetime as dt
import json
import logging
import sys
import threading
from typing import Any, Protocol, TextIO
from uuid import UUID

from pmqd.settings import LogSettings

MAX_BYTES = 8192
"""A record's line is cut at this length, so that one bad job cannot fill the log."""

_COLOURS = {
    "DEBUG": "\x1b[2m",
    "INFO": "\x1b[32m",
    "WARNING": "\x1b[33m",
    "ERROR": "\x1b[31m",
    "CRITICAL": "\x1b[41m",
}
_RESET, _DIM = "\x1b[0m", "\x1b[2m"
_CUT = " …[cut]"
# What a record has of itself; everything else came through `extra=`.
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class JobLike(Protocol):
    """The job that the current code runs for; each record made meanwhile carries it."""

    id: UUID
    attempt_count: int
    queue_name: str
    kind: str | None


job_context: contextvars.ContextVar[JobLike | None] = contextvars.ContextVar("job_context", default=None)


def configure(settings: LogSettings, child: str, stream: TextIO | None = None) -> None:
    """Send every record of this process to standard error, in the form that the settings ask for.

    Called again (after a fork, after a reload) it replaces what it set before.

    Args:
        settings: the section `[log]`.
        child: which process this is: "master", "worker 3".
        stream: instead of standard error.
    """
    handler = _Handler(stream or sys.stderr)
    as_text = settings.format == "console" or (settings.format == "auto" and handler.stream.isatty())
    colours = as_text and handler.stream.isatty()
    handler.setFormatter(ConsoleFormatter(child, colours=colours) if as_text else JsonFormatter(child))
    root = logging.getLogger()
    root.handlers[:] = [old for old in root.handlers if not isinstance(old, _Handler)]
    root.addHandler(handler)
    root.setLevel(settings.level.upper())
    logging.captureWarnings(capture=True)


class _Handler(logging.StreamHandler[TextIO]):
    """Writes a record in one call, so that lines of several processes do not mix, and never raises."""

    terminator = ""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record) + "\n"
            self.stream.write(line)
            self.stream.flush()
        except (
            OSError,
            ValueError,
        ):  # the reader of the log went away, or the stream is closed: work goes on
            return
        except Exception:  # noqa: BLE001 - as logging itself does: a bad record must not fail the job that made it
            self.handleError(record)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, child, message, the job, what `extra=` gave, the traceback."""

    def __init__(self, child: str) -> None:
        super().__init__()
        self.child = child

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of at most MAX_BYTES bytes."""
        fields = _fields(record, self.child)
        for most in (MAX_BYTES, 2000, 500, 100):
            line = _json({key: _shortened(key, value, most) for key, value in fields.items()})
            if len(line) <= MAX_BYTES:
                return line
        # Hundreds of fields: those that every record has are what is left.
        return _json(
            {key: _shortened(key, fields[key], 100) for key in ("time", "level", "child", "message")}
        )


class ConsoleFormatter(logging.Formatter):
    """`07:26:31.123 INFO  worker 3  message  key=value`, coloured where the stream is a terminal."""

    def __init__(self, child: str, *, colours: bool) -> None:
        super().__init__()
        self.child = child
        self.colours = colours

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line, and its traceback on lines below; MAX_BYTES bytes at most."""
        fields = _fields(record, self.child)
        trace = str(fields.pop("error", ""))
        shown = {
            key: value for key, value in fields.items() if key not in ("time", "level", "child", "message")
        }
        details = " ".join(f"{key}={_plain(value)}" for key, value in shown.items())
        time = str(fields["time"])[11:23]
        text = escaped(str(fields["message"]))
        level = f"{record.levelname:<7}"
        if self.colours:
            time, details = f"{_DIM}{time}{_RESET}", f"{_DIM}{details}{_RESET}" if details else ""
            level = f"{_COLOURS.get(record.levelname, '')}{level}{_RESET}"
        lines = [f"{time} {level} {self.child:<12} {text}{'  ' if details else ''}{details}"]
        lines += [f"    {escaped(line)}" for line in trace.splitlines()]
        return _cut("\n".join(lines), MAX_BYTES)


class Edge:
    """Logs a condition when it begins and when it ends, once each, however often it is looked at.

    Example:
        redis_away = Edge(logger, "Redis does not answer", "Redis answers again")
        redis_away.set(True, "connection refused")
    """

    def __init__(
        self, logger: logging.Logger, begins: str, ends: str, *, level: int = logging.WARNING
    ) -> None:
        self._logger, self._begins, self._ends, self._level = logger, begins, ends, level
        self._lock = threading.Lock()
        self._holds = False

    def __bool__(self) -> bool:
        return self._holds

    def set(self, holds: bool, detail: object = "") -> bool:
        """Note whether the condition holds now; True if that is a change.

        Args:
            holds: whether it does.
            detail: the cause, told when it begins.
        """
        with self._lock:
            if holds == self._holds:
                return False
            self._holds = holds
        if holds:
            self._logger.log(self._level, "%s%s", self._begins, f": {detail}" if str(detail) else "")
        else:
            self._logger.info("%s", self._ends)
        return True


def escaped(text: str) -> str:
    """Text on one line, in which nothing steers a terminal and nothing is broken UTF-8."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else _escape(letter) for letter in text)


def _escape(letter: str) -> str:
    return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(letter) or f"\\u{ord(letter):04x}"


def _fields(record: logging.LogRecord, child: str) -> dict[str, Any]:
    moment = dt.datetime.fromtimestamp(record.created, dt.UTC)
    fields: dict[str, Any] = {
        "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "child": child,
        "message": _message(record),
    }
    note = job_context.get()
    if note is not None:
        fields |= {"job_id": str(note.id), "attempt": note.attempt_count, "queue": note.queue_name}
        if note.kind is not None:
            fields["kind"] = note.kind
    fields |= {
        key: _simple(value) for key, value in vars(record).items() if key not in _OWN and key not in fields
    }
    error = _error(record)
    return fields | {"error": error} if error else fields


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception as error:  # noqa: BLE001 - user code's wrong arguments, or a __str__ that raises
        return f"{record.msg!s} [arguments do not fit: {type(error).__name__}]"


def _error(record: logging.LogRecord) -> str:
    if record.exc_info and record.exc_info[0] is not None:
        return logging.Formatter().formatException(record.exc_info)
    return record.stack_info or ""


def _json(fields: dict[str, Any]) -> str:
    # ASCII only: control characters become \u escapes, so a record is one line and steers no terminal.
    return json.dumps(fields, ensure_ascii=True, separators=(",", ":"))


def _simple(value: Any) -> Any:
    """What `extra=` gave, as JSON can hold it: an infinite number, a circle or an object becomes its text."""
    if value is None or isinstance(value, str | int):
        return value
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return _text(value)
    return value


def _text(value: Any) -> str:
    try:
        return str(value)
    except Exception as error:  # noqa: BLE001 - a __str__ of user code
        return f"<{type(value).__name__}: {type(error).__name__}>"


def _shortened(key: str, value: Any, most: int) -> Any:
    """A long text cut to `most` letters; of a traceback the end is kept, which names the error."""
    if not isinstance(value, str):
        return value
    value = value.encode(errors="backslashreplace").decode()  # a lone surrogate is no JSON to many readers
    if len(value) > most:
        return _CUT + value[-most:] if key == "error" else value[:most] + _CUT
    return value


def _cut(text: str, most: int) -> str:
    data = text.encode(errors="backslashreplace")
    if len(data) <= most:
        return text
    return data[: most - len(_CUT.encode())].decode(errors="ignore") + _CUT


def _plain(value: Any) -> str:
    text = escaped(_text(value))
    return json.dumps(text, ensure_ascii=False) if " " in text or not text else text
