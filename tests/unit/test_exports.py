"""What `import pmqd` gives, and what it does not load."""

import subprocess
import sys

import pytest

import pmqd


def test_every_exported_name_is_there() -> None:
    """Each name in `__all__` can be imported, and nothing else is invented."""
    for name in pmqd.__all__:
        assert getattr(pmqd, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        pmqd.Nothing  # type: ignore[attr-defined]  # noqa: B018 - the access is the case


def test_importing_the_package_loads_no_driver() -> None:
    """The master and every command import pmqd; drivers and pydantic come with what needs them."""
    code = "import sys, pmqd; print(sorted({'psycopg', 'redis', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_producer_without_redis_does_not_load_it() -> None:
    """An application that only enqueues needs no Redis client in its memory."""
    code = "import sys; from pmqd import App; App(); print('redis' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
