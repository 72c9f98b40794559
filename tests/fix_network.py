"""Fixture: hosts in network namespaces, with both stores in one of their own."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.hosts import Network, why_no_namespaces


@pytest.fixture
def network(short_folder: Path) -> Iterator[Network]:
    """A network of its own for one test; skipped where none can be made."""
    reason = why_no_namespaces()
    if reason:
        pytest.skip(reason)
    with ExitStack() as stack:
        made = Network(short_folder)
        stack.callback(made.close)
        yield made
