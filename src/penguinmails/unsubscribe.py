"""Unsubscribing: the headers of RFC 2369 and RFC 8058, and the token that stands in a recipient's own link: pure.

The token is the delivery's id with a keyed hash of it, so that nobody can unsubscribe somebody else by guessing, and no
address stands in a link. It never expires: a mail may be read, and its button pressed, years later.
"""

import base64
import binascii
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import quote, urlsplit
from uuid import UUID

from penguinmails.addresses import checked_address

PLACE = "{token}"
MIN_KEY_BYTES = 16
MAX_URL = 800  # characters, without the token: a header line has at most 998 (RFC 5322, 2.1.1), and it cannot be folded
_ID_BYTES = 16
_HASH_BYTES = 16
_PURPOSE = b"penguinmails unsubscribe 1 "  # the same key makes no other token of the same bytes


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    """Where recipients unsubscribe.

    Attributes:
        url: an https address with `{token}` in it once. A POST to it with `List-Unsubscribe=One-Click` as its body
            must unsubscribe without a further question (RFC 8058, 3.1).
        keys: secrets of at least 16 bytes. The first one makes tokens; all are taken, so that a key can be replaced.
        mailto: an address to which a mail may be sent instead, its subject `unsubscribe TOKEN`; empty for none.
    """

    url: str
    keys: tuple[bytes, ...] = field(repr=False)
    mailto: str = ""

    def __post_init__(self) -> None:
        """Refuse what no mail program would take.

        Raises:
            ValueError: names what is wrong.
        """
        parts = urlsplit(self.url)
        printable = self.url.isascii() and self.url.isprintable() and not set(self.url) & set(' <>"')
        if parts.scheme != "https" or not parts.hostname or not printable or len(self.url) > MAX_URL:
            raise ValueError(
                f"unsubscribe URL {self.url!r} is not an https address of plain ASCII (RFC 8058)"
            )
        if self.url.count(PLACE) != 1:
            raise ValueError(
                f"unsubscribe URL {self.url!r} has {PLACE} {self.url.count(PLACE)} times, must once"
            )
        if not self.keys or min(len(key) for key in self.keys) < MIN_KEY_BYTES:
            raise ValueError(f"unsubscribe key: none, or shorter than {MIN_KEY_BYTES} bytes")
        if self.mailto:
            checked_address(self.mailto)

    def url_for(self, delivery: UUID) -> str:
        """The recipient's own link."""
        return self.url.replace(PLACE, unsubscribe_token(delivery, self.keys[0]))

    def headers_for(self, delivery: UUID) -> tuple[str, ...]:
        """The header fields, each with its line ends inside but none behind it."""
        ways = f"List-Unsubscribe: <{self.url_for(delivery)}>"
        if self.mailto:
            subject = quote(f"unsubscribe {unsubscribe_token(delivery, self.keys[0])}")
            ways += f",\r\n <mailto:{quote(self.mailto, safe='@')}?subject={subject}>"
        return ways, "List-Unsubscribe-Post: List-Unsubscribe=One-Click"


class UnsubscribeTokenError(ValueError):
    """This token was not made by us, or with a key that is no longer taken."""


def unsubscribe_token(delivery: UUID, key: bytes) -> str:
    """The delivery's token: 43 characters of the URL-safe base64 alphabet.

    Args:
        delivery: from `penguinmails.message.delivery_id`.
        key: the secret.
    """
    token = delivery.bytes + _hash(delivery.bytes, key)
    return base64.urlsafe_b64encode(token).rstrip(b"=").decode("ascii")


def read_unsubscribe_token(token: str, keys: Sequence[bytes]) -> UUID:
    """The delivery whose token this is.

    Args:
        token: as it came, from anybody.
        keys: all secrets that are taken.

    Raises:
        UnsubscribeTokenError: it is not one that was made with one of the keys. The message does not repeat it.
    """
    try:
        raw = base64.b64decode(f"{token}=".encode("ascii"), altchars=b"-_", validate=True)
    except (UnicodeEncodeError, binascii.Error) as error:
        raise UnsubscribeTokenError("not an unsubscribe token: other characters than it has") from error
    delivery, said = raw[:_ID_BYTES], raw[_ID_BYTES:]
    if len(said) != _HASH_BYTES or not any(hmac.compare_digest(said, _hash(delivery, key)) for key in keys):
        raise UnsubscribeTokenError("not an unsubscribe token that was made with one of the keys")
    return UUID(bytes=delivery)


def _hash(delivery: bytes, key: bytes) -> bytes:
    return hmac.digest(key, _PURPOSE + delivery, "sha256")[:_HASH_BYTES]
