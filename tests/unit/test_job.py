"""The words of a job: bands, names, ids, states as people see them."""

import pickle
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmqd.errors import EnqueueError
from pmqd.job import (
    BAND_RANGES,
    Job,
    band_of,
    check_queue_name,
    display_status,
    is_queue_name,
    tags_of,
    uuid7,
    uuid_of,
)
from tests.jobs import NOW, a_claim


class Port:
    """Keeps what a job says."""

    def __init__(self) -> None:
        self.said: list[tuple[float, str]] = []
        self.asked: list[tuple[Any, Any]] = []

    def progress(self, job: Job, fraction: float, note: str) -> None:
        """Keeps it."""
        self.said.append((fraction, note))

    def settling(self, job: Job, outcome: Any, result: Any) -> Any:
        """Keeps it."""
        self.asked.append((outcome, result))
        return None

    def transaction(self, job: Job) -> Any:
        """Nobody asks."""


def a_job(port: Port) -> Job:
    """A job that speaks through the port."""
    return Job(a_claim(), {}, "host:w1", port)


@pytest.mark.parametrize(
    ("priority", "band"),
    [
        (1, "high"),
        (50, "high"),
        (51, "normal"),
        (100, "normal"),
        (150, "normal"),
        (151, "low"),
        (32767, "low"),
    ],
)
def test_bands_at_their_borders(priority: int, band: str) -> None:
    """Each priority has the band that the design says, at both sides of each border."""
    assert band_of(priority) == band
    low, high = BAND_RANGES[band]
    assert low <= priority <= high


@pytest.mark.parametrize("priority", [0, -1, 32768])
def test_no_band_beyond_the_range(priority: int) -> None:
    """A priority outside its range is refused with the value and what is allowed."""
    with pytest.raises(ValueError, match=rf"priority {priority} is not allowed: 1 to 32767"):
        band_of(priority)


@pytest.mark.parametrize(
    "name", ["a", "email-sending", "email:processing", "A.b_c:d-9", "x" * 100, "high", "a:highest"]
)
def test_queue_names_that_are_allowed(name: str) -> None:
    """The mission's names and the limits of the pattern pass."""
    check_queue_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "-a",
        ":a",
        "a b",
        "a\n",
        "a\0",
        "ä",
        "x" * 101,
        "mail:high",
        "mail:low",
        "{a}",
        "a*",
        'a"',
        "a/b",
        None,
        7,
        b"a",
    ],
)
def test_hostile_queue_names_are_refused(name: object) -> None:
    """Whatever could become another key, break a statement or a log line is an error that shows the value."""
    with pytest.raises(EnqueueError, match="is not allowed: 1 to 100 characters"):
        check_queue_name(name)


@given(st.text(max_size=8))
def test_no_queue_name_ends_a_line_or_a_band(name: str) -> None:
    """No allowed name holds a blank, a brace or a line's end, and none is another queue's band."""
    if is_queue_name(name):
        assert not set(name) & set(" \t\r\n\0{}*?[]'\"\\%")
        assert not name.endswith((":high", ":low"))


def test_a_long_queue_name_is_shortened_in_the_error() -> None:
    """An error about a name of a megabyte stays a line."""
    with pytest.raises(EnqueueError) as caught:
        check_queue_name("x" * 1_000_000)
    assert len(str(caught.value)) < 300


def test_display_status() -> None:
    """Only a queued job with attempts behind it and a due time ahead is shown as waiting for its retry."""
    later, earlier = NOW + timedelta(seconds=1), NOW - timedelta(seconds=1)
    assert display_status("queued", 1, later, NOW) == "retry_scheduled"
    assert display_status("queued", 1, earlier, NOW) == "queued"
    assert display_status("queued", 0, later, NOW) == "queued"
    assert display_status("running", 1, later, NOW) == "running"


def test_an_id_made_of_its_number_is_like_any_other() -> None:
    """Equal, with the same hash and text, and read-only."""
    for wanted in (UUID(int=0), UUID(int=(1 << 128) - 1), uuid4()):
        made = uuid_of(wanted.int)
        assert (made, hash(made), str(made), made.bytes, repr(made)) == (
            wanted, hash(wanted), str(wanted), wanted.bytes, repr(wanted),
        )  # fmt: skip
        assert pickle.loads(pickle.dumps(made)) == wanted
        with pytest.raises(TypeError):
            made.int = 1  # type: ignore[misc]


def test_uuid7_is_of_version_7_and_sorts_by_time() -> None:
    """The id carries its version, variant, time and fraction, and a later one is greater."""
    made = uuid7(1_767_323_045_123, 4095, 2**64 - 1)
    assert made.version == 7
    assert made.variant == "specified in RFC 4122"
    assert made.int >> 80 == 1_767_323_045_123
    assert made < uuid7(1_767_323_045_124, 0, 0)
    assert uuid7(5, 1, 2**62 - 1) < uuid7(5, 2, 0)


def test_progress_is_cut_to_its_range() -> None:
    """A job's progress reaches the port within 0 and 1 with a short note; nonsense is refused."""
    port = Port()
    job = a_job(port)
    job.progress(0.5, "half")
    job.progress(7)
    job.progress(-1, "x" * 1000)
    assert port.said == [(0.5, "half"), (1.0, ""), (0.0, "x" * 200)]
    with pytest.raises(ValueError, match="nan"):
        job.progress(float("nan"))


def test_settling_asks_the_port() -> None:
    """`settling` hands outcome and result to the worker."""
    port = Port()
    a_job(port).settling(result={"a": 1})
    assert port.asked == [(None, {"a": 1})]


def test_a_job_is_read_only() -> None:
    """A handler cannot change the job that it was given."""
    job = a_job(Port())
    with pytest.raises(AttributeError):
        job.attempt_count = 0  # type: ignore[misc]


@pytest.mark.parametrize("tags", ["campaign", ["a\0"], ["\ud800"], [1]])
def test_tags_are_a_list_of_texts(tags: Any) -> None:
    """One text (a list of letters by accident) and what PostgreSQL cannot store is refused."""
    with pytest.raises(EnqueueError, match="tags="):
        tags_of(tags)
