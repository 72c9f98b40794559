"""The example route handler for Next.js: type-checked, and called as Next.js calls it."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import orjson
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from penguinmails.campaign import process_campaign
from tests.integration.test_node_producer import NO_NETWORK
from tests.mail_jobs import CAMPAIGN, Port, a_job

EXAMPLE = Path(__file__).parents[2] / "examples" / "nextjs-campaign"

# Requests as JSON on stdin, one after another; the answers on stdout.
CALLER = """
import { POST } from "./dist/app/api/campaigns/route.js";
import { pool } from "./dist/lib/db.js";
const answers = [];
for await (const chunk of process.stdin) {
  for (const { body, token } of JSON.parse(chunk)) {
    const headers = token ? { authorization: `Bearer ${token}` } : {};
    const answer = await POST(new Request("http://localhost/api/campaigns", { method: "POST", headers, body }));
    answers.push([answer.status, await answer.json()]);
  }
}
await pool.end();
console.log(JSON.stringify(answers));
"""

Call = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example with its packages, its types checked and compiled."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("node and npm are not installed")
    place = tmp_path_factory.mktemp("nextjs")
    copy = place / "nextjs-campaign"
    shutil.copytree(EXAMPLE, copy, ignore=shutil.ignore_patterns("node_modules", "package-lock.json", "dist"))
    environ = os.environ | {"npm_config_cache": str(place / "cache"), "npm_config_update_notifier": "false"}
    for command in (["install", "--no-audit", "--no-fund", "--no-package-lock"], ["run", "build"]):
        done = subprocess.run(
            ["npm", *command], cwd=copy, env=environ, capture_output=True, text=True, timeout=100, check=False
        )
        if done.returncode and any(word in done.stderr for word in NO_NETWORK):
            pytest.skip(f"npm cannot reach its registry: {done.stderr.strip().splitlines()[0]}")
        assert done.returncode == 0, done.stdout + done.stderr
    (copy / "caller.mjs").write_text(CALLER)
    return copy


@pytest.fixture
def call(mail_database: str, folder: Path) -> Iterator[Call]:
    """Calls the handler, as a database user with a producer's two roles."""
    place, login = conninfo_to_dict(mail_database), f"site_{uuid4().hex[:8]}"
    environ = os.environ | {
        "PGHOST": str(place["host"]),
        "PGUSER": login,
        "PGDATABASE": str(place["dbname"]),
        "CAMPAIGNS_TOKEN": "fish",
    }
    environ.pop("DATABASE_URL", None)

    def run(*requests: tuple[Any, str]) -> list[Any]:
        given = [
            {"body": body if isinstance(body, str) else orjson.dumps(body).decode(), "token": token}
            for body, token in requests
        ]
        done = subprocess.run(
            ["node", "caller.mjs"],
            cwd=folder,
            env=environ,
            input=orjson.dumps(given),
            capture_output=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        answers: list[Any] = orjson.loads(done.stdout)
        return answers

    with psycopg.connect(mail_database, autocommit=True) as conn:
        conn.execute(f"create role {login} login in role pmqd_enqueue, penguinmails_enqueue".encode())
        yield run
        conn.execute(f"drop role {login}".encode())


def test_a_route_handler_starts_a_campaign_once(call: Call, mail_database: str) -> None:
    """Asked twice, one campaign, one list, one job, of which the worker makes the mails; a wrong request is named and writes nothing."""
    people = [
        {"email": "ada@example.org", "name": "Ada", "variables": {"city": "London"}},
        {"email": "ADA@example.org"},
        {"email": "bob@example.org"},
    ]
    body = {"id": str(CAMPAIGN), "template": "welcome", "account": "bulk", "recipients": people}
    wrong: list[tuple[Any, str]] = [
        (body, ""),
        (body, "meat"),
        ("{", "fish"),
        ({**body, "id": "7"}, "fish"),
        ({**body, "recipients": []}, "fish"),
        ({**body, "recipients": [{"email": "x@example.org", "variables": {"n": 1}}]}, "fish"),
    ]
    answers = call((body, "fish"), (body, "fish"), *wrong)
    assert answers[:2] == [
        [202, {"id": str(CAMPAIGN), "recipients": 2, "is_new": True}],
        [202, {"id": str(CAMPAIGN), "recipients": 2, "is_new": False}],
    ]
    assert [status for status, _ in answers[2:]] == [401, 401, 400, 400, 400, 400]
    assert answers[-1][1] == {"error": "recipients[0].variables.n must be a text"}
    with psycopg.connect(mail_database) as conn:
        ((job, kind, payload),) = conn.execute("select id, kind, payload from pmqd.jobs").fetchall()
    assert (job, kind, payload) == (CAMPAIGN, "campaign.process", {"campaign_id": str(CAMPAIGN)})
    process_campaign(job=a_job(Port(mail_database)), campaign_id=CAMPAIGN)
    with psycopg.connect(mail_database) as conn:
        made = conn.execute(
            "select d.email, d.account, j.payload ->> 'name', j.payload -> 'variables' from penguinmails.deliveries d"
            " join pmqd.jobs j on j.id = d.job_id order by 1"
        ).fetchall()
    assert made == [
        ("ada@example.org", "bulk", "Ada", {"city": "London"}),
        ("bob@example.org", "bulk", "", {}),
    ]
