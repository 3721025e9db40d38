"""A run that is driven into collapse goes back by itself, under a new number, and can be resumed around it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from agentsdpo import evaluate, loop
from agentsdpo.assemble import Run, run_id
from agentsdpo.collect.collector import Collector
from agentsdpo.config import RunConfig, from_mapping
from agentsdpo.errors import LearnError, NotFinite, RunOver
from agentsdpo.learn.learner import Learner, StepReport
from agentsdpo.loop import train
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.replay.store import ReplayStore
from agentsdpo.track import read_metrics

SETS = ["collect.window=512", "collect.concurrency=16", "collect.max_tokens=48", "episodes_per_step=6", "learn.batch=6",
        "eval.final_episodes=16", "eval.episodes=16", "eval.splits=['val']", "eval.final_splits=['val']",
        "eval.every=100", "tripwire.every=2", "checkpoint_every=2", "learn.max_staleness=6", "publish.keep=20",
        "learn.gate=off", "learn.veto=none"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def small(steps: int, *more: str) -> RunConfig:
    return from_mapping({"name": "t", "steps": steps, "staleness": 2}, [*SETS, *more])


def lines(out: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_metrics(out / "metrics.jsonl") if row["kind"] == kind]


def final_weights(out: Path) -> dict[str, np.ndarray]:
    newest = sorted(out.glob("checkpoint/step-*"))[-1]
    return {k: v.numpy() for k, v in load_file(newest / "weights.safetensors").items()}


def test_a_probe_plays_the_very_weights_that_are_judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Between two publishes these are newer than the newest version; a gated teacher copies them on what it hears."""
    seen, real = list[tuple[int, int, bool]](), evaluate.evaluator

    def watched(run: Run, *, greedy: bool) -> Collector:
        played, own = dict(run.engine._model.named_parameters()), run.learner.model.named_parameters()
        seen.append((run.step, run.version, all(torch.equal(played[name], p) for name, p in own)))
        return real(run, greedy=greedy)

    monkeypatch.setattr(evaluate, "evaluator", watched)
    train(small(4, "publish.every=3", "eval.episodes=4", "eval.final_episodes=4"), out=tmp_path / "run", mode="none")
    assert dict.fromkeys(seen) == dict.fromkeys([(0, 0, True), (2, 0, True), (4, 2, True)])
    compared = ["learn/mismatch/mean" in row for row in lines(tmp_path / "run", "step")]
    assert compared == [True, False, False, False], "engine and learner hold the same weights at the first step alone"


