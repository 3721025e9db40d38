"""Where a file is written that a user named: links stay links, devices and pipes what they are, the rest an error."""

import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from agentsdpo.errors import AgentSdpoError, OutputError, StoreError
from agentsdpo.files import write_out, write_text
from agentsdpo.replay.formats.files import whole_file


def export(path: Path, text: str) -> None:
    with whole_file(path) as file:
        file.write(text.encode())
        assert file.tell() == len(text.encode()), "writers of Parquet ask where they are"


WRITERS = pytest.mark.parametrize("write", [write_text, write_out, export])
NAMED = pytest.mark.parametrize(("write", "kind"), [(write_out, OutputError), (export, StoreError)])


@WRITERS
def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path, write: Callable[[Path, str], object]) -> None:
    (tmp_path / "real").mkdir()
    for target in ("old", "missing"):
        link = tmp_path / f"to-{target}"
        link.symlink_to(tmp_path / "real" / target)
    (tmp_path / "real" / "old").write_text("before")
    (tmp_path / "hard").hardlink_to(tmp_path / "real" / "old")
    for target in ("old", "missing"):
        write(tmp_path / f"to-{target}", "after")
        assert (tmp_path / f"to-{target}").is_symlink()
        assert (tmp_path / "real" / target).read_text() == "after"
    assert (tmp_path / "hard").read_text() == "before", "replaced by rename, not written over"
    assert sorted(path.name for path in (tmp_path / "real").iterdir()) == ["missing", "old"]


@WRITERS
def test_a_pipe_is_written_to(tmp_path: Path, write: Callable[[Path, str], object]) -> None:
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write(pipe, "through")
    reader.join(10)
    assert got == [b"through"]
    assert stat.S_ISFIFO(pipe.lstat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


@WRITERS
def test_a_device_stays_one(tmp_path: Path, write: Callable[[Path, str], object]) -> None:
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        device.write_bytes(b"")
    except PermissionError:
        pytest.skip("this user may make no devices")
    write(device, "away")
    assert stat.S_ISCHR(device.lstat().st_mode)


@NAMED
def test_what_cannot_be_written_is_one_sentence(tmp_path: Path, write: Callable[[Path, str], object],
                                                kind: type[AgentSdpoError]) -> None:
    (tmp_path / "file").write_text("kept")
    for place, reason in ((tmp_path, "Is a directory"), (tmp_path / ("x" * 300), "File name too long"),
                          (tmp_path / "file" / "page.html", "Not a directory|File exists")):
        with pytest.raises(kind, match=rf"{place} cannot be written: ({reason}); name a file in"):
            write(place, "text")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


@WRITERS
def test_a_name_as_long_as_names_may_be(tmp_path: Path, write: Callable[[Path, str], object]) -> None:
    write(tmp_path / ("x" * 255), "text")
    assert [len(path.name) for path in tmp_path.iterdir()] == [255]
