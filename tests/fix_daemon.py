"""Fixture: `python -m pmqd run` as a process of its own, and the checks that nothing of it is left."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import httpx
import psutil
import pytest

import pmqd
from pmqd.programs import dying_with_parent

ROOT = Path(__file__).parent.parent
_SERVERS = ("postgres", "valkey-server", "redis-server")


class Daemon:
    """One running instance."""

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        environ: Mapping[str, str],
        prefix: Sequence[str] = (),
    ) -> None:
        self.settings = settings
        self.config = folder / "pmqd.toml"
        self.log_path = folder / "daemon.log"
        self.write_config(settings)
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "pmqd", "run", "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=dict(environ),
                start_new_session=True,
                preexec_fn=dying_with_parent(signal.SIGKILL),  # noqa: PLW1509 - one prepared call, no lock taken
            )

    @property
    def pid(self) -> int:
        """The master's process id."""
        return self.process.pid

    @property
    def log(self) -> str:
        """What the daemon has logged so far."""
        return self.log_path.read_text(errors="replace")

    @property
    def records(self) -> list[dict[str, Any]]:
        """The log's JSON records so far."""
        return [
            json.loads(line) for line in self.log.splitlines() if line.startswith("{") and line.endswith("}")
        ]

    @property
    def url(self) -> str:
        """The address of the web child."""
        return f"http://{self.settings['web']['listen']}"

    def get(self, path: str, timeout: float = 5.0) -> httpx.Response:
        """One HTTP request to the web child."""
        return httpx.get(
            self.url + path, timeout=timeout, verify=False
        )  # plain HTTP: else each call reads all certificates

    def write_config(self, settings: Mapping[str, Any]) -> None:
        """Write the configuration file anew; SIGHUP makes the daemon read it."""
        self.config.write_text(to_toml(settings))

    def wait_ready(self, timeout: float = 20.0) -> "Daemon":
        """Wait until /readyz says 200; fail with the log's end when it does not, or when the daemon ended."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                pytest.fail(f"the daemon ended with {self.process.returncode}:\n{self.log[-4000:]}")
            try:
                if self.get("/readyz").status_code == 200:
                    return self
            except httpx.HTTPError:
                pass
            time.sleep(0.02)
        pytest.fail(f"the daemon was not ready within {timeout:g} s:\n{self.log[-4000:]}")

    def family(self) -> list[psutil.Process]:
        """The master and all that came from it and lives, also after the master's death (found by session id)."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (OSError, psutil.Error):
                continue
        return found

    def children(self, kind: str) -> list[psutil.Process]:
        """The master's children of a kind ("worker", "migrator", "maintenance", "web"), by their titles."""
        found = []
        for process in self.family():
            try:
                title = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if process.pid != self.pid and title.startswith(f"pmqd: {kind}"):
                found.append(process)
        return found

    def signal(self, number: int) -> None:
        """Send the master a signal."""
        self.process.send_signal(number)

    def stop(self, timeout: float = 40.0) -> int:
        """SIGTERM, wait for the end; the exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGKILL)
            self.process.wait()
            pytest.fail(f"the daemon did not end within {timeout:g} s of SIGTERM:\n{self.log[-4000:]}")

    def kill(self) -> None:
        """SIGKILL to the master, and wait for its end."""
        self.process.kill()
        self.process.wait()

    def check_nothing_left(self, timeout: float = 1.5) -> None:
        """Fail if a process of the ended daemon still lives after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while left := self.family():
            if time.monotonic() > deadline:
                told = [f"{process.pid} {_title(process)}" for process in left]
                for process in left:
                    process.kill()
                pytest.fail(f"processes of the daemon {self.pid} live on: {told}\n{self.log[-2000:]}")
            time.sleep(0.02)


