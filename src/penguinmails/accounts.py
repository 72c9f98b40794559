"""The account at a provider: where and as whom mails are handed over."""

import ipaddress
import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from pydantic import ConfigDict

from penguinmails.addresses import checked_address, clean_name

DEFAULT_ACCOUNT = "default"
HELO_NAME = re.compile(r"[A-Za-z0-9.:\[\]-]*")


class AccountError(ValueError):
    """There is no account of this name; the message says which there are."""


class Security(StrEnum):
    """What protects the conversation with the SMTP server; certificates are always verified."""

    NONE = "none"
    STARTTLS = "starttls"
    TLS = "tls"


@dataclass(frozen=True, slots=True)
class Account:
    """All that makes two connections exchangeable.

    Attributes:
        host: the server's name or address; its certificate must be for it.
        port: its port.
        security: none, STARTTLS (RFC 3207) or TLS from the first byte (RFC 8314).
        username: for AUTH (RFC 4954); empty: no login.
        password: for AUTH.
        ca_file: certificates to trust instead of the machine's own authorities.
        timeout_seconds: how long one step may take: to connect, to answer a command, to take 64 kB of a mail.
        helo_name: what this host calls itself; empty: its own name.
        name: the account's name among several.
        from_address: the sender of mails over this account; empty: the one of the settings.
        from_name: the sender's name, where there is a `from_address`.
        mails_per_connection: after so many a connection is closed; servers and what stands before them have limits.
        idle_seconds: a connection that has been idle for longer is not used again. Firewalls forget connections
            without a word; servers close after five minutes (RFC 5321, 4.5.3.2.7).
    """

    host: str
    port: int
    security: Security = Security.NONE
    username: str = ""
    password: str = field(default="", repr=False)
    ca_file: Path | None = None
    timeout_seconds: float = 10.0
    helo_name: str = ""
    name: str = DEFAULT_ACCOUNT
    from_address: str = ""
    from_name: str = ""
    mails_per_connection: int = 100
    idle_seconds: float = 30.0

    __pydantic_config__ = ConfigDict(extra="forbid")  # for those that come from the settings

    def __post_init__(self) -> None:
        """Refuse what cannot work, and a password that others could read on its way.

        Raises:
            ValueError: names the account, the field, its value and what is allowed.
        """
        checks = (
            ("host", self.host, bool(self.host), "not empty"),
            ("port", self.port, 1 <= self.port <= 65535, "1 to 65535"),
            (
                "timeout_seconds",
                self.timeout_seconds,
                0 < self.timeout_seconds <= 600,
                "above 0, at most 600",
            ),
            (
                "helo_name",
                self.helo_name,
                bool(HELO_NAME.fullmatch(self.helo_name)),
                "letters, digits, .:[]-",
            ),
            ("mails_per_connection", self.mails_per_connection, self.mails_per_connection >= 1, "1 or more"),
            ("idle_seconds", self.idle_seconds, self.idle_seconds >= 0, "0 or more"),
        )
        for what, value, good, allowed in checks:
            if not good:
                raise ValueError(f"account {self.name!r}: {what} is {value!r}, allowed: {allowed}")
        if self.from_address:
            object.__setattr__(self, "from_address", checked_address(self.from_address))
        object.__setattr__(self, "from_name", clean_name(self.from_name))
        if self.username and self.security is Security.NONE and not _is_loopback(self.host):
            raise ValueError(
                f"account {self.name!r}: username is set, but security is 'none' and host {self.host!r} is another machine: "
                "choose 'starttls' or 'tls', so that the password is not sent in the clear"
            )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
