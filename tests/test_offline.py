"""The learner alone on a store that others fill: it repeats itself, goes on after any stop, and says what it lacks."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from agentsdpo import learning
from agentsdpo.config import RunConfig, from_mapping
from agentsdpo.errors import ConfigError, LearnError, NothingToLearn, RunError, StoreNotFound, TokenizerMismatch
from agentsdpo.learn import trackers
from agentsdpo.learn.learner import Learner, StepReport
from agentsdpo.learn.rows import TrainRow
from agentsdpo.learning import train_rows
from agentsdpo.loop import train
from agentsdpo.offline import learn_alone
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.replay.example import example
from agentsdpo.replay.store import ReplayStore
from agentsdpo.track import read_metrics
from agentsdpo.types import Episode, Grade, Json

SETS = ["collect.window=512", "collect.concurrency=16", "collect.max_tokens=48", "episodes_per_step=6", "learn.batch=4",
        "eval.final_episodes=1", "eval.episodes=1", "eval.splits=['val']", "eval.final_splits=['val']",
        "tripwire.on=false", "checkpoint_every=2", "learn.max_staleness=20", "learn.gate=off", "learn.veto=none"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def config(*more: str, steps: int = 5) -> RunConfig:
    return from_mapping({"name": "t", "steps": steps}, [*SETS, *more])


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of twelve episodes, versions 0 and 1."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("played") / "run"
    train(config(steps=2), out=out, mode="none")
    return out / "replay"


@pytest.fixture(scope="module")
def whole(played: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Json]:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, learn_alone(config(), played, out=out, mode="none")


def weights(out: Path) -> dict[str, np.ndarray]:
    newest = sorted(out.glob("checkpoint/step-*"))[-1]
    return {k: v.numpy() for k, v in load_file(newest / "weights.safetensors").items()}


def same(a: Path, b: Path) -> bool:
    one, two = weights(a), weights(b)
    return one.keys() == two.keys() and all(np.array_equal(one[k], two[k]) for k in one)


def told(out: Path) -> list[Json]:
    """The metrics without what a clock says."""
    clocks = ("wall_s", "learn/step_s", "publish/lag_s", "replay/age_s/p95")
    return [{key: value for key, value in row.items() if key not in clocks}
            for row in read_metrics(out / "metrics.jsonl")]


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*") if path.is_file()}


def later(store: Path, by: int, **changes: Any) -> list[Episode]:
    """Episodes of a store under new ids, sampled by versions so much newer."""
    found = []
    for episode in ReplayStore.open(store, create=False).episodes():
        branches = [branch.model_copy(update={"calls": tuple(call.model_copy(update={"versions": tuple(
            span.model_copy(update={"version": span.version + by}) for span in call.versions)})
            for call in branch.calls)}) for branch in episode.branches]
        found.append(episode.model_copy(update={"episode_id": f"{episode.episode_id}-{by}",
                                                "branches": tuple(branches), **changes}))
    return found


# ------------------------------------------------------------------------------------------------------------- learning


def far(store: Path, by: float) -> list[Episode]:
    """Episodes of a store whose behaviour log-probs are so many nats lower than they were."""
    found = []
    for episode in later(store, 0):
        branches = tuple(branch.model_copy(update={"logprobs": branch.logprobs - np.float32(by)})
                         for branch in episode.branches)
        found.append(episode.model_copy(update={"episode_id": f"{episode.episode_id}-far", "branches": branches}))
    return found


def test_a_batch_of_which_every_token_is_gated_is_skipped_and_counted(played: Path, tmp_path: Path) -> None:
    ReplayStore.open(tmp_path / "store").append([*later(played, 0), *far(played, 5.0)])
    found = config("learn.batch=1", "learn.gate=k3", "publish.every=1", steps=8)
    summary = learn_alone(found, tmp_path / "store", out=tmp_path / "run", mode="none")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    skipped = [row for row in rows if row.get("learn/skipped/gated")]
    trained = [row for row in rows if "learn/loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert skipped
    assert trained
    assert len(skipped) + len(trained) == 8
    assert all(row["learn/rows"] == row["learn/tokens"] == 0 for row in skipped)
    assert summary["version"] == 1 + len(trained), "a step without an update publishes nothing"


def test_too_many_of_them_end_the_run(played: Path, tmp_path: Path) -> None:
    ReplayStore.open(tmp_path / "store").append(far(played, 5.0))
    found = config("learn.gate=k3", steps=20)
    with pytest.raises(LearnError, match=r"8 steps in a row had nothing to train on; the last: all \d+ loss tokens of "
                                         r"step 8 are masked .* lower learn.max_staleness"):
        learn_alone(found, tmp_path / "store", out=tmp_path / "run", mode="none")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["learn/skipped/gated"] for row in rows] == [1.0] * 7
    assert len(PolicyRegistry(tmp_path / "run" / "policies").versions()) == 1, "nothing was published but the start"


def test_grades_that_are_all_alike_end_no_run(played: Path, tmp_path: Path) -> None:
    """All pass, or none does yet: there is nothing to learn from that, and nothing wrong."""
    alike = [episode.model_copy(update={"episode_id": f"{episode.episode_id}-alike",
                                        "grade": Grade(results=(), mean=1.0, passed=True)})
             for episode in later(played, 0)]
    ReplayStore.open(tmp_path / "store").append(alike)
    learn_alone(config("preset=grpo", "group=2", steps=10), tmp_path / "store", out=tmp_path / "run", mode="none")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["learn/skipped/alike"] for row in rows] == [1.0] * 10


def test_prioritised_replay_goes_by_the_gap(played: Path, tmp_path: Path) -> None:
    found = config("replay.strategy=prioritised", "learn.batch=12", steps=1)
    learn_alone(found, played, out=tmp_path / "run", mode="none")
    saved = json.loads((tmp_path / "run" / "checkpoint" / "step-00000001" / "state.json").read_text())
    units = saved["sampler"]["sampler"]["units"]
    priorities = {remembered[-1] for remembered in units.values()}
    assert len(priorities) == 12, "each branch has its own, from the gap of its tokens"
    assert 0 < min(priorities) < max(priorities) < 5


def test_what_was_refused_is_drawn_no_sooner_than_what_has_least_to_teach(
        played: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent: set[str] = set()

    def some_without(*args: Any, **more: Any) -> list[TrainRow]:
        rows = train_rows(*args, **more)
        silent.update(row.episode_id for row in rows if len(silent) < 4)
        return [replace(row, hint_ids=None) if row.episode_id in silent else row for row in rows]

    monkeypatch.setattr(learning, "train_rows", some_without)
    learn_alone(config("replay.strategy=prioritised", "learn.batch=12", steps=1), played, out=tmp_path / "run",
                mode="none")
    saved = json.loads((tmp_path / "run" / "checkpoint" / "step-00000001" / "state.json").read_text())
    units = {name: own[-1] for name, own in saved["sampler"]["sampler"]["units"].items()}
    least = min(priority for name, priority in units.items() if name not in silent)
    assert {units[name] for name in silent} == {least}


def test_what_learns_from_its_grade_alone_keeps_a_priority(played: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    def half_without(*args: Any, **more: Any) -> list[TrainRow]:
        return [replace(row, hint_ids=None) if row.episode_id < "8" else row for row in train_rows(*args, **more)]

    monkeypatch.setattr(learning, "train_rows", half_without)
    found = config("replay.strategy=prioritised", "learn.batch=12", "learn.mix=add", "learn.advantage=reinforce",
                   steps=1)
    learn_alone(found, played, out=tmp_path / "run", mode="none")
    saved = json.loads((tmp_path / "run" / "checkpoint" / "step-00000001" / "state.json").read_text())
    units = {name: own[-1] for name, own in saved["sampler"]["sampler"]["units"].items()}
    hinted, bare = ({priority for name, priority in units.items() if (name < "8") is low} for low in (False, True))
    assert bare == {min(hinted)}
    assert min(hinted) > 0


def test_an_advantage_of_groups_needs_groups(played: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="with group 1: alone in its group"):
        learn_alone(config("learn.mix=add"), played, out=tmp_path / "run", mode="none")
    assert not (tmp_path / "run").exists()


def test_what_is_drawn_twice_counts_twice(played: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[TrainRow] = []

    def told(self: Learner, rows: list[TrainRow], version: int) -> StepReport:
        given.extend(rows)
        return step(self, rows, version)

    step = Learner.step
    monkeypatch.setattr(Learner, "step", told)
    learn_alone(config("replay.strategy=uniform_iid", "learn.batch=24", steps=1), played, out=tmp_path / "run",
                mode="none")
    draws: dict[str, list[int]] = {}
    for row in given:
        draws.setdefault(row.episode_id, []).append(row.draw)
    assert max(map(len, draws.values())) > 1, "24 draws of 12 episodes"
    assert all(own == list(range(len(own))) for own in draws.values())


def test_what_was_learnt_is_published_though_the_last_step_is_skipped(played: Path, tmp_path: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    step = Learner.step

    def last_is_empty(self: Learner, rows: list[TrainRow], version: int) -> StepReport:
        if self.step_count == 2:
            raise NothingToLearn("every token is gated", reason="gated")
        return step(self, rows, version)

    monkeypatch.setattr(Learner, "step", last_is_empty)
    learn_alone(config("publish.every=9", steps=3), played, out=tmp_path / "run", mode="none")
    registry = PolicyRegistry(tmp_path / "run" / "policies")
    first, last = (registry.manifest(version) for version in registry.versions())
    assert last.learner_step == 3
    assert last.weights_id != first.weights_id
    np.testing.assert_array_equal(registry.load(last.version)["model.norm.weight"],
                                  weights(tmp_path / "run")["model.norm.weight"])


@pytest.mark.slow
def test_accelerate_launch_learns_as_one_process_does(whole: tuple[Path, Json], played: Path, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(config().to_toml())
    done = launch(tmp_path, "--store", str(played), "--out", str(tmp_path / "two"), "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    mine, theirs = json.loads(done.stdout), whole[1]
    assert {key: mine[key] for key in ("steps", "version", "rows", "tokens")} == {
        key: theirs[key] for key in ("steps", "version", "rows", "tokens")}
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    for name, tensor in weights(whole[0]).items():
        np.testing.assert_allclose(weights(tmp_path / "two")[name], tensor, rtol=1e-3, atol=2e-4, err_msg=name)
    refused = launch(tmp_path, "--store", str(tmp_path), "--out", str(tmp_path / "none"))
    assert refused.returncode != 0
    assert refused.stderr.count("is not a replay store") == 1, "said once, and no process is left waiting"


def launch(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """``learn`` on two processes."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
               "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "agentsdpo.cli",
               "learn", str(folder / "c.toml"), *arguments, "--set", "learn.parallel.ranks=2"]
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, timeout=300)


