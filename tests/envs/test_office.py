"""The office in memory, and the archives its worlds come from."""

import asyncio
import io
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentsdpo.benchmarks.apex.evidence import gather
from agentsdpo.envs import archives
from agentsdpo.envs.archives import Entry, UnsafeArchive, UnsafePath, open_archive, safe_path, tar_bytes, untar, unzip
from agentsdpo.envs.office import MAIL as MAILS
from agentsdpo.envs.office import MOST_WRITTEN, TOOLS, OfficeEnv
from agentsdpo.errors import FormatError
from agentsdpo.types import Task, ToolCall, ToolResult

MAIL = b"From: ann@x.example\r\nTo: me\r\nSubject: Q3\r\n\r\nPlease use the audited figure.\r\n"
WORLD = {"filesystem/reports/q3.txt": Entry.of(b"revenue 512\ncosts 498"), "filesystem/notes.md": Entry.of(b"ask Ann"),
         ".apps_data/mail/inbox/1.eml": Entry.of(MAIL), "filesystem/x.bin": Entry.of(b"\xff\x00")}
TASK = Task(task_id="t", prompt="What was revenue?")


def office() -> OfficeEnv:
    env = OfficeEnv(WORLD)
    asyncio.run(env.reset(TASK, seed=0, episode_id="e"))
    return env


def use(env: OfficeEnv, name: str, **arguments: Any) -> ToolResult:
    return env.apply(ToolCall(id="c", name=name, arguments=arguments))


def fs(env: OfficeEnv, name: str, **arguments: Any) -> str:
    return use(env, f"filesystem_server_{name}", **arguments).content


def test_files() -> None:
    env = office()
    assert fs(env, "list_files") == "notes.md  7\nreports/q3.txt  21\nx.bin  2"
    assert fs(env, "list_files", path="/reports", pattern="*.TXT") == "reports/q3.txt  21"
    assert fs(env, "read_file", path="reports/q3.txt", start=2) == "costs 498"
    assert fs(env, "read_file", path="x.bin") == "[2 bytes that are no text]"
    assert fs(env, "search_files", text="ANN") == "notes.md"
    assert fs(env, "write_file", path="/reports/memo.md", content="512") == "wrote reports/memo.md, 3 characters"
    assert fs(env, "read_file", path="reports/memo.md") == "512"
    assert fs(env, "delete_file", path="notes.md") == "deleted notes.md"
    assert fs(env, "list_files") == "reports/memo.md  3\nreports/q3.txt  21\nx.bin  2"
    assert "filesystem/notes.md" in WORLD, "the world is shared and never changes"
    assert fs(office(), "list_files").startswith("notes.md")


@pytest.mark.parametrize("path", ["../etc/passwd", "a/../../b", "a\0b", "a\\b", "", "/", "x" * 256, "C:/x", "a\nb",
                                  "//etc//../../x", "\ud800"])
def test_paths_that_lead_out(path: str) -> None:
    env = office()
    for name in ("read_file", "delete_file"):
        assert use(env, f"filesystem_server_{name}", path=path).error_kind == "tool"
    assert use(env, "filesystem_server_write_file", path=path, content="").error_kind == "tool"
    assert env.outcome(None).final == env.outcome(None).initial


@given(st.text(max_size=60))
def test_a_safe_path_stays_below(path: str) -> None:
    try:
        safe = safe_path(path)
    except UnsafePath:
        return
    assert not safe.startswith("/")
    assert ".." not in safe.split("/")
    assert (Path("/root") / safe).resolve().is_relative_to("/root")


def test_mail() -> None:
    env = office()
    assert use(env, "mail_server_list_mails").content == "inbox/1.eml  from ann@x.example to me: Q3"
    assert "audited figure" in use(env, "mail_server_read_mail", mail_id="inbox/1.eml").content
    sent = use(env, "mail_server_send_mail", to="ann@x.example\nBcc: all", subject="Re: \ud800Q3", body="done \ud800")
    assert sent.content == "sent as sent/0001.eml"
    assert "\nbcc" not in use(env, "mail_server_read_mail", mail_id="sent/0001.eml").content.lower()
    final = unzip(env.outcome("x").final, "final")
    assert b"\nBcc" not in final[".apps_data/mail/sent/0001.eml"].load(), "no header is injected"
    assert use(env, "mail_server_read_mail", mail_id="../../filesystem/notes.md").is_error


