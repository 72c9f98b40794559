"""The MIME parts of a message that may be broken or hostile: in order, decoded, bounded.

The structure is read by the standard library's parser under a policy that hands header values out unparsed: a part's
type and boundary need a short look, and the modern header parser raises on some values and takes quadratic time on
others. Header values that people see are parsed one at a time by `parsed_header`, each of bounded length.

What the bounds are made from (measured, one core of 2020s hardware): a line costs some 0.3 µs, 0.1 µs more for each
multipart around it, a line of a header 1.5 µs, a part or a group of fields in a report 10 µs, a part with a type made
to be slow 600 µs.
"""

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.errors import MessageError
from email.message import EmailMessage, Message
from email.parser import BytesParser
from email.policy import EmailPolicy, default

MAX_MESSAGE_BYTES = 25 * 1024 * 1024  # what large providers take as the whole size of a mail
MAX_HEADER_BYTES = 256 * 1024
MAX_LINES = 1_000_000
MAX_CONTAINERS = (
    200  # multiparts and enclosed messages; also keeps the recursive parser within Python's stack
)
MAX_LINES_TIMES_CONTAINERS = 20_000_000
MAX_BOUNDARY_LINES = 2_500
MAX_EMPTY_LINES = 100_000  # each may begin a group of fields of a report
MAX_GROUPS = 1_000
MAX_PARTS = 500
MAX_STRUCTURE_VALUE = 500  # characters of a type, a boundary, an encoding
MAX_HEADER_VALUE = 16_000  # characters of a header that is parsed: 0.3 s at worst
MAX_PART_HEADER_VALUE = 2_000  # of the first FEW_PARTS parts, a file name of any script: 35 ms at worst
MAX_LATER_PART_HEADER_VALUE = 400
FEW_PARTS = 20

# What the standard library's e-mail package raises for odd input (seen with Python 3.11 and 3.13 unless a remark says
# else). Not `Exception`: a lack of memory must not look like a bad mail.
PARSER_ERRORS = (
    ValueError,  # dates; with UnicodeError where a broken message is written out again
    LookupError,  # IndexError of the header parser and of a message id; KeyError of a part's content; unknown charsets
    AttributeError,  # addresses with encoded words where none may stand
    TypeError,  # the same, in 3.11
    NameError,  # UnboundLocalError: an address literal that does not end, as in `<*0*=@[`
    RecursionError,  # comments in comments, messages in messages
    ArithmeticError,  # not seen: numbers of dates out of range
    AssertionError,  # not seen: what the parser takes for impossible
    MessageError,  # not seen: documented, email.errors
)

# Python codecs that are no charsets of mail: quadratic (punycode, idna) or always failing.
NOT_CHARSETS = frozenset({"punycode", "idna", "undefined", "unicode_escape", "raw_unicode_escape"})

CONTAINER = re.compile(rb"(?:multipart|message)/", re.IGNORECASE)
END_OF_HEADER = re.compile(rb"\r?\n\r?\n|\r\r")
REFERENCED = ("message/rfc822", "message/global")


class StructurePolicy(EmailPolicy):
    """The modern policy, except that header values come out as they stand, cut to a bounded length."""

    def header_fetch_parse(self, name: str, value: str) -> str:  # noqa: ARG002 - the policy's interface
        """The value, unparsed: what the parser asks for is a type, a boundary or an encoding."""
        return value[:MAX_STRUCTURE_VALUE]

    def fold_binary(self, name: str, value: str) -> bytes:
        """The field as it came: folding anew would parse it."""
        return f"{name}: {value}\n".encode("utf-8", "surrogateescape")


STRUCTURE = StructurePolicy()


@dataclass(frozen=True, slots=True)
class Part:
    """One leaf of the tree: a text, a file, a report or an enclosed message (which is not opened).

    `content` is decoded from its transfer encoding; of an enclosed message it is the message's source.
    """

    content_type: str
    content: bytes = field(repr=False)
    charset: str = ""
    name: str = ""
    is_attachment: bool = False

    @property
    def text(self) -> str:
        """The content as text that a database takes."""
        return decoded_text(self.content, self.charset)


