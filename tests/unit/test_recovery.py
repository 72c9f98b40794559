"""What is decided about the dead, and the files of what outlives its process: settles, and the claim that is counted."""

from pathlib import Path
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmqd.job import Action, Outcome
from pmqd.recovery import (
    Death,
    Kills,
    SavedSettlesError,
    TickWatch,
    counted_claim,
    forget_counted,
    judge,
    keep_counted,
    load_outcomes,
    save_outcomes,
    saved_settles,
    settles_path,
    stalled_tick,
    watch_tick,
)
from pmqd.store import Fate

ONE, TWO, THREE = uuid4(), uuid4(), uuid4()


def death(reason: str, exit_code: int | None = -9, **parts: object) -> Death:
    """A death of worker h:abc:w1.7."""
    return Death("h:abc:w1.7", reason, exit_code, **parts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("reason", "exit_code"),
    [("signal", -11), ("signal", -9), ("error", 1), ("oom", -9), ("hung", -6), ("boot", -9)],
)
def test_a_job_alone_in_its_process_is_charged(reason: str, exit_code: int) -> None:
    """The process died of itself with one job running: that job is guilty, and its attempt counts."""
    verdict = judge(death(reason, exit_code, running=(ONE,)))
    assert verdict.fates == {ONE: Fate.CHARGED}
    assert verdict.default is Fate.UNSTARTED


@pytest.mark.parametrize("reason", ["signal", "error", "oom", "hung"])
def test_of_several_jobs_nobody_knows_the_guilty_one(reason: str) -> None:
    """With several jobs running all are interrupted; they run alone the next time."""
    assert judge(death(reason, running=(ONE, TWO))).fates == {ONE: Fate.INTERRUPTED, TWO: Fate.INTERRUPTED}


def test_a_timeout_charges_the_overdue_job_and_not_its_neighbours() -> None:
    """The master killed the process for one job's time: only that one is charged."""
    verdict = judge(death("timeout", running=(ONE, TWO, THREE), culprit=TWO))
    assert verdict.fates == {ONE: Fate.INTERRUPTED, TWO: Fate.CHARGED, THREE: Fate.INTERRUPTED}


def test_workers_killed_in_one_moment_accuse_nobody() -> None:
    """Somebody from outside did it: even a job that was alone is not charged, and none has to run alone."""
    verdict = judge(death("signal", running=(ONE,), felled=True))
    assert (verdict.fates, verdict.alone) == ({ONE: Fate.INTERRUPTED}, False)
    assert "in the same moment" in verdict.cause
    assert judge(death("signal", running=(ONE, TWO))).alone


def test_kills_in_one_moment_are_told_from_single_ones() -> None:
    """Two within a tenth of a second belong together, one by itself does not, and old ones are forgotten."""
    kills = Kills()
    kills.note({"a": 10.0}, 10.0)
    assert kills.just_now(10.005)
    assert not kills.just_now(10.02)
    assert not kills.felled("a")
    kills.note({"b": 10.05, "c": 10.5}, 10.5)
    assert [kills.felled(name) for name in "abcd"] == [True, True, False, False]
    kills.note({}, 20.0)
    assert kills.at == {}


def test_a_timeout_charges_the_culprit_though_its_entry_is_gone() -> None:
    """The overdue job ended in the instant of the kill: the master's record of it still holds."""
    assert judge(death("timeout", culprit=ONE)).fates == {ONE: Fate.CHARGED}


@pytest.mark.parametrize("reason", ["drained", "recycled", "isolated"])
def test_a_stop_that_ran_out_of_patience_charges_nobody(reason: str) -> None:
    """A job that was cut because the daemon was to stop did nothing wrong, even alone in its process."""
    verdict = judge(death(reason, running=(ONE,)))
    assert ONE in verdict.fates
    assert verdict.fates[ONE] not in (Fate.CHARGED, Fate.UNSTARTED)


def test_what_was_done_but_not_acknowledged_is_not_refunded() -> None:
    """A job whose settle nobody acknowledged did run: given back it counts as interrupted, so it cannot loop for ever."""
    verdict = judge(death("signal", running=(ONE,), settling=(TWO,)))
    assert verdict.fates == {ONE: Fate.CHARGED, TWO: Fate.INTERRUPTED}


def test_an_idle_worker_gives_back_unstarted_what_it_held() -> None:
    """Claimed ahead and never begun: as if it had not been claimed."""
    verdict = judge(death("signal"))
    assert (verdict.fates, verdict.default) == ({}, Fate.UNSTARTED)


@pytest.mark.parametrize(
    ("reason", "exit_code", "words"),
    [
        ("signal", -11, "signal 11 (SIGSEGV)"),
        ("error", 3, "exit code 3"),
        ("oom", -9, "out of memory"),
        ("timeout", -9, "past its timeout"),
        ("hung", -6, "no progress"),
        ("drained", -9, "time to drain"),
        ("signal", -99, "signal 99"),
        ("signal", None, "nobody saw how"),
    ],
)
def test_the_cause_names_the_worker_and_how_it_died(reason: str, exit_code: int | None, words: str) -> None:
    """What an operator reads in last_error_message names the worker, the way of its death and the number."""
    cause = judge(death(reason, exit_code)).cause
    assert "h:abc:w1.7" in cause
    assert words in cause


