"""docs/cli.md is what the program says of itself."""

from tests.docs.cli_page import commands, page
from tests.fix_daemon import ROOT

PAGE = ROOT / "docs" / "cli.md"


def test_the_page_is_made_from_the_program() -> None:
    """Commands, arguments, options and defaults are those of the program; `cli_page` writes the page anew."""
    assert PAGE.read_text() == page(), "run: python -m tests.docs.cli_page > docs/cli.md"


def test_every_command_and_option_is_on_the_page() -> None:
    """Each command has a section, and each of its options and arguments a row there."""
    sections = {part.partition("\n")[0]: part for part in PAGE.read_text().split("\n## ")[1:]}
    assert set(sections) == {name for name, _ in commands()}
    for name, command in commands():
        for parameter in command.params:
            words = parameter.opts if parameter.param_type_name == "option" else [parameter.metavar]
            assert parameter.name == "help" or all(f"`{word}`" in sections[name] for word in words), (
                name,
                words,
            )
