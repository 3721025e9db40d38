"""PDF files as text, for agents and judges; damaged and hostile ones are said to be unreadable."""

import builtins
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
