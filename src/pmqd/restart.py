"""How long a child's place stays empty after a death: pure, so that it is tested without waiting.

The first restart is immediate: most deaths are accidents. Deaths that follow each other double the delay, so that a
crash loop neither burns the machine nor fills the log. What does not count as the child's own failing: a run that
was stable, an end with exit code 0, a death in the middle of a job (that is the job's doing, and its attempts are
bounded), and a SIGKILL from outside; all of a child that was ready.
"""

from dataclasses import dataclass

FIRST_DELAY = 0.1
LONGEST_DELAY = 30.0
STABLE_SECONDS = 10.0
JITTER = 0.25


@dataclass(frozen=True, slots=True)
class Ending:
    """A death as the back-off sees it.

    Attributes:
        ready_seconds: how long the child had been ready; None where it never was.
        in_job: user code of a job was running.
        killed_outside: SIGKILL that neither the master nor the kernel's memory killer sent.
        clean: exit code 0.
    """

    ready_seconds: float | None
    in_job: bool = False
    killed_outside: bool = False
    clean: bool = False


@dataclass(frozen=True, slots=True)
class Backoff:
    """What a place remembers of its deaths: the failures in a row, and the delay that follows, in seconds.

    `step` is the delay before jitter: it tells whether anything changed since the last death.
    """

    failures: int = 0
    step: float = 0.0
    delay: float = 0.0


def after_death(before: Backoff, ending: Ending, random01: float) -> Backoff:
    """The back-off after one more death.

    Args:
        before: as it was.
        ending: how the child died.
        random01: a random number, 0 ≤ x < 1, that spreads the delay by ±25 % so that places do not start in step.
    """
    failures = 1 if _innocent(ending) else before.failures + 1
    step = 0.0 if failures == 1 else min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(failures - 2, 30))
    delay = min(LONGEST_DELAY, step * (1 - JITTER + 2 * JITTER * random01))
    return Backoff(failures, step, delay)


def _innocent(ending: Ending) -> bool:
    if ending.ready_seconds is None:
        return False
    return ending.in_job or ending.killed_outside or ending.clean or ending.ready_seconds >= STABLE_SECONDS


def jittered(count: int, random01: float) -> int:
    """`count` ±10 %, at least 1, so that workers of one age are not recycled at once; 0 stays 0 (never)."""
    return max(1, round(count * (0.9 + 0.2 * random01))) if count else 0
