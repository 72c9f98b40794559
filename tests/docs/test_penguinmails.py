"""docs/penguinmails.md has every variable of the SMTP account with its default."""

import re

from pydantic import SecretStr

from penguinmails.settings import PACKAGED_TEMPLATES, MailSettings, Security
from tests.fix_daemon import ROOT

ROW = re.compile(r"^\| `(PENGUINMAILS_\w+)` \| (.*?) \|", re.MULTILINE)


def test_every_variable_is_documented_with_its_default() -> None:
    """The table is that of the model."""
    spoken = {
        "": "empty",
        "None": "none",
        "{}": "none",
        "()": "none",
        str(PACKAGED_TEMPLATES): "the package's own",
    }
    wanted = {}
    for name, value in MailSettings.model_construct().model_dump().items():
        text = value.get_secret_value() if isinstance(value, SecretStr) else str(value)
        wanted[f"PENGUINMAILS_{name.upper()}"] = spoken.get(text, f"`{text}`")
    page = (ROOT / "docs" / "penguinmails.md").read_text()
    assert dict(ROW.findall(page)) == wanted
    assert all(f"`{each}`" in page for each in Security)
