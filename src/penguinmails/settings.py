"""How mails leave: the SMTP account, from `PENGUINMAILS_*` variables (none is required on a machine with a local relay)."""

import ipaddress
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from penguinmails.message import checked_address, clean_name

PACKAGED_TEMPLATES = Path(__file__).parent / "templates"


class Security(StrEnum):
    """What protects the conversation with the SMTP server; certificates are always verified."""

    NONE = "none"
    STARTTLS = "starttls"
    TLS = "tls"


class Ambiguous(StrEnum):
    """What becomes of a mail of which nobody knows whether the server has taken it."""

    HOLD = "hold"
    RESEND = "resend"


class MailSettings(BaseSettings):
    """Settings of the sending account; each is the variable of its name in capitals, with `PENGUINMAILS_` before it."""

    model_config = SettingsConfigDict(env_prefix="PENGUINMAILS_", frozen=True, extra="forbid")

    smtp_host: str = Field(default="127.0.0.1", min_length=1)
    smtp_port: int = Field(default=25, ge=1, le=65535)
    smtp_security: Security = Security.NONE
    smtp_username: str = ""
    smtp_password: SecretStr = SecretStr("")
    smtp_ca_file: Path | None = None
    smtp_timeout_seconds: float = Field(default=10.0, gt=0, le=600)
    helo_name: str = Field(default="", pattern=r"^[A-Za-z0-9.:\[\]-]*$")
    from_address: Annotated[str, AfterValidator(checked_address)] = "news@localhost"
    from_name: Annotated[str, AfterValidator(clean_name)] = ""
    templates: Path = PACKAGED_TEMPLATES
    ambiguous: Ambiguous = Ambiguous.HOLD

    @model_validator(mode="after")
    def _check_password_is_protected(self) -> Self:
        """A password must not cross a network that others can read."""
        if self.smtp_username and self.smtp_security is Security.NONE and not _is_loopback(self.smtp_host):
            raise ValueError(
                f"smtp_username is set, but smtp_security is 'none' and smtp_host {self.smtp_host!r} is another machine: "
                "choose 'starttls' or 'tls', so that the password is not sent in the clear"
            )
        return self


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@lru_cache(maxsize=1)
def mail_settings() -> MailSettings:
    """The settings of this process, read once, at the first mail.

    Raises:
        pydantic.ValidationError: a variable has a value that is not allowed.
    """
    return MailSettings()
