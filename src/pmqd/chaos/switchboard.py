"""The process that passes the bytes of all wires: one loop, orders on standard input, an answer for each.

A wire is a listening port and a server behind it; a connection is two flows, one each way. What a flow may not pass on
yet (its sink is full, the wire is slow) waits in the flow, and the source is not read while much of it waits: so a slow
reader slows its writer, as without a wire between them.
"""

import contextlib
import errno
import json
import os
import select
import socket
import struct
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from pmqd.chaos.machine import free_port

CHUNK = 1 << 18
FULL = 1 << 20
PIECES_A_TURN = 64
PACED_PIECES = 50
PACE_SECONDS = 0.0005
"""On a sliced wire so many pieces of a burst come one by one: the kernel would put them together again."""

_LINGER_ZERO = struct.pack("ii", 1, 0)


@dataclass(eq=False)
class Line:
    """One wire: where it listens, where it leads, what is done to it now."""

    number: int
    listener: socket.socket
    family: socket.AddressFamily
    address: str | tuple[str, int]
    mode: str = "open"
    delay: float = 0.0
    slice: int = 0
    deaf: set[str] = field(default_factory=set)
    trap: tuple[bytes, str] | None = None
    sprung: int = 0
    connections: set["Connection"] = field(default_factory=set)

    @property
    def plain(self) -> bool:
        """Does everything pass at once?"""
        return not self.delay and not self.slice


@dataclass(eq=False)
class Connection:
    """A client, its twin to the server, and what flows between them."""

    line: Line
    client: socket.socket
    server: socket.socket
    connected: bool = False
    doomed: bool = False  # the server has what the client sent; its answer is not to be heard

    def __post_init__(self) -> None:
        self.up = Flow(self, self.client, self.server, "server")
        self.down = Flow(self, self.server, self.client, "client")


@dataclass(eq=False)
class Flow:
    """One direction: bytes on their way from a source to a sink, each with the moment from which it may arrive."""

    connection: Connection
    source: socket.socket
    sink: socket.socket
    to: str
    waiting: deque[tuple[float, memoryview]] = field(default_factory=deque)
    size: int = 0
    pieces: int = 0  # sent one by one since nothing waited
    blocked: bool = False
    ended: bool = False

    @property
    def stopped(self) -> bool:
        """Is nothing to pass in this direction?"""
        return self.connection.line.mode == "held" or self.to in self.connection.line.deaf

    @property
    def reads(self) -> bool:
        """Is the source to be read?"""
        ready = self.connection.connected and not self.stopped and not self.ended
        return ready and self.size < FULL


