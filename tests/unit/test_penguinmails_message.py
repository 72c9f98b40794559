"""Building messages: personal, readable in every script, and closed to header injection."""

import email
import email.policy
import html
from datetime import UTC, datetime
from email.header import decode_header, make_header
from email.message import EmailMessage
from email.utils import quote
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from penguinmails.message import (
    Mail,
    MessageError,
    Sender,
    build_mail,
    checked_address,
    clean_name,
    delivery_id,
    load_template,
)
from penguinmails.settings import PACKAGED_TEMPLATES
from penguinmails.unsubscribe import Unsubscribe

CAMPAIGN = UUID("018f4d3a-0000-7000-8000-000000000001")
RECIPIENT = UUID("018f4d3a-0000-7000-8000-000000000002")
DATE = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
EXPECTED_HEADERS = ["From", "To", "Subject", "Date", "Message-ID", "MIME-Version", "Content-Type"]


def build(name: str = "Ada Lovelace", address: str = "ada@example.com", **changes: Any) -> Mail:
    """The packaged template for one recipient."""
    return build_mail(
        load_template(PACKAGED_TEMPLATES, "welcome"),
        changes.pop("sender", Sender("news@example.org", "Penguin News")),
        delivery=delivery_id(CAMPAIGN, RECIPIENT),
        email=address,
        name=name,
        variables=changes.pop("variables", {}),
        date=DATE,
        **changes,
    )


def parse(mail: Mail) -> EmailMessage:
    """The message as a receiving program reads it."""
    return email.message_from_bytes(mail.data.replace(b"\r\n", b"\n"), policy=email.policy.default)


def body(message: EmailMessage, subtype: str) -> str:
    """The text of one part."""
    part = message.get_body((subtype,))
    assert isinstance(part, EmailMessage)
    return str(part.get_content()).replace("\r\n", "\n")


def test_a_mail_has_text_and_html_and_its_headers() -> None:
    """The parts, the headers and the envelope are all there and say what the arguments said."""
    mail = build()
    message = parse(mail)
    assert message.keys() == [*EXPECTED_HEADERS[:5], "MIME-Version", "Content-Type"]
    assert message["From"] == "Penguin News <news@example.org>"
    assert message["To"] == "Ada Lovelace <ada@example.com>"
    assert message["Subject"] == "Welcome aboard, Ada Lovelace"
    assert message["Date"].datetime == DATE
    assert (mail.sender, mail.recipient, mail.needs_utf8) == ("news@example.org", "ada@example.com", False)
    assert message.get_content_type() == "multipart/alternative"
    assert "Dear Ada Lovelace," in body(message, "plain")
    assert "<p>Dear Ada Lovelace,</p>" in body(message, "html")


def test_the_message_id_names_the_delivery_and_stays() -> None:
    """A second attempt carries the same Message-ID; another recipient or campaign another one."""
    assert build().message_id == build(name="Ada L.").message_id
    assert build().message_id == f"<{delivery_id(CAMPAIGN, RECIPIENT)}@example.org>"
    assert delivery_id(CAMPAIGN, RECIPIENT) != delivery_id(CAMPAIGN, CAMPAIGN)
    assert delivery_id(CAMPAIGN, RECIPIENT) != delivery_id(RECIPIENT, RECIPIENT)


def test_the_wire_form_is_seven_bit_with_short_lines() -> None:
    """No relay without 8BITMIME, and no limit of 998 characters, can harm the text."""
    data = build(name="Zoë Ωmega 企鹅 " * 9).data
    assert data.isascii()
    assert max(len(line) for line in data.split(b"\r\n")) <= 78
    assert b"\n" not in data.replace(b"\r\n", b"")


@pytest.mark.parametrize(
    "name",
    [
        "x\r\nBcc: victim@example.com",
        "x\nBcc: victim@example.com",
        "x\rBcc: victim@example.com",
        "x\r\n\r\n<script>alert(1)</script>",
        "x\u2028Bcc: victim@example.com",
        "x\x85Bcc: victim@example.com",
        "x\x0bBcc: victim@example.com",
        "x\x00Bcc: victim@example.com",
        "=?utf-8?q?x=0D=0ABcc:_victim@example.com?=",
        '"x" <victim@example.com>, y',
        "x" * 200 + "\r\nBcc: victim@example.com",
    ],
)
def test_a_name_cannot_add_a_header_or_a_recipient(name: str) -> None:
    """Whatever stands in a name, the message has its own headers and its one recipient."""
    message = parse(build(name=name))
    assert message.keys() == [*EXPECTED_HEADERS[:5], "MIME-Version", "Content-Type"]
    assert [a.addr_spec for a in message["To"].addresses] == ["ada@example.com"]
    assert "\n" not in message["Subject"]


@pytest.mark.parametrize(
    "address",
    [
        "",
        "  ",
        "ada",
        "ada@",
        "@example.com",
        "ada@example.com, eve@example.com",
        "ada@example.com\r\nBcc: eve@example.com",
        "ada@example.com\nDATA",
        "ada@example.com>\r\nRCPT TO:<eve@example.com",
        "ada lovelace@example.com",
        "Ada <ada@example.com>",
        "ada@exa mple.com",
        "ada@example.com\x00",
        "ada@@example.com",
        "a" * 250 + "@example.com",
        "ada@" + "x" * 70 + ".com",
    ],
)
def test_a_bad_address_is_refused_by_name(address: str) -> None:
    """What is not exactly one address is refused before a connection is made."""
    with pytest.raises(MessageError, match="address"):
        build(address=address)


