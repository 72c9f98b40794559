"""E-mail addresses and names as people give them, made safe for headers and for SMTP commands: pure."""

import re
import unicodedata
from email.errors import HeaderParseError
from email.headerregistry import Address

MAX_ADDRESS = 254  # RFC 5321, 4.5.3.1.3, without the angle brackets
MAX_NAME = 120

# Nearly all addresses look so: they need no parser, which takes a tenth of a millisecond.
_PLAIN = re.compile(
    r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*"
    r"@[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*"
)
UTF8_LOCAL_PART = re.compile(
    r'[^\s"(),.:;<>@\[\\\]]+(\.[^\s"(),.:;<>@\[\\\]]+)*'
)  # RFC 6531: atext and all beyond ASCII

JOINERS = (
    "\u200c\u200d"  # joiners of Persian names and of emoji: the only invisible characters that names need
)


class MessageError(ValueError):
    """This mail can never be built (bad address, unknown template, missing variable): trying again would not help."""


def checked_address(text: str) -> str:
    """An address as SMTP takes it: one mailbox, its domain in ASCII (IDNA), nothing that could end a line.

    Args:
        text: what a person or a file gave, with or without space around it.

    Raises:
        MessageError: it is not one address; the message names it.
    """
    address = text.strip()
    if not address or len(address) > MAX_ADDRESS or not address.isprintable():
        raise MessageError(
            f"e-mail address {text[:MAX_ADDRESS]!r} is empty, longer than {MAX_ADDRESS} or not printable"
        )
    if _PLAIN.fullmatch(address):
        return address
    try:
        parsed = _parsed(address)
        domain = parsed.domain.encode("idna").decode("ascii")
    except (HeaderParseError, ValueError, IndexError) as error:
        raise MessageError(f"{address!r} is not an e-mail address like name@example.com ({error})") from error
    if not parsed.username or not domain:
        raise MessageError(f"{address!r} is not an e-mail address like name@example.com")
    return Address(username=parsed.username, domain=domain).addr_spec


def _parsed(address: str) -> Address:
    """The two halves of an address; a local part beyond ASCII (RFC 6531) is taken without quotes only."""
    local, _, domain = address.rpartition("@")
    if not local.isascii() and UTF8_LOCAL_PART.fullmatch(local):
        return Address(username=local, domain=Address(addr_spec=f"x@{domain}").domain)
    return Address(addr_spec=address)


def domain_of(address: str) -> str:
    """The part of a checked address behind its last @, in lower case."""
    return address.rpartition("@")[2].lower()


def clean_name(text: str, longest: int = MAX_NAME) -> str:
    """A name or subject on one line: controls become spaces, invisible and half characters go, space runs become one.

    So nothing that came with a recipient can begin a header of its own or turn the direction of reading.
    """
    if not (text.isascii() and text.isprintable()):
        text = "".join(_visible(character) for character in text)
    return " ".join(text.split())[:longest].rstrip()


def _visible(character: str) -> str:
    category = unicodedata.category(character)
    if category in {"Cc", "Zl", "Zp", "Zs"}:
        return " "
    return "" if category in {"Cf", "Cs"} and character not in JOINERS else character
