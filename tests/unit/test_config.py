"""Settings: where they come from, and that every bad one is one clear line."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

from pmqd import config
from pmqd.config import PoolSettings, Settings, load, masked, producer_settings, warnings
from pmqd.errors import ConfigError, ExitCode
from pmqd.settings import default_state_dir, split_listen

POOL = '[[workers]]\nname = "mail"\napp = "a.b:app"\n'


@pytest.fixture(autouse=True)
def no_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither this machine's files nor its variables reach a test."""
    monkeypatch.setattr(config, "SYSTEM_FILE", tmp_path / "etc.toml")
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("PMQD_")]:
        monkeypatch.delenv(name)


def write(text: str, name: str = "given.toml") -> Path:
    """A configuration file in the test's folder."""
    path = Path(name)
    path.write_text(text)
    return path


def faults(
    text: str = "", environ: dict[str, str] | None = None, overrides: dict[str, Any] | None = None
) -> list[str]:
    """The lines of the error that these settings cause."""
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load(path, overrides, environ=environ or {})
    assert caught.value.exit_code == ExitCode.CONFIG
    return str(caught.value).replace("given.toml: ", "").split("\n")


# --- where settings come from


def test_defaults_need_no_file() -> None:
    """Without a file and variables everything has its default."""
    settings = load(environ={})
    assert settings.postgres.schema_name == "pmqd"
    assert settings.redis.url == "redis://127.0.0.1:6379/0"
    assert not settings.redis.configured
    assert settings.workers == []
    assert settings.web.listen == "127.0.0.1:9640"


def test_command_line_over_environment_over_file() -> None:
    """Each source wins over the one below it, setting by setting."""
    path = write('[log]\nlevel = "error"\nformat = "json"\n[migrator]\nbatch_size = 7\n')
    environ = {"PMQD_LOG__LEVEL": "warning", "PMQD_MIGRATOR__POLL_SECONDS": "1.5"}
    settings = load(
        path, {"log.level": "debug", "web": {"listen": "127.0.0.1:1"}, "redis.url": None}, environ=environ
    )
    assert (settings.log.level, settings.log.format) == ("debug", "json")
    assert (settings.migrator.batch_size, settings.migrator.poll_seconds) == (7, 1.5)
    assert settings.web.listen == "127.0.0.1:1"
    assert not settings.redis.configured
    assert load(path, environ=environ).log.level == "warning"


def test_which_file_is_read() -> None:
    """The argument, else PMQD_CONFIG, else the system's file, else ./pmqd.toml."""
    write("drain_seconds = 1", "pmqd.toml")
    assert load(environ={}).drain_seconds == 1
    config.SYSTEM_FILE.write_text("drain_seconds = 2")
    assert load(environ={}).drain_seconds == 2
    named = write("drain_seconds = 3", "named.toml")
    assert load(environ={"PMQD_CONFIG": str(named)}).drain_seconds == 3
    assert load(write("drain_seconds = 4"), environ={"PMQD_CONFIG": str(named)}).drain_seconds == 4
    assert config.find_file(environ={}) == config.SYSTEM_FILE


def test_pools_by_name_in_the_environment() -> None:
    """A variable changes the pool of that name, whatever its capitals; a new name is a new pool."""
    environ = {
        "PMQD_WORKERS__mail__PROCESSES": "5",
        "PMQD_WORKERS__MAIL__QUEUES": "email-sending, bounce:process",
        "PMQD_WORKERS__other__APP": "c:app",
        "PMQD_WORKERS__other__QUEUES": '["x"]',
    }
    mail, other = load(write(POOL), environ=environ).workers
    assert (mail.name, mail.processes, mail.queues) == ("mail", 5, ["email-sending", "bounce:process"])
    assert (other.name, other.app, other.queues) == ("other", "c:app", ["x"])


def test_queues_by_name_in_the_environment() -> None:
    """A queue that the file knows is found by a name that a shell can write; any other is taken as it stands."""
    path = write('[queues."email-sending"]\nmax_attempts = 5\n')
    environ = {
        "PMQD_QUEUES__EMAIL_SENDING__TIMEOUT_SECONDS": "30",
        "PMQD_QUEUES__bounce:process__MAX_ATTEMPTS": "2",
    }
    queues = load(path, environ=environ).queues
    assert (queues["email-sending"].max_attempts, queues["email-sending"].timeout_seconds) == (5, 30)
    assert queues["bounce:process"].max_attempts == 2


def test_pools_by_name_on_the_command_line() -> None:
    """A dotted name reaches one pool's setting."""
    assert load(write(POOL), {"workers.mail.concurrency": 3}, environ={}).workers[0].concurrency == 3


