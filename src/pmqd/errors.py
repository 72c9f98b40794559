"""The errors that pmqd raises on purpose, and the exit codes that they become."""

import reprlib
from enum import IntEnum
from typing import Any, ClassVar


class ExitCode(IntEnum):
    """What a `pmqd` process ends with. The numbers from 64 on are those of BSD's sysexits.h where one fits."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 69
    TIMED_OUT = 75
    CONFIG = 78
    SCHEMA = 79


class PmqdError(Exception):
    """An error that names what is wrong in one line; `exit_code` is what a command ends with when it meets it."""

    exit_code: ClassVar[ExitCode] = ExitCode.FAILED


class ConfigError(PmqdError):
    """A setting is unknown or bad. One line per fault."""

    exit_code = ExitCode.CONFIG


class SchemaError(PmqdError):
    """The database schema is missing, or of a version that this program does not know."""

    exit_code = ExitCode.SCHEMA


class StoreUnavailable(PmqdError):  # noqa: N818 - the name says what is so
    """PostgreSQL did not answer. The message never holds a password."""

    exit_code = ExitCode.UNREACHABLE


class BrokerUnavailable(PmqdError):  # noqa: N818 - the name says what is so
    """Redis did not answer. The message never holds a password."""

    exit_code = ExitCode.UNREACHABLE


class EmbeddedError(PmqdError):
    """A private PostgreSQL or Redis server could not be found, started or stopped."""


class NotFound(PmqdError):  # noqa: N818 - the name says what is so
    """There is no such job, queue or instance."""


class Conflict(PmqdError):  # noqa: N818 - the name says what is so
    """The job's status does not allow what was asked."""


class UsageError(PmqdError):
    """A command was called with arguments that do not fit."""

    exit_code = ExitCode.USAGE


class EnqueueError(PmqdError, ValueError):
    """Arguments or options of an enqueue do not fit; nothing was written."""


class RegistrationError(PmqdError, TypeError):
    """A task or a handler cannot be registered as it is written."""


class LeaseSpent(PmqdError):  # noqa: N818 - the name says what is so
    """The job was claimed under a lease that may be over by now: it is not started, for it may run elsewhere."""


class SettleRefused(PmqdError):  # noqa: N818 - the name says what is so
    """The job was taken from its owner before it settled; what the transaction wrote is rolled back."""


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_SHORT.maxlevel = 3


def shown(value: Any) -> str:
    """A value as a message quotes it: its repr, shortened before it is built, for it may have any size."""
    try:
        text = _SHORT.repr(value)
    except Exception:  # noqa: BLE001 - an integer of 5,000 digits, or a __repr__ of user code
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 100 else text[:100] + "…"
