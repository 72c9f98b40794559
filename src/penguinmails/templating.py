"""Templates: a subject, a text and an HTML body with variables, by Jinja in its sandbox.

Templates may come from customers, so a template can reach nothing but its recipient's values: no other file, no global
function, no private attribute (Jinja's sandbox), and no way round the escaping of HTML (`safe` and `autoescape` are not
there). How long one may run and how much memory it may take are the limits of the job and of the worker process.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from penguinmails.addresses import MAX_ADDRESS, MessageError, clean_name
from penguinmails.plaintext import text_of_html

TEMPLATE_NAME_MAX = 64
MAX_SUBJECT = 400
MAX_BODY = (
    2_000_000  # characters of one part; a mail above some 100 kB is cut by its readers' programs anyway
)
KEPT_TEMPLATES = 256

SUBJECT, TEXT, HTML = "subject.txt", "body.txt", "body.html"

UNSUBSCRIBE_VARIABLE = "unsubscribe_url"
"""The recipient's own link, where unsubscribing is configured."""

_Stamp = tuple[int, int, int] | None
"""What changes when a file is written or replaced (modification time in ns, size, inode); None: there is no such file."""

_FORBIDDEN = (
    nodes.Include,
    nodes.Import,
    nodes.FromImport,
    nodes.Extends,
    nodes.ScopedEvalContextModifier,
)
_GUARDS = frozenset({"default", "d", "defined", "undefined"})


@dataclass(frozen=True, slots=True)
class MailTemplate:
    """A template's parts; `text` or `html` may be missing, not both."""

    name: str
    subject: Template
    text: Template | None
    html: Template | None
    required: frozenset[str]
    """The variables that a recipient must have: all but those under `default` or `is defined`."""


@dataclass(frozen=True, slots=True)
class Texts:
    """A template with one recipient's values in it; `html` is None where the template has no such part."""

    subject: str
    text: str
    html: str | None


def load_template(folder: Path, name: str) -> MailTemplate:
    """The template `name`: subject.txt with body.txt, body.html or both in a folder of that name.

    Compiled once per process, and again when one of the files has changed.

    Args:
        folder: where the templates are.
        name: lower-case letters, digits, - and _; it begins with a letter or digit.

    Raises:
        MessageError: no such template, a name that is no plain word (a path, for instance), or a template that Jinja or
            this module does not take; the message names file and line.
    """
    plain = name.isascii() and name.replace("-", "").replace("_", "").isalnum() and name == name.lower()
    if not plain or not name[0].isalnum() or len(name) > TEMPLATE_NAME_MAX:
        raise MessageError(f"template name {name!r} is not allowed: lower-case letters, digits, - and _ only")
    stamps = tuple(_stamp(folder / name / file) for file in (SUBJECT, TEXT, HTML))
    return _compiled(folder, name, stamps)


def missing_variables(template: MailTemplate, known: frozenset[str] | set[str]) -> list[str]:
    """The variables that the template needs and that are not among `known`, sorted.

    A variable that is used under `default(…)` or asked for by `is defined` may be missing.
    """
    return sorted(template.required - known)


def render(template: MailTemplate, values: Mapping[str, str]) -> Texts:
    """The template with these values; the text is made from the HTML where the template has no text of its own.

    Args:
        template: from `load_template`.
        values: by variable; escaped in the HTML part, as they are elsewhere.

    Raises:
        MessageError: a value is missing, or the template cannot be filled; names template and variable.
    """
    missing = missing_variables(template, set(values))
    if missing:
        raise MessageError(
            f"template {template.name!r} uses {shown(missing)}, which this recipient does not have"
        )
    subject = clean_name(_filled(template, template.subject, values), MAX_SUBJECT)
    if not subject:
        raise MessageError(f"template {template.name!r}: the subject is empty for this recipient")
    html = _filled(template, template.html, values) if template.html else None
    text = _filled(template, template.text, values) if template.text else text_of_html(html or "")
    return Texts(subject, text, html)


