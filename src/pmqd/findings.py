"""One thing that `pmqd doctor` looked at: how it is, and what mends it."""

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    WRONG = "wrong"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: what was looked at.
        level: how it is.
        found: what was found.
        do: what mends it, as a statement or command to be copied; empty where nothing is to be done.
    """

    what: str
    level: Level
    found: str
    do: str = ""
