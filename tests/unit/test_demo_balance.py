"""The demo's balance: every difference between the database, the server and what came back is told."""

from dataclasses import replace

from penguinmails.campaign import Recipient
from penguinmails.deliveries import State
from penguinmails.demo.balance import Balance, balance_faults, balance_lines
from penguinmails.demo.fates import Fate, Fates
from penguinmails.demo.receiver import Receiver

PEOPLE = [Recipient(f"p{number}@example.com", "", {}) for number in range(50)]
BOUNCED = {Fate.REFUSED, Fate.RETURNED_HARD, Fate.RETURNED_SOFT}


def played() -> tuple[Balance, Receiver, Fates]:
    """A list to whom everything happened as planned."""
    fates, receiver = Fates.of_list(PEOPLE), Receiver()
    for email in fates.of:
        while fates.answer(email) is not None and receiver.refused[email] < 2:
            receiver.refused[email] += 1
        if fates.of[email] is not Fate.REFUSED:
            receiver.accepted[email] += 1
    states = {
        email: State.BOUNCED
        if fate in BOUNCED
        else State.COMPLAINED
        if fate is Fate.COMPLAINED
        else State.SENT
        for email, fate in fates.of.items()
    }
    balance = Balance(
        states=states,
        refused=fates.who(Fate.REFUSED),
        returned=fates.who(Fate.RETURNED_HARD, Fate.RETURNED_SOFT),
        replied=fates.who(Fate.ANSWERED),
        suppressed=fates.who(Fate.REFUSED, Fate.RETURNED_HARD, Fate.COMPLAINED),
        sums={State.SENT: 46, State.BOUNCED: 3, State.COMPLAINED: 1},
    )
    return balance, receiver, fates


def test_a_balance_that_is_right_has_no_faults() -> None:
    """All fates occur in a list of fifty."""
    balance, receiver, fates = played()
    assert balance_faults(balance, receiver, fates) == []
    first, second, _ = balance_lines(balance, receiver, fates)
    assert "49 of 50 recipients got exactly one mail; 1 were refused for good, 1 told to come later" in first
    assert second.startswith("accounted   50 of 50: 46 sent, 1 bounced by the server's answer, 2 bounced by")


def test_every_difference_is_a_fault() -> None:
    """In each of the sets that are compared, at either side."""
    balance, receiver, fates = played()
    wrong = [
        replace(balance, states=balance.states | {"p0@example.com": State.SENDING}),
        replace(balance, states={key: state for key, state in balance.states.items() if key[1] != "0"}),
        replace(balance, refused=set()),
        replace(balance, returned=balance.returned | {"p0@example.com"}),
        replace(balance, replied=set()),
        replace(balance, suppressed=balance.suppressed | {"p0@example.com"}),
        replace(balance, sums=balance.sums | {State.HELD: 1}),
    ]
    assert all(balance_faults(each, receiver, fates) for each in wrong)
    del receiver.accepted["p17@example.com"]
    assert any("come later" in each for each in balance_faults(balance, receiver, fates))
