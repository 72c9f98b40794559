"""The commands against real stores: what is on stdout, what is said on stderr, and the exit code."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
import redis

from pmqd import cli, overview
from pmqd.config import PostgresSettings
from pmqd.embedded import PostgresServer
from pmqd.store import Store
from tests.fix_daemon import ROOT, MakeDaemon, clean_environ, free_port
from tests.fix_servers import WaitUntil

UNKNOWN = "0198c0de-0000-7000-8000-000000000001"
Columns = list[tuple[Any, ...]]


class Command:
    """The program over a fresh database: called as a function, in this process."""

    def __init__(self, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.file = file
        self._capsys = capsys
        self.said = ""

    def __call__(self, *words: str, code: int = 0) -> str:
        """Runs a command, checks its exit code, keeps stderr in `said`, gives stdout."""
        self._capsys.readouterr()
        found = cli.main([*words, "--config", str(self.file)])
        out, self.said = self._capsys.readouterr()
        assert found == code, f"{words}: {found}: {self.said}"
        assert "Traceback" not in self.said
        return out

    def json(self, *words: str, code: int = 0) -> Any:
        """The same with --json, read."""
        return json.loads(self(*words, "--json", code=code))


@pytest.fixture
def pmqd(
    database: str,
    redis_url: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Command:
    """The program with a configuration for the test's database and Redis, and nobody at the web address."""
    for name in [
        name for name in os.environ if name.startswith("PMQD_") and not name.startswith("PMQD_TEST_")
    ]:
        monkeypatch.delenv(name)
    file = tmp_path / "pmqd.toml"
    file.write_text(
        f'[postgres]\ndsn = "{database}"\n[redis]\nurl = "{redis_url}"\n[web]\nlisten = "127.0.0.1:{free_port()}"\n'
    )
    return Command(file, capsys)


@pytest.fixture
def queue(database: str) -> str:
    """A queue with a row, as the migrator makes it; there is another one."""
    store = Store(PostgresSettings(dsn=database), "test")
    store.sync_queues({}, ["mails", "other"])
    store.close()
    return "mails"


def rows(connection: psycopg.Connection, query: str, *arguments: object) -> Columns:
    """What a query gives."""
    return connection.execute(query, arguments).fetchall()


def fail(connection: psycopg.Connection, *job_ids: str) -> None:
    """Makes jobs look as failed ones do."""
    connection.execute(
        "update pmqd.jobs set status = 'failed', ready = false, attempt_count = max_attempts, failed_at = now(),"
        " last_error_message = 'Error: broken' where id = any(%s)",
        [list(job_ids)],
    )


# --- schema --------------------------------------------------------------------------------------------------


