"""What a server's reply means, at every step: pure."""

import pytest

from penguinmails.smtp_answers import MAX_ANSWER, Reply, Stage, Verdict, answer_to

ACCEPTED, DEFERRED, REJECTED = Verdict.ACCEPTED, Verdict.DEFERRED, Verdict.REJECTED


@pytest.mark.parametrize(
    ("code", "text", "verdict", "status"),
    [
        (450, "greylisted", DEFERRED, ""),
        (550, "no such user", REJECTED, ""),
        (550, "5.1.1 no such user", REJECTED, "5.1.1"),
        (552, "5.2.2 mailbox full", REJECTED, "5.2.2"),
        (554, "4.7.1 [TSS04] deferred because of complaints", DEFERRED, "4.7.1"),
        (450, "5.7.1 greylisted", DEFERRED, "5.7.1"),
        (451, "4.7.500 busy", DEFERRED, "4.7.500"),
        (421, "4.7.0 too many connections", DEFERRED, "4.7.0"),
        (530, "authentication required", DEFERRED, ""),
        (535, "5.7.8 bad credentials", DEFERRED, "5.7.8"),
        (550, "5.7.13 your account is disabled", DEFERRED, "5.7.13"),
        (550, "5.7.1 not wanted", REJECTED, "5.7.1"),
        (550, "5.7.26 unauthenticated", REJECTED, "5.7.26"),
        (550, "5.1.1.1 not a status", REJECTED, ""),
        (550, "mail from 10.5.1.1 refused", REJECTED, ""),
        (550, "9.1.1 not a status", REJECTED, ""),
        (550, "5.\u0661.1 not a status", REJECTED, ""),
    ],
)
def test_refusals(code: int, text: str, verdict: Verdict, status: str) -> None:
    """The enhanced status code first, then the reply code; trouble with the account never condemns a mail."""
    for stage in (Stage.MAIL, Stage.RCPT, Stage.DATA, Stage.END_OF_DATA):
        answer = answer_to(stage, Reply(code, (text.encode(),)))
        assert (answer.verdict, answer.stage, answer.code, answer.status) == (verdict, stage, code, status)
        assert (answer.text, answer.ambiguous) == (text, False)


@pytest.mark.parametrize(
    ("code", "verdict", "ambiguous"),
    [
        (250, ACCEPTED, False),
        (354, DEFERRED, True),
        (0, DEFERRED, True),
        (199, DEFERRED, True),
        (600, DEFERRED, True),
    ],
)
def test_only_an_understood_answer_to_the_end_of_the_data_is_certain(
    code: int, verdict: Verdict, ambiguous: bool
) -> None:
    """What is neither yes nor no leaves open what became of the mail; before the end of the data it does not."""
    answer = answer_to(Stage.END_OF_DATA, Reply(code, (b"2.0.0 queued",)))
    assert (answer.verdict, answer.ambiguous) == (verdict, ambiguous)
    assert not answer_to(Stage.RCPT, Reply(code, (b"x",))).ambiguous
    assert answer_to(Stage.RCPT, Reply(code, (b"x",))).verdict is DEFERRED


def test_several_lines_are_one_text() -> None:
    """The status that is repeated on every line is told once; controls and endless texts are cut."""
    reply = Reply(
        550, (b"5.7.26 This mail\x00 has", b"5.7.26  been blocked.\xff", b"5.7.26 see \x1b[31m https://x")
    )
    answer = answer_to(Stage.END_OF_DATA, reply)
    assert answer.text == "5.7.26 has been blocked.\ufffd see https://x".replace(
        "5.7.26 has", "5.7.26 This has"
    )
    assert len(answer_to(Stage.MAIL, Reply(550, (b"x" * 9999,))).text) == MAX_ANSWER
    assert str(answer).startswith("rejected at end-of-data: 550 5.7.26 This")


@pytest.mark.parametrize(
    ("stage", "code", "text", "about_mail"),
    [
        (Stage.RCPT, 452, "4.2.2 mailbox full", True),
        (Stage.RCPT, 554, "4.7.1 greylisted", True),
        (Stage.MAIL, 550, "5.1.8 bad sender", True),
        (Stage.END_OF_DATA, 451, "later", True),
        (Stage.CONNECT, 554, "go away", False),
        (Stage.HELO, 550, "bad name", False),
        (Stage.TLS, 454, "4.7.0 no TLS now", False),
        (Stage.AUTH, 454, "4.7.0 later", False),
        (Stage.RCPT, 421, "4.3.2 shutting down", False),
        (Stage.MAIL, 530, "authentication required", False),
        (Stage.RCPT, 550, "5.7.13 your account is disabled", False),
        (Stage.RCPT, 0, "connection lost", False),
        (Stage.DATA, 250, "what?", False),
    ],
)
def test_what_an_answer_is_about(stage: Stage, code: int, text: str, about_mail: bool) -> None:
    """A mail that has used up its attempts bounces only if the last answer was about it."""
    assert answer_to(stage, Reply(code, (text.encode(),))).is_about_mail is about_mail
