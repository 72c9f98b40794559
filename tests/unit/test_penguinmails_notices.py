"""Bounces: who did not get the mail, why, and whether the address is to blame."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from penguinmails.bounce_codes import Verdict
from penguinmails.inbound import Kind, read_mail
from penguinmails.notices import Action, Notice, read_notice

MAILS = Path(__file__).parents[1] / "data" / "mail"
SOFT, HARD = Verdict.SOFT, Verdict.HARD

# What is in each message, from reading it: file (its folder names the source, see tests/data/mail/README.md), the
# addresses that failed, the enhanced status code it gives, the verdict, and the words that decide.
FAILED: tuple[tuple[str, tuple[str, ...], str | None, Verdict, str], ...] = (
    ("cpython/msg_16", ("jangel1@cougar.noc.ucla.edu",), "5.0.0", SOFT, "SIMS: recipient reached disk quota"),
    (
        "cpython/msg_43",
        tuple("x" * length + "@dot.ca.gov" for length in (3, 6, 7, 8, 9, 10, 11, 12, 13, 15, 16)),
        "5.7.1",
        SOFT,
        "amavis: content rejected, BANNED",
    ),
    ("mail_parser/mail_malformed_2", ("abh@netpar.com.br",), "4.2.2", SOFT, "MailSite: quota exceeded"),
    ("flufl_bounce/bounce_02", ("userx@example.com",), None, HARD, "mailbox unavailable, code 550"),
    ("flufl_bounce/bounce_03", ("userx@example.uk",), None, SOFT, "Demon: not collected after 30 days"),
    ("flufl_bounce/caiwireless_01", ("userx@example.com",), None, SOFT, "no reason is given"),
    ("flufl_bounce/dsn_01", ("userx@example.com",), "5.0.0", SOFT, "iPlanet: recipient reached disk quota"),
    ("flufl_bounce/dsn_02", ("zzzzz@example.uk",), "4.4.7", SOFT, "X.400: Maximum-Time-Expired"),
    ("flufl_bounce/dsn_03", ("userx@example.be",), None, SOFT, "553 exceeded maximum inbound message size"),
    ("flufl_bounce/dsn_04", ("userx@example.ch",), "5.0.0", SOFT, "PMDF: disk quota exceeded"),
    ("flufl_bounce/dsn_09", ("userx@example.com",), "5.0.0", SOFT, "X.400: unable to relay"),
    ("flufl_bounce/dsn_10", ("anne.person@dom.ain",), "5.0.0", HARD, "Postfix: 550 user unknown"),
    ("flufl_bounce/dsn_11", ("joem@example.com",), "5.1.1", HARD, "sendmail: user unknown"),
    (
        "flufl_bounce/dsn_12",
        ("userx@example.jp",),
        "5.1.1",
        HARD,
        "TeamWARE: bad destination mailbox address",
    ),
    ("flufl_bounce/dsn_13", ("userx@example.com",), "5.1.1", HARD, "Exchange 2003: 5.1.1"),
    ("flufl_bounce/dsn_14", ("userx@example.com.dk",), "5.1.1", HARD, "550 5.1.1 user unknown"),
    (
        "flufl_bounce/dsn_15",
        ("userx@example.com",),
        "5.1.1",
        HARD,
        "Exchange 2003 within another mail: 5.1.1",
    ),
    ("flufl_bounce/dsn_16", ("userx@example.com",), "5.0.0", HARD, "Postfix: 550 unknown user"),
    ("flufl_bounce/dsn_18", ("email@replaced.net",), "5.0.0", HARD, "domain does not exist"),
    ("flufl_bounce/exim_01", ("userx@its.example.nl",), "5.1.1", HARD, "Exim: 553 5.1.1 unknown user"),
    ("flufl_bounce/groupwise_01", ("userx@example.EDU",), None, HARD, "Exchange 5.5: name not recognized"),
    ("flufl_bounce/groupwise_02", ("userx@example.com",), None, HARD, "Exchange 5.5, HTML: not recognized"),
    ("flufl_bounce/hotpop_01", ("userx@example.com",), None, SOFT, "over disk quota"),
    ("flufl_bounce/llnl_01", ("user1@example.gov",), None, HARD, "did not match an LLNL address"),
    ("flufl_bounce/microsoft_01", ("userx@example.COM",), None, HARD, "Exchange 5.5: unknown recipient"),
    ("flufl_bounce/microsoft_02", ("userx@example.COM",), None, HARD, "Exchange 5.5: unknown recipient"),
    ("flufl_bounce/microsoft_03", ("userx@example.com",), None, SOFT, "no reason is given"),
    ("flufl_bounce/microsoft_04", ("userx@example.COM",), None, HARD, "Exchange 5.5: unknown recipient"),
    ("flufl_bounce/netscape_01", ("aaaaa@corel.com", "bbbbb@corel.com"), None, SOFT, "host not responding"),
    ("flufl_bounce/newmailru_01", ("zzzzz@newmail.ru",), None, SOFT, "exceeding their quota"),
    ("flufl_bounce/postfix_01", ("xxxxx@local.ie",), "5.1.1", HARD, "Postfix: 550 5.1.1 user unknown"),
    ("flufl_bounce/postfix_02", ("yyyyy@digicool.com",), None, SOFT, "Postfix: host not found, try again"),
    ("flufl_bounce/postfix_03", ("ttttt@ggggg.com",), None, SOFT, "Postfix: the content filter died"),
    ("flufl_bounce/postfix_04", ("userx@mail1.example.com",), None, SOFT, "Postfix: mail quota exceeded"),
    ("flufl_bounce/postfix_05", ("userx@example.net",), None, SOFT, "Postfix: 554 no Resent-From field"),
    ("flufl_bounce/qmail_01", ("userx@example.de",), None, SOFT, "qmail: no reason is given"),
    ("flufl_bounce/qmail_02", ("userx@example.com",), None, SOFT, "qmail: mailfolder is full"),
    ("flufl_bounce/qmail_03", ("userx@example.jp",), "5.1.1", HARD, "vpopmail: no mailbox by that name"),
    ("flufl_bounce/qmail_04", ("userx@example.au",), None, HARD, "MessageLabs: 550 no such user"),
    ("flufl_bounce/qmail_05", ("userx@example.com",), None, HARD, "Juno: 550 user unknown"),
    ("flufl_bounce/qmail_06", ("ntl@xxx.com",), None, SOFT, "Outblaze: disk quota exceeded"),
    ("flufl_bounce/qmail_07", ("user@example.net",), None, SOFT, "GoDaddy: mailfolder is full"),
    ("flufl_bounce/sendmail_01", ("zzzzz@shaft.coal.nl", "zzzzz@nfg.nl"), None, SOFT, "too many hops"),
    ("flufl_bounce/simple_01", ("bbbsss@example.com",), None, SOFT, "MDaemon: would exceed mailbox quota"),
    ("flufl_bounce/simple_02", ("userx@example.net",), None, SOFT, "USA.NET: processing error"),
    ("flufl_bounce/simple_04", ("userx@example.com",), None, HARD, "Smail: unknown host"),
    ("flufl_bounce/simple_05", ("userx@example.net",), None, HARD, "SBC: doesn't have an account"),
    ("flufl_bounce/simple_06", ("userx@example.com",), None, HARD, "doesn't have an account"),
    ("flufl_bounce/simple_07", ("userx@example.net",), None, SOFT, "Prodigy: mailbox is full"),
    ("flufl_bounce/simple_08", ("userx@example.de",), None, HARD, "1&1: 550 user unknown"),
    ("flufl_bounce/simple_09", ("userx@example.de",), None, SOFT, "1&1: quota exceeded"),
    ("flufl_bounce/simple_10", ("userx@example.com",), None, SOFT, "Exchange: no reason is given"),
    ("flufl_bounce/simple_11", ("userx@example.com",), None, HARD, "Domino: not listed in directory"),
    ("flufl_bounce/simple_12", ("userx@example.ac.jp",), None, HARD, "IMail: invalid final delivery userid"),
    ("flufl_bounce/simple_13", ("userx@example.fr",), None, HARD, "MIMEsweeper: l'adresse n'existe pas"),
    # flufl.bounce also takes the address that the remote server names, to which the mail was forwarded.
    ("flufl_bounce/simple_14", ("usery@example.com",), None, SOFT, "EarthLink: 552 quota violation"),
    ("flufl_bounce/simple_15", ("userx@example.be",), "5.1.1", HARD, "InterScan: 550 5.1.1 unknown user"),
    ("flufl_bounce/simple_16", ("userx@example.com",), None, SOFT, "Exim: no reason is given"),
    ("flufl_bounce/simple_17", ("userx@example.com",), None, SOFT, "Gmail: no reason is given"),
    ("flufl_bounce/simple_18", ("userx@example.com",), None, SOFT, "LSMTP: 554 message looping"),
    ("flufl_bounce/simple_19", ("userx@example.com.ar",), "5.1.1", HARD, "no mailbox here by that name"),
    ("flufl_bounce/simple_23", ("userx@example.it",), None, HARD, "user not known"),
    ("flufl_bounce/simple_24", ("userx@example.com",), None, SOFT, "no reason is given"),
    ("flufl_bounce/simple_25", ("userx@example.com",), None, HARD, "xinnet, HTML: no such user"),
    ("flufl_bounce/simple_26", ("userx@example.it",), None, HARD, "address is wrong or no longer valid"),
    ("flufl_bounce/simple_27", ("userx@example.net.py",), None, HARD, "MDaemon: no such user here"),
    ("flufl_bounce/simple_29", ("userx@example.com",), None, HARD, "MX Logic: 550 unknown user"),
    ("flufl_bounce/simple_30", ("userx@example.com",), "5.3.0", HARD, "Amen: 553 5.3.0 no such user here"),
    ("flufl_bounce/simple_31", ("userx@example.fr",), None, SOFT, "Amen: no reason is given"),
    (
        "flufl_bounce/simple_32",
        ("userx@example.com",),
        None,
        SOFT,
        "Amen: could not find a gateway in 5 hours",
    ),
    ("flufl_bounce/simple_33", ("userx@example.com",), "5.3.0", HARD, "Amen: 553 5.3.0 no such user here"),
    ("flufl_bounce/simple_34", ("roland@example.com",), "5.1.1", HARD, "hMailServer: 550 5.1.1 user unknown"),
    ("flufl_bounce/simple_36", ("userx@example.com",), None, HARD, "SmarterMail: 550 unknown user"),
    ("flufl_bounce/simple_37", ("user@example.edu",), None, HARD, "phquery: no final delivery point"),
    ("flufl_bounce/simple_38", ("userx@example.com",), None, SOFT, "Dovecot, as a receipt: quota exceeded"),
    ("flufl_bounce/simple_39", ("userx@example.ru",), None, HARD, "mail.ru: user not found"),
    ("flufl_bounce/simple_41", ("userx@example.com",), None, HARD, "MailEnable: 550 mailbox unavailable"),
    (
        "flufl_bounce/simple_42",
        ("david...@gmail.com",),
        "5.7.1",
        SOFT,
        "Exim, Gmail: likely unsolicited mail",
    ),
    ("flufl_bounce/simple_44", ("user@example.com",), "4.4.4", SOFT, "Outlook: temporary server error"),
    ("flufl_bounce/simple_45", ("subscriber@earthlink.net",), None, SOFT, "Vade: 550 account is overquota"),
    ("flufl_bounce/sina_01", ("userx@sina.com", "usery@sina.com"), None, SOFT, "no reason is given"),
    ("flufl_bounce/smtp32_01", ("userx@example.ph",), None, SOFT, "IMail: failed 20 attempts"),
    ("flufl_bounce/smtp32_02", ("userx@example.com",), None, SOFT, "IMail: failed 20 attempts"),
    ("flufl_bounce/smtp32_03", ("userx@example.com",), None, SOFT, "IMail: no reason is given"),
    (
        "flufl_bounce/smtp32_04",
        ("after_another@example.net", "one_bad_address@example.net"),
        "5.3.0",
        HARD,
        "IMail: unknown user, 553 5.3.0",
    ),
    ("flufl_bounce/smtp32_05", ("userx@example.com",), None, SOFT, "IMail: no reason is given"),
    ("flufl_bounce/smtp32_06", ("Absolute_garbage_addr@example.net",), "5.3.0", HARD, "IMail: unknown user"),
    ("flufl_bounce/smtp32_07", ("userx@example.com",), None, HARD, "IMail: invalid final delivery userid"),
    ("flufl_bounce/yahoo_01", ("userx@example.com",), "4.4.1", SOFT, "Yahoo: no SMTP connection"),
    ("flufl_bounce/yahoo_02", ("userx@example.es",), None, SOFT, "Yahoo: over quota"),
    ("flufl_bounce/yahoo_03", ("userx@example.com",), None, HARD, "Yahoo: disabled or discontinued"),
    ("flufl_bounce/yahoo_04", ("userx@example.es", "usery@example.uk"), None, SOFT, "Yahoo: over quota"),
    ("flufl_bounce/yahoo_05", ("userx@example.com", "usery@example.com"), None, HARD, "Yahoo: disabled"),
    (
        "flufl_bounce/yahoo_08",
        tuple(f"user{letter}@example.com" for letter in "abcdef"),
        None,
        HARD,
        "Yahoo: disabled or discontinued",
    ),
    (
        "flufl_bounce/yahoo_10",
        ("userx@example.com", "usery@example.com", "userz@example.com"),
        None,
        HARD,
        "Yahoo: doesn't have an account; disabled",
    ),
    ("flufl_bounce/yahoo_11", ("bad_user@aol.com",), "5.1.1", HARD, "Yahoo: 550 5.1.1 of AOL"),
    ("flufl_bounce/yahoo_12", ("user@yahoo.com",), None, SOFT, "Yahoo, HTML: no reason is given"),
    ("flufl_bounce/yahoo_13", ("bogus-address@example.net",), "5.1.1", HARD, "Yahoo: 550 5.1.1 user unknown"),
)

# Still being tried when they were written.
DELAYED = (
    ("flufl_bounce/dsn_05", "userx@example.cz", "4.4.1"),
    ("flufl_bounce/dsn_06", "userx@example.com", "4.4.0"),
    ("flufl_bounce/dsn_07", "userx@example.nz", "4.4.1"),
    ("flufl_bounce/dsn_08", "userx@example.de", "4.0.0"),
    ("flufl_bounce/dsn_17", "userx@example.fi", "4.3.0"),
    ("flufl_bounce/simple_03", "userx@example.za", None),
    ("flufl_bounce/simple_21", "userx@example.com", None),
    ("flufl_bounce/simple_22", "User@example.org", None),
    ("flufl_bounce/simple_28", "userx@example.com", None),
    ("flufl_bounce/simple_35", "calvin@example.com", None),
    ("flufl_bounce/simple_40", "user@example.com", None),
)

# These name no whole address: a user's name without a domain (AOL, Jetmail, Yale), or nothing at all.
NAMELESS = ("aol_01", "bounce_01", "dumbass_01", "simple_43", "yale_01")

# By which the delivery is found: the Message-ID of the mail that was returned.
RETURNED = (
    ("cpython/msg_16", "<002001c144a6$8752e060$56104586@oxy.edu>"),  # in the returned mail and in the text
    ("flufl_bounce/dsn_01", "<F1218V8zDv60gxapzha000001ae@hotmail.com>"),  # in the text, indented
    ("flufl_bounce/dsn_05", "<pfchbtkf3j0p7prf0sp45vi21fro3bs7ad@4ax.com>"),  # message/rfc822-headers
    (
        "flufl_bounce/dsn_13",
        "<mailman.8262.1143060203.1568.wed_ride@grizz.org>",
    ),  # a report within a multipart
    ("flufl_bounce/exim_01", "<19990920022322.A19735@stereo.rotzorg.org>"),  # the mail pasted into the text
    ("flufl_bounce/simple_38", "<2ee7df1322121930966bcc2318379726@localhost>"),  # Original-Message-ID
    ("flufl_bounce/yahoo_13", "<130907fb-848c-d154-8e59-ed1e08319fcf@yahoo.com>"),  # message/rfc822
)

REPORT = """\
From: Mail Delivery System <MAILER-DAEMON@mx.example.net>
To: bounces@example.org
Subject: Mail status
Message-ID: <report@mx.example.net>
MIME-Version: 1.0
Content-Type: multipart/report; report-type={kind}; boundary="=_b"

