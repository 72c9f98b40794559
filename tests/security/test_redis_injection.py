"""Names never become other keys or commands in Redis; scripts are files, and what they get is keys and arguments."""

import ast
import re
from pathlib import Path
from uuid import uuid4

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pmqd import job
from pmqd.broker import Broker
from pmqd.errors import EnqueueError
from pmqd.settings import PoolSettings, RedisSettings

SOURCE = Path(__file__).parents[2] / "src" / "pmqd"
NAMES = st.text(max_size=110) | st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,99}", fullmatch=True)


@given(NAMES, st.sampled_from(["", "app:", "{pmqd}:"]))
@settings(max_examples=400, deadline=None)
def test_redis_injection_a_name_gives_three_keys_or_an_error(name: str, prefix: str) -> None:
    """Any text as a queue's name: exactly its three lists, which no other name has; or an error, in settings and calls alike."""
    broker = Broker(RedisSettings(url="unix:///nonexistent", prefix=prefix), "test")
    try:
        keys = [broker.queue_key(name, band) for band in ("high", "normal", "low")]
    except EnqueueError:
        with pytest.raises(ValidationError):
            PoolSettings(app="a:b", queues=[name])
        return
    assert PoolSettings(app="a:b", queues=[name]).queues == [name]
    assert keys == [f"{prefix}queue:{name}:high", f"{prefix}queue:{name}", f"{prefix}queue:{name}:low"]
    assert all(re.fullmatch(r"[!-~]+", key) for key in keys)
    for other in (f"{name}:high", f"{name}:low"):
        assert not job.is_queue_name(other), "another queue's list would be this one's band"


@given(st.text(max_size=70))
def test_redis_injection_a_prefix_is_plain_or_refused(prefix: str) -> None:
    """A prefix is printable ASCII, or a fault of the configuration."""
    try:
        RedisSettings(url="unix:///x", prefix=prefix)
    except ValidationError:
        return
    assert re.fullmatch(r"[!-~]{0,64}", prefix)


def test_redis_injection_no_script_is_put_together() -> None:
    """The text of every script is a file of the package, without places to fill in; nobody sends EVAL with a text of its own."""
    for path in sorted(SOURCE.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr not in ("eval", "eval_ro", "script_load", "execute_command"), path.name
                if node.func.attr == "register_script":
                    assert ast.unparse(node.args[0]) == "_lua(name)", path.name
    for path in (SOURCE / "lua").glob("*.lua"):
        text = re.sub(r"--[^\n]*", "", path.read_text())
        assert "loadstring" not in text
        assert not re.search(r"\bload\s*\(", text), path.name
        for call in re.findall(r"redis\.p?call\(\s*([^,)]+)", text):
            assert re.fullmatch(r"['\"][A-Z]+['\"]", call.strip()), (
                f"{path.name}: a command's name is no constant: {call}"
            )


HOSTILE = [
    "\r\nFLUSHALL\r\n",
    "*1\r\n$8\r\nFLUSHALL\r\n",
    "') redis.call('FLUSHALL') --",
    "]] redis.call('FLUSHALL') --",
    "\0",
    "x" * 1_000_000,
    "\udcff".encode("utf-8", "surrogatepass").decode("utf-8", "replace"),
]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.sampled_from(HOSTILE) | st.text(max_size=50))
def test_redis_injection_members_are_data(redis_url: str, text: str) -> None:
    """Whatever stands in an item arrives as that item, and no other key changes."""
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
        client.set("canary", "1")
        epoch = uuid4()
        broker = Broker(RedisSettings(url=redis_url), "test")
        try:
            broker.set_epoch(epoch)
            broker.push(epoch, [(broker.queue_key("q", "normal"), [text.encode("utf-8", "replace")])])
            broker.tell([])
        finally:
            broker.close()
        assert client.lrange("queue:q", 0, -1) == [text.encode("utf-8", "replace")]
        assert set(client.keys()) == {b"canary", b"pmqd:epoch", b"queue:q"}
