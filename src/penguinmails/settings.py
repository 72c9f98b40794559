"""How mails leave: accounts, signatures, unsubscribing; from `PENGUINMAILS_*` variables, of which none is required."""

import re
from dataclasses import replace
from enum import StrEnum
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, SecretStr, model_validator
from pydantic_settings import SettingsConfigDict

from penguinmails.accounts import DEFAULT_ACCOUNT, Account, Security
from penguinmails.addresses import checked_address, clean_name, domain_of
from penguinmails.signing import Signer, load_signer
from penguinmails.templating import UNSUBSCRIBE_VARIABLE
from penguinmails.unsubscribe import Unsubscribe
from penguinmails.warmup_settings import WarmupSettings

__all__ = ["PACKAGED_TEMPLATES", "Ambiguous", "MailSettings", "Security", "given_variables", "mail_settings"]

PACKAGED_TEMPLATES = Path(__file__).parent / "templates"
ACCOUNT_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")


def _named(accounts: dict[str, Account]) -> dict[str, Account]:
    """Each account under its own name."""
    for name in accounts:
        if not ACCOUNT_NAME.fullmatch(name) or name == DEFAULT_ACCOUNT:
            raise ValueError(
                f"account name {name!r} is not allowed: lower-case letters, digits, - and _, and not 'default'"
            )
    return {name: replace(account, name=name) for name, account in accounts.items()}


class Ambiguous(StrEnum):
    """What becomes of a mail of which nobody knows whether the server has taken it."""

    HOLD = "hold"
    RESEND = "resend"


class MailSettings(WarmupSettings):
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
    accounts: Annotated[dict[str, Account], AfterValidator(_named)] = Field(default_factory=dict)
    from_address: Annotated[str, AfterValidator(checked_address)] = "news@localhost"
    from_name: Annotated[str, AfterValidator(clean_name)] = ""
    templates: Path = PACKAGED_TEMPLATES
    ambiguous: Ambiguous = Ambiguous.HOLD
    retry_base_seconds: float = Field(default=60.0, gt=0, le=3600)
    soft_bounces_to_suppress: int = Field(default=5, ge=0, le=1000)
    dkim_keys: dict[str, Path] = Field(default_factory=dict)
    dkim_domain: str = ""
    unsubscribe_url: str = ""
    unsubscribe_mailto: str = ""
    unsubscribe_keys: tuple[SecretStr, ...] = ()

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        """What is wrong is said when the settings are read, not at the first mail."""
        Account(
            self.smtp_host,
            self.smtp_port,
            self.smtp_security,
            self.smtp_username,
            self.smtp_password.get_secret_value(),
        )
        if not self.unsubscribe_url and (self.unsubscribe_mailto or self.unsubscribe_keys):
            raise ValueError("unsubscribe_mailto and unsubscribe_keys need unsubscribe_url")
        assert self.unsubscribe or not self.unsubscribe_url
        self._check_signed_domains()
        assert len(self.signers) == len(self.dkim_keys)
        return self

    def _check_signed_domains(self) -> None:
        """A signature of another domain than the sender's counts for nothing (DMARC, RFC 7489, 3.1.1)."""
        senders = {"from_address": self.from_address} | {
            f"from_address of account {name!r}": account.from_address
            for name, account in self.accounts.items()
            if account.from_address and self.dkim_keys
        }
        domain = (self.dkim_domain or (domain_of(self.from_address) if self.dkim_keys else "")).lower()
        for what, address in senders.items():
            sender = domain_of(address)
            if domain and sender != domain and not sender.endswith(f".{domain}"):
                raise ValueError(
                    f"dkim_domain is {domain!r}, must be the domain of {what} ({sender}) or one above it"
                )

    @cached_property
    def unsubscribe(self) -> Unsubscribe | None:
        """Where recipients unsubscribe; None where that is not configured."""
        if not self.unsubscribe_url:
            return None
        keys = tuple(key.get_secret_value().encode() for key in self.unsubscribe_keys)
        return Unsubscribe(self.unsubscribe_url, keys, self.unsubscribe_mailto)

    @cached_property
    def signers(self) -> tuple[Signer, ...]:
        """The DKIM keys, read once."""
        domain = self.dkim_domain or domain_of(self.from_address)
        return tuple(
            load_signer(file, domain=domain, selector=selector) for selector, file in self.dkim_keys.items()
        )


def given_variables(settings: MailSettings) -> frozenset[str]:
    """The variables that every mail's template has beside name, address and the recipient's columns."""
    return frozenset({UNSUBSCRIBE_VARIABLE} if settings.unsubscribe else ())


@lru_cache(maxsize=1)
def mail_settings() -> MailSettings:
    """The settings of this process, read once, at the first mail.

    Raises:
        pydantic.ValidationError: a variable has a value that is not allowed.
    """
    return MailSettings()
