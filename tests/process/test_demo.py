"""`pmqd demo` and `pmqd dev` as a person runs them: what they say, how they end, what they leave."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import psutil
import psycopg
import pytest

from tests.fix_servers import WaitUntil

PMQD = (sys.executable, "-m", "pmqd")
GREETINGS = """
from pmqd import App

app = App()


@app.task(queue="greetings")
def greet(name: str) -> str:
    return f"{name}, WORD"
"""


@dataclass(frozen=True)
class Place:
    """A folder of its own with mode 0700, and an environment by which every process started from it is known."""

    folder: Path
    environ: dict[str, str]

    def run(self, *arguments: str, seconds: float = 110) -> subprocess.CompletedProcess[str]:
        """One command, to its end."""
        return subprocess.run(
            [*PMQD, *arguments],
            cwd=self.folder,
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """One command, in a session of its own as a terminal gives it."""
        with (self.folder / "stderr").open("w") as stderr:
            return subprocess.Popen(
                [*PMQD, *arguments],
                cwd=self.folder,
                env=self.environ,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )

    def said(self) -> str:
        """What the started command has written so far."""
        return (self.folder / "stderr").read_text()

    def processes(self) -> list[psutil.Process]:
        """Every living process that was started from here."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("PMQD_TEST_PLACE") == self.environ["PMQD_TEST_PLACE"]:
                    found.append(process)
            except psutil.Error:
                continue
        return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def place(short_folder: Path) -> Iterator[Place]:
    """The folder; whatever a failed test left running there is ended."""
    folder = short_folder / "place"
    folder.mkdir(mode=0o700)
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PMQD_", "PENGUINMAILS_"))
    }
    made = Place(folder, kept | {"PMQD_TEST_PLACE": str(uuid4())})
    yield made
    for process in made.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def left_in(folder: Path) -> set[str]:
    """What is in the folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def assert_accounted(said: str) -> None:
    """Of 1,000 the server takes all but 20, some at the second try, and returns 40; 20 complain and 20 answer."""
    assert (
        "arrived     980 of 1,000 recipients got exactly one mail; 20 were refused for good, 20 told to come later and taken then"
    ) in said
    assert (
        "accounted   1,000 of 1,000: 920 sent, 20 bounced by the server's answer, 40 bounced by a notification, 20 complained, 0 held"
    ) in said
    assert "came back   20 replies matched; 60 addresses suppressed" in said


@pytest.mark.timeout(120)
def test_the_demo_sends_each_mail_once(place: Place) -> None:
    """Every recipient is accounted for, the figures are told, and nothing is left."""
    done = place.run("demo")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_accounted(done.stdout)
    assert re.search(r"throughput  [\d,]+ mails/s", done.stdout)
    assert len(re.findall(r"p50 [\d,.]+ ms, p99 [\d,.]+ ms", done.stdout)) == 2
    assert place.processes() == []
    assert left_in(place.folder) == set()


@pytest.mark.timeout(120)
def test_the_demo_survives_its_own_chaos(place: Place) -> None:
    """A worker and Redis are killed on the way, it is told, and every recipient is accounted for all the same."""
    done = place.run("demo", "--chaos")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_accounted(done.stdout)
    assert "1 crashed" in done.stdout
    for said in ("kill -9 of worker w", "kill -9 of the Redis server", "Redis is back"):
        assert said in done.stderr
    assert place.processes() == []
    assert left_in(place.folder) == set()


@pytest.mark.timeout(90)
def test_ctrl_c_ends_the_demo_in_order(place: Place, wait_until: WaitUntil) -> None:
    """In the middle of the campaign: exit code 130 and nothing left."""
    demo = place.start("demo", "--chaos")
    wait_until(lambda: "campaign of 1,000 mails enqueued" in place.said(), 60, "the campaign")
    demo.send_signal(signal.SIGINT)
    assert demo.wait(30) == 130, place.said()
    assert place.processes() == []
    assert left_in(place.folder) == {"stderr"}


@pytest.mark.timeout(90)
def test_a_killed_demo_takes_everything_with_it(place: Place, wait_until: WaitUntil) -> None:
    """Even SIGKILL leaves no process."""
    demo = place.start("demo", "--chaos")
    wait_until(lambda: "campaign of 1,000 mails enqueued" in place.said(), 60, "the campaign")
    demo.kill()
    demo.wait(10)
    wait_until(lambda: not place.processes(), 10, "the end of all processes")


@pytest.mark.timeout(110)
def test_dev_serves_an_application_and_reloads_it(place: Place, wait_until: WaitUntil) -> None:
    """A job enqueued from another shell runs; after a change of the code the next one runs the new code; broken code
    leaves the old in place; Ctrl-C ends all; the data is there at the next start.
    """
    code = place.folder / "greetings.py"
    code.write_text(GREETINGS.replace("WORD", "hello"))
    dev = place.start("dev", "--app", "greetings:app")
    wait_until(lambda: "in another shell" in place.said(), 60, "pmqd dev")
    dsn = _variables(place)["PMQD_POSTGRES__DSN"]
    assert _greet(place, dsn, "Ada", wait_until) == "Ada, hello"

    again = place.run("dev", "--app", "greetings:app", seconds=30)
    assert (again.returncode, "another `pmqd dev` runs" in again.stderr) == (1, True)

    code.write_text("this is no Python")
    wait_until(lambda: "reloading" in place.said(), 10, "the reload")
    code.write_text(GREETINGS.replace("WORD", "good morning"))
    wait_until(lambda: place.said().count("reloading") > 1, 10, "the second reload")
    wait_until(lambda: _greet(place, dsn, "Bo", wait_until) == "Bo, good morning", 30, "the new code")

    assert "PMQD_WEB__LISTEN=127.0.0.1:" in (place.folder / ".pmqd" / "dev" / "env").read_text()
    dev.send_signal(signal.SIGINT)
    assert dev.wait(30) == 0, place.said()
    assert place.processes() == []

    dev = place.start("dev", "--app", "greetings:app")
    wait_until(lambda: "in another shell" in place.said(), 60, "the second pmqd dev")
    with psycopg.connect(_variables(place)["PMQD_POSTGRES__DSN"]) as conn:
        row = conn.execute("select count(*) from pmqd.jobs where status = 'completed'").fetchone()
    assert row is not None
    assert row[0] >= 2
    dev.send_signal(signal.SIGTERM)
    assert dev.wait(30) == 0, place.said()
    assert place.processes() == []


def test_dev_names_a_module_that_is_not_there(place: Place) -> None:
    """One line, exit code 78, nothing started."""
    done = place.run("dev", "--app", "nosuch:app", seconds=30)
    assert done.returncode == 78
    assert "there is no module 'nosuch' here" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def _variables(place: Place) -> dict[str, str]:
    """What `. .pmqd/dev/env` sets."""
    text = (place.folder / ".pmqd" / "dev" / "env").read_text()
    return dict(re.findall(r"^export (\w+)='?(.*?)'?$", text, re.MULTILINE))


def _greet(place: Place, dsn: str, name: str, wait_until: WaitUntil) -> str:
    """Enqueue from another process and wait for the result."""
    program = f"from greetings import greet; print(greet.enqueue(name={name!r}))"
    variables = {**place.environ, **_variables(place)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=place.folder,
        env=variables,
        capture_output=True,
        text=True,
        check=True,
    )
    with psycopg.connect(dsn, autocommit=True) as conn:

        def result() -> str | None:
            query = "select result #>> '{}' from pmqd.jobs where id = %s and status = 'completed'"
            row = conn.execute(query, [done.stdout.strip()]).fetchone()
            return str(row[0]) if row else None

        return wait_until(result, 20, f"the greeting of {name}") or ""
