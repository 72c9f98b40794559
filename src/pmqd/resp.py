"""Many small commands to Redis in one sending, in its own protocol (RESP), and their answers.

For commands that are answered by one line each, such as HSET, EXPIRE and DEL. A client's pipeline packs and reads them one
by one, which takes ten times as long; a script that is given them all as arguments makes Redis copy each of them twice.
"""

import re
from typing import Any, Final

import redis

_ERROR = re.compile(rb"(?m)^-([^\r]*)\r$")
_CHUNK: Final = 65536


def command(*words: str) -> str:
    """A command: its name and arguments, each of any length."""
    return f"*{len(words)}\r\n" + "".join(map(bulk, words))


def bulk(word: str) -> str:
    """One argument, with its length in bytes (UTF-8) before it."""
    return f"${len(word) if word.isascii() else len(_encoded(word))}\r\n{word}\r\n"


def send(connection: Any, commands: str, count: int) -> None:
    """Sends commands and waits until each is answered.

    Args:
        connection: redis-py's, connected, with nothing outstanding.
        commands: One after the other, from `command`.
        count: How many.

    Raises:
        redis.ResponseError: One was refused; the others were done.
        redis.ConnectionError: The server ended the connection.
        OSError: As the socket says. After all of these but the first the connection cannot be used any more.
    """
    connection.send_packed_command([_encoded(commands)])
    answers = b""
    while answers.count(b"\r\n") < count:
        part = connection._sock.recv(_CHUNK)  # noqa: SLF001 - its parser takes longer than Redis does
        if not part:
            raise redis.ConnectionError("the server ended the connection")
        answers += part
    refused = _ERROR.search(answers)
    if refused:
        raise redis.ResponseError(refused[1].decode(errors="replace"))


def _encoded(text: str) -> bytes:
    return text.encode(errors="replace")
