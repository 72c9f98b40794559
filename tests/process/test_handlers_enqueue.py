"""Handlers enqueue with the settings of the worker that runs them, wherever those come from."""

from typing import Any

import psycopg

from tests.fix_daemon import MakeDaemon
from tests.fix_servers import WaitUntil
from tests.history import enqueue, job, statuses


def test_a_handler_enqueues_into_the_database_of_its_worker(
    daemon: MakeDaemon, connection: psycopg.Connection[Any], wait_until: WaitUntil
) -> None:
    """The DSN stands in the daemon's --config alone: a handler's enqueue() without a connection reaches that database."""
    daemon()
    job_id = enqueue(connection, "parent", attempts=1, children=3)
    wait_until(lambda: job(connection, job_id)["status"] in {"completed", "failed"}, what="the parent's end")
    assert job(connection, job_id)["last_error_message"] is None
    wait_until(lambda: statuses(connection) == {"completed": 4}, what="the children's end")
