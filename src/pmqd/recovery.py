"""What is decided and kept about the dead: the fates of a dead worker's jobs, settles that outlived their process, and what is counted.

Decisions and two file formats; the statements are the store's, the acting is maintenance's.
"""

import contextlib
import logging
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import orjson
from pydantic import TypeAdapter

from pmqd.errors import PmqdError
from pmqd.job import Outcome
from pmqd.statedir import read_own
from pmqd.store import Fate

log = logging.getLogger(__name__)

SETTLES = "settles"
"""The folder in state_dir where a worker leaves the settles that PostgreSQL could not take before the worker's end."""
COUNTED = "counted"
"""The file in state_dir that names a claim whose jobs are counted as given back and which is not closed yet."""
FELLED_SECONDS = 0.1
"""Workers that are killed (SIGKILL) within so long of each other were killed by somebody from outside."""
KILLED_PAUSE_SECONDS = 0.01
"""How long after a SIGKILL it is waited whether others were killed too."""
TICK_STALLED_SECONDS = 2.0
"""How long a maintenance sees the tick stand still before it takes the ticking over."""


class SavedSettlesError(PmqdError):
    """A file of saved settles that cannot be read."""


# --- fates ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Death:
    """What the arena says about a dead worker.

    Attributes:
        worker_id: the worker's name.
        reason: the master's word for it, one of `worker_exits_total`'s reasons.
        exit_code: of the process; negative is a signal; None when nobody saw it.
        running: jobs whose user code had started and whose entry was not cleared.
        settling: jobs that were done, in a settle that nobody acknowledged.
        culprit: the job that was overdue, when the master killed the process for it.
        felled: it was killed (SIGKILL) in the same moment as another worker, and not by the master.
    """

    worker_id: str
    reason: str
    exit_code: int | None
    running: tuple[UUID, ...] = ()
    settling: tuple[UUID, ...] = ()
    culprit: UUID | None = None
    felled: bool = False

    @property
    def from_outside(self) -> bool:
        """Whether no job can have caused it: the master wished it, or somebody killed several workers at once."""
        return self.felled or self.reason in STOPPED


@dataclass(frozen=True, slots=True)
class Verdict:
    """The fate of each job that needs its own, the fate of all others the worker had claimed, and the cause.

    `alone`: those that were cut run alone the next time: one of them did it, and may do it again.
    """

    fates: dict[UUID, Fate]
    default: Fate
    cause: str
    alone: bool = True


def judge(death: Death) -> Verdict:
    """Decides what a dead worker's jobs are given back as.

    One job alone in its process when that died of itself is guilty, and its attempt is charged. Of several
    nobody knows which it was: all are interrupted, and claimed alone the next time, so that the guilty one shows itself. A
    job that was killed for its time is charged, its neighbours are not. A stop that ran out of patience is no job's fault,
    nor is the end of several workers in one moment.
    What had not started is given back as if it had never been claimed.
    """
    fates = dict.fromkeys(death.settling, Fate.INTERRUPTED)
    fates |= dict.fromkeys(death.running, _shared_fate(death))
    if death.culprit is not None:
        fates[death.culprit] = Fate.CHARGED
    alone = not death.from_outside and death.culprit is None
    return Verdict(fates=fates, default=Fate.UNSTARTED, cause=cause(death), alone=alone)


def _shared_fate(death: Death) -> Fate:
    if death.from_outside or death.culprit is not None or len(death.running) > 1:
        return Fate.INTERRUPTED
    return Fate.CHARGED


STOPPED = frozenset({"drained", "recycled", "isolated"})
"""Ends that the master wished: a job that they cut had done nothing wrong."""


@dataclass(slots=True)
class Kills:
    """Workers that were killed (SIGKILL) lately, and not by the master: name -> when (monotonic seconds)."""

    at: dict[str, float] = field(default_factory=dict)

    def note(self, killed: Mapping[str, float], now: float) -> None:
        """Takes in who is seen dead of it, and forgets whom it was long ago."""
        self.at = {name: at for name, at in {**self.at, **killed}.items() if now - at < 10 * FELLED_SECONDS}

    def just_now(self, now: float) -> bool:
        """Whether others may still be about to be seen."""
        return any(now - at < KILLED_PAUSE_SECONDS for at in self.at.values())

    def felled(self, worker_id: str) -> bool:
        """Whether another worker was killed in the same moment: no job does that to its neighbours' processes."""
        own = self.at.get(worker_id)
        others = (at for name, at in self.at.items() if name != worker_id)
        return own is not None and any(abs(own - at) < FELLED_SECONDS for at in others)


def cause(death: Death) -> str:
    """What `last_error_message` and the log row say: which worker, how it ended, and the number."""
    how = {
        "timeout": "killed: the job ran past its timeout and the grace after it",
        "hung": "killed: no progress was seen",
        "oom": "killed for its memory (out of memory)",
        "drained": "killed: the time to drain was over",
        "recycled": "killed: it did not end when it was to be replaced",
        "boot": "ended before it was ready",
        "isolated": "killed: cut off from PostgreSQL, its lease was about to run out",
    }.get(death.reason, "killed with others in the same moment" if death.felled else None)
    return f"worker {death.worker_id} died: " + ", ".join(filter(None, (how, _exit(death.exit_code))))


def _exit(code: int | None) -> str:
    if code is None:
        return "nobody saw how"
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"signal {-code}"


# --- the ticker ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TickWatch:
    """The tick as it was last seen to change, and when that was (monotonic seconds)."""

    tick: int
    since: float


