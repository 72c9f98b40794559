"""The fault of a clock: PostgreSQL's `now()` steps back for a while.

This machine's clock is nobody's to set, and CPython does not live with a faked one; but what jobs go by is the database's.
"""

from __future__ import annotations

from typing import Final, LiteralString

from psycopg import sql

from pmqd.chaos.faults import Action, Area, Kind, Scene, Watch, always, never
from pmqd.chaos.faults_postgres import connect, end_sessions, text

_CLOCK: Final[LiteralString] = """
create schema if not exists pmqd_chaos_clock;
grant usage on schema pmqd_chaos_clock to public;
create or replace function pmqd_chaos_clock.now() returns timestamptz language sql stable
  as $$ select pg_catalog.now() - interval {step} $$;
create or replace function pmqd_chaos_clock.clock_timestamp() returns timestamptz language sql volatile
  as $$ select pg_catalog.clock_timestamp() - interval {step} $$;
"""


def step_back(scene: Scene) -> Action:
    """now() of all sessions goes back by up to an hour, then returns: a function of that name before the built-in one.

    pmqd pins its search path against just that. The hosts' DSN says otherwise: world.py.

    Only back: a step forward makes jobs early by that step, as it would with any queue that goes by its server's clock.
    """
    connection = connect(scene)
    seconds = scene.random.choice((30, 600, 3600))
    connection.execute(text(scene, _CLOCK, step=sql.Literal(f"{seconds} seconds")))

    def healed() -> None:
        connection.execute("drop schema if exists pmqd_chaos_clock cascade")
        end_sessions(connection)

    scene.undo.callback(healed)
    ended = end_sessions(connection)
    return Action(
        "now()",
        f"{ended} sessions of pmqd went back by {seconds} s",
        always if ended else never,
        scene.between(1.0, 3.0),
        watch=Watch("claims"),
    )


KINDS: Final = (Kind("clock_back", Area.POSTGRES, step_back, weight=0.7, own_servers=True),)