--=_b
Content-Type: text/plain; charset=utf-8

A report.

--=_b
Content-Type: message/{kind}

{fields}
--=_b
Content-Type: text/rfc822-headers

From: news@example.org
Message-ID: <delivery@example.org>

--=_b--
"""


def notice_of(name: str) -> Notice:
    """The notice in one of the kept mails."""
    return read_notice(read_mail((MAILS / f"{name}.txt").read_bytes()))


def status_report(*fields: str) -> Notice:
    """A delivery status notification with these lines in its report."""
    return read_notice(read_mail(REPORT.format(kind="delivery-status", fields="\n".join(fields)).encode()))


def feedback_report(*fields: str) -> Notice:
    """A feedback report with these lines in it."""
    return read_notice(read_mail(REPORT.format(kind="feedback-report", fields="\n".join(fields)).encode()))


@pytest.mark.parametrize(
    ("name", "addresses", "status", "verdict", "words"), FAILED, ids=[row[0] for row in FAILED]
)
def test_each_real_failure_is_read_as_a_person_reads_it(
    name: str, addresses: tuple[str, ...], status: str | None, verdict: Verdict, words: str
) -> None:
    """Addresses, status and verdict are those that the message says."""
    notice = notice_of(name)
    assert {recipient.address for recipient in notice.recipients} == set(addresses), words
    for recipient in notice.recipients:
        assert (recipient.action, recipient.verdict, recipient.status) == (Action.FAILED, verdict, status), (
            words
        )
        assert recipient.diagnostic
        assert recipient.source


@pytest.mark.parametrize(("name", "address", "status"), DELAYED, ids=[row[0] for row in DELAYED])
def test_what_is_still_being_tried_is_delayed(name: str, address: str, status: str | None) -> None:
    """A warning is no failure: it is soft, and its action says that the mail may yet arrive."""
    (recipient,) = notice_of(name).recipients
    assert (recipient.address, recipient.action, recipient.verdict) == (address, Action.DELAYED, SOFT)
    assert recipient.status == status


def test_a_notification_that_names_no_address_has_no_recipient() -> None:
    """Nothing is guessed; one notification in the collection is not recognised as one, for it has a human's subject."""
    for name in NAMELESS:
        notice = notice_of(f"flufl_bounce/{name}")
        assert (notice.kind, notice.recipients) == (Kind.DELIVERY_STATUS, ()), name
    for name in ("simple_20", "groupwise_03", "qmail_08"):
        assert notice_of(f"flufl_bounce/{name}").recipients == ()


