"""The learner beside others: it waits, it joins what has a hint, it is never sent back in its version numbers."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentsdpo.config import RunConfig, from_mapping
from agentsdpo.errors import ConfigError, LearnError, RunOver
from agentsdpo.hint.config import HintConfig
from agentsdpo.hint.hinter import Hinter
from agentsdpo.loop import train
from agentsdpo.programs import following
from agentsdpo.programs.evaluating import evaluate_due, left
from agentsdpo.programs.flow import learners
from agentsdpo.programs.following import Following, assemble_following, learn_following
from agentsdpo.programs.hinting import HintWriter
from agentsdpo.programs.owed import Owed, append_answer, read_answers, read_owed, write_owed
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.replay.store import ReplayStore
from agentsdpo.runfolder import RunFolder
from agentsdpo.show.console import SilentView
from agentsdpo.track import MetricsWriter, read_metrics
from agentsdpo.types import Episode, Hint, Json

SETS = ["collect.window=512", "collect.concurrency=16", "collect.max_tokens=48", "episodes_per_step=4", "learn.batch=4",
        "eval.final_episodes=2", "eval.episodes=2", "eval.splits=['val']", "eval.final_splits=['val']", "eval.every=2",
        "tripwire.on=false", "checkpoint_every=2", "learn.max_staleness=20", "learn.gate=off", "learn.veto=none"]
HINT = Hint(text="For tax work: unit k_usd, file in /reports.", source="criteria", author="grader")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(following, "POLL_S", 0.01)


def config(*more: str, steps: int = 3) -> RunConfig:
    return from_mapping({"name": "t", "steps": steps}, [*SETS, *more])


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> list[Episode]:
    """Twelve episodes of the shipped model, without their hints."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("played") / "run"
    train(config("episodes_per_step=12", "eval.splits=[]", "eval.final_splits=[]", steps=1), out=out, mode="none")
    return [e.model_copy(update={"hint": None}) for e in ReplayStore.open(out / "replay", create=False).episodes()]


@pytest.fixture
def run(tmp_path: Path) -> Following:
    made = assemble_following(config(), tmp_path / "store", tmp_path / "run")
    made.restore_or_begin()
    return made


def hint(store: ReplayStore, episodes: list[Episode]) -> None:
    store.add_hints({e.episode_id: HINT for e in episodes})


def copies(episodes: list[Episode], round_: int, version: int = 0) -> list[Episode]:
    """The same episodes with a hint, under new ids, as if a version had sampled them."""
    found = []
    for episode in episodes:
        branches = [branch.model_copy(update={"calls": tuple(call.model_copy(update={"versions": tuple(
            span.model_copy(update={"version": version}) for span in call.versions)})
            for call in branch.calls)}) for branch in episode.branches]
        found.append(episode.model_copy(update={"episode_id": f"{episode.episode_id}-{round_}", "hint": HINT,
                                                "branches": tuple(branches)}))
    return found


def answer(folder: RunFolder, score: Any) -> None:
    have = {(row["step"], row["version"], row["split"], row["decoding"]) for row in read_answers(folder)}
    for one in read_owed(folder):
        for key, (split, decoding, _) in zip(one.keys, one.wanted, strict=True):
            if key not in have:
                append_answer(folder, {"step": one.step, "version": one.version, "split": split, "decoding": decoding,
                                       "n": 64, "pass": 0.0, "score": score(one.step)})


# ------------------------------------------------------------------------------------------------------------- waiting


def test_episodes_join_with_their_hints_and_the_pin_says_so(run: Following, played: list[Episode]) -> None:
    run.look()
    assert not run.ready()
    run.store.append(played[:6])
    run.look()
    assert not run.ready(), "nothing has a hint"
    assert run.totals["episodes"] == 0
    hint(run.store, played[:5])
    run.look()
    assert run.ready()
    assert run.totals["episodes"] == 5
    assert run.totals["env_steps"] > 5
    (said,) = learners(run.store)
    assert (said.episodes, said.undecided, said.version) == (6, 0, 0)
    assert said.limiter is not None
    assert (said.limiter.inserts, said.limiter.samples) == (5, 0)
    run.store.append([played[6].model_copy(update={"hint": HINT})])
    run.look()
    assert run.totals["episodes"] == 6, "a hint of the append counts as well"


GRADES = ("learn.mix=add", "learn.advantage=reinforce")


