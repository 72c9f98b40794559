"""DKIM signatures, checked by another implementation; and unsubscribe tokens."""

import base64
import re
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import dkim
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ed25519, rsa

from penguinmails.message import Sender, build_mail, load_template
from penguinmails.settings import PACKAGED_TEMPLATES, MailSettings, given_variables
from penguinmails.signing import Signer, SigningError, load_signer
from penguinmails.unsubscribe import (
    Unsubscribe,
    UnsubscribeTokenError,
    read_unsubscribe_token,
    unsubscribe_token,
)

KEY = b"a secret of more than sixteen bytes"
WAY = Unsubscribe("https://example.org/u?t={token}", (KEY,), "leave@example.org")


def write_key(file: Path, key: Any, **options: Any) -> Path:
    """The key as PEM, PKCS #8."""
    encryption = options.get("encryption", serialization.NoEncryption())
    form = options.get("form", serialization.PrivateFormat.PKCS8)
    file.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, encryption))
    return file


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One key file of each kind, by selector."""
    folder, small = tmp_path_factory.mktemp("keys"), rsa.generate_private_key(65537, 1024)
    large = rsa.generate_private_key(65537, 2048)
    secret = serialization.BestAvailableEncryption(b"x")
    pkcs1 = serialization.PrivateFormat.TraditionalOpenSSL
    text = folder / "text"
    text.write_text("no key")
    return {
        "r1": write_key(folder / "r1", large),
        "r2": write_key(folder / "r2", large, form=pkcs1),
        "e1": write_key(folder / "e1", ed25519.Ed25519PrivateKey.generate()),
        "small": write_key(folder / "small", small),
        "dsa": write_key(folder / "dsa", dsa.generate_private_key(1024)),
        "secret": write_key(folder / "secret", large, encryption=secret),
        "text": text,
        "missing": folder / "missing",
    }


def record(signer: Signer) -> bytes:
    """The public key as it stands in the DNS."""
    public, raw = signer.key.public_key(), serialization.PublicFormat.Raw
    if isinstance(public, rsa.RSAPublicKey):
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        return b"v=DKIM1; k=rsa; p=" + base64.b64encode(public.public_bytes(serialization.Encoding.DER, form))
    return b"v=DKIM1; k=ed25519; p=" + base64.b64encode(public.public_bytes(serialization.Encoding.Raw, raw))


def verified(data: bytes, *signers: Signer) -> list[bool]:
    """What dkimpy says of each signature, the topmost first."""
    names = {f"{signer.selector}._domainkey.{signer.domain}.".encode(): record(signer) for signer in signers}
    found = []
    for number in range(len(signers)):
        try:
            found.append(dkim.DKIM(data).verify(idx=number, dnsfunc=lambda name, **_: names.get(name)))
        except dkim.ValidationError:
            found.append(False)
    return found


def letter(*signers: Signer, name: str = "Ada", **changes: Any) -> bytes:
    """A signed mail of a campaign."""
    return build_mail(
        load_template(changes.pop("folder", PACKAGED_TEMPLATES), changes.pop("template", "welcome")),
        Sender("news@example.org", "Penguin News"),
        delivery=uuid4(),
        email="ada@example.com",
        name=name,
        variables={},
        date=datetime(2026, 3, 4, tzinfo=UTC),
        campaign=uuid4(),
        unsubscribe=WAY,
        signers=signers,
    ).data


@pytest.mark.parametrize("name", ["Ada", "Zoë Ωmega 企鹅 " * 9, "a  b\t c"])
def test_signatures_hold(files: dict[str, Path], name: str) -> None:
    """RSA from either PEM form and Ed25519, on one mail, to another implementation; lines stay short."""
    signers = [load_signer(files[each], domain="example.org", selector=each) for each in ("r1", "r2", "e1")]
    data = letter(*signers, name=name)
    assert verified(data, *signers) == [True, True, True]
    assert (
        max(len(line) for line in data.split(b"\r\n")) <= 78 + len("<mailto:leave@example.org?subject=>") + 10
    )


def test_bodies_at_the_edges_are_signed_right(files: dict[str, Path], tmp_path: Path) -> None:
    """Empty, only empty lines, spaces at line ends: the relaxed form is that of the other implementation."""
    signer = load_signer(files["e1"], domain="example.org", selector="e1")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "subject.txt").write_text("Hi")
    for text in ("", "\n\n\n", " \n\t\n", "a \n b\t\tc \n\n\n", "x"):
        (tmp_path / "t" / "body.txt").write_text(text)
        assert verified(letter(signer, folder=tmp_path, template="t"), signer) == [True], repr(text)
    for raw in (
        b"From: a@b\r\n\r\n",
        b"From: a@b\r\nSubject:\tx \r\n\r\n \r\n a  b \r\n",
        b"From: a@b\r\n\r\n \t\r\n",
    ):
        assert verified(signer.header_for(raw, datetime.now(UTC)) + raw, signer) == [True], raw


def test_what_must_not_change_is_signed(files: dict[str, Path]) -> None:
    """RFC 8058 wants both unsubscribe headers under the signature; no signed header can be changed or added to."""
    signer = load_signer(files["e1"], domain="example.org", selector="e1")
    data = letter(signer)
    names = re.search(rb"h=([^;]*);", data.replace(b"\r\n ", b""))
    assert names is not None
    counted = Counter(names[1].decode().split(":"))
    assert counted["from"] == counted["subject"] == counted["list-unsubscribe"] == 2
    assert counted["list-unsubscribe-post"] == counted["message-id"] == 2
    assert counted["reply-to"] == 1
    added = [
        b"From: eve@example.net",
        b"Subject: x",
        b"Reply-To: eve@example.net",
        b"List-Unsubscribe: <https://e>",
    ]
    for line in added:
        assert verified(line + b"\r\n" + data, signer) == [False], line
    for old, new in (
        (b"=One-Click", b"=No"),
        (b"Penguin News", b"Penguin Fish"),
        (b"welcome aboard", b"wellcome"),
    ):
        assert old in data
        assert verified(data.replace(old, new), signer) == [False], old
    assert verified(data.replace(b"Precedence: bulk", b"Precedence: list"), signer) == [True]


@pytest.mark.parametrize(
    ("file", "selector", "message"),
    [
        ("small", "s", "has 1024 bits, must have 2048"),
        ("dsa", "s", "neither RSA nor Ed25519"),
        ("secret", "s", "without a passphrase"),
        ("text", "s", "not a private key in PEM"),
        ("missing", "s", "No such file"),
        ("r1", "a b", "DKIM selector 'a b' is not a name"),
        ("r1", "", "DKIM selector '' is not a name"),
    ],
)
def test_a_bad_key_is_refused(files: dict[str, Path], file: str, selector: str, message: str) -> None:
    """What no receiver would take, or cannot be read, is said with its file."""
    with pytest.raises(SigningError, match=message):
        load_signer(files[file], domain="example.org", selector=selector)


def test_a_token_names_its_delivery_and_no_other() -> None:
    """What was made is read; another key, any changed character and any other text are refused."""
    delivery, new = uuid4(), b"another secret of sixteen bytes"
    token = unsubscribe_token(delivery, KEY)
    assert read_unsubscribe_token(token, [new, KEY]) == delivery
    changed = [
        token[:at] + ("A" if token[at] != "A" else "B") + token[at + 1 :] for at in range(len(token) - 1)
    ]
    for wrong in (*changed, "", token[:-1], token + "A", token + "=", "ä", "\n", str(delivery), " " + token):
        with pytest.raises(UnsubscribeTokenError):
            read_unsubscribe_token(wrong, [KEY])
    with pytest.raises(UnsubscribeTokenError):
        read_unsubscribe_token(token, [new])
    with pytest.raises(UnsubscribeTokenError):
        read_unsubscribe_token(token, [])
    assert WAY.url_for(delivery) == f"https://example.org/u?t={token}"
    assert unsubscribe_token(UUID(int=1), KEY) != unsubscribe_token(UUID(int=2), KEY)


@pytest.mark.parametrize(
    ("url", "key", "message"),
    [
        ("http://example.org/{token}", KEY, "not an https address"),
        ("https:///{token}", KEY, "not an https address"),
        ("https://example.org/{token}\r\nBcc: x", KEY, "not an https address"),
        ("https://example.org/{token}> <https://x", KEY, "not an https address"),
        ("https://example.org/", KEY, "0 times, must once"),
        ("https://example.org/{token}{token}", KEY, "2 times, must once"),
        ("https://example.org/{token}", b"short", "shorter than 16 bytes"),
    ],
)
def test_a_bad_way_to_unsubscribe_is_refused(url: str, key: bytes, message: str) -> None:
    """Before the first mail, by name; the key is shown nowhere."""
    with pytest.raises(ValueError, match=message):
        Unsubscribe(url, (key,))
    assert "secret" not in repr(WAY)


def test_the_settings_make_signers_accounts_and_the_link(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Variables become what mails are built with; contradictions are refused, secrets are not shown."""
    for name, value in {
        "FROM_ADDRESS": "news@mail.example.org",
        "DKIM_DOMAIN": "example.org",
        "DKIM_KEYS": f'{{"r1": "{files["r1"]}", "e1": "{files["e1"]}"}}',
        "UNSUBSCRIBE_URL": WAY.url,
        "UNSUBSCRIBE_KEYS": f'["{KEY.decode()}"]',
        "ACCOUNTS": '{"ses": {"host": "mx.example.net", "port": 465, "security": "tls", "password": "fish"}}',
    }.items():
        monkeypatch.setenv(f"PENGUINMAILS_{name}", value)
    settings = MailSettings()
    assert [(each.selector, each.domain) for each in settings.signers] == [
        ("r1", "example.org"),
        ("e1", "example.org"),
    ]
    assert settings.unsubscribe == Unsubscribe(WAY.url, (KEY,))
    assert given_variables(settings) == {"unsubscribe_url"}
    account = settings.accounts["ses"]
    assert (account.name, account.host, account.security, account.password) == (
        "ses",
        "mx.example.net",
        "tls",
        "fish",
    )
    assert "fish" not in repr(settings)
    assert KEY.decode() not in repr(settings)
    for name, value, message in (
        ("DKIM_DOMAIN", "example.com", "must be the domain of from_address"),
        (
            "ACCOUNTS",
            '{"ses": {"host": "x", "port": 1, "from_address": "a@example.net"}}',
            r"the domain of from_address of account 'ses' \(example.net\)",
        ),
        ("UNSUBSCRIBE_URL", "", "need unsubscribe_url"),
        ("ACCOUNTS", '{"Ses": {"host": "x", "port": 1}}', "'Ses' is not allowed"),
        ("ACCOUNTS", '{"ses": {"host": "x", "port": 1, "secure": 1}}', "secure"),
        ("ACCOUNTS", '{"ses": {"host": "x", "port": 0}}', "allowed: 1 to 65535"),
        ("ACCOUNTS", '{"ses": {"host": "x", "port": 25, "username": "u"}}', "in the clear"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(f"PENGUINMAILS_{name}", value)
            with pytest.raises(ValueError, match=message):
                MailSettings()
