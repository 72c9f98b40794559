"""The application object and its queues; the tasks stand in the modules that import it, and `app.py` gathers them."""

from pmqd import App, RetryPolicy

INBOUND = "email:processing"
CAMPAIGN = "campaign:process"
SENDING = "email-sending"
WARMUP = "warmup:process"
BOUNCE = "bounce:process"
QUEUES = (INBOUND, CAMPAIGN, SENDING, WARMUP, BOUNCE)
"""All queues of the company, most important first."""

# Servers that say "later" (greylisting, a full mailbox) mean minutes, not the seconds of pmqd's own default.
LATER = RetryPolicy(base_seconds=60, max_seconds=3600)

app = App()
