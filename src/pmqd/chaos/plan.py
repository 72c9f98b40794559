"""What one run does: read from the command line, checked, kept beside the history, and found again for a replay."""

import json
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from psycopg.conninfo import conninfo_to_dict
from pydantic import ValidationError

from pmqd.config import PostgresSettings, RedisSettings
from pmqd.errors import UsageError

PREFIX = "pmqd-chaos-"
FILE = "plan.json"
LIMITS: Mapping[str, tuple[int, int]] = {
    "jobs": (1, 10_000_000),
    "faults": (0, 10_000),
    "seed": (0, 2**63 - 1),
    "hosts": (1, 8),
    "workers": (1, 64),
}
"""What each number of a plan may be."""

DEFAULTS: Mapping[str, Any] = {
    "jobs": 20_000,
    "faults": 40,
    "hosts": 2,
    "workers": 2,
    "mutant": None,
    "only": (),
}
"""What holds where neither the command line nor a replayed plan says it."""


@dataclass(frozen=True)
class Plan:
    """One run.

    Attributes:
        jobs: how many enqueues are acknowledged before the load ends.
        faults: how many faults are planned.
        seed: decides which, where and when, and what the producers do.
        folder: holds the servers' data, the history, configurations and logs.
        hosts: masters, each with its own configuration and `state_dir`.
        workers: processes of each host's pool "quick".
        mutant: a broken variant of the product that the hosts run; the run is to fail.
        postgres: somebody's staging server; None: an own one.
        redis: the same; both or neither.
        json: a file for the report.
        keep: the folder was asked for and stays, whatever comes out.
        only: kinds of faults to choose from; empty: all.
    """

    jobs: int
    faults: int
    seed: int
    folder: Path
    hosts: int = 2
    workers: int = 2
    mutant: str | None = None
    postgres: str | None = field(default=None, repr=False)
    redis: str | None = field(default=None, repr=False)
    json: Path | None = None
    keep: bool = False
    only: tuple[str, ...] = ()

    @property
    def staging(self) -> bool:
        """On servers that are not the run's own?"""
        return self.postgres is not None


def make_plan(given: Mapping[str, Any], replay: str | None = None) -> Plan:
    """The plan that a command line asks for, with its folder made.

    Args:
        given: options by name; None where the option was not there.
        replay: a seed, or the folder of a run that was kept. What that run had holds where `given` says nothing;
            addresses are never kept, so a replay on staging names them again.

    Raises:
        UsageError: an option is out of its limits, does not go with another, or there is nothing to replay.
    """
    said = {name: value for name, value in given.items() if value is not None}
    known = _kept(replay) if replay is not None else {}
    values = {**DEFAULTS, "seed": secrets.randbelow(2**31), **known, **said}
    if "seed" in said and known.get("seed", said["seed"]) != said["seed"]:
        raise UsageError(f"--replay is of seed {known['seed']} and --seed is {said['seed']}: leave one out")
    _check_numbers(values)
    _check_addresses(values.get("postgres"), values.get("redis"))
    _check_mutant(values["mutant"])
    values["only"] = _known_kinds(values["only"])
    values["keep"] = "folder" in said
    values["folder"] = _folder(said.get("folder"), values["seed"])
    return Plan(**values)


def keep(plan: Plan) -> None:
    """Write the plan into its folder, without addresses: they may hold passwords."""
    text = json.dumps({name: asdict(plan)[name] for name in (*DEFAULTS, "seed")}, indent=2)
    (plan.folder / FILE).write_text(f"{text}\n")


def remove_folder(plan: Plan) -> None:
    """Take away all that the run has written."""
    shutil.rmtree(plan.folder, ignore_errors=True)


def remove_servers(plan: Plan) -> None:
    """Take away the servers' data: what is worth a look was written out before."""
    for name in ("pg", "redis"):
        shutil.rmtree(plan.folder / name, ignore_errors=True)


