"""Names and values never become SQL: looked for in the source, and tried with names made for it."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import orjson
import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql
from pydantic import ValidationError

from pmqd import App, Job, job, rows, sql_files
from pmqd.errors import EnqueueError, PmqdError
from pmqd.settings import PostgresSettings
from pmqd.store import Store
from pmqd.writing import write
from tests.worker_family import family, open_bank

SOURCE = Path(__file__).parents[2] / "src"
# Not pmqd.chaos: it breaks servers with statements of its own, and takes no name from a job or a stranger.
FILES = sorted([*(SOURCE / "pmqd").glob("*.py"), *(SOURCE / "penguinmails").glob("*.py")])

# --- the source ----------------------------------------------------------------------------------------------


def statements(tree: ast.AST) -> Iterator[tuple[ast.Call, ast.expr]]:
    """Calls that send a statement, and its text."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
            continue
        copies = node.func.attr == "copy" and "cursor" in ast.unparse(node.func.value)
        if copies or node.func.attr in ("execute", "executemany", "stream"):
            yield node, node.args[0]


def is_put_together(text: ast.expr, known: dict[str, ast.expr]) -> bool:
    """Whether a statement is formatted by Python instead of by psycopg.sql.

    Args:
        text: the expression.
        known: what names were set to in the same file.
    """
    for node in ast.walk(text):
        if isinstance(node, ast.JoinedStr) and any(
            isinstance(part, ast.FormattedValue) for part in node.values
        ):
            return True
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod | ast.Add):
            return True
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            by_psycopg = "sql.SQL(" in ast.unparse(node.func.value)
            if node.func.attr in ("format", "join", "replace", "format_map") and not by_psycopg:
                return True
    if isinstance(text, ast.Name) and text.id in known:
        return is_put_together(known[text.id], {})
    return False


def set_names(tree: ast.AST) -> dict[str, ast.expr]:
    """The names of a file and what they are set to; of several the last one that is put together."""
    found: dict[str, ast.expr] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name not in found or is_put_together(node.value, {}):
                found[name] = node.value
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_sql_injection_no_statement_is_put_together_by_python(path: Path) -> None:
    """No execute() gets an f-string, `%`, `+` or str.format: values go as parameters, names through sql.Identifier."""
    tree = ast.parse(path.read_text())
    known = set_names(tree)
    wrong = [ast.unparse(call) for call, text in statements(tree) if is_put_together(text, known)]
    assert wrong == []


@pytest.mark.parametrize(
    "line",
    [
        'c.execute(f"select {x}")',
        'c.execute("select %s" % x)',
        'c.execute("select " + x)',
        'c.execute("select {}".format(x))',
        'c.execute(" ".join(x))',
        'query = f"select {x}"\nc.execute(query)',
        'cursor.copy(f"copy {x} from stdin")',
        'c.execute(sql.SQL(f"select {x}"))',
    ],
)
def test_sql_injection_the_look_at_the_source_sees(line: str) -> None:
    """Each way of putting text together is found."""
    tree = ast.parse(line)
    assert any(is_put_together(text, set_names(tree)) for _, text in statements(tree))


def test_sql_injection_sql_files_have_only_known_places() -> None:
    """The files of statements hold the schema's name and named parameters, nothing else that is filled in."""
    for name, text in sql_files.queries("pmqd").items():
        assert b"{" not in text.replace(b"'{}'", b""), name
    odd = 'a"; drop schema x; --'
    for name, text in sql_files.queries(odd).items():
        assert b'"a""; drop schema x; --"' in text or b"a" not in text[:0], name
        assert b'a"; drop' not in text.replace(b'a""; drop', b""), name


# --- names ---------------------------------------------------------------------------------------------------

