"""Canaries in every place where a secret stands, a daemon that goes through all that goes wrong, and nobody sings."""

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import httpx
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pmqd import config
from pmqd.broker import Broker
from pmqd.errors import BrokerUnavailable, ConfigError, PmqdError
from pmqd.settings import PostgresSettings, RedisSettings
from pmqd.store import Store
from tests.cli import pmqd
from tests.fix_daemon import Daemon, MakeDaemon, free_port, to_toml
from tests.fix_servers import WaitUntil
from tests.history import enqueue, job

DSN, REDIS, TOKEN = "c4n4ry-of-the-dsn", "c4n4ry-of-redis", "c4n4ry-of-the-web-token"
PAYLOAD, ERROR, ENVIRON = "c4n4ry-of-a-payload", "c4n4ry-of-an-exception", "c4n4ry-of-the-environment"
CONFIGURED = (DSN, REDIS, TOKEN)
ALL = (*CONFIGURED, PAYLOAD, ERROR, ENVIRON)


def sung(text: str, canaries: tuple[str, ...] = ALL) -> list[str]:
    """The canaries in a text."""
    return [canary for canary in canaries if canary in text]


def everybody() -> Iterator[tuple[int, str]]:
    """What any user of this machine sees of each process: its command line and its name."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                yield int(folder.name), (folder / "cmdline").read_text() + (folder / "comm").read_text()
            except OSError:
                continue


@pytest.fixture
def secretive(database: str, redis_url: str, daemon: MakeDaemon) -> Daemon:
    """A daemon full of secrets, at debug level, whose Redis refuses its password."""
    place = urlsplit(redis_url)
    return daemon(
        {
            "postgres": {"dsn": make_conninfo(database, password=DSN)},
            "redis": {"url": f"redis://:{REDIS}@{place.hostname}:{place.port}/0"},
            "web": {"listen": f"127.0.0.1:{free_port()}", "token": TOKEN},
            "log": {"level": "debug", "format": "json"},
            "workers": [{"app": "tests.security.hostile_app:app", "processes": 2}],
        },
        environ={"SOME_API_KEY": ENVIRON},
    )


def has_failed(connection: psycopg.Connection[Any], job_id: UUID) -> bool:
    """Whether a job has."""
    return bool(job(connection, job_id)["status"] == "failed")


def refusals(running: Daemon, more_than: int = -1) -> int:
    """How many reloads were refused so far; 0 where they are not more than that."""
    found = running.log.count("reload refused") + running.log.count("reload failed")
    return found if found > more_than else 0


def fail_jobs(connection: psycopg.Connection[Any], wait_until: WaitUntil) -> None:
    """Jobs that fail with secrets in hand: a payload that does not fit, an exception, a crash."""
    ids = [
        enqueue(connection, "typed", queue="hostile", secret=PAYLOAD),
        enqueue(connection, "raises", queue="hostile", text=f"{ERROR} {PAYLOAD}"),
        enqueue(connection, "dies", queue="hostile", secret=PAYLOAD),
        enqueue(connection, "unknown", queue="hostile", secret=PAYLOAD),
    ]
    for job_id in ids[:3]:
        wait_until(partial(has_failed, connection, job_id), 30, f"the end of {job_id}")


def reload_badly(running: Daemon, wait_until: WaitUntil) -> None:
    """Reloads that cannot work: broken files around the secrets, and a user whom PostgreSQL does not know."""
    sound = running.settings
    stranger = make_conninfo(sound["postgres"]["dsn"], user="nobody_known", password=DSN)
    texts = [
        to_toml(sound) + f'\n[web\ntoken = "{TOKEN}',
        f'[postgres]\ndsn = ["{DSN}"]\n[web]\ntoken = 5\ntokn = "{TOKEN}"\n',
        f'[postgres]\ndsn = "postgresql://me:{DSN}/@[host/x"\n[redis]\nurl = "redis://:{REDIS}/x@host"\n',
        f'web = "{TOKEN}"\npostgres = "host=x password={DSN}"\n',
        to_toml({**sound, "postgres": {"dsn": stranger}, "workers": [{"app": "no_such_module:app"}]}),
    ]
    for text in texts:
        told = refusals(running)
        running.config.write_text(text)
        running.signal(signal.SIGHUP)
        wait_until(partial(refusals, running, told), 30, "the refusal")


def test_secrets_in_logs_processes_and_pages(
    secretive: Daemon, connection: psycopg.Connection[Any], wait_until: WaitUntil
) -> None:
    """Through failures, a crash, a refused password and broken reloads at debug level: in no record, no command line of any
    process, no title, no open page. The payload is in its row and where rows may be read; the exception's text in its row.
    """
    fail_jobs(connection, wait_until)
    reload_badly(secretive, wait_until)
    secretive.signal(signal.SIGUSR1)
    wait_until(lambda: "Redis is away" in secretive.log, 20, "the refused password")
    processes = dict(everybody())
    assert len(secretive.family()) >= 5
    own = os.getpid()
    assert {pid: found for pid, text in processes.items() if pid != own and (found := sung(text))} == {}
    for path in ("/metrics", "/healthz", "/readyz"):
        assert sung(secretive.get(path).text) == [], path
    listed = secretive.get("/api/v1/queue/hostile/jobs").text
    assert sung(listed) == [PAYLOAD, ERROR]
    refused = httpx.post(
        f"{secretive.url}/api/v1/queue/hostile/pause", headers={"authorization": f"Bearer {TOKEN}x"}
    )
    assert (refused.status_code, sung(refused.text)) == (401, [])
    secretive.stop()
    assert sung(secretive.log) == []
    state = Path(secretive.settings["state_dir"])
    kept = b"".join(path.read_bytes() for path in state.rglob("*") if path.is_file())
    assert [canary for canary in ALL if canary.encode() in kept] == []


def test_secrets_in_logs_of_commands(database: str, tmp_path: Path) -> None:
    """Commands with sound, refused and broken settings, `check` and `doctor` among them: nothing on stdout or stderr."""
    file = tmp_path / "pmqd.toml"
    for dsn in (
        make_conninfo(database, password=DSN),
        make_conninfo(database, user="nobody_known", password=DSN),
        f"host=/nonexistent password={DSN}",
        f"postgresql://me:{DSN}@127.0.0.1:1/x",
        f"postgresql://me:{DSN}/x@host/x",
    ):
        file.write_text(
            to_toml(
                {"postgres": {"dsn": dsn}, "redis": {"url": f"redis://me:{REDIS}@127.0.0.1:1/0"},
                 "web": {"token": TOKEN, "listen": f"127.0.0.1:{free_port()}"}}
            )
        )  # fmt: skip
        for words in (["doctor"], ["check"], ["status", "--json"])[: 3 if "nobody" in dsn else 1]:
            done = pmqd(file, *words)
            assert sung(done.stdout + done.stderr) == [], (words, dsn)
    file.write_text(f'[postgres]\ndsn = "host=/nonexistent password={DSN}"\n')
    done = pmqd(file, "--debug", "jobs", "list")
    assert "Traceback" in done.stderr
    assert sung(done.stdout + done.stderr) == []


def test_secrets_in_logs_of_settings(tmp_path: Path) -> None:
    """Settings show no secret in any form, and neither does an error about them."""
    settings = config.load(
        Path("/dev/null"),
        {"postgres.dsn": f"host=x password={DSN}", "redis.url": f"redis://:{REDIS}@h", "web.token": TOKEN},
        environ={},
    )
    assert sung(f"{settings} {settings!r} {settings.postgres!r} {settings.redis!s} {settings.web!r}") == []
    for name, value in {
        "PMQD_POSTGRES__DSN": f"host=x pasword={DSN}",
        "PMQD_REDIS__URL": f"redis//:{REDIS}@h",
        "PMQD_WEB__TOKEN": f"{TOKEN} \n",
        "PMQD_WEB__TOKN": TOKEN,
        "PMQD_POSTGRES_DSN": DSN,
        "PMQD_POSTGRES": f"host=x password={DSN}",
    }.items():
        with pytest.raises(ConfigError) as caught:
            config.load(Path("/dev/null"), environ={name: value})
        assert sung(str(caught.value)) == [], name


def test_secrets_in_logs_of_connections(redis_url: str) -> None:
    """Whatever way a connection fails, its error names the place and not the password."""
    place = urlsplit(redis_url)
    for dsn in (
        f"host=/nonexistent password={DSN}",
        f"host=127.0.0.1 port=1 password={DSN}",
        f"host=127.0.0.1 port={place.port} password={DSN} connect_timeout=2",
        f"host=no-such-host.invalid user=me password={DSN}",
    ):
        store = Store(PostgresSettings(dsn=dsn), "test")
        with pytest.raises(PmqdError) as caught:
            store.list_queues()
        store.close()
        assert sung(f"{caught.value} {caught.value.__cause__}") == [], dsn
    for url in (
        f"redis://:{REDIS}@127.0.0.1:1/0",
        f"redis://me:{REDIS}@{place.hostname}:{place.port}/0",
        f"unix://me:{REDIS}@/nonexistent",
        f"redis://me:{REDIS}@no-such-host.invalid:6379/0",
    ):
        broker = Broker(RedisSettings(url=url), "test")
        with pytest.raises(BrokerUnavailable) as failed:
            broker.ping()
        broker.close()
        assert sung(f"{failed.value} {failed.value.__cause__} {broker!r}") == [], url