def test_variables_that_are_no_settings_are_left_alone() -> None:
    """Other programs' variables, the tests' own, and the file's name are no settings."""
    load(environ={"PATH": "/bin", "PMQD_TEST_POSTGRES": "path", "PMQD_CRASHPOINT": "x=kill", "PMQ": "1"})


def test_a_producer_needs_an_address_only() -> None:
    """What concerns the daemon is neither read nor checked for a program that only enqueues."""
    write('[web]\nlisten = "0.0.0.0:1"\n[[workers]]\nname = 3\n[queues.q]\nmax_attempts = 4\n', "pmqd.toml")
    settings = producer_settings(environ={"PMQD_POSTGRES__DSN": "host=db", "PMQD_LOG__LEVEL": "bad"})
    assert settings.postgres.dsn == "host=db"
    assert settings.queues["q"].max_attempts == 4
    assert settings.workers == []
    with pytest.raises(ConfigError, match="PMQD_POSTGRES__SCHEMA"):
        producer_settings(environ={"PMQD_POSTGRES__SCHEMA": "No!"})


def test_state_dir_without_a_setting() -> None:
    """Systemd's folder, else the user's runtime folder, else one in the temporary folder with the user's number."""
    assert default_state_dir({"RUNTIME_DIRECTORY": "/run/a:/run/b", "XDG_RUNTIME_DIR": "/x"}) == Path(
        "/run/a"
    )
    assert default_state_dir({"XDG_RUNTIME_DIR": "/run/user/5"}) == Path("/run/user/5/pmqd")
    assert default_state_dir({}).name == f"pmqd-{os.geteuid()}"
    assert load(write('state_dir = "x"'), environ={}).state_dir == Path.cwd() / "x"


def test_settings_are_frozen_and_show_no_secret() -> None:
    """A running daemon's settings do not change, and their text holds no password."""
    settings = load(overrides={"postgres.dsn": "postgresql://u:s3cret@h/d", "web.token": "t0ken"}, environ={})
    with pytest.raises(ValueError, match="frozen"):
        settings.drain_seconds = 3  # type: ignore[misc]
    assert "s3cret" not in repr(settings)
    assert "t0ken" not in repr(settings)


# --- what is wrong

