"""What a run found: a table for people, JSON for machines."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pmqd.chaos.plan import command_line
from pmqd.chaos.run import Outcome

VERDICTS: Mapping[int, str] = {
    0: "held: every invariant, under every fault",
    1: "BROKEN",
    2: "nothing proved: something that had to happen never did",
}
_SHOWN = 40
_VIOLATIONS = "lost doubled overlapped over_attempted early stuck resurrected".split()  # noqa: SIM905 - as people read


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Everything, for `--json`. Addresses of servers are not in it: they may hold passwords."""
    plan, report = outcome.plan, outcome.report
    return {
        "verdict": VERDICTS[outcome.exit_code],
        "exit_code": outcome.exit_code,
        "command": command_line(plan),
        "plan": {
            name: value
            for name, value in asdict(plan).items()
            if name in ("jobs", "faults", "seed", "hosts", "workers", "mutant", "only", "staging")
        }
        | {"staging": plan.staging},
        "machine": outcome.facts,
        "seconds": outcome.seconds,
        "report": None if report is None else _plain(asdict(report)),
        "faults": [_plain(asdict(record)) for record in outcome.records],
        "refused": outcome.refused,
        "unmet": outcome.unmet,
        "conditions": [asdict(each) for each in outcome.conditions],
        "complaints": outcome.complaints,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def as_text(outcome: Outcome) -> RenderableType:
    """The tables: jobs, faults by kind, conditions, and what broke."""
    parts: list[RenderableType] = [_head(outcome), ""]
    if outcome.records or outcome.refused:
        parts += [_faults(outcome), ""]
    if outcome.conditions:
        parts += [_conditions(outcome), ""]
    if outcome.report is not None:
        parts += [_figures(outcome), ""]
    parts += [Text(line) for line in _troubles(outcome)]
    parts.append(Text(f"{VERDICTS[outcome.exit_code]} (exit code {outcome.exit_code})", style="bold"))
    return Group(*parts)


def _head(outcome: Outcome) -> Text:
    facts, seconds = outcome.facts, outcome.seconds
    where = "servers of somebody's own" if outcome.plan.staging else "servers of its own"
    machine = f"{facts.get('cores')} cores, Python {facts.get('python')}, PostgreSQL {facts.get('postgres')}, Redis {facts.get('redis')}"
    phases = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    return Text(f"{command_line(outcome.plan)}\n{machine}, {where}\n{phases}")


def _faults(outcome: Outcome) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="faults", title_justify="left", pad_edge=False)
    for name in ("kind", "times", "hit", "slowest recovery", "the last hit"):
        table.add_column(name, justify="right" if name in ("times", "hit", "slowest recovery") else "left")
    for kind in sorted({record.kind for record in outcome.records} | set(outcome.unmet)):
        records = [record for record in outcome.records if record.kind == kind]
        hits = [record for record in records if record.hit]
        slowest = max(
            (record.recovery_seconds for record in hits if record.recovery_seconds is not None), default=None
        )
        told = (hits or records)[-1:]
        text = ": ".join(filter(None, (told[0].target, told[0].window))) if told else "never began"
        table.add_row(
            kind,
            str(len(records)),
            str(len(hits)) if hits else "never",
            "" if slowest is None else f"{slowest:.2f} s",
            text,
        )
    for kind, reason in sorted(outcome.refused.items()):
        table.add_row(kind, "0", "", "", f"left out: {reason}")
    return table


def _conditions(outcome: Outcome) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="seen on the way", title_justify="left", pad_edge=False)
    table.add_column("state")
    table.add_column("times", justify="right")
    for each in outcome.conditions:
        missing = "never, and it had to be" if each.expected else "never"
        table.add_row(each.name, f"{each.seen:,}" if each.seen else missing)
    return table


def _figures(outcome: Outcome) -> Table:
    report = outcome.report
    assert report is not None
    table = Table(box=box.SIMPLE_HEAD, title="jobs", title_justify="left", pad_edge=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.show_header = False
    table.add_row("acknowledged", f"{report.jobs:,}")
    table.add_row(
        "faults that hit", f"{sum(record.hit for record in outcome.records):,} of {len(outcome.records):,}"
    )
    for name in [*_VIOLATIONS, *(name for name in report.counts if name not in _VIOLATIONS)]:
        if name in report.counts:
            number = report.counts[name]
            table.add_row(name.replace("_", " "), f"{number:,}", style="bold red" if number else None)
    table.add_row("executed again", f"{report.re_executed:,}")
    for name, value in report.notes.items():
        table.add_row(name.replace("_", " "), f"{value:,.6g}", style="dim")
    table.add_row("slowest recovery", f"{report.slowest_recovery:.2f} s")
    return table


def _troubles(outcome: Outcome) -> Sequence[str]:
    """What broke, one line each, with the first histories of each violation below."""
    lines = [f"broken: {text}" for text in outcome.complaints]
    if outcome.report is not None:
        for name, texts in outcome.report.first.items():
            lines += [
                f"{name}: {outcome.report.counts.get(name, len(texts)):,}",
                *(f"    {text}" for text in texts[:_SHOWN]),
            ]
    lines += [f"never hit: {kind}" for kind in outcome.unmet]
    lines += [f"never seen: {name}" for name in outcome.unseen]
    return lines
