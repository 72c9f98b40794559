"""The settings: their names, types, defaults, and what is allowed. `config` reads them."""

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from pmqd.address import Address, read
from pmqd.job import MAX_ATTEMPTS_LIMIT

QUEUE_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.:-]{0,99}$"
"""Queue names; they do not end in `:high` or `:low` either, which name the bands' lists in Redis."""


@dataclass(frozen=True)
class Allowed:
    """What a setting may be, in words, where its type and limits do not say it."""

    text: str


@dataclass(frozen=True)
class Secret:
    """The setting's value holds, or may hold, a password: it is shown masked, or not at all if it is nothing else."""

    whole: bool = False


class Section(BaseModel):
    """The base of all settings: frozen, nothing unknown, no silent conversion, no value in pydantic's own errors."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        validate_by_name=True,
        validate_by_alias=True,
    )


def _postgres_dsn(value: str) -> str:
    try:
        conninfo_to_dict(value)
    except (psycopg.ProgrammingError, UnicodeDecodeError) as error:  # an escape such as %D9 may be no UTF-8
        raise ValueError("not a connection string") from error
    return value


def _redis_url(value: str) -> str:
    read(value)
    return value


def _application(value: str) -> str:
    module, _, attribute = value.partition(":")
    if not attribute.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise ValueError("not module:attribute")
    return value


def _queue_name(value: str) -> str:
    if value.endswith((":high", ":low")):
        raise ValueError("ends like a band")
    return value


def _schema_name(value: str) -> str:
    if value.startswith("pg_"):
        raise ValueError("reserved by PostgreSQL")
    return value


def split_listen(listen: str) -> tuple[str, int]:
    """The host and port of "host:port"; the brackets of an IPv6 address are taken off.

    Raises:
        ValueError: it is not of that form, or the port is not from 1 to 65535.
    """
    host, colon, port = listen.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not bare or (":" in bare and bare == host) or not (port.isascii() and port.isdecimal()):
        raise ValueError("not host:port")
    if not 1 <= int(port) <= 65535:
        raise ValueError("no such port")
    return bare, int(port)


def _listen(value: str) -> str:
    split_listen(value)
    return value


QueueName = Annotated[
    str,
    StringConstraints(pattern=QUEUE_NAME),
    AfterValidator(_queue_name),
    Allowed(
        "1 to 100 letters, digits and _ . : - that begin with a letter or digit and do not end in :high or :low"
    ),
]


class PostgresSettings(Section):
    """`[postgres]`: the store."""

    dsn: Annotated[
        str,
        AfterValidator(_postgres_dsn),
        Secret(),
        Allowed("a PostgreSQL connection string: postgresql://user@host:5432/name, or host=… dbname=…"),
        Field(
            repr=False,
            description="Where PostgreSQL is. What it leaves out comes from libpq's own places (PGHOST, PGPASSFILE …)."
            " Servers on other hosts are asked for TLS and their certificate is verified (sslmode=verify-full), unless it"
            " says otherwise; of several hosts the one that can be written to is used.",
        ),
    ] = ""
    direct_dsn: Annotated[
        str,
        AfterValidator(_postgres_dsn),
        Secret(),
        Allowed("a PostgreSQL connection string; empty: as dsn"),
        Field(
            repr=False,
            description="The way to PostgreSQL itself where dsn leads to a pooler in transaction mode (PgBouncer): the"
            " migrator leads and listens there, and the schema is made there. Set, it also says that dsn is a pooler.",
        ),
    ] = ""
    standby: Annotated[
        Literal["asynchronous", "synchronous"],
        Field(
            description="Whether a standby that is promoted may lack the last commits. If so, nothing is claimed for one"
            " lease (30 ticks) after a failover, while jobs may still run whose claims were lost.",
        ),
    ] = "asynchronous"
    schema_name: Annotated[
        str,
        StringConstraints(pattern=r"^[a-z_][a-z0-9_]{0,39}$"),
        AfterValidator(_schema_name),
        Allowed("1 to 40 of a-z, 0-9 and _, not beginning with a digit or pg_"),
        Field(alias="schema", description="The schema that holds pmqd's tables and functions."),
    ] = "pmqd"
    connect_timeout_seconds: Annotated[
        float, Field(ge=1, le=60, description="How long a connection may take to come about.")
    ] = 2.0
    statement_timeout_seconds: Annotated[
        float,
        Field(
            ge=0.1,
            le=600,
            description="How long one of pmqd's own statements may run before the server ends it.",
        ),
    ] = 5.0

    @property
    def direct(self) -> str:
        """The way to PostgreSQL itself, past any pooler."""
        return self.direct_dsn or self.dsn

    @property
    def pooled(self) -> bool:
        """Whether `dsn` leads to a pooler."""
        return self.direct_dsn not in ("", self.dsn)


class RedisSettings(Section):
    """`[redis]`: the broker."""

    url: Annotated[
        str,
        AfterValidator(_redis_url),
        Secret(),
        Allowed(
            "redis://[user:password@]host[:port][/database], redis+sentinel://[user:password@]host[:port],…/NAME[/database]"
            " or unix:///path[?db=database]; with TLS rediss:// or rediss+sentinel://"
        ),
        Field(repr=False, description="Where Redis is; of a cluster, one or more of its nodes with commas."),
    ] = "redis://127.0.0.1:6379/0"
    ca_file: Annotated[
        str,
        Allowed("the path of a PEM file"),
        Field(
            description="With rediss: the certificates that the server's must come from. Empty: those that the system trusts."
        ),
    ] = ""
    cert_file: Annotated[
        str,
        Allowed("the path of a PEM file"),
        Field(description="With rediss: our own certificate, where the server asks for one."),
    ] = ""
    key_file: Annotated[
        str,
        Allowed("the path of a PEM file"),
        Field(description="The key of `cert_file`. Empty: it stands in the same file."),
    ] = ""
    tls_verify: Annotated[
        Literal["full", "ca", "none"],
        Field(
            description="With rediss: what of the server's certificate is checked: where it comes from and the host's name;"
            " only where it comes from; nothing."
        ),
    ] = "full"
    item: Annotated[
        Literal["id", "full"],
        Field(
            description="What stands in the lists: the job's id, or the whole job as JSON for whoever else reads them."
            " pmqd itself understands both."
        ),
    ] = "id"
    job_status: Annotated[
        Literal["lazy", "all", "off"],
        Field(
            description="Which jobs have a live status in job:ID: those that run long, report progress or wait for a"
            " retry; all; none."
        ),
    ] = "lazy"
    prefix: Annotated[
        str,
        StringConstraints(pattern=r"^[!-~]{0,64}$"),
        Allowed("up to 64 printable ASCII characters without spaces"),
        Field(
            description='Precedes the name of every key. A cluster needs a hash tag in it, such as "{pmqd}:".'
        ),
    ] = ""

    @property
    def address(self) -> Address:
        """`url`, taken apart."""
        return read(self.url)

    @property
    def configured(self) -> bool:
        """Whether somebody said where Redis is; a producer leaves Redis alone otherwise."""
        return "url" in self.model_fields_set


class MigratorSettings(Section):
    """`[migrator]`: what moves due jobs from PostgreSQL to Redis."""

    batch_size: Annotated[int, Field(ge=1, le=10000, description="The most jobs that one step moves.")] = 1000
    poll_seconds: Annotated[
        float,
        Field(
            ge=0.05,
            le=3600,
            description="How long it sleeps at most when nothing wakes it. New jobs wake it at once, so this is a net"
            " and not the speed.",
        ),
    ] = 5.0
    error_pause_seconds: Annotated[
        float,
        Field(ge=0, le=3600, description="How long it rests after an error that is not a lost connection."),
    ] = 10.0


class PoolSettings(Section):
    """`[[workers]]`: a pool of worker processes that run the jobs of one application."""

    name: Annotated[
        str,
        StringConstraints(pattern=r"^[A-Za-z0-9](_?[A-Za-z0-9-])*$", max_length=32),
        Allowed("letters, digits, - and single _, beginning with a letter or digit, at most 32"),
        Field(
            description="The pool's name, in the log, in metrics and in PMQD_WORKERS__NAME__KEY. Each its own."
        ),
    ] = "default"
    app: Annotated[
        str,
        AfterValidator(_application),
        Allowed('"module:attribute", such as penguinmails.app:app'),
        Field(description="The application whose tasks and handlers run here. It has no default."),
    ]
    queues: Annotated[
        list[QueueName],
        Field(
            description="The queues served, most important first. Empty: all that the application handles."
        ),
    ] = []
    processes: Annotated[int, Field(ge=1, le=512, description="How many worker processes.")] = 2
    concurrency: Annotated[
        int,
        Field(
            ge=1,
            le=1000,
            description="How many jobs one process runs at once. Above 1, plain handlers run in threads and async"
            " handlers in one event loop.",
        ),
    ] = 1
    order: Annotated[
        Literal["bands", "queues"],
        Field(
            description='"bands": high-priority jobs of all queues, then normal, then low. "queues": all of the first'
            " queue, then of the second."
        ),
    ] = "bands"
    max_jobs: Annotated[
        int, Field(ge=0, le=2**31 - 1, description="After so many jobs a process is replaced. 0: never.")
    ] = 0
    max_memory_mb: Annotated[
        int,
        Field(
            ge=0,
            le=2**31 - 1,
            description="A process that holds more resident memory (MiB) is replaced after its job. 0: never.",
        ),
    ] = 0


class QueueSettings(Section):
    """`[queues."NAME"]`: what holds for the jobs of one queue where neither the task nor the enqueue says it."""

    default_priority: Annotated[
        int | None, Field(ge=1, le=32767, description="Priority of its jobs; lower runs first. Without: 100.")
    ] = None
    max_attempts: Annotated[
        int | None,
        Field(ge=1, le=MAX_ATTEMPTS_LIMIT, description="Attempts before a job is failed. Without: 3."),
    ] = None
    timeout_seconds: Annotated[
        float | None, Field(ge=0.1, le=604800, description="How long an attempt may run. Without: 300.")
    ] = None
    retry_base_seconds: Annotated[
        float | None,
        Field(
            ge=0.01,
            le=86400,
            description="The wait before the second attempt; doubled each time. Without: 2.",
        ),
    ] = None
    retry_max_seconds: Annotated[
        float | None, Field(ge=0.01, le=2592000, description="The longest such wait. Without: 300.")
    ] = None
    isolation: Annotated[
        Literal["finish", "abort"],
        Field(
            description="What becomes of its jobs on a host that PostgreSQL does not hear any more: they finish, and may"
            " run elsewhere at the same time; or they are killed before they can."
        ),
    ] = "finish"


class MaintenanceSettings(Section):
    """`[maintenance]`: how long finished work is kept."""

    completed_days: Annotated[
        int, Field(ge=1, le=36500, description="Days that completed jobs are kept.")
    ] = 183
    failed_days: Annotated[
        int, Field(ge=1, le=36500, description="Days that failed and cancelled jobs are kept.")
    ] = 365
    log_days: Annotated[int, Field(ge=1, le=36500, description="Days that rows of job_logs are kept.")] = 90


class WebSettings(Section):
    """`[web]`: metrics, health and the HTTP API."""

    listen: Annotated[
        str,
        AfterValidator(_listen),
        Allowed("host:port, such as 127.0.0.1:9640 or [::1]:9640; beyond loopback only with web.token"),
        Field(description="The address of /metrics, /healthz, /readyz and the API."),
    ] = "127.0.0.1:9640"
    token: Annotated[
        str,
        StringConstraints(pattern=r"^[!-~]{0,256}$"),
        Secret(whole=True),
        Allowed("up to 256 printable ASCII characters without spaces"),
        Field(
            repr=False,
            description="The bearer token for everything that changes something. Empty: nothing can be changed over"
            " HTTP.",
        ),
    ] = ""
    hosts: Annotated[
        list[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,253}$")]],
        Allowed("a list of host names without ports"),
        Field(
            description="The names by which clients reach it, besides that of listen, localhost and any IP address. A"
            " request that names another host is refused: it may be a page whose own name was made to point here."
        ),
    ] = []


class LogSettings(Section):
    """`[log]`: what is written to standard error."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Field(description="The least serious record that is written."),
    ] = "info"
    format: Annotated[
        Literal["auto", "json", "console"],
        Field(description="One JSON object a line, or coloured text; auto: text where a terminal looks on."),
    ] = "auto"


