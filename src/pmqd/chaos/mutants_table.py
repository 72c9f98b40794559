"""All mutants: what is broken in each, what has to notice it, and which faults bring it out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pmqd.chaos import mutants_swaps as swaps

Edits = Mapping[str, Sequence[tuple[str, str]]]
"""File or function -> what is replaced in it by what."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One broken variant.

    Attributes:
        name: as `--mutant` takes it.
        what: what is broken.
        caught_by: which of the report's counts may say so.
        faults: the kinds of faults that bring it out; none where the load alone does.
        queries: changes of texts in `sql/queries`.
        functions: changes of functions in the database.
        statements: executed in the database after that, such as the removal of a constraint that would hide it.
        scripts: changes of Lua scripts.
        swaps: functions of modules that are replaced: "module:Class.name" -> the new one.
        broken: False for a variant that must hold: it is there for others to be compared with.
    """

    name: str
    what: str
    caught_by: tuple[str, ...]
    faults: tuple[str, ...] = ()
    queries: Edits = field(default_factory=dict)
    functions: Edits = field(default_factory=dict)
    statements: tuple[str, ...] = ()
    scripts: Edits = field(default_factory=dict)
    swaps: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    broken: bool = True


_TOKEN_GUARD: Final = " and j.claim_token = (%(tokens)s::uuid[])[width_bucket(j.id, %(ids)s::uuid[])]"  # noqa: S105 - SQL
_STATUS_GUARD: Final = "and j.status = 'running' and j.claim_token ="
_LEASE_GUARD: Final = "t.tick - i.lease_tick <= 25"

_INTERRUPTED: Final = " + (g.action = 'interrupt' and j.interruptions < 5)::int"

# A lease of 6 ticks instead of 30, so that a run need not last for minutes. By itself it breaks nothing.
_SHORT_QUERIES: Final[Edits] = {
    "claim": [(_LEASE_GUARD, "t.tick - i.lease_tick <= 5")],
    "held": [("t.tick - i.lease_tick > 31", "t.tick - i.lease_tick > 7")],
    "forget_expired": [("t.tick - i.lease_tick > 31", "t.tick - i.lease_tick > 7")],
}
_SHORT_FUNCTIONS: Final[Edits] = {
    "steal": [(_LEASE_GUARD, "t.tick - i.lease_tick <= 5")],
    "beat": [
        ("beat.tick - i.lease_tick <= 30", "beat.tick - i.lease_tick <= 6"),
        ("beat.tick - i.lease_tick > 31", "beat.tick - i.lease_tick > 7"),
    ],
}


def _in_both_settles(edit: tuple[str, str]) -> dict[str, list[tuple[str, str]]]:
    return {"settle": [edit], "settle_completed": [edit]}


_NO_ATTEMPT_LIMITS: Final = "alter table {schema}.jobs drop constraint attempts_bounded"

TABLE: Final = (
    Mutant(
        "short_lease",
        "nothing: the lease is shorter, as in the mutants that need one to run out",
        (),
        ("host_outlives_lease", "host_lost"),
        queries=_SHORT_QUERIES,
        functions=_SHORT_FUNCTIONS,
        broken=False,
    ),
    # --- guards
    Mutant(
        "settle_without_token",
        "a settle asks only whether the job runs, not under whose claim",
        ("stale_settled", "doubled", "illegal_transition"),
        ("host_outlives_lease",),
        queries={**_SHORT_QUERIES, **_in_both_settles((_TOKEN_GUARD, ""))},
        functions=_SHORT_FUNCTIONS,
    ),
    Mutant(
        "attempt_as_token",
        "a settle asks for the number of the attempt instead of the claim's token",
        ("stale_settled", "doubled", "illegal_transition"),
        ("host_outlives_lease",),
        queries={
            **_SHORT_QUERIES,
            **_in_both_settles(
                (
                    _TOKEN_GUARD,
                    " and j.attempt_count = (%(attempts)s::int[])[width_bucket(j.id, %(ids)s::uuid[])]",
                )
            ),
        },
        functions=_SHORT_FUNCTIONS,
    ),
    Mutant(
        "settle_repeated",
        "a settle whose answer was lost is sent again unasked, and does not look whether the job still runs",
        ("counters_off", "doubled", "illegal_transition", "stale_settled"),
        ("wire_settle_unanswered",),
        queries=_in_both_settles((_STATUS_GUARD, "and j.claim_token =")),
        swaps={"ledger:Ledger._read_settles": swaps.resend_all},
    ),
    Mutant(
        "claim_of_the_running",
        "a claim takes jobs that run already",
        ("overlapped", "illegal_transition", "doubled"),
        ("wire_push_unanswered", "redis_flush", "redis_kill"),
        queries={
            "claim": [
                (
                    "j.status in ('queued', 'migrated_to_redis')",
                    "j.status in ('queued', 'migrated_to_redis', 'running')",
                )
            ]
        },
        statements=(_NO_ATTEMPT_LIMITS,),
    ),
    Mutant(
        "claim_before_its_time",
        "nobody asks whether a job is due",
        ("early",),
        queries={"claim": [(" and j.run_at <= now()", "")]},
        functions={"mark_ids": [(" and j.run_at <= now()", "")], "steal": [(" and j.run_at <= now()", "")]},
    ),
    # --- attempts
    Mutant(
        "attempt_charged_at_the_end",
        "an attempt is charged when it is settled, so one that dies costs nothing",
        ("over_attempted", "stuck", "illegal_transition"),
        queries={
            "claim": [("attempt_count = j.attempt_count + 1", "attempt_count = j.attempt_count")],
            "settle": [
                ("j.attempt_count - {schema}.is_refunded", "j.attempt_count + 1 - {schema}.is_refunded"),
                ("j.cancel_requested, j.attempt_count,", "j.cancel_requested, j.attempt_count + 1,"),
            ],
            "settle_completed": [
                (
                    "set status = 'completed',",
                    "set status = 'completed', attempt_count = j.attempt_count + 1,",
                )
            ],
        },
        functions={"steal": [("attempt_count = j.attempt_count + 1", "attempt_count = j.attempt_count")]},
        statements=(
            _NO_ATTEMPT_LIMITS,
            # A release and a snooze give back what was not charged yet: not below nothing.
            "alter table {schema}.jobs add constraint attempts_bounded check (attempt_count >= 0)",
        ),
    ),
    Mutant(
        "started_counts_as_unstarted",
        "a dead worker's jobs are given back as if none had begun",
        ("over_attempted", "stuck"),
        swaps={"rescue:judge": swaps.judge_all_unstarted},
    ),
    Mutant(
        "interruptions_unlimited",
        "every interruption gives the attempt back, and nobody counts them",
        ("illegal_transition", "over_attempted", "stuck"),
        ("host_kill",),
        queries={
            "rescue": [(_INTERRUPTED, "")],
            "settle": [(_INTERRUPTED, "")],
        },
    ),
    # --- delivery
    Mutant(
        "push_before_mark",
        "the hint is pushed before the row is marked, the claim insists on the mark, and nobody looks again",
        ("stuck", "lost"),
        queries={
            "claim": [("j.status in ('queued', 'migrated_to_redis')", "j.status = 'migrated_to_redis'")]
        },
        swaps={
            "migrator:Lead._move": swaps.push_then_mark,
            "migrator:Lead._repair": swaps.never_repair,
            "clerk:Clerk._may_steal": swaps.never_steal,
        },
    ),
    Mutant(
        "no_reoffer_no_steal",
        "what Redis lost is neither offered again nor taken without a hint",
        ("stuck",),
        ("redis_flush", "redis_kill"),
        swaps={
            "migrator:Lead._repair": swaps.never_repair,
            "clerk:Clerk._may_steal": swaps.never_steal,
        },
    ),
    Mutant(
        "side_set",
        "a set in Redis remembers what was pushed, and is trusted",
        ("leftovers_redis", "stuck"),
        scripts={
            "push_ids": [
                (
                    "    length = redis.call('LPUSH', KEYS[k], unpack(ids))",
                    (
                        "    redis.call('SADD', KEYS[1] .. ':pushed', unpack(ids))\n"
                        "    length = redis.call('LPUSH', KEYS[k], unpack(ids))"
                    ),
                )
            ]
        },
    ),
    Mutant(
        "newest_first",
        "the newest of equal priority come first",
        ("order",),
        functions={
            "mark_ids": [
                ("order by j.run_at, j.id limit space", "order by j.run_at desc, j.id desc limit space")
            ],
            "steal": [
                ("order by j.run_at, j.id limit space", "order by j.run_at desc, j.id desc limit space")
            ],
        },
    ),
    # --- settles and claims in doubt
    Mutant(
        "acknowledged_before_settled",
        "what could not be settled is forgotten",
        ("stuck",),
        ("postgres_terminate", "wire_postgres_reset"),
        swaps={"ledger:Ledger._exchange": swaps.exchange_and_forget},
    ),
    Mutant(
        "claim_in_doubt_forgotten",
        "a claim whose answer was lost is not asked for",
        ("stuck",),
        ("postgres_terminate_role", "wire_claim_unanswered", "wire_settle_unanswered"),
        swaps={"claims:Claims.read_back": swaps.doubt_nothing},
    ),
    Mutant(
        "claim_closed_early",
        "a claim is closed with the first of its jobs, so rescue does not find the rest",
        ("stuck", "lost"),
        ("worker_kill", "worker_kill_all"),
        swaps={"claims:Claims.over_with": swaps.close_early},
    ),
    Mutant(
        "commits_not_durable",
        "no commit of the daemon waits for the disk",
        ("stuck", "overlapped", "lost", "early", "counters_off", "doubled", "unknown"),
        ("postgres_crash", "postgres_kill_backend"),
        swaps={"store_session:_guards": swaps.lazy_guards},
    ),
    # --- rescue and lease
    Mutant(
        "rescue_never",
        "the dead keep what they held",
        ("stuck",),
        ("worker_kill",),
        swaps={"store:Store._rescue": swaps.rescue_nothing},
    ),
    Mutant(
        "rescue_by_snapshot",
        "rescue goes by what a claim once held, not by what still runs under its token",
        ("resurrected", "illegal_transition", "doubled", "overlapped"),
        ("worker_kill", "worker_kill_all"),
        queries={
            "rescue": [
                (" and j.status = 'running' and j.claim_token = %(token)s\n", "\n"),
                (" and j.status = 'running'\n  returning", "\n  returning"),
                ("      claim_token = null,", "      completed_at = null,\n      claim_token = null,"),
            ]
        },
        statements=("alter table {schema}.jobs drop constraint attempts_bounded",),
    ),
    Mutant(
        "rescue_by_age",
        "whoever runs a job for longer than a moment is taken for dead",
        ("false_rescue", "overlapped", "over_attempted", "illegal_transition"),
        swaps={"rescue:Rescuer.strays": swaps.rescue_by_age},
    ),
    Mutant(
        "rescue_of_the_living",
        "an instance is taken for dead after two ticks without a renewal",
        ("false_rescue", "overlapped"),
        ("maintenance_freeze",),
        queries={"held": [("t.tick - i.lease_tick > 31", "t.tick - i.lease_tick > 1")]},
        functions={"beat": [("beat.tick - i.lease_tick > 31", "beat.tick - i.lease_tick > 1")]},
    ),
    Mutant(
        "lease_by_wall_clock",
        "a lease is counted in seconds, which go on while PostgreSQL is away",
        ("false_rescue", "overlapped"),
        ("postgres_crash", "wire_postgres_cut", "wire_postgres_held"),
        queries={
            "held": [("t.tick - i.lease_tick > 31", "i.beat_at < now() - interval '1.5 s'")],
            "forget_expired": [("t.tick - i.lease_tick > 31", "i.beat_at < now() - interval '1.5 s'")],
        },
        functions={
            "beat": [
                ("beat.tick - i.lease_tick > 31", "i.beat_at < now() - interval '1.5 s'"),
            ]
        },
    ),
    # --- numbers, enqueue, cancel
    Mutant(
        "dead_not_credited",
        "what a dead worker had settled without hearing of it is never counted",
        ("counters_off",),
        ("worker_crash_settled",),
        swaps={"metrics:post": swaps.post_for_the_living},
    ),
    Mutant(
        "enqueue_repeated_anew",
        "an enqueue that is repeated after a lost answer makes another row",
        ("unknown",),
        ("wire_enqueue_unanswered",),
        functions={
            "enqueue": [
                (
                    "coalesce(enqueue.id, {schema}.new_id())",
                    (
                        "case when exists (select from {schema}.jobs j where j.id = enqueue.id) then {schema}.new_id()"
                        " else coalesce(enqueue.id, {schema}.new_id()) end"
                    ),
                )
            ]
        },
    ),
    Mutant(
        "cancel_forgotten",
        "a retry forgets that somebody wants the job cancelled",
        ("illegal_transition", "stuck", "lost"),
        functions={"status_after": [("    when cancel_requested then 'cancelled'\n", "")]},
    ),
)
