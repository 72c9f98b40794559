"""Templates: what they may do, what is said of bad ones, when they are read again; and plain text from HTML."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

from penguinmails.addresses import MessageError
from penguinmails.plaintext import text_of_html
from penguinmails.templating import MailTemplate, load_template, missing_variables, render

VALUES = {"name": "Ada <b>", "email": "ada@example.com"}


def template(folder: Path, **parts: str) -> MailTemplate:
    """A template `t` of these parts, the subject `Hi` where none is given."""
    (folder / "t").mkdir(exist_ok=True)
    for part, text in ({"subject": "Hi"} | parts).items():
        file = "body.html" if part == "html" else "subject.txt" if part == "subject" else "body.txt"
        (folder / "t" / file).write_text(text)
    return load_template(folder, "t")


def test_values_are_escaped_where_they_must_be(tmp_path: Path) -> None:
    """HTML is escaped, also in attributes and through filters; subject and text are as they are."""
    made = template(
        tmp_path,
        subject="For {{ name }}",
        text="{{ name | upper }}",
        html='{{ name }}<i title="{{ name + name }}">{% set x = name %}{{ x | replace("A", "<") }}',
    )
    texts = render(made, VALUES)
    assert (texts.subject, texts.text) == ("For Ada <b>", "ADA <B>")
    assert texts.html is not None
    assert re.findall(r"<[^/]", texts.html) == ["<i"]


def test_what_a_template_needs_is_known_before_the_first_mail(tmp_path: Path) -> None:
    """Variables of all parts, conditions and loops; those with a default or a question are not demanded."""
    made = template(
        tmp_path,
        subject="{{ city }}",
        text="{% if plan %}{% set own = 1 %}{{ own }}{% endif %}{% for c in letters %}{{ c }}{{ loop.index }}{% endfor %}",
        html="{{ nick | default(name) }}{% if age is defined %}{{ age }}{% endif %}",
    )
    assert missing_variables(made, {"name"}) == ["city", "letters", "plan"]
    with pytest.raises(
        MessageError, match=r"'t' uses {{ letters }}, {{ plan }}, which this recipient does not"
    ):
        render(made, {**VALUES, "city": "Oslo"})
    full = {**VALUES, "city": "Oslo", "plan": "gold", "letters": "ab"}
    assert render(made, full).text == "1a1b2"
    assert render(made, full).html == "Ada &lt;b&gt;"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% include 'body.txt' %}", "line 1: `include` is not allowed"),
        ("\n{% import 'x' as y %}", "line 2: `import` is not allowed"),
        ("{% from 'x' import y %}", "`fromimport` is not allowed"),
        ("{% extends '/etc/passwd' %}", "`extends` is not allowed"),
        ("{% autoescape false %}{{ name }}{% endautoescape %}", "`autoescape` is not allowed"),
        ("{{ name | safe }}", "No filter named 'safe'"),
        ("a\n{% if %}", "body.html, line 2: Expected an expression"),
        ("{{ range(9) }}{{ name }}", r"uses {{ range }}"),
        ("{{ name.__class__.__mro__ }}", "unsafe|no attribute"),
        ("{{ name | attr('__class__') }}{{ 1 / 0 }}", "unsafe|no attribute|division"),
        ("{{ name.format.__globals__ }}", "unsafe"),
        ("{{ '{0.__class__}'.format(name) }}", "unsafe"),
        ("{{ name + 1 }}", "'t': "),
        ("{{ name[99] }}", "no element 99"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        (
            "{% for a in name * 999 %}{% for b in name * 999 %}{{ name * 99 }}{% endfor %}{% endfor %}",
            "makes more than",
        ),
    ],
)
def test_a_template_reaches_nothing_but_its_values(tmp_path: Path, source: str, message: str) -> None:
    """No file, no function, no private attribute, no way round the escaping; and each is said with its place."""
    with pytest.raises(MessageError, match=message):
        render(template(tmp_path, html=source), VALUES)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, r"has neither body\.txt nor body\.html"),
        ({"subject": "a\nb", "text": "x"}, r"subject\.txt has 2 lines, must have one"),
        ({"subject": " \n", "text": "x"}, r"subject\.txt has 1 lines, must have one"),
        ({"subject": "", "text": "x"}, r"subject\.txt has 0 lines"),
        ({"subject": "{{ city }}", "text": "x"}, "the subject is empty for this recipient"),
    ],
)
def test_a_template_needs_a_subject_in_one_line_and_a_body(
    tmp_path: Path, parts: dict[str, str], message: str
) -> None:
    """What no mail could be made of is refused by name."""
    with pytest.raises(MessageError, match=message):
        render(template(tmp_path, **parts), {**VALUES, "city": "\r\n"})


@pytest.mark.parametrize("name", ["", "../welcome", "/etc", "A", "a b", "-a", "a" * 65, "ä", "a/b", "a.b"])
def test_a_name_is_no_path(tmp_path: Path, name: str) -> None:
    """Only plain words; and a folder that is not there is said."""
    with pytest.raises(MessageError, match="not allowed"):
        load_template(tmp_path, name)
    with pytest.raises(MessageError, match="'nosuch' cannot be read"):
        load_template(tmp_path, "nosuch")


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    """Compiled once; a new text, a new part and a file that was put in its place are seen at the next mail."""
    first = template(tmp_path, html="<p>one {{ name }}</p>")
    assert load_template(tmp_path, "t") is first
    second = template(tmp_path, html="<p>two</p>")
    os.utime(tmp_path / "t" / "body.html", ns=(1, 1))
    assert render(second, VALUES).html == "<p>two</p>"
    third = template(tmp_path, text="three")
    assert (render(third, VALUES).text, render(third, VALUES).html) == ("three", "<p>two</p>")
    new = tmp_path / "new"
    new.write_text("four!")
    os.utime(new, ns=(1, 1))
    new.replace(tmp_path / "t" / "body.txt")
    assert render(load_template(tmp_path, "t"), VALUES).text == "four!"


def test_text_is_made_from_html() -> None:
    """Paragraphs, lists, links, quotes, tables, rules, preformatted text; nothing of what a reader does not see."""
    html = """<!doctype html><html><head><title>T</title><style>p { color: red }</style></head><body>
    <h1>Hello&nbsp;you</h1>
    <p>One   <b>bold</b>, line<br>and next.
       See <a href="https://example.org/x?a=1&amp;b=2">our page</a>, <a href="https://example.org">example.org</a>
       or <a href="mailto:a@example.org">a@example.org</a><a href="#top">.</a></p>
    <ul><li>red</li><li>green<ol><li>light</li><li>dark</li></ol></li></ul>
    <blockquote><p>To be</p><p>or not</p></blockquote>
    <table><tr><th>Fish</th><th>Price</th></tr><tr><td>Cod</td><td>3 &lt; 4</td></tr></table>
    <hr><pre>a
  b</pre><script>alert(1)</script><img src="x" alt="A penguin"></body></html>"""
    assert text_of_html(html) == (
        "Hello you\n\n"
        "One bold, line\nand next. See our page <https://example.org/x?a=1&b=2>, example.org or a@example.org.\n\n"
        "- red\n- green\n  1. light\n  2. dark\n\n"
        "> To be\n\n> or not\n\n"
        "Fish  Price\nCod  3 < 4\n\n"
        f"{'-' * 40}\n\n"
        "a\n  b\n\n"
        "A penguin\n"
    )


@pytest.mark.parametrize(
    "html",
    ["", "<", "</p></ul></a></pre>", "<a href=x><p><li><ul><!--", "<p>" * 5000 + "x", "&#x110000;&bogus;"],
)
def test_bad_markup_is_no_error(html: Any) -> None:
    """Whatever a template holds, the text is made."""
    assert isinstance(text_of_html(html), str)
