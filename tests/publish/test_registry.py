"""The registry's promises: versions grow by one, a version is complete or absent, a killed writer harms nothing."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentsdpo.errors import CorruptionError, RegistryError
from agentsdpo.publish.manifest import MANIFEST, WEIGHTS
from agentsdpo.publish.registry import PolicyRegistry, behaviour_version
from agentsdpo.publish.tensors import read_tensors, write_tensors


def weights(value: float) -> dict[str, np.ndarray]:
    return {"a": np.full((2, 3), value, np.float32), "b": np.arange(4, dtype=np.float32) + value}


def filled(root: Path, n: int) -> PolicyRegistry:
    registry = PolicyRegistry(root / "policies", base_model="seed", tokenizer_sha256="t0", chat_template_sha256="c0")
    for step in range(n):
        registry.publish(weights(step), learner_step=step * 10)
    return registry


def test_versions_grow_by_one_and_are_announced(tmp_path: Path) -> None:
    registry = PolicyRegistry(tmp_path / "policies")
    assert registry.latest() is None
    assert registry.versions() == []
    assert [registry.publish(weights(s), learner_step=s) for s in range(3)] == [0, 1, 2]
    assert PolicyRegistry(tmp_path / "policies").latest() == 2
    assert (tmp_path / "policies" / "000000000002" / WEIGHTS).is_file()


def test_load_returns_what_was_published(tmp_path: Path) -> None:
    registry = filled(tmp_path, 3)
    loaded = registry.load(1, framework="np")
    assert list(loaded) == ["a", "b"]
    for name, tensor in weights(1).items():
        np.testing.assert_array_equal(loaded[name], tensor)
        assert loaded[name].dtype == tensor.dtype


def test_manifest_says_where_weights_come_from(tmp_path: Path) -> None:
    registry = filled(tmp_path, 2)
    manifest = registry.manifest(1)
    assert (manifest.version, manifest.parent, manifest.learner_step, manifest.dtype) == (1, 0, 10, "float32")
    assert (manifest.base_model, manifest.tokenizer_sha256, manifest.chat_template_sha256) == ("seed", "t0", "c0")
    assert manifest.files == {WEIGHTS: manifest.weights_id}
    assert registry.manifest(0).parent is None
    again = registry.publish(weights(1), learner_step=20, parent=0)
    assert registry.manifest(again).weights_id == manifest.weights_id, "equal weights have equal ids"
    assert registry.manifest(again).parent == 0


def test_torch_state_dict_with_tied_head_and_bfloat16(tmp_path: Path, tiny_model: Any) -> None:
    import torch

    registry = PolicyRegistry(tmp_path)
    state = tiny_model.state_dict()
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    version = registry.publish(state, learner_step=0)
    loaded = registry.load(version)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert registry.manifest(version).tied == {"lm_head.weight": "model.embed_tokens.weight"}
    half = {name: tensor.to(torch.bfloat16) for name, tensor in state.items() if name != "lm_head.weight"}
    version = registry.publish(half, learner_step=1)
    assert registry.manifest(version).dtype == "bfloat16"
    back = registry.load(version)
    assert all(back[n].dtype == torch.bfloat16 and torch.equal(back[n], half[n]) for n in half)


def test_publishing_does_not_alias_later_updates(tmp_path: Path) -> None:
    registry, live = PolicyRegistry(tmp_path), weights(0)
    registry.publish(live, learner_step=0)
    live["a"] += 1.0
    assert registry.load(0, framework="np")["a"].max() == 0.0


def test_missing_version_names_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"policy version 7 is not in .*, which holds versions 0 to 1; raise"):
        filled(tmp_path, 2).load(7)
    with pytest.raises(RegistryError, match="which holds no version"):
        PolicyRegistry(tmp_path / "none").load(0)
    assert not (tmp_path / "none").exists(), "reading makes no folder"


def test_nothing_to_publish_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="no tensors"):
        PolicyRegistry(tmp_path).publish({}, learner_step=0)


def test_flipped_bit_is_found(tmp_path: Path) -> None:
    registry = filled(tmp_path, 1)
    path = registry.folder(0) / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptionError, match=r"model.safetensors of policy version 0 has sha256 [0-9a-f]{16}, publ"):
        registry.load(0, framework="np")


def test_missing_file_and_broken_manifest_are_found(tmp_path: Path) -> None:
    registry = filled(tmp_path, 2)
    (registry.folder(0) / WEIGHTS).unlink()
    with pytest.raises(CorruptionError, match="has sha256 missing"):
        registry.load(0, framework="np")
    (registry.folder(1) / MANIFEST).write_text("{")
    with pytest.raises(CorruptionError, match=r"manifest.json cannot be read"):
        registry.manifest(1)


def test_folder_under_a_wrong_number_is_found(tmp_path: Path) -> None:
    registry = filled(tmp_path, 2)
    root = registry.root
    (root / f"{0:012d}").rename(root / "aside")
    (root / f"{1:012d}").rename(root / f"{0:012d}")
    with pytest.raises(CorruptionError, match="is of version 1 but stands in folder 000000000000"):
        registry.load(0, framework="np")


def test_broken_latest_is_named(tmp_path: Path) -> None:
    registry = filled(tmp_path, 2)
    (registry.root / "LATEST").write_text("")
    with pytest.raises(CorruptionError, match=r"LATEST holds '' instead of a version; .*\[0, 1\]"):
        registry.latest()


def test_nothing_is_pruned_while_the_latest_version_is_not_there(tmp_path: Path) -> None:
    """All of them would be older than it."""
    registry = filled(tmp_path, 3)
    (registry.root / "LATEST").write_text("100")
    with pytest.raises(CorruptionError, match=r"LATEST names version 100, which is not there; .*\[0, 1, 2\]"):
        registry.prune(1)
    assert registry.versions() == [0, 1, 2]


def test_a_file_is_no_registry(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("")
    with pytest.raises(RegistryError, match="run.toml/LATEST cannot be read: Not a directory; give the folder"):
        PolicyRegistry(tmp_path / "run.toml").latest()


def test_second_writer_is_refused_while_one_publishes(tmp_path: Path) -> None:
    registry = filled(tmp_path, 1)
    with (registry.root / "LOCK").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RegistryError, match="another program is publishing"):
            registry.publish(weights(1), learner_step=1)
        assert registry.load(0, framework="np"), "readers need no lock"
    assert registry.publish(weights(1), learner_step=1) == 1


@pytest.mark.parametrize(("latest", "staleness", "expected"), [(20, 16, 4), (16, 16, 0), (3, 16, 0), (5, 0, 5)])
def test_behaviour_version(latest: int, staleness: int, expected: int) -> None:
    assert behaviour_version(latest, staleness=staleness) == expected


@pytest.mark.parametrize(("keep", "staleness", "left"), [
    (1, 0, [9]), (3, 0, [7, 8, 9]), (1, 4, [5, 6, 7, 8, 9]), (3, 1, [7, 8, 9]), (1, 64, list(range(10)))])
def test_prune_keeps_the_newest_and_the_staleness_window(tmp_path: Path, keep: int, staleness: int,
                                                         left: list[int]) -> None:
    registry = filled(tmp_path, 10)
    gone = registry.prune(keep, staleness=staleness)
    assert registry.versions() == left
    assert gone + left == list(range(10))
    assert behaviour_version(9, staleness=staleness) in left
    assert registry.publish(weights(0), learner_step=0) == 10, "numbers are never used again"


def test_rewind_repeats_versions_after_a_crash(tmp_path: Path) -> None:
    registry = filled(tmp_path, 5)
    assert registry.rewind(2) == [3, 4]
    assert registry.versions() == [0, 1, 2]
    assert registry.publish(weights(33), learner_step=3) == 3
    assert registry.load(3, framework="np")["a"].max() == 33.0
    with pytest.raises(RegistryError, match="policy version 9"):
        registry.rewind(9)


FULL = '''
"""Publishes under a limit on the size of files: the write fails as on a full disk."""
import resource, signal, sys
import numpy as np
from agentsdpo.errors import RegistryError
from agentsdpo.publish.registry import PolicyRegistry

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
registry = PolicyRegistry(sys.argv[1])
registry.publish({"w": np.zeros(3, np.float32)}, learner_step=0)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    registry.publish({"w": np.zeros(9000, np.float32)}, learner_step=1)
except RegistryError as error:
    print(error)
'''


def test_full_disk_is_one_sentence_and_leaves_nothing_behind(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path / "p")], capture_output=True, text=True, check=True)
    assert "there is no room for" in done.stdout
    assert "free some space" in done.stdout
    assert "versions published before are safe" in done.stdout
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["000000000000", "LATEST", "LOCK"]
    assert PolicyRegistry(tmp_path / "p").load(0, framework="np")["w"].tolist() == [0.0] * 3


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_truncated_weights_are_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "w.safetensors"
    write_tensors(weights(0), path)
    data = {"cut": path.read_bytes()[:-4], "empty": b"", "text": b"not tensors at all, but some words"}[damage]
    path.write_bytes(data)
    for framework in ("np", "pt"):
        with pytest.raises(CorruptionError, match=r"w.safetensors is not a whole safetensors file: "):
            read_tensors(path, framework)


def test_published_files_are_readable_by_everyone(tmp_path: Path) -> None:
    folder = filled(tmp_path, 1).folder(0)
    assert [path.stat().st_mode & 0o777 for path in (folder, folder / WEIGHTS, folder / MANIFEST)] == [
        0o755, 0o644, 0o644]


CHILD = '''
"""Publishes once per kill point, each time in a child that kills itself at that system call."""
import os, shutil, signal, sys
from pathlib import Path
import numpy as np
from agentsdpo.publish import registry as room

calls = 0
def deadly(real, at):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call

root, at = Path(sys.argv[1]), 0
while True:
    at += 1
    policies = root / str(at)
    room.PolicyRegistry(policies).publish({"w": np.zeros(3, np.float32)}, learner_step=0)
    child = os.fork()
    if child == 0:
        room._sync = deadly(room._sync, at)
        room.write_tensors = deadly(room.write_tensors, at)
        Path.rename = deadly(Path.rename, at)
        Path.replace = deadly(Path.replace, at)
        Path.write_text = deadly(Path.write_text, at)
        room.PolicyRegistry(policies).publish({"w": np.ones(3, np.float32)}, learner_step=1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, status
        shutil.rmtree(policies)
        print(at - 1)
        break
'''


def test_killed_at_any_point_leaves_a_valid_latest(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    run = subprocess.run([sys.executable, str(script), str(tmp_path / "r")], capture_output=True, text=True, check=True)
    points = int(run.stdout)
    assert points >= 9, "write, manifest, three syncs, rename, sync, announce in three parts"
    seen = set()
    for at in range(1, points + 1):
        registry = PolicyRegistry(tmp_path / "r" / str(at))
        latest = registry.latest()
        assert latest in (0, 1)
        assert registry.versions() == list(range(latest + 1))
        assert registry.load(latest, framework="np")["w"].tolist() == [float(latest)] * 3
        assert registry.publish({"w": np.full(3, 7, np.float32)}, learner_step=1) == latest + 1
        assert registry.load(latest + 1, framework="np")["w"].tolist() == [7.0] * 3
        assert not [name for name in os.listdir(registry.root) if name.startswith(".tmp")], "leftovers are swept up"
        seen.add(latest)
    assert seen == {0, 1}, "the kill points lie before and after the announcement"
