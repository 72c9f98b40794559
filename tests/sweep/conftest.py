"""Fixtures of the sweep: servers for all of a test process's pairs, one instance for each module."""

from collections.abc import Iterator

import pytest

from tests.sweep_rig import How, Rig, Servers, own_servers


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """Servers that any pair may kill."""
    with own_servers() as servers:
        yield servers


@pytest.fixture(scope="module")
def rig(servers: Servers, request: pytest.FixtureRequest) -> Iterator[Rig]:
    """The module's instance; its `HOW` is what a process does at an armed point."""
    how: How = request.module.HOW
    made = Rig(servers, how)
    try:
        yield made
    finally:
        made.close()
