"""What people look at stays text: hostile names, payloads, results, errors and notes in every command and route.

There are no pages of HTML. The API answers JSON that browsers must not take for anything else; the commands print to
terminals, which obey escape sequences, and through rich, which obeys markup.
"""

import json
import os
import re
import unicodedata
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
import redis

from pmqd import cli
from pmqd.config import PostgresSettings
from pmqd.job import uuid7
from pmqd.store import Store
from tests.fix_daemon import free_port
from tests.security.site import BEARER, open_site

HTML = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "<svg><animate onbegin=alert(1) attributeName=x></svg>",
    "<iframe srcdoc='<script>alert(1)</script>'>",
    "<math><mtext></form><form><mglyph><style></math><img src onerror=alert(1)>",
    "<details open ontoggle=alert(1)>",
    "<body onload=alert(1)>",
    "<input autofocus onfocus=alert(1)>",
    "<a href='javascript:alert(1)'>x</a>",
    "<a href='data:text/html,<script>alert(1)</script>'>x</a>",
    "<meta http-equiv=refresh content='0;url=//evil.example'>",
    "<base href=//evil.example/>",
    "<link rel=stylesheet href=//evil.example/x.css>",
    "<style>@import '//evil.example/x.css';</style>",
    "<object data=//evil.example></object>",
    "<form action=//evil.example><button>x</button></form>",
    '" onmouseover="alert(1)',
    "' onmouseover='alert(1)",
    "`-alert(1)-`",
    "'-alert(1)-'",
    '\\";alert(1)//',
    "{{constructor.constructor('alert(1)')()}}",
    "${alert(1)}",
    "<%= alert(1) %>",
    "]]><script>alert(1)</script>",
    "<!--><script>alert(1)</script>-->",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "+ADw-script+AD4-alert(1)+ADw-/script+AD4-",
    "javascript:alert(1)",
    "jAvAsCrIpT&colon;alert(1)",
]  # fmt: skip
TERMINAL = [
    "\x1b[2J\x1b[H",
    "\x1b[31mred",
    "\x1b]0;title\x07",
    "\x1b]8;;https://evil.example\x1b\\link\x1b]8;;\x1b\\",
    "\x1b]52;c;ZXZpbA==\x07",
    '\x1bP$q"p\x1b\\',
    "\x1b[6n\x1b[c",
    "\x1b[?1049h",
    "\x1b[10000;1H",
    "\x9b31m",
    "\x9d0;title\x9c",
    "\x90x\x9c",
    "\x08\x08\x08ok",
    "\rfake line",
    "a\nfake: line",
    "\x07\x07",
    "\x0b\x0c",
    "\x7f",
    "\x85next",
    "\u2028line\u2029",
    "\u202egnp.exe",
    "\u2066hidden\u2069",
    "\u200binvisible\ufeff",
    "\ue000private\U000e0041tag",
]
MARKUP = [
    "[bold red]x[/]",
    "[/]",
    "[link=https://evil.example]x[/link]",
    "[@click=app.quit]x[/]",
    ":warning:",
    "\\[bold]x",
    "[blink reverse on red]x",
    "[not a style",
]
CORPUS = [*HTML, *TERMINAL, *MARKUP]
JOB = uuid7(1_700_000_000_000, 0, 7)
CODE = re.compile(r"\x1b\[[0-9;]*m")


def test_stored_xss_corpus_is_large() -> None:
    """Fifty at least, each once."""
    assert len(set(CORPUS)) == len(CORPUS) >= 50


@pytest.fixture
def planted(connection: psycopg.Connection[Any], database: str, redis_url: str) -> psycopg.Connection[Any]:
    """Every text of the corpus in each place that a producer, a handler or a foreign host can write to."""
    store = Store(PostgresSettings(dsn=database), "test")
    store.sync_queues({}, ["mails"])
    store.close()
    for text in CORPUS:
        connection.execute(
            "insert into pmqd.jobs (queue_name, kind, payload, tags, status, ready, failed_at, attempt_count,"
            " last_error_message, worker_id) values ('mails', %s, %s, %s, 'failed', false, now(), 3, %s, %s)",
            [text, json.dumps({text: [text]}), [text], text, text],
        )
    everything = "\n".join(CORPUS)
    connection.execute(
        "insert into pmqd.jobs (id, queue_name, kind, payload, tags, status, ready, started_at, attempt_count,"
        " last_error_message, worker_id, claim_token, result) values"
        " (%s, 'mails', %s, %s, %s, 'running', false, now(), 1, %s, %s, gen_random_uuid(), %s)",
        [JOB, everything, json.dumps(CORPUS), CORPUS, everything, CORPUS[0], json.dumps(CORPUS)],
    )
    for text in CORPUS:
        connection.execute(
            "insert into pmqd.job_logs (job_id, attempt_number, status, worker_id, log_message) values (%s, 1, 'retry', %s, %s)",
            [JOB, text, text],
        )
        connection.execute(
            "insert into pmqd.instances (id, host, pid, lease_tick, queues, kinds, pools)"
            " select gen_random_uuid(), %s, 1, tick, %s, %s, %s from pmqd.ticker",
            [
                text,
                [text],
                [text],
                json.dumps({text: {"queues": [text], "processes": 1, "concurrency": text}}),
            ],
        )
    with redis.Redis.from_url(redis_url) as client:
        client.hset(
            f"job:{JOB}", mapping={"status": everything, "note": everything, "progress": "\x1b[31m0.5"}
        )
    return connection


