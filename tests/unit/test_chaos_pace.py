"""What the checker of chaos runs says of order and pace: who was overtaken, and whether anything stood still."""

from array import array

from pmqd.chaos.checker import while_stopped
from pmqd.chaos.checks_history import Fault, Stretches
from pmqd.chaos.checks_runs import Clocks
from pmqd.chaos.checks_time import Line, Pace, most_overtaken

SECOND = 1_000_000


def at_once(*moments: int) -> tuple[list[int], list[int]]:
    """Taken by transactions that took no time."""
    return [*moments], [*moments]


def line_of(*taken: int, ready: int = 0) -> tuple[Line, tuple[list[int], list[int]]]:
    """Jobs of equal priority in the order of their ids, all ready at once, taken at these seconds."""
    line = Line()
    for moment in taken:
        line.add(100, ready * SECOND, ready * SECOND, (moment * SECOND,) * 2, (moment * SECOND,) * 2)
    return line, at_once(*(moment * SECOND for moment in taken))


def test_order() -> None:
    """Jobs taken in their order overtake nobody; newest first does, and is counted."""
    line, taken = line_of(*range(1, 101))
    assert most_overtaken(line, taken, Stretches([]))[0] == 0
    line, taken = line_of(*range(100, 0, -1))
    assert most_overtaken(line, taken, Stretches([])) == (99, 99, 100)


def test_order_counts_neither_what_one_statement_takes_nor_what_was_not_there() -> None:
    """Rows taken at one time are in no order among themselves, and a job that came later was not passed over."""
    line, taken = line_of(2, 2, 2, 2)
    assert most_overtaken(line, taken, Stretches([]))[0] == 0
    line = Line()
    line.add(
        100, 0, 50 * SECOND, (60 * SECOND,) * 2, (60 * SECOND,) * 2
    )  # visible only after the other was taken
    line.add(100, 0, 0, (2 * SECOND,) * 2, (2 * SECOND,) * 2)
    assert most_overtaken(line, at_once(60 * SECOND, 2 * SECOND), Stretches([]))[0] == 0


def test_order_forgives_what_another_transaction_may_have_locked() -> None:
    """Seed 9001: a claim began with its settles; while they were written a mark began, and locked what the claim then passed over."""
    line, _ = line_of(5, 4)
    began = [5 * SECOND, 4 * SECOND]
    assert most_overtaken(line, (began, [7 * SECOND, 6 * SECOND]), Stretches([]))[0] == 0
    assert most_overtaken(line, (began, [7 * SECOND, 5 * SECOND - 1]), Stretches([]))[0] == 1


def test_order_leaves_out_who_came_by_a_hint_of_its_producer() -> None:
    """Such a job was neither marked nor stolen; who was beside it in that claim, or passes over it, is judged as ever."""
    line, taken = line_of(*range(100, 0, -1))
    line.hinted = array("b", [0] * 99 + [1])
    assert most_overtaken(line, taken, Stretches([]), line.hinted) == (98, 98, 99)
    assert most_overtaken(line, taken, Stretches([])) == (99, 99, 100)
    line, taken = line_of(3, 1, 1)
    line.hinted = array("b", [0, 0, 1])
    assert most_overtaken(line, taken, Stretches([]), line.hinted) == (1, 1, 2)
    line.hinted = array("b", [1, 0, 0])
    assert most_overtaken(line, taken, Stretches([]), line.hinted) == (1, 2, 2)


def test_order_looks_away_while_a_fault_acts() -> None:
    """What is taken while a fault acts is not judged."""
    line, taken = line_of(*range(100, 0, -1))
    assert most_overtaken(line, taken, Stretches([(0, 99 * SECOND)]))[2] == 1


def test_standstill() -> None:
    """The longest time without a claim counts from when something was ready, and without the time of faults."""
    pace = Pace()
    for moment in (*range(10), *range(30, 40)):
        pace.add(moment * SECOND, moment * SECOND)
    assert pace.longest_standstill(Stretches([])) == 0  # nothing was ready meanwhile
    pace.add(12 * SECOND, 30 * SECOND)
    assert pace.longest_standstill(Stretches([])) == 18 * SECOND
    assert pace.longest_standstill(Stretches([(13 * SECOND, 26 * SECOND)])) == 4 * SECOND


def test_stretches() -> None:
    """Merged stretches know what lies in them, and what is left between them."""
    found = Stretches([(10, 20), (15, 30), (50, 60)])
    assert [moment in found for moment in (9, 10, 25, 31, 55, 61)] == [False, True, True, False, True, False]
    assert found.longest_outside(0, 100) == 40
    assert found.longest_outside(12, 28) == 0


def test_a_host_has_time_to_start_before_a_standstill_counts() -> None:
    """Seed 6017: both hosts were killed on a busy machine, and a dozen processes imported their modules for ten seconds."""
    clocks = Clocks()
    began, ended = while_stopped(Fault("worker_kill", "processes", 5, 7), clocks)
    assert (began, while_stopped(Fault("host_kill_all", "processes", 5, 7), clocks)) == (
        5,
        (5, ended + 10 * SECOND),
    )
