"""What the master asks the kernel about processes: its children, and those of the family before it."""

import contextlib
import os
from pathlib import Path

PAGE_KB = os.sysconf("SC_PAGE_SIZE") // 1024


def rss_kb(pid: int) -> int:
    """Resident memory of a process; 0 where there is none."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_KB
    return 0


def oom_kills() -> int:
    """Processes that the kernel killed for memory since it started."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def birth(pid: int) -> int:
    """When a process was started (clock ticks since the boot): a pid may come again, this does not; 0 where there is none."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = Path(f"/proc/{pid}/stat").read_text()
        state, *fields = text[text.rindex(")") + 2 :].split()
        return 0 if state in "ZX" else int(fields[18])
    return 0


def holders(path: Path) -> list[int]:
    """Other processes that have a file open, as far as this user may see."""
    wanted, found = path.stat(), []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):
                if any(_is_same(entry, wanted) for entry in (folder / "fd").iterdir()):
                    found.append(int(folder.name))
    return found


def _is_same(entry: Path, wanted: os.stat_result) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(entry.stat(), wanted)
    return False


def threads() -> int:
    """Threads of this process, those of C libraries included."""
    return len(list(Path("/proc/self/task").iterdir()))


def reap_strangers(own: set[int]) -> None:
    """Reap orphans that became children of this process; its own children are left to multiprocessing.

    Args:
        own: pids that are not strangers. One of them that died just now ends the look: it is reaped in the next turn.
    """
    with contextlib.suppress(ChildProcessError):
        while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if found.si_pid in own or found.si_pid == 0:
                return
            os.waitpid(found.si_pid, 0)