def command_line(plan: Plan) -> str:
    """The command that does the same again."""
    said = asdict(plan) | {"only": ",".join(plan.only)}
    parts = [f"--{name} {said[name]}" for name in (*DEFAULTS, "seed") if said[name] not in (None, "")]
    return " ".join(["python -m pmqd.chaos", *parts, *(["--postgres … --redis …"] if plan.staging else [])])


# --- checking


def _check_numbers(values: Mapping[str, Any]) -> None:
    for name, (low, high) in LIMITS.items():
        number = values[name]
        if not isinstance(number, int) or not low <= number <= high:
            raise UsageError(f"--{name} {number!r} is not a whole number from {low} to {high}")


def _check_addresses(postgres: str | None, redis: str | None) -> None:
    if (postgres is None) != (redis is None):
        there, missing = ("--postgres", "--redis") if redis is None else ("--redis", "--postgres")
        raise UsageError(
            f"{there} is given and {missing} is not: a run uses either its own servers or both of yours"
        )
    for name, section, setting in (("postgres", PostgresSettings, "dsn"), ("redis", RedisSettings, "url")):
        address = postgres if name == "postgres" else redis
        if address is None:
            continue
        try:
            section.model_validate({setting: address})
        except ValidationError as error:
            what = error.errors(include_url=False, include_context=False)[0]["msg"].removeprefix(
                "Value error, "
            )
            # Not shown: an address that cannot be read may have its password anywhere.
            raise UsageError(f"--{name}: {what}") from None

    if redis is not None and not redis.startswith(("redis://", "unix://")):
        raise UsageError(
            "--redis: a run puts wires before one plain server: redis://… or unix://…, no TLS, no sentinels"
        )
    if postgres is not None and "," in str(conninfo_to_dict(postgres).get("host") or ""):
        raise UsageError("--postgres: a run puts its wires before one server: name one host")


def _check_mutant(name: str | None) -> None:
    if name is None:
        return
    from pmqd.chaos.mutants import MUTANTS  # noqa: PLC0415 - only a run with a mutant needs them

    if name not in MUTANTS:
        raise UsageError(f"--mutant {name!r} is none of {', '.join(sorted(MUTANTS))}")


def _known_kinds(names: Iterable[str]) -> tuple[str, ...]:
    wanted = tuple(names)
    if wanted:
        from pmqd.chaos.faults import kinds  # noqa: PLC0415 - only a run that chooses needs them here

        for name in wanted:
            if name not in kinds():
                raise UsageError(f"--only {name!r} is none of {', '.join(sorted(kinds()))}")
    return wanted


# --- folders


def _folder(asked: Path | None, seed: int) -> Path:
    if asked is None:
        return Path(tempfile.mkdtemp(prefix=f"{PREFIX}{seed}-"))
    folder = asked.absolute()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        occupied = any(folder.iterdir())
        folder.chmod(0o700)
    except OSError as error:
        raise UsageError(f"--folder {asked}: {error.strerror}") from error
    if "," in str(folder):
        raise UsageError(f"--folder {asked}: the path of a run's folder has no comma")
    if occupied:
        raise UsageError(f"--folder {asked} is not empty: a run needs a folder of its own")
    return folder


def _kept(replay: str) -> dict[str, Any]:
    """What the plan of an earlier run says."""
    file = _kept_file(replay)
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"--replay {replay}: {file} cannot be read: {error}") from error
    if not isinstance(found, dict) or not {"jobs", "faults", "seed"} <= set(found):
        raise UsageError(f"--replay {replay}: {file} is not the plan of a run")
    return {name: found[name] for name in (*DEFAULTS, "seed") if name in found}


def _kept_file(replay: str) -> Path:
    if not re.fullmatch(r"[0-9]{1,19}", replay):
        if not (Path(replay) / FILE).is_file():
            raise UsageError(f"--replay {replay!r} is neither a seed nor the folder of a run that was kept")
        return Path(replay) / FILE
    parent = Path(tempfile.gettempdir())
    files = sorted(parent.glob(f"{PREFIX}{int(replay)}-*/{FILE}"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise UsageError(
            f"--replay {replay}: no run of this seed was kept in {parent};"
            f" say --seed {replay} with the --jobs and --faults of that run"
        )
    return files[-1]