def default_state_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """What systemd made for the service, else the user's runtime directory, else a folder in the temporary one."""
    if environ.get("RUNTIME_DIRECTORY"):
        return Path(
            environ["RUNTIME_DIRECTORY"].split(":")[0]
        )  # systemd lists several with colons; the first is ours
    if environ.get("XDG_RUNTIME_DIR"):
        return Path(environ["XDG_RUNTIME_DIR"]) / "pmqd"
    return Path(tempfile.gettempdir()) / f"pmqd-{os.geteuid()}"


def _path_from_text(value: object) -> object:
    return Path(value).absolute() if isinstance(value, str) and value and "\0" not in value else value


class Settings(Section):
    """All settings of one instance."""

    state_dir: Annotated[
        Path,
        BeforeValidator(_path_from_text),
        Allowed("the path of a folder"),
        Field(
            description="Folder of this instance alone: its lock, settles that could not be written at the end, metric"
            " files. Without: $RUNTIME_DIRECTORY, else $XDG_RUNTIME_DIR/pmqd, else pmqd-UID in the temporary folder."
        ),
    ] = Field(default_factory=default_state_dir)
    drain_seconds: Annotated[
        float,
        Field(
            ge=0,
            le=86400,
            description="How long running jobs may go on after SIGTERM before they are cut off.",
        ),
    ] = 30.0
    timeout_grace_seconds: Annotated[
        float,
        Field(
            ge=0.1,
            le=3600,
            description="From the exception that a timeout raises in a job to killing its process.",
        ),
    ] = 5.0
    boot_seconds: Annotated[
        float, Field(ge=0.5, le=3600, description="How long a new process may take until it is ready.")
    ] = 30.0
    postgres: PostgresSettings = PostgresSettings()
    redis: RedisSettings = RedisSettings()
    migrator: MigratorSettings = MigratorSettings()
    workers: list[PoolSettings] = []
    queues: dict[QueueName, QueueSettings] = {}
    maintenance: MaintenanceSettings = MaintenanceSettings()
    web: WebSettings = WebSettings()
    log: LogSettings = LogSettings()


