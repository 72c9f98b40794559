"""Words and bytes of one stretch of the shared mapping: what slots, notes and the arena's header are made of.

No lock is needed: each word has one writer, 64-bit stores are whole, and what is longer than a word carries a
sequence number that is odd while it is being written, or is made to count by one word that is written last.
"""

from __future__ import annotations

import mmap
from typing import Any, Final
from uuid import UUID

WORD: Final = 8
TEXT_BYTES: Final = 128
"""No text is longer, whatever its length says: a job may have written over it."""


def nanoseconds(moment: float) -> int:
    """A moment of time.monotonic() as the arena keeps it."""
    return int(moment * 1e9)


class Int:
    """One word of the owner's record as an attribute."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __get__(self, owner: Any, _owner_type: object = None) -> int:
        return int(owner.words[owner.base + self.at])

    def __set__(self, owner: Any, value: int) -> None:
        owner.words[owner.base + self.at] = value


class Bool:
    """One word of the owner's record as a flag."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __get__(self, owner: Any, _owner_type: object = None) -> bool:
        return bool(owner.words[owner.base + self.at])

    def __set__(self, owner: Any, value: bool) -> None:
        owner.words[owner.base + self.at] = int(value)


class Record:
    """Words and bytes of one stretch of the mapping."""

    def __init__(self, memory: mmap.mmap, words: memoryview[int], base: int) -> None:
        self.memory = memory
        self.words = words
        self.base = base

    def _put_uuid(self, at: int, value: UUID) -> None:
        start = (self.base + at) * WORD
        self.memory[start : start + 16] = value.bytes

    def _get_uuid(self, at: int) -> UUID:
        start = (self.base + at) * WORD
        return UUID(bytes=self.memory[start : start + 16])

    def _put_text(self, at: int, words: int, text: str) -> None:
        data = text.encode()[: words * WORD - WORD]
        start = (self.base + at + 1) * WORD
        self.memory[start : start + len(data)] = data
        self.words[self.base + at] = len(data)

    def _get_text(self, at: int) -> str:
        start = (self.base + at + 1) * WORD
        length = min(max(0, self.words[self.base + at]), TEXT_BYTES)
        return self.memory[start : start + length].decode(errors="replace")

    def _put_block(self, at: int, count: int, data: bytes) -> None:
        """Sequence word, count word, data: odd while the data is being replaced."""
        sequence = self.base + at
        self.words[sequence] |= 1
        start = (sequence + 2) * WORD
        self.memory[start : start + len(data)] = data
        self.words[sequence + 1] = count
        self.words[sequence] += 1

    def _get_block(self, at: int, unit: int) -> tuple[int, bytes] | None:
        """(sequence, data) or None where a writer was at work in each of a few looks."""
        sequence = self.base + at
        for _ in range(8):
            before = self.words[sequence]
            start = (sequence + 2) * WORD
            data = self.memory[start : start + self.words[sequence + 1] * unit]
            if before % 2 == 0 and before == self.words[sequence]:
                return int(before), data
        return None

    def _put_pair(self, at: int, value: UUID) -> None:
        """An index word and two places: the one that is not pointed at is written, then the index turns to it.

        A writer that dies in the middle leaves the old value readable, which a sequence number would not.
        """
        index = self.base + at
        spare = (self.words[index] + 1) % 3 or 1
        self._put_uuid(at + 2 * spare - 1, value)
        self.words[index] = spare

    def _get_pair(self, at: int) -> UUID | None:
        """The newer value of a pair; None before the first."""
        for _ in range(8):
            place = self.words[self.base + at]
            value = self._get_uuid(at + 2 * place - 1) if place else None
            if place == self.words[self.base + at]:
                return value
        return value
