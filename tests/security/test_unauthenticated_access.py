"""Who gets in without a token: nobody from elsewhere, and nobody to change anything."""

from pathlib import Path
from typing import Any

import psycopg
import pytest
from pydantic import ValidationError

from pmqd.config import Settings, is_loopback, load
from pmqd.errors import ConfigError
from tests.cli import pmqd
from tests.fix_daemon import MakeDaemon, free_port
from tests.history import enqueue
from tests.security.site import BEARER, TOKEN, open_site

OPEN = [
    "0.0.0.0",
    "[::]",
    "192.0.2.1",
    "[2001:db8::1]",
    "queue.example.org",
    "[::ffff:127.0.0.1]",
    "127.1",
    "0",
]
LOOPBACK = ["127.0.0.1", "[::1]", "localhost", "127.0.0.53"]


@pytest.mark.parametrize("host", OPEN)
def test_unauthenticated_access_beyond_loopback_needs_a_token(host: str) -> None:
    """An address that others reach is a fault of the configuration without a token, and sound with one."""
    listen = {"PMQD_CONFIG": "/dev/null", "PMQD_WEB__LISTEN": f"{host}:9640"}
    with pytest.raises(ConfigError, match=r"web\.token"):
        load(environ=listen)
    assert load(environ=listen | {"PMQD_WEB__TOKEN": TOKEN}).web.listen == f"{host}:9640"


def test_unauthenticated_access_by_everybody_is_exit_78(tmp_path: Path) -> None:
    """`pmqd run` on 0.0.0.0 without a token ends with 78 and one line, before it binds, forks or connects."""
    file = tmp_path / "pmqd.toml"
    file.write_text(f'state_dir = "{tmp_path}/state"\n[web]\nlisten = "0.0.0.0:{free_port()}"\n')
    done = pmqd(file, "run")
    assert done.returncode == 78
    assert "web.token" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("host", LOOPBACK)
def test_unauthenticated_access_on_loopback_is_the_default(host: str) -> None:
    """Loopback needs no token, and is what is listened on where nobody says otherwise."""
    assert is_loopback(host.strip("[]"))
    assert is_loopback(Settings().web.listen.rpartition(":")[0])


def test_unauthenticated_access_a_reload_does_not_open_it(daemon: MakeDaemon, wait_until: Any) -> None:
    """SIGHUP with an open address and no token is refused; the daemon listens on as before."""
    import signal

    running = daemon()
    open_ = {**running.settings, "web": {"listen": f"0.0.0.0:{free_port()}"}}
    running.write_config(open_)
    running.signal(signal.SIGHUP)
    wait_until(lambda: "reload refused" in running.log, 10, "the refusal")
    assert "web.token" in running.log
    assert running.get("/readyz").status_code == 200


def test_unauthenticated_access_open_pages_hold_nothing_of_jobs(
    daemon: MakeDaemon, connection: psycopg.Connection[Any], wait_until: Any
) -> None:
    """On an open address reading and changing need the token; health and metrics answer, without ids, payloads, errors."""
    running = daemon(
        {
            "web": {"listen": f"127.0.0.1:{free_port()}", "token": TOKEN},
            "workers": [{"app": "tests.applications.trial:app"}],
        }
    )
    job_id = enqueue(connection, "discarded", canary="p4yl04d")
    wait_until(
        lambda: connection.execute(
            "select 1 from pmqd.jobs where id = %s and status = 'failed'", [job_id]
        ).fetchone(),
        20,
        "the job has failed",
    )
    for path in ("/metrics", "/healthz", "/readyz"):
        page = running.get(path)
        assert page.status_code == 200
        for text in ("p4yl04d", "nobody wants this", str(job_id), TOKEN):
            assert text not in page.text, path


def test_unauthenticated_access_matrix(tmp_path: Path) -> None:
    """Loopback or not, token or not, request with none, wrong or right one: for each route what it answers."""
    reads = ["/api/v1/queue/list", "/api/v1/queue/q/jobs", f"/api/v1/queue/q/jobs/{'0' * 32}"]
    changes = ["/api/v1/queue/q/pause", "/api/v1/queue/q/resume", f"/api/v1/queue/q/jobs/{'0' * 32}/retry"]
    host = {"host": "127.0.0.1"}
    wrong = {"authorization": "Bearer wrong"}
    for number, (listen, token) in enumerate(
        [("127.0.0.1:9640", ""), ("127.0.0.1:9640", TOKEN), ("0.0.0.0:9640", TOKEN)]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        with open_site(folder, listen=listen, token=token) as site:
            for given, right in ((host, False), (host | wrong, False), (host | BEARER, bool(token))):
                for path in reads:
                    asked = site.send("GET", path, given).status_code
                    assert asked == (503 if right or "127" in listen else 401), (listen, path)
                for path in changes:
                    asked = site.send("POST", path, given).status_code
                    assert asked == (503 if right else 401 if token else 403), (listen, path)
            for path in ("/metrics", "/healthz", "/readyz"):
                assert site.send("GET", path, host).status_code in (200, 503)


def test_unauthenticated_access_a_token_is_a_token() -> None:
    """Blanks, control characters and other alphabets cannot be sent in a header, so they cannot be configured."""
    for token in (" ", "a b", "a\n", "\t", "é", "a\0", "x" * 257):
        with pytest.raises(ValidationError):
            Settings.model_validate({"web": {"token": token}})
    with pytest.raises(ConfigError):
        load(environ={"PMQD_WEB__LISTEN": "0.0.0.0:9640", "PMQD_WEB__TOKEN": ""})
    assert TOKEN not in repr(Settings.model_validate({"web": {"token": TOKEN}}))
