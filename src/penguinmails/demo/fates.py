"""What the demo's server does with each recipient, decided by the recipient's place in the list: so it is known what must come out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from penguinmails.campaign import Recipient

ROUND = 50
NO = "550 5.1.1 no such user"
LATER = "451 4.7.1 greylisted, come again later"


class Fate(StrEnum):
    """What happens to one recipient's mail; each but the first to one of every `ROUND` recipients."""

    TAKEN = "taken"
    REFUSED = "refused"  # for good, at RCPT
    DEFERRED = "deferred"  # told to come later, once
    RETURNED_HARD = "returned hard"  # taken, and a notification says later that there is no such mailbox
    RETURNED_SOFT = "returned soft"  # the same of a full one
    COMPLAINED = "complained"
    ANSWERED = "answered"


PLACES = {
    7: Fate.REFUSED,
    17: Fate.DEFERRED,
    22: Fate.RETURNED_HARD,
    27: Fate.RETURNED_SOFT,
    37: Fate.ANSWERED,
    47: Fate.COMPLAINED,
}


@dataclass
class Fates:
    """The fate of everybody; the server asks it at RCPT, from a thread of its own.

    Attributes:
        of: the fate by address.
        told_later: who has been told to come later.
    """

    of: Mapping[str, Fate]
    told_later: set[str] = field(default_factory=set)

    @classmethod
    def of_list(cls, people: Sequence[Recipient]) -> "Fates":
        """The fates of a list."""
        places = enumerate(people)
        return cls({person.email: PLACES.get(place % ROUND, Fate.TAKEN) for place, person in places})

    def who(self, *fates: Fate) -> set[str]:
        """Everybody with one of these fates."""
        return {email for email, fate in self.of.items() if fate in fates}

    def answer(self, email: str) -> str | None:
        """The reply at RCPT to somebody who is not taken now; None: go on."""
        fate = self.of.get(email)
        if fate is Fate.REFUSED:
            return NO
        if fate is Fate.DEFERRED and email not in self.told_later:
            self.told_later.add(email)
            return LATER
        return None
