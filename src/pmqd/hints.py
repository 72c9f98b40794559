"""Hints: what stands in the lists of Redis, and which job a member names. Pure."""

from binascii import unhexlify
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from pmqd import codec
from pmqd.job import uuid_of

_HINT_BYTES: Final = 1024 * 1024  # longer members are no hints: a payload has at most 256 KiB


@dataclass(slots=True)
class Hint:
    """A popped list member that names a job. `member` is what stood in the list, to be given back as it was. Never changed."""

    key: str
    id: UUID
    member: bytes


def hinted_id(member: object) -> UUID | None:
    """The job that a list member names; None where it names none.

    Args:
        member: What stood in the list: the id's 36 characters, or a JSON object with `id`.
    """
    if not isinstance(member, bytes) or len(member) > _HINT_BYTES:
        return None
    if len(member) == 36:
        return uuid_or_none(member)
    try:
        found = codec.loads(member)
    except ValueError:
        return None
    job_id = found.get("id") if isinstance(found, Mapping) else None
    return uuid_or_none(job_id.encode()) if isinstance(job_id, str) and len(job_id) == 36 else None


def ids_of(members: Sequence[bytes]) -> list[UUID] | None:
    """What `hinted_id` finds in each of them, in a third of the time; None unless every one is an id alone, in its usual form."""
    text, count = b"".join(members), len(members)
    if any(len(member) != 36 for member in members):
        return None
    if any(text[dash::36] != b"-" * count for dash in (8, 13, 18, 23)):
        return None
    try:
        digits = unhexlify(text.replace(b"-", b""))
    except ValueError:
        return None
    if len(digits) != 16 * count:
        return None
    return [uuid_of(int.from_bytes(digits[at : at + 16], "big")) for at in range(0, 16 * count, 16)]


def uuid_or_none(text: bytes | None) -> UUID | None:
    """The id that stands there in its usual form: 32 digits in 36 characters."""
    try:
        digits = unhexlify(text.replace(b"-", b"")) if text else b""
    except ValueError:
        return None
    if len(digits) != 16 or text is None or text[8:24:5] != b"----":
        return None
    return uuid_of(int.from_bytes(digits, "big"))