def test_it_learns_from_the_store_and_leaves_it_as_it_was(
        whole: tuple[Path, Json], played: Path, tmp_path: Path) -> None:
    out, summary = whole
    rows = read_metrics(out / "metrics.jsonl")
    assert [(row["kind"], row["step"], row["version"]) for row in rows] == [("step", n, n + 1) for n in range(1, 6)]
    assert rows[-1]["replay/staleness/max"] in (4.0, 5.0), "counted from version 1, the newest in the store"
    assert summary["steps"] == 5
    assert summary["version"] == 6
    assert summary["tokens"] == sum(row["learn/tokens"] for row in rows)
    assert summary["loss"] == rows[-1]["learn/loss"]
    assert (out / "FINISHED").exists()
    registry = PolicyRegistry(out / "policies")
    assert registry.latest() == 6
    assert registry.manifest(6).parent == 5
    assert not (out / "replay").exists()
    before = content(played)
    learn_alone(config(), played, out=tmp_path / "again", mode="none")
    assert content(played) == before
    assert same(out, tmp_path / "again")
    assert told(out) == told(tmp_path / "again")


_CHILD = """
import os, signal, sys, torch
torch.set_num_threads(1)
from agentsdpo import cli, offline
real, number, at = offline.update, getattr(signal, sys.argv[1]), int(sys.argv[2])
def update(run):
    if run.step == at:
        os.kill(os.getpid(), number)
    return real(run)
offline.update = update
sys.argv = ["agentsdpo", *sys.argv[3:]]
cli.main()
"""


