"""What is written about settings is what the models say."""

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pmqd.config import load
from pmqd.faults import allowed, settings_of
from pmqd.settings import PoolSettings, QueueSettings, Section, Settings, default_state_dir

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "etc" / "pmqd.toml"
PAGE = ROOT / "docs" / "configuration.md"


def sections() -> Iterator[tuple[str, type[Section]]]:
    """The sections by name, the pool's and the queue's among them."""
    yield "workers", PoolSettings
    yield "queues", QueueSettings
    for name, info in Settings.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            yield name, info.annotation


def all_settings() -> dict[str, FieldInfo]:
    """Every setting by its dotted name."""
    found = {
        f"{section}.{key}": info for section, model in sections() for key, info in settings_of(model).items()
    }
    named = {name for name, _ in sections()}
    return found | {name: info for name, info in settings_of(Settings).items() if name not in named}


def default_of(info: FieldInfo) -> Any:
    """The setting's default, or None if it has none that is the same everywhere."""
    return None if info.default is PydanticUndefined else info.default


def uncommented() -> str:
    """The example file with every setting in force."""
    lines = EXAMPLE.read_text().splitlines()
    return "\n".join(
        line[1:] if line.startswith("#") and not line.startswith("# ") else line for line in lines
    )


def test_the_example_changes_nothing() -> None:
    """As it is shipped, the file leaves every setting at its default."""
    assert load(EXAMPLE, environ={}) == load(environ={"PMQD_CONFIG": "/dev/null"})


def test_the_example_shows_each_setting_at_its_default() -> None:
    """With every setting uncommented the file is valid, complete, and the same as the defaults."""
    shown = tomllib.loads(uncommented())
    (pool,), (queue,) = shown.pop("workers"), shown.pop("queues").values()
    flat = {f"workers.{key}": value for key, value in pool.items()}
    flat |= {f"queues.{key}": value for key, value in queue.items()}
    for name, value in shown.items():
        flat |= (
            {f"{name}.{key}": inner for key, inner in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
    assert set(flat) == set(all_settings())
    wrong = {
        name: flat[name]
        for name, info in all_settings().items()
        if default_of(info) is not None
        and (flat[name], type(flat[name])) != (info.default, type(info.default))
    }
    assert wrong == {}
    settings = Settings.model_validate(tomllib.loads(uncommented()))
    assert (
        settings.model_copy(update={"state_dir": default_state_dir(), "workers": [], "queues": {}})
        == Settings()
    )


def test_the_example_explains_each_setting() -> None:
    """Above each setting stand its meaning and what is allowed, in the words of the models."""
    words = " ".join(line.removeprefix("# ") for line in EXAMPLE.read_text().splitlines())
    for name, info in all_settings().items():
        key = name.rpartition(".")[2]
        assert f"{info.description} Allowed: {allowed(info)}. #{key} = " in words, name


def rows() -> dict[str, list[str]]:
    """The rows of the page's tables of settings, by the setting's name."""
    cells = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in PAGE.read_text().splitlines()
    ]
    return {row[0].strip("`"): row for row in cells if len(row) == 5 and row[0].startswith("`")}


def test_the_page_has_each_setting() -> None:
    """Name, default, what is allowed, variable and meaning are those of the models; nothing else is there."""
    found = rows()
    assert set(found) == set(all_settings())
    for name, info in all_settings().items():
        default = default_of(info)
        shown = "-" if default is None else f"`{json.dumps(default)}`"
        section, _, key = name.rpartition(".")
        between = {"": "", "workers": "WORKERS__NAME__", "queues": "QUEUES__NAME__"}.get(
            section, f"{section.upper()}__"
        )
        variable = "-" if name == "workers.name" else f"`PMQD_{between}{key.upper()}`"
        assert found[name] == [f"`{name}`", shown, allowed(info), variable, info.description]


def test_the_faults_on_the_page_are_real() -> None:
    """The example messages of the page are what pmqd says."""
    from pmqd.faults import hint

    text = PAGE.read_text()
    assert f"workers[0].processes = -2: allowed is {allowed(PoolSettings.model_fields['processes'])}" in text
    assert (
        f"PMQD_POSTGRES__DSM: there is no such setting{hint('PMQD_POSTGRES__DSM', ['PMQD_POSTGRES__DSN'])}"
        in text
    )