def watch_tick(watch: TickWatch | None, tick: int, now: float) -> TickWatch:
    """The watch after a beat told the tick."""
    return watch if watch is not None and watch.tick == tick else TickWatch(tick, now)


def stalled_tick(watch: TickWatch | None, now: float) -> int | None:
    """The tick to take over, or None while it moves. A failed beat forgets the watch: PostgreSQL away stalls no ticker."""
    return watch.tick if watch is not None and now - watch.since >= TICK_STALLED_SECONDS else None


# --- saved settles -------------------------------------------------------------------------------------------


def settles_path(state_dir: Path, worker_id: str) -> Path:
    """A new file's path for the saved settles of a worker; names never repeat, so no file is ever overwritten."""
    return state_dir / SETTLES / f"{_stem(worker_id)}-{uuid4().hex[:12]}.jsonl"


def saved_by(path: Path, worker_id: str) -> bool:
    """Whether a file of saved settles is this worker's."""
    return path.stem.rpartition("-")[0] == _stem(worker_id)


def _stem(worker_id: str) -> str:
    return worker_id.replace("/", "_").replace(":", "_")


def save_outcomes(path: Path, outcomes: Sequence[Outcome], closed_tokens: Sequence[UUID]) -> None:
    """Writes settles that PostgreSQL could not take, for maintenance to apply; whole or not at all.

    One JSON object a line: an outcome's fields (`result` as the JSON text it is), or `{"closed_token": ...}`.
    The name appears only after the content is on the disk: a machine that stops in between leaves a `.part` file, which nobody
    reads, and the jobs are then rescued as the dead worker's.

    Raises:
        OSError: the disk refused.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        for outcome in outcomes:
            file.write(_line(outcome))
        for token in closed_tokens:
            file.write(orjson.dumps({"closed_token": token}) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)
    _sync_folder(path.parent)


def _line(outcome: Outcome) -> bytes:
    fields = asdict(outcome)
    fields["action"] = str(outcome.action)
    fields["result"] = None if outcome.result is None else outcome.result.decode()
    return orjson.dumps(fields) + b"\n"


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, handle)
        os.fsync(handle)


def load_outcomes(path: Path) -> tuple[list[Outcome], list[UUID]]:
    """Reads what `save_outcomes` wrote: the outcomes and the closed claim tokens.

    Raises:
        SavedSettlesError: a line is not what `save_outcomes` writes; names the file and the line.
        OSError: the file cannot be read.
    """
    outcomes: list[Outcome] = []
    tokens: list[UUID] = []
    for number, line in enumerate(read_own(path).splitlines(), start=1):
        try:
            fields = orjson.loads(line)
            if "closed_token" in fields:
                tokens.append(UUID(fields["closed_token"]))
            else:
                outcomes.append(_outcome(fields))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SavedSettlesError(f"{path}, line {number}: not a saved settle: {error}") from error
    return outcomes, tokens


def _outcome(fields: dict[str, Any]) -> Outcome:
    # Every field of its type: what is not would come back as an error of something else, and hold up the rescue.
    if fields.keys() != _FIELDS:
        raise ValueError(f"its fields are {', '.join(map(str, fields))}"[:200])
    return _OUTCOME.validate_python(fields)


_OUTCOME = TypeAdapter(Outcome)
_FIELDS = {field.name for field in dataclass_fields(Outcome)}


def saved_settles(state_dir: Path) -> list[Path]:
    """The files of saved settles, oldest first."""
    try:
        found = [(path.stat().st_mtime_ns, path) for path in (state_dir / SETTLES).glob("*.jsonl")]
    except FileNotFoundError:
        return []
    return [path for _, path in sorted(found)]


def saved_outcomes(state_dir: Path, worker_id: str) -> Iterator[Outcome]:
    """What a worker saved, from all its files that can be read."""
    for path in saved_settles(state_dir):
        if saved_by(path, worker_id):
            with contextlib.suppress(SavedSettlesError, OSError):
                yield from load_outcomes(path)[0]


def put_aside(path: Path, error: Exception) -> None:
    """Keeps a file of settles that cannot be applied under a name that nobody reads, and says why."""
    try:
        path.rename(path.with_suffix(".bad"))
    except OSError as refused:
        log.error("saved settles in %s: %s, nor can they be put aside: %s", path, error, refused)  # noqa: TRY400
    else:
        log.error("saved settles put aside as .bad, their jobs run again: %s", error)


# --- the claim that is counted -------------------------------------------------------------------------------


def keep_counted(state_dir: Path, token: UUID, left: Sequence[UUID]) -> None:
    """Writes down that a claim is counted, for the family after this one: PostgreSQL still shows it open, and the arena ends with us.

    Where the disk refuses, a family that ends before the claim is closed leaves a second count to the next one.
    """
    path = state_dir / COUNTED
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)  # what a job may have put there is not followed, nor waited for
        with path.open("xb") as file:
            file.write(orjson.dumps({"claim": token, "left": list(left)}))


def counted_claim(state_dir: Path) -> tuple[UUID, list[UUID]] | None:
    """The claim that is counted and perhaps not closed, and the jobs that stay in it; what cannot be read says nothing."""
    try:
        found = orjson.loads(read_own(state_dir / COUNTED))
        return UUID(found["claim"]), [UUID(job_id) for job_id in found["left"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def forget_counted(state_dir: Path) -> None:
    """The claim is closed."""
    with contextlib.suppress(OSError):  # then it is closed once more, which changes nothing
        (state_dir / COUNTED).unlink(missing_ok=True)