@pytest.mark.parametrize(("name", "message_id"), RETURNED, ids=[row[0] for row in RETURNED])
def test_the_returned_mails_id_leads_to_the_delivery(name: str, message_id: str) -> None:
    """Wherever the notification hides it, the id of the mail it is about comes first."""
    assert notice_of(name).message_ids[0] == message_id


def test_a_report_tells_of_each_recipient_apart() -> None:
    """Actions and statuses of RFC 3464, one block a recipient; the original address counts where it is said."""
    notice = status_report(
        "Original-Envelope-Id: ENVID42",
        "Reporting-MTA: dns; mx.example.net",
        "",
        "Original-Recipient: rfc822;ada@example.com",
        "Final-Recipient: rfc822; lovelace@host.example.com",
        "Action: failed",
        "Status: 5.1.1",
        "Diagnostic-Code: smtp; 550 5.1.1 <lovelace@host.example.com>:",
        "    Recipient address rejected: User unknown",
        "",
        "Final-Recipient: rfc822; bob@example.com",
        "Action: delayed",
        "Status: 5.2.2",
        "",
        "Final-Recipient: rfc822; carol@example.com",
        "Action: delivered",
        "Status: 2.1.5",
        "",
        "Final-Recipient: rfc822; list@example.com",
        "Action: expanded",
        "Status: 2.0.0",
        "",
        "Final-Recipient: rfc822; dan@example.com",
        "Action: relayed",
        "Status: 2.1.9",
        "",
        "final-recipient: utf-8; j\\x{F6}rg@example.com",
        "ACTION: FAILED",
        "Status: 5.2.2 (mailbox full)",
    )
    assert [(each.address, each.action, each.verdict) for each in notice.recipients] == [
        ("ada@example.com", Action.FAILED, HARD),
        ("bob@example.com", Action.DELAYED, SOFT),
        ("carol@example.com", Action.DELIVERED, Verdict.DELIVERED),
        ("list@example.com", Action.EXPANDED, Verdict.DELIVERED),
        ("dan@example.com", Action.RELAYED, Verdict.DELIVERED),
        ("jörg@example.com", Action.FAILED, SOFT),
    ]
    first = notice.recipients[0]
    assert (first.final_address, first.status, first.code) == ("lovelace@host.example.com", "5.1.1", 550)
    assert first.diagnostic.endswith("Recipient address rejected: User unknown")
    assert (notice.envelope_id, notice.reporting_mta) == ("ENVID42", "mx.example.net")
    assert notice.message_ids == ("<delivery@example.org>",)


