"""SMTP servers for tests: one that answers by a script, one that speaks whatever a function says."""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session


class Scripted:
    """A handler whose replies are taken from lists, by verb; "drop" breaks the connection, none left means yes."""

    def __init__(self, **replies: list[str]) -> None:
        self.replies = replies
        self.received: list[bytes] = []
        self.peers: list[Any] = []
        self.conversations = 0
        self.pipelining = False

    def _reply(self, verb: str, server: SMTP, default: str) -> str:
        scripted = self.replies.get(verb)
        reply = scripted.pop(0) if scripted else default
        if reply.startswith("drop"):
            assert server.transport is not None
            server.transport.abort()
        return reply

    async def handle_EHLO(  # noqa: N802 - aiosmtpd's names
        self, server: SMTP, session: Session, envelope: Envelope, hostname: str, responses: list[str]
    ) -> list[str]:
        """Count the connections."""
        self.conversations += 1
        self.peers.append(session.peer)
        session.host_name = hostname
        return [*responses[:-1], "250-PIPELINING", responses[-1]] if self.pipelining else responses

    async def handle_MAIL(  # noqa: N802
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        """Answer MAIL FROM."""
        reply = self._reply("mail", server, "250 ok")
        if reply.startswith("250"):
            envelope.mail_from = address
        return reply

    async def handle_RCPT(  # noqa: N802
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        """Answer RCPT TO."""
        reply = self._reply("rcpt", server, "250 ok")
        if reply.startswith("250"):
            envelope.rcpt_tos.append(address)
        return reply

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802
        """Answer the end of the data; keep what was accepted."""
        reply = self._reply("answer", server, "250 2.0.0 taken")
        if reply.startswith("250"):
            assert isinstance(envelope.content, bytes)
            self.received.append(envelope.content)
        return reply


@contextlib.contextmanager
def serving(handler: object, **options: Any) -> Iterator[Controller]:
    """An aiosmtpd server on a free loopback port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    controller = Controller(handler, hostname="127.0.0.1", port=port, server_hostname="mx.test", **options)
    controller.start()
    try:
        yield controller
    finally:
        controller.stop()


@contextlib.contextmanager
def raw_server(converse: Callable[[socket.socket], None]) -> Iterator[tuple[str, int]]:
    """A server that speaks what `converse` says, one connection after another."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        converse(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def speak(connection: socket.socket, *lines: bytes) -> None:
    """Send the first line; then one line after each thing that came."""
    connection.sendall(lines[0] + b"\r\n")
    for line in lines[1:]:
        connection.recv(65536)
        connection.sendall(line + b"\r\n")


@contextlib.contextmanager
def interrupted(error: BaseException) -> Iterator[Callable[[], None]]:
    """Raises this in the thread that it is called in, when the server's thread calls what it gives."""

    def interrupt(*_: object) -> None:
        raise error

    before = signal.signal(signal.SIGUSR1, interrupt)
    me = threading.get_ident()
    try:
        yield lambda: signal.pthread_kill(me, signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)


class Lines:
    """A server that answers line by line as `says` tells, whatever came in one write; its connections run side by side.

    `says` gets each command, and b"." for the end of a message; None breaks the connection, b"" says nothing.
    """

    def __init__(self, says: Callable[[bytes], bytes | None], extensions: tuple[bytes, ...] = ()) -> None:
        self._says = says
        self._extensions = extensions
        self.writes: list[bytes] = []
        self.messages: list[bytes] = []
        self.connections = 0
        self.cut = 0
        self._ended = threading.Condition()

    def wait_for_ends(self, count: int) -> None:
        """Until so many conversations have ended."""
        with self._ended:
            assert self._ended.wait_for(lambda: self.cut >= count, 10)

    @contextlib.contextmanager
    def running(self) -> Iterator[tuple[str, int]]:
        """The server, for as long as the block runs."""
        with raw_server(self._accept) as address:
            yield address

    def _accept(self, connection: socket.socket) -> None:
        self.connections += 1
        own = connection.dup()
        threading.Thread(target=self._converse, args=(own,), daemon=True).start()

    def _converse(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            if self._answer(connection, b"") is not None:
                self._listen(connection)
        with self._ended:
            self.cut += 1
            self._ended.notify_all()

    def _listen(self, connection: socket.socket) -> None:
        unread, message = b"", b""
        in_data = False
        while got := connection.recv(65536):
            self.writes.append(got)
            unread += got
            while b"\r\n" in unread:
                line, _, unread = unread.partition(b"\r\n")
                if in_data and line != b".":
                    message += line + b"\r\n"
                    continue
                if in_data:
                    self.messages.append(message)
                    message = b""
                said = self._answer(connection, line[:4].upper() + line[4:])
                if said is None:
                    return
                in_data = said.startswith(b"354")

    def _answer(self, connection: socket.socket, line: bytes) -> bytes | None:
        said = self._says(line)
        if said is None:
            connection.shutdown(socket.SHUT_RDWR)
            return None
        if said == b"yes":
            said = self._yes(line)
        if said:
            connection.sendall(said + b"\r\n")
        return said

    def _yes(self, line: bytes) -> bytes:
        match line[:4]:
            case b"":
                return b"220 hello"
            case b"EHLO":
                return (
                    b"\r\n".join(b"250-" + each for each in (b"mx.test", *self._extensions)) + b"\r\n250 HELP"
                )
            case b"DATA":
                return b"354 go on"
            case b"QUIT":
                return b"221 bye"
        return b"250 2.0.0 ok"
