"""The broken variants of the product: each still finds what it breaks, and says so loudly where it does not."""

from hashlib import sha1
from typing import Any

import pytest

from pmqd import broker, sql_files
from pmqd.chaos import mutants
from pmqd.chaos.faults import kinds
from pmqd.chaos.mutants import MUTANTS, MutantError
from pmqd.chaos.mutants_table import Mutant

EVERY = sorted(MUTANTS)


def test_there_are_enough() -> None:
    """The issue asks for 14 broken variants."""
    assert sum(mutant.broken for mutant in MUTANTS.values()) >= 14


@pytest.mark.parametrize("name", EVERY)
def test_mutant_fits_the_product(name: str) -> None:
    """Every text that it replaces stands in the product, every function is there and is called as its replacement is."""
    mutants.check(name)


@pytest.mark.parametrize("name", EVERY)
def test_mutant_says_what_it_is(name: str) -> None:
    """It names what is broken, what has to notice that, and faults that exist; and it does change something."""
    mutant = MUTANTS[name]
    assert mutant.what
    assert bool(mutant.caught_by) == mutant.broken
    assert set(mutant.faults) <= set(kinds())
    assert mutant.queries or mutant.functions or mutant.scripts or mutant.swaps


def test_changed_text_is_an_error() -> None:
    """A fragment that is no longer there: no mutant that quietly does nothing."""
    with pytest.raises(MutantError, match="the product has changed"):
        mutants.edit("select 1", [("select 2", "select 3")])


@pytest.mark.parametrize("name", ["no_such_function", "mar"])
def test_missing_function_is_an_error(name: str) -> None:
    """A function of the database that is gone is not overlooked."""
    with pytest.raises(MutantError, match="there is no function"):
        mutants.edited_function(name, [])


def test_missing_query_and_script_are_errors() -> None:
    """The same for a file of SQL or Lua, by whatever name it was replaced."""
    for change in ({"queries": {"gone": [("a", "b")]}}, {"scripts": {"gone": [("a", "b")]}}):
        with pytest.raises(MutantError, match="the product has changed"):
            _check(Mutant("x", "x", ("lost",), **change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("place", "new"),
    [
        ("ledger:Ledger._gone", lambda self: None),
        ("ledger:Ledger._exchange", lambda self: None),
        ("ledger:Ledger._exchange", lambda self, tokens: None),
    ],
)
def test_changed_function_is_an_error(place: str, new: Any) -> None:
    """A function that is gone, or is called with other arguments, is not replaced."""
    with pytest.raises(MutantError, match="the product has changed"):
        mutants.swap(place, new)


def test_unknown_mutant_is_an_error() -> None:
    """A name that is none says which there are."""
    with pytest.raises(MutantError, match="settle_without_token"):
        mutants.apply("nonsense")


def test_edited_query_is_the_one_that_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """After `apply` the statements of every store of this process are the mutant's; all others are as they were."""
    before = dict(sql_files.queries("one"))
    monkeypatch.setattr(sql_files, "_filled", sql_files._filled)
    try:
        mutants.apply("claim_before_its_time")
        after = sql_files.queries("one")
    finally:
        monkeypatch.undo()
        sql_files.queries.cache_clear()
    assert {name for name in before if before[name] != after[name]} == {"claim"}
    assert b"run_at <= now()" in before["claim"]
    assert b"run_at <= now()" not in after["claim"]
    assert sql_files.queries("one")["claim"] == before["claim"]


def test_edited_script_is_the_one_that_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a mutant makes of a script is what Redis gets, under its own digest."""
    monkeypatch.setattr(broker, "_lua", broker._lua)  # put back afterwards
    before = broker._scripts()
    try:
        mutants._change_scripts({"hint": "return 1"})
        text, digest = broker._scripts()["hint"]
    finally:
        monkeypatch.undo()
        broker._scripts.cache_clear()
    assert (text, digest) == ("return 1", sha1(b"return 1").hexdigest())
    assert before["push"] == broker._scripts()["push"]


def test_functions_are_found_whole() -> None:
    """From `create` to the end of the body, whichever of the two forms it has."""
    beat = mutants.edited_function("beat", [])
    assert beat.startswith("create or replace function {schema}.beat(")
    assert beat.endswith("$$;")
    assert beat.count("create") == 1
    refunded = mutants.edited_function("is_refunded", [])
    assert refunded.endswith(";")
    assert refunded.count(";") == 1


def _check(mutant: Mutant) -> None:
    known = {**MUTANTS, mutant.name: mutant}
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(mutants, "MUTANTS", known)
        mutants.check(mutant.name)