# --- the commands --------------------------------------------------------------------------------------------

COMMANDS = [
    ("jobs", "list"),
    ("jobs", "list", "--queue", "mails", "--status", "failed", "--limit", "100"),
    ("jobs", "show", str(JOB)),
    ("dead", "list", "--limit", "100"),
    ("queues", "list"),
    ("workers",),
    ("status",),
]


def steering(text: str) -> list[str]:
    """The characters in a text that a terminal obeys, or that hide what stands there."""
    return [
        letter
        for letter in text
        if letter != "\n" and unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    ]


@pytest.fixture
def config_file(database: str, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration for the stores, and a wide window."""
    for name in [
        name for name in os.environ if name.startswith("PMQD_") and not name.startswith("PMQD_TEST_")
    ]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "160")
    path = tmp_path / "pmqd.toml"
    path.write_text(
        f'[postgres]\ndsn = "{database}"\n[redis]\nurl = "{redis_url}"\n[web]\nlisten = "127.0.0.1:{free_port()}"\n'
    )
    return path


@pytest.mark.parametrize("colours", [False, True], ids=["piped", "terminal"])
def test_stored_xss_commands_print_text(
    planted: object,
    config_file: Path,
    colours: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Piped or on a terminal: nothing but colours steers it, and no markup is obeyed."""
    if colours:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.delenv("NO_COLOR", raising=False)
    printed = ""
    for words in COMMANDS:
        code = cli.main([*words, "--config", str(config_file)])
        out, said = capsys.readouterr()
        assert code in (0, 69), (words, said)
        assert steering(said) == [], words
        assert steering(CODE.sub("", out) if colours else out) == [], words
        printed += CODE.sub("", out)
    for text in ("[link=https://evil.example]x[/link]", "[bold red]x[/]", ":warning:", "\\[bold]x"):
        assert text in printed


def test_stored_xss_json_of_commands_steers_no_terminal(
    planted: object, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --json everything arrives whole, and is printed in letters that a terminal only shows."""
    for words in COMMANDS:
        assert cli.main([*words, "--json", "--config", str(config_file)]) in (0, 69)
        out, said = capsys.readouterr()
        assert steering(out) == [], words
        assert steering(said) == [], words
        read = json.loads(out)
        if words == ("jobs", "show", str(JOB)):
            assert read["payload"] == CORPUS
            assert {row["log_message"] for row in read["logs"]} == set(CORPUS)


@pytest.mark.parametrize("text", CORPUS, ids=range(len(CORPUS)))
def test_stored_xss_errors_of_commands_are_neutral(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Arguments come back in error messages: as text, in one line."""
    for words in (
        ["jobs", "show", text],
        ["jobs", "list", "--queue", text],
        ["jobs", "list", "--status", text],
        ["jobs", "list", f"--cursor={text}", "--set", "postgres.dsn=host=/nonexistent"],
        ["jobs", "list", "--set", f"{text}=1"],
        ["jobs", "list", "--set", f"log.level={text}"],
        ["jobs", "list", "--config", f"/nonexistent/{text}"],
        [text],
        ["jobs", "list", f"--{text}"],
    ):
        assert cli.main(words) not in (None, 0)
        out, said = capsys.readouterr()
        assert steering(said + out) == [], words


# --- the API -------------------------------------------------------------------------------------------------


def test_stored_xss_routes_answer_json_that_is_nothing_else(
    planted: psycopg.Connection[Any], database: str, redis_url: str, tmp_path: Path
) -> None:
    """Everything arrives whole as JSON that browsers must not sniff, and a page of it could load nothing."""
    seen = set()
    with open_site(tmp_path, database, redis_url) as site:
        for path in (
            "/api/v1/queue/list",
            "/api/v1/queue/mails/jobs?limit=100",
            "/api/v1/queue/mails/jobs?status=failed&limit=100",
            f"/api/v1/queue/mails/jobs/{JOB}",
            "/api/v1/queue/mails/jobs?status=%3Cscript%3E",
            "/api/v1/queue/mails/jobs?cursor=%3Cscript%3E",
            "/api/v1/queue/%3Cscript%3E/jobs",
            "/api/v1/queue/mails/jobs/%3Cscript%3E",
            "/%3Cscript%3E",
        ):
            answer = site.send("GET", path, {"host": "localhost"} | BEARER)
            assert answer.headers["content-type"] == "application/json"
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "default-src 'none'; frame-ancestors 'none'" in answer.headers.get_list(
                "content-security-policy"
            )
            seen.add(answer.status_code)
            answer.json()
        job = site.send("GET", f"/api/v1/queue/mails/jobs/{JOB}", {"host": "localhost"}).json()
        assert job["payload"] == CORPUS
        assert job["id"] == str(UUID(str(JOB)))
        pages = [
            site.send("GET", path, {"host": "localhost"}).text for path in ("/metrics", "/healthz", "/readyz")
        ]
    assert seen == {200, 400, 404}
    assert not [text for text in HTML for page in pages if text in page]
