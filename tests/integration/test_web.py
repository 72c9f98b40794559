"""The web child over real servers: what it answers, to whom, and while a store is away. The arena is made by hand."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pmqd import metrics, web
from pmqd.arena import Arena, Kind, State
from pmqd.config import PoolSettings, PostgresSettings, RedisSettings, Settings, WebSettings
from pmqd.embedded import PostgresServer, RedisServer
from pmqd.process import ChildContext, StopFlag
from pmqd.store import Store
from tests.fix_proxy import MakeProxy
from tests.fix_servers import WaitUntil

TOKEN = "a-token-of-the-tests"
BEARER = {"authorization": f"Bearer {TOKEN}"}
POOL = PoolSettings(name="mail", app="a:b", queues=["mails"])


@dataclass
class Site:
    """A running web child."""

    url: str
    arena: Arena
    state_dir: Path
    stop: Callable[[], None]

    def get(self, path: str, **options: Any) -> httpx.Response:
        """A GET."""
        return httpx.get(self.url + path, timeout=10, verify=False, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        """A POST."""
        return httpx.post(self.url + path, timeout=10, verify=False, **options)

    def samples(self) -> dict[str, float]:
        """What /metrics says, by the text of the sample."""
        families = text_string_to_metric_families(self.get("/metrics").text)
        return {
            f"{s.name}{json.dumps(dict(sorted(s.labels.items()))) if s.labels else ''}": s.value
            for family in families
            for s in family.samples
        }


MakeSite = Callable[..., Site]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[MakeSite]:
    """The function `site(dsn, redis_url, token=…)`: a web child in a thread, with one idle worker in its arena."""
    ends: list[Callable[[], None]] = []

    def make(dsn: str, redis_url: str, *, token: str = TOKEN, listen: str = "127.0.0.1:9640") -> Site:
        settings = Settings(
            state_dir=tmp_path,
            workers=[POOL],
            postgres=PostgresSettings(dsn=dsn),
            redis=RedisSettings(url=redis_url),
            web=WebSettings(listen=listen, token=token),
        )
        made, end = serve(settings, tmp_path)
        ends.append(end)
        return made

    yield make
    for end in ends:
        end()


def serve(settings: Settings, state_dir: Path) -> tuple[Site, Callable[[], None]]:
    """Starts the child's main in a thread; the second value ends it and waits."""
    arena, stop = Arena.create(2, 2), StopFlag()
    arena.instance_id = uuid4()
    arena.beat_master()
    arena.lease_renewed()
    arena.slots[0].open("web", "here:x:w0.1")
    arena.slots[1].open("worker", "here:x:w1.1", pool="mail", pool_index=0)
    arena.slots[1].state, arena.slots[1].ready = State.IDLE, True
    listener = socket.create_server(("127.0.0.1", 0))
    context = ChildContext(
        settings=settings, arena=arena, slot=arena.slots[0], worker_id="here:x:w0.1", kind=Kind.WEB, pool=None,
        pool_index=-1, web_socket=listener, stop=stop, state_dir=state_dir, host="here", previous_instances=(),
    )  # fmt: skip
    (state_dir / "metrics").mkdir(exist_ok=True)
    thread = threading.Thread(target=web.main, args=(context,))
    thread.start()

    def end() -> None:
        stop.set()
        thread.join(10)
        assert not thread.is_alive(), "the web child does not end"
        listener.close()

    return Site(f"http://127.0.0.1:{listener.getsockname()[1]}", arena, state_dir, stop.set), end


@pytest.fixture
def here(site: MakeSite, database: str, redis_url: str) -> Site:
    """A web child over the session's servers and a fresh database."""
    return site(database, redis_url)


def insert(connection: psycopg.Connection, queue: str = "mails", **columns: Any) -> UUID:
    """One job, as any program inserts it."""
    given = {"queue_name": queue, "payload": '{"secret": "payload"}', **columns}
    names, places = ", ".join(given), ", ".join(["%s"] * len(given))
    row = connection.execute(
        f"insert into pmqd.jobs ({names}) values ({places}) returning id", list(given.values())
    ).fetchone()
    assert row is not None
    return UUID(str(row[0]))


def known_queue(dsn: str, *names: str) -> None:
    """Gives queues their rows, as the migrator does."""
    store = Store(PostgresSettings(dsn=dsn), "test")
    store.sync_queues({}, names)
    store.close()


