"""What every test may use; the fixtures themselves stand in fix_*.py."""

import os
import shutil
import tempfile
from pathlib import Path

import hypothesis
import psutil

pytest_plugins = [
    "tests.fix_servers",
    "tests.fix_store",
    "tests.fix_proxy",
    "tests.fix_daemon",
    "tests.fix_redis_ha",
    "tests.fix_postgres_ha",
    "tests.fix_network",
]

# How long one example takes says more about the machine than about the code; pytest's own limit ends what hangs.
hypothesis.settings.register_profile("pmqd", deadline=None)
hypothesis.settings.load_profile("pmqd")


def _work_in_memory() -> None:
    """Servers and databases come and go by the thousand: on a disk, making and removing their files is half of the system's work."""
    memory, needed = Path("/dev/shm"), 8 << 30
    if "TMPDIR" in os.environ or not memory.is_dir() or not os.access(memory, os.W_OK):
        return
    if min(shutil.disk_usage(memory).free, psutil.virtual_memory().available) >= needed:
        os.environ["TMPDIR"] = str(memory)
        tempfile.tempdir = None


_work_in_memory()