class MakeDaemon(Protocol):
    """What the fixture `daemon` gives."""

    def __call__(
        self,
        settings: Mapping[str, Any] | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        wait: bool = True,
    ) -> Daemon:
        """A running instance, stopped after the test.

        Args:
            settings: tables over the base: the test's `database` and `redis_url`, an own `state_dir`, a free port,
                a pool that runs tests.applications.trial:app. A table given here replaces single keys of the base's.
            environ: variables besides the test's own.
            wait: until it is ready.
        """


@pytest.fixture
def daemon(request: pytest.FixtureRequest, short_folder: Path) -> Iterator[MakeDaemon]:
    """The function `daemon(settings={…})`: starts an instance; afterwards it is stopped and nothing may be left."""
    running: list[Daemon] = []

    def make(
        settings: Mapping[str, Any] | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        wait: bool = True,
    ) -> Daemon:
        folder = short_folder / f"d{len(running)}"
        folder.mkdir()
        given = _with_base(settings or {}, folder, request)
        running.append(Daemon(folder, given, clean_environ() | dict(environ or {})))
        return running[-1].wait_ready() if wait else running[-1]

    yield make
    try:
        for one in running:
            one.stop()
    finally:
        for one in running:
            one.check_nothing_left()


def _with_base(settings: Mapping[str, Any], folder: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    base: dict[str, Any] = {
        "state_dir": str(folder / "state"),
        "drain_seconds": 5.0,
        "postgres": dict(settings.get("postgres", {})),
        "redis": dict(settings.get("redis", {})),
        "web": {"listen": f"127.0.0.1:{free_port()}"} | settings.get("web", {}),
        "log": {"format": "json"} | settings.get("log", {}),
        "workers": settings.get("workers", [{"app": "tests.applications.trial:app"}]),
    }
    # Asked for only when needed: a test with servers of its own does not start the session's.
    if "dsn" not in base["postgres"]:
        base["postgres"]["dsn"] = request.getfixturevalue("database")
    if "url" not in base["redis"]:
        base["redis"]["url"] = request.getfixturevalue("redis_url")
    return dict(settings) | base | {k: v for k, v in settings.items() if not isinstance(v, Mapping)}


def clean_environ() -> dict[str, str]:
    """This process's environment without settings of pmqd; the tests' applications and this process's own pmqd are importable."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PMQD_", "PG"))}
    source = Path(pmqd.__file__).parent.parent
    return kept | {"PYTHONPATH": f"{source}:{ROOT}", "PYTHONWARNINGS": "default"}


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def to_toml(settings: Mapping[str, Any]) -> str:
    """A configuration as TOML: JSON's strings, numbers, booleans and lists are TOML's too."""
    plain = {
        key: value for key, value in settings.items() if not isinstance(value, Mapping) and key != "workers"
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
    for key, table in settings.items():
        if isinstance(table, Mapping):
            tables = (
                {f'{key}."{name}"': inner for name, inner in table.items()}
                if key == "queues"
                else {key: table}
            )
            for header, inner in tables.items():
                lines += [f"[{header}]", *(f"{name} = {json.dumps(value)}" for name, value in inner.items())]
    for pool in settings.get("workers", []):
        lines += ["[[workers]]", *(f"{name} = {json.dumps(value)}" for name, value in pool.items())]
    return "\n".join(lines) + "\n"


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) or process.name()
    except psutil.Error:
        return "(gone)"


@pytest.fixture(autouse=True)
def no_process_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a test of the tiers that start processes, no child of the test run may be left but its servers."""
    yield
    if not {"process", "fault", "integration", "security"} & set(request.path.parts):
        return
    deadline = time.monotonic() + 2.0
    while left := _own_children():
        if time.monotonic() > deadline:
            told = [f"{process.pid} {_title(process)}" for process in left]
            for process in left:
                process.kill()
            pytest.fail(f"the test left processes: {told}")
        time.sleep(0.02)


def _own_children() -> list[psutil.Process]:
    """Living children of this process that are no database servers; zombies count, for nobody waited for them."""
    found = []
    for process in psutil.Process().children():
        try:
            if process.name() not in _SERVERS and not process.name().startswith("postgres"):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found
