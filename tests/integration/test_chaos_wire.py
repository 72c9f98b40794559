"""The wires of a chaos run: what passes, what does not, and how fast."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import redis
from psycopg.conninfo import make_conninfo

from pmqd.chaos.wire import Switchboard, Upstream, Wire
from pmqd.embedded import PostgresServer, RedisServer
from pmqd.errors import PmqdError
from tests.fix_servers import wait_until

CHUNK = b"x" * 65536


@pytest.fixture
def board(short_folder: Path) -> Iterator[Switchboard]:
    """A process that passes bytes."""
    with Switchboard(short_folder / "wires.log") as board:
        yield board


class Echo:
    """A server that sends back what it gets; `sink` makes it swallow everything."""

    def __init__(self, *, sink: bool = False) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.got = 0
        self.lost = 0
        self._sink = sink
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def upstream(self) -> Upstream:
        """Its address."""
        return Upstream(host="127.0.0.1", port=self.listener.getsockname()[1])

    def close(self) -> None:
        """Take no more connections."""
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self._thread.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self.listener.accept()[0],), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(1 << 18):
                self.got += len(data)
                if not self._sink:
                    connection.sendall(data)
        self.lost += 1


@pytest.fixture
def echo() -> Iterator[Echo]:
    """A server that sends back what it gets."""
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def wire(board: Switchboard, echo: Echo) -> Iterator[Wire]:
    """A wire to that server, cut after the test so that nothing of it stays."""
    made = board.add(echo.upstream)
    yield made
    made.cut()


def connect(wire: Wire) -> socket.socket:
    """A client's end."""
    client = socket.create_connection(("127.0.0.1", wire.port), timeout=10)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client


def ask(client: socket.socket, words: bytes) -> bytes:
    """Send, and what comes back of the same length."""
    client.sendall(words)
    return receive(client, len(words))


