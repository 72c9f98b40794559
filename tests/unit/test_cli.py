"""The commands' help, and that every bad input is one clear line, the documented exit code, and no traceback."""

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from uuid import UUID

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pmqd import cli, cli_common, cli_enqueue, config, master, render
from pmqd.errors import UsageError

ID = "0198c0de-0000-7000-8000-000000000001"
NOW = datetime(2026, 1, 31, 8, tzinfo=UTC)
AWAY = ["--set", "postgres.dsn=host=/nonexistent dbname=pmqd", "--set", "redis.url=unix:///nonexistent/redis"]


@pytest.fixture(autouse=True)
def no_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither this machine's files nor its variables reach a test; tmp_path is the working directory."""
    monkeypatch.setattr(config, "SYSTEM_FILE", tmp_path / "etc.toml")
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("PMQD_", "PG"))]:
        monkeypatch.delenv(name)


def commands() -> Iterator[tuple[str, ...]]:
    """The words of every command, as the program itself knows them."""

    def walk(command: object, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        inner = getattr(command, "commands", None)
        if inner is None:
            yield words
            return
        for name, each in inner.items():
            yield from walk(each, (*words, name))

    yield from walk(typer.main.get_command(cli.app), ())


ALL = sorted(commands())
DESIGNED = [
    ("run",), ("dev",), ("demo",), ("check",), ("schema", "apply"), ("schema", "check"), ("enqueue",),
    ("jobs", "list"), ("jobs", "show"), ("jobs", "retry"), ("jobs", "cancel"), ("jobs", "wait"),
    ("queues", "list"), ("queues", "pause"), ("queues", "resume"), ("dead", "list"), ("dead", "replay"),
    ("workers",), ("status",), ("top",), ("doctor",), ("bench",),
]  # fmt: skip
READING = [
    ("check",), ("schema", "check"), ("jobs", "list"), ("jobs", "show"), ("jobs", "wait"), ("queues", "list"),
    ("dead", "list"), ("workers",), ("status",), ("top",), ("doctor",), ("bench",),
]  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, in this process."""
    code = cli.main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    """The one line that a command says when it refuses; nothing is on stdout."""
    found, out, err = run(capsys, *words)
    assert (found, out) == (code, ""), err
    assert "Traceback" not in err
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1, err
    assert err.startswith("pmqd: ")
    return err


def test_every_command_of_the_design_is_there_and_no_other() -> None:
    """The commands are those of the contract: nobody's script breaks, and nothing is half there."""
    assert sorted(DESIGNED) == ALL


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_command_has_help(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` works for each command, on stdout, says what it does, and every option and argument is explained."""
    code, out, err = run(capsys, *words, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: pmqd {' '.join(words)}")
    command = typer.main.get_command(cli.app)
    for word in words:
        command = command.commands[word]  # type: ignore[attr-defined]  # groups have them
    assert command.help
    for parameter in command.params:
        assert parameter.name == "help" or getattr(parameter, "help", None), parameter.name


@pytest.mark.parametrize("words", READING, ids=" ".join)
def test_every_reading_command_takes_json(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """`--json` is an option of every command that reads."""
    assert "--json" in run(capsys, *words, "--help")[1]


@pytest.mark.parametrize("words", [(), ("jobs",), ("queues",), ("dead",), ("schema",)], ids=" ".join)
def test_a_group_alone_shows_its_help_and_is_a_usage_error(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a command there is help on stderr and exit code 2, so a script notices."""
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith("Usage: pmqd")


def test_the_version_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    """`pmqd --version` names the program and its version."""
    assert run(capsys, "--version")[1].startswith("pmqd 0.")


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_an_unknown_option_is_one_line(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Every command refuses an option that it does not have, names it, and says where help is."""
    err = refused(capsys, *words, "--nonsense")
    assert "--nonsense" in err
    assert f"see pmqd {' '.join(words)} --help" in err


@pytest.mark.parametrize("words", [w for w in ALL if w not in (("dev",), ("demo",))], ids=" ".join)
def test_a_missing_configuration_file_is_one_line_and_78(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command that reads settings names the file that is not there, and ends with the code for configuration."""
    arguments = {
        ("enqueue",): ["mails"], ("jobs", "show"): [ID], ("jobs", "retry"): [ID], ("jobs", "cancel"): [ID],
        ("jobs", "wait"): [ID], ("queues", "pause"): ["mails"], ("queues", "resume"): ["mails"],
        ("dead", "replay"): ["--all"],
    }.get(words, [])  # fmt: skip
    err = refused(capsys, *words, *arguments, "--config", "gone.toml", code=78)
    assert "gone.toml" in err
    assert "gone.toml" in refused(capsys, "--config", "gone.toml", *words, *arguments, code=78)


BAD = [
    (["jobs", "list", "--limit", "0"], ["--limit '0'", "1 to 1000"]),
    (["jobs", "list", "--limit", "many"], ["--limit 'many'", "1 to 1000"]),
    (["jobs", "list", "--status", "odd"], ["--status 'odd'", "migrated_to_redis"]),
    (["jobs", "list", "--queue", "a b"], ["'a b'", "letters"]),
    (["jobs", "list", "extra"], ["extra"]),
    (["jobs", "lst"], ["'lst'"]),
    (["jobs", "show"], ["'ID'"]),
    (["jobs", "show", "7"], ["'7'", "UUID"]),
    (["jobs", "retry", ID, "x"], ["'x'", "UUID"]),
    (["jobs", "cancel", ""], ["''", "UUID"]),
    (["jobs", "wait", ID, "--timeout", "soon"], ["--timeout 'soon'", "90s"]),
    (["jobs", "wait", ID, "--timeout", "-1s"], ["--timeout '-1s'"]),
    (["queues", "pause", "mails:high"], ["'mails:high'", ":high"]),
    (["queues", "resume", "é"], ["'é'"]),
    (["queues", "pause"], ["'QUEUE…'"]),
    (["dead", "replay"], ["--queue", "--all"]),
    (["dead", "replay", "--since", "yesterday"], ["--since 'yesterday'", "2026-01-31T08:00:00Z"]),
    (["dead", "replay", "--since", "2026-01-31T08:00:00"], ["offset"]),
    (["dead", "replay", "--all", "--limit", "-5"], ["--limit '-5'"]),
    (["dead", "list", "--limit", "1001"], ["--limit '1001'", "1000"]),
    (["enqueue"], ["QUEUE"]),
    (["enqueue", ""], ["QUEUE"]),
    (["enqueue", "no queue"], ["'no queue'"]),
    (["enqueue", "mails", "{"], ["'{'", "JSON"]),
    (["enqueue", "mails", "{}", "--priority", "0"], ["--priority '0'", "32767"]),
    (["enqueue", "mails", "{}", "--priority", "1.5"], ["--priority '1.5'"]),
    (["enqueue", "mails", "{}", "--max-attempts", "0"], ["--max-attempts '0'"]),
    (["enqueue", "mails", "{}", "--run-at", "later"], ["--run-at 'later'", "+10m"]),
    (["enqueue", "mails", "{}", "--run-at", "+"], ["--run-at '+'"]),
    (["enqueue", "mails", "{}", "--id", "1"], ["--id '1'", "UUID"]),
    (["enqueue", "mails", '"' + "x" * 300_000 + '"'], ["256 KiB"]),
    (["enqueue", "mails", "--file", "gone.jsonl"], ["gone.jsonl", "No such file"]),
    (["enqueue", "mails", "{}", "--file", "gone.jsonl"], ["PAYLOAD"]),
    (["top", "--interval", "often"], ["--interval 'often'"]),
    (["top", "--looks", "x"], ["--looks 'x'"]),
    (["bench", "--jobs", "0"], ["--jobs '0'"]),
    (["bench", "--processes", "many"], ["--processes 'many'"]),
    (["dev"], ["'--app'"]),
    (["status", "--set", "nonsense"], ["'nonsense'", "SETTING=VALUE"]),
    (["chek"], ["'chek'", "Did you mean 'check', 'schema'? See pmqd --help"]),
]


@pytest.mark.parametrize(("words", "said"), BAD, ids=[" ".join(words)[:50] for words, _ in BAD])
def test_bad_input_is_one_line_that_names_it(
    words: list[str], said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A bad argument is a usage error whose one line holds what was given and what is allowed."""
    err = refused(capsys, *words)
    for text in said:
        assert text in err
    assert len(err) < 600


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("migrator.batch_size=none", ["none", "10000"]),
        ("migrator.batchsize=1", ["--set migrator.batchsize: ", "BATCH_SIZE"]),
        ("workers.mail.processes=0", ["--set workers.mail.processes = 0", "1 to 512"]),
        ("nonsense=1", ["--set nonsense: "]),
        ("web.listen=0.0.0.0:9640", ["web.token"]),
        ("redis.item=half", ["--set redis.item = 'half'", "full"]),
    ],
)
def test_a_bad_setting_ends_with_78(
    assignment: str, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A setting on the command line is judged like any other: value, what is allowed, exit code 78."""
    code, out, err = run(capsys, "check", "--set", "workers.mail.app=a:b", "--set", assignment)
    assert (code, out) == (78, "")
    assert "Traceback" not in err
    for text in said:
        assert text in err


def test_an_application_without_an_attribute_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """`dev --app greetings` is told that the attribute is missing, and not that the module is."""
    (tmp_path / "greetings.py").write_text("")
    err = refused(capsys, "dev", "--app", "greetings", code=78)
    for text in ("'greetings'", "names no attribute", "module:attribute"):
        assert text in err


def test_check_says_what_is_valid_and_warns(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """`check` needs no store: the verdict is on stdout, warnings are on stderr, and `--json` has both."""
    file = tmp_path / "good.toml"
    file.write_text('drain_seconds = 600\n[[workers]]\nname = "mail"\napp = "a.b:app"\n')
    code, out, err = run(capsys, "check", "--config", str(file))
    assert code == 0
    assert out.startswith(f"{file}: valid, ")
    assert "drain_seconds" in err
    code, out, _ = run(capsys, "check", "--config", str(file), "--json")
    assert json.loads(out)["valid"] is True
    assert any("drain_seconds" in text for text in json.loads(out)["warnings"])
    file.write_text("drain_seconds = -1\n")
    code, out, err = run(capsys, "check", "--config", str(file), "--json")
    found = json.loads(out)
    assert (code, found["valid"], len(found["errors"])) == (78, False, 1)
    assert err == f"pmqd: {found['errors'][0]}\n"


def test_a_setting_of_the_command_line_is_over_environment_and_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """File, over it the environment, over it `--set`; names of pools keep their case, queues their dots."""
    file = tmp_path / "some.toml"
    file.write_text('[redis]\nprefix = "file:"\nitem = "full"\n[[workers]]\nname = "Mail"\napp = "a:b"\n')
    monkeypatch.setenv("PMQD_REDIS__PREFIX", "env:")
    assert cli_common.load_settings(file).redis.prefix == "env:"
    assigned = ["redis.prefix=set:", "workers.Mail.processes=7", "queues.a.b-c.max_attempts=9"]
    found = cli_common.load_settings(file, assigned)
    assert found.redis.prefix == "set:"
    assert found.redis.item == "full"
    assert found.workers[0].processes == 7
    assert found.queues["a.b-c"].max_attempts == 9


STORE_COMMANDS = [
    ["jobs", "list"], ["jobs", "show", ID], ["jobs", "retry", ID], ["jobs", "cancel", ID], ["jobs", "wait", ID],
    ["queues", "list"], ["queues", "pause", "mails"], ["queues", "resume", "mails"], ["dead", "list"],
    ["dead", "replay", "--all"], ["workers"], ["enqueue", "mails", "{}"], ["schema", "apply"], ["schema", "check"],
]  # fmt: skip


@pytest.mark.parametrize("words", STORE_COMMANDS, ids=[" ".join(words) for words in STORE_COMMANDS])
def test_a_store_that_is_away_is_one_line_and_69(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command that needs PostgreSQL says in one line where it looked, and ends with 69."""
    assert "nonexistent" in refused(capsys, *words, *AWAY, code=69)


@pytest.mark.parametrize("command", ["status", "top"])
def test_the_overview_shows_that_both_stores_are_away(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`status` and `top` show what they can and end with 69."""
    code, out, err = run(capsys, command, "--json", *AWAY)
    seen = json.loads(out)
    assert (code, err) == (69, "")
    assert (seen["postgres"]["up"], seen["redis"]["up"]) == (False, False)
    code, out, err = run(capsys, command, *AWAY)
    assert (code, err) == (69, "")
    assert "down" in out
    assert "not known while PostgreSQL is away" in out
    assert "no daemon runs" not in out


def test_doctor_says_that_both_stores_are_away(capsys: pytest.CaptureFixture[str]) -> None:
    """`doctor` reports unreachable servers as findings with what to do, and ends with 69."""
    code, out, err = run(capsys, "doctor", "--json", *AWAY)
    assert (code, err) == (69, "")
    away = [finding for finding in json.loads(out) if finding["level"] == "unreachable"]
    assert [finding["what"] for finding in away] == ["PostgreSQL", "Redis"]
    assert all(finding["do"] for finding in away)


def test_no_password_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither an error nor doctor's table shows the password of a connection string."""
    secret = [
        "--set",
        "postgres.dsn=postgresql://me:hunter2@127.0.0.1:1/x",
        "--set",
        "redis.url=redis://:hunter2@127.0.0.1:1/0",
    ]
    for words in (
        ["jobs", "list"],
        ["doctor"],
        ["doctor", "--json"],
        ["status"],
        ["enqueue", "mails"],
        ["schema", "check"],
    ):
        code, out, err = run(capsys, *words, *secret)
        assert code == 69, words
        assert "hunter2" not in out + err, words


def test_an_unexpected_error_is_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug shows its type in one line, and the traceback only with --debug."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("odd")

    monkeypatch.setattr(config, "load", broken)
    assert "RuntimeError: odd" in refused(capsys, "check", code=1)
    assert "Traceback" in run(capsys, "--debug", "check")[2]


def test_the_program_starts_as_a_module_and_loads_no_store_for_help() -> None:
    """`python -m pmqd` is `pmqd`, and neither store nor broker is loaded where none is needed (the master must not)."""
    code = (
        "import sys; from pmqd import cli; cli.main(['--version']);"
        "sys.exit(bool({'pmqd.store', 'pmqd.broker', 'redis', 'starlette'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    done = subprocess.run(
        [sys.executable, "-m", "pmqd", "nonsense"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("pmqd: ")


# --- enqueue --file ------------------------------------------------------------------------------------------

GOOD_LINE = '{"payload": {"n": 1}}'
BAD_LINES = [
    ("{", "not JSON"),
    ("[]", "object"),
    ("{}", "payload"),
    ('{"payload": 1, "color": "red"}', "'color'"),
    ('{"payload": 1, "priority": 0}', "priority 0"),
    ('{"payload": 1, "priority": true}', "priority True"),
    ('{"payload": 1, "max_attempts": "3"}', "max_attempts '3'"),
    ('{"payload": 1, "run_at": "noon"}', "run_at 'noon'"),
    ('{"payload": 1, "run_at": 5}', "run_at 5"),
    ('{"payload": 1, "tags": "a"}', "tags 'a'"),
    ('{"payload": 1, "tags": [1]}', "tags [1]"),
    ('{"payload": 1, "id": "x"}', "'x'"),
    ('{"payload": 1, "kind": 5}', "kind 5"),
    ('{"payload": 1, "queue_name": "a b"}', "'a b'"),
    ('{"payload": "\\u0000"}', "payload"),
    ('{"payload": "' + "x" * 300_000 + '"}', "payload"),
]


@pytest.mark.parametrize(("line", "said"), BAD_LINES, ids=[line[:40] for line, _ in BAD_LINES])
def test_a_bad_line_is_named_by_its_number(
    line: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One bad line refuses the whole file before a store is asked; the number counts empty lines as editors do."""
    file = tmp_path / "jobs.jsonl"
    file.write_text(f"{GOOD_LINE}\n\n{GOOD_LINE}\n{line}\n{GOOD_LINE}\n")
    err = refused(capsys, "enqueue", "mails", "--file", str(file), *AWAY)
    assert "line 4: " in err
    assert said in err
    assert "nothing was written" in err
    assert len(err) < 600


def test_a_line_without_any_queue_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The queue is in the line or on the command line."""
    file = tmp_path / "jobs.jsonl"
    file.write_text(GOOD_LINE)
    assert "queue_name" in refused(capsys, "enqueue", "--file", str(file))


def test_an_empty_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file without jobs is a mistake, not a success."""
    file = tmp_path / "jobs.jsonl"
    file.write_text("\n\n")
    assert "no job" in refused(capsys, "enqueue", "mails", "--file", str(file))


def test_a_line_is_over_the_options_of_the_command_line() -> None:
    """What a line says counts; what it leaves out comes from the command line."""
    defaults = cli_enqueue.Entry("mails", None, "send", 7, NOW, 4, ("a",))
    plain = cli_enqueue.line_entry(b'{"payload": [1]}', defaults)
    assert plain == cli_enqueue.Entry("mails", [1], "send", 7, NOW, 4, ("a",))
    line: dict[str, object] = {"payload": None, "queue_name": "q", "kind": "k", "priority": 1, "run_at": "2026-02-01T00:00:00Z",
            "max_attempts": 1, "tags": [], "id": ID}  # fmt: skip
    own = cli_enqueue.line_entry(json.dumps(line).encode(), defaults)
    assert own == cli_enqueue.Entry("q", None, "k", 1, datetime(2026, 2, 1, tzinfo=UTC), 1, (), UUID(ID))


# --- reading and writing values ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"), [("250ms", 0.25), ("90s", 90), ("10m", 600), ("2h", 7200), ("1.5d", 129600)]
)
def test_spans(text: str, seconds: float) -> None:
    """Spans are numbers with a unit."""
    assert cli_common.read_span(text, "x") == seconds
    assert cli_common.read_time(f"+{text}", "x", NOW) == NOW + timedelta(seconds=seconds)
    assert cli_common.read_time(f"-{text}", "x", NOW) == NOW - timedelta(seconds=seconds)


@given(st.text(max_size=30))
def test_any_text_is_a_time_or_a_usage_error(text: str) -> None:
    """No text makes the reading of times, spans, ids or queue names fail in another way."""
    for read in (
        lambda: cli_common.read_time(text, "x", NOW),
        lambda: cli_common.read_span(text, "x"),
        lambda: cli_common.read_uuid(text),
        lambda: cli_common.read_queue(text),
        lambda: cli_common.whole("x", 1, 5)(text),
    ):
        with contextlib.suppress(UsageError):
            read()


def test_json_has_rfc_3339_times_in_utc() -> None:
    """Times are written in UTC with Z, ids and decimals as texts, payload bytes as the JSON that they are."""
    here = datetime.fromisoformat("2026-01-31T10:00:00.5+02:00")
    value = {
        "at": here,
        "id": UUID(ID),
        "n": Decimal("1.5"),
        "payload": b'{"a":1}',
        "span": timedelta(seconds=2),
    }
    assert json.loads(cli_common.to_json(value)) == {
        "at": "2026-01-31T08:00:00.500000Z", "id": ID, "n": "1.5", "payload": {"a": 1}, "span": 2.0,
    }  # fmt: skip


def test_a_row_gets_its_display_status() -> None:
    """A queued job between two attempts is shown as waiting for its retry; its status stays what it is."""
    row = {"status": "queued", "attempt_count": 1, "run_at": NOW + timedelta(seconds=5)}
    shown = cli_common.with_display_status(row, NOW)
    assert (shown["status"], shown["display_status"]) == ("queued", "retry_scheduled")


# --- tables --------------------------------------------------------------------------------------------------


def drawn(renderable: object, width: int = 100) -> str:
    """What a person sees."""
    out = Console(width=width, file=io.StringIO(), highlight=False)
    out.print(renderable)
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def test_a_worker_with_many_claims_is_one_line() -> None:
    """A worker that claims a hundred quick jobs ahead does not fill the screen; the number is there."""
    held = [
        {"id": ID, "queue_name": "mails", "kind": "send", "worker_id": "here:x:w1.1", "started_at": NOW}
        for _ in range(100)
    ]
    row = {
        "id": ID, "host": "here", "pid": 7, "started_at": NOW, "queues": ["mails"], "jobs": held,
        "pools": {"mail": {"processes": 2, "concurrency": 10}},
    }  # fmt: skip
    text = drawn(render.workers([row], NOW), 160)
    assert text.count("here:x:w1.1") == 1
    assert "mail 2 x 10" in text
    assert text.count("100") == 2


def test_what_comes_from_outside_is_shown_as_text() -> None:
    """Markup and control characters in a queue's or error's text neither colour nor move anything."""
    row = {
        "id": ID, "queue_name": "q", "kind": "[red]k[/red]", "display_status": "failed", "priority": 1,
        "attempt_count": 3, "max_attempts": 3, "run_at": NOW, "last_error_message": "\x1b[2Jgone [bold]x\nsecond",
    }  # fmt: skip
    text = drawn(render.jobs([row], NOW), 200)
    assert "[red]k[/red]" in text
    assert "\\x1b[2Jgone [bold]x" in text
    assert "\x1b" not in text
    assert "second" not in text


LONG = "analytics.daily:rollup-of-campaign-statistics-of-all-tenants"


def of_a_job(**given: object) -> dict[str, object]:
    """A job's row, with its display status."""
    row = {
        "id": ID, "queue_name": LONG, "kind": "send_campaign_mail", "status": "failed", "priority": 100,
        "payload": {"name": "Ada", "new": True}, "attempt_count": 3, "max_attempts": 3, "run_at": NOW,
        "failed_at": NOW - timedelta(seconds=12), "claim_token": ID, "cancel_requested": False, "tags": ["a", "b"],
        "last_error_message": f"Error: {'the mail server said no ' * 20}\nTraceback", "result": None,
    }  # fmt: skip
    return {**row, **given, "display_status": given.get("status", "failed")}


@pytest.mark.parametrize("width", [80, 120])
def test_a_list_of_jobs_fits_a_terminal(width: int) -> None:
    """Two lines a job: id, status, numbers and time are whole; queue, kind and error have the second line to themselves."""
    lines = [line.rstrip() for line in drawn(render.jobs([of_a_job(), of_a_job()], NOW), width).splitlines()]
    assert len(lines) == 2 + 2 * 2
    assert max(map(len, lines)) <= width
    assert lines[2].split() == [ID, "failed", "100", "3/3", "12", "s", "ago"]
    assert lines[3].startswith(f"    {LONG}")
    assert lines[3].endswith("…")


def test_a_list_of_jobs_that_is_piped_has_a_line_a_job(capsys: pytest.CaptureFixture[str]) -> None:
    """`pmqd jobs list | grep` finds id, queue and error in one line, without spaces at its end."""
    cli_common.print_table(render.jobs([of_a_job()], NOW))
    _, _, line = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{ID}  {LONG}  send_campaign_mail  failed")
    assert line == line.rstrip()


def test_a_job_is_shown_with_its_json_and_without_what_is_nothing() -> None:
    """Payload and result are the JSON that they are; null, false and the claim's token are left out; progress is said."""
    row = of_a_job(status="running", live={"progress": "0.5", "note": "thinking"}, result={"at": None})
    text = drawn(render.job(row, NOW), 80)
    assert '{"name": "Ada", "new": true}' in text
    assert '{"at": null}' in text
    assert "progress 50 %, thinking" in text
    assert "a, b" in text
    assert "claim_token" not in text
    assert "cancel_requested" not in text
    assert text.count("status") == 1


def test_the_log_of_a_job_fits_a_terminal() -> None:
    """One line an attempt, beneath it who ran it and what it said: nothing is broken at 80 columns."""
    log = {
        "attempt_number": 1, "status": "retry", "started": NOW, "duration": 0.0012,
        "worker_id": "mail-1.example.org:ef4a37cf:w10.123", "log_message": "Error: gone\nTraceback",
    }  # fmt: skip
    *_, line, message = drawn(render.job(of_a_job(logs=[log]), NOW), 80).splitlines()
    assert line.split() == ["1", "retry", "2026-01-31", "08:00:00Z", "1.2", "ms"]
    assert message.rstrip() == f"    {log['worker_id']}: Error: gone"


@pytest.mark.parametrize("width", [80, 120])
def test_queues_fit_a_terminal_and_say_why_they_wait(width: int) -> None:
    """The figures stand on one line each; a reason is a sentence beneath the table, not a column of syllables."""
    numbers = {"ready": 1_234_567, "scheduled": 5, "in_redis": None, "running": 2, "failed": 0}
    rows: list[dict[str, object]] = [
        {
            "name": "mails",
            "oldest_ready_seconds": 75.0,
            "reason": "paused: pmqd queues resume mails",
            **numbers,
        },
        {"name": LONG, "oldest_ready_seconds": 0.0, "reason": None, **numbers},
    ]
    text = drawn(render.queues(rows), width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert ["mails", "75", "s", "1,234,567", "5", "-", "2", "0"] in [
        line.split() for line in text.splitlines()
    ]
    assert "mails  paused: pmqd queues resume mails" in text
    assert "done/s" not in text
    assert "done/s" in drawn(render.queues([{**rows[0], "completed_per_second": 2.5}]), width)


def test_a_finding_shows_what_mends_it_beneath() -> None:
    """At 80 columns the statement that mends something is not broken into a narrow column."""
    do = "alter system set fsync = on; select 1;"
    text = drawn(
        render.findings([("wrong", "default_transaction_isolation", "off: " + "word " * 30, do)]), 80
    )
    assert f"→ {do}" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0.0, "0.00 s"),
        (0.0012, "1.2 ms"),
        (0.25, "0.25 s"),
        (12, "12 s"),
        (300, "5 min"),
        (9000, "2.5 h"),
        (600_000, "7 d"),
    ],
)
def test_spans_for_people(seconds: float | None, text: str) -> None:
    """Spans are said in the unit that fits."""
    assert render.seconds_text(seconds) == text


def test_the_settings_of_the_command_line_reach_the_master_and_its_reloads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`run --set` is in force at the start, and in the environment where a reload and the children find it."""
    given: list[tuple[config.Settings, Path | None]] = []

    def run(settings: config.Settings, file: Path | None) -> int:
        given.append((settings, file))
        return 0

    monkeypatch.setattr(master, "run", run)
    monkeypatch.setenv("PMQD_DRAIN_SECONDS", "3")
    (tmp_path / "some.toml").write_text("")
    assert cli.main(["run", "--config", "some.toml", "--set", "drain_seconds=9"]) == 0
    [(settings, file)] = given
    assert (settings.drain_seconds, file) == (9.0, tmp_path / "some.toml")
    assert config.load(file).drain_seconds == 9.0