@pytest.mark.parametrize("mail", [
    b"From: ann\r\nContent-Type: text/plain; charset=x-unknown\r\n\r\nyes",
    b"From: =?x?q?\nTo: <\nSubject: \xe9\n\nyes",
    b'From: "a" <a@[b>\nTo: ;;,<@\n\nyes', b"Content-Type: ;;=\n\nyes", b"no header\nyes",
    b"Content-Type: multipart/mixed; boundary=x\n\n--x\n\nyes\n--x--"])
def test_mails_of_any_form_are_read(mail: bytes) -> None:
    env = OfficeEnv({f"{MAILS}a.eml": Entry.of(mail), f"{MAILS}b.eml": Entry.of(MAIL)})
    listed = use(env, "mail_server_list_mails")
    assert listed.content.splitlines()[-1] == "b.eml  from ann@x.example to me: Q3"
    assert use(env, "mail_server_read_mail", mail_id="a.eml").content.endswith("yes")


@pytest.mark.parametrize("to", ["<", "a@[b>", "\\@\x85", "\x00é@"])
def test_an_address_that_cannot_be_written_is_refused(to: str) -> None:
    """Raised, it would leave the attempt unscored, which any agent could do to itself."""
    env = office()
    sent = use(env, "mail_server_send_mail", to=to, subject="s", body="b")
    assert sent.error_kind in ("none", "tool")
    assert not use(env, "mail_server_list_mails").is_error
    assert sent.is_error == (env.outcome("x").final == env.outcome("x").initial)


def test_the_judge_reads_a_sent_mail_as_its_addressee_does() -> None:
    env = office()
    use(env, "mail_server_send_mail", to="ann@x.example", subject="Umsätze", body="Revenue was 512 million – audited.")
    (change,) = gather(env.outcome("done")).changes
    assert change.path.endswith("sent/0001.eml")
    for words in ("to: ann@x.example", "subject: Umsätze", "\n\nRevenue was 512 million – audited."):
        assert words in change.text


def test_the_answer_ends_it() -> None:
    env = office()
    assert not env.done()
    assert use(env, "final_answer", answer="512").content == "final answer taken (completed)"
    assert env.done()
    assert use(env, "filesystem_server_write_file", path="late.txt", content="").is_error
    outcome = env.outcome("something else")
    assert outcome.answer == "512"
    assert outcome.final == outcome.initial
    assert [call.name for call, _ in outcome.calls] == ["final_answer", "filesystem_server_write_file"]


def test_faults_are_answers() -> None:
    env = office()
    assert use(env, "nope").error_kind == "unknown_tool"
    assert use(env, "filesystem_server_read_file", file="x").error_kind == "bad_arguments"
    assert "there is no file" in fs(env, "read_file", path="none.txt")
    assert "a folder where a file is" in fs(env, "write_file", path="notes.md/x", content="")
    assert "a folder where a file is" in fs(env, "write_file", path="reports", content="")
    assert "more than the" in fs(env, "write_file", path="big", content="x" * (MOST_WRITTEN + 1))
    assert {spec.name for spec in TOOLS if not spec.mutates} >= {"filesystem_server_read_file"}


def test_an_episode_continues_from_a_snapshot() -> None:
    first = office()
    steps = [("filesystem_server_write_file", {"path": "a.txt", "content": "1"}),
             ("filesystem_server_delete_file", {"path": "notes.md"}),
             ("mail_server_send_mail", {"to": "a", "subject": "s", "body": "b"}), ("final_answer", {"answer": "5"})]
    for stop in range(len(steps) + 1):
        env = office()
        for name, arguments in steps[:stop]:
            use(env, name, **arguments)
        again = office()
        again.restore(env.snapshot())
        assert (again.snapshot(), again.state_hash()) == (env.snapshot(), env.state_hash())
        for name, arguments in steps[stop:]:
            use(again, name, **arguments)
        for name, arguments in steps if stop == 0 else ():
            use(first, name, **arguments)
        assert again.outcome(None) == first.outcome(None)
        assert again.state_hash() == first.state_hash()