def stopped(how: str, at: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run([sys.executable, "-c", _CHILD, how, str(at), *arguments], capture_output=True, text=True,
                          timeout=300, check=False, env=env)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "at"), [("SIGKILL", 3), ("SIGINT", 2)])
def test_a_stopped_run_ends_as_one_that_was_not(
        how: str, at: int, whole: tuple[Path, Json], played: Path, tmp_path: Path) -> None:
    out, settings = tmp_path / "run", tmp_path / "c.toml"
    settings.write_text(config().to_toml())
    words = ["learn", str(settings), "--store", str(played), "--out", str(out)]
    done = stopped(how, at, *words)
    if how == "SIGKILL":
        assert done.returncode == -signal.SIGKILL
    else:
        assert done.returncode == 1
        assert done.stderr.strip().splitlines()[-1].startswith("agentsdpo: stopped; ")
        assert f"agentsdpo learn {settings} --store {played} --out {out} --resume" in done.stderr
        assert len(read_metrics(out / "metrics.jsonl")) == 3, "the step under way is finished first"
    assert len(read_metrics(out / "metrics.jsonl")) >= 3
    done = stopped("SIGKILL", 99, *words, "--resume", "--json")
    assert done.returncode == 0, done.stderr
    assert same(whole[0], out)
    assert told(whole[0]) == told(out)
    summary = json.loads(done.stdout)
    assert {key: summary[key] for key in ("steps", "version", "rows", "tokens", "loss")} == {
        key: whole[1][key] for key in ("steps", "version", "rows", "tokens", "loss")}