def receive(client: socket.socket, size: int) -> bytes:
    """So many bytes, or what there was before the end."""
    parts = []
    while size and (part := client.recv(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def test_an_open_wire_passes_everything(wire: Wire) -> None:
    """Bytes arrive in both directions, whole and in order, also when many more come than fit into buffers."""
    text = bytes(range(256)) * 40_000
    with connect(wire) as client:
        sender = threading.Thread(target=client.sendall, args=(text,))
        sender.start()
        assert receive(client, len(text)) == text
        sender.join()
        assert wire.connections == 1
    wait_until(lambda: wire.connections == 0, what="the connection is gone")


def test_a_cut_wire_refuses_and_an_opened_one_serves_again(wire: Wire) -> None:
    """Old connections are reset, new ones refused by the kernel as by a closed port; opened, it is the same port."""
    with connect(wire) as client:
        assert ask(client, b"before") == b"before"
        wire.cut()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    for _ in range(2):
        with pytest.raises(ConnectionRefusedError):
            connect(wire)
    wire.open()
    with connect(wire) as client:
        assert ask(client, b"after") == b"after"


def test_a_held_wire_is_silent_and_loses_nothing(wire: Wire, echo: Echo) -> None:
    """Half-open: the client can send, connect and wait, hears nothing, and everything goes on where it stood."""
    with connect(wire) as client:
        assert ask(client, b"one") == b"one"
        wire.hold()
        client.sendall(b"two")
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.recv(1)
        assert echo.got == 3
        client.settimeout(10)
        with connect(wire) as late:
            late.sendall(b"late")
            wire.open()
            assert receive(client, 3) == b"two"
            assert receive(late, 4) == b"late"


def test_a_held_wire_hides_the_death_of_a_client(wire: Wire, echo: Echo) -> None:
    """The server of a half-open connection is not told that its client is gone; it is when the wire opens."""
    with connect(wire) as client:
        assert ask(client, b"one") == b"one"
        wire.hold()
    assert wire.connections == 1
    assert echo.lost == 0
    wire.open()
    wait_until(lambda: echo.lost == 1, what="the server sees the end")


def test_a_deaf_side_gets_nothing_while_the_other_does(wire: Wire, echo: Echo) -> None:
    """One direction stands still and loses nothing, the other passes."""
    with connect(wire) as client:
        wire.deaf("client")
        client.sendall(b"question")
        wait_until(lambda: echo.got == 8, what="the server has the question")
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.settimeout(10)
        wire.open()
        assert receive(client, 8) == b"question"


def test_a_slow_wire_delays_each_way(wire: Wire) -> None:
    """What goes there and comes back arrives later by twice the delay, and a later byte never before an earlier one."""
    wire.delay(0.1)
    with connect(wire) as client:
        began = time.monotonic()
        assert ask(client, b"question") == b"question"
        assert time.monotonic() - began >= 0.2
        client.sendall(b"early")
        wire.open()
        client.sendall(b"late")
        assert receive(client, 9) == b"earlylate"


def test_a_sliced_wire_passes_pieces(wire: Wire) -> None:
    """Few bytes arrive at once, in order, and all of them."""
    wire.slice(3)
    text = bytes(range(256)) * 20
    with connect(wire) as client:
        assert ask(client, text) == text
        client.sendall(b"0123456789" * 10)
        assert len(client.recv(1000)) < 100
    wire.open()


def test_a_reset_is_for_those_that_are_there(wire: Wire) -> None:
    """Reset ends every connection once; new ones are served at once."""
    with connect(wire) as client:
        assert ask(client, b"one") == b"one"
        wire.reset()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    with connect(wire) as client:
        assert ask(client, b"two") == b"two"


@pytest.mark.parametrize(("when", "arrives"), [("before", 5), ("after", 11)])
def test_a_wire_breaks_at_a_word_once(wire: Wire, echo: Echo, when: str, arrives: int) -> None:
    """Before: the server never sees the packet. After: it does, and nobody hears the answer. The next one passes."""
    with connect(wire) as client:
        assert ask(client, b"hello") == b"hello"
        wire.break_on(b"COMMIT", "before" if when == "before" else "after")
        client.sendall(b"COMMIT")
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    wait_until(lambda: echo.lost == 1, what="the server's end is closed")
    assert echo.got == arrives
    assert wire.sprung == 1
    with connect(wire) as client:
        assert ask(client, b"COMMIT") == b"COMMIT"
    assert wire.sprung == 1


def test_a_wire_to_nobody_resets(board: Switchboard) -> None:
    """While the server is down a client sees a broken connection, not silence."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        wire = board.add(Upstream(host="127.0.0.1", port=nobody.getsockname()[1]))
        with pytest.raises(ConnectionError):
            ask_new(wire)


def ask_new(wire: Wire) -> None:
    """Connect and ask; an end without an answer is an error as a reset is."""
    with connect(wire) as client:
        if ask(client, b"hello") != b"hello":
            raise ConnectionResetError


def test_an_end_passes_through_behind_the_bytes(wire: Wire, echo: Echo) -> None:
    """A client that sends and closes: the server gets everything, then the end."""
    with connect(wire) as client:
        client.sendall(b"goodbye")
    wait_until(lambda: echo.lost == 1, what="the server sees the end")
    assert echo.got == 7


def test_a_wire_carries_both_stores(
    board: Switchboard, postgres: PostgresServer, redis_server: RedisServer
) -> None:
    """PostgreSQL and Redis answer through wires to their Unix sockets, COPY and pipelines too."""
    to_postgres = board.add(Upstream(path=str(postgres.socket_folder / postgres.socket_name)))
    to_redis = board.add(Upstream(path=str(redis_server.socket_folder / redis_server.socket_name)))
    with psycopg.connect(
        make_conninfo(postgres.dsn(), host="127.0.0.1", port=to_postgres.port)
    ) as connection:
        connection.execute("create temporary table t (n integer)")
        with connection.cursor().copy("copy t from stdin") as copy:
            for number in range(10_000):
                copy.write_row((number,))
        assert connection.execute("select sum(n) from t").fetchone() == (49_995_000,)
    with redis.Redis(port=to_redis.port) as client:
        assert client.ping()
    to_postgres.cut()
    to_redis.cut()


def test_a_wire_is_fast_enough(board: Switchboard) -> None:
    """More than 100 MB/s pass: no run waits for its wires."""
    server = Echo(sink=True)
    try:
        wire = board.add(server.upstream)
        size = 300_000_000
        began = time.monotonic()
        with connect(wire) as client:
            for _ in range(size // len(CHUNK)):
                client.sendall(CHUNK)
        wait_until(lambda: server.got == size // len(CHUNK) * len(CHUNK), 30, "all bytes have arrived")
        rate = size / (time.monotonic() - began) / 1e6
        wire.cut()
    finally:
        server.close()
    assert rate > 100, f"{rate:.0f} MB/s"


def test_an_order_that_cannot_be_is_refused(board: Switchboard, wire: Wire) -> None:
    """The process answers with an error and goes on."""
    with pytest.raises(PmqdError, match="no such order"):
        board.ask({"do": "melt", "wire": wire.number})
    with pytest.raises(PmqdError, match="IndexError"):
        Wire(board, number=10_000, port=1).open()
    assert wire.connections == 0


def test_the_process_ends_with_its_owner(short_folder: Path) -> None:
    """Closed, it is gone, and orders fail with a clear error; a second close does nothing."""
    board = Switchboard(short_folder / "log")
    wire = board.add(Upstream(host="127.0.0.1", port=9))
    board.close()
    with pytest.raises((PmqdError, ValueError)):
        wire.open()
