"""The statements of penguinmails: each has a file, and each file is used."""

import ast
from pathlib import Path

import penguinmails

PACKAGE = Path(penguinmails.__file__).parent


def test_every_statement_has_a_file_and_every_file_is_used() -> None:
    """What `query(…)` is asked for is what lies in sql/queries."""
    asked = {
        node.args[0].value
        for path in PACKAGE.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("query", "_with_pmqd")
        and isinstance(node.args[0], ast.Constant)
    }
    assert asked == {path.stem for path in (PACKAGE / "sql" / "queries").glob("*.sql")}