def noise_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the update of one step destroy the weights, as a bad objective would, only faster."""
    real = Learner.step

    def broken(self: Learner, rows: list[Any], version: int) -> StepReport:
        report = real(self, rows, version)
        if report.step == step:
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for p in self.parameters:
                    p.add_(torch.randn(p.shape, generator=generator), alpha=0.3)
        return report

    monkeypatch.setattr(Learner, "step", broken)


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("collapsed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        noise_after(patch, 3)
        train(small(8), out=out, mode="none")
    return out


def test_a_collapse_is_rolled_back_with_its_evidence(collapsed: Path) -> None:
    soft, hard = lines(collapsed, "tripwire")
    assert (soft["step"], soft["level"], hard["step"], hard["level"]) == (4, "soft", 6, "hard")
    assert soft["alarms"]["probe/best"]["value"] < soft["alarms"]["probe/best"]["limit"]
    assert hard["alarms"]["probe/best"]["value"] < 0.3
    assert (hard["good_step"], hard["good_version"], hard["version"]) == (0, 0, 5)
    registry = PolicyRegistry(collapsed / "policies")
    first, back = registry.manifest(0), registry.manifest(5)
    assert (back.parent, back.weights_id, back.learner_step) == (0, first.weights_id, 6)
    assert registry.latest() == 7
    steps = {row["step"]: row for row in lines(collapsed, "step")}
    assert [steps[at]["version"] for at in range(1, 9)] == [1, 2, 3, 4, 4, 4, 6, 7], "5 and 6 were not published"
    lr = [steps[at]["learn/lr"] for at in range(1, 9)]
    assert lr == [lr[0]] * 4 + [lr[0] / 2] * 4, "restrained, then halved for good"
    assert lines(collapsed, "eval")[-1]["score"] > 0.4
    assert (collapsed / "FINISHED").exists()


def test_what_the_given_up_versions_sampled_is_never_drawn_again(collapsed: Path) -> None:
    store = ReplayStore.open(collapsed / "replay", create=False)
    fold = store.fold()
    hidden = {fold.rows[key].version_max for key in fold.evicted}
    live = {row.version_max for row in store.snapshot().rows.values()}
    assert hidden <= {1, 2, 3, 4}
    assert hidden
    assert not live & {1, 2, 3, 4}
    assert len(fold.evicted) == lines(collapsed, "tripwire")[1]["tombstoned"]
    assert {gone.reason for gone in fold.evicted.values()} == {"rolled back: policy versions 1 to 4 were given up"}
    later = [row for row in lines(collapsed, "step") if row["step"] > 6]
    assert [row["replay/staleness/max"] for row in later] == [0.0, 1.0], "the distance grows anew from the new version"


@pytest.mark.slow
@pytest.mark.parametrize("step", [5, 6])
def test_a_run_stopped_around_a_roll_back_goes_on_as_if_it_had_not_been(
        step: int, collapsed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise_after(monkeypatch, 3)
    real = loop.collect

    def stopped(run: Run) -> Any:
        if run.step == step:
            raise KeyboardInterrupt
        return real(run)

    monkeypatch.setattr(loop, "collect", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(small(8), out=tmp_path / "run", mode="none")
    monkeypatch.setattr(loop, "collect", real)
    train(small(8), out=tmp_path / "run", resume=True, mode="none")
    ours, theirs = final_weights(tmp_path / "run"), final_weights(collapsed)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    for one, other in zip(lines(tmp_path / "run", "tripwire"), lines(collapsed, "tripwire"), strict=True):
        assert one | {"wall_s": 0} == other | {"wall_s": 0}


def test_an_objective_that_cannot_learn_stops_after_three_roll_backs(tmp_path: Path) -> None:
    """A real collapse: at three hundred times its learning rate, an uncorrected objective is lost at once."""
    config = small(20, "preset=naive", "learn.lr=0.03", "learn.max_staleness=6", "tripwire.every=1")
    with pytest.raises(LearnError, match="hard alarm after 3 roll-backs .* is the last good one") as caught:
        train(config, out=tmp_path / "run", mode="none")
    assert caught.value.exit_code == 1
    found = lines(tmp_path / "run", "tripwire")
    assert [row["level"] for row in found] == ["soft", "hard"] * 4
    assert {row["good_version"] for row in found[1::2]} > {0}
    registry = PolicyRegistry(tmp_path / "run" / "policies")
    newest = registry.latest()
    assert newest is not None
    assert registry.manifest(newest).weights_id == registry.manifest(0).weights_id
    with pytest.raises(RunOver, match=f"policy version {newest} is its last good one; start a new run") as refused:
        train(config, out=tmp_path / "run", resume=True, mode="none")
    assert refused.value.exit_code == 2, "no supervisor starts it again"
    assert PolicyRegistry(tmp_path / "run" / "policies").latest() == newest


def test_a_step_that_is_not_finite_goes_back_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, failed = Learner.step, []

    def broken(self: Learner, rows: list[Any], version: int) -> StepReport:
        if self.step_count == 1 and not failed:
            failed.append(self.step_count)
            raise NotFinite("the loss of step 2 is nan, nothing was updated")
        return real(self, rows, version)

    monkeypatch.setattr(Learner, "step", broken)
    train(small(3), out=tmp_path / "run", mode="none")
    assert [row["step"] for row in lines(tmp_path / "run", "step")] == [1, 3], "step 2 was lost"
    (line,) = lines(tmp_path / "run", "tripwire")
    assert list(line["alarms"]) == ["update/not_finite"]
    failed.clear()
    with pytest.raises(NotFinite):
        train(small(3, "tripwire.on=false"), out=tmp_path / "off", mode="none")


def test_the_guard_changes_no_name_of_a_run() -> None:
    assert run_id(small(5)) != run_id(small(5, "tripwire.every=3"))
    default = from_mapping({"name": "x"})
    assert "tripwire" in default.to_toml()
    assert run_id(default) == run_id(default.model_copy(update={"steps": 9}))


def test_settings_of_later_releases_change_no_name_of_a_run() -> None:
    """Or the episodes of a run that is resumed would have other names than before."""
    assert run_id(RunConfig()) == "run-b99ab4de8d25ce05", "a new setting counts only where it is used"
    assert run_id(RunConfig()) != run_id(from_mapping({}, ["collect.device='cpu'"]))
