"""Collectors and evaluators over a local Ray cluster: a worker that is killed in the middle costs nothing."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agentsdpo.assemble import make_learner
from agentsdpo.config import from_mapping
from agentsdpo.errors import EngineError, RegistryError
from agentsdpo.learn.load import load_chat
from agentsdpo.programs.evaluating import evaluate_due
from agentsdpo.programs.fan_out import _evaluated, evaluate_over_ray
from agentsdpo.programs.owed import Owed, key_of, read_answers, read_owed, write_owed
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.replay.store import ReplayStore
from agentsdpo.runfolder import RunFolder
from agentsdpo.suites import model_path
from agentsdpo.types import Json

OF = (os.cpu_count() or 1) + 1
"""Evaluators, one more than the cluster has room for."""
CONFIG = 'name = "far"\n[collect]\nwindow = 512\nconcurrency = 2\nmax_tokens = 48\n'


def run(folder: Path, *more: str) -> list[str]:
    (folder / "run.toml").write_text(CONFIG)
    return [sys.executable, "-m", "agentsdpo.cli", "collect", str(folder / "run.toml"), "--store",
            str(folder / "store"), "--policies", str(folder / "policies"), *more]


def test_one_number_and_a_cluster_make_no_sense(tmp_path: Path) -> None:
    done = subprocess.run(run(tmp_path, "--ray", "local", "--number", "1"), capture_output=True, text=True)
    assert (done.returncode, "--ray runs all of --of 1; leave --number out" in done.stderr) == (2, True)


def workers(title_of: bytes = b"ray::collector") -> list[int]:
    """Worker processes of Ray that run a collector, by the title Ray gives them."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            title = entry.read_bytes()
        except OSError:
            continue
        found += [int(entry.parent.name)] if title.startswith(title_of) else []
    return found


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_a_worker_killed_in_the_middle_costs_nothing(tmp_path: Path) -> None:
    config = from_mapping({"name": "far"})
    chat = load_chat(model_path(config))
    PolicyRegistry(tmp_path / "policies", tokenizer_sha256=chat.tokenizer_sha256,
                   chat_template_sha256=chat.template_sha256).publish(make_learner(config).policy(), learner_step=0)
    command = run(tmp_path, "--ray", "local", "--of", "2", "--episodes", "8", "--json")
    quiet = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=quiet)
    deadline = time.monotonic() + 300
    store = ReplayStore.open(tmp_path / "store")
    while not (len(store) >= 2 and workers()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    killed = workers()
    assert killed, process.communicate()[1]
    os.kill(killed[0], signal.SIGKILL)
    said, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert json.loads(said.splitlines()[-1])["collectors"] == 2
    rows = store.snapshot().rows
    assert len(rows) == 16, "eight of each, and each once"
    assert all(episode.grade is not None for episode in store.episodes())


def evaluate(run: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "agentsdpo.cli", "evaluate", str(run), *more]


@pytest.mark.parametrize(("more", "words"), [
    (["--ray", "local", "--server", "http://127.0.0.1:1"], "a server plays one version at a time; leave one of them"),
    (["--of", "2"], "--of is 2, but one evaluator plays without a cluster; give --ray ADDRESS"),
    (["--ray", "local"], "holds no run; give the folder")])
def test_what_an_evaluation_cannot_be(tmp_path: Path, more: list[str], words: str) -> None:
    done = subprocess.run(evaluate(tmp_path, *more), capture_output=True, text=True)
    assert done.returncode != 0
    assert words in " ".join(done.stderr.split())


class Cluster:
    """As much of Ray as handing out evaluations asks for: one is done at each look, the oldest first."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder, self.begun = folder, list[tuple[Any, ...]]()
        self.exceptions = SimpleNamespace(RayTaskError=RuntimeError)

    def remote(self, **about: Any) -> Any:
        return lambda play: SimpleNamespace(remote=self.begin)

    def begin(self, settings: str, run: str, *job: Any) -> int:
        self.begun.append(job)
        return len(self.begun) - 1

    def wait(self, refs: list[int], timeout: float) -> tuple[list[int], list[int]]:
        return refs[:1], refs[1:]

    def get(self, ref: int) -> Json:
        """The learner has heard this answer at once, and waits for the others alone."""
        owed, split, decoding, n = self.begun[ref]
        write_owed(self.folder, [replace(one, wanted=tuple(each for each in one.wanted if each[0] != split))
                                 for one in read_owed(self.folder)])
        return {"step": owed.step, "version": owed.version, "split": split, "decoding": decoding, "n": n}


def test_what_is_being_played_is_not_handed_out_again_when_others_are_heard(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_owed(folder, [Owed(1, 1, 0.0, tuple((split, "sampled", 2) for split in ("a", "b", "c")), {})])
    ray = Cluster(folder)
    assert _evaluated(ray, 3, from_mapping({}), folder, follow=False, say=lambda text: None) == 3
    assert [split for _, split, *_ in ray.begun] == ["a", "b", "c"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_evaluations_survive_a_killed_worker(tmp_path: Path) -> None:
    config, folder = from_mapping({"name": "far", "collect": {"concurrency": 2}}), RunFolder(tmp_path)
    folder.config.write_text(config.to_toml())
    chat = load_chat(model_path(config))
    registry = PolicyRegistry(folder.policies, tokenizer_sha256=chat.tokenizer_sha256,
                              chat_template_sha256=chat.template_sha256)
    for step in range(2):
        registry.publish(make_learner(config).policy(), learner_step=step)
    wanted = (("val", "sampled", 24), ("test_names", "sampled", 24), ("val", "greedy", 3))
    write_owed(folder, [Owed(step, step, 0.0, wanted, {}) for step in range(2)])
    process = subprocess.Popen(evaluate(tmp_path, "--ray", "local", "--of", str(OF), "--json"), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 300
    while not workers(b"ray::evaluation") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    killed = workers(b"ray::evaluation")
    assert killed, process.communicate()[1]
    os.kill(killed[0], signal.SIGKILL)
    said, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert json.loads(said.splitlines()[-1]) == {"run": str(tmp_path), "evaluators": OF, "played": 6}
    rows = read_answers(folder)
    assert sorted(map(key_of, rows)) == sorted(key for owed in read_owed(folder) for key in owed.keys)
    same = [[row[key] for key in ("n", "pass", "score")] for row in sorted(rows, key=key_of)]
    assert same[:3] == same[3:], "both versions hold the same weights"
    assert evaluate_due(folder.path)["played"] == 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_what_an_evaluator_meets_is_told(tmp_path: Path) -> None:
    config, folder = from_mapping({"name": "far"}), RunFolder(tmp_path)
    folder.config.write_text(config.to_toml())
    wanted = (("val", "sampled", 2),)
    for owed, words in ((Owed(0, 7, 0.0, wanted, {}), "policy version 7"),
                        (Owed(0, 7, 0.0, wanted, {}, candidate=3), "policy version 3")):
        write_owed(folder, [owed])
        with pytest.raises(RegistryError, match=words):
            evaluate_over_ray(tmp_path, address="local", of=1)
    folder.config.write_text(config.to_toml().replace('suite = "desk-mini"', 'suite = "no.such:suite"'))
    write_owed(folder, [Owed(0, 7, 0.0, wanted, {})])
    with pytest.raises(EngineError, match=r"an evaluator failed: .*no\.such"):
        evaluate_over_ray(tmp_path, address="local", of=1)
