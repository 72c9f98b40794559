"""What is installed with pmqd, and what a built package holds."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import metadata, requires, version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OPEN_LICENSES = re.compile(
    r"Apache|MIT|BSD|ISC|PSF|Python Software|LGPL|MPL|PostgreSQL|Unlicense|0BSD|Public Domain", re.IGNORECASE
)
REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(?:\[[^\]]+\])?(?P<range>[^;]*)")


def ranges() -> list[tuple[str, str]]:
    """Every requirement that the project names itself: a distribution and its range."""
    project = PROJECT["project"]
    named = [*PROJECT["build-system"]["requires"], *project["dependencies"]]
    named += [line for extra in project["optional-dependencies"].values() for line in extra]
    found = [REQUIREMENT.match(line) for line in named]
    return [(match["name"], match["range"].strip()) for match in found if match and match["name"] != "pmqd"]


@pytest.mark.parametrize(("name", "allowed"), ranges())
def test_supply_chain_every_range_has_both_ends(name: str, allowed: str) -> None:
    """A lowest version that is known to work, and no next major one that nobody has seen; no address instead of a version."""
    assert re.fullmatch(r">=\d[\d.]*,<\d[\d.]*|~=\d[\d.]*|==\d[\d.]*", allowed), f"{name}{allowed}"


def test_supply_chain_licences_are_open() -> None:
    """The project's own, and those of everything that it needs at run time."""
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    wanted, seen = [line for line in requires("pmqd") or [] if "extra ==" not in line], set()
    while wanted:
        match = REQUIREMENT.match(wanted.pop())
        assert match is not None
        name = match["name"].lower()
        if name in seen:
            continue
        seen.add(name)
        about: Any = metadata(name)
        said = " ".join(
            [
                about.get("License-Expression") or "",
                about.get("License") or "",
                *(about.get_all("Classifier") or []),
            ]
        )
        assert OPEN_LICENSES.search(said), f"{name} {version(name)}: {said[:200]}"
        wanted += [line for line in requires(name) or [] if ";" not in line]
    assert {"psycopg", "redis", "orjson", "starlette", "uvicorn"} <= seen


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution of this tree."""
    pytest.importorskip(
        "hatchling", reason="hatchling builds the packages; it is installed with the build's isolation alone"
    )
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


SECRET = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY-----|AKIA[0-9A-Z]{16}|ghp_[A-Za-z0-9]{36}|xox[baprs]-[A-Za-z0-9-]{10,}"
)
STRAY = re.compile(
    r"(^|/)(\.env|\.git|\.venv|.*\.pem|.*\.key|.*\.pyc|.*\.log|id_rsa.*|\.netrc|\.pypirc|dump\.rdb)(/|$)"
)


def test_supply_chain_the_wheel_holds_the_package_alone(built: Path) -> None:
    """Both packages with their SQL and Lua, nothing of tests, notes, keys or environments."""
    [path] = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        assert {name.split("/")[0].partition("-")[0] for name in names} == {"pmqd", "penguinmails"}
        assert [name for name in names if STRAY.search(name) or "test" in Path(name).name] == []
        assert [name for name in names if SECRET.search(wheel.read(name))] == []
    assert {"pmqd/sql/schema/0001_tables.sql", "pmqd/lua/push.lua", "pmqd/py.typed"} <= set(names)


def test_supply_chain_the_source_holds_no_secret(built: Path) -> None:
    """Nothing in the source distribution looks like a key, a password file or an environment."""
    [path] = built.glob("*.tar.gz")
    with tarfile.open(path) as source:
        for member in source.getmembers():
            assert not STRAY.search(member.name), member.name
            assert not member.issym()
            file = source.extractfile(member)
            assert file is None or not SECRET.search(file.read()), member.name


def test_supply_chain_nothing_is_fetched_at_run_time() -> None:
    """No module of the package downloads or installs: no pip, no ensurepip, no urlretrieve."""
    for path in [*(ROOT / "src" / "pmqd").glob("*.py"), *(ROOT / "src" / "penguinmails").glob("*.py")]:
        text = path.read_text()
        for word in ("urlretrieve", "ensurepip", "pip._internal", '"-m", "pip"', "requests.get"):
            assert word not in text, path.name
