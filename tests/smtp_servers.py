"""SMTP servers for tests: one that answers by a script, one that speaks whatever a function says."""

import contextlib
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
        return responses

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
