"""Crash-point sweep: while a process stands at a point, a store or the wire to it fails; then the process goes on."""

from typing import Final

import pytest

from tests.sweep_checks import sweep
from tests.sweep_rig import How, Rig
from tests.sweep_roads import STORE_FAULTS, pairs

HOW: Final[How] = "stop"


@pytest.mark.parametrize(("point", "fault"), pairs(*STORE_FAULTS))
def test_store(rig: Rig, point: str, fault: str) -> None:
    """Every job ends once, none is charged for it, and nothing is left over."""
    sweep(rig, point, fault)
