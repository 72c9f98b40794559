"""Crash-point sweep: the table of points and faults leaves nothing out without saying why."""

from pmqd.crashpoints import POINTS
from tests.sweep_roads import FAULTS, PROCESS_FAULTS, ROADS, left_out, point_of


def test_every_point_has_a_scenario() -> None:
    """A new point without a road to it fails here."""
    assert {point_of(name) for name in ROADS} == set(POINTS)


def test_no_fault_of_the_process_is_left_out_anywhere() -> None:
    """Whoever stands at a point can always die there, end there, or stand still."""
    assert [(point, fault) for point in ROADS for fault in PROCESS_FAULTS if left_out(point, fault)] == []


def test_every_pair_is_tried_or_has_its_reason() -> None:
    """Each fault hits at several points, and each point is hit by the faults of the stores that stand beside it."""
    tried = {(point, fault) for point in ROADS for fault in FAULTS if not left_out(point, fault)}
    assert all(sum(fault == each for _, each in tried) >= 5 for fault in FAULTS)
    for point, road in ROADS.items():
        assert ((point, "flush") in tried) == ("r" in road.stores), point
        assert ((point, "backends") in tried) == ("p" in road.stores), point