def shown(variables: list[str]) -> str:
    """Variables as they stand in a template: `{{ city }}, {{ plan }}`."""
    return ", ".join(f"{{{{ {name} }}}}" for name in variables)


def _stamp(file: Path) -> _Stamp:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


@lru_cache(maxsize=KEPT_TEMPLATES)
def _compiled(folder: Path, name: str, stamps: tuple[_Stamp, ...]) -> MailTemplate:
    """The files as they were at `stamps`: read after these were taken, so a file that changes meanwhile is read again."""
    has_text, has_html = stamps[1] is not None, stamps[2] is not None
    if not has_text and not has_html and stamps[0] is not None:
        raise MessageError(f"template {name!r} in {folder} has neither {TEXT} nor {HTML}")
    subject = _read(folder, name, SUBJECT).removesuffix("\n").removesuffix("\r")
    if len(subject.splitlines()) != 1 or not subject.strip():
        raise MessageError(
            f"template {name!r}: {SUBJECT} has {len(subject.splitlines())} lines, must have one"
        )
    required: set[str] = set()
    parts = [
        _part(name, SUBJECT, subject, required),
        _part(name, TEXT, _read(folder, name, TEXT), required) if has_text else None,
        _part(name, HTML, _read(folder, name, HTML), required) if has_html else None,
    ]
    assert parts[0] is not None
    return MailTemplate(name, parts[0], parts[1], parts[2], frozenset(required))


def _read(folder: Path, name: str, file: str) -> str:
    try:
        return (folder / name / file).read_text("utf-8")
    except OSError as error:
        raise MessageError(
            f"template {name!r} cannot be read in {folder}: {error.strerror}: {error.filename}"
        ) from error
    except UnicodeDecodeError as error:
        raise MessageError(f"template {name!r}: {file} is not UTF-8: {error}") from error


def _part(name: str, file: str, source: str, required: set[str]) -> Template:
    """One part, compiled; what it needs is added to `required`."""
    environment = _environment(html=file == HTML)
    try:
        tree = environment.parse(source)
        forbidden = next(tree.find_all(_FORBIDDEN), None)
        if forbidden is not None:
            word = {"ScopedEvalContextModifier": "autoescape"}.get(type(forbidden).__name__)
            word = word or type(forbidden).__name__.lower()
            raise MessageError(f"template {name!r}: {file}, line {forbidden.lineno}: `{word}` is not allowed")
        required |= meta.find_undeclared_variables(tree) - set(_optional(tree))
        return environment.from_string(tree)
    except TemplateSyntaxError as error:
        raise MessageError(f"template {name!r}: {file}, line {error.lineno}: {error.message}") from error


def _optional(tree: nodes.Template) -> Iterator[str]:
    """The variables that the template sets itself somewhere, or allows to be missing."""
    for name in tree.find_all(nodes.Name):
        if name.ctx != "load":
            yield name.name
    for node in tree.find_all((nodes.Filter, nodes.Test)):
        if node.name in _GUARDS and isinstance(node.node, nodes.Name):
            yield node.node.name


@lru_cache(maxsize=2)
def _environment(*, html: bool) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined,
        autoescape=html,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.clear()
    del environment.filters["safe"]
    return environment


def _filled(template: MailTemplate, part: Template, values: Mapping[str, str]) -> str:
    """`part` with its values; half characters (lone surrogates) cannot be encoded and become question marks."""
    pieces: list[str] = []
    length = 0
    try:
        for piece in part.generate(values):
            length += len(piece)
            if length > MAX_BODY:
                raise MessageError(f"template {template.name!r} makes more than {MAX_BODY} characters")
            pieces.append(piece)
    # Beside Jinja's own errors those of its expressions, such as {{ 1 / 0 }}.
    except (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError) as error:
        raise MessageError(f"template {template.name!r}: {_bounded(error)}") from error
    return "".join(pieces).encode("utf-8", "replace").decode("utf-8")


def _bounded(error: Exception) -> str:
    return str(error)[:MAX_ADDRESS] or type(error).__name__