def test_schema_apply_and_check(
    empty_database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a schema: 79 and what to do; apply makes it, twice is harmless, and check then agrees."""
    monkeypatch.delenv("PMQD_CONFIG", raising=False)
    file = tmp_path / "pmqd.toml"
    file.write_text(f'[postgres]\ndsn = "{empty_database}"\n')
    pmqd = Command(file, capsys)
    pmqd("schema", "check", code=79)
    assert "pmqd schema apply" in pmqd.said
    pmqd("jobs", "list", code=79)
    assert "pmqd schema apply" in pmqd.said
    assert pmqd("schema", "apply") == ""
    pmqd("schema", "apply")
    assert pmqd.json("schema", "check")["schema"] == "pmqd"
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute("alter table pmqd.jobs add column stranger integer")
    pmqd("schema", "check", code=79)
    assert "stranger" in pmqd.said


# --- enqueue -------------------------------------------------------------------------------------------------


def test_enqueue_writes_what_it_was_given(pmqd: Command, connection: psycopg.Connection) -> None:
    """Every option arrives in its column; the id is alone on stdout."""
    out = pmqd(
        "enqueue", "mails", '{"to": "ada"}', "--kind", "send", "--priority", "10", "--run-at", "2100-01-01T00:00:00+01:00",
        "--max-attempts", "7", "--tag", "a", "--tag", "b", "--id", UNKNOWN,
    )  # fmt: skip
    assert out == f"{UNKNOWN}\n"
    [row] = rows(
        connection,
        "select queue_name, kind, payload, priority, run_at::text, max_attempts, tags from pmqd.jobs",
    )
    assert row[:4] == ("mails", "send", {"to": "ada"}, 10)
    assert row[4].startswith(("2099-12-31", "2100-01-01"))
    assert row[5:] == (7, ["a", "b"])


def test_enqueue_takes_the_payload_from_stdin(
    pmqd: Command, connection: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`-` reads JSON from stdin; without a payload it is an empty object."""
    done = subprocess.run(
        [sys.executable, "-m", "pmqd", "enqueue", "mails", "-", "--config", str(pmqd.file)],
        input=b"[1, 2]", capture_output=True, check=True, cwd=ROOT, env=clean_environ(),
    )  # fmt: skip
    assert UUID(done.stdout.decode().strip())
    pmqd("enqueue", "mails")
    assert rows(connection, "select payload from pmqd.jobs order by id") == [([1, 2],), ({},)]


def test_enqueue_with_the_same_id_does_nothing_twice(pmqd: Command, connection: psycopg.Connection) -> None:
    """An own id makes the command repeatable."""
    for _ in range(2):
        assert pmqd.json("enqueue", "mails", "{}", "--id", UNKNOWN) == {"id": UNKNOWN}
    assert rows(connection, "select count(*) from pmqd.jobs") == [(1,)]


def test_a_file_is_written_at_once(pmqd: Command, tmp_path: Path, connection: psycopg.Connection) -> None:
    """All lines are there, in one transaction, with their own queues and the options as defaults."""
    file = tmp_path / "jobs.jsonl"
    lines = [{"payload": {"n": n}} for n in range(2000)] + [
        {"payload": [], "queue_name": "other", "kind": "own"}
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    assert pmqd("enqueue", "mails", "--file", str(file), "--kind", "send", "--tag", "t") == "2001\n"
    counted = rows(
        connection,
        "select queue_name, kind, count(*), count(distinct xmin::text), min(tags) from pmqd.jobs group by 1, 2 order by 1",
    )
    assert counted == [("mails", "send", 2000, 1, ["t"]), ("other", "own", 1, 1, ["t"])]


def test_a_bad_line_writes_nothing(pmqd: Command, tmp_path: Path, connection: psycopg.Connection) -> None:
    """The last line is wrong: its number is said and the table stays empty."""
    file = tmp_path / "jobs.jsonl"
    file.write_text('{"payload": 1}\n' * 500 + '{"payload": 1, "priority": 99999}\n')
    pmqd("enqueue", "mails", "--file", str(file), code=2)
    assert "line 501" in pmqd.said
    assert "99999" in pmqd.said
    assert rows(connection, "select count(*) from pmqd.jobs") == [(0,)]


# --- jobs ----------------------------------------------------------------------------------------------------


def test_jobs_list_and_show(pmqd: Command, queue: str, connection: psycopg.Connection) -> None:
    """Tables for people, rows for programs: SQL's columns, RFC 3339 times, display_status, the log, the reason."""
    job_id = pmqd("enqueue", queue, '{"to": "ada"}', "--kind", "send").strip()
    later = pmqd("enqueue", queue, "{}", "--run-at", "+1h").strip()
    connection.execute("update pmqd.jobs set attempt_count = 1 where id = %s", [later])
    listed = pmqd.json("jobs", "list", "--queue", queue)
    assert {row["id"]: row["display_status"] for row in listed} == {
        job_id: "queued",
        later: "retry_scheduled",
    }
    assert all(row["created_at"].endswith("Z") for row in listed)
    shown = pmqd.json("jobs", "show", job_id)
    assert (shown["id"], shown["payload"], shown["kind"]) == (job_id, {"to": "ada"}, "send")
    assert shown["logs"] == []
    assert shown["reason"]
    assert job_id in pmqd("jobs", "list")
    text = pmqd("jobs", "show", job_id)
    assert "waits because" in text
    assert "ada" in text


def test_jobs_list_in_pages(pmqd: Command, queue: str) -> None:
    """What is more is said on stderr, and the cursor goes on where the page ended."""
    made = {pmqd("enqueue", queue).strip() for _ in range(5)}
    first = pmqd.json("jobs", "list", "--limit", "3")
    cursor = pmqd.said.split()[-1]
    second = pmqd.json("jobs", "list", "--limit", "3", "--cursor", cursor)
    assert {row["id"] for row in first + second} == made
    assert len(second) == 2
    pmqd("jobs", "list", "--cursor", "odd", code=2)
    assert "odd" in pmqd.said


def test_jobs_that_are_not_there(pmqd: Command, queue: str) -> None:
    """An unknown job or queue is 1, and named."""
    for words in (["jobs", "show"], ["jobs", "retry"], ["jobs", "cancel"], ["jobs", "wait"]):
        pmqd(*words, UNKNOWN, code=1)
        assert UNKNOWN in pmqd.said
    pmqd("jobs", "list", "--queue", "unknown", code=1)
    assert "'unknown'" in pmqd.said
    assert queue in pmqd.said


def test_retry_and_cancel_do_what_they_can(pmqd: Command, queue: str, connection: psycopg.Connection) -> None:
    """Of several jobs the possible ones are done; one that is not is told, and the exit code says so."""
    dead, alive = (pmqd("enqueue", queue).strip() for _ in range(2))
    fail(connection, dead)
    pmqd("jobs", "retry", dead, UNKNOWN, code=1)
    assert f"{dead} will run again" in pmqd.said
    assert UNKNOWN in pmqd.said
    assert rows(connection, "select status, attempt_count from pmqd.jobs where id = %s", dead) == [
        ("queued", 0)
    ]
    pmqd("jobs", "cancel", alive)
    assert pmqd.json("jobs", "show", alive)["status"] == "cancelled"
    pmqd("jobs", "cancel", alive, code=1)


def test_wait_ends_with_the_job(pmqd: Command, queue: str, connection: psycopg.Connection) -> None:
    """0 when it completed, 1 when it failed, 75 after the timeout; the job's state is on stdout each time."""
    job_id = pmqd("enqueue", queue).strip()
    assert pmqd("jobs", "wait", job_id, "--timeout", "100ms", code=75) == f"{job_id} queued\n"
    assert "still queued" in pmqd.said
    done = threading.Timer(
        0.2,
        lambda: connection.execute(
            "update pmqd.jobs set status = 'completed', ready = false, completed_at = now() where id = %s",
            [job_id],
        ),
    )
    done.start()
    assert pmqd.json("jobs", "wait", job_id, "--timeout", "20")["status"] == "completed"
    done.join()
    other = pmqd("enqueue", queue).strip()
    fail(connection, other)
    assert pmqd("jobs", "wait", other, code=1) == f"{other} failed\n"


# --- dead ----------------------------------------------------------------------------------------------------


def test_dead_list_and_replay(pmqd: Command, queue: str, connection: psycopg.Connection) -> None:
    """Failed jobs are listed; a filter replays some, --all the rest; the number is on stdout."""
    sent = [pmqd("enqueue", queue, "{}", "--kind", "send").strip() for _ in range(3)]
    other = pmqd("enqueue", "other").strip()
    fail(connection, *sent, other)
    assert {row["id"] for row in pmqd.json("dead", "list")} == {*sent, other}
    assert len(pmqd.json("dead", "list", "--queue", queue)) == 3
    assert "Error: broken" in pmqd("dead", "list")
    assert pmqd("dead", "replay", "--queue", queue, "--kind", "none") == "0\n"
    assert pmqd("dead", "replay", "--since", "2100-01-01T00:00:00Z") == "0\n"
    assert pmqd("dead", "replay", "--kind", "send", "--limit", "2") == "2\n"
    assert pmqd("dead", "replay", "--all") == "2\n"
    pmqd("dead", "replay", "--queue", "unknown", code=1)
    assert "there is no queue 'unknown'; there are" in pmqd.said
    assert rows(connection, "select distinct status, attempt_count from pmqd.jobs") == [("queued", 0)]


# --- queues, workers, status ---------------------------------------------------------------------------------


def test_queues_pause_and_resume(pmqd: Command, queue: str) -> None:
    """The list says that a queue is paused and what to do; an unknown one is 1, the others are done all the same."""
    pmqd("enqueue", queue)
    pmqd("queues", "pause", queue, "unknown", code=1)
    assert f"there is no queue 'unknown'; there are {queue}, other" in pmqd.said
    row, _ = pmqd.json("queues", "list")
    assert (row["name"], row["is_active"], row["ready"], row["in_redis"]) == (queue, False, 1, 0)
    assert row["reason"] == f"paused: pmqd queues resume {queue}"
    assert "paused" in pmqd("queues", "list")
    pmqd("queues", "resume", queue)
    row, _ = pmqd.json("queues", "list")
    assert (row["is_active"], row["reason"]) == (
        True,
        "nobody serves it: no running instance has it in a pool",
    )


def test_status_without_a_daemon(pmqd: Command, queue: str) -> None:
    """It says that nothing runs, and why what waits waits; the table and the JSON agree."""
    pmqd("enqueue", queue)
    seen = pmqd.json("status")
    assert (seen["postgres"]["up"], seen["redis"]["up"], seen["instances"]) == (True, True, [])
    row, _ = seen["queues"]
    assert (row["ready"], row["reason"]) == (1, "nobody serves it: no running instance has it in a pool")
    text = pmqd("status")
    assert "no daemon runs" in text
    assert "nobody serves it" in text
    assert pmqd("top", "--looks", "2", "--interval", "200ms")


def test_status_while_redis_is_away(pmqd: Command, queue: str) -> None:
    """Half of it is shown, the rest is said to be down; PostgreSQL is what decides the exit code."""
    pmqd("enqueue", queue)
    seen = pmqd.json("status", "--set", "redis.url=unix:///nonexistent")
    assert (seen["redis"]["up"], seen["mode"], seen["queues"][0]["in_redis"]) == (False, "direct", None)
    assert queue in pmqd("queues", "list", "--set", "redis.url=unix:///nonexistent")
    assert pmqd.said.startswith("warning: Redis at /nonexistent")


def test_status_does_not_take_another_daemons_word(
    pmqd: Command, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no instance lives in this database, whoever answers at web.listen works for another one."""
    pmqd("enqueue", queue)
    stranger = overview.Page({("pmqd_workers", frozenset({("state", "busy")})): 7.0}, 0.0)
    monkeypatch.setattr(overview, "read_page", lambda _: stranger)
    assert pmqd.json("status")["workers"] is None


def test_show_tells_how_far_a_running_job_is(
    pmqd: Command, queue: str, connection: psycopg.Connection, redis_url: str
) -> None:
    """What a job reported is shown while it runs; without Redis the rest is shown all the same."""
    job_id = pmqd("enqueue", queue).strip()
    connection.execute(
        "update pmqd.jobs set status = 'running', ready = false, started_at = now(), worker_id = 'a:b:w1.1',"
        " claim_token = gen_random_uuid()"
    )
    assert pmqd.json("jobs", "show", job_id)["live"] is None
    with redis.Redis.from_url(redis_url) as client:
        client.hset(f"job:{job_id}", mapping={"status": "processing", "progress": "0.25", "note": "rendered"})
    assert pmqd.json("jobs", "show", job_id)["live"] == {"progress": "0.25", "note": "rendered"}
    assert "progress 25 %, rendered" in pmqd("jobs", "show", job_id)
    assert "progress" not in pmqd("jobs", "show", job_id, "--set", "redis.url=unix:///nonexistent")


def test_the_overview_of_a_running_daemon(
    daemon: MakeDaemon, capsys: pytest.CaptureFixture[str], wait_until: WaitUntil
) -> None:
    """Workers with what they run, rates and states come from the running instance."""
    running = daemon({"workers": [{"name": "mail", "app": "tests.applications.trial:app", "processes": 2}]})
    pmqd = Command(running.config, capsys)
    [instance] = pmqd.json("workers")
    assert (instance["pid"], instance["jobs"]) == (running.pid, [])
    job_id = pmqd("enqueue", "trial", '{"seconds": 3}', "--kind", "nap").strip()

    def its_jobs() -> list[Any]:
        return list(pmqd.json("workers")[0]["jobs"])

    wait_until(lambda: [job["id"] for job in its_jobs()] == [job_id], 10, "the job under its instance")
    assert "trial nap" in pmqd("workers")
    seen = pmqd.json("status")
    assert seen["mode"] == "redis"
    assert sum(seen["workers"].values()) == 2
    assert pmqd("jobs", "wait", job_id, "--timeout", "20s").endswith("completed\n")
    assert pmqd("top", "--looks", "2", "--interval", "200ms")
    unknown = pmqd("enqueue", "trial", "{}", "--kind", "stranger").strip()
    wait_until(lambda: "'stranger'" in pmqd("status"), 10, "the reason why an unknown kind waits")
    assert "'stranger'" in pmqd.json("jobs", "show", unknown)["reason"]


def test_bench_measures_and_leaves_nothing(
    pmqd: Command, connection: psycopg.Connection, redis_url: str, queue: str
) -> None:
    """Figures come out, and schema, roles, keys and other queues' jobs are as before."""
    pmqd("enqueue", queue)
    found = pmqd.json("bench", "--jobs", "2000", "--processes", "1")
    assert (found["jobs"], found["processes"]) == (2000, 1)
    assert found["jobs_per_second"] > 100
    assert 0 < found["pickup_p50_seconds"] <= found["pickup_p99_seconds"] < 5
    assert rows(connection, "select nspname from pg_namespace where nspname like 'pmqd_bench%%'") == []
    assert rows(connection, "select rolname from pg_roles where rolname like 'pmqd_bench%%'") == []
    assert rows(connection, "select queue_name, status from pmqd.jobs") == [(queue, "queued")]
    with redis.Redis.from_url(redis_url) as client:
        assert client.keys("*") == []


def test_bench_that_may_not_make_roles_leaves_nothing(pmqd: Command, connection: psycopg.Connection) -> None:
    """Who may make a schema but no roles is told so, and the schema that was begun is gone."""
    connection.execute(
        f"create role bench_user login; grant create on database {connection.info.dbname} to bench_user"
    )
    dsn = psycopg.conninfo.make_conninfo(connection.info.dsn, user="bench_user")
    try:
        pmqd("bench", "--jobs", "10", "--set", f"postgres.dsn={dsn}", code=79)
        assert "may not create roles" in pmqd.said
        assert "use a user who may" in pmqd.said
        assert rows(connection, "select nspname from pg_namespace where nspname like 'pmqd_bench%%'") == []
    finally:
        connection.execute("drop owned by bench_user; drop role bench_user")


# --- a process of its own ------------------------------------------------------------------------------------


def test_a_closed_pipe_is_quiet(pmqd: Command, queue: str) -> None:
    """`pmqd … | head` ends without a word on stderr."""
    for _ in range(3):
        pmqd("enqueue", queue, json.dumps({"text": "x" * 100_000}))
    command = f"{sys.executable} -m pmqd jobs list --json --config {pmqd.file} | head -c 1"
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, check=True, cwd=ROOT, env=clean_environ()
    )
    assert (done.stdout, done.stderr) == (b"[", b"")


def test_a_store_that_dies_is_69(
    own_postgres: PostgresServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command before and after: rows, then one line and 69."""
    file = tmp_path / "pmqd.toml"
    file.write_text(f'[postgres]\ndsn = "{own_postgres.dsn("pmqd")}"\n')
    pmqd = Command(file, capsys)
    assert pmqd.json("jobs", "list") == []
    own_postgres.kill()
    for words in (
        ["jobs", "list"],
        ["queues", "list"],
        ["workers"],
        ["dead", "replay", "--all"],
        ["enqueue", "mails"],
    ):
        pmqd(*words, code=69)
        assert len(pmqd.said.splitlines()) == 1
