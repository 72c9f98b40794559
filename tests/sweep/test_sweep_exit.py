"""Crash-point sweep: a process ends with exit code 1 at each point, once."""

from typing import Final

import pytest

from tests.sweep_checks import sweep
from tests.sweep_rig import How, Rig
from tests.sweep_roads import pairs

HOW: Final[How] = "exit"


@pytest.mark.parametrize(("point", "fault"), pairs("exit"))
def test_exit(rig: Rig, point: str, fault: str) -> None:
    """Every job ends once, none is charged that was not running, and nothing is left over."""
    sweep(rig, point, fault)
