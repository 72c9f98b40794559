"""The application that the workers run (`penguinmails.app:app`): every module with tasks is imported here."""

from penguinmails.bounces import process_bounce
from penguinmails.campaign import process_campaign
from penguinmails.processing import process_inbound
from penguinmails.queues import BOUNCE, CAMPAIGN, INBOUND, QUEUES, SENDING, WARMUP, app
from penguinmails.sending import connections, send_campaign_mail
from penguinmails.warmup import engage, note_letter, plan_warmup, send_warmup_letter

__all__ = [
    "BOUNCE",
    "CAMPAIGN",
    "INBOUND",
    "QUEUES",
    "SENDING",
    "WARMUP",
    "app",
    "connections",
    "engage",
    "note_letter",
    "plan_warmup",
    "process_bounce",
    "process_campaign",
    "process_inbound",
    "send_campaign_mail",
    "send_warmup_letter",
]