@pytest.mark.parametrize(
    ("kind", "verdict"),
    [
        ("abuse", Verdict.COMPLAINT),
        ("Fraud", Verdict.COMPLAINT),
        ("opt-out", Verdict.COMPLAINT),
        ("not-spam", Verdict.OTHER),  # RFC 6430: the reader wants the mail
        ("auth-failure", Verdict.OTHER),  # RFC 6591: about the sender's domain
    ],
)
def test_a_feedback_report_is_a_complaint_if_a_reader_complains(kind: str, verdict: Verdict) -> None:
    """RFC 5965: the type decides, and each Original-Rcpt-To is one recipient."""
    notice = feedback_report(
        f"Feedback-Type: {kind}",
        "User-Agent: SomeGenerator/1.0",
        "Version: 1",
        "Original-Rcpt-To: <ada@example.com>",
        "Original-Rcpt-To: bob@example.com",
    )
    assert (notice.kind, notice.feedback_type) == (Kind.FEEDBACK, kind.lower())
    assert [(each.address, each.verdict) for each in notice.recipients] == [
        ("ada@example.com", verdict),
        ("bob@example.com", verdict),
    ]
    assert notice.message_ids == ("<delivery@example.org>",)


def test_a_complaint_without_a_name_is_still_one() -> None:
    """Providers hide who complained; the returned mail's id says it."""
    notice = feedback_report("Feedback-Type: abuse", "Version: 1")
    ((recipient, message_id),) = zip(notice.recipients, notice.message_ids, strict=True)
    assert (recipient.address, recipient.verdict) == (None, Verdict.COMPLAINT)
    assert message_id == "<delivery@example.org>"