BAD = [
    ("drain_seconds = -1", "drain_seconds = -1: allowed is a number from 0 to 86400"),
    ('drain_seconds = "30"', "drain_seconds = '30': allowed is a number from 0 to 86400"),
    ("drain_seconds = inf", "drain_seconds = inf: allowed is a number from 0 to 86400"),
    ("drain_seconds = true", "drain_seconds = true: allowed is a number from 0 to 86400"),
    ("state_dir = 3", "state_dir = 3: allowed is the path of a folder"),
    ('state_dir = ""', "state_dir = '': allowed is the path of a folder"),
    ('statedir = "x"', "statedir: there is no such setting; did you mean state_dir?"),
    ("[postgresql]\ndsn = 'x'", "postgresql: there is no such setting; did you mean postgres?"),
    (
        "[postgres]\npasword = 's3cret'",
        "postgres.pasword: there is no such setting; allowed are dsn, direct_dsn, standby, schema,",
    ),
    ("[postgres]\nschemma = 'x'", "postgres.schemma: there is no such setting; did you mean schema?"),
    ("[postgres]\nschema = 'pg_x'", "postgres.schema = 'pg_x': allowed is 1 to 40 of a-z"),
    ("[postgres]\nschema = 'x\"y'", "postgres.schema = 'x\"y': allowed is 1 to 40 of a-z"),
    (
        "[postgres]\ndsn = 'nonsense s3cret'",
        "postgres.dsn = '***': allowed is a PostgreSQL connection string",
    ),
    (
        "[postgres]\ndsn = 'postgresql://u:s3cret@h/d?x=1'",
        "postgres.dsn = '***': allowed is a PostgreSQL connection",
    ),
    (
        "postgres = 'postgresql://u:s3cret@h/d'",
        "postgres = a string: allowed is a table with dsn, direct_dsn, standby, schema",
    ),
    ("[redis]\nurl = 'http://u:s3cret@h'", "redis.url = 'http://u:***@h': allowed is redis://"),
    (
        "[redis]\nurl = 'redis+sentinel://u:s3cret@h/'",
        "redis.url = 'redis+sentinel://u:***@h/': allowed is redis://",
    ),
    (
        "[redis]\nurl = 'redis://a:1,b:1/0'",
        "redis.prefix = '': several servers in redis.url are the nodes of a cluster",
    ),
    ("[redis]\nca_file = '/x'", "redis.ca_file = '/x': allowed is it only with rediss:// in redis.url"),
    ("[redis]\ntls_verify = 'none'", "redis.tls_verify = 'none': allowed is it only with rediss://"),
    (
        "[redis]\nurl = 'rediss://h'\nkey_file = '/x'",
        "redis.key_file: allowed is one only beside redis.cert_file",
    ),
    (
        "[redis]\nurl = 'rediss://h'\ntls_verify = 'no'",
        'redis.tls_verify = \'no\': allowed is "full" or "ca" or "none"',
    ),
    ("[redis]\nurl = 'redis://h/x'", "redis.url = 'redis://h/x': allowed is redis://"),
    ("[redis]\nurl = 'redis://h:99999'", "redis.url = 'redis://h:99999': allowed is redis://"),
    (
        "[redis]\nurl = 'redis://h?socket_timeout=1'",
        "redis.url = 'redis://h?socket_timeout=1': allowed is redis://",
    ),
    ("[redis]\nurl = ''", "redis.url = '': allowed is redis://"),
    ("[redis]\nitem = 'all'", 'redis.item = \'all\': allowed is "id" or "full"'),
    ("[redis]\nprefix = 'a b'", "redis.prefix = 'a b': allowed is up to 64 printable"),
    ("[migrator]\nbatch_size = 0", "migrator.batch_size = 0: allowed is a whole number from 1 to 10000"),
    ("[migrator]\nbatch_size = 1.5", "migrator.batch_size = 1.5: allowed is a whole number from 1 to 10000"),
    ("[workers]\napp = 'a:b'", "workers = a table: allowed is tables, each begun with [[workers]]"),
    ("[[workers]]", 'workers[0].app is missing: allowed is "module:attribute"'),
    ("[[workers]]\napp = 'mail'", "workers[0].app = 'mail': allowed is \"module:attribute\""),
    ("[[workers]]\napp = 'a.:b'", "workers[0].app = 'a.:b': allowed is \"module:attribute\""),
    ("[[workers]]\napp = 'a:b()'", "workers[0].app = 'a:b()': allowed is \"module:attribute\""),
    (POOL + "name_ = 'x'", "workers[0].name_: there is no such setting; did you mean name?"),
    (POOL + "processes = -2", "workers[0].processes = -2: allowed is a whole number from 1 to 512"),
    (POOL + "queues = 'x'", "workers[0].queues = 'x': allowed is a list of queue names"),
    (POOL + "queues = ['a', 'b:high']", "workers[0].queues[1] = 'b:high': allowed is 1 to 100 letters"),
    (POOL + "queues = ['']", "workers[0].queues[0] = '': allowed is 1 to 100 letters"),
    (POOL + "queues = ['a', 'b', 'a']", "workers[0].queues: 'a' is listed twice; allowed is once"),
    (POOL + "order = 'random'", 'workers[0].order = \'random\': allowed is "bands" or "queues"'),
    (POOL + POOL, "workers[1].name = 'mail': another pool has this name; each needs its own"),
    ("[[workers]]\napp = 'a:b'\nname = 'a__b'", "workers[0].name = 'a__b': allowed is letters, digits"),
    ("[queues]\nx = 3", 'queues."x" = a number: allowed is a table with default_priority'),
    (
        "[queues.'no good']\nmax_attempts = 1",
        'queues."no good": allowed as a queue\'s name is 1 to 100 letters',
    ),
    (
        "[queues.'a-b']\nmax_attempts = 0",
        'queues."a-b".max_attempts = 0: allowed is a whole number from 1 to 1000',
    ),
    (
        "[queues.a]\nmax_attempts = 1001",
        'queues."a".max_attempts = 1001: allowed is a whole number from 1 to 1000',
    ),
    (
        "[queues.a]\nretry_base_seconds = 9\nretry_max_seconds = 3",
        'queues."a".retry_base_seconds = 9: allowed is at most its retry_max_seconds, 3',
    ),
    ("[maintenance]\nlog_days = 0", "maintenance.log_days = 0: allowed is a whole number from 1 to 36500"),
    ("[web]\nlisten = '9640'", "web.listen = '9640': allowed is host:port"),
    ("[web]\nlisten = ':9640'", "web.listen = ':9640': allowed is host:port"),
    ("[web]\nlisten = 'localhost:http'", "web.listen = 'localhost:http': allowed is host:port"),
    ("[web]\nlisten = '::1:80'", "web.listen = '::1:80': allowed is host:port"),
    ("[web]\nlisten = '0.0.0.0:80'", "web.listen = '0.0.0.0:80': an address beyond loopback needs web.token"),
    ("[web]\ntoken = 's3cret token'", "web.token = ***: allowed is up to 256 printable"),
    ("[log]\nlevel = 'INFO'", 'log.level = \'INFO\': allowed is "debug" or "info" or "warning" or "error"'),
    ("log = 2026-01-01", "log = a date or time: allowed is a table with level, format"),
]


