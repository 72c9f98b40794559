"""The layout of the source: who may import whom, and what nobody may."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"

# Top to bottom. A module imports from rows below its own, or from its own where that makes no circle.
CHAOS = """
    chaos.__init__ chaos.__main__ chaos.application chaos.conditions chaos.deaths chaos.family chaos.faults chaos.faults_clock chaos.faults_crashes chaos.faults_postgres chaos.faults_processes chaos.faults_redis chaos.faults_signals chaos.faults_wires chaos.history chaos.host chaos.machine chaos.mutants chaos.mutants_swaps chaos.mutants_table chaos.nemesis chaos.pace chaos.plan chaos.producer chaos.producer_mix chaos.producer_ways chaos.progress chaos.report chaos.run chaos.servers chaos.switchboard chaos.wire chaos.faults_clock chaos.pace chaos.world chaos.checker chaos.checks_history chaos.checks_job chaos.checks_runs chaos.checks_stores chaos.checks_time chaos.checks_walk
"""
ROWS = [
    CHAOS,
    "__init__ __main__",
    "cli cli_bench cli_common cli_daemon cli_doctor cli_enqueue cli_jobs cli_queues cli_status bench dev demo",
    "doctor doctor_failover findings overview render",
    "master children reload report roster",
    "migrator worker maintenance web guard api gauges",
    "process",
    "client registry executor clerk crew desk ledger claims reach unwritable rescue delivery overseer recovery backend bypass connections writing",
    "store store_arrays store_partitions store_reads store_rescue store_rows store_session store_types broker route live resp schema",
    "config settings faults logs metrics signals systemd embedded programs folders arena slot fence kernel listener statedir served rows sql_files conninfo crashpoints record notes books",
    "errors address job retry restart codec batching window interrupt hints",
]
ROW_OF = {module: number for number, row in enumerate(ROWS) for module in row.split()}
MASTERS_SIDE = ["master", "children", "reload", "report", "roster", "process"]

FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "yaml"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


def files(package: str) -> list[Path]:
    """The Python files of a package."""
    return sorted((SOURCE / package).rglob("*.py"))


def imports(tree: ast.AST, *, at_run_time: bool = False) -> Iterator[str]:
    """The modules that a file imports, dotted; `from pmqd import x` is pmqd.x, and so for pmqd.chaos.

    Args:
        tree: the file.
        at_run_time: without those under `if TYPE_CHECKING:` and those in functions.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module in ("pmqd", "pmqd.chaos"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module or "."
        elif not (at_run_time and _is_later(node)):
            yield from imports(node, at_run_time=at_run_time)


def _is_later(node: ast.AST) -> bool:
    is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    return is_function or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")


def module_of(path: Path) -> str:
    """A module of pmqd without the package's name: `store`, `chaos.run`."""
    return ".".join(path.relative_to(SOURCE / "pmqd").with_suffix("").parts)


def short(name: str) -> str:
    """The same of an imported name, which may go on behind the module."""
    return ".".join(name.split(".")[1 : 3 if name.startswith("pmqd.chaos.") else 2])


def pmqd_modules(*, at_run_time: bool = False) -> dict[str, set[str]]:
    """Each module of pmqd, and the modules of pmqd that it imports."""
    return {
        module_of(path): {
            short(name)
            for name in imports(ast.parse(path.read_text()), at_run_time=at_run_time)
            if name.startswith("pmqd.")
        }
        for path in files("pmqd")
    }


def test_every_module_has_a_row() -> None:
    """A new module gets its place here before anything imports it, and one that went away loses it."""
    assert {module_of(path) for path in files("pmqd")} ^ set(ROW_OF) == set()
    folders = {path.parent for path in files("pmqd")}
    assert folders == {SOURCE / "pmqd", SOURCE / "pmqd" / "chaos"}, "the layout is flat"


def test_imports_point_down() -> None:
    """No module imports from a row above its own."""
    wrong = [
        f"{module} imports {used}"
        for module, all_used in pmqd_modules().items()
        for used in all_used
        if used in ROW_OF and ROW_OF[used] < ROW_OF.get(module, 0)
    ]
    assert wrong == []


def test_imports_make_no_circle() -> None:
    """Within a row the modules stand in some order, too."""
    try:
        TopologicalSorter(pmqd_modules(at_run_time=True)).prepare()
    except CycleError as error:
        pytest.fail(f"circle: {error.args[1]}")


def reached_from(module: str) -> set[str]:
    """All that is loaded with a module."""
    graph, found, left = pmqd_modules(at_run_time=True), set[str](), [module]
    while left:
        for used in graph.get(left.pop(), set()) - found:
            found.add(used)
            left.append(used)
    return found


def test_store_and_broker_never_meet() -> None:
    """PostgreSQL and Redis are used together by their callers only."""
    graph = pmqd_modules()
    assert "broker" not in graph["store"] | reached_from("store")
    assert "store" not in graph["broker"] | reached_from("broker")


@pytest.mark.parametrize("module", MASTERS_SIDE)
def test_the_master_loads_no_store(module: str) -> None:
    """The parent of all processes neither imports the stores nor loads them by way of others."""
    assert reached_from(module) & {"store", "broker", "client", "metrics"} == set()


def test_the_lowest_row_does_nothing() -> None:
    """The pure modules import no driver, socket or process."""
    drivers = {"psycopg", "redis", "socket", "subprocess", "httpx", "multiprocessing"}
    wrong = {
        f"{path.stem} imports {name}"
        for path in files("pmqd")
        if ROW_OF.get(module_of(path)) == len(ROWS) - 1
        for name in imports(ast.parse(path.read_text()), at_run_time=True)
        if name.split(".")[0] in drivers
    }
    assert wrong == set()


def test_the_daemon_knows_no_application() -> None:
    """Only the demo speaks of penguinmails; penguinmails uses pmqd as any application does."""
    outer = {"pmqd.config", "pmqd.errors", "pmqd.embedded", "pmqd.dev", "pmqd.schema"}
    inner = {f"pmqd.{module}" for module in ROW_OF} - outer
    for path in files("pmqd"):
        known = {name for name in imports(ast.parse(path.read_text())) if name.startswith("penguinmails")}
        assert not known or module_of(path) == "demo", f"{module_of(path)} imports {known}"
    for path in files("penguinmails"):
        used = set(imports(ast.parse(path.read_text()))) & inner
        assert not used, f"penguinmails.{path.stem} imports {used}"


@pytest.mark.parametrize("path", [*files("pmqd"), *files("penguinmails")], ids=lambda path: path.stem)
def test_nothing_reads_code_from_data(path: Path) -> None:
    """No pickle, no YAML, no eval: what comes out of a store is data."""
    tree = ast.parse(path.read_text())
    assert {name.split(".")[0] for name in imports(tree)} & FORBIDDEN_MODULES == set()
    called = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert called & FORBIDDEN_CALLS == set()
