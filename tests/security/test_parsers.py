"""Every parser of what comes from outside, with random input: an answer or its own error, in bounded time."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import UUID

import orjson
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pmqd import cli_common, codec, config, guard
from pmqd.errors import ConfigError, UsageError
from pmqd.hints import hinted_id
from pmqd.recovery import COUNTED, SavedSettlesError, counted_claim, load_outcomes, save_outcomes
from pmqd.settings import masked
from tests.security.outcomes import an_outcome
from tests.security.site import BEARER, Site, open_site

SECONDS = 0.5
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
fuzz = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@contextmanager
def bounded() -> Iterator[None]:
    """The time of one input; the second look is for a machine that stood still during the first."""
    started = time.thread_time()
    yield
    assert time.thread_time() - started < SECONDS


def told(error: Exception) -> str:
    """The text of an error, which every error has, in lines that people read."""
    text = str(error)
    assert text
    assert all(len(line) < 2000 for line in text.splitlines())
    return text


# --- configuration -------------------------------------------------------------------------------------------

KEYS = st.sampled_from(
    [
        "postgres",
        "redis",
        "workers",
        "queues",
        "web",
        "log",
        "migrator",
        "maintenance",
        "state_dir",
        "drain_seconds",
        "x",
    ]
)
INNER = st.sampled_from(
    ["dsn", "url", "schema", "prefix", "listen", "token", "hosts", "level", "name", "app", "queues", "x"]
)
VALUES = (
    JSON
    | st.dictionaries(INNER | st.text(max_size=5), JSON, max_size=4)
    | st.lists(st.dictionaries(INNER, JSON, max_size=4), max_size=3)
)


@fuzz
@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_parsers_settings_of_any_shape(values: dict[str, Any]) -> None:
    """Tables, lists and values of any type in any place: sound settings, or a ConfigError with a line per fault."""
    with bounded():
        try:
            config._checked(config._Input(values, None))
        except ConfigError as error:
            told(error)


@fuzz
@given(
    st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass"))
)
@example(b"a = " + b"[" * 5000)
@example(b"a." * 3000 + b"a = 1")
@example(b"a = " + b"9" * 5000)
@example(b'a = """' + b"\\" * 10_000)
@example(b"a = 1e999999999")
@example(b"a = 9999-99-99")
def test_parsers_configuration_files(tmp_path: Path, content: bytes) -> None:
    """Any bytes as a file: one ConfigError, or settings."""
    path = tmp_path / "pmqd.toml"
    path.write_bytes(content)
    with bounded():
        try:
            config.load(path, environ={})
        except ConfigError as error:
            told(error)


NAMES = st.sampled_from(
    ["PMQD_WEB__HOSTS", "PMQD_WEB__LISTEN", "PMQD_POSTGRES__DSN", "PMQD_REDIS__URL", "PMQD_WORKERS__A__QUEUES",
     "PMQD_WORKERS__A__PROCESSES", "PMQD_QUEUES__A__MAX_ATTEMPTS", "PMQD_STATE_DIR", "PMQD_DRAIN_SECONDS", "PMQD_WORKERS",
     "PMQD_WORKERS__A", "PMQD_", "PMQD___", "PMQD_WEB", "PMQD_WORKERS____", "PMQD_LOG__LEVEL"]
) | st.text(max_size=20).map(lambda text: f"PMQD_{text}")  # fmt: skip


@fuzz
@given(st.dictionaries(NAMES, st.text(max_size=60) | JSON.map(json.dumps), max_size=4))
@example({"PMQD_DRAIN_SECONDS": "9" * 5000})
@example({"PMQD_WORKERS__A__QUEUES": "[" * 5000})
def test_parsers_the_environment(environ: dict[str, str]) -> None:
    """Any variables with our prefix: settings, or a ConfigError."""
    with bounded():
        try:
            config.load(Path("/dev/null"), environ=environ)
        except ConfigError as error:
            told(error)