@dataclass(frozen=True, slots=True)
class Structure:
    """A message taken apart: raw header fields of the top, the parts in order, what was wrong."""

    content_type: str
    report_type: str
    fields: tuple[tuple[str, str], ...]
    parts: tuple[Part, ...]
    defects: tuple[str, ...]


def read_structure(raw: bytes) -> Structure:
    """Take a message apart; never raises, and does bounded work.

    Args:
        raw: the whole message as it came, any bytes.

    Returns:
        The structure. What was beyond a bound is missing from the parts and named in `defects`.
    """
    defects: set[str] = set()
    message = _parsed(raw, defects)
    parts = tuple(_leaves(message, defects))
    try:
        report_type = str(message.get_param("report-type", "")).lower()
    except PARSER_ERRORS:
        report_type = ""
    return Structure(
        content_type=_content_type(message),
        report_type=report_type,
        fields=tuple(
            (name.lower(), storable(_eight_bit(str(value))[:MAX_HEADER_VALUE]))
            for name, value in message.raw_items()
        ),
        parts=parts,
        defects=tuple(sorted(defects)),
    )


def header_fields(source: bytes) -> tuple[tuple[str, str], ...]:
    """Name (lower case) and raw value of each header field at the beginning of `source`; never raises."""
    return read_structure(source[: _header_end(source)] + b"\n\n").fields


def parsed_header(name: str, value: str, longest: int = MAX_HEADER_VALUE) -> object | None:
    """A header value parsed by the modern policy, or None where that fails.

    Args:
        name: the field's name, which decides the syntax.
        value: its raw value, as in `Structure.fields`.
        longest: characters that are looked at.

    Returns:
        The policy's header object (`email.headerregistry`).
    """
    try:
        parsed: object = default.header_fetch_parse(name, value[:longest])
    except PARSER_ERRORS:
        return None
    return parsed


def decoded_text(content: bytes, charset: str = "") -> str:
    """Bytes as text: by the charset if it is one, else UTF-8, else Latin-1; see `storable`."""
    for name in (charset, "utf-8"):
        try:
            if name and codecs.lookup(name).name not in NOT_CHARSETS:
                return storable(content.decode(name))
        except PARSER_ERRORS:
            continue
    return storable(content.decode("latin-1"))


def storable(text: str) -> str:
    """Text that PostgreSQL takes: no half characters (lone surrogates), no NUL."""
    return text.encode("utf-8", "replace").decode("utf-8").replace("\0", "\ufffd")


def _parsed(raw: bytes, defects: set[str]) -> Message:
    """The message's tree; where that would be too much work, its header with the rest as one piece."""
    if len(raw) > MAX_MESSAGE_BYTES:
        defects.add("message-too-large")
        raw = raw[:MAX_MESSAGE_BYTES]
    end = _header_end(raw)
    if end > MAX_HEADER_BYTES:
        defects.add("header-too-large")
        raw = raw[: raw.rfind(b"\n", 0, MAX_HEADER_BYTES) + 1] + raw[end:]
        end = _header_end(raw)
    if not _is_affordable(raw):
        defects.add("structure-too-complex")
        return _flat(raw, end)
    try:
        return BytesParser(policy=STRUCTURE).parsebytes(raw)
    except PARSER_ERRORS:
        defects.add("structure-unreadable")
        return _flat(raw, end)


def _header_end(raw: bytes) -> int:
    if raw.startswith((b"\n", b"\r")):
        return 0
    found = END_OF_HEADER.search(raw)
    return found.start() if found else len(raw)


def _is_affordable(raw: bytes) -> bool:
    lines = raw.count(b"\n") + raw.count(b"\r")
    if lines > MAX_LINES:
        return False
    containers = sum(1 for _ in CONTAINER.finditer(raw))
    return not containers or (
        containers <= MAX_CONTAINERS
        and lines * containers <= MAX_LINES_TIMES_CONTAINERS
        and raw.count(b"\n--") + raw.count(b"\r--") <= MAX_BOUNDARY_LINES
        and raw.count(b"\n\n") + raw.count(b"\n\r\n") + raw.count(b"\r\r") <= MAX_EMPTY_LINES
    )


