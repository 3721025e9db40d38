"""PDF files as text, for agents and judges; damaged and hostile ones are said to be unreadable."""

import builtins
import io
import zipfile
import zlib
from typing import Any

import pytest

from agentsdpo.benchmarks.apex.evidence import gather
from agentsdpo.envs import documents
from agentsdpo.envs.archives import Entry, zip_bytes
from agentsdpo.envs.documents import readable
from agentsdpo.envs.office import OfficeEnv
from agentsdpo.errors import ConfigError
from agentsdpo.types import Outcome, ToolCall


def pdf(*pages: str, raw: bytes | None = None) -> bytes:
    """A PDF with one line of text a page; ``raw`` stands for the packed stream of the last one."""
    count = len(pages)
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(count))
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Kids [{kids}] /Count {count} >>".encode(),
               b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    for i, text in enumerate(pages):
        shown, packed = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode() if text else b"", b""
        if raw is not None and i == count - 1:
            shown, packed = raw, b" /Filter /FlateDecode"
        objects += [f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * i} 0 R "
                    "/Resources << /Font << /F1 3 0 R >> >> >>".encode(),
                    b"<< /Length %d%s >>\nstream\n%s\nendstream" % (len(shown), packed, shown)]
    data, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    size = len(objects) + 1
    return data + (b"xref\n0 %d\n0000000000 65535 f \n%strailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n"
                   % (size, table, size, len(data)))


def test_pages_are_text() -> None:
    assert readable("memo.pdf", pdf("Revenue was 512 million")) == "Revenue was 512 million"
    assert readable("MEMO.PDF", pdf("One", "Two")) == "[page 1]\nOne\n\n[page 2]\nTwo"
    assert readable("no-suffix", pdf("Known by its head")) == "Known by its head"


def test_the_judge_sees_the_answer_in_a_pdf() -> None:
    empty, made = zip_bytes({}), zip_bytes({"filesystem/memo.pdf": Entry.of(pdf("Revenue was 512 million"))})
    (change,) = gather(Outcome(answer="see memo.pdf", initial=empty, final=made)).changes
    assert (change.path, change.kind, change.text) == ("memo.pdf", "added", "Revenue was 512 million")


def test_an_agent_reads_and_finds_it() -> None:
    env = OfficeEnv({"filesystem/memo.pdf": Entry.of(pdf("Revenue was 512 million"))})
    for name, arguments, words in (("read_file", {"path": "memo.pdf"}, "512 million"),
                                   ("search_files", {"text": "REVENUE WAS"}, "memo.pdf")):
        result = env.apply(ToolCall(id="c", name=f"filesystem_server_{name}", arguments=arguments))
        assert words in result.content


@pytest.mark.parametrize(("data", "words"), [
    (b"%PDF-1.4\nnothing", "that cannot be read as .pdf"), (b"no pdf at all", "that cannot be read as .pdf"),
    (pdf("", ""), "a PDF of 2 pages that hold no text"), (pdf("cut short")[:200], "that cannot be read as .pdf"),
])
def test_what_cannot_be_read_says_so(data: bytes, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in readable("a.pdf", data)
    assert capsys.readouterr() == ("", "")


def test_a_page_that_unpacks_to_too_much(capsys: pytest.CaptureFixture[str]) -> None:
    bomb = pdf("x", raw=zlib.compress(bytes(80 << 20), 1))
    assert len(bomb) < 1 << 20
    assert "that cannot be read as .pdf: LimitReachedError" in readable("a.pdf", bomb)
    assert capsys.readouterr() == ("", "")


def test_only_so_many_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MOST_PAGES", 2)
    assert readable("a.pdf", pdf("a", "b", "c", "d")).endswith("[page 2]\nb\n\n[2 more pages]")


def test_without_the_library_nothing_is_graded_as_if_it_were_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "pypdf":
            raise ImportError(name)
        return plain(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"agentsdpo\[documents\]"):
        readable("a.pdf", pdf("not seen before"))


# -------------------------------------------------------------------------------------------------- office files


def office(part: str, xml: str) -> bytes:
    """An Office Open XML file of one part."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(part, xml)
    return buffer.getvalue()


def docx(inside: str, head: str = "") -> bytes:
    return office("word/document.xml", f"{head}<w>{inside}</w>")


def damaged(data: bytes) -> bytes:
    """With a packed stream that cannot be unpacked."""
    at = data.find(b"word/document.xml") + len("word/document.xml")
    return data[:at] + b"\xff" * 8 + data[at + 8:]


@pytest.mark.parametrize("data", [
    damaged(docx("<p><t>" + "revenue " * 50 + "</t></p>")), docx("", '<?xml version="1.0" encoding="nope"?>'),
    docx("", '<?xml version="1.0" encoding="shift_jis"?>'), docx("<p>"), b"PK\x03\x04",
], ids=["stream", "encoding", "multi-byte", "xml", "head"])
def test_office_files_that_cannot_be_read_say_so(data: bytes) -> None:
    """Raised, it would leave the attempt of whoever wrote such a file unscored for good."""
    assert readable("a.docx", data) == f"[{len(data)} bytes that cannot be read as .docx]"
    (change,) = gather(Outcome(answer="x", initial=zip_bytes({}), final=zip_bytes(
        {"filesystem/a.docx": Entry.of(data)}))).changes
    assert "cannot be read" in change.text


def test_a_number_too_long_to_be_one() -> None:
    sheet = f'<x><row><c t="s"><v>{"9" * 5000}</v></c></row></x>'
    assert "that cannot be read as .xlsx" in readable("a.xlsx", office("xl/worksheets/sheet1.xml", sheet))


def test_paragraphs_in_paragraphs_are_read_once() -> None:
    assert readable("a.docx", docx("<p><t>a</t><p><t>box</t></p></p><p><t>b</t></p>")) == "a\nbox\nb"
    deep = docx("<p>" * 20_000 + "<t>end</t>" + "</p>" * 20_000)
    assert readable("a.docx", deep) == "end", "it took minutes where every level was read again"


def test_breaks_keep_figures_apart() -> None:
    tabs = "<p><pPr><tabs><tab val='left'/></tabs></pPr><t>units</t><tab/><t>5</t><br/><t>12</t></p>"
    assert readable("a.docx", docx(tabs)) == "units\t5\n12"


def test_a_formula_without_a_stored_value_shows_itself() -> None:
    sheet = '<x><row><c r="A1"><v>3</v></c><c r="A2"><f>A1*2</f></c><c r="A3"><f>A1+1</f><v>4</v></c></row></x>'
    assert readable("a.xlsx", office("xl/worksheets/sheet1.xml", sheet)) == "A1=3 | A2==A1*2 | A3=4"