NAMES = [
    "q'; drop table pmqd.jobs; --",
    'q"; drop table pmqd.jobs; --',
    "q\\'; --",
    "q%s",
    "q%(name)s",
    "{q}",
    "q\n",
    "q\0",
    "$$q$$",
    "q:high",
    "q:low",
    ":high",
    "",
    "q" * 101,
    " q",
    "q ",
    "\uff51",
    "q\u0301",
    "-q",
    "../q",
    "q;",
    "q,q",
    "*",
]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_sql_injection_queue_names_are_refused(database: str, name: str) -> None:
    """By the client, by the settings' rule, and by PostgreSQL for whoever goes past both."""
    assert not job.is_queue_name(name)
    with pytest.raises(EnqueueError):
        rows.row_of(name, None, b"{}", {}, uuid4())
    with psycopg.connect(database, autocommit=True) as connection:
        for statement in (
            "insert into pmqd.jobs (queue_name, payload) values (%s, '{}')",
            "select pmqd.enqueue(%s, '{}')",
            "insert into pmqd.job_queues (name) values (%s)",
        ):
            with pytest.raises((psycopg.errors.CheckViolation, psycopg.DataError)):
                connection.execute(statement, [name])


@given(st.text(max_size=120) | st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,99}", fullmatch=True))
def test_sql_injection_a_name_is_allowed_or_an_error(name: str) -> None:
    """What is allowed consists of letters that need no quoting anywhere: in COPY, in keys, in SQL."""
    if not job.is_queue_name(name):
        with pytest.raises(EnqueueError):
            job.check_queue_name(name)
        return
    assert name.isascii()
    assert not set(name) - set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.:-")


@given(st.text(max_size=60))
def test_sql_injection_schema_names_are_plain_or_refused(name: str) -> None:
    """A schema's name is a few plain letters, or a fault of the configuration; and is quoted all the same."""
    try:
        PostgresSettings(schema_name=name)
    except ValidationError:
        return
    assert name.isascii()
    assert name.replace("_", "a").isalnum()
    assert name == name.lower()
    assert sql.Identifier(name).as_string(None) == f'"{name}"'


TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(TEXTS.filter(bool), TEXTS, st.lists(TEXTS, max_size=3)), min_size=1, max_size=5))
def test_sql_injection_values_arrive_as_they_are(
    database: str, jobs: list[tuple[str, str, list[str]]]
) -> None:
    """Kinds, payloads and tags of any text come out of COPY, of the function and of the store as they went in."""
    ids = [uuid4() for _ in range(2 * len(jobs))]
    wanted = {}
    made = []
    for number, (kind, text, tags) in enumerate(jobs * 2):
        own = {"id": ids[number]} if number % 2 else {}
        row = rows.row_of("q", kind, rows.payload_of({"t": text}), {"tags": tags, **own}, ids[number])
        made.append(row)
        wanted[row.id] = (kind, {"t": text}, tags)
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("delete from pmqd.jobs")
        write(connection, "pmqd", made)
        found = connection.execute("select id, kind, payload, tags from pmqd.jobs").fetchall()
    assert {row[0]: row[1:] for row in found} == wanted


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS, cursor=st.text(max_size=80))
def test_sql_injection_reading_methods_take_any_text(database: str, text: str, cursor: str) -> None:
    """Queue, kind and cursor of any text: an answer or one error of ours, never one of the database's grammar."""
    store = Store(PostgresSettings(dsn=database), "test")
    try:
        for read in (
            lambda: store.list_jobs(text or "q", None, 5, cursor),
            lambda: store.list_jobs(text or "q", "failed", 5, cursor),
            lambda: store.replay(text or "q", text or "k", None, 5),
            lambda: store.sync_queues({}, [text]),
            lambda: store.pause(text),
        ):
            try:
                read()
            except (PmqdError, ValueError) as error:
                said = str(error)
                assert "syntax error" not in said
    finally:
        store.close()


# --- the search path -----------------------------------------------------------------------------------------

