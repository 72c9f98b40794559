"""Crash-point sweep: a process dies by SIGKILL at each point, once."""

from typing import Final

import pytest

from tests.sweep_checks import sweep
from tests.sweep_rig import How, Rig
from tests.sweep_roads import pairs

HOW: Final[How] = "kill"


@pytest.mark.parametrize(("point", "fault"), pairs("kill"))
def test_kill(rig: Rig, point: str, fault: str) -> None:
    """Every job ends once, none is charged that was not running, and nothing is left over."""
    sweep(rig, point, fault)
