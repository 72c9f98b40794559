"""No code comes from data: nothing is unpickled, evaluated or imported because a job, a list or a result says so."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from pmqd import App
from pmqd.job import is_queue_name
from pmqd.settings import PoolSettings
from pmqd.worker import AppError, load_app
from tests.cli import pmqd
from tests.fix_daemon import free_port

SOURCE = Path(__file__).parents[2] / "src"
MODULES = {
    "pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "jsonpickle", "yaml", "ruamel", "xmlrpc",
    "code", "codeop", "pty", "imp", "runpy",
}  # fmt: skip
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "import_string",
    "import_from_string",
    "locate",
    "load_source",
}
IMPORTERS = {
    "__init__": "a fixed table of what the package exports",
    "children": "the master's own table of children",
    "cli_bench": "the bench's own application",
    "cli_daemon": "the commands' own modules",
    "dev": "the application that the command line names",
    "master": "a fixed list of libraries",
    "worker": "the application that the configuration names",
}
"""Who may import by name, and whose names these are: none is a job's."""


def calls(path: Path) -> Iterator[str]:
    """The names of all that a file calls."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


# Not pmqd.chaos: it breaks servers on purpose, with Redis' EVAL among other things, and takes nothing from a job.
FILES = sorted([*(SOURCE / "pmqd").glob("*.py"), *(SOURCE / "penguinmails").glob("*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_dynamic_import_is_not_in_the_source(path: Path) -> None:
    """No module that reads code from data, no call that runs text; imports by name stand in a known few files."""
    tree = ast.parse(path.read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported & MODULES == set()
    called = set(calls(path))
    assert {name.rpartition(".")[2] for name in called} & (CALLS - {"compile"}) == set()
    assert "compile" not in called  # re.compile is another thing
    if any(name.endswith("import_module") for name in called):
        assert path.stem in IMPORTERS, f"{path.stem} imports by name"


REFUSED = [
    "os:system()", "os.system", ":", "os:", ":app", "a b:c", "..os:system", "../os:system", "/etc/x:app", "os:system:x",
    "a.b:c.d", "a-b:c", "os:__class__.__base__", "os:\n", "os;import os:x", "os:sys tem", "", "1a:b", "a:1b", "a\0:b",
]  # fmt: skip
HARMLESS = {
    "os:system": "a pmqd.App is needed",
    "builtins:eval": "a pmqd.App is needed",
    "builtins:__import__": "a pmqd.App is needed",
    "subprocess:Popen": "a pmqd.App is needed",
    "os:__class__": "a pmqd.App is needed",
    "pmqd:App": "a pmqd.App is needed",
    "pmqd.client:_private": "cannot be imported",
    "a.__class__:x": "cannot be imported",
    "no_such_module:app": "cannot be imported",
    "os:no_such_thing": "cannot be imported",
    "__main__:__builtins__": "a pmqd.App is needed",
}


@pytest.mark.parametrize("app", REFUSED, ids=range(len(REFUSED)))
def test_dynamic_import_of_odd_names_is_a_configuration_error(app: str) -> None:
    """`app` is a module's dotted name and one plain attribute: no path, no call, no walk through attributes."""
    with pytest.raises(ValidationError):
        PoolSettings(app=app)


@pytest.mark.parametrize("app", HARMLESS)
def test_dynamic_import_of_anything_but_an_app_is_refused(app: str) -> None:
    """What is named is looked up and not called; what is no App is refused in one line."""
    with pytest.raises(AppError, match=HARMLESS[app]):
        load_app(PoolSettings(app=app))


def test_dynamic_import_a_daemon_refuses_what_is_no_app(tmp_path: Path) -> None:
    """A path as application ends `pmqd run` with 78, and nothing of it was run."""
    file = tmp_path / "pmqd.toml"
    marker = tmp_path / "marker"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    for app in ("../evil:app", f"{tmp_path}/evil:app"):
        file.write_text(
            f'state_dir = "{tmp_path}/state"\n[web]\nlisten = "127.0.0.1:{free_port()}"\n[[workers]]\napp = "{app}"\n'
        )
        done = pmqd(file, "run")
        assert done.returncode == 78, done.stderr
        assert "module:attribute" in done.stderr
    assert not marker.exists()


def test_dynamic_import_by_kind_is_a_lookup() -> None:
    """A kind is a key of what was registered: dotted, dunder and module names are keys that nobody has."""
    app = App()

    @app.task(queue="q", name="known")
    def known() -> None:
        """A task."""

    before = set(sys.modules)
    for kind in (
        "os.system", "os:system", "builtins.eval", "__class__", "known.__globals__", "tests.applications.trial:app",
        "../known", "known\0", "KNOWN", "", "pickle", "antigravity",
    ):  # fmt: skip
        assert app.registry.find("q", kind) is None
        assert app.registry.find("__class__", None) is None
    assert set(sys.modules) == before
    assert app.registry.find("q", "known") is not None


def test_dynamic_import_names_of_queues_name_no_module() -> None:
    """A queue's name may hold dots: it is a name and never looked up as anything else."""
    assert is_queue_name("os.system")
    assert App().registry.find("os.system", None) is None
