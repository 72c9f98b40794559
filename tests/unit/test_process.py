"""First steps and loop of a child, and the state folder, as far as they need no family."""

import fcntl
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from pmqd.arena import Arena, Kind, State
from pmqd.config import Settings
from pmqd.crashpoints import _crash_points, checkpoint
from pmqd.errors import ConfigError
from pmqd.listener import listen
from pmqd.process import ChildContext, StopFlag, run_loop
from pmqd.signals import Inbox, name_of
from pmqd.statedir import forget_instance, open_state_dir


@pytest.fixture
def stop() -> Iterator[StopFlag]:
    """A flag that hears this process's signals for the length of a test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    made = StopFlag()
    made.listen()
    yield made
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)
    made.close()


@pytest.fixture
def context(tmp_path: Path, stop: StopFlag) -> Iterator[ChildContext]:
    """A migrator's context."""
    arena = Arena.create(2, 1)
    slot = arena.slots[0]
    slot.open("migrator", "w")
    yield ChildContext(
        Settings(), arena, slot, "w", Kind.MIGRATOR, None, -1, None, stop, tmp_path, "host", ()
    )
    for bell in arena.bells:
        os.close(bell)


def test_the_stop_flag_stays(stop: StopFlag) -> None:
    """Not set, then set by SIGTERM, readable for ever after, for every thread that asks."""
    assert not stop.is_set()
    assert not stop.wait(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.wait(5)
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(stop.wait(5)))
    thread.start()
    thread.join(5)
    assert answers == [True]
    assert stop.is_set()


def test_another_signal_is_not_a_stop(stop: StopFlag) -> None:
    """A signal with a handler wakes, and asking takes its byte away."""
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    try:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert not stop.is_set()
        with pytest.raises(BlockingIOError):
            os.read(stop.fileno(), 1)
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_the_stop_is_heard_while_the_main_thread_is_in_c_code() -> None:
    """Another thread sees SIGTERM although no Python handler can run meanwhile."""
    program = """
import os, signal, threading, ctypes, sys
from pmqd.process import StopFlag
stop = StopFlag(); stop.listen()
def watch():
    os.kill(os.getpid(), signal.SIGTERM)
    print(stop.wait(5), flush=True); os._exit(0)
signal.pthread_sigmask(signal.SIG_BLOCK, [])
thread = threading.Thread(target=watch, daemon=True); thread.start()
libc = ctypes.CDLL(None)
while True: libc.usleep(20_000_000)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=20, check=False)
    assert done.stdout == b"True\n", done.stderr


def test_report_ready_rings_the_master(context: ChildContext) -> None:
    """The slot says ready and idle, and the master is woken."""
    context.report_ready()
    assert (context.slot.ready, context.slot.state) == (True, State.IDLE)
    assert context.arena.answer(context.arena.bell_master)


def test_the_loop_is_woken_by_bell_and_descriptor_and_ends_with_the_flag(context: ChildContext) -> None:
    """A round that would wait for a second is woken at once, three times, and the fourth round is the last."""
    read, write = os.pipe()
    rounds: list[float] = []

    def poll(now: float) -> float:
        rounds.append(now)
        if len(rounds) == 1:
            context.arena.ring(context.arena.bell_migrator)
        elif len(rounds) == 2:
            os.write(write, b"x")
        elif len(rounds) == 3:
            os.read(read, 1)
            context.stop.set()
        return 1.0

    began = time.monotonic()
    run_loop(context, poll, lambda: [read])
    assert len(rounds) == 3
    assert time.monotonic() - began < 0.9
    assert context.slot.progress_count == 3
    os.close(read)
    os.close(write)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the runner has a thread for its timeout
def test_crash_points(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the variable nothing; with it the named place alone, once per flag file; nonsense is an error."""
    _crash_points.cache_clear()
    monkeypatch.delenv("PMQD_CRASHPOINT", raising=False)
    checkpoint("claimed")
    _crash_points.cache_clear()
    monkeypatch.setenv("PMQD_CRASHPOINT", f"claimed=exit@{tmp_path / 'flag'},pushed=kill")
    checkpoint("claimed")
    checkpoint("settled")
    (tmp_path / "flag").touch()
    for at, code in (("claimed", 1), ("pushed", -signal.SIGKILL)):
        pid = os.fork()
        if pid == 0:
            checkpoint(at)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code
    assert not (tmp_path / "flag").exists()
    checkpoint("claimed")
    _crash_points.cache_clear()
    monkeypatch.setenv("PMQD_CRASHPOINT", "claimed=explode")
    with pytest.raises(ConfigError, match="explode"):
        checkpoint("claimed")
    _crash_points.cache_clear()


def test_the_inbox_keeps_the_order() -> None:
    """Signals come out as they came in, and the handlers of before are put back."""
    before = signal.getsignal(signal.SIGHUP)
    inbox = Inbox((signal.SIGHUP, signal.SIGUSR1))
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert inbox.take() == [signal.SIGHUP, signal.SIGUSR1]
    assert inbox.take() == []
    inbox.close()
    assert signal.getsignal(signal.SIGHUP) == before


def test_exit_codes_in_words() -> None:
    """Signals by name, codes by number."""
    assert [name_of(code) for code in (0, 3, -9, -64, -200)] == [
        "exit code 0",
        "exit code 3",
        "SIGKILL",
        "SIGRTMAX",
        "signal 200",
    ]


def test_the_state_folder(tmp_path: Path) -> None:
    """Made private, remembers the identity, empties metrics, keeps saved settles."""
    path = tmp_path / "a" / "state"
    first = open_state_dir(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert first.previous == ()
    identity = uuid4()
    first.write_instance(identity)
    (path / "settles").mkdir()
    (path / "metrics" / "old.db").touch()
    first.close()
    second = open_state_dir(path)
    assert second.previous == (identity,)
    assert list((path / "metrics").iterdir()) == []
    assert (path / "settles").is_dir()
    second.close()


def test_identities_are_kept_until_they_are_given_back(tmp_path: Path) -> None:
    """A second family that ends before its rescue hands on what the first had left; a strange name is nobody's."""
    first, second = uuid4(), uuid4()
    for identity in (first, second):
        state = open_state_dir(tmp_path)
        state.write_instance(identity)
        state.close()
    (tmp_path / "instances" / "garbage").touch()
    state = open_state_dir(tmp_path)
    assert sorted(state.previous) == sorted([first, second])
    forget_instance(tmp_path, first)
    forget_instance(tmp_path, first)
    state.close()
    state = open_state_dir(tmp_path)
    assert state.previous == (second,)
    state.close()


def test_a_lock_that_becomes_free_is_waited_for(tmp_path: Path) -> None:
    """A dying family's lock is taken as soon as it is free; one that stays is an error that names the folder."""
    holder = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match=str(tmp_path)):
        open_state_dir(tmp_path, patience=0.05)
    timer = threading.Timer(0.2, os.close, [holder])
    timer.start()
    began = time.monotonic()
    open_state_dir(tmp_path, patience=5).close()
    assert 0.1 < time.monotonic() - began < 4
    timer.join()


def test_bad_state_folders(tmp_path: Path) -> None:
    """A file, a link, a folder that others may write: each named in one line."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for name, said in (
        ("file", "exists"),
        ("link", "not a folder"),
        ("open", "others may write"),
        ("file/x", "ot a dir"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            open_state_dir(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_a_taken_web_address_is_a_configuration_error() -> None:
    """The message names setting, value and cause."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"web.listen = '{address}': Address already in use"):
            listen(address)
