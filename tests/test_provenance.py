"""Where a run comes from."""

import subprocess
from pathlib import Path

import pytest

from agentsdpo import provenance


def test_commit_marks_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "agentsdpo"
    package.mkdir()
    file = package / "provenance.py"
    file.write_text("a = 1\n")
    monkeypatch.setattr(provenance, "__file__", str(file))
    assert provenance.git_commit() is None, "not a checkout"
    (tmp_path / ".gitignore").write_text("built.py\n")
    for arguments in (["init", "-q"], ["add", "-A"], ["-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "m"]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    commit = provenance.git_commit()
    assert commit
    assert len(commit) == 40
    file.write_text("a = 2\n")
    assert provenance.git_commit() == commit + "+changes"
    file.write_text("a = 1\n")
    for name in ("notes.md", "agentsdpo/built.py", "agentsdpo/result.json"):
        (tmp_path / name).write_text("x = 1\n")
    assert provenance.git_commit() == commit, "neither notes nor what git ignores nor results are code"
    (package / "learn").mkdir()
    (package / "learn" / "new.py").write_text("a = 3\n")
    assert provenance.git_commit() == commit + "+changes", "a module git does not know yet is code that runs"
