"""The settings of warming up, part of `MailSettings`: seed mailboxes, working hours, and the rates that hold or lower a ramp."""

from typing import Annotated, Self
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, Field, model_validator
from pydantic_settings import BaseSettings

from penguinmails.addresses import checked_address
from penguinmails.ramp import Hours, Thresholds

Rate = Annotated[float, Field(gt=0, le=1)]


def _known_zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"{name!r} is no time zone; allowed: a name such as UTC or Europe/Oslo") from error
    return name


class WarmupSettings(BaseSettings):
    """Each is a variable `PENGUINMAILS_WARMUP_…`.

    The rates: Google's sender guidelines (support.google.com/mail/answer/81126) ask for a spam rate below 0.1 % that never reaches
    0.3 %; Amazon SES (its developer guide, "Reputation metrics messages") reviews an account from 5 % bounces on and may
    stop it from 10 % on.
    """

    warmup_seeds: tuple[Annotated[str, AfterValidator(checked_address)], ...] = ()
    warmup_template: str = Field(default="warmup", min_length=1)
    warmup_reply_template: str = Field(default="warmup-reply", min_length=1)
    warmup_time_zone: Annotated[str, AfterValidator(_known_zone)] = "UTC"
    warmup_from_hour: int = Field(default=9, ge=0, le=23)
    warmup_to_hour: int = Field(default=17, ge=1, le=24)
    warmup_bounce_hold: Rate = 0.05
    warmup_bounce_lower: Rate = 0.10
    warmup_complaint_hold: Rate = 0.001
    warmup_complaint_lower: Rate = 0.003

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        """Pairs that contradict each other."""
        if self.warmup_from_hour >= self.warmup_to_hour:
            raise ValueError(
                f"warmup_from_hour is {self.warmup_from_hour}, must be below warmup_to_hour ({self.warmup_to_hour})"
            )
        for what in ("bounce", "complaint"):
            hold, lower = getattr(self, f"warmup_{what}_hold"), getattr(self, f"warmup_{what}_lower")
            if hold > lower:
                raise ValueError(
                    f"warmup_{what}_hold is {hold:g}, must not be above warmup_{what}_lower ({lower:g})"
                )
        return self

    @property
    def warmup_hours(self) -> Hours:
        """The working hours of a ramp that is started."""
        return Hours(ZoneInfo(self.warmup_time_zone), self.warmup_from_hour, self.warmup_to_hour)

    @property
    def warmup_thresholds(self) -> Thresholds:
        """The rates that hold or lower a ramp."""
        return Thresholds(
            self.warmup_bounce_hold,
            self.warmup_bounce_lower,
            self.warmup_complaint_hold,
            self.warmup_complaint_lower,
        )