HIJACKED = """
create table public.hijacked (who text);
grant insert on public.hijacked to public;
create function public.unnest(uuid[]) returns setof uuid language plpgsql as
  $$ begin insert into public.hijacked values ('unnest(uuid[])'); return query select * from pg_catalog.unnest($1); end $$;
create function public.unnest(text[]) returns setof text language plpgsql as
  $$ begin insert into public.hijacked values ('unnest(text[])'); return query select * from pg_catalog.unnest($1); end $$;
create function public.array_position(uuid[], uuid) returns integer language plpgsql as
  $$ begin insert into public.hijacked values ('array_position'); return pg_catalog.array_position($1, $2); end $$;
create function public.jsonb_build_object(text, text) returns jsonb language plpgsql as
  $$ begin insert into public.hijacked values ('jsonb_build_object'); return '{}'; end $$;
create function public.equal(text, pmqd.queue_label) returns boolean language plpgsql as
  $$ begin insert into public.hijacked values ('='); return $1 operator(pg_catalog.=) $2::text; end $$;
create operator public.= (leftarg = text, rightarg = pmqd.queue_label, function = public.equal);
"""
app = App()


@app.task(queue="q", name="greet")
def greet(job: Job) -> str:
    """A job that does nothing, and enqueues nothing."""
    return "done"


def test_sql_injection_by_functions_in_public(database: str, redis_url: str, tmp_path: Path) -> None:
    """A user who may create in `public` puts better fitting functions there (CVE-2018-1058): nothing of pmqd calls them."""
    with open_bank(database, redis_url) as bank:
        bank.connection.execute(HIJACKED)
        with family(database, redis_url, app, tmp_path, pool={"queues": ["q"]}) as workers:
            hinted, stolen = bank.enqueue("greet"), bank.enqueue("greet", hint=False)
            slot = workers.start()
            bank.wait(hinted, watch=workers.logged)
            bank.wait(stolen, watch=workers.logged)
            assert workers.stop(slot) == 0
        store = Store(PostgresSettings(dsn=database), "migrator")
        try:
            term = store.lead()
            bank.enqueue("greet", hint=False)
            assert term is not None
            store.sync_queues({}, ["q"])
            store.beat(workers.arena.instance_id, holding=True, stalled_tick=None)
            store.list_jobs("q", None, 10, None)
            store.depths()
            store.rescue_orphans("test")
        finally:
            store.close()
        assert bank.connection.execute("select distinct who from public.hijacked").fetchall() == []


def test_sql_injection_definers_functions_pin_their_path(database: str) -> None:
    """Whatever runs with its owner's rights finds nothing of the caller's: `pg_temp` last, nobody else's schema."""
    with psycopg.connect(database) as connection:
        found: dict[str, Any] = dict(
            connection.execute(
                "select proname, proconfig from pg_proc where pronamespace = 'pmqd'::regnamespace and prosecdef"
            ).fetchall()
        )
    assert {"enqueue", "wake", "make_partition", "retire_partition"} <= set(found)
    assert {
        name for name, config in found.items() if "search_path=pg_catalog, pg_temp" not in (config or [])
    } == set()


def test_sql_injection_by_temporary_objects_of_the_caller(database: str) -> None:
    """A producer's temporary tables and functions shadow nothing that enqueue() uses."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("set role pmqd_enqueue")
        connection.execute("create temporary table jobs (id uuid)")
        connection.execute("create temporary table job_queues (name text)")
        connection.execute("create temporary table leader (awake_until timestamptz)")
        connection.execute(
            "create function pg_temp.coalesce2(text) returns text language sql as 'select $1';"
            "create function pg_temp.now() returns timestamptz language plpgsql as"
            " $$ begin raise exception 'hijacked'; end $$"
        )
        connection.execute("set search_path = pg_temp, pg_catalog, pmqd")
        made = connection.execute(
            "select pmqd.enqueue('q', %s)", [orjson.dumps({"a": 1}).decode()]
        ).fetchone()
        connection.execute("reset role")
        assert made is not None
        assert connection.execute("select 1 from pmqd.jobs where id = %s", made).fetchone() == (1,)