def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(
        played: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = config("publish.keep=1", "staleness=1", steps=4)
    learn_alone(ours, played, out=tmp_path / "run", mode="none")
    before = weights(tmp_path / "run"), told(tmp_path / "run")
    file = tmp_path / "run" / "checkpoint" / "step-00000004" / "optimiser.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    learn_alone(ours, played, out=tmp_path / "run", resume=True, mode="none")
    assert "step-00000004 is damaged (optimiser.safetensors" in caplog.text
    after = weights(tmp_path / "run"), told(tmp_path / "run")
    assert all(np.array_equal(before[0][key], after[0][key]) for key in before[0])
    assert before[1] == after[1]


def test_when_all_is_too_stale_the_run_stops_and_goes_on_with_what_was_appended(played: Path, tmp_path: Path) -> None:
    store = ReplayStore.open(tmp_path / "store")
    store.append(later(played, 0))
    out, ours = tmp_path / "run", config("learn.max_staleness=3", "checkpoint_every=3", steps=8)
    with pytest.raises(LearnError, match=r"none of 12 branches in .* at policy version 5: 12 staler than "
                                         r"learn\.max_staleness; collect fresh episodes and go on with --resume"):
        learn_alone(ours, tmp_path / "store", out=out, mode="none")
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl")] == [1, 2, 3, 4]
    store.append(later(played, 4))
    summary = learn_alone(ours, tmp_path / "store", out=out, resume=True, mode="none")
    assert (summary["steps"], summary["version"]) == (8, 9)
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl")] == [*range(1, 9)]


def test_a_run_says_how_much_of_the_store_is_too_old_for_it(played: Path, tmp_path: Path,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    store = ReplayStore.open(tmp_path / "store")
    store.append([*later(played, 0), *later(played, 30)])
    learn_alone(config(steps=1), tmp_path / "store", out=tmp_path / "run", mode="plain")
    said = capsys.readouterr().err
    assert "note: 12 of 24 branches can be drawn at policy version 31, 12 are too old for learn.max_staleness" in said
    learn_alone(config(steps=1), tmp_path / "store", out=tmp_path / "run", resume=True, mode="plain")
    assert "can be drawn" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_store_in_a_bucket_teaches_the_same(whole: tuple[Path, Json], played: Path, moto: Any, tmp_path: Path
                                              ) -> None:
    uri = f"s3://bucket/a?scheme=http&endpoint_override=127.0.0.1:{moto.port}"
    ReplayStore.open(uri).append(list(ReplayStore.open(played, create=False).episodes()))
    learn_alone(config(), uri, out=tmp_path / "run", mode="none")
    assert same(whole[0], tmp_path / "run")


def test_trackers_are_told(played: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    learn_alone(config("track.to=['tensorboard']", steps=2), played, out=tmp_path / "run", mode="none")
    seen = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    np.testing.assert_allclose([e.value for e in seen.Scalars("learn/loss")], [r["learn/loss"] for r in rows])


# ------------------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_learnt_from_is_one_sentence_with_the_fix(played: Path, tmp_path: Path) -> None:
    out, empty = tmp_path / "run", tmp_path / "empty"
    ReplayStore.open(empty)
    silent = ReplayStore.open(tmp_path / "silent")
    silent.append(later(played, 0, hint=None))
    foreign = example()
    with pytest.raises(StoreNotFound, match="nowhere is not a replay store .* give --store"):
        learn_alone(config(), tmp_path / "nowhere", out=out, mode="none")
    with pytest.raises(LearnError, match="empty holds no branch; collect episodes into it"):
        learn_alone(config(), empty, out=out, mode="none")
    with pytest.raises(TokenizerMismatch, match=r"none of 3 branches .* of another tokenizer .*; set model to the one"):
        learn_alone(config(), foreign.root, out=out, mode="none")
    assert not out.exists(), "found before the folder is made"
    with pytest.raises(LearnError, match=r"none of the branches drawn in 16 batches of 4 has a hint, 12 are eligible; "
                                         "add hints with `agentsdpo replay label"):
        learn_alone(config(), tmp_path / "silent", out=out, mode="none")


def test_a_foreign_template_is_refused(played: Path, tmp_path: Path) -> None:
    ReplayStore.open(tmp_path / "store").append(later(played, 0, chat_template_sha256="0" * 64))
    with pytest.raises(TokenizerMismatch, match=r"12 of another chat template \(000000000000; that of 'seed' is not"):
        learn_alone(config(), tmp_path / "store", out=tmp_path / "run", mode="none")


def test_a_run_does_not_go_on_with_another_store(whole: tuple[Path, Json], played: Path, tmp_path: Path) -> None:
    ReplayStore.open(tmp_path / "other").append(later(played, 0))
    with pytest.raises(RunError, match="learnt from store .* go on with the store"):
        learn_alone(config(steps=7), tmp_path / "other", out=whole[0], resume=True, mode="none")


def test_a_run_goes_on_by_the_verb_that_began_it(played: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(played.parent, out)
    with pytest.raises(ConfigError, match="run was begun by `agentsdpo train`, resuming asks for `learn`; go on by"):
        learn_alone(config(steps=3), out / "replay", out=out, resume=True, mode="none")


def test_a_missing_tracker_is_found_before_anything_is_made(
        played: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        learn_alone(config("track.to=['wandb']"), played, out=tmp_path / "run", mode="none")
    assert not (tmp_path / "run").exists()


def test_a_verb_without_store_or_with_a_bad_one_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("name = 'x'\n")
    done = subprocess.run([sys.executable, "-m", "agentsdpo.cli", "learn", str(tmp_path / "c.toml"), "--store",
                           str(tmp_path / "none"), "--out", str(tmp_path / "run")], capture_output=True, text=True,
                          timeout=300, check=False)
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