@pytest.mark.parametrize(("text", "line"), BAD, ids=[line[:50] for _, line in BAD])
def test_a_bad_setting_is_one_line(text: str, line: str) -> None:
    """The line names the setting as it is written, its value (never a secret), and what is allowed."""
    (told,) = faults(text)
    assert told.startswith(line)
    assert "s3cret" not in told


BAD_VARIABLES = [
    ("PMQD_DRAIN_SECONDS", "soon", "PMQD_DRAIN_SECONDS = 'soon': allowed is a number from 0 to 86400"),
    ("PMQD_MIGRATOR__BATCH_SIZE", "1.5", "PMQD_MIGRATOR__BATCH_SIZE = '1.5': allowed is a whole number"),
    ("PMQD_MIGRATOR__POLL_SECONDS", "nan", "PMQD_MIGRATOR__POLL_SECONDS = nan: allowed is a number"),
    (
        "PMQD_POSTGRES_DSN",
        "s3cret",
        "PMQD_POSTGRES_DSN: there is no such setting; did you mean PMQD_POSTGRES__DSN?",
    ),
    (
        "PMQD_POSTGRES__DSM",
        "s3cret",
        "PMQD_POSTGRES__DSM: there is no such setting; did you mean PMQD_POSTGRES__DSN?",
    ),
    ("PMQD_POSTGRES__DSN", "no s3cret", "PMQD_POSTGRES__DSN = '***': allowed is a PostgreSQL connection"),
    ("PMQD_WORKERS", "3", "PMQD_WORKERS: there is no such setting"),
    (
        "PMQD_WORKERS__mail__PROCESSES",
        "two",
        "PMQD_WORKERS__mail__PROCESSES = 'two': allowed is a whole number",
    ),
    ("PMQD_WORKERS__mail__QUEUES", "a b", "PMQD_WORKERS__mail__QUEUES = 'a b': allowed is 1 to 100 letters"),
    (
        "PMQD_WORKERS__mail__QUEUES",
        "[1",
        "PMQD_WORKERS__mail__QUEUES = '[1': allowed is a list of queue names",
    ),
    ("PMQD_WORKERS__new__PROCESSES", "2", 'PMQD_WORKERS__new__APP is missing: allowed is "module:attribute"'),
    ("PMQD_WORKERS__mail__NAME", "x", "PMQD_WORKERS__mail__NAME: there is no such setting"),
    ("PMQD_QUEUES__a__NOTHING", "2", "PMQD_QUEUES__a__NOTHING: there is no such setting"),
    ("PMQD_\udcff", "2", "PMQD_\\udcff: there is no such setting"),
]


@pytest.mark.parametrize(("name", "value", "line"), BAD_VARIABLES)
def test_a_bad_variable_is_one_line(name: str, value: str, line: str) -> None:
    """A setting that the environment sets goes by the variable's name."""
    (told,) = faults(POOL, {name: value})
    assert told.startswith(line)
    assert "s3cret" not in told
    told.encode()


def test_a_bad_option_is_named_as_such() -> None:
    """A value of the command line is not blamed on the file."""
    (told,) = faults(POOL, overrides={"workers.mail.processes": 0})
    assert told.startswith(
        "workers.mail.processes (command line) = 0: allowed is a whole number from 1 to 512"
    )


