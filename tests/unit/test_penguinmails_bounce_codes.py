"""Whether the address is to blame: enhanced status codes, SMTP codes and the words of servers."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from penguinmails.bounce_codes import (
    CONTRADICTIONS,
    PHRASES,
    REPLIES,
    STATUSES,
    Reason,
    Verdict,
    classify,
    classify_answer,
)

SOFT, HARD = Verdict.SOFT, Verdict.HARD


@pytest.mark.parametrize(
    ("code", "text", "verdict", "reason"),
    [
        (250, "2.1.5 Ok", Verdict.DELIVERED, Reason.DELIVERED),
        (550, "5.1.1 The email account that you tried to reach does not exist", HARD, Reason.NO_SUCH_ADDRESS),
        (550, "5.2.1 The email account that you tried to reach is disabled", HARD, Reason.MAILBOX_CLOSED),
        (
            550,
            "5.2.1 The user you are trying to contact is receiving mail at a rate that",
            SOFT,
            Reason.POLICY,
        ),
        (552, "5.2.2 The email account that you tried to reach is over quota", SOFT, Reason.MAILBOX_FULL),
        (550, "5.1.1 mailbox is over quota", SOFT, Reason.MAILBOX_FULL),
        (550, "5.7.1 <a@b.example>: Recipient address rejected: User unknown", HARD, Reason.NO_SUCH_ADDRESS),
        (550, "5.4.1 Recipient address rejected: Access denied. AS(201806281)", HARD, Reason.NO_SUCH_ADDRESS),
        (550, "5.1.10 RESOLVER.ADR.RecipientNotFound; Recipient not found", HARD, Reason.NO_SUCH_ADDRESS),
        (550, "5.7.26 Unauthenticated email is not accepted due to DMARC policy", SOFT, Reason.POLICY),
        (554, "5.7.1 Service unavailable; Client host blocked using Spamhaus", SOFT, Reason.POLICY),
        (550, "Requested action not taken: mailbox unavailable", HARD, Reason.NO_SUCH_ADDRESS),
        (550, "", HARD, Reason.NO_SUCH_ADDRESS),
        (556, "5.1.10 Recipient address has null MX", HARD, Reason.NO_SUCH_DOMAIN),
        (554, "delivery error: dd This user doesn't have a yahoo.com account", HARD, Reason.NO_SUCH_ADDRESS),
        (554, "Transaction failed", SOFT, Reason.UNKNOWN),
        (552, "", SOFT, Reason.MAILBOX_FULL),
        (450, "4.1.1 User unknown in relay recipient table", SOFT, Reason.TEMPORARY),
        (452, "4.2.2 The email account that you tried to reach is over quota", SOFT, Reason.MAILBOX_FULL),
        (421, "4.7.0 Try again later, closing connection", SOFT, Reason.POLICY),
        (535, "5.7.8 Authentication credentials invalid", SOFT, Reason.POLICY),
        (0, "connection lost", SOFT, Reason.UNKNOWN),
    ],
)
def test_an_answer_of_a_server_is_classified(code: int, text: str, verdict: Verdict, reason: Reason) -> None:
    """Real answers of large providers: hard only where the address is at fault for good."""
    found = classify_answer(code, text)
    assert (found.verdict, found.reason) == (verdict, reason), found


def test_only_an_answer_about_the_recipient_can_be_hard() -> None:
    """A 550 before RCPT is about us, a bare one after DATA about the content; the words may still say otherwise."""
    assert classify_answer(550, "5.1.1 no such user", stage="mail").verdict is SOFT
    assert classify_answer(550, "go away", stage="connect").verdict is SOFT
    assert classify_answer(550, "", stage="end-of-data").verdict is SOFT
    assert classify_answer(550, "5.1.1 no such user", stage="end-of-data").verdict is HARD
    with pytest.raises(ValueError, match="SMTP code 99 is not between 200 and 599"):
        classify_answer(99, "")
    with pytest.raises(ValueError, match="stage 'noop' is not one of connect, helo, tls, auth, mail"):
        classify_answer(550, "", stage="noop")


def test_each_row_of_the_tables_names_its_source() -> None:
    """A source each, and no row that calls class 4 or a delivery a failure of the address."""
    rows = [*STATUSES.values(), *REPLIES.values(), *(row for _, row in (*CONTRADICTIONS, *PHRASES))]
    assert all(row.source and row.verdict in {HARD, SOFT} for row in rows)
    assert all(row.verdict is SOFT for _, row in CONTRADICTIONS)
    for key in STATUSES:
        subject, _, detail = key.partition(".")
        assert classify("", status=f"4.{subject}.{detail or '99'}").verdict is SOFT


@given(st.text(max_size=300), st.sampled_from([0, 421, 550, 554]))
@example("5.1.1" * 60, 550)
def test_any_words_of_a_server_are_classified(text: str, code: int) -> None:
    """No text raises; temporary codes are never hard."""
    found = classify_answer(code, text)
    assert found.verdict in {HARD, SOFT}
    assert code != 421 or found.verdict is SOFT
