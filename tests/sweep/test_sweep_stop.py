"""Crash-point sweep: a process stands still at each point, and goes on later, or its master dies meanwhile."""

from typing import Final

import pytest

from tests.sweep_checks import sweep
from tests.sweep_rig import How, Rig
from tests.sweep_roads import pairs

HOW: Final[How] = "stop"


@pytest.mark.parametrize(("point", "fault"), pairs("stop"))
def test_stop(rig: Rig, point: str, fault: str) -> None:
    """A second later it goes on: every job ends once, none is charged, and nothing is left over."""
    sweep(rig, point, fault)


@pytest.mark.parametrize(("point", "fault"), pairs("orphan"))
def test_master_dies(rig: Rig, point: str, fault: str) -> None:
    """Nobody of the family outlives it, and the next life of the instance goes on with every job."""
    sweep(rig, point, fault)