def test_every_fault_is_told_at_once() -> None:
    """Faults of file and environment come together, and each names the file or the variable."""
    path = write("drain_seconds = -1\nboot_seconds = -1\n")
    with pytest.raises(ConfigError) as caught:
        load(path, environ={"PMQD_NO": "1"})
    first, *others = str(caught.value).split("\n")
    assert first.startswith("PMQD_NO: ")
    assert [line.split(" = ")[0] for line in others] == [
        "given.toml: drain_seconds",
        "given.toml: boot_seconds",
    ]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a = ", "not valid TOML: Invalid value (at end of document)"),
        (b"a = 1\na = 2", "not valid TOML: Cannot overwrite a value"),
        (b"\xff", "not valid TOML: 'utf-8' codec can't decode"),
        (b"a = " + b"[" * 100_000, "not valid TOML: "),
        (b"a = " + b"9" * 10_000, "not valid TOML: "),
    ],
)
def test_a_broken_file_is_one_line(content: bytes, told: str) -> None:
    """Whatever is in the file, the error names the file and what is wrong."""
    Path("broken.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(f"configuration file broken.toml: {told}")) as caught:
        load(Path("broken.toml"), environ={})
    assert "\n" not in str(caught.value)


def test_an_unreadable_file_is_one_line() -> None:
    """A missing file, a folder, an impossible name."""
    for path, told in (
        ("none.toml", "No such file"),
        (".", "Is a directory"),
        ("a\0b", r"a\\x00b: not valid"),
    ):
        with pytest.raises(ConfigError, match=rf"configuration file .*{told}"):
            load(Path(path), environ={})


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_closed_file_is_one_line() -> None:
    """A file that this user may not read."""
    write("").chmod(0)
    with pytest.raises(ConfigError, match="Permission denied"):
        load(Path("given.toml"), environ={})


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql://bob:s3cret@h:1/db", "user=bob password=*** dbname=db host=h port=1"),
        ("host=x password='s3cret word' user=b", "user=b password=*** host=x"),
        ("postgresql://h/db?sslpassword=s3cret", "dbname=db host=h sslpassword=***"),
        ("something s3cret", "***"),
        ("redis://:s3cret@h:1/2", "redis://:***@h:1/2"),
        ("redis://u:s3cret@h", "redis://u:***@h"),
        ("redis://u@h/1", "redis://u@h/1"),
        ("rediss+sentinel://u:s3cret@a:1,b:2/m/0", "rediss+sentinel://u:***@a:1,b:2/m/0"),
        ("redis+sentinel://a,b/m?sentinel_password=s3cret", "redis+sentinel://a,b/m?***"),
        ("unix:///a/b?db=2", "unix:///a/b?db=2"),
        ("unix:///a?password=s3cret", "unix:///a?***"),
        ("redis://[s3cret", "***"),
        ("", ""),
    ],
)
def test_passwords_are_masked(address: str, shown: str) -> None:
    """No password survives, whatever form the address has."""
    assert masked(address) == shown


def test_listen_addresses() -> None:
    """The brackets of IPv6 are taken off; names stay as they are."""
    assert split_listen("[::1]:80") == ("::1", 80)
    assert split_listen("localhost:65535") == ("localhost", 65535)
    assert load(overrides={"web.listen": "[::1]:9640"}, environ={}).web.listen == "[::1]:9640"
    assert load(overrides={"web.listen": "0.0.0.0:80", "web.token": "x" * 20}, environ={}).web.token


# --- what is unwise


def test_a_sound_configuration_has_no_warning() -> None:
    """Nothing is said about what is in order."""
    text = '[postgres]\ndsn = "host=x"\n[queues.a]\ntimeout_seconds = 30\n' + POOL
    assert warnings(load(write(text), environ={})) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "postgres.dsn is empty"),
        ("", "there is no pool"),
        ("drain_seconds = 100", "TimeoutStopSec="),
        ("[web]\ntoken = 'abc'", "web.token has 3 characters"),
        (POOL + "max_jobs = 1", 'pool "mail": max_jobs = 1'),
        (POOL + "max_memory_mb = 10", 'pool "mail": max_memory_mb = 10'),
        (POOL + "processes = 500\nconcurrency = 50", 'pool "mail": 500 x 50'),
        (POOL + "queues = ['a']\n[queues.b]\nmax_attempts = 1", 'queues."b": no pool of this instance'),
        ("[queues.b]\ntimeout_seconds = 120", "is longer than drain_seconds = 30"),
        ("[redis]\nurl = 'rediss://h'\ntls_verify = 'none'", "somebody in between can pass for Redis"),
        ("[redis]\nurl = 'rediss://h'\ntls_verify = 'ca'", "without redis.ca_file"),
    ],
)
def test_the_unwise_is_told(text: str, told: str) -> None:
    """Each legal but unwise setting has its line."""
    assert any(told in line for line in warnings(load(write(text), environ={})))


def test_a_password_that_everybody_can_read_is_told() -> None:
    """A file that others may read should hold no password."""
    path = write('[postgres]\ndsn = "postgresql://u:s3cret@h/d"\n')
    path.chmod(0o644)
    (line,) = [line for line in warnings(load(path, environ={}), path) if "chmod" in line]
    assert "postgres.dsn holds a password" in line
    path.chmod(0o640)
    assert not [line for line in warnings(load(path, environ={}), path) if "chmod" in line]


def test_models_check_themselves() -> None:
    """Settings made in code are checked too, under the names that Python uses."""
    assert PoolSettings(app="a:b").processes == 2
    assert Settings().log.level == "info"
    with pytest.raises(ValueError, match="app"):
        PoolSettings(app="nothing")
