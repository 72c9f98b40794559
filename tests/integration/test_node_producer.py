"""The example producer in Node, run as its README says."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import dict_row

EXAMPLE = Path(__file__).parents[2] / "examples" / "node-producer"
NO_NETWORK = ("ENOTFOUND", "ECONNREFUSED", "ETIMEDOUT", "EAI_AGAIN", "ENETUNREACH")

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example with its packages installed, away from the repository and from npm's own cache."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("node and npm are not installed")
    place = tmp_path_factory.mktemp("node")
    copy = place / "node-producer"
    shutil.copytree(EXAMPLE, copy, ignore=shutil.ignore_patterns("node_modules", "package-lock.json"))
    environ = os.environ | {"npm_config_cache": str(place / "cache"), "npm_config_update_notifier": "false"}
    install = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock"]
    done = subprocess.run(
        install, cwd=copy, env=environ, capture_output=True, text=True, timeout=100, check=False
    )
    if done.returncode and any(word in done.stderr for word in NO_NETWORK):
        pytest.skip(f"npm cannot reach its registry: {done.stderr.strip().splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    return copy


@pytest.fixture
def signup(database: str, folder: Path) -> Run:
    """Runs the script on a fresh database."""
    place = conninfo_to_dict(database)
    environ = os.environ | {
        "PGHOST": str(place["host"]),
        "PGUSER": str(place["user"]),
        "PGDATABASE": str(place["dbname"]),
    }
    environ.pop("DATABASE_URL", None)

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = ["node", "signup.js", *arguments]
        return subprocess.run(
            command, cwd=folder, env=environ, capture_output=True, text=True, timeout=30, check=False
        )

    return run


def test_the_job_and_the_row_are_there_together_or_not_at_all(signup: Run, database: str) -> None:
    """Committed, there is one row and its job with payload, kind, band and tags; rolled back, neither."""
    plain = signup("ada@example.org")
    urgent = signup("bob@example.org", "--urgent")
    failed = signup("eve@example.org", "--fail")
    assert (plain.returncode, urgent.returncode, failed.returncode) == (0, 0, 1), plain.stderr + urgent.stderr
    assert "there is no job either" in failed.stderr
    with psycopg.connect(database, row_factory=dict_row) as look:
        jobs: list[dict[str, Any]] = look.execute("select * from pmqd.jobs order by id").fetchall()
        people = look.execute("select address from signups order by id").fetchall()
    assert [str(job["id"]) for job in jobs] == [plain.stdout.strip(), urgent.stdout.strip()]
    assert [job["payload"]["to"] for job in jobs] == ["ada@example.org", "bob@example.org"]
    assert [job["priority"] for job in jobs] == [100, 10]
    assert {(job["queue_name"], job["kind"], *job["tags"]) for job in jobs} == {
        ("email-sending", "send_welcome_mail", "signup")
    }
    assert [row["address"] for row in people] == ["ada@example.org", "bob@example.org"]


def test_it_says_how_it_is_called(signup: Run) -> None:
    """Without an address it ends with 2 and a line of usage."""
    done = signup()
    assert done.returncode == 2
    assert "usage: node signup.js ADDRESS" in done.stderr