@fuzz
@given(
    st.lists(
        st.text(max_size=30).filter(lambda text: "=" in text) | INNER.map(lambda key: f"web.{key}=x"),
        max_size=3,
    )
)
def test_parsers_assignments_of_the_command_line(assignments: list[str]) -> None:
    """`--set` with any text: a usage error, a fault of the configuration, or settings."""
    with bounded():
        try:
            cli_common.load_settings(Path("/dev/null"), assignments)
        except (UsageError, ConfigError) as error:
            told(error)


SECRET_TEXT = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=0, max_size=6).map(
    lambda text: f"c4n4{text}ry9"
)


@fuzz
@given(secret=SECRET_TEXT, form=st.integers(0, 13))
@example(secret="c4n4://ry9", form=6)
@example(secret="c4n4/ry9", form=0)
@example(secret="c4n4@/ry9", form=1)
@example(secret="c4n4#ry9", form=2)
@example(secret="c4n4Le?%D9ry9", form=10)
def test_parsers_masked_addresses_hold_no_password(secret: str, form: int) -> None:
    """A password in each place of a DSN or URL, escaped or forgotten to be: not in what is shown, nor in the fault's line."""
    forms = [
        f"redis://:{secret}@host:6379/0",
        f"redis://user:{secret}@host/0",
        f"rediss://user:{secret}@host",
        f"unix://user:{secret}@/run/redis.sock",
        f"redis+sentinel://user:{secret}@host:1,other:2/mymaster",
        f"redis://host/0?password={secret}",
        f"host=db user=me password={secret} dbname=x",
        f"host=db password='{secret}'",
        f"postgresql://me:{secret}@host/db",
        f"postgres://me:{secret}@host:5432,other/db?sslmode=require",
        f"postgresql://host/db?user=me&password={secret}",
        f"postgresql://me:{quote(secret, safe='')}@host/db",
        f"dbname=postgresql://me:{secret}@host/db",
        f"me:{secret}@host/db",
    ]
    address = forms[form]
    halves = [secret, quote(secret, safe=""), secret[:4], secret[-3:]]
    with bounded():
        shown = masked(address)
    assert not [part for part in halves if part in shown], shown
    for key in ("postgres.dsn", "redis.url"):
        try:
            config.load(Path("/dev/null"), {key: address}, environ={})
        except ConfigError as error:
            said = told(error)
            assert not [part for part in halves if part in said], said


@fuzz
@given(st.text(max_size=100))
def test_parsers_masked_takes_any_text(text: str) -> None:
    """What is no address at all is hidden."""
    with bounded():
        assert isinstance(masked(text), str)


# --- entries, payloads, saved settles ------------------------------------------------------------------------


@fuzz
@given(st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
def test_parsers_entries_of_lists(member: bytes) -> None:
    """A list's member of any bytes: an id or None."""
    with bounded():
        hinted_id(member)


@fuzz
@given(st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
def test_parsers_json_text(text: bytes) -> None:
    """Any bytes as JSON: a value or a ValueError; what was a value can be written again or is named."""
    with bounded():
        try:
            value = codec.loads(text)
        except ValueError:
            return
        try:
            codec.dumps(value)
        except ValueError as error:
            said = told(error)
            assert "$" in said


FIELDS = sorted(orjson.loads(orjson.dumps(an_outcome(result=None))))


@fuzz
@given(
    changes=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), JSON, max_size=3),
    cut=st.integers(0, 5),
)
def test_parsers_saved_settles(tmp_path: Path, changes: dict[str, Any], cut: int) -> None:
    """A line with any change of any field: an outcome whose fields have their types, or a SavedSettlesError that names it."""
    path = tmp_path / "x-1.jsonl"
    path.unlink(missing_ok=True)
    save_outcomes(path, [an_outcome()], [])
    line = {**json.loads(path.read_text()), **changes}
    path.write_text((json.dumps(line) + "\n") * 2 if cut else json.dumps(line)[:-3])
    with bounded():
        try:
            outcomes, _ = load_outcomes(path)
        except SavedSettlesError as error:
            said = told(error)
            assert str(path) in said
            return
    for outcome in outcomes:
        assert isinstance(outcome.attempt_number, int)
        assert isinstance(outcome.queue_name, str)
        assert isinstance(outcome.kind, str | None)
        assert isinstance(outcome.error, str | None)
        assert isinstance(outcome.delay_seconds, float | int)


