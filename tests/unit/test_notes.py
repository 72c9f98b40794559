"""Outcomes in shared memory: what is noted is read back whole, what is torn is nothing, and the memory is bounded."""

import mmap
import os
import signal
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest

from pmqd.arena import Arena
from pmqd.job import MAX_PAYLOAD_BYTES, Action, Outcome
from pmqd.notes import JOURNAL_BYTES, NOTES, PLACES, Journal, Notes, Sort, Stage
from pmqd.record import WORD
from pmqd.slot import Slot

WORKER = "host:0badcafe:w1.7"
SMALL, MIDDLE, LARGE = (count for count, _ in PLACES)


def outcome(**parts: Any) -> Outcome:
    """A completed job's outcome, some of its fields as given."""
    fields: dict[str, Any] = {
        "job_id": uuid4(),
        "token": uuid4(),
        "action": Action.COMPLETE,
        "attempt_number": 3,
        "queue_name": "mails",
        "kind": "send",
        "worker_id": WORKER,
        "started": 1767323045.678901,
        "duration_seconds": 0.0123,
    }
    return Outcome(**fields | parts)


@pytest.fixture
def slot() -> Slot:
    """A worker's record."""
    slot = Arena.create(2, entries=2).slots[1]
    slot.open("worker", WORKER)
    return slot


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"result": b'{"sent": true}'},
        {"result": b"x" * MAX_PAYLOAD_BYTES},
        {"action": Action.RETRY, "error": "Tümeout\n" + "…" * 2700, "delay_seconds": 7.25},
        {"action": Action.SNOOZE, "delay_seconds": 1e7, "error": ""},
        {"action": Action.FAIL, "error": "no", "kind": None},
        {"action": Action.RELEASE, "started": None},
        {"kind": "k" * 200, "queue_name": "q" * 100},
        {"started": -86400.0, "action": Action.CANCEL},
    ],
)
def test_an_outcome_is_read_back_as_it_was(slot: Slot, parts: dict[str, Any]) -> None:
    """Every field comes back to the last bit: the settle by maintenance must be the worker's own."""
    noted = outcome(**parts)
    place = slot.notes.put(noted)
    assert slot.noted() == [(place, Sort.WHOLE, noted)]
    slot.notes.release([place])
    assert slot.noted() == []


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the runner has a thread for its timeout
def test_notes_survive_sigkill(slot: Slot) -> None:
    """A process notes, and is killed at once: its parent reads all of it."""
    expected = [outcome(result=str(number).encode()) for number in range(700)]
    pid = os.fork()
    if pid == 0:
        for each in expected:
            slot.notes.put(each)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert [note.outcome for note in slot.noted()] == expected


def test_a_torn_note_is_none(slot: Slot) -> None:
    """Killed while the bytes were written: the word in the directory comes last, and without it there is no note."""
    whole = slot.notes.put(outcome())
    torn = slot.notes.put(outcome())
    slot.notes.words[slot.notes.base + torn] = 0
    assert [note.place for note in slot.noted()] == [whole]


def test_what_finds_no_place_is_cut_or_known_to_be_done_only(slot: Slot) -> None:
    """All large places taken: an error is cut, a result left out, which says so; all places taken: nothing is noted, nothing
    else is touched, and what is released can be taken again.
    """
    big = [slot.notes.put(outcome(result=b"r" * 100_000)) for _ in range(LARGE)]
    assert -1 not in big
    partial = slot.notes.put(outcome(result=b"r" * 100_000))
    long = outcome(action=Action.FAIL, error="é" * 4000)
    cut = slot.notes.put(long)
    found = {note.place: note for note in slot.noted()}
    assert (found[partial].sort, found[partial].outcome.result) == (Sort.PARTIAL, b"")
    assert found[cut].sort == Sort.WHOLE
    text = found[cut].outcome.error or ""
    assert 1900 < len(text) < 4000
    assert replace(found[cut].outcome, error=long.error) == long
    rest = [slot.notes.put(outcome()) for _ in range(NOTES)]
    assert rest.count(-1) == LARGE + 2
    assert len(slot.noted()) == NOTES
    slot.notes.release(big)
    assert slot.notes.put(outcome(result=b"r" * 100_000)) in big


def test_a_new_worker_finds_no_notes(slot: Slot) -> None:
    """Opening the slot again forgets what the one before left there, and its journal."""
    slot.notes.put(outcome())
    slot.journal.begin(b"1", b"2")
    slot.open("worker", "another")
    assert (slot.noted(), slot.journal.pending()) == ([], None)


def test_slots_do_not_touch_each_other() -> None:
    """The last place of one slot and the first words of the next lie apart."""
    arena = Arena.create(2, entries=2)
    first, second = arena.slots
    for slot in arena.slots:
        slot.open("worker", WORKER)
    while first.notes.put(outcome(result=b"r" * 200_000)) >= 0:
        first.journal.begin(b"j" * (JOURNAL_BYTES - 8), b"12345678")
    assert (second.noted(), second.worker_id, second.journal.pending()) == ([], WORKER, None)
    assert len(first.noted()) == NOTES


def test_a_quiet_worker_touches_little_memory() -> None:
    """The lowest place is taken first: a worker with a few notes at a time uses a few pages of what is mapped."""
    words = NOTES
    memory = mmap.mmap(-1, words * WORD + Notes.data_bytes())
    notes = Notes(memory, memoryview(memory).cast("q"), 0, words * WORD)
    used = {notes.put(outcome()) for _ in range(3)}
    for _ in range(1000):
        notes.release(used)  # type: ignore[arg-type]
        used = {notes.put(outcome()) for _ in range(3)}
    assert used == {0, 1, 2}


def test_the_journal_tells_how_far_a_count_has_come() -> None:
    """Nothing, written, counted, nothing; what does not fit is refused and leaves it as it was."""
    memory = mmap.mmap(-1, Journal.words_needed * WORD)
    journal = Journal(memory, memoryview(memory).cast("q"), 0)
    assert journal.pending() is None
    journal.begin(b"changes", b"rest")
    pending = journal.pending()
    assert pending is not None
    assert (pending.stage, pending.changes, pending.rest) == (Stage.WRITTEN, b"changes", b"rest")
    journal.counted()
    pending = journal.pending()
    assert pending is not None
    assert pending.stage == Stage.COUNTED
    journal.end()
    assert journal.pending() is None
    with pytest.raises(ValueError, match="journal"):
        journal.begin(b"x" * JOURNAL_BYTES, b"y")
    assert journal.pending() is None
