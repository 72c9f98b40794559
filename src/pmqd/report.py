"""What the master says about its children: one line for people, many for SIGUSR1."""

from __future__ import annotations

from collections.abc import Iterator

from pmqd.arena import Kind, State
from pmqd.children import Child, ChildState
from pmqd.roster import Roster, workers_of


def headline(roster: Roster, now: float) -> str:
    """How many work, in one line; what is being waited for, where something is."""
    workers = roster.alive(Kind.WORKER)
    ready = sum(child.state == ChildState.RUNNING and not child.retiring for child in workers)
    parts = [
        f"{ready} of {workers_of(roster.generation.places)} workers ready",
        f"{_jobs(workers)} jobs running",
    ]
    leaving = [child.deadline for child in workers if child.state == ChildState.STOPPING]
    if leaving:
        parts.append(f"{len(leaving)} workers stopping, {max(0.0, max(leaving) - now):.0f} s left")
    waiting = sum(child.state == ChildState.BACKOFF and child.deadline > now for child in roster.children)
    if waiting:
        parts.append(f"{waiting} children in back-off")
    return ", ".join(parts)


def _jobs(children: list[Child]) -> int:
    return sum(len(child.slot.running()) for child in children if child.slot is not None)


def describe(roster: Roster, phase: str, now: float) -> Iterator[str]:
    """The whole state, line by line."""
    arena, generation = roster.family.arena, roster.generation
    yield f"state: {phase}, generation {generation.number}, instance {arena.instance_id}; {headline(roster, now)}"
    yield (
        f"state: lease renewed {arena.lease_age(now):.1f} s ago, pulse {arena.pulse_age(now):.1f} s ago,"
        f" redis_down {arena.redis_down}, store_down {arena.store_down}, exits {arena.exits()}"
    )
    for child in roster.children:
        yield f"state: {child}: {_one(child, now)}"
    for slot in arena.slots:
        if slot.state == State.DEAD:
            yield f"state: slot {slot.index}: {slot.worker_id} is dead and waits for its rescue"


def _one(child: Child, now: float) -> str:
    slot = child.slot
    parts = [str(child.state), f"generation {child.generation}"]
    if child.retiring:
        parts.append(f"gives way ({child.retiring})")
    if slot is None:
        return ", ".join(
            [*parts, f"{child.backoff.failures} deaths, {max(0.0, child.deadline - now):.1f} s to wait"]
        )
    parts += [
        slot.worker_id,
        slot.state.name.lower(),
        f"{slot.jobs_done} jobs done",
        f"{slot.rss_kb // 1024} MiB",
    ]
    parts.append(f"progress {slot.progress_age(now):.1f} s ago")
    parts += [f"job {job.job_id} for {now - job.started:.1f} s" for job in slot.running()]
    return ", ".join(parts)