def _flat(raw: bytes, end: int) -> Message:
    try:
        message: Message = BytesParser(policy=STRUCTURE).parsebytes(raw[:end] + b"\n\n", headersonly=True)
    except PARSER_ERRORS:
        message = EmailMessage(policy=STRUCTURE)
    message.set_payload(raw[end:].decode("ascii", "surrogateescape"))
    return message


def _leaves(message: Message, defects: set[str]) -> Iterator[Part]:
    """The leaves in document order; enclosed messages are leaves."""
    waiting = [message]
    count = 0
    while waiting:
        part = waiting.pop()
        defects.update(type(defect).__name__ for defect in part.defects)
        children = part.get_payload() if part.is_multipart() else None
        if isinstance(children, list) and part.get_content_maintype() != "message":
            waiting.extend(child for child in reversed(children) if isinstance(child, Message))
            continue
        count += 1
        if count > MAX_PARTS:
            defects.add("too-many-parts")
            return
        yield _part(
            part, defects, MAX_PART_HEADER_VALUE if count <= FEW_PARTS else MAX_LATER_PART_HEADER_VALUE
        )


def _part(part: Message, defects: set[str], longest: int) -> Part:
    content_type = _content_type(part)
    try:
        content = _enclosed(part) if content_type.startswith("message/") else _content(part)
        charset = str(part.get_content_charset("") or "")
    except PARSER_ERRORS:
        defects.add("part-unreadable")
        content, charset = b"", ""
    disposition = str(part.get("content-disposition", "")).split(";")[0].strip().lower()
    return Part(content_type, content, charset, _file_name(part, longest), disposition == "attachment")


def _content_type(part: Message) -> str:
    """The type in lower case; what stands behind it without the semicolon that is due is no part of it."""
    return storable(part.get_content_type()).split()[0]


def _content(part: Message) -> bytes:
    content = part.get_payload(decode=True)
    return content if isinstance(content, bytes) else b""


def _enclosed(part: Message) -> bytes:
    """The source of an enclosed message or report, as the parser took it apart; decoded where it was encoded.

    RFC 2046, 5.2.1 and RFC 3464, 2.1 allow no encoding here, some senders use one all the same. Then the parser has
    seen no header in it, and all of it is in the payload.
    """
    payload = part.get_payload()
    if not isinstance(payload, list):
        return _content(part)
    source = b"\n".join(_source(child) for child in payload[:MAX_GROUPS] if isinstance(child, Message))
    encoding = str(part.get("content-transfer-encoding", "")).strip().lower()
    if encoding not in {"base64", "quoted-printable"} or part.get_content_type() in REFERENCED:
        return source
    decoder = EmailMessage(policy=STRUCTURE)
    decoder["content-transfer-encoding"] = encoding
    decoder.set_payload(source.lstrip(b"\n").decode("ascii", "surrogateescape"))
    return _content(decoder)


def _source(message: Message) -> bytes:
    """The message as text again, or its header alone where the generator cannot write what the parser read."""
    try:
        return message.as_bytes(policy=STRUCTURE)
    except PARSER_ERRORS:
        return (
            b"".join(STRUCTURE.fold_binary(name, str(value)) for name, value in message.raw_items()) + b"\n"
        )


def _file_name(part: Message, longest: int) -> str:
    """The name that the sender gave a part, without folders and invisible characters; empty where there is none."""
    for header, key in (("content-disposition", "filename"), ("content-type", "name")):
        raw = next((value for name, value in part.raw_items() if name.lower() == header), None)
        if raw is None:
            continue
        parsed = parsed_header(header, _eight_bit(str(raw)), longest)
        given = getattr(parsed, "params", {}).get(key)
        if given:
            last = re.split(r"[/\\]", storable(str(given)))[-1]
            return "".join(character for character in last if character.isprintable()).strip()[:255]
    return ""


def _eight_bit(value: str) -> str:
    """A header value with raw bytes beyond ASCII in it (the parser keeps them as surrogates), decoded."""
    if value.isascii():
        return value
    return decoded_text(value.encode("utf-8", "surrogateescape"))