def test_where_grades_teach_episodes_without_a_hint_join_once_none_is_to_come(tmp_path: Path,
                                                                             played: list[Episode]) -> None:
    run = assemble_following(config(*GRADES), tmp_path / "store", tmp_path / "run")
    run.restore_or_begin()
    run.store.append([*played[:4], played[4].model_copy(update={"grade": None})])
    run.look()
    assert run.totals["episodes"] == 0, "a hint may come"
    silent = HintWriter(run.store, Hinter({}, HintConfig()))
    silent.look()
    run.look()
    assert run.totals["episodes"] == 4, "nor hint nor grade is nothing to learn from"
    run.store.append(played[5:7])
    run.look()
    assert run.totals["episodes"] == 4
    silent.look()
    run.look()
    assert run.totals["episodes"] == 6
    with MetricsWriter(tmp_path / "m.jsonl") as metrics:
        assert following.step(run, metrics, SilentView())["learn/rows"] > 0


def test_where_nobody_writes_hints_nobody_waits_for_them(tmp_path: Path, played: list[Episode]) -> None:
    sets = ("hint.sources=[]", "learn.mix=grade", "learn.form=sampled", "learn.advantage=reinforce")
    run = assemble_following(config(*sets), tmp_path / "store", tmp_path / "run")
    run.restore_or_begin()
    run.store.append(played[:5])
    run.look()
    assert run.ready()
    assert run.totals["episodes"] == 5


def test_an_advantage_of_groups_needs_groups(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="with group 1: alone in its group"):
        learn_following(config("learn.mix=add"), tmp_path / "store", out=tmp_path / "run", mode="none")
    assert not (tmp_path / "run").exists()


def test_it_uses_episodes_no_more_than_it_may(run: Following, played: list[Episode], tmp_path: Path) -> None:
    run.store.append(copies(played[:5], 0))
    run.look()
    with MetricsWriter(tmp_path / "m.jsonl") as metrics:
        row = following.step(run, metrics, SilentView())
        assert row["learn/rows"] == 4
        assert row["collect/episodes"] == 5
        run.look()
        assert not run.ready(), "4 of 5 are used once, a batch of 4 would use one twice"
        run.store.append(copies(played[5:8], 0))
        run.look()
        assert run.ready()


def test_a_learner_that_starves_holds_nobody_back(tmp_path: Path, played: list[Episode]) -> None:
    run = assemble_following(config("replay.max_uses=1", "episodes_per_step=2", "learn.batch=4"), tmp_path / "store",
                             tmp_path / "run")
    run.restore_or_begin()
    run.store.append(copies(played[:4], 0))
    run.look()
    with MetricsWriter(tmp_path / "m.jsonl") as metrics:
        following.step(run, metrics, SilentView())
    run.look()
    assert run.limiter.may_sample(4), "two uses of each are allowed"
    assert not run.ready(), "but each is used up after one"
    assert [one.limiter for one in learners(run.store)] == [None]


# --------------------------------------------------------------------------------------------------------- coming back


def test_killed_it_goes_on_under_new_version_numbers(tmp_path: Path, played: list[Episode]) -> None:
    run = assemble_following(config("eval.splits=[]", "eval.final_splits=[]", steps=4), tmp_path / "store",
                             tmp_path / "run")
    run.restore_or_begin()
    run.store.append(copies(played, 0))
    with MetricsWriter(tmp_path / "run" / "metrics.jsonl") as metrics:
        for _ in range(3):
            run.look()
            following.step(run, metrics, SilentView())
    ids = {v: run.registry.manifest(v).weights_id for v in run.registry.versions()}
    assert max(ids) == 3
    run.folder.release()  # a kill: the checkpoint is that of step 2
    again = assemble_following(run.config, tmp_path / "store", tmp_path / "run", resume=True)
    again.restore_or_begin()
    assert (again.step, again.version, again.totals["episodes"]) == (2, 4, 12)
    about = again.registry.manifest(4)
    assert (about.parent, about.weights_id) == (2, ids[2]), "the weights of the checkpoint, published anew"
    assert again.registry.manifest(3).weights_id == ids[3], "what collectors may have played with stays what it was"
    assert again.limiter.samples == 8
    again.folder.release()
    run.store.append(copies(played, 1))
    summary = learn_following(run.config, tmp_path / "store", out=tmp_path / "run", resume=True, mode="none")
    assert (summary["steps"], summary["episodes"]) == (4, 24)
    steps = [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4]
    assert not learners(ReplayStore.open(tmp_path / "store")), "a learner that is done holds nobody back"


