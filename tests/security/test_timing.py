"""The token is compared in a time that tells nothing, and errors tell nothing about it."""

import ast
import hmac
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pmqd import api
from tests.security.site import TOKEN, open_site

SOURCE = Path(api.__file__)


def test_timing_the_token_is_compared_by_compare_digest_alone() -> None:
    """In the source: no `==` and no `in` has the token or what was given for it on a side."""
    tree = ast.parse(SOURCE.read_text())
    [check] = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "_check_token"
    ]
    compared = [ast.unparse(node) for node in ast.walk(check) if isinstance(node, ast.Compare)]
    assert compared == ["scheme.lower() != 'bearer'"]
    called = [ast.unparse(node) for node in ast.walk(check) if isinstance(node, ast.Call)]
    assert "compare_digest(given.strip().encode(), token.encode())" in called
    others = [
        path
        for path in SOURCE.parent.glob("*.py")
        if ".token" in path.read_text() and "web" in path.read_text()
    ]
    for path in others:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and isinstance(
                node.ops[0], ast.Eq | ast.NotEq | ast.In | ast.NotIn
            ):
                assert not re.search(r"(?<!['\"])web\.token", ast.unparse(node)), path.name


def test_timing_the_comparison_is_made_whatever_was_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request with a wrong token, of whatever length or scheme, is compared once, and answered alike."""
    seen: list[tuple[Any, Any]] = []

    def watched(left: Any, right: Any) -> bool:
        seen.append((left, right))
        return hmac.compare_digest(left, right)

    monkeypatch.setattr(api, "compare_digest", watched)
    wrong = [
        "",
        "Bearer",
        "Bearer x",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN}x",
        f"Basic {TOKEN}",
        f"Bearer {TOKEN.upper()}",
        "Bearer \xff",
    ]
    with open_site(tmp_path) as site:
        answers = [
            site.send("POST", "/api/v1/queue/q/pause", {"host": "localhost", "authorization": text})
            for text in wrong
        ]
    assert len(seen) == len(wrong)
    assert all(right == TOKEN.encode() for _, right in seen)
    assert all(
        (one.status_code, one.content, one.headers) == (other.status_code, other.content, other.headers)
        for one, other in pairwise(answers)
    )
    assert answers[0].status_code == 401


def test_timing_unknown_jobs_and_queues_need_the_token_first(tmp_path: Path) -> None:
    """Without the token nobody learns from a change what exists: it is 401 before anything is looked up."""
    with open_site(tmp_path) as site:
        for path in ("/api/v1/queue/known/pause", "/api/v1/queue/-/pause", "/api/v1/queue/q/jobs/x/retry"):
            assert site.send("POST", path, {"host": "localhost"}).status_code == 401