@pytest.mark.parametrize(
    "content",
    [b"[]\n", b"5\n", b"null\n", b'"closed_token"\n', b'{"closed_token": 5}\n', b"\xff\n", b"[" * 9999],
)
def test_parsers_saved_settles_that_are_none(tmp_path: Path, content: bytes) -> None:
    """Lines that are JSON of another shape, or none."""
    path = tmp_path / "x-1.jsonl"
    path.write_bytes(content)
    with pytest.raises(SavedSettlesError):
        load_outcomes(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"5", b'{"claim": 5, "left": []}', b'{"claim": "x", "left": []}', b"{", b"\xff", b"[" * 9999]
    + [
        f'{{"claim": "{UUID(int=1)}", "left": {left}}}'.encode()
        for left in ("5", "null", "[5]", '["x"]', '"x"')
    ],
)
def test_parsers_a_counted_claim_that_is_none(tmp_path: Path, content: bytes) -> None:
    """JSON of another shape, or none, as a machine that lost power may leave it: it says nothing, and holds nobody up."""
    (tmp_path / COUNTED).write_bytes(content)
    assert counted_claim(tmp_path) is None


# --- HTTP ----------------------------------------------------------------------------------------------------


@fuzz
@given(st.text(max_size=60) | st.from_regex(r"[a-z0-9.:\[\]@/-]{0,40}", fullmatch=True))
def test_parsers_host_headers(host: str) -> None:
    """Any Host: known or not; never the name of another machine."""
    with bounded():
        known = guard.is_known(host, frozenset({"queue.example.org"}))
    assert not known or "evil" not in host


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A web child whose stores are away."""
    with open_site(tmp_path_factory.mktemp("parsers")) as site:
        yield site


PIECES = st.text(st.characters(min_codepoint=33, max_codepoint=255, exclude_characters="\x7f"), max_size=30)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(["/api/v1/queue/{}/jobs", "/api/v1/queue/q/jobs/{}", "/{}", "/api/v1/queue/q/jobs?status={}",
                          "/api/v1/queue/q/jobs?limit={}", "/api/v1/queue/q/jobs?cursor={}", "/api/v1/queue/q/jobs?{}"]),
    piece=PIECES | st.sampled_from(["%00", "%ff", "..%2f..", "%2e%2e", "9" * 4000, "-1", "1e9", "%D9%A3", "x" * 5000, "%C0%AF"]),
    token=PIECES,
)  # fmt: skip
def test_parsers_requests(site: Site, path: str, piece: str, token: str) -> None:
    """Any path, query and token: an answer below 500, or 503 because there is no store; never another 5xx."""
    headers = {"host": "localhost"} | (BEARER if not token else {"authorization": f"Bearer {token}"})
    answer = site.send("GET", path.format(piece), headers)
    assert answer.status_code < 500 or answer.status_code == 503


READERS: list[Callable[[str], Any]] = [
    cli_common.read_uuid,
    cli_common.read_queue,
    lambda text: cli_common.read_span(text, "x"),
    lambda text: cli_common.read_time(text, "x", cli_common.utc_now()),
    cli_common.whole("x", 1, 1000),
]


@fuzz
@given(st.text(max_size=40) | st.from_regex(r"[+-]?[0-9]{1,30}(\.[0-9]{1,10})?(ms|s|m|h|d)?", fullmatch=True))
@example("+999999999d")
@example("-999999999d")
@example("0001-01-01T00:00:00+23:59")
@example("9999-12-31T23:59:59-23:59")
def test_parsers_arguments(text: str) -> None:
    """Any argument of a command: read, or one usage error."""
    for read in READERS:
        with bounded():
            try:
                read(text)
            except (UsageError, ValidationError) as error:
                told(error)
