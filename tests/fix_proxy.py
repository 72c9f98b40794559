"""Fixture: a wire between a client and a server that a test can cut, hold or reset."""

import contextlib
import os
import selectors
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

import pytest
from psycopg.conninfo import make_conninfo

from pmqd.embedded import PostgresServer, RedisServer

Moment = Literal["before", "after"]
"""Break a wire before the server gets what the client sent, or after it got it and before the client hears of it."""


@dataclass
class _Wire:
    """One client's connection, and its twin to the server."""

    client: socket.socket
    server: socket.socket
    deaf: bool = False  # what the server answers is dropped


@dataclass
class _State:
    mode: Literal["open", "held", "cut"] = "open"
    trap: tuple[bytes, Moment] | None = None
    sprung: int = 0
    wires: list[_Wire] = field(default_factory=list)


class Proxy:
    """Listens on a free port of 127.0.0.1 and passes every byte to a server's Unix socket, until told otherwise.

    All work is done by one thread; a change made by a test is in force when the call returns.
    """

    def __init__(self, target: PostgresServer | RedisServer) -> None:
        self.target = target
        self._upstream = str(target.socket_folder / target.socket_name)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._state = _State()
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = os.pipe()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake_in, selectors.EVENT_READ)
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name=f"proxy:{self.port}", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """The address of Redis through this wire."""
        return f"redis://127.0.0.1:{self.port}/0"

    def dsn(self, dsn: str) -> str:
        """The same database through this wire."""
        return make_conninfo(dsn, host="127.0.0.1", port=self.port)

    @property
    def connections(self) -> int:
        """How many connections pass through now."""
        with self._lock:
            return len(self._state.wires)

    @property
    def sprung(self) -> int:
        """How often `break_on` broke a wire."""
        return self._state.sprung

    def hold(self) -> None:
        """Nothing passes any more, in either direction, and nobody is told: as a pulled cable. New ones wait too."""
        with self._lock:
            self._state.mode = "held"
            self._watch(on=False)

    def cut(self) -> None:
        """Reset every connection and refuse new ones, until `heal`."""
        with self._lock:
            self._state.mode = "cut"
            self._reset_all()

    def reset(self) -> None:
        """Reset every connection; new ones are served."""
        with self._lock:
            self._reset_all()

    def heal(self) -> None:
        """Pass everything again; what was held goes on where it stood."""
        with self._lock:
            self._state.mode = "open"
            self._state.trap = None
            self._watch(on=True)

    def break_on(self, words: bytes, when: Moment) -> None:
        """Reset the next connection whose client sends a packet that contains `words`, once.

        Args:
            words: part of a statement or command, such as b"COMMIT".
            when: "before": the server never sees the packet. "after": the server gets it, its answer is lost.
        """
        with self._lock:
            self._state.trap = (words, when)

    def close(self) -> None:
        """End the proxy and its connections."""
        self._closing = True
        os.write(self._wake_out, b"x")
        self._thread.join(5)
        with self._lock:
            self._reset_all()
        self._listener.close()
        self._selector.close()
        os.close(self._wake_in)
        os.close(self._wake_out)

    # --- the thread

    def _serve(self) -> None:
        while not self._closing:
            # The timeout is for a selector that a test changed meanwhile (`heal` registers what waits).
            for key, _ in self._selector.select(0.05):
                with self._lock:
                    if key.fileobj is self._listener:
                        self._accept()
                    elif isinstance(key.data, _Wire) and key.data in self._state.wires:
                        self._pass_on(key.data, key.fileobj)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        server = socket.socket(socket.AF_UNIX)
        try:
            if self._state.mode == "cut":
                raise ConnectionRefusedError
            server.connect(self._upstream)
        except OSError:  # the server is down: the client sees what a closed port would show
            _reset(client)
            server.close()
            return
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wire = _Wire(client, server)
        self._state.wires.append(wire)
        if self._state.mode == "open":
            self._register(wire)

    def _pass_on(self, wire: _Wire, source: object) -> None:
        if self._state.mode == "held":
            return
        from_client = source is wire.client
        try:
            data = (wire.client if from_client else wire.server).recv(65536)
            if data and from_client:
                data = self._sprung_by(wire, data)
            if data and not (wire.deaf and not from_client):
                (wire.server if from_client else wire.client).sendall(data)
                return
        except OSError:
            data = b""
        # An end of file, a broken pipe, or the answer that the client must not hear.
        self._drop(wire)

    def _sprung_by(self, wire: _Wire, data: bytes) -> bytes:
        trap = self._state.trap
        if trap is None or trap[0] not in data:
            return data
        self._state.trap, self._state.sprung = None, self._state.sprung + 1
        if trap[1] == "before":
            return b""
        wire.deaf = True
        return data

    def _watch(self, *, on: bool) -> None:
        for wire in self._state.wires:
            if on:
                self._register(wire)
            else:
                self._unregister(wire)

    def _register(self, wire: _Wire) -> None:
        for end in (wire.client, wire.server):
            with contextlib.suppress(KeyError):
                self._selector.register(end, selectors.EVENT_READ, wire)

    def _unregister(self, wire: _Wire) -> None:
        for end in (wire.client, wire.server):
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(end)

    def _drop(self, wire: _Wire) -> None:
        self._unregister(wire)
        self._state.wires.remove(wire)
        wire.server.close()
        _reset(wire.client)

    def _reset_all(self) -> None:
        for wire in list(self._state.wires):
            self._drop(wire)


def _reset(client: socket.socket) -> None:
    # Linger of zero seconds: close sends RST, not FIN.
    with contextlib.suppress(OSError):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


class MakeProxy(Protocol):
    """What the fixture `proxy` gives."""

    def __call__(self, target: PostgresServer | RedisServer) -> Proxy:
        """A wire to this server, closed after the test."""


@pytest.fixture
def proxy() -> Iterator[MakeProxy]:
    """The function `proxy(server)`: a wire that the test can cut, hold, reset, or break at a packet."""
    with contextlib.ExitStack() as stack:

        def make(target: PostgresServer | RedisServer) -> Proxy:
            made = Proxy(target)
            stack.callback(made.close)
            return made

        yield make
