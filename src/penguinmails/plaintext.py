"""Plain text from the HTML of a mail, for readers and programs that show no HTML: pure, by the standard library's parser.

Paragraphs, headings, lists, quotes, table rows and preformatted text keep their shape; links keep their address behind
their text, in angle brackets (RFC 3986, appendix C). The libraries for this are a whole browser's parser and more than a
mail's own template needs, or under a licence that the project cannot take.
"""

from html.parser import HTMLParser

_UNSEEN = frozenset({"head", "style", "script", "title", "template", "noscript"})
_PARAGRAPHS = frozenset(
    {"p", "h1", "h2", "h3", "h4", "h5", "h6", "table", "ul", "ol", "dl", "blockquote", "pre"}
)
_LINES = frozenset(
    {"div", "tr", "li", "dt", "dd", "section", "article", "header", "footer", "main", "nav", "address"}
)
_CELLS = frozenset({"td", "th"})
_RULE = "-" * 40


def text_of_html(html: str) -> str:
    """What a reader sees of `html`, as lines of text; empty for a document that shows nothing.

    Never raises for bad markup: what cannot be understood is read as a browser would, or left out.
    """
    reader = _Reader()
    reader.feed(html)
    reader.close()
    return reader.text()


class _Reader(HTMLParser):
    """Collects lines. A gap (new line, empty line) is only noted, and made before the next thing that is seen."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._lines: list[str] = []
        self._line = ""
        self._empty_lines = 0
        self._unseen = 0
        self._preformatted = 0
        self._quotes = 0
        self._lists: list[int | None] = []  # the number of the last item; None where items have none
        self._links: list[tuple[str, str]] = []  # address, and the text of all lines before it

    def text(self) -> str:
        """All lines, with one line end behind the last."""
        self._end_line()
        return "\n".join(self._lines).strip("\n") + "\n" if any(self._lines) else ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """See `HTMLParser`."""
        given = {name: value or "" for name, value in attrs}
        self._open_block(tag)
        match tag:
            case "br":
                self._end_line(keep_empty=True)
            case "hr":
                self._gap(1)
                self._write(_RULE)
                self._gap(1)
            case "img":
                self._write(given.get("alt", ""))
            case "a":
                self._links.append((given.get("href", "").strip(), self._so_far()))
            case "li":
                self._write(self._bullet())
            case "ul" | "ol":
                self._lists.append(0 if tag == "ol" else None)
            case _ if tag in _CELLS and self._line.strip():
                self._line = self._line.rstrip() + "  "

    def handle_endtag(self, tag: str) -> None:
        """See `HTMLParser`."""
        if tag == "a" and self._links:
            self._end_link(*self._links.pop())
        elif tag in {"ul", "ol"} and self._lists:
            self._lists.pop()
        self._close_block(tag)

    def handle_data(self, data: str) -> None:
        """See `HTMLParser`."""
        if self._unseen:
            return
        if self._preformatted:
            first, *others = data.split("\n")
            self._line += first
            for line in others:
                self._end_line(keep_empty=True)
                self._line = line
            return
        lead = " " if data[:1].isspace() and not self._line.endswith((" ", "\n")) else ""
        tail = " " if data[-1:].isspace() else ""
        words = " ".join(data.split())
        if words:
            self._write(f"{lead}{words}{tail}")
        elif self._line and not self._line.endswith(" "):
            self._line += " "

    def _open_block(self, tag: str) -> None:
        if tag in _UNSEEN:
            self._unseen += 1
        elif tag in _PARAGRAPHS:
            self._gap(0 if self._lists and tag in {"ul", "ol"} else 1)
            self._preformatted += tag == "pre"
            self._quotes += tag == "blockquote"
        elif tag in _LINES:
            self._gap(0)

    def _close_block(self, tag: str) -> None:
        if tag in _UNSEEN:
            self._unseen = max(0, self._unseen - 1)
        elif tag in _PARAGRAPHS:
            self._gap(0 if self._lists and tag in {"ul", "ol"} else 1)
            self._preformatted = max(0, self._preformatted - (tag == "pre"))
            self._quotes = max(0, self._quotes - (tag == "blockquote"))
        elif tag in _LINES:
            self._gap(0)

    def _gap(self, empty_lines: int) -> None:
        self._end_line()
        self._empty_lines = max(self._empty_lines, empty_lines)

    def _write(self, text: str) -> None:
        if self._unseen or not text:
            return
        self._line += text if self._line else text.lstrip()

    def _end_line(self, *, keep_empty: bool = False) -> None:
        """The line so far is done; an empty one counts only where the document asks for it."""
        line, self._line = self._line.rstrip(), ""
        if self._unseen or not (line or keep_empty):
            return
        if self._lines:
            self._lines += [""] * self._empty_lines
        self._empty_lines = 0
        self._lines.append(f"{'> ' * self._quotes}{line}".rstrip())

    def _bullet(self) -> str:
        depth = "  " * (len(self._lists) - 1)
        if not self._lists or self._lists[-1] is None:
            return self._indented(depth, "- ")
        self._lists[-1] += 1
        return self._indented(depth, f"{self._lists[-1]}. ")

    def _indented(self, depth: str, bullet: str) -> str:
        self._line = depth
        return bullet

    def _so_far(self) -> str:
        return "\n".join([*self._lines, self._line])

    def _end_link(self, address: str, before: str) -> None:
        """The address behind the link's text, unless the text says it already or it leads nowhere outside the mail."""
        seen = self._so_far().removeprefix(before).strip()
        said = {address, address.removeprefix("mailto:"), address.partition("://")[2].rstrip("/")}
        if address and not address.startswith(("#", "javascript:")) and seen not in said:
            self._line = self._line.rstrip()
            self._write(f"{' ' if self._line else ''}<{address}>")
