"""The process that the sweep brings to the points of retention and of a replay: `python -m tests.sweep_keeper`.

It reads one order a line and forks a process for each, which is as quick as a fork and leaves the test's own process alone.
"""

import contextlib
import json
import os
import sys
from dataclasses import dataclass
from typing import Final

from pmqd import crashpoints, store_partitions, store_reads
from pmqd.config import MaintenanceSettings, PostgresSettings
from pmqd.store import Store

BATCH: Final = 10
"""Rows that one step cleans or replays here: few rows make several steps."""
KEEP: Final = MaintenanceSettings(completed_days=100, failed_days=200, log_days=50)


@dataclass(frozen=True)
class Order:
    """What one process does.

    Attributes:
        what: "retention" or "replay".
        dsn: the database.
        crashpoint: PMQD_CRASHPOINT for it.
    """

    what: str
    dsn: str
    crashpoint: str = ""


def main() -> None:
    """Carries out each order in a process of its own; tells its process id, and then how it ended."""
    store_partitions.CLEAN_BATCH = store_reads.REPLAY_BATCH = BATCH  # type: ignore[misc]  # in this process alone
    for line in sys.stdin:
        order = Order(**json.loads(line))
        pid = os.fork()
        if not pid:
            _carry_out(order)
        _say(pid)
        _say(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def _say(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def _carry_out(order: Order) -> None:
    os.environ["PMQD_CRASHPOINT"] = order.crashpoint
    crashpoints._crash_points.cache_clear()
    try:
        with contextlib.closing(Store(PostgresSettings(dsn=order.dsn), "sweep")) as store:
            if order.what == "replay":
                store.replay("trial", None, None, 1_000)
            else:
                store.keep_partitions(KEEP)
    except BaseException as error:  # noqa: BLE001 - whatever it was, this fork must not go on as its parent
        sys.stderr.write(f"{order.what}: {error!r}\n")
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
