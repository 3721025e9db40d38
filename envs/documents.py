"""Documents as text: what agents read and what judges are shown. Nothing inside a document is ever run or followed."""

import email.policy
import io
import logging
import zipfile
from email.message import EmailMessage
from email.parser import BytesParser
from functools import lru_cache
from xml.etree import ElementTree

from agentsdpo.errors import ConfigError
from agentsdpo.types import printable

MOST_PAGES = 500
"""Pages of a PDF that are read."""
_UNPACKED = 32 << 20
"""Bytes of one part of a document that are read."""
_BREAKS = {"br": "\n", "cr": "\n", "tab": "\t"}
_OFFICE = {".docx": "word/document.xml", ".xlsx": "xl/worksheets/", ".pptx": "ppt/slides/slide"}


def readable(path: str, data: bytes) -> str:
    """What a file says: text as it is, paragraphs of a document, cells, slides, pages, mails; else what it is.

    Raises:
        ConfigError: the file is a PDF and pypdf is not installed. What a file says must not depend on the machine.

    >>> readable("a.txt", b"total 5"), readable("a.bin", bytes([0, 255]))
    ('total 5', '[2 bytes that are no text]')
    """
    suffix = "." + path.rpartition(".")[2].lower()
    if suffix in (*_OFFICE, ".eml"):
        try:
            return _eml(data) if suffix == ".eml" else _office(suffix, data)
        except Exception:  # noqa: BLE001 - a damaged or hostile file makes zlib, the codecs and expat raise anything
            return f"[{len(data)} bytes that cannot be read as {suffix}]"
    if suffix == ".pdf" or data.startswith(b"%PDF-"):
        return _pdf(data)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return f"[{len(data)} bytes that are no text]"


def parsed_mail(data: bytes) -> EmailMessage:
    """A mail; :func:`headers` and :func:`body` read it whatever it holds."""
    return BytesParser(_class=EmailMessage, policy=email.policy.default).parsebytes(data)


def headers(mail: EmailMessage) -> dict[str, str]:
    """The first value of each of a mail's headers, by name in lower case; as it stands where nobody can read it."""
    found: dict[str, str] = {}
    for name, raw in mail.raw_items():
        try:
            value = str(mail.policy.header_fetch_parse(name, raw))
        except Exception:  # noqa: BLE001 - the library's parser of addresses raises IndexError, AttributeError and more
            value = " ".join(str(raw).split())
        found.setdefault(name.lower(), printable(value))
    return found


def body(mail: EmailMessage) -> str:
    """Text of a mail; of one in an encoding that nobody knows, what UTF-8 makes of it."""
    part = None
    try:
        part = mail.get_body(("plain", "html"))
        return "" if part is None else part.get_content()  # one without headers has length 0
    except Exception:  # noqa: BLE001 - an encoding that nobody knows, a form that is none
        payload = (mail if part is None else part).get_payload(decode=True)
        return payload.decode("utf-8", "replace") if isinstance(payload, bytes) else ""


def _eml(data: bytes) -> str:
    """Headers and text of a mail, decoded: what was sent in base64 is as plain to a reader as to its addressee."""
    mail = parsed_mail(data)
    head = "\n".join(f"{name}: {value}" for name, value in headers(mail).items())
    files = [f"[attachment {name}]" for part in mail.walk() if (name := part.get_filename())]
    return "\n".join([head, "", body(mail), *files]).strip()


def _office(suffix: str, data: bytes) -> str:
    """Text of an Office Open XML file. Entities of its XML are never followed.

    Formulas show their stored values, and themselves where the library that wrote them has stored none.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        inside, shared = archive.namelist(), []
        names = sorted(name for name in inside if name.startswith(_OFFICE[suffix]) and name.endswith(".xml"))
        if "xl/sharedStrings.xml" in inside:
            shared = ["".join(item.itertext()) for item in _xml(archive, "xl/sharedStrings.xml")]
        parts = [_cells(_xml(archive, name), shared) if suffix == ".xlsx" else _paragraphs(_xml(archive, name))
                 for name in names]
    return "\n\n".join(f"[{name.rpartition('/')[2]}]\n{part}" if len(parts) > 1 else part
                       for name, part in zip(names, parts, strict=True))


@lru_cache(maxsize=32)
def _pdf(data: bytes) -> str:
    """Text of a PDF, page by page; kept for a while, since whoever searches files reads them again and again."""
    try:
        from pypdf import PdfReader
    except ImportError as error:
        raise ConfigError("a PDF has to be read and pypdf is not installed",
                          fix="install it: pip install 'agentsdpo[documents]'") from error
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it warns of each oddity of a file on stderr
    try:
        pages = PdfReader(io.BytesIO(data)).pages
        parts = [(page.extract_text() or "").strip() for page in pages[:MOST_PAGES]]
        left = max(0, len(pages) - MOST_PAGES)
    except Exception as fault:  # noqa: BLE001 - a damaged or hostile file makes the library raise anything
        return f"[{len(data)} bytes that cannot be read as .pdf: {type(fault).__name__}]"
    if not any(parts):
        return f"[a PDF of {len(parts)} pages that hold no text]"
    said = "\n\n".join(f"[page {i}]\n{part}" if len(parts) > 1 else part for i, part in enumerate(parts, 1))
    return said + (f"\n\n[{left} more pages]" if left else "")


def _xml(archive: zipfile.ZipFile, name: str) -> ElementTree.Element:
    with archive.open(name) as file:
        text = file.read(_UNPACKED)
    if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
        raise ElementTree.ParseError("a document type declaration")
    return ElementTree.fromstring(text)


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _paragraphs(root: ElementTree.Element) -> str:
    """One line per paragraph that says something, in one pass: paragraphs stand in paragraphs, however deep."""
    lines: list[str] = []
    for element in root.iter():
        name = _tag(element)
        if name == "p":
            lines.append("")
        elif name == "t" and lines:
            lines[-1] += element.text or ""
        elif name in _BREAKS and lines and not (name == "tab" and element.attrib):  # those define where tabs stop
            lines[-1] += _BREAKS[name]
    return "\n".join(line for line in lines if line.strip())


def _cells(root: ElementTree.Element, shared: list[str]) -> str:
    """One line per row that holds something: ``A1=12 | B1=total``."""
    lines = []
    for row in (element for element in root.iter() if _tag(element) == "row"):
        cells = [f"{cell.get('r', '?')}={value}" for cell in row if (value := _value(cell, shared))]
        lines.append(" | ".join(cells))
    return "\n".join(line for line in lines if line)


def _value(cell: ElementTree.Element, shared: list[str]) -> str:
    if cell.get("t") == "inlineStr":
        return "".join(t.text or "" for t in cell.iter() if _tag(t) == "t")
    raw = next((v.text or "" for v in cell if _tag(v) == "v"), "")
    if cell.get("t") == "s" and raw.isdecimal() and int(raw) < len(shared):
        return shared[int(raw)]
    formula = next((f.text for f in cell if _tag(f) == "f" and f.text), "")
    return raw if raw or not formula else f"={formula}"
