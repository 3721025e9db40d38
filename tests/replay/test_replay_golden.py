"""Stores of every release are read by this one, to the bit."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from golden_store import GOLDEN, describe, make
from independent_reader import read

from agentsdpo import __version__
from agentsdpo.replay import ReplayStore, verify
from agentsdpo.replay.upkeep.verification import Level

FIELD = re.compile(r"[a-z_]+")  # of a record; rows and branches have ids and paths for keys
RELEASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


@pytest.mark.parametrize("release", RELEASES)
def test_a_golden_store_reads_as_it_was_written(release: str) -> None:
    want = json.loads((GOLDEN / release / "expected.json").read_text())
    store = ReplayStore.open(GOLDEN / release / "STORE", create=False)
    got = json.loads(json.dumps(describe(store)))
    assert known(got, want) == want, "fields that came later are left out"


def known(got: Any, want: Any) -> Any:
    """What was read, without the fields that the release did not have."""
    if isinstance(want, dict):
        return {key: known(value, want[key]) if key in want else value for key, value in got.items()
                if key in want or not isinstance(key, str) or not FIELD.fullmatch(key)}
    return [known(a, b) for a, b in zip(got, want, strict=True)] if isinstance(want, list) else got


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("level", ["fast", "full", "deep"])
def test_a_golden_store_is_sound(release: str, level: Level) -> None:
    assert verify(ReplayStore.open(GOLDEN / release / "STORE", create=False), level).problems == ()


@pytest.mark.parametrize("release", RELEASES)
def test_format_md_of_this_release_describes_it(release: str) -> None:
    rows = read(GOLDEN / release / "STORE")
    want = json.loads((GOLDEN / release / "expected.json").read_text())["rows"]
    assert {"/".join(map(str, key)) for key in rows} == set(want)
    for key, row in rows.items():
        golden = want["/".join(map(str, key))]
        assert (row["token_ids"], row["reward"]) == (golden["token_ids"], golden["reward"])


@pytest.mark.parametrize("release", RELEASES)
def test_an_old_store_can_be_written_to(release: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / release / "STORE", tmp_path / "STORE")
    store = ReplayStore.open(tmp_path / "STORE")
    before = len(store)
    store.add_labels({store.snapshot().keys()[0].episode_id: "still there"})
    assert len(ReplayStore.open(tmp_path / "STORE")) == before
    assert len(list(store.branches("label == 'still there'"))) >= 1


def test_this_release_has_its_golden_store(tmp_path: Path) -> None:
    assert __version__ in RELEASES, "run tests/replay/golden_store.py"
    assert sum(file.stat().st_size for file in GOLDEN.rglob("*") if file.is_file()) < 200_000 * len(RELEASES)
    new, old = describe(make(tmp_path / "STORE")), json.loads((GOLDEN / __version__ / "expected.json").read_text())
    assert json.loads(json.dumps(new)) == old, "this release writes what its golden store holds"


def test_reading_a_golden_store_changes_nothing() -> None:
    before = {file: os.stat(file).st_mtime_ns for file in sorted(GOLDEN.rglob("*"))}
    describe(ReplayStore.open(GOLDEN / __version__ / "STORE", create=False))
    assert {file: os.stat(file).st_mtime_ns for file in sorted(GOLDEN.rglob("*"))} == before