def fail(connection: psycopg.Connection, job_id: UUID, text: str = "Error: broken") -> None:
    """Makes a job look as a failed one does."""
    connection.execute(
        "update pmqd.jobs set status = 'failed', ready = false, attempt_count = max_attempts, failed_at = now(),"
        " last_error_message = %s where id = %s",
        [text, job_id],
    )


# --- health and readiness ------------------------------------------------------------------------------------


def test_an_idle_loop_wakes_once_a_second_and_ends_at_once(site: MakeSite, wait_until: WaitUntil) -> None:
    """Its progress goes on and the date of its answers is now, though it does not look ten times whether it is to end."""
    here = site("postgresql://127.0.0.1:1/none", "redis://127.0.0.1:1")
    slot = here.arena.slots[0]
    wait_until(lambda: slot.ready, what="ready")
    before = slot.progress_count
    wait_until(lambda: slot.progress_count >= before + 2, timeout=5, what="progress")
    said = parsedate_to_datetime(here.get("/healthz").headers["date"]).timestamp()
    assert abs(time.time() - said) < 3
    assert slot.progress_count < before + 8


def test_an_instance_that_can_work_is_healthy_and_ready(here: Site) -> None:
    """Both say so with 200, in JSON."""
    health = here.get("/healthz")
    assert (health.status_code, health.json()["status"], health.json()["mode"]) == (200, "ok", "redis")
    ready = here.get("/readyz")
    assert (ready.status_code, ready.json()) == (200, {"status": "ready", "reasons": []})


def test_redis_away_is_degraded_but_ready(here: Site) -> None:
    """Jobs still run, so only /healthz tells, and it stays 200: a restart would mend nothing."""
    here.arena.redis_down = True
    health = here.get("/healthz")
    assert (health.status_code, health.json()["status"]) == (200, "degraded")
    assert health.json()["reasons"] == ["redis_down"]
    assert health.json()["mode"] == "direct"
    assert here.get("/readyz").status_code == 200


def test_postgres_away_is_not_ready(here: Site) -> None:
    """/readyz is 503 with `database_down`; /healthz stays 200, because this process runs."""
    here.arena.store_down = True
    ready = here.get("/readyz")
    assert (ready.status_code, ready.json()["reasons"]) == (503, ["database_down"])
    assert here.get("/healthz").status_code == 200