def test_another_verb_does_not_go_on_with_it_and_deletes_nothing(run: Following, played: list[Episode],
                                                                 tmp_path: Path) -> None:
    run.store.append(copies(played, 0))
    with MetricsWriter(tmp_path / "run" / "metrics.jsonl") as metrics:
        run.look()
        following.step(run, metrics, SilentView())
    run.folder.release()  # a kill: the checkpoint is that of step 0
    with pytest.raises(ConfigError, match="begun by `agentsdpo train --async` or .* asks for `train`"):
        train(run.config, out=tmp_path / "run", resume=True, mode="none")
    assert run.registry.versions() == [0, 1], "episodes may be there that version 1 has played"


@pytest.mark.slow
def test_killed_as_a_process_it_loses_no_step_for_good(tmp_path: Path, played: list[Episode]) -> None:
    store, out = ReplayStore.open(tmp_path / "store"), tmp_path / "run"
    run = config("eval.splits=[]", "eval.final_splits=[]", "replay.max_uses=0", "flow.samples_per_insert=4", steps=7)
    (tmp_path / "run.toml").write_text(run.to_toml())
    command = [sys.executable, "-m", "agentsdpo.cli", "learn", str(tmp_path / "run.toml"), "--store",
               str(tmp_path / "store"), "--out", str(out), "--follow"]
    store.append(copies(played, 0))
    seen: dict[int, str] = {}
    for goal in (2, 4, 5):
        process = subprocess.Popen([*command, *(["--resume"] if (out / "config.toml").exists() else [])],
                                   stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 200
        while len(read_metrics(out / "metrics.jsonl")) < goal and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        registry = PolicyRegistry(out / "policies")
        now = {v: registry.manifest(v).weights_id for v in registry.versions()}
        assert all(seen.get(v, sha) == sha for v, sha in now.items()), "no number ever stands for other weights"
        seen |= now
    done = subprocess.run([*command, "--resume", "--json"], capture_output=True, text=True, timeout=300, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 7
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl")] == list(range(1, 8))
    registry = PolicyRegistry(out / "policies")
    assert registry.manifest(registry.latest() or 0).learner_step == 7


# --------------------------------------------------------------------------------------------------------- evaluations


def test_what_is_due_is_asked_for_once_and_told_when_it_comes(tmp_path: Path, played: list[Episode]) -> None:
    ReplayStore.open(tmp_path / "store").append(copies(played, 0))
    view, out = SilentView(), tmp_path / "run"
    run = assemble_following(config(), tmp_path / "store", out)
    with MetricsWriter(tmp_path / "other.jsonl") as metrics:
        run.restore_or_begin()
        run.ask(metrics)
        run.ask(metrics)
        assert [(one.step, one.version, len(one.wanted)) for one in run.owed] == [(0, run.version, 2)]
        run.look()
        following.step(run, metrics, view)
        run.hear(metrics, view)
        assert run.owed, "nobody has answered, and nobody waits for it"
        answer(run.folder, lambda step: 0.5)
        run.hear(metrics, view)
        assert not run.owed
        rows = [row for row in read_metrics(tmp_path / "other.jsonl") if row["kind"] == "eval"]
        told = [(row["step"], row["decoding"], row["episodes"]) for row in rows]
        assert told == [(0, "sampled", 0), (0, "greedy", 0)]
        assert read_owed(RunFolder(out)) == []


def test_versions_that_are_waited_for_stay(tmp_path: Path, played: list[Episode]) -> None:
    run = assemble_following(config("publish.keep=1", "checkpoint_keep=1", "checkpoint_every=1", steps=9),
                             tmp_path / "store", tmp_path / "run")
    run.restore_or_begin()
    run.store.append(copies(played, 0))
    with MetricsWriter(tmp_path / "m.jsonl") as metrics:
        for _ in range(3):
            run.ask(metrics)
            run.look()
            following.step(run, metrics, SilentView())
        assert {one.version for one in run.owed} == {0, 2}
        assert {0, 2} <= set(run.registry.versions())
        answer(run.folder, lambda step: 0.5)
        run.hear(metrics, SilentView())
        run.checkpoint()
    assert 0 not in run.registry.versions()


def test_the_tripwire_goes_back_when_the_probes_say_so(tmp_path: Path, played: list[Episode]) -> None:
    watched = config("tripwire.on=true", "tripwire.every=1", "eval.every=100", "publish.keep=9", steps=60)
    run = assemble_following(watched, tmp_path / "store", tmp_path / "run")
    run.restore_or_begin()
    store = run.store
    with MetricsWriter(tmp_path / "m.jsonl") as metrics:
        for count in range(4):
            store.append(copies(played[:4], count, run.version))
            run.ask(metrics)
            run.look()
            following.step(run, metrics, SilentView())
            answer(run.folder, lambda step: 0.8 if step < 2 else 0.1)
            run.hear(metrics, SilentView())
    rows = [row for row in read_metrics(tmp_path / "m.jsonl") if row["kind"] == "tripwire"]
    assert [row["level"] for row in rows] == ["soft", "hard"]
    assert not run.candidates.versions()[1:], "weights that were held back go once they are evaluated"
    assert rows[1]["good_version"] in (0, 1)
    about = run.registry.manifest(run.version)
    assert about.parent == rows[1]["good_version"]
    assert about.weights_id == run.registry.manifest(rows[1]["good_version"]).weights_id
    assert all(one.version == run.version or one.version <= rows[1]["good_version"] for one in run.owed)


WATCHED = ("tripwire.on=true", "tripwire.every=1", "eval.every=100", "publish.keep=9", "checkpoint_every=50")


def again_after_a_kill(run: Following) -> Following:
    run.folder.release()
    made = assemble_following(run.config, run.store.storage.uri, run.folder.path, resume=True)
    made.restore_or_begin()
    return made


def a_step_behind(run: Following, episodes: list[Episode], metrics: MetricsWriter) -> None:
    """Ask for a probe, and take a step before anybody answers."""
    run.store.append(copies(episodes[:4], run.step, run.version))
    run.ask(metrics)
    run.look()
    following.step(run, metrics, SilentView())


def test_a_probe_is_judged_once_wherever_the_learner_is_killed(tmp_path: Path, played: list[Episode],
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    run = assemble_following(config(*WATCHED, steps=60), tmp_path / "store", tmp_path / "run")
    run.restore_or_begin()
    for score in (0.8, 0.1):
        with MetricsWriter(run.folder.metrics, resume_step=run.step) as metrics:
            a_step_behind(run, played, metrics)
            answer(run.folder, lambda step, score=score: score)
            with monkeypatch.context() as patch:
                patch.setattr(following, "write_owed", lambda *given: 1 / 0)
                with pytest.raises(ZeroDivisionError):  # killed before the file says that it was heard
                    run.hear(metrics, SilentView())
        run = again_after_a_kill(run)
        with MetricsWriter(run.folder.metrics, resume_step=run.step) as metrics:
            run.hear(metrics, SilentView())
            assert not run.owed
    state = run.tripwire.state
    assert (state.low, state.rollbacks) == (1, 0), "one low probe, which was not taken for two"
    assert state.best is not None
    assert run.tripwire.withheld(run.step)
    told = [row["score"] for row in read_metrics(run.folder.metrics) if (row["kind"], row["step"]) == ("eval", 0)]
    assert told == [0.8] * 2, "sampled and greedy, each told once"


@pytest.mark.parametrize("more", [(), ("learn.adapter.rank=4",)])
def test_a_gated_teacher_copies_the_weights_that_were_probed(tmp_path: Path, played: list[Episode],
                                                             caplog: pytest.LogCaptureFixture,
                                                             more: tuple[str, ...]) -> None:
    gated = config(*WATCHED, "learn.teacher=gated", "learn.refresh_every=1", *more, steps=60)
    run = assemble_following(gated, tmp_path / "store", tmp_path / "run")
    run.restore_or_begin()
    first = teacher_of(run)
    with MetricsWriter(tmp_path / "m.jsonl") as metrics:
        for score in (0.3, 0.8):
            a_step_behind(run, played, metrics)
            present = {name: tensor.clone() for name, tensor in run.together.policy().items()}
            answer(run.folder, lambda step, score=score: score)
            run.hear(metrics, SilentView())
            assert all(torch.equal(tensor, present[name]) for name, tensor in run.together.policy().items())
        copied = teacher_of(run)
        run.tripwire.state.until = 100
        a_step_behind(run, played, metrics)
        answer(run.folder, lambda step: 0.9)
        run.hear(metrics, SilentView())
        assert all(torch.equal(tensor, copied[name]) for name, tensor in teacher_of(run).items()), "an alarm is on"
        run.together.load(run.folder.checkpoint / "step-00000001")  # the state of which 0.8 was said
        run.together.probed(0.95)
        assert [torch.equal(tensor, copied[name]) for name, tensor in teacher_of(run).items()] == [True] * len(first)
        assert any(not torch.equal(tensor, first[name]) for name, tensor in copied.items())
        path = run.folder.checkpoint / "step-00000001" / "weights.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        run.together.probed(1.0, path.parent)
    assert "is not what was written" in caplog.text
    assert "the teacher stays as it is" in caplog.text


def teacher_of(run: Following) -> dict[str, torch.Tensor]:
    """A copy of its weights, without the counts."""
    return {name: tensor.clone() for name, tensor in run.learner.teacher.state_dict().items()
            if name not in ("steps_and_copies", "score_to_beat")}


def test_a_run_whose_roll_backs_are_spent_is_not_gone_on_with(tmp_path: Path, played: list[Episode]) -> None:
    run = assemble_following(config(*WATCHED, steps=60), tmp_path / "store", tmp_path / "run")
    run.restore_or_begin()
    run.tripwire.state.rollbacks = 3
    with MetricsWriter(tmp_path / "m.jsonl") as metrics:
        for _ in range(2):
            a_step_behind(run, played, metrics)
            answer(run.folder, lambda step: 0.8 if step < 1 else 0.1)
            run.hear(metrics, SilentView())
        a_step_behind(run, played, metrics)
        answer(run.folder, lambda step: 0.1)
        with pytest.raises(LearnError, match="after 3 roll-backs"):
            run.hear(metrics, SilentView())
    newest = run.version
    with pytest.raises(RunOver, match=f"policy version {newest} is its last good one") as refused:
        again_after_a_kill(run)
    assert refused.value.exit_code == 2
    assert run.registry.latest() == newest


def test_a_probe_of_which_nothing_could_be_scored_holds_back_all_the_same(tmp_path: Path,
                                                                          played: list[Episode]) -> None:
    run = assemble_following(config(*WATCHED, steps=60), tmp_path / "store", tmp_path / "run")
    run.restore_or_begin()
    plain = {"learn/grad_norm": 1.0, "learn/ess_frac": 0.9, "learn/hijack/max": 0.01, "learn/entropy/student": 1.0,
             "learn/gap/abs": 0.3}
    run.tripwire.state.start = {"entropy": 1.0, "gap": 0.3}
    run.tripwire.state.rows = [plain] * 5 + [{**plain, "learn/grad_norm": 9.0}] * 5
    with MetricsWriter(tmp_path / "m.jsonl") as metrics:
        a_step_behind(run, played, metrics)
        (one,) = [one for one in run.owed if one.step == 0]
        append_answer(run.folder, {"step": 0, "version": one.version, "split": "val", "decoding": "sampled", "n": 0})
        run.hear(metrics, SilentView())
    (line,) = [row for row in read_metrics(tmp_path / "m.jsonl") if row["kind"] == "tripwire"]
    assert (line["level"], list(line["alarms"])) == ("soft", ["update/grad_norm"])
    assert run.tripwire.withheld(run.step + 19), "twenty steps from when it was heard of"


def test_answers_that_were_cut_off_are_played_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert read_owed(folder) == read_answers(folder) == []
    owed = Owed(3, 7, 1.5, (("val", "sampled", 2), ("val", "greedy", 2)), {"episodes": 1, "env_steps": 2, "tokens": 3})
    write_owed(folder, [owed])
    assert read_owed(folder) == [owed]
    (tmp_path / "evals.jsonl").write_text('{"step": 3, "version"')
    row: Json = {"step": 3, "version": 7, "split": "val", "decoding": "sampled", "n": 2}
    append_answer(folder, row)
    assert read_answers(folder) == [row]


def test_the_evaluator_plays_what_is_due(tmp_path: Path, run: Following) -> None:
    folder, told = run.folder, list[str]()
    with MetricsWriter(folder.metrics) as metrics:
        run.ask(metrics)
        assert evaluate_due(folder.path, say=told.append)["played"] == 2
        assert len(told) == 2
        assert evaluate_due(folder.path)["played"] == 0
        run.hear(metrics, SilentView())
    rows = [row for row in read_metrics(folder.metrics) if row["kind"] == "eval"]
    assert [(row["version"], row["n"]) for row in rows] == [(0, 2), (0, 2)]
    write_owed(folder, [Owed(4, 99, 0.0, (("val", "sampled", 2),), dict(run.totals))])
    assert [(owed.version, *one) for owed, *one in left(folder)] == [(99, "val", "sampled", 2)]
    shutil.rmtree(folder.path / "policies")
    assert np.isfinite(rows[0]["score"])