def test_addresses_beyond_ascii() -> None:
    """A foreign domain is written as IDNA; a foreign local part asks for SMTPUTF8 and survives."""
    assert checked_address("ada@bücher.example") == "ada@xn--bcher-kva.example"
    mail = build(address="дарья@example.com")
    assert mail.needs_utf8
    assert "\r\nTo: Ada Lovelace <дарья@example.com>\r\n" in mail.data.decode()


def test_values_are_escaped_in_html_only() -> None:
    """Markup in a recipient's data is text in both parts."""
    message = parse(build(name="<b>Ada & Co</b>"))
    assert "Dear <b>Ada & Co</b>," in body(message, "plain")
    assert "Dear &lt;b&gt;Ada &amp; Co&lt;/b&gt;," in body(message, "html")


def test_an_empty_name_becomes_the_local_part() -> None:
    """Nobody is greeted with an empty place, and the To header shows the bare address."""
    message = parse(build(name=" \t"))
    assert message["To"] == "ada@example.com"
    assert message["Subject"] == "Welcome aboard, ada"


def test_mail_of_a_campaign_says_so() -> None:
    """Absence notes stay away, complaints can be counted per campaign; a single letter has none of it."""
    message = parse(build(campaign=CAMPAIGN))
    assert (message["Precedence"], message["Auto-Submitted"]) == ("bulk", "auto-generated")
    assert message["Feedback-ID"] == f"{CAMPAIGN}:campaign:penguinmails"


def test_a_link_to_unsubscribe_is_in_the_headers_and_in_both_parts() -> None:
    """RFC 2369 and RFC 8058: an https link of the delivery's own, the one-click header beside it, and a mail address."""
    way = Unsubscribe("https://example.org/u/{token}", (b"k" * 32,), "leave@example.org")
    message, link = parse(build(unsubscribe=way)), way.url_for(delivery_id(CAMPAIGN, RECIPIENT))
    assert message["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
    web, post = (part.strip() for part in message["List-Unsubscribe"].split(","))
    assert (web, post) == (
        f"<{link}>",
        f"<mailto:leave@example.org?subject=unsubscribe%20{link.rpartition('/')[2]}>",
    )
    assert link in body(message, "plain")
    assert f'<a href="{link}">' in body(message, "html")


def test_a_template_without_html_is_a_plain_letter(tmp_path: Path) -> None:
    """One part, no multipart; long lines, lone CRs, dots and foreign text come through."""
    (tmp_path / "note").mkdir()
    (tmp_path / "note" / "subject.txt").write_text("Hi")
    text = f".\r\n{'long ' * 300}\rtrailing \n.企鹅 {{{{ name }}}} \x01\x0b"
    (tmp_path / "note" / "body.txt").write_bytes(text.encode())
    mail = build_mail(
        load_template(tmp_path, "note"),
        Sender("news@example.org"),
        delivery=RECIPIENT,
        email="ada@example.com",
        name="Ada",
        variables={},
        date=DATE,
    )
    message = parse(mail)
    assert message.get_content_type() == "text/plain"
    wanted = text.replace("\r\n", "\n").replace("\r", "\n").replace("{{ name }}", "Ada")
    assert str(message.get_content()) == f"{wanted}\n"
    assert max(len(line) for line in mail.data.split(b"\r\n")) <= 78
    assert mail.data.isascii()


@given(
    st.text(max_size=150), st.sampled_from(["ada@example.com", "o'hara+x@example.co.uk", '"a b"@example.com'])
)
@example('Müller, Hans "der Große" (Übersee) <x@y>; ' * 3, "ada@example.com")
@example("\ud800", "ada@example.com")
@example("a@b", "ada@example.com")
@example("=?utf-8?q?a?=", "ada@example.com")
def test_any_name_survives_the_way(name: str, address: str) -> None:
    """For every text as a name: the receiver reads one recipient, the cleaned name, and the right body."""
    mail = build(name=name, address=address)
    message, raw = parse(mail), email.message_from_bytes(mail.data)
    shown = clean_name(name)
    local = address.rpartition("@")[0]
    (to,) = message["To"].addresses
    assert to.addr_spec == address
    assert not message["To"].defects
    # Decoded by `email.header`: the parser of the newer policies puts a space between two encoded words of a name.
    assert str(make_header(decode_header(raw["To"]))) in {
        f"{shown} <{address}>",
        f'"{quote(shown)}" <{address}>',
        address,
    }
    subject = str(make_header(decode_header(raw["Subject"].replace("\r\n", ""))))
    assert subject == f"Welcome aboard, {shown or local}"
    if shown:
        assert f"Dear {shown},\n" in body(message, "plain")
        assert f"Dear {shown}," in html.unescape(body(message, "html"))
        assert "<" not in body(message, "html").partition("Dear ")[2].partition(",</p>")[0]
