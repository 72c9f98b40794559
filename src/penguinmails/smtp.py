"""SMTP: one mail over a connection that is kept for the next one, and the server's answer as a value.

`penguinmails.smtp_answers` says what answers mean, `penguinmails.smtp_dialogue` when a mail may have been delivered
without an answer. Here is the pool of connections, and what is tried again:

- a connection that breaks before the end of the mail, or that the server has closed since the last mail (421 to MAIL):
  the server cannot have accepted it. One new connection at once, then deferred.
- **ambiguous**: the connection broke, or the answer did not come in time, after the last dot was sent. The mail is never
  sent again here. Whether it is in a later attempt is the caller's to decide; both would carry the same Message-ID.
"""

import os
import time
import weakref
from collections import deque

from penguinmails.accounts import DEFAULT_ACCOUNT, Account, AccountError
from penguinmails.message import Mail
from penguinmails.settings import MailSettings
from penguinmails.smtp_answers import CLOSING, Answer, Stage, Verdict, lost
from penguinmails.smtp_dialogue import (
    ConnectionBrokenError,
    Dialogue,
    Handover,
    NoConnectionError,
    open_dialogue,
)

__all__ = [
    "Account",
    "Answer",
    "Connections",
    "Handover",
    "Stage",
    "Verdict",
    "account_named",
    "account_of",
]


def account_of(settings: MailSettings) -> Account:
    """The account that the settings describe with `smtp_…`."""
    return Account(
        host=settings.smtp_host,
        port=settings.smtp_port,
        security=settings.smtp_security,
        username=settings.smtp_username,
        password=settings.smtp_password.get_secret_value(),
        ca_file=settings.smtp_ca_file,
        timeout_seconds=settings.smtp_timeout_seconds,
        helo_name=settings.helo_name,
    )


def account_named(settings: MailSettings, name: str | None) -> Account:
    """The account of this name; without one, or with `default`, that of `account_of`.

    Raises:
        AccountError: the settings have no such account.
    """
    if name is None or name == DEFAULT_ACCOUNT:
        return account_of(settings)
    if name not in settings.accounts:
        allowed = ", ".join((DEFAULT_ACCOUNT, *sorted(settings.accounts)))
        raise AccountError(f"there is no account {name!r}; PENGUINMAILS_ACCOUNTS allows: {allowed}")
    return settings.accounts[name]


class Connections:
    """The idle connections of this process, by account.

    Threads may share it: each takes a connection for itself, so one connection never carries two mails at once, and
    there are never more of them than mails under way at once. One that has rested too long is closed when the next mail
    looks for one. A child that is forked closes its copies of its parent's idle connections at once.
    """

    def __init__(self) -> None:
        self._idle: dict[Account, deque[Dialogue]] = {}
        _ALL.add(self)

    def send(self, account: Account, mail: Mail, handover: Handover | None = None) -> Answer:
        """Hand one mail over; see the module's text for what each end means.

        Args:
            account: the server, and who we are there.
            mail: the message and its envelope.
            handover: kept up to date at every step. It tells, also when an exception that is not about mail (a job's
                timeout) ends this call, whether the mail may have been delivered.

        Returns:
            The verdict. Trouble with server or network is a verdict too, not an exception.
        """
        handover = handover or Handover()
        for last_try in (False, True):
            try:
                dialogue = (None if last_try else self._take(account)) or open_dialogue(account, handover)
                answer = dialogue.send(mail, handover)
            except NoConnectionError as error:
                return error.answer
            except ConnectionBrokenError as error:
                if last_try or handover.ambiguous:
                    return _broken(handover, error)
            else:
                self._keep(account, dialogue)
                if last_try or (answer.stage, answer.code) != (Stage.MAIL, CLOSING):
                    return answer
        raise AssertionError("the second round of the loop always returns")

    def close(self) -> None:
        """Say goodbye on every idle connection, for the end of a worker."""
        for dialogues in tuple(self._idle.values()):
            while (dialogue := _last(dialogues)) is not None:
                dialogue.quit()

    def _take(self, account: Account) -> Dialogue | None:
        """The connection that was used last, if it still stands; those behind it are older."""
        dialogues = self._idle.get(account, deque[Dialogue]())
        while (dialogue := _last(dialogues)) is not None:
            if time.monotonic() - dialogue.idle_since <= account.idle_seconds and dialogue.is_quiet():
                return dialogue
            dialogue.close()
        return None

    def _keep(self, account: Account, dialogue: Dialogue) -> None:
        if dialogue.is_open and dialogue.mails >= account.mails_per_connection:
            dialogue.quit()
        if dialogue.is_open:
            self._idle.setdefault(account, deque()).append(dialogue)

    def _forget(self) -> None:
        """In a new child: the sockets belong to the parent's conversations; only the child's copies are closed."""
        for dialogues in self._idle.values():
            for dialogue in dialogues:
                dialogue.close()
        self._idle = {}


def _last(dialogues: deque[Dialogue]) -> Dialogue | None:
    """Taken in one step, so that no two threads get the same one."""
    try:
        return dialogues.pop()
    except IndexError:
        return None


def _broken(handover: Handover, error: ConnectionBrokenError) -> Answer:
    text = f"{error} after the whole mail was sent" if handover.ambiguous else str(error)
    return lost(handover.stage, text, ambiguous=handover.ambiguous)


_ALL: weakref.WeakSet[Connections] = weakref.WeakSet()


def _forget_all() -> None:
    for connections in tuple(_ALL):
        connections._forget()  # noqa: SLF001 - the fork is this module's own affair


os.register_at_fork(after_in_child=_forget_all)
