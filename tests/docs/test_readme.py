"""The README's example runs as it stands, and every command that the documents name exists."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.cli import pmqd
from tests.fix_daemon import ROOT, MakeDaemon, clean_environ
from tests.fix_servers import WaitUntil

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands() -> set[tuple[str, ...]]:
    """All `pmqd ...` words (command, and subcommand where there is one) in code of the pages."""
    found = set()
    for page in PAGES:
        code = [*re.findall(r"`([^`\n]+)`", page.read_text()), *"\n".join(blocks(page, "sh")).splitlines()]
        for line in code:
            match = re.match(r"pmqd ([a-z]+)(?: ([a-z]+)\b(?![.:=/]))?", line.strip())
            if match:
                found.add(tuple(filter(None, match.groups())))
    return found


def test_the_ten_lines_of_the_readme_run(
    daemon: MakeDaemon,
    database: str,
    connection: psycopg.Connection[Any],
    tmp_path: Path,
    wait_until: WaitUntil,
) -> None:
    """The Python example enqueues, a daemon started for `greetings:app` runs it; the SQL example's job runs as well."""
    (tmp_path / "greetings.py").write_text(blocks(ROOT / "README.md", "python")[0])
    environ = {"PYTHONPATH": str(tmp_path)}
    daemon({"workers": [{"app": "greetings:app"}]}, environ=environ)
    done = subprocess.run(
        [sys.executable, "greetings.py"],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=clean_environ() | environ | {"PMQD_POSTGRES__DSN": database},
    )
    job_id = done.stdout.strip()
    (sql,) = blocks(ROOT / "README.md", "sql")
    connection.execute(sql)

    def results() -> list[Any]:
        rows = connection.execute("select result from pmqd.jobs where status = 'completed'").fetchall()
        return [row[0] for row in rows]

    wait_until(lambda: results() == ["Hello, Ada", "Hello, Ada"], what="both greetings")
    assert connection.execute("select count(*) from pmqd.jobs where id = %s", (job_id,)).fetchone() == (1,)


@pytest.mark.parametrize("command", sorted(commands()), ids=" ".join)
def test_a_command_in_the_documents_exists(command: tuple[str, ...]) -> None:
    """`pmqd X --help` answers for every command that a page names."""
    done = pmqd(None, *command, "--help")
    if done.returncode == 2 and len(command) == 2:  # the second word may be an argument, not a subcommand
        done = pmqd(None, command[0], "--help")
    assert done.returncode == 0, done.stderr


def test_links_between_the_pages_lead_somewhere() -> None:
    """Every relative link in the README and the docs points to a file that exists."""
    broken = [
        f"{page.name}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert not broken


def test_the_architecture_page_names_every_module() -> None:
    """Each module of the package has its line on the page, and no line is about a module that is gone."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"^\| `([\w.]+)` \|", text, re.MULTILINE))
    package = ROOT / "src" / "pmqd"
    found = {".".join(path.relative_to(package).with_suffix("").parts) for path in package.rglob("*.py")}
    assert named == found
