"""A web child in a thread, for the tests of what it lets in; by default its stores are away."""

import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx

from pmqd import web
from pmqd.arena import Arena, Kind, State
from pmqd.config import Settings
from pmqd.process import ChildContext, StopFlag

TOKEN = "a-token-of-the-tests"
BEARER = {"authorization": f"Bearer {TOKEN}"}


@dataclass
class Site:
    """Where it listens."""

    address: tuple[str, int]

    def send(self, method: str, path: str, headers: Mapping[str, str]) -> httpx.Response:
        """One request with exactly these headers, by a socket: clients refuse to send what attackers send."""
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        with socket.create_connection(self.address, timeout=10) as wire:
            wire.sendall("\r\n".join([*lines, "connection: close", "", ""]).encode("latin-1"))
            answer = b""
            while piece := wire.recv(65536):
                answer += piece
        head, _, body = answer.partition(b"\r\n\r\n")
        first, *rest = head.decode("latin-1").split("\r\n")
        fields = [(name, value.strip()) for name, _, value in (line.partition(":") for line in rest)]
        plain = [pair for pair in fields if pair[0].lower() not in ("transfer-encoding", "content-encoding")]
        return httpx.Response(int(first.split()[1]), headers=plain, content=body)


@contextmanager
def open_site(
    state_dir: Path, dsn: str = "host=/nonexistent", redis_url: str = "unix:///nonexistent", **settings: Any
) -> Iterator[Site]:
    """A web child over these stores; `settings` are those of `[web]`."""
    given = Settings.model_validate(
        {
            "state_dir": state_dir,
            "postgres": {"dsn": dsn},
            "redis": {"url": redis_url},
            "web": {"token": TOKEN, **settings},
        }
    )
    arena, stop = Arena.create(2, 2), StopFlag()
    arena.instance_id = uuid4()
    arena.beat_master()
    arena.lease_renewed()
    arena.slots[0].open("web", "here:x:w0.1")
    arena.slots[1].open("worker", "here:x:w1.1", pool="mail", pool_index=0)
    arena.slots[1].state, arena.slots[1].ready = State.IDLE, True
    (state_dir / "metrics").mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        context = ChildContext(
            settings=given, arena=arena, slot=arena.slots[0], worker_id="here:x:w0.1", kind=Kind.WEB, pool=None,
            pool_index=-1, web_socket=listener, stop=stop, state_dir=state_dir, host="here", previous_instances=(),
        )  # fmt: skip
        thread = threading.Thread(target=web.main, args=(context,))
        thread.start()
        try:
            yield Site(listener.getsockname())
        finally:
            stop.set()
            thread.join(10)
            assert not thread.is_alive(), "the web child does not end"