def test_a_tick_is_taken_over_after_two_still_seconds() -> None:
    """Only a tick that stood still over two seconds of successful beats is taken over."""
    watch = watch_tick(None, 7, 100.0)
    assert stalled_tick(watch, 101.9) is None
    assert stalled_tick(watch_tick(watch, 7, 101.9), 102.1) == 7
    assert watch_tick(watch, 8, 102.0) == TickWatch(8, 102.0)
    assert stalled_tick(None, 1e9) is None


def outcome(**parts: object) -> Outcome:
    """An outcome with every field set, some as given."""
    fields: dict[str, object] = {
        "job_id": uuid4(),
        "token": uuid4(),
        "action": Action.COMPLETE,
        "attempt_number": 2,
        "queue_name": "email-sending",
        "kind": "send",
        "worker_id": "h:abc:w1.7",
        "result": b'{"a":[1,"\xc3\xa4"]}',
        "error": None,
        "delay_seconds": 1.5,
        "started": 1767323045.678901,
        "duration_seconds": 0.25,
    }
    return Outcome(**(fields | parts))  # type: ignore[arg-type]


@given(
    errors=st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"])), max_size=5),
    action=st.sampled_from(Action),
    started=st.none() | st.floats(-6e10, 2.5e11),
)
def test_saved_settles_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory,
    errors: list[str | None],
    action: Action,
    started: float | None,
) -> None:
    """What a worker saves is exactly what maintenance applies, line breaks and NUL in error texts included."""
    path = settles_path(tmp_path_factory.mktemp("state"), "h:abc:w1.7")
    outcomes = [outcome(error=error, action=action, started=started) for error in errors]
    tokens = [uuid4(), uuid4()]
    save_outcomes(path, outcomes, tokens)
    assert load_outcomes(path) == (outcomes, tokens)


def test_no_result_and_no_kind_stay_none(tmp_path: Path) -> None:
    """A missing result is not the JSON null, and a missing kind is not an empty one."""
    path = tmp_path / "x.jsonl"
    saved = [outcome(result=None, kind=None), outcome(result=b"null")]
    save_outcomes(path, saved, [])
    assert load_outcomes(path)[0] == saved


@pytest.mark.parametrize(
    "line", [b"{}", b"[]", b"nonsense", b'{"closed_token": "x"}', b'{"job_id": 1, "started": null}']
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, line: bytes) -> None:
    """Whatever stands in a broken file, the error says which file and which line, and nothing else is raised."""
    path = tmp_path / "broken.jsonl"
    save_outcomes(path, [outcome()], [])
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(SavedSettlesError, match=r"broken\.jsonl, line 2"):
        load_outcomes(path)


def test_an_unfinished_file_is_not_read(tmp_path: Path) -> None:
    """A machine that stopped while a worker was writing leaves a part that nobody applies."""
    whole = settles_path(tmp_path, "h:abc:w1.7")
    save_outcomes(whole, [outcome()], [])
    whole.with_name("other.part").write_bytes(b'{"job_id": "')
    assert saved_settles(tmp_path) == [whole]


def test_no_folder_means_no_saved_settles(tmp_path: Path) -> None:
    """A state_dir that never saw a saved settle is the usual case."""
    assert saved_settles(tmp_path) == []


def test_two_files_of_one_worker_do_not_meet(tmp_path: Path) -> None:
    """Names never repeat, and hold nothing that a path could not."""
    paths = {settles_path(tmp_path, "h:a/b:w1.7") for _ in range(5)}
    assert len(paths) == 5
    assert {path.parent for path in paths} == {tmp_path / "settles"}


def test_saved_settles_hold_uuids(tmp_path: Path) -> None:
    """Ids come back as UUIDs and not as texts: they are compared with those of rows."""
    path = tmp_path / "x.jsonl"
    save_outcomes(path, [outcome()], [uuid4()])
    outcomes, tokens = load_outcomes(path)
    assert isinstance(outcomes[0].token, UUID)
    assert isinstance(tokens[0], UUID)


# --- the claim that is counted


def test_the_claim_that_is_counted_comes_back_as_it_was(tmp_path: Path) -> None:
    """The newest one, with the jobs that stay in it, until it is forgotten; to forget what is not there is no error."""
    assert counted_claim(tmp_path) is None
    for left in ([], [TWO, THREE]):
        keep_counted(tmp_path, ONE, left)
        assert counted_claim(tmp_path) == (ONE, left)
    for _ in range(2):
        forget_counted(tmp_path)
        assert counted_claim(tmp_path) is None


def test_a_folder_that_refuses_the_counted_claim_stops_no_rescue(tmp_path: Path) -> None:
    """Nothing is kept, and nothing is raised."""
    keep_counted(tmp_path / "gone", ONE, [])
    assert counted_claim(tmp_path / "gone") is None
