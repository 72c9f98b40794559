"""A daemon that runs background jobs on PostgreSQL and Redis at once; here is what applications import."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pmqd.client import App
    from pmqd.errors import (
        BrokerUnavailable,
        ConfigError,
        EnqueueError,
        PmqdError,
        RegistrationError,
        SchemaError,
        SettleRefused,
        StoreUnavailable,
    )
    from pmqd.job import Job
    from pmqd.retry import Discard, JobCancelled, JobTimeout, Retry, RetryPolicy, Snooze

__all__ = [
    "App",
    "BrokerUnavailable",
    "ConfigError",
    "Discard",
    "EnqueueError",
    "Job",
    "JobCancelled",
    "JobTimeout",
    "PmqdError",
    "RegistrationError",
    "Retry",
    "RetryPolicy",
    "SchemaError",
    "SettleRefused",
    "Snooze",
    "StoreUnavailable",
]

_MODULES = {
    "App": "pmqd.client",
    "Job": "pmqd.job",
    **dict.fromkeys(
        ("Discard", "JobCancelled", "JobTimeout", "Retry", "RetryPolicy", "Snooze"), "pmqd.retry"
    ),
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Imports what is asked for; the master and the commands import pmqd too, and must not load a driver."""
        if name not in __all__:
            raise AttributeError(f"module 'pmqd' has no attribute {name!r}")
        return getattr(import_module(_MODULES.get(name, "pmqd.errors")), name)
