"""The web socket, bound by the master."""

import socket

from pmqd.config import split_listen
from pmqd.errors import ConfigError


def listen(address: str) -> socket.socket:
    """Bind the web socket, before any fork, so that it outlives the child that answers on it.

    Args:
        address: `host:port`.

    Raises:
        ConfigError: the address cannot be bound.
    """
    host, port = split_listen(address)
    made = None
    try:
        family, kind, protocol, _, bound = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(bound)
        made.listen(128)
    except OSError as error:
        if made is not None:
            made.close()
        raise ConfigError(f"web.listen = {address!r}: {error.strerror or error}") from error
    return made