def test_what_a_person_writes_about_a_bounce_is_none() -> None:
    """A reply that quotes a bounce, and an automatic reply, condemn nobody."""
    quoted = (MAILS / "flufl_bounce/yahoo_03.txt").read_text().partition("\n\n")[2]
    reply = f"From: ada@example.com\nSubject: Re: Delivery failure\nIn-Reply-To: <a@example.org>\n\nLook:\n{quoted}"
    notice = read_notice(read_mail(reply.encode()))
    assert (notice.kind, notice.recipients, notice.message_ids) == (Kind.REPLY, (), ("<a@example.org>",))
    away = reply.replace("Subject: Re: Delivery failure", "Subject: Away\nAuto-Submitted: auto-replied")
    assert read_notice(read_mail(away.encode())).kind is Kind.AUTO_REPLY


def samples() -> Iterator[bytes]:
    """A few notifications of each plan."""
    for name in (
        "dsn_11",
        "dsn_15",
        "exim_01",
        "qmail_05",
        "simple_25",
        "yahoo_08",
        "microsoft_01",
        "smtp32_04",
    ):
        yield (MAILS / f"flufl_bounce/{name}.txt").read_bytes()


@given(
    st.sampled_from(list(samples())),
    st.lists(st.tuples(st.integers(0, 8000), st.binary(max_size=12)), max_size=8),
)
@example(
    b"From: MAILER-DAEMON\nContent-Type: message/delivery-status\n\nFinal-Recipient:;;<@\nStatus: 5.999.999\n",
    [],
)
def test_a_mutated_notification_never_raises(mail: bytes, changes: list[tuple[int, bytes]]) -> None:
    """Whatever bytes are put into it, a notification is read, and every text of it can be stored."""
    for place, piece in changes:
        mail = mail[:place] + piece + mail[place + len(piece) :]
    notice = read_notice(read_mail(mail))
    for each in notice.recipients:
        for text in (each.address, each.final_address, each.status, each.diagnostic):
            assert "\0" not in (text or "").encode().decode()