class Board:
    """The loop."""

    def __init__(self, orders: int, answers: int) -> None:
        self._orders, self._answers = orders, answers
        self._rest = b""
        self._lines: list[Line] = []
        self._poll = select.epoll()
        self._masks: dict[int, int] = {}
        self._listeners: dict[int, Line] = {}
        self._ends: dict[
            int, tuple[Flow, Flow]
        ] = {}  # by socket: the flow that it feeds, the flow that ends in it
        self._timed: set[Flow] = set()
        self._buffer = memoryview(bytearray(CHUNK))
        os.set_blocking(orders, False)
        self._watch(orders, select.EPOLLIN)

    def run(self) -> None:
        """Pass bytes and take orders until standard input ends."""
        while True:
            for fd, mask in self._poll.poll(self._patience()):
                if fd == self._orders:
                    if not self._take_orders():
                        return
                elif fd in self._listeners:
                    self._accept(self._listeners[fd])
                elif fd in self._ends:
                    self._serve(fd, mask)
            now = time.monotonic()
            for flow in list(self._timed):
                if flow in self._timed:
                    self._pump(flow, now)

    def _patience(self) -> float | None:
        if not self._timed:
            return None
        first = min(flow.waiting[0][0] for flow in self._timed)
        return max(0.0, first - time.monotonic())

    # --- orders

    def _take_orders(self) -> bool:
        data = os.read(self._orders, 65536)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            order = json.loads(line)
            try:
                answer = self._add(order) if order["do"] == "add" else self._obey(order)
            except (OSError, KeyError, IndexError, ValueError) as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            os.write(self._answers, json.dumps(answer).encode() + b"\n")
        return bool(data)

    def _add(self, order: dict[str, Any]) -> dict[str, Any]:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # A port named in bind() stays bound while the wire is cut and nobody listens; a port of the kernel's choice not.
        listener.bind(("127.0.0.1", free_port()))
        listener.listen(1024)
        listener.setblocking(False)
        family, address = _address(order)
        line = Line(len(self._lines), listener, family, address)
        self._lines.append(line)
        self._listeners[listener.fileno()] = line
        self._watch(listener.fileno(), select.EPOLLIN)
        return {"wire": line.number, "listens": listener.getsockname()[1]}

    def _obey(self, order: dict[str, Any]) -> dict[str, Any]:
        line = self._lines[order["wire"]]
        match order["do"]:
            case "open":
                self._set_mode(line, "open")
                line.delay, line.slice, line.trap = 0.0, 0, None
                line.deaf.clear()
            case "cut" | "hold":
                self._set_mode(line, "cut" if order["do"] == "cut" else "held")
            case "delay":
                line.delay = float(order["seconds"])
            case "slice":
                line.slice = int(order["size"])
            case "deaf":
                line.deaf.add(order["side"])
            case "break_on":
                line.trap = order["words"].encode("latin-1"), order["when"]
            case "reset":
                self._reset_all(line)
            case "look":
                pass
            case other:
                raise ValueError(f"no such order: {other}")
        for connection in list(line.connections):
            self._refresh(connection)
        return {"sprung": line.sprung, "connections": len(line.connections)}

    def _set_mode(self, line: Line, mode: str) -> None:
        if line.mode == "cut" and mode != "cut":
            line.listener.listen(1024)
        if mode == "cut" and line.mode != "cut":
            line.listener.shutdown(socket.SHUT_RD)  # stays bound and listens no more: the kernel refuses
            self._reset_all(line)
        line.mode = mode
        self._watch(line.listener.fileno(), select.EPOLLIN if mode == "open" else 0)

    def _reset_all(self, line: Line) -> None:
        for connection in list(line.connections):
            self._drop(connection, reset=True)

    # --- connections

    def _accept(self, line: Line) -> None:
        with contextlib.suppress(BlockingIOError):
            client, _ = line.listener.accept()
            client.setblocking(False)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            server = socket.socket(line.family)
            server.setblocking(False)
            failed = server.connect_ex(line.address)
            if failed not in (0, errno.EINPROGRESS):  # the server is down
                _close(client, reset=True)
                server.close()
                return
            connection = Connection(line, client, server, connected=failed == 0)
            line.connections.add(connection)
            self._ends[client.fileno()] = connection.up, connection.down
            self._ends[server.fileno()] = connection.down, connection.up
            self._refresh(connection)

    def _serve(self, fd: int, mask: int) -> None:
        feeds, ends_here = self._ends[fd]
        connection = feeds.connection
        if not connection.connected:
            self._connected(connection)
            return
        if mask & (select.EPOLLOUT | select.EPOLLERR | select.EPOLLHUP) and ends_here.blocked:
            ends_here.blocked = False
            self._pump(ends_here, time.monotonic())
        if fd in self._ends and mask & ~select.EPOLLOUT:
            if feeds.reads:
                self._read(feeds)
            elif not feeds.stopped and mask & (select.EPOLLERR | select.EPOLLHUP):
                self._drop(connection, reset=True)

    def _connected(self, connection: Connection) -> None:
        if connection.server.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._drop(connection, reset=True)
            return
        connection.server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.connected = True
        self._refresh(connection)

    def _read(self, flow: Flow) -> None:
        line = flow.connection.line
        try:
            got = flow.source.recv_into(self._buffer)
        except BlockingIOError:
            return
        except OSError:
            self._drop(flow.connection, reset=True)
            return
        data = self._buffer[:got]
        if not got:
            flow.ended = True
            self._pump(flow, time.monotonic())
        elif flow.to == "client" and flow.connection.doomed:
            self._drop(flow.connection, reset=True)
        elif not (flow.to == "server" and line.trap and self._springs(flow, line, data)):
            self._pass_on(flow, data)

    def _springs(self, flow: Flow, line: Line, data: memoryview) -> bool:
        """Whether a trap took the packet; a wire that breaks afterwards lets it through."""
        assert line.trap is not None
        words, when = line.trap
        if words not in bytes(data):
            return False
        line.trap, line.sprung = None, line.sprung + 1
        if when == "after":
            flow.connection.doomed = True
            return False
        self._drop(flow.connection, reset=True)
        return True

    def _pass_on(self, flow: Flow, data: memoryview) -> None:
        line = flow.connection.line
        sent = 0
        if line.plain and not flow.waiting:
            try:
                sent = flow.sink.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._drop(flow.connection, reset=True)
                return
        if sent < len(data):
            flow.waiting.append((time.monotonic() + line.delay, memoryview(bytes(data[sent:]))))
            flow.size += len(data) - sent
            flow.blocked = line.plain and len(flow.waiting) == 1
            self._refresh(flow.connection)

    def _pump(self, flow: Flow, now: float) -> None:
        """Send what waits and is due; a few pieces a turn, so that one sliced wire does not stop the others."""
        size = flow.connection.line.slice or CHUNK
        for _ in range(PIECES_A_TURN):
            if not flow.waiting or flow.waiting[0][0] > now or flow.blocked or flow.stopped:
                break
            due, data = flow.waiting.popleft()
            try:
                sent = flow.sink.send(data[:size])
            except BlockingIOError:
                sent, flow.blocked = 0, True
            except OSError:
                self._drop(flow.connection, reset=True)
                return
            flow.size -= sent
            if sent < len(data):
                if flow.connection.line.slice and sent and flow.pieces < PACED_PIECES:
                    flow.pieces, due = flow.pieces + 1, now + PACE_SECONDS
                flow.waiting.appendleft((due, data[sent:]))
        if not flow.waiting:
            flow.pieces = 0
        if flow.ended and not flow.waiting:
            self._drop(flow.connection, reset=False)
        else:
            self._refresh(flow.connection)

    def _drop(self, connection: Connection, *, reset: bool) -> None:
        connection.line.connections.discard(connection)
        for end in (connection.client, connection.server):
            self._watch(end.fileno(), 0)
            self._ends.pop(end.fileno(), None)
        self._timed -= {connection.up, connection.down}
        _close(connection.server, reset=reset)
        _close(connection.client, reset=reset)

    # --- what is watched

    def _refresh(self, connection: Connection) -> None:
        """Watch both ends for what may happen to them now. An end that waits for nothing is not watched at all."""
        if connection not in connection.line.connections:
            return
        for flow, back in ((connection.up, connection.down), (connection.down, connection.up)):
            mask = select.EPOLLIN if flow.reads else 0
            if back.blocked and not back.stopped:
                mask |= select.EPOLLOUT
            if not connection.connected and flow.source is connection.server:
                mask = select.EPOLLOUT
            self._watch(flow.source.fileno(), mask)
            if flow.waiting and not flow.blocked and not flow.stopped:
                self._timed.add(flow)
            else:
                self._timed.discard(flow)

    def _watch(self, fd: int, mask: int) -> None:
        before = self._masks.get(fd, 0)
        if mask == before:
            return
        if not mask:
            self._poll.unregister(fd)
            del self._masks[fd]
            return
        if before:
            self._poll.modify(fd, mask)
        else:
            self._poll.register(fd, mask)
        self._masks[fd] = mask


def _address(order: dict[str, Any]) -> tuple[socket.AddressFamily, str | tuple[str, int]]:
    if order["path"]:
        return socket.AF_UNIX, order["path"]
    found = socket.getaddrinfo(order["host"], order["port"], type=socket.SOCK_STREAM)[0]
    return socket.AddressFamily(found[0]), (str(found[4][0]), int(found[4][1]))


def _close(end: socket.socket, *, reset: bool) -> None:
    if reset:
        with contextlib.suppress(OSError):  # linger of zero seconds: close sends RST, not FIN
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
    end.close()


if __name__ == "__main__":
    Board(sys.stdin.fileno(), sys.stdout.fileno()).run()
