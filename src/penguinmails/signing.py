"""DKIM signatures (RFC 6376; RFC 8463 for Ed25519): pure but for reading the key.

Own code of a page over the library `cryptography`, because the library for DKIM computes RSA in Python: 6.5 ms a mail
instead of 0.25, and in a time that depends on the key. The tests let that library check what is signed here.
"""

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_private_key

MIN_RSA_BITS = 2048  # RFC 8301, 3.2: signers should use at least so many
LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?")

SIGNED = (
    "from",
    "reply-to",
    "to",
    "cc",
    "subject",
    "date",
    "message-id",
    "in-reply-to",
    "references",
    "mime-version",
    "content-type",
    "content-transfer-encoding",
    "list-unsubscribe",
    "list-unsubscribe-post",
    "feedback-id",
)
"""RFC 6376, 5.4.1, with what RFC 8058, 4 demands and the mailbox providers want of Feedback-ID.

Each is named once for each time it is there, and once more: so nobody on the way can add a second From, a Reply-To or
another List-Unsubscribe without breaking the signature (RFC 6376, 5.4.2 and 8.15)."""

LINE = 72
FOLD = "\r\n "

_FIELD_ENDS = re.compile(rb"\r\n(?![ \t])")
_SPACES = re.compile(rb"[ \t]+")
_TRAILING = re.compile(rb"[ \t]+\r\n")


class SigningError(ValueError):
    """The key cannot be used; names the file or the name that is wrong."""


@dataclass(frozen=True, slots=True)
class Signer:
    """One key of a domain: its public half stands in the DNS at `SELECTOR._domainkey.DOMAIN`."""

    domain: str
    selector: str
    key: RSAPrivateKey | Ed25519PrivateKey = field(repr=False)

    def header_for(self, message: bytes, date: datetime) -> bytes:
        """The DKIM-Signature field for a message, with its line end: it goes before all other fields.

        Args:
            message: the whole message, its lines ended by CR LF.
            date: when it is signed, with a time zone.
        """
        head, _, body = message.partition(b"\r\n\r\n")
        fields = _fields(head)
        names = _named(fields)
        algorithm = "rsa-sha256" if isinstance(self.key, RSAPrivateKey) else "ed25519-sha256"
        body_hash = base64.b64encode(hashlib.sha256(_relaxed_body(body)).digest()).decode("ascii")
        tags = FOLD.join(
            (
                f"v=1; a={algorithm}; c=relaxed/relaxed; d={self.domain};",
                f"s={self.selector}; t={int(date.timestamp())};",
                f"h={_folded(names)};",
                f"bh={body_hash};",
                "b=",
            )
        )
        own = _relaxed("DKIM-Signature", tags.encode("ascii")).removesuffix(b"\r\n")
        signature = base64.b64encode(self._signature(b"".join(_chosen(fields, names)) + own)).decode("ascii")
        lines = (signature[start : start + LINE] for start in range(0, len(signature), LINE))
        return f"DKIM-Signature: {tags}{FOLD.join(lines)}\r\n".encode("ascii")

    def _signature(self, data: bytes) -> bytes:
        if isinstance(self.key, RSAPrivateKey):
            return self.key.sign(data, PKCS1v15(), SHA256())
        return self.key.sign(hashlib.sha256(data).digest())  # RFC 8463, 3: the hash is what is signed


def load_signer(file: Path, *, domain: str, selector: str) -> Signer:
    """The signer with the private key in `file`.

    Args:
        file: PEM without a passphrase (PKCS #8 or PKCS #1): RSA of at least 2048 bits, or Ed25519.
        domain: the one that answers for the mails; that of the From address, or one above it, for DMARC.
        selector: the key's name under that domain.

    Raises:
        SigningError: names the file, domain or selector, and what is allowed.
    """
    for kind, name in (("domain", domain), ("selector", selector)):
        if not all(LABEL.fullmatch(label) for label in name.split(".")):
            raise SigningError(f"DKIM {kind} {name!r} is not a name for the DNS")
    try:
        key = load_pem_private_key(file.read_bytes(), password=None)
    except OSError as error:
        raise SigningError(f"DKIM key {file}: {error.strerror}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SigningError(f"DKIM key {file} is not a private key in PEM without a passphrase") from error
    if isinstance(key, RSAPrivateKey) and key.key_size < MIN_RSA_BITS:
        raise SigningError(f"DKIM key {file} has {key.key_size} bits, must have {MIN_RSA_BITS} or more")
    if not isinstance(key, RSAPrivateKey | Ed25519PrivateKey):
        raise SigningError(f"DKIM key {file} is neither RSA nor Ed25519")
    return Signer(domain, selector, key)


def _fields(head: bytes) -> list[tuple[str, bytes]]:
    """The header fields in their order: name in lower case, and what stands behind the colon, folded as it is."""
    fields: list[tuple[str, bytes]] = []
    for part in _FIELD_ENDS.split(head):
        name, _, value = part.partition(b":")
        fields.append((name.decode("ascii").lower(), value))
    return fields


def _named(fields: list[tuple[str, bytes]]) -> list[str]:
    there = Counter(name for name, _ in fields)
    return [name for name in SIGNED for _ in range(there[name] + 1)]


def _chosen(fields: list[tuple[str, bytes]], names: list[str]) -> Iterator[bytes]:
    """The fields that `names` mean: of several of one name the last one first (RFC 6376, 5.4.2)."""
    values: dict[str, list[bytes]] = {}
    for name, value in fields:
        values.setdefault(name, []).append(value)
    for name in names:
        if values.get(name):
            yield _relaxed(name, values[name].pop())


def _relaxed(name: str, value: bytes) -> bytes:
    """RFC 6376, 3.4.2."""
    return (
        name.lower().encode("ascii")
        + b":"
        + _SPACES.sub(b" ", value.replace(b"\r\n", b"")).strip(b" ")
        + b"\r\n"
    )


def _relaxed_body(body: bytes) -> bytes:
    """RFC 6376, 3.4.4."""
    lines = _SPACES.sub(b" ", _TRAILING.sub(b"\r\n", body + b"\r\n")).rstrip(b"\r\n")
    return lines + b"\r\n" if lines else b""


def _folded(names: list[str]) -> str:
    """The names with colons between, in lines of bounded length."""
    lines = [""]
    for number, name in enumerate(names):
        piece = name if number == len(names) - 1 else f"{name}:"
        if len(lines[-1]) + len(piece) > LINE - len("h=;"):
            lines.append("")
        lines[-1] += piece
    return FOLD.join(lines)