def test_long_answers_come_in_pages() -> None:
    env = OfficeEnv({f"filesystem/{i:04}.txt": Entry.of(b"x") for i in range(1200)})
    first = fs(env, "list_files")
    assert first.endswith("[700 more, from 501]")
    assert fs(env, "list_files", start=501).startswith("0500.txt")


# ------------------------------------------------------------------------------------------------------- archives


def zipped(tmp_path: Path, *members: tuple[zipfile.ZipInfo | str, bytes]) -> Path:
    path = tmp_path / "world.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def test_zip_tar_and_folder_hold_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "world"
    (folder / "filesystem" / "a").mkdir(parents=True)
    (folder / "filesystem" / "a" / "b.txt").write_bytes(b"five")
    packed = zipped(tmp_path, ("filesystem/", b""), ("filesystem/a/b.txt", b"five"))
    tarred = tmp_path / "world.tar.gz"
    tarred.write_bytes(tar_bytes({"filesystem/a/b.txt": Entry.of(b"five")}))
    for path in (folder, packed, tarred):
        files = open_archive(path)
        assert {name: (entry.size, entry.load()) for name, entry in files.items()} == {
            "filesystem/a/b.txt": (4, b"five")}
        assert files["filesystem/a/b.txt"].crc == Entry.of(b"five").crc


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a\\..\\x", "x" * 300])
def test_escaping_members(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsafePath):
        open_archive(zipped(tmp_path, (name, b"")))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(UnsafePath):
        untar(buffer.getvalue(), "x")


def test_links_and_devices(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with pytest.raises(UnsafeArchive, match="'link' is a link"):
        open_archive(zipped(tmp_path, (link, b"/etc/passwd")))
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        info = tarfile.TarInfo("link")
        info.type, info.linkname = kind, "/etc/passwd"
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            archive.addfile(info)
        with pytest.raises(UnsafeArchive, match="'link' is a link or a device"):
            untar(buffer.getvalue(), "x")
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "out").symlink_to("/etc")
    with pytest.raises(UnsafeArchive, match="out is a link"):
        open_archive(folder)


def test_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = zipped(tmp_path, ("filesystem/zeros.txt", bytes(8 << 20)))
    with pytest.raises(UnsafeArchive, match="looks like a bomb"):
        open_archive(bomb)
    with pytest.raises(UnsafeArchive, match="looks like a bomb"):
        untar(tar_bytes({"zeros": Entry.of(bytes(8 << 20))}), "x")
    with pytest.raises(UnsafeArchive, match="is in it twice"), pytest.warns(UserWarning, match="Duplicate name"):
        open_archive(zipped(tmp_path, ("a", b"1"), ("a", b"2")))
    for name, value in (("MOST_FILES", 2), ("MOST_BYTES", 2), ("MOST_FILE", 0)):
        with monkeypatch.context() as patch:
            patch.setattr(archives, name, value)
            with pytest.raises(UnsafeArchive, match="expands to more than"):
                open_archive(zipped(tmp_path, ("a", b"1"), ("b", b"2"), ("c", b"3")))


def test_a_member_that_lies_about_its_size(tmp_path: Path) -> None:
    """The directory of the zip says 4 bytes, the member holds a thousand: no more than 4 are ever read."""
    path = zipped(tmp_path, ("a", b"x" * 1000))
    data = path.read_bytes().replace((1000).to_bytes(4, "little"), (4).to_bytes(4, "little"))
    path.write_bytes(data)
    with pytest.raises(zipfile.BadZipFile):
        open_archive(path)["a"].load()


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04broken", b"\x1f\x8bbroken", b"just text"])
def test_what_is_no_archive(tmp_path: Path, data: bytes) -> None:
    for name in ("a.zip", "a.tar.gz"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(FormatError, match="cannot be read as an archive"):
            open_archive(tmp_path / name)
    with pytest.raises(FormatError):
        open_archive(tmp_path / "none.zip")
    for read in (unzip, untar):
        with pytest.raises(FormatError):
            read(data, "x")


def test_packing_is_repeatable() -> None:
    files = {"b": Entry.of(b"2"), "a": Entry.of(b"1")}
    assert archives.zip_bytes(files) == archives.zip_bytes(dict(reversed(files.items())))
