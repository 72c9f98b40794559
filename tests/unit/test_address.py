"""What a Redis URL means, and what is none."""

import pytest

from pmqd.address import Address, hash_tag, read, shown


@pytest.mark.parametrize(
    ("url", "meant"),
    [
        ("redis://h", Address((("h", 6379),))),
        (
            "rediss://u:p%40%2F@[::1]:7/3",
            Address((("::1", 7),), tls=True, database=3, user="u", password="p@/"),
        ),
        ("redis://:p:q@h/", Address((("h", 6379),), password="p:q")),
        ("redis://a,b:7,[fe80::1]", Address((("a", 6379), ("b", 7), ("fe80::1", 6379)))),
        ("unix:///run/redis.sock?db=2", Address(path="/run/redis.sock", database=2)),
        ("unix://u:p@/a%20b", Address(path="/a b", user="u", password="p")),
        (
            "redis+sentinel://u:p@a:1,b/mail-queue/4?sentinel_user=s&sentinel_password=t%26",
            Address((("a", 1), ("b", 26379)), "", "mail-queue", False, 4, "u", "p", "s", "t&"),
        ),
        ("rediss+sentinel://a/m", Address((("a", 26379),), master="m", tls=True)),
    ],
)
def test_a_url_is_taken_apart(url: str, meant: Address) -> None:
    """Every form, with its defaults and escapes."""
    assert read(url) == meant


@pytest.mark.parametrize(
    "url",
    [
        "", "h:6379", "http://h", "REDIS://h", "redis://", "redis:///0", "redis://h/x", "redis://h/1/2", "redis://h:0",
        "redis://h:65536", "redis://h:x", "redis://a,,b", "redis://a b", "redis://h#f", "redis://h?db=1", "redis://::1",
        "redis://[::1", "unix://", "unix:///", "unix://h/path", "unix:///a?db=x", "unix:///a?x=1", "redis+sentinel://a",
        "redis+sentinel://a/", "redis+sentinel://a/m/x", "redis+sentinel://a/m?x=1", "redis+sentinel:///m", "sentinel://a/m",
        "redis://h\n", "redis://u:p@",
    ],
)  # fmt: skip
def test_what_is_no_address(url: str) -> None:
    """Everything else is refused, and the message does not repeat it: it may hold a password."""
    with pytest.raises(ValueError, match=r"no|option|Redis") as caught:
        read(url)
    assert not url or url not in str(caught.value)


def test_nobody_sees_a_password() -> None:
    """Neither as text nor in a traceback."""
    for url in (
        "redis://u:s3cret@h",
        "unix://u:s3cret@/p",
        "redis+sentinel://:s3cret@h/m?sentinel_password=s3cret",
    ):
        assert "s3cret" not in f"{read(url)} {read(url)!r}"
    assert str(read("redis+sentinel://:x@a,[::1]:2/m")) == "m of the sentinels a:26379,[::1]:2"
    assert str(read("unix:///run/x")) == "/run/x"
    assert shown(("::1", 1)) == "[::1]:1"


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("redis://localhost,127.0.0.9", True),
        ("unix:///x", True),
        ("redis://127.0.0.1,10.0.0.1", False),
        ("redis://h", False),
    ],
)
def test_local_is_this_machine_only(url: str, local: bool) -> None:
    """One server elsewhere is enough to be not local."""
    assert read(url).local is local


@pytest.mark.parametrize(
    ("prefix", "tag"),
    [("", ""), ("{pmqd}:", "pmqd"), ("a{b}c{d}", "b"), ("{}x{y}", ""), ("{a", ""), ("a}", ""), ("}{a}", "a")],
)
def test_the_hash_tag_is_the_one_that_redis_sees(prefix: str, tag: str) -> None:
    """The first brace decides; an empty tag is none."""
    assert hash_tag(prefix) == tag