def masked(address: str) -> str:
    """A PostgreSQL connection string or Redis URL as it may be shown: without its passwords.

    What cannot be read as either is hidden whole, because nobody knows where the password stands in it; so is what can be
    read, but as something else than was meant: a password with a `/` or `@` that is not escaped ends up in other parts.
    """
    if _SCHEME.match(address) and not address.startswith("postgres"):
        return _masked_url(address)
    try:
        found = conninfo_to_dict(address)
    except (psycopg.ProgrammingError, UnicodeDecodeError):
        return "***"
    if any(_ODD.search(str(found.get(name, ""))) for name in ("host", "hostaddr", "port", "dbname")):
        return "***"
    secret = ("password", "secret", "key")
    return make_conninfo("", **{k: "***" if any(s in k for s in secret) else v for k, v in found.items()})


def _masked_url(url: str) -> str:
    found = _URL.fullmatch(url)
    try:
        urlsplit(url)
    except ValueError:
        found = None
    if found is None:
        return "***"
    who = "" if found["user"] is None else found["user"] + (":***@" if found["password"] else "@")
    query = found["query"] or ""
    return f"{found['scheme']}{who}{found['place']}{'?***' if 'pass' in query.lower() else query}"


_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_ODD = re.compile(r"[@=]|://|\s")
_URL = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?:(?P<user>[^:@/?#\s]*)(?P<password>:[^@/?#\s]*)?@)?"
    r"(?P<place>[^@?#\s]*)(?P<query>\?[^@#\s]*)?"
)
