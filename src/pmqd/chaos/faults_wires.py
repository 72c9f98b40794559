"""Faults of wires: cut, held half-open, one way deaf, delayed, sliced, reset, and broken where an answer is owed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Literal

from pmqd.chaos.faults import Action, Area, Kind, Missed, Scene, Watch, always, never

if TYPE_CHECKING:
    from pmqd.chaos.wire import Moment, Wire

Store = Literal["postgres", "redis"]
PRODUCERS: Final = "producers"
BREAK_SECONDS: Final = 4.0
"""How long a broken wire waits for the packet that springs it."""

_AREA: Final[dict[Store, Area]] = {"postgres": Area.POSTGRES_WIRE, "redis": Area.REDIS_WIRE}


def _wire(
    scene: Scene, store: Store, *, whose: Literal["any", "host", "producers"] = "any"
) -> tuple[str, Wire]:
    """A wire with connections on it, and whose it is.

    Raises:
        Missed: none of them has any.
    """
    away = scene.away
    hosts = [host.name for host in scene.world.hosts if host.alive and host.name not in away]
    names = {"any": [*hosts, PRODUCERS], "host": hosts, "producers": [PRODUCERS]}[whose]
    scene.random.shuffle(names)
    for name in names:
        wire = scene.world.wires.get((name, store))
        if wire is not None and wire.connections:
            return name, wire
    raise Missed(f"no wire to {store} has a connection")


def _disturb(
    scene: Scene, store: Store, how: Callable[[Scene, Wire], None], low: float, high: float
) -> Action:
    name, wire = _wire(scene, store)
    there = wire.connections
    scene.undo.callback(wire.open)
    how(scene, wire)
    return Action(
        f"wire of {name} to {store}",
        f"{there} connections",
        always if there else never,
        scene.between(low, high),
        watch=Watch("claims"),
    )


def _cut(_: Scene, wire: Wire) -> None:
    wire.cut()


def _hold(_: Scene, wire: Wire) -> None:
    wire.hold()


def _deafen(scene: Scene, wire: Wire) -> None:
    wire.deaf(scene.random.choice(("client", "server")))


def _delay(scene: Scene, wire: Wire) -> None:
    wire.delay(scene.between(0.01, 0.3))


def _slice(scene: Scene, wire: Wire) -> None:
    wire.slice(scene.random.choice((1, 7, 64, 500)))


def _reset(_: Scene, wire: Wire) -> None:
    wire.reset()


_WAYS: Final[dict[str, tuple[Callable[[Scene, Wire], None], float, float, float]]] = {
    # how, shortest, longest, weight
    "cut": (_cut, 0.2, 3.0, 1.0),
    "held": (_hold, 0.3, 5.0, 1.0),
    "deaf": (_deafen, 0.3, 4.0, 0.7),
    "delayed": (_delay, 0.5, 3.0, 0.7),
    "sliced": (_slice, 0.5, 2.0, 0.7),
    "reset": (_reset, 0.0, 0.0, 1.0),
}


def _break(
    scene: Scene,
    store: Store,
    whose: Literal["host", "producers"],
    words: tuple[bytes, ...],
    when: Moment,
    what: str,
) -> Action:
    """Resets one connection at the packet that contains certain bytes."""
    name, wire = _wire(scene, store, whose=whose)
    before = wire.sprung
    scene.undo.callback(wire.open)
    wire.break_on(scene.random.choice(words), when)

    def sprung() -> bool:
        return wire.sprung > before

    return Action(f"wire of {name} to {store}", what, sprung, over=sprung, patience=BREAK_SECONDS)


# Bytes that name a statement which was prepared before, so its text is not sent: they stand in its parameters.
_SETTLE: Final = (b'"complete"', b'"retry"')
_CLAIM: Final = (b":w",)  # the worker's id
_BREAKS: Final[dict[str, tuple[Store, Literal["host", "producers"], tuple[bytes, ...], Moment, str]]] = {
    "wire_commit_unanswered": (
        "postgres",
        "producers",
        (b"COMMIT",),
        "after",
        "a producer's commit was sent, its answer lost",
    ),
    "wire_commit_unsent": (
        "postgres",
        "producers",
        (b"COMMIT",),
        "before",
        "a producer's commit was lost on its way",
    ),
    "wire_enqueue_unanswered": (
        "postgres",
        "producers",
        (b"chaos-",),
        "after",
        "an enqueue was sent, its answer lost",
    ),
    "wire_settle_unanswered": (
        "postgres",
        "host",
        _SETTLE[:1],
        "after",
        "a settle was sent, its answer lost",
    ),
    "wire_settle_unsent": (
        "postgres",
        "host",
        _SETTLE[:1],
        "before",
        "a settle was lost on its way",
    ),
    "wire_claim_unanswered": (
        "postgres",
        "host",
        _CLAIM,
        "after",
        "a claim (or settle) was sent, its answer lost",
    ),
    "wire_pop_unanswered": ("redis", "host", (b"BLMPOP",), "after", "a pop was sent, its answer lost"),
    "wire_push_unanswered": ("redis", "host", (b"EVALSHA",), "after", "a push was sent, its answer lost"),
    "wire_push_unsent": ("redis", "host", (b"EVALSHA",), "before", "a push was lost on its way"),
}

_STORES: Final[tuple[Store, ...]] = ("postgres", "redis")

KINDS: Final = (
    *(
        Kind(
            f"wire_{store}_{name}",
            _AREA[store],
            functools.partial(_disturb, store=store, how=how, low=low, high=high),
            weight=weight,
        )
        for store in _STORES
        for name, (how, low, high, weight) in _WAYS.items()
    ),
    *(
        Kind(
            name,
            _AREA[store],
            functools.partial(_break, store=store, whose=whose, words=words, when=when, what=what),
        )
        for name, (store, whose, words, when, what) in _BREAKS.items()
    ),
)
