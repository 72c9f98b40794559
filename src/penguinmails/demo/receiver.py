"""An SMTP server that takes mails, or refuses some, and remembers who got what, on a free loopback port."""

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email import message_from_bytes
from email.header import decode_header, make_header

from aiosmtpd.smtp import SMTP, Envelope, Session


@dataclass
class Hold:
    """A conversation that the server does not answer: the whole mail has come, the yes has not been said."""

    recipient: str
    client_port: int
    loop: asyncio.AbstractEventLoop
    released: asyncio.Event = field(default_factory=asyncio.Event)

    def release(self) -> None:
        """End the conversation, from any thread."""
        self.loop.call_soon_threadsafe(self.released.set)


@dataclass
class Receiver:
    """What arrived, and one planned interruption. Written by the server's thread, read by others.

    Attributes:
        answer_delay_seconds: how long the server takes to think about each mail.
        refuse: the reply to a recipient who is not wanted, such as `550 5.1.1 no such user`; None takes him.
        hold_at: once so many mails were accepted, the next one is held without an answer.
        hold: the held conversation, once there is one.
        accepted: mails that the server said yes to, by recipient.
        subjects: the subject of each recipient's mail.
        refused: who was not taken, as often as he was tried.
        message_ids: all Message-IDs, as often as they came.
        headers: the header of each recipient's mail, for what comes back.
    """

    answer_delay_seconds: float = 0.0
    refuse: Callable[[str], str | None] = lambda _recipient: None
    hold_at: int | None = None
    hold: Hold | None = None
    port: int = 0
    accepted: Counter[str] = field(default_factory=Counter)
    subjects: dict[str, str] = field(default_factory=dict)
    message_ids: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    headers: dict[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def count(self) -> int:
        """How many mails were accepted."""
        return self.accepted.total()

    async def handle_EHLO(  # noqa: N802 - aiosmtpd's names
        self, _server: SMTP, session: Session, _envelope: Envelope, hostname: str, responses: list[str]
    ) -> list[str]:
        """What the server can do: aiosmtpd reads commands that come in one write, but does not say so."""
        session.host_name = hostname
        return [*responses[:-1], "250-PIPELINING", responses[-1]]

    async def handle_RCPT(  # noqa: N802 - aiosmtpd's names
        self, _server: SMTP, _session: Session, envelope: Envelope, address: str, _options: list[str]
    ) -> str:
        """The answer to a recipient."""
        refusal = self.refuse(address)
        if refusal is not None:
            self.refused[address] += 1
            return refusal
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 go on"

    async def handle_DATA(self, _server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802 - aiosmtpd's name
        """The answer to a whole mail: yes, or nothing for the held one."""
        if self.answer_delay_seconds:
            await asyncio.sleep(self.answer_delay_seconds)
        if self.hold_at is not None and self.count >= self.hold_at and self.hold is None:
            self.hold = Hold(envelope.rcpt_tos[0], session.peer[1], asyncio.get_running_loop())
            await self.hold.released.wait()
            return "451 4.3.0 not accepted"
        assert isinstance(envelope.content, bytes)
        message = message_from_bytes(envelope.content)
        recipient = envelope.rcpt_tos[0]
        self.subjects[recipient] = str(make_header(decode_header(message["Subject"])))
        self.message_ids[message["Message-ID"]] += 1
        self.headers[recipient] = envelope.content.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
        self.accepted[recipient] += 1
        return "250 2.0.0 taken"


@contextlib.contextmanager
def receiving(receiver: Receiver) -> Iterator[Receiver]:
    """The server, for as long as the block runs; `receiver.port` says where it listens."""
    loop = asyncio.new_event_loop()
    started = threading.Event()
    thread = threading.Thread(target=_serve, args=(loop, receiver, started), name="receiver", daemon=True)
    thread.start()
    started.wait(10)
    try:
        yield receiver
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def _serve(loop: asyncio.AbstractEventLoop, receiver: Receiver, started: threading.Event) -> None:
    asyncio.set_event_loop(loop)

    def conversation() -> SMTP:
        return SMTP(receiver, enable_SMTPUTF8=True, hostname="receiver.localhost", loop=loop)

    server = loop.run_until_complete(loop.create_server(conversation, "127.0.0.1", 0))
    receiver.port = server.sockets[0].getsockname()[1]
    started.set()
    try:
        loop.run_forever()
    finally:
        server.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
