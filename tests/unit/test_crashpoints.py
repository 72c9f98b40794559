"""The list of crash points is the list of the calls."""

import re
from pathlib import Path

from pmqd.crashpoints import POINTS, bound_checkpoint, checkpoint, pass_by

SOURCE = Path(__file__).parents[2] / "src" / "pmqd"


def test_every_crash_point_is_listed_and_every_listed_one_is_called() -> None:
    """Whoever walks over the list reaches each place; a name that is wrong in one of the two would be passed by in silence."""
    called = {
        name
        for path in SOURCE.glob("*.py")
        for name in re.findall(r'checkpoint\("([\w.]+)"\)', path.read_text())
    }
    assert called == set(POINTS)


def test_every_point_says_what_is_so_there() -> None:
    """Names are `who.when`, texts are there, and no two points say the same."""
    assert all(re.fullmatch(r"[a-z]+\.[a-z_]+", name) for name in POINTS)
    assert all(POINTS.values())
    assert len(POINTS) > 30


def test_without_the_variable_the_hot_path_calls_something_empty() -> None:
    """Bound once per process: what is called per job does nothing at all."""
    assert bound_checkpoint() is pass_by
    checkpoint("worker.noted")
