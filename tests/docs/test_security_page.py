"""The index of docs/security.md names tests that exist, and every file of the security tier stands in it."""

import ast
import re
from pathlib import Path

from tests.fix_daemon import ROOT

PAGE = (ROOT / "docs" / "security.md").read_text()
POLICY = (ROOT / "SECURITY.md").read_text()


def all_tests() -> set[str]:
    """The names of all test functions."""
    found = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        tree = ast.parse(path.read_text())
        found |= {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
        }
    return found


def named() -> list[str]:
    """The beginnings of names in the last column of the table of threats."""
    table = PAGE.partition("## Threats")[2]
    rows = [line.rstrip("| ").rpartition("|")[2] for line in table.splitlines() if line.startswith("| ")]
    return [name for cell in rows[1:] for name in re.findall(r"`(test_\w+)`", cell)]


def test_each_threat_has_its_tests() -> None:
    """Every name in the table is the beginning of a test's name."""
    known = all_tests()
    assert len(named()) >= 19
    assert [name for name in named() if not any(test.startswith(name) for test in known)] == []


def test_each_file_of_the_tier_is_in_the_index() -> None:
    """A new threat gets its row."""
    files = {path.stem for path in Path(ROOT / "tests" / "security").glob("test_*.py")}
    assert files <= set(named())


def test_each_test_of_the_tier_is_named_by_its_threat() -> None:
    """`pytest -k test_csrf` runs all that the row names."""
    for path in Path(ROOT / "tests" / "security").glob("test_*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert node.name.startswith(path.stem), f"{path.name}: {node.name}"


def test_the_policy_has_its_times_and_its_way() -> None:
    """How to report, how soon somebody answers, and what is supported."""
    for words in ("48 hours", "7 days", "14 days", "privately", "Supported"):
        assert words in POLICY
    assert "docs/security.md" in POLICY
