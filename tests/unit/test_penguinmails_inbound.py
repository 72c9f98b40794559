"""Reading inbound mail: whatever comes is kept and described, in bounded time, and never raises."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.message import EmailMessage
from email.policy import SMTP
from functools import partial
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from penguinmails import mime
from penguinmails.inbound import InboundMail, Kind, Mailbox, message_ids, read_mail
from penguinmails.mime import decoded_text, header_fields, parsed_header
from penguinmails.notices import read_notice

MAILS = Path(__file__).parents[1] / "data" / "mail"
CORPUS = sorted(MAILS.glob("*/*.txt"))
LONGEST_SECONDS = 20.0  # on a busy machine; alone none takes two


def mail_of(name: str) -> InboundMail:
    """One of the kept mails."""
    return read_mail((MAILS / f"{name}.txt").read_bytes())


def check_storable(mail: InboundMail) -> None:
    """Every text of a mail goes into PostgreSQL: valid UTF-8 without NUL; the date is aware."""
    texts = [mail.message_id, mail.subject, mail.text, mail.html, mail.auto_submitted, *mail.defects]
    texts += [*mail.in_reply_to, *mail.references]
    texts += [text for field in mail.fields for text in field]
    for box in (*mail.recipients, *([mail.sender] if mail.sender else [])):
        texts += [box.address, box.name]
    texts += [text for file in mail.attachments for text in (file.name, file.content_type, file.sha256)]
    for text in texts:
        assert "\0" not in text
        text.encode("utf-8")
    assert mail.date is None or mail.date.tzinfo is not None
    assert len(mail.sha256) == 64


def test_an_ordinary_mail_is_read_whole() -> None:
    """Headers, both texts, files and their sizes, as they were put in."""
    message = EmailMessage(policy=SMTP)
    message["From"] = "Jörg Müller <joerg@example.com>"
    message["To"] = "Ada <ada@example.org>, bob@example.org"
    message["Cc"] = "carol@example.org"
    message["Subject"] = "Grüße"
    message["Date"] = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
    message["Message-ID"] = "<one@example.com>"
    message["In-Reply-To"] = "<zero@example.org>"
    message["References"] = "<first@example.org> <zero@example.org>"
    message.set_content("Guten Tag\n")
    message.add_alternative("<p>Guten Tag</p>\n", subtype="html")
    message.add_attachment(
        b"\x00\x01", maintype="application", subtype="pdf", filename="../../etc/Ünïcode.pdf"
    )
    raw = message.as_bytes()
    mail = read_mail(raw)
    assert (mail.kind, mail.message_id, mail.subject) == (Kind.REPLY, "<one@example.com>", "Grüße")
    assert (mail.in_reply_to, mail.references) == (
        ("<zero@example.org>",),
        ("<first@example.org>", "<zero@example.org>"),
    )
    assert mail.sender == Mailbox("joerg@example.com", "Jörg Müller")
    assert [box.address for box in mail.recipients] == [
        "ada@example.org",
        "bob@example.org",
        "carol@example.org",
    ]
    assert mail.date == datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
    assert (mail.text.strip(), mail.html.strip()) == ("Guten Tag", "<p>Guten Tag</p>")
    (file,) = mail.attachments
    assert (file.name, file.content_type, file.size, file.content) == (
        "Ünïcode.pdf",
        "application/pdf",
        2,
        b"\x00\x01",
    )
    assert (mail.size, mail.defects, mail.auto_submitted, mail.is_automatic) == (len(raw), (), "no", False)
    assert mail.header("message-id") == "<one@example.com>"


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_mail_of_the_collections_is_read(path: Path) -> None:
    """The standard library's own test messages, and those of flufl.bounce and mail-parser; also without their end."""
    raw = path.read_bytes()
    check_storable(read_mail(raw))
    for part in range(1, 8):
        check_storable(read_mail(raw[: len(raw) * part // 8]))


def test_the_collections_are_all_there() -> None:
    """Nothing has been lost on the way here: the tests above have something to read."""
    counts = {
        folder: len(list((MAILS / folder).glob("*.txt")))
        for folder in ("cpython", "flufl_bounce", "mail_parser")
    }
    assert counts == {"cpython": 48, "flufl_bounce": 117, "mail_parser": 5}


def test_odd_mails_keep_what_can_be_kept() -> None:
    """What the projects' own tests say of a few of their messages."""
    chinese = mail_of("mail_parser/mail_test_12")
    assert chinese.sender == Mailbox("baoguan@hotmail.com", "张先生")
    named = mail_of("mail_parser/mail_test_18")
    assert named.sender == Mailbox("comma.name@example.com", "LastßlName, FirstName")
    assert [box.address for box in named.recipients] == [
        "tony.stark@example.com",
        "simple@example.net",
        "john.doe@example.com",
    ]
    assert mail_of("mail_parser/mail_test_19").sender is not None
    assert [file.name for file in mail_of("cpython/msg_07").attachments] == ["dingusfish.gif"]
    assert "StartBoundaryNotFoundDefect" in mail_of("cpython/msg_15").defects
    assert mail_of("cpython/msg_35").text.strip().startswith("counter to RFC 2822")


def headers(*lines: str) -> InboundMail:
    """A mail of these header lines."""
    return read_mail("\r\n".join((*lines, "", "Text\r\n")).encode("utf-8", "surrogateescape"))


@pytest.mark.parametrize(
    ("lines", "kind"),
    [
        (["From: ada@example.com", "Subject: Hello"], Kind.ORDINARY),
        (["From: ada@example.com", "Subject: Re: Hello", "In-Reply-To: <a@example.org>"], Kind.REPLY),
        (["From: ada@example.com", "References: <a@example.org>"], Kind.REPLY),
        (["From: ada@example.com", "Auto-Submitted: auto-replied (vacation)"], Kind.AUTO_REPLY),
        (
            ["From: ada@example.com", "Auto-Submitted: auto-generated", "In-Reply-To: <a@b.example>"],
            Kind.AUTO_REPLY,
        ),
        (["From: ada@example.com", "Auto-Submitted: auto-generated"], Kind.ORDINARY),
        (["From: ada@example.com", "Auto-Submitted: no", "In-Reply-To: <a@example.org>"], Kind.REPLY),
        (["From: ada@example.com", "Precedence: auto_reply"], Kind.AUTO_REPLY),
        (["From: ada@example.com", "Precedence: bulk"], Kind.ORDINARY),
        (["From: ada@example.com", "Subject: Automatic reply: Hello"], Kind.AUTO_REPLY),
        (["From: MAILER-DAEMON@example.com", "Subject: Hello"], Kind.DELIVERY_STATUS),
        (["From: robot@example.com", "Subject: Undeliverable: Hello"], Kind.DELIVERY_STATUS),
        (["From: postmaster@example.com", "Subject: Our new office"], Kind.ORDINARY),
        (
            ["From: postmaster@example.com", "Return-Path: <>", "Subject: =?utf-8?q?Not_=C3=BCber?="],
            Kind.DELIVERY_STATUS,
        ),
        (
            ["From: ada@example.com", "Subject: Re: Undeliverable: Hello", "References: <a@b.example>"],
            Kind.REPLY,
        ),
        (["From: staff@hotmail.com", "Subject: complaint about message from 192.0.2.1"], Kind.FEEDBACK),
    ],
)
def test_the_kind_of_a_mail(lines: list[str], kind: Kind) -> None:
    """What each sort of header makes of a mail; a person's words about a bounce make none."""
    assert headers(*lines).kind is kind


def test_message_ids_are_the_same_however_they_are_written() -> None:
    """Folding, comments and missing brackets do not change an id; the number of ids is bounded, the newest stay."""
    assert message_ids("<a@b.example> (comment)\r\n\t<c@d\r\n .example>") == (
        "<a@b.example>",
        "<c@d.example>",
    )
    assert message_ids("a@b.example") == message_ids("<a@b.example>") == ("<a@b.example>",)
    assert message_ids("lonely") == ("<lonely>",)
    assert message_ids("Your message of Tuesday") == message_ids("") == message_ids("<>") == ()
    many = message_ids(" ".join(f"<{number}@example.org>" for number in range(300)))
    assert (len(many), many[-1]) == (100, "<299@example.org>")


def test_a_mail_has_one_hash_however_it_came() -> None:
    """Trace fields, line ends, folding and the order of fields are the way's, not the mail's; a word is the mail's."""
    lines = [
        "From: a@example.com",
        "Subject: A long",
        " subject",
        "Message-ID: <a@example.com>",
        "",
        "Text",
        "",
    ]
    mail = read_mail("\r\n".join(lines).encode())
    other_way = [
        "Return-Path: <a@example.com>",
        "Received: by mx",
        *reversed(lines[:1]),
        lines[3],
        *lines[1:3],
    ]
    assert read_mail("\n".join([*other_way, *lines[4:]]).encode()).sha256 == mail.sha256
    assert read_mail("\r\n".join(lines).replace("Text", "Test").encode()).sha256 != mail.sha256
    assert read_mail("\r\n".join(lines).replace("a@", "b@").encode()).sha256 != mail.sha256


@pytest.mark.parametrize(
    "date",
    [
        "Tue, 99 Foo 2026 25:61:61 +9999",
        "Mon, 1 Jan 99999 00:00:00 +0000",
        "Fri, 31 Dec 9999 23:59:59 -2359",
        "1",
        "Mon, 1 Jan 2026 00:00:00 +99999999999999999999",
        "=?utf-8?q?x?=",
    ],
)
def test_a_date_that_is_none_is_marked(date: str) -> None:
    """No date is made up, and nothing raises."""
    mail = headers("From: a@example.com", f"Date: {date}")
    assert mail.date is None
    assert "bad-date" in mail.defects


def test_dates_are_moments() -> None:
    """A zone is reckoned with; `-0000` and no zone are UTC."""
    for written in (
        "Wed, 4 Mar 2026 06:06:07 +0100",
        "Wed, 4 Mar 2026 05:06:07 -0000",
        "4 Mar 2026 05:06:07",
    ):
        assert headers(f"Date: {written}").date == datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)


def test_odd_addresses_are_kept_and_marked() -> None:
    """Where the modern header parser fails, the older one reads what there is; raw UTF-8 is text."""
    assert headers("From: (" + "(" * 3000 + " a@example.com").sender is None
    raw = headers("From: Jörg <joerg@example.com>", "Subject: Grüße")
    assert (raw.sender, raw.subject) == (Mailbox("joerg@example.com", "Jörg"), "Grüße")
    assert headers("To: undisclosed-recipients:;").recipients == ()
    many = headers("To: " + ", ".join(f"reader{number}@example.com" for number in range(2000)))
    assert len(many.recipients) <= 500


@pytest.mark.parametrize(
    "value",
    [
        "<*0*=@[\t",  # UnboundLocalError
        "\udcffutf-8filename@",  # IndexError
        ":a\udcffa;+9999a",  # AttributeError
        " .;=?utf-8?q?(=?x?b?name ?=?utf-8?q?=20?=(\\",  # TypeError
        "(" * 5000,  # RecursionError
    ],
)
def test_what_the_standard_parser_raises_is_caught(value: str) -> None:
    """Values on which its header parser fails in Python 3.11, found by searching, in each field that is parsed."""
    names = (
        "From",
        "To",
        "Cc",
        "Sender",
        "Subject",
        "Message-ID",
        "In-Reply-To",
        "Date",
        "Content-Disposition",
    )
    check_storable(headers(*(f"{name}: {value}" for name in names), f"Content-Type: {value}"))
    for name in names:
        parsed_header(name, value)


@pytest.mark.parametrize(
    "charset", ["punycode", "idna", "zlib", "no-such", "undefined", "utf-16", "unicode_escape"]
)
def test_a_charset_that_is_none_does_no_harm(charset: str) -> None:
    """The text is read as UTF-8 or Latin-1 then; codecs that take quadratic time are never asked."""
    assert decoded_text("Grüße".encode(), charset)
    start = time.process_time()
    decoded_text(b"a-" + b"b" * 1_000_000, charset)
    assert time.process_time() - start < LONGEST_SECONDS


def nested(kind: bytes, depth: int) -> bytes:
    """Multiparts or messages within each other."""
    if kind == b"message":
        return b"Content-Type: message/rfc822\n\n" * depth + b"Text\n"
    return b"".join(
        b"Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n" % (level, level) for level in range(depth)
    )


def wide(number: int, head: bytes = b"") -> bytes:
    """One multipart of very many parts."""
    return b"Content-Type: multipart/mixed; boundary=b\n\n" + (b"--b\n" + head + b"\nx\n") * number


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "multiparts in multiparts": (partial(nested, b"multipart", 20_000), "structure-too-complex"),
    "as many as are allowed": (lambda: nested(b"multipart", 190) + b"--xyz\n" * 4_000, ""),
    "messages in messages": (partial(nested, b"message", 20_000), "structure-too-complex"),
    "messages as many as are allowed": (partial(nested, b"message", 190), ""),
    "a million parts": (partial(wide, 1_000_000), "structure-too-complex"),
    "parts as many as are allowed": (partial(wide, 2_400), "too-many-parts"),
    "slow types": (
        partial(wide, 2_400, b"Content-Type: text/plain" + b';"' * 1000 + b"\n"),
        "too-many-parts",
    ),
    "slow names": (
        partial(wide, 600, b"Content-Disposition: attachment; filename*0*=" + b"%41'" * 900 + b"\n"),
        "too-many-parts",
    ),
    "a million header fields": (lambda: b"a:b\n" * 1_000_000 + b"\nText", "header-too-large"),
    "a header of one line": (lambda: b"To: " + b"a@b, " * 4_000_000 + b"\n\nText", "header-too-large"),
    "a slow address list": (lambda: (b"To: " + b"word " * 3_000 + b"\n") * 3 + b"\nText", ""),
    "a slow subject": (lambda: b"Subject: " + b"=?utf-8?q?a?= " * 20_000 + b"\n\nText", "header-too-large"),
    "line ends": (lambda: b"From: a@b\n\n" + b"\r" * 20_000_000, "structure-too-complex"),
    "beyond the size": (lambda: b"From: a@b\n\n" + b"x" * 40_000_000, "message-too-large"),
    "ids": (lambda: b"From: MAILER-DAEMON\n\n" + b"Message-ID: <a@b>\n" * 100_000, ""),
    "addresses": (lambda: b"From: MAILER-DAEMON\n\nFailed:\n" + b"<a@b.example>:\n" * 100_000, ""),
    "an address without end": (lambda: b"From: MAILER-DAEMON\n\nFailed:\n" + b"a" * 2_000_000, ""),
    "brackets": (lambda: b"From: MAILER-DAEMON\nContent-Type: text/html\n\n" + b"<" * 2_000_000, ""),
    "a report of many groups": (
        lambda: b"Content-Type: message/delivery-status\n\n" + b"Final-Recipient: rfc822;a@b\n\n" * 90_000,
        "",
    ),
    "a report without end": (
        lambda: b"Content-Type: message/delivery-status\n\n" + b"Final-Recipient: rfc822;a@b\n\n" * 300_000,
        "structure-too-complex",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_mail_takes_bounded_time(name: str) -> None:
    """Mails made to be slow or deep are cut short, said to be so, and still kept; also what notices make of them."""
    make, defect = HOSTILE[name]
    raw = make()
    start = time.process_time()
    mail = read_mail(raw)
    read_notice(mail)
    assert time.process_time() - start < LONGEST_SECONDS
    assert not defect or defect in mail.defects, mail.defects
    assert len(mail.parts) <= mime.MAX_PARTS
    assert mail.size == len(raw)
    check_storable(mail)


def test_an_enclosed_mail_is_kept_as_its_source() -> None:
    """A forwarded mail is a file of the outer one, and its header can be read."""
    inner = b"Message-ID: <in@example.org>\nSubject: Inner\n\nInner text\n"
    raw = (
        b"Content-Type: multipart/mixed; boundary=b\n\n--b\nContent-Type: message/rfc822\n\n"
        + inner
        + b"\n--b--\n"
    )
    (file,) = read_mail(raw).attachments
    assert file.content_type == "message/rfc822"
    assert ("message-id", "<in@example.org>") in header_fields(file.content)
    assert b"Inner text" in file.content


FRAGMENTS = st.sampled_from(
    [
        b"From: ",
        b"To: ",
        b"Date: ",
        b"Subject: ",
        b"Message-ID: ",
        b"References: ",
        b"Content-Type: multipart/mixed; boundary=b\n",
        b"Content-Type: multipart/report; report-type=delivery-status; boundary=b\n",
        b"Content-Type: message/delivery-status\n",
        b"Content-Type: message/feedback-report\n",
        b"Content-Type: message/rfc822\n",
        b"Content-Type: text/html; charset*0*=utf-8''%ff; name*=x'y'%00\n",
        b"Content-Transfer-Encoding: base64\n",
        b"Content-Transfer-Encoding: x-uuencode\n",
        b'Content-Disposition: attachment; filename="=?utf-8?b?/w==?="\n',
        b"--b\n",
        b"--b--\n",
        b"\n\n",
        b"\r",
        b"=?utf-8?q?=ff?=",
        b"=?x?b?A?=",
        b"<a@b>",
        b"@[",
        b"(((",
        b'"\\',
        b":;,<>",
        b"begin 644 x\n#\n",
        b"\xff\xfe\x00",
    ]
)


@given(st.lists(st.one_of(FRAGMENTS, st.binary(max_size=20)), max_size=30).map(b"".join))
@example(b"From: =?utf-8?q?=?= <@>\nTo: @[\nDate: Mon, 1 Jan 0000 00:00:00 +0000\n\n")
@example(b"Content-Type: multipart/mixed; boundary*=x'y'%00\n\n--\n")
def test_arbitrary_mail_never_raises(raw: bytes) -> None:
    """Any bytes, and bytes made from what mail is made of."""
    mail = read_mail(raw)
    check_storable(mail)
    read_notice(mail)


@given(
    st.sampled_from(CORPUS),
    st.lists(st.tuples(st.integers(0, 4000), st.one_of(FRAGMENTS, st.binary(max_size=6))), max_size=6),
)
def test_a_mutated_mail_never_raises(path: Path, changes: list[tuple[int, bytes]]) -> None:
    """Real mails with pieces put into them."""
    raw = path.read_bytes()
    for place, piece in changes:
        raw = raw[:place] + piece + raw[place:]
    mail = read_mail(raw)
    check_storable(mail)
    read_notice(mail)


@given(
    st.sampled_from(["from", "to", "subject", "date", "content-type", "content-disposition"]),
    st.text(st.sampled_from("ab@.<>()[]\",;:=?*'% \\0é\t"), max_size=60),
)
def test_a_header_that_cannot_be_parsed_is_none(name: str, value: str) -> None:
    """The modern policy's parser raises on many values; here each gives a value or None."""
    parsed = parsed_header(name, value)
    assert parsed is None or isinstance(parsed, str)
