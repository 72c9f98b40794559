"""Broken variants of the product, for the checker to find: each lacks one of the things that hold pmqd together.

A mutant replaces texts of SQL and Lua, functions in the database of that run, and functions of modules, before the first
fork. No line of the product knows of it. Where the product has changed so that a replacement no longer finds its place,
that is an error, and not a mutant that does nothing.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.resources import files
from types import MappingProxyType
from typing import Any, Final, cast

import psycopg
from psycopg import sql

from pmqd import sql_files
from pmqd.chaos.mutants_table import TABLE, Mutant
from pmqd.errors import PmqdError


class MutantError(PmqdError):
    """A mutant no longer fits the product."""


MUTANTS: Final[Mapping[str, Mutant]] = MappingProxyType({each.name: each for each in TABLE})
"""All mutants by name."""


def mutant(name: str) -> Mutant:
    """A mutant by name.

    Raises:
        MutantError: there is none of this name.
    """
    try:
        return MUTANTS[name]
    except KeyError:
        raise MutantError(f"no mutant {name!r}: {', '.join(sorted(MUTANTS))}") from None


def apply(name: str) -> None:
    """Makes this process, and what it forks from now on, that mutant.

    Raises:
        MutantError: it does not fit the product any more.
    """
    change = mutant(name)
    edited = dict(_edited_query(*each) for each in change.queries.items())
    if edited:
        _change_queries(edited)
    if change.scripts:
        _change_scripts({script: edit(_script(script), edits) for script, edits in change.scripts.items()})
    for place, new in change.swaps.items():
        swap(place, new)


def prepare(name: str, dsn: str, schema: str) -> None:
    """Makes the database of a run that mutant's; once, before the hosts start.

    Raises:
        MutantError: it does not fit the product any more.
    """
    change = mutant(name)
    texts = [edited_function(function, edits) for function, edits in change.functions.items()]
    with psycopg.connect(dsn, autocommit=True) as connection:
        for text in (*texts, *change.statements):
            connection.execute(_named(text, schema))


def check(name: str) -> None:
    """Whether a mutant finds everything that it changes; changes nothing.

    Raises:
        MutantError: it does not.
    """
    change = mutant(name)
    for query, edits in change.queries.items():
        _edited_query(query, edits)
    for function, edits in change.functions.items():
        edited_function(function, edits)
    for script, edits in change.scripts.items():
        edit(_script(script), edits)
    for place, new in change.swaps.items():
        _place(place, new)


# --- texts ---------------------------------------------------------------------------------------------------


def edit(text: str, edits: Sequence[tuple[str, str]]) -> str:
    """A text with each fragment replaced, wherever it stands.

    Raises:
        MutantError: one of them is not there.
    """
    for old, new in edits:
        if old not in text:
            raise MutantError(
                f"the product has changed: {old!r} is no longer in the text that begins {text[:80]!r}"
            )
        text = text.replace(old, new)
    return text


def _edited_query(name: str, edits: Sequence[tuple[str, str]]) -> tuple[str, str]:
    try:
        raw = (files("pmqd") / "sql" / "queries" / f"{name}.sql").read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise MutantError(f"the product has changed: there is no query {name}") from error
    return raw, edit(raw, edits)


def edited_function(name: str, edits: Sequence[tuple[str, str]]) -> str:
    """A function of the schema as its latest file makes it, changed, to be executed instead.

    Raises:
        MutantError: there is no such function, or it has changed.
    """
    for version in sorted(sql_files.schema_files(), reverse=True):
        path = files("pmqd") / "sql" / "schema" / sql_files.schema_files()[version]
        found = re.search(
            rf"create (?:or replace )?function \{{schema\}}\.{name}\(.*?(?:^as \$\$.*?^\$\$;|^  return [^;]*;)",
            path.read_text(encoding="utf-8"),
            re.DOTALL | re.MULTILINE,
        )
        if found:
            text = re.sub(r"^create (or replace )?function", "create or replace function", found[0])
            return edit(text, edits)
    raise MutantError(f"the product has changed: there is no function {name}")


def _named(text: str, schema: str) -> bytes:
    composed = sql.SQL(cast("Any", text))
    return composed.format(
        schema=sql.Identifier(schema), channel=sql.Literal(sql_files.channel(schema))
    ).as_bytes(None)


def _change_queries(edited: Mapping[str, str]) -> None:
    """Has `sql_files.queries` fill in other texts from now on."""
    fill = sql_files._filled  # noqa: SLF001 - what a mutant changes is what nobody else may touch

    def filled(text: str, names: Mapping[str, sql.Composable]) -> bytes:
        return fill(edited.get(text, text), names)

    swap("sql_files:_filled", filled)
    sql_files.queries.cache_clear()


def _script(name: str) -> str:
    try:
        return (files("pmqd") / "lua" / f"{name}.lua").read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise MutantError(f"the product has changed: there is no script {name}") from error


def _change_scripts(edited: Mapping[str, str]) -> None:
    broker = import_module("pmqd.broker")
    load = broker._lua  # noqa: SLF001 - as above

    @functools.wraps(load)
    def _lua(name: str) -> str:
        return edited.get(name) or str(load(name))

    swap("broker:_lua", _lua)
    broker._scripts.cache_clear()  # noqa: SLF001 - as above


# --- functions -----------------------------------------------------------------------------------------------


def _place(place: str, new: Callable[..., Any]) -> tuple[Any, str]:
    """The owner and the name of a function, which must be called as the new one is."""
    module, _, path = place.partition(":")
    owner: Any = import_module(f"pmqd.{module}")
    *owners, name = path.split(".")
    try:
        for each in owners:
            owner = getattr(owner, each)
        old = getattr(owner, name)
    except AttributeError as error:
        raise MutantError(f"the product has changed: there is no {place}: {error}") from error
    before, after = inspect.signature(old), inspect.signature(new)
    if not _takes_anything(after) and list(before.parameters) != list(after.parameters):
        raise MutantError(f"the product has changed: {place} is called as {before}, the mutant's as {after}")
    return owner, name


def _takes_anything(signature: inspect.Signature) -> bool:
    kinds = {each.kind for each in signature.parameters.values()}
    return kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


def swap(place: str, new: Callable[..., Any]) -> None:
    """Puts another function in the place of one of the product's.

    Raises:
        MutantError: there is none, or it is called in another way.
    """
    owner, name = _place(place, new)
    setattr(owner, name, new)