def test_a_lease_that_nobody_renews_counts_as_postgres_away(
    here: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Maintenance may be gone too: silence is enough."""
    monkeypatch.setattr(web, "LEASE_SILENCE_SECONDS", -1.0)
    assert here.get("/readyz").json()["reasons"] == ["database_down"]


@pytest.mark.parametrize("state", [State.STARTING, State.DRAINING, State.DEAD, State.FREE])
def test_no_ready_worker_is_not_ready(here: Site, state: State) -> None:
    """A worker that starts, drains or is dead takes no job."""
    here.arena.slots[1].state = state
    ready = here.get("/readyz")
    assert (ready.status_code, ready.json()["reasons"]) == (503, ["no_worker_ready"])


def test_a_draining_instance_is_not_ready(here: Site) -> None:
    """Nothing new starts, so a load balancer or a deployment should know."""
    here.arena.draining = True
    assert here.get("/readyz").json()["reasons"] == ["draining"]


# --- metrics -------------------------------------------------------------------------------------------------


def test_metrics_hold_counters_depths_workers_and_servers(
    here: Site,
    database: str,
    redis_server: RedisServer,
    connection: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One page has what was counted in files, measured in the arena, and asked of both stores."""
    known_queue(database, "mails")
    for _ in range(3):
        insert(connection)
    insert(connection, run_at="2100-01-01")
    fail(connection, insert(connection))
    metrics.start(here.state_dir / "metrics", "worker-1")
    metrics.count_migrated("mails", "send", 2)
    metrics.stop()
    here.arena.slots[1].state = State.BUSY
    found = here.samples()
    depths = {
        state: found[f'pmqd_queue_depth{{"queue": "mails", "state": "{state}"}}']
        for state in ("ready", "scheduled", "in_redis", "running", "failed")
    }
    assert depths == {"ready": 3, "scheduled": 1, "in_redis": 0, "running": 0, "failed": 1}
    assert found['pmqd_jobs_migrated_total{"kind": "send", "queue": "mails"}'] == 2
    assert found['pmqd_workers{"state": "busy"}'] == 1
    assert found['pmqd_worker_exits_total{"reason": "oom"}'] == 0
    assert found['pmqd_mode{"mode": "redis"}'] == 1
    assert (found["pmqd_redis_up"], found["pmqd_postgres_up"]) == (1, 1)
    assert found["pmqd_redis_memory_bytes"] > 0
    assert found['pmqd_queue_oldest_ready_seconds{"queue": "mails"}'] >= 0


def test_a_dead_worker_leaves_no_gauge(here: Site) -> None:
    """Its memory and busy time leave the page with it; its exit is counted."""
    here.arena.slots[1].rss_kb = 1000
    assert here.samples()['pmqd_pool_memory_bytes{"pool": "mail"}'] == 1_024_000
    here.arena.slots[1].bury(-9, "signal")
    found = here.samples()
    assert found['pmqd_pool_memory_bytes{"pool": "mail"}'] == 0
    assert 'pmqd_worker_busy_ratio{"pool": "mail"}' not in found
    assert found['pmqd_worker_exits_total{"reason": "signal"}'] == 1


def test_no_payload_error_or_id_leaves_the_open_pages(here: Site, connection: psycopg.Connection) -> None:
    """Whoever may scrape learns nothing about a job."""
    job_id = insert(connection, kind="send")
    fail(connection, job_id, "Error: secret text")
    for path in ("/metrics", "/healthz", "/readyz"):
        text = here.get(path).text
        assert "secret" not in text
        assert str(job_id) not in text


def test_pages_answer_while_both_stores_are_away(
    site: MakeSite,
    own_postgres: PostgresServer,
    own_redis: RedisServer,
    wait_until: WaitUntil,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last depths stay on the page with their age, the queue list too; job lists say 503; then all is back."""
    monkeypatch.setattr(web, "METRICS_AGE_SECONDS", 0.2)
    here = site(own_postgres.dsn("pmqd"), own_redis.url)
    with psycopg.connect(own_postgres.dsn("pmqd"), autocommit=True) as connection:
        insert(connection)
    known_queue(own_postgres.dsn("pmqd"), "mails")
    ready = 'pmqd_queue_depth{"queue": "mails", "state": "ready"}'
    assert here.samples()[ready] == 1
    own_postgres.kill()
    own_redis.kill()
    wait_until(lambda: here.get("/api/v1/queue/mails/jobs").status_code == 503, what="503 for job lists")
    assert here.get("/api/v1/queue/mails/jobs").json()["error"]["code"] == "database_down"
    wait_until(lambda: here.samples()["pmqd_redis_up"] == 0, what="Redis seen as away")
    began = time.monotonic()
    found = here.samples()
    assert time.monotonic() - began < 4
    assert found[ready] == 1
    assert found["pmqd_queue_depth_age_seconds"] > 0
    assert here.get("/api/v1/queue/list").json()["items"][0]["name"] == "mails"
    assert here.get("/healthz").status_code == 200
    own_postgres.start()
    own_redis.start()
    wait_until(lambda: here.get("/api/v1/queue/mails/jobs").status_code == 200, what="job lists again")
    wait_until(lambda: here.samples()["pmqd_redis_up"] == 1, what="Redis seen again")


def test_pages_answer_while_both_stores_are_silent(
    site: MakeSite,
    database: str,
    postgres: PostgresServer,
    redis_server: RedisServer,
    proxy: MakeProxy,
    monkeypatch: pytest.MonkeyPatch,
    wait_until: WaitUntil,
) -> None:
    """A pulled cable: nobody says that a store is away. No page waits for it, and callers do not queue up behind it."""
    monkeypatch.setattr(web, "METRICS_AGE_SECONDS", 0.0)
    wires = proxy(postgres), proxy(redis_server)
    here = site(wires[0].dsn(database), wires[1].url)
    known_queue(database, "mails")
    assert here.get("/metrics").status_code == 200
    for wire in wires:
        wire.hold()

    def timed(path: str) -> tuple[int, float]:
        began = time.monotonic()
        return here.get(path).status_code, time.monotonic() - began

    with ThreadPoolExecutor(24) as pool:
        lists = [pool.submit(timed, "/api/v1/queue/mails/jobs") for _ in range(20)]
        assert timed("/healthz")[1] < 1
        status, seconds = timed("/metrics")
        assert (status, seconds < 3) == (200, True)
        answers = [each.result() for each in lists]
    assert {status for status, _ in answers} == {503}
    assert max(seconds for _, seconds in answers) < 9
    for wire in wires:
        wire.heal()
    wait_until(lambda: here.get("/api/v1/queue/mails/jobs").status_code == 200, 10, "job lists again")


# --- the API: reading ----------------------------------------------------------------------------------------


def test_the_queue_list(here: Site, database: str, connection: psycopg.Connection) -> None:
    """Columns of job_queues, depths, and hints in Redis, in the shape of all lists."""
    known_queue(database, "bounces", "mails")
    insert(connection)
    body = here.get("/api/v1/queue/list").json()
    assert body["next_cursor"] is None
    assert [item["name"] for item in body["items"]] == ["bounces", "mails"]
    mails = body["items"][1]
    assert (mails["is_active"], mails["ready"], mails["in_redis"]) == (True, 1, 0)
    assert {"default_priority", "max_attempts", "timeout_seconds"} <= mails.keys()


def test_jobs_of_a_queue_by_status_in_pages(
    here: Site, database: str, connection: psycopg.Connection
) -> None:
    """Every job comes once over the pages, newest first, with SQL's columns, RFC 3339 times and display_status."""
    known_queue(database, "mails", "other")
    made = [insert(connection) for _ in range(5)]
    fail(connection, made[0])
    insert(connection, "other")
    seen: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        body = here.get("/api/v1/queue/mails/jobs", params={"limit": 2, **cursor}).json()
        seen += [item["id"] for item in body["items"]]
        if body["next_cursor"] is None:
            break
        cursor = {"cursor": body["next_cursor"]}
    assert seen == [str(job_id) for job_id in reversed(made)]
    failed = here.get("/api/v1/queue/mails/jobs", params={"status": "failed"}).json()["items"]
    assert [(item["id"], item["display_status"]) for item in failed] == [(str(made[0]), "failed")]
    assert failed[0]["created_at"].endswith("Z")
    assert failed[0]["queue_name"] == "mails"


def test_one_job_with_its_log_and_why_it_waits(
    here: Site, database: str, connection: psycopg.Connection
) -> None:
    """A waiting retry is shown as such, with the attempts' log and a reason."""
    known_queue(database, "mails")
    job_id = insert(connection, attempt_count=1, run_at="2100-01-01")
    connection.execute(
        "insert into pmqd.job_logs (job_id, status, attempt_number, log_message) values (%s, 'retry', 1, 'again')",
        [job_id],
    )
    body = here.get(f"/api/v1/queue/mails/jobs/{job_id}").json()
    assert (body["id"], body["status"], body["display_status"]) == (str(job_id), "queued", "retry_scheduled")
    assert body["payload"] == {"secret": "payload"}
    assert body["run_at"] == "2100-01-01T00:00:00Z"
    assert [(log["status"], log["log_message"]) for log in body["logs"]] == [("retry", "again")]
    assert body["reason"]


BAD_REQUESTS = [
    ("/api/v1/queue/mails/jobs?limit=0", 400, "limit '0'"),
    ("/api/v1/queue/mails/jobs?limit=501", 400, "500"),
    ("/api/v1/queue/mails/jobs?limit=x", 400, "limit 'x'"),
    ("/api/v1/queue/mails/jobs?limit=99999999999999999999", 400, "limit"),
    ("/api/v1/queue/mails/jobs?limit=٣", 400, "limit"),
    ("/api/v1/queue/mails/jobs?status=odd", 400, "status 'odd'"),
    ("/api/v1/queue/mails/jobs?cursor=odd", 400, "cursor"),
    ("/api/v1/queue/mails/jobs/7", 400, "'7'"),
    ("/api/v1/queue/a%20b/jobs", 400, "'a b'"),
    ("/api/v1/queue/%3Cscript%3E/jobs", 400, "<script>"),
    ("/api/v1/queue/unknown/jobs", 404, "'unknown'"),
    ("/api/v1/queue/mails/jobs/0198c0de-0000-7000-8000-000000000001", 404, "0198c0de"),
    ("/api/v1/nothing", 404, ""),
    ("/nothing", 404, ""),
    ("/api/v1/queue/mails/pause", 405, ""),
]


@pytest.mark.parametrize(("path", "status", "said"), BAD_REQUESTS, ids=[path for path, _, _ in BAD_REQUESTS])
def test_bad_requests_have_the_shape_of_errors(
    here: Site, database: str, path: str, status: int, said: str
) -> None:
    """Every refusal is JSON with a code and a message that names the value, and is not taken for anything else."""
    known_queue(database, "mails")
    answer = here.get(path)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert set(answer.json()) == {"error"}
    assert set(answer.json()["error"]) == {"code", "message"}
    assert said in answer.json()["error"]["message"]


# --- the API: changing ---------------------------------------------------------------------------------------

CHANGES = [
    "/api/v1/queue/mails/pause",
    "/api/v1/queue/mails/resume",
    f"/api/v1/queue/mails/jobs/{UUID(int=7)}/retry",
]


NOWHERE = ("host=/nonexistent", "unix:///nonexistent")


def test_without_a_configured_token_nothing_can_be_changed(site: MakeSite) -> None:
    """No token is no permission, whatever the request brings: 403, before a store is asked."""
    here = site(*NOWHERE, token="")
    for path in CHANGES:
        for headers in ({}, BEARER, {"authorization": "Bearer"}, {"authorization": ""}):
            answer = here.post(path, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")


def test_a_wrong_token_is_401(site: MakeSite) -> None:
    """Anything but the token itself, as a bearer's, is refused before a store is asked."""
    here = site(*NOWHERE)
    wrong = [
        "",
        "Bearer",
        "Bearer wrong",
        f"Basic {TOKEN}",
        TOKEN,
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        "Bearer \xe9",
    ]
    for path in CHANGES:
        for text in wrong:
            answer = here.post(path, headers={"authorization": text.encode("latin-1")})
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized"), text
            assert answer.headers["www-authenticate"] == "Bearer"
        assert here.post(path, headers=BEARER).status_code == 503


def test_pause_and_resume(here: Site, database: str) -> None:
    """The queue's row says so at once, in the list as well; an unknown queue is 404, GET changes nothing."""
    known_queue(database, "mails")
    for word, active in (("pause", False), ("resume", True)):
        answer = here.post(f"/api/v1/queue/mails/{word}", headers=BEARER)
        assert (answer.status_code, answer.json()) == (200, {"name": "mails", "is_active": active})
        assert here.get("/api/v1/queue/list").json()["items"][0]["is_active"] is active
    assert here.post("/api/v1/queue/unknown/pause", headers=BEARER).status_code == 404


def test_retry(here: Site, database: str, connection: psycopg.Connection) -> None:
    """A failed job starts a new life; one that is not failed is a conflict; another queue's job is not found."""
    known_queue(database, "mails", "other")
    job_id = insert(connection)
    fail(connection, job_id)
    assert here.post(f"/api/v1/queue/other/jobs/{job_id}/retry", headers=BEARER).status_code == 404
    answer = here.post(f"/api/v1/queue/mails/jobs/{job_id}/retry", headers=BEARER)
    assert (answer.status_code, answer.json()["status"], answer.json()["attempt_count"]) == (200, "queued", 0)
    again = here.post(f"/api/v1/queue/mails/jobs/{job_id}/retry", headers=BEARER)
    assert (again.status_code, again.json()["error"]["code"]) == (409, "conflict")


def test_beyond_loopback_reading_needs_the_token_too(site: MakeSite, database: str, redis_url: str) -> None:
    """Payloads are for whoever has the token once others can reach the socket; health and metrics stay open."""
    here = site(database, redis_url, listen="0.0.0.0:9640")
    known_queue(database, "mails")
    for path in ("/api/v1/queue/list", "/api/v1/queue/mails/jobs", f"/api/v1/queue/mails/jobs/{uuid4()}"):
        assert here.get(path).status_code == 401
    assert here.get("/api/v1/queue/mails/jobs", headers=BEARER).status_code == 200
    assert here.get("/metrics").status_code == 200
    assert here.get("/readyz").status_code == 200


# --- the child -----------------------------------------------------------------------------------------------


def test_it_ends_when_told_and_finishes_what_it_answers(here: Site, wait_until: WaitUntil) -> None:
    """After the stop the socket takes nobody, although a client keeps its connection."""
    with httpx.Client(base_url=here.url) as client:
        assert client.get("/healthz").status_code == 200
        here.stop()

        def refused() -> bool:
            try:
                here.get("/healthz")
            except httpx.HTTPError:
                return True
            return False

        wait_until(refused, 5, "the end of the child")


def test_it_says_that_its_loop_turns(here: Site, wait_until: WaitUntil) -> None:
    """The master kills a child without progress: this one makes some without any request."""
    before = here.arena.slots[0].progress_count
    wait_until(lambda: here.arena.slots[0].progress_count > before, 5, "progress")
    wait_until(lambda: here.arena.slots[0].ready, 5, "the report that it serves")
