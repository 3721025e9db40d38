"""The whole loop on the shipped model: it runs, it is stale on purpose, it survives being stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from agentsdpo.assemble import Run, assemble, oldest_first
from agentsdpo.config import RunConfig, from_mapping
from agentsdpo.demo import conclude, run_demo
from agentsdpo.errors import RunError
from agentsdpo.learn.rows import admit
from agentsdpo.loop import collect, train
from agentsdpo.replay.example import episode
from agentsdpo.replay.store import ReplayStore
from agentsdpo.replay.upkeep.maintain import fold
from agentsdpo.runfolder import read_run
from agentsdpo.track import read_metrics

SETS = ["collect.window=512", "collect.concurrency=16", "collect.max_tokens=64", "episodes_per_step=6", "learn.batch=6",
        "eval.final_episodes=4", "eval.episodes=4", "eval.every=3", "eval.splits=['val']",
        "eval.final_splits=['val', 'test_names']", "checkpoint_every=2", "learn.max_staleness=6"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def small(steps: int = 4, *more: str) -> RunConfig:
    return from_mapping({"name": "t", "steps": steps, "staleness": 2}, [*SETS, *more])


def weights(folder: Path) -> dict[str, np.ndarray]:
    newest = sorted(folder.glob("checkpoint/step-*"))[-1]
    return {k: v.numpy() for k, v in load_file(newest / "weights.safetensors").items()}


def same(a: Path, b: Path) -> bool:
    one, two = weights(a), weights(b)
    return one.keys() == two.keys() and all(np.array_equal(one[k], two[k]) for k in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "run"
    train(small(), out=out, mode="none")
    return out


def test_a_run_leaves_everything_a_reader_needs(whole: Path) -> None:
    rows = read_metrics(whole / "metrics.jsonl")
    steps = [r for r in rows if r["kind"] == "step"]
    assert [r["step"] for r in steps] == [1, 2, 3, 4]
    assert [r["version"] for r in steps] == [1, 2, 3, 4]
    assert steps[-1]["episodes"] == 24
    assert steps[-1]["env_steps"] > 24
    assert {(r["step"], r["split"], r["decoding"]) for r in rows if r["kind"] == "eval"} == {
        (s, split, d) for s in (0, 4) for split in ("val", "test_names") for d in ("sampled", "greedy")} | {
        (3, "val", "sampled")}
    assert "commit" in (whole / "config.toml").read_text().splitlines()[0]
    store = ReplayStore.open(whole / "replay", create=False)
    assert len(store) == 24
    assert (whole / "FINISHED").exists()


def test_staleness_is_a_real_quantity(whole: Path) -> None:
    table = ReplayStore.open(whole / "replay", create=False).snapshot().scalars()
    by_step = np.array(table["policy_version_min"].to_pylist())
    assert sorted(set(by_step)) == [0, 1]
    assert (by_step == 0).sum() == 18
    steps = [r for r in read_metrics(whole / "metrics.jsonl") if r["kind"] == "step"]
    assert steps[0]["replay/staleness/max"] == 0
    assert steps[3]["replay/staleness/max"] >= 2


def test_sampled_log_probs_are_those_of_one_learner_forward(tmp_path: Path) -> None:
    config = small()
    run = assemble(config, tmp_path / "run")
    run.restore_or_begin()
    collect(run)
    run.sampler.refresh()
    drawn = run.sampler.sample(6, 0)
    found = admit([row for one in drawn for row in run.rows(one)], 0, config.learn, window=4096, vocab_size=1024)
    assert len(found.rows) == 6
    for row in found.rows:
        ids = torch.from_numpy(row.ids.astype(np.int64))[None]
        with torch.no_grad():
            logp = run.learner.model(input_ids=ids).logits[0].log_softmax(-1)
        own = logp[row.position - 1, ids[0, row.position]].numpy()
        np.testing.assert_allclose(own, row.behaviour_logp, atol=1e-4)
    report = run.learner.step([row for one in drawn for row in run.rows(one)], 0)
    assert report.metrics["learn/ratio/mean"] == pytest.approx(1.0, abs=1e-4)
    assert report.metrics["learn/mismatch/max"] < 1e-4


def test_two_runs_of_one_configuration_end_with_the_same_weights(whole: Path, tmp_path: Path) -> None:
    train(small(), out=tmp_path / "again", mode="none")
    assert same(whole, tmp_path / "again")


_CHILD = """
import sys, torch
torch.set_num_threads(1)
from agentsdpo.loop import train
from tests.test_loop import small
train(small(4, *sys.argv[3:]), out=sys.argv[1], resume=sys.argv[2] == "resume", mode="none")
"""


def command(out: Path, how: str, *more: str) -> tuple[list[str], dict[str, str]]:
    return ([sys.executable, "-c", _CHILD, str(out), how, *more],
            {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])})


def start(out: Path, *more: str) -> subprocess.Popen[bytes]:
    line, env = command(out, "start", *more)
    return subprocess.Popen(line, stderr=subprocess.DEVNULL, env=env)


def resume(out: Path, *more: str) -> None:
    line, env = command(out, "resume", *more)
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False, env=env)
    assert done.returncode == 0, done.stderr


def wait_for(out: Path, process: subprocess.Popen[bytes], kind: str, step: int) -> None:
    until = time.monotonic() + 300
    while time.monotonic() < until and process.poll() is None:
        if any(r["kind"] == kind and r["step"] >= step for r in read_metrics(out / "metrics.jsonl")):
            return
        time.sleep(0.02)
    raise AssertionError(f"{kind} row of step {step} was not reached, exit code {process.poll()}")


def told(out: Path) -> list[dict[str, object]]:
    """What the metrics say, without clocks and without what was counted for the first life alone."""
    kept = ("kind", "step", "split", "decoding", "n", "pass", "score", "version", "episodes", "learn/loss",
            "collect/score/mean", "replay/staleness/mean")
    return [{k: r[k] for k in kept if k in r} for r in read_metrics(out / "metrics.jsonl")]


def episodes(out: Path) -> set[str]:
    return {key.episode_id for key in ReplayStore.open(out / "replay", create=False).snapshot().keys()}  # noqa: SIM118


@pytest.mark.parametrize(("kind", "step"), [("eval", 0), ("step", 1), ("step", 3), ("eval", 3), ("eval", 4)])
def test_a_run_killed_in_the_middle_ends_as_one_that_was_not(
        whole: Path, tmp_path: Path, kind: str, step: int) -> None:
    out = tmp_path / "run"
    first = start(out)
    wait_for(out, first, kind, step)
    first.kill()
    first.wait()
    before = episodes(out)
    resume(out)
    assert before <= episodes(out) == episodes(whole)
    assert same(whole, out)
    assert sorted(map(str, told(out))) == sorted(map(str, told(whole)))


def test_one_ctrl_c_keeps_everything_and_the_run_goes_on(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = start(out)
    wait_for(out, first, "step", 1)
    first.send_signal(signal.SIGINT)
    first.wait(timeout=120)
    assert first.returncode != 0
    before = episodes(out)
    resume(out)
    assert before <= episodes(out) == episodes(whole)
    assert same(whole, out)


def test_a_finished_run_that_goes_on_has_no_summary_until_it_ends_again(
        whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(run: Run) -> None:
        raise KeyboardInterrupt

    shutil.copytree(whole, tmp_path / "run")
    assert conclude(tmp_path / "run")["steps"] == 4
    monkeypatch.setattr("agentsdpo.loop.collect", stop)
    with pytest.raises(KeyboardInterrupt):
        train(small(steps=6), out=tmp_path / "run", resume=True, mode="none")
    assert read_run(tmp_path / "run").summary == {}, "its report would call step 4 the last"


def test_the_sampled_form_too_repeats_itself_after_a_kill(tmp_path: Path) -> None:
    train(small(4, "preset='sdpopp'"), out=tmp_path / "whole", mode="none")
    first = start(tmp_path / "run", "preset='sdpopp'")
    wait_for(tmp_path / "run", first, "step", 3)
    first.kill()
    first.wait()
    resume(tmp_path / "run", "preset='sdpopp'")
    assert same(tmp_path / "whole", tmp_path / "run")


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "agentsdpo.cli", *arguments], capture_output=True, text=True,
                          timeout=300, check=False)


def test_grades_and_tool_calls_of_the_store_reach_the_learner(tmp_path: Path) -> None:
    sets = ["preset=safe_agent", "group=1", "replay.unit=episode", "learn.advantage=reinforce", "learn.tool_weight=2",
            "eval.final_splits=['val']"]
    run = train(small(1, *sets), out=tmp_path / "run", mode="none")
    rows = [row for one in run.sampler.sample(6, run.version) for row in run.rows(one)]
    assert all(row.score is not None and row.tool is not None for row in rows)
    for row in rows:
        sampled = row.branch.token_kind == 1
        assert row.tool is not None
        assert 0 < row.tool.sum() <= sampled.sum()
        assert not row.tool[~sampled].any()
    (step,) = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "step"]
    assert step["learn/grad_norm"] > 0


def test_a_resumed_run_remembers_episodes_in_the_order_they_came_in(tmp_path: Path) -> None:
    """The newest of equally near peers is shown: after a fold of the log, which sorts by name, it was another one."""
    store = ReplayStore.open(tmp_path)
    for i in (9, 1, 5):
        store.append([episode(i)])
    fold(store)
    store.close()
    view = ReplayStore.open(tmp_path).snapshot()
    assert [key.episode_id for key in view.rows] == ["e-1", "e-5", "e-9"]
    assert [name for name, _ in oldest_first(view)] == ["e-9", "e-1", "e-5"]


def test_the_demo_writes_its_summary_and_report(tmp_path: Path) -> None:
    sets = [word for s in SETS if "splits" not in s for word in ("--set", s)]
    done = cli("demo", "--quick", "--steps", "2", "--arms", "naive,robust", "--staleness", "1", "--json",
               "--out", str(tmp_path / "demo"), *sets)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary == json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert {"zero_shot_pass", "final_pass", "final_pass_ci95", "staleness", "steps", "episodes", "wall_s",
            "peak_rss_mib", "arms"} <= summary.keys()
    assert set(summary["arms"]) == {"naive", "robust"}
    assert summary["arm"] == "robust"
    assert summary["staleness"] == 1
    assert set(summary["arms"]["robust"]["splits"]) == {"val", "test_world", "test_names", "test_period", "test_firm"}
    assert "<svg" in (tmp_path / "demo" / "report.html").read_text()
    started = tmp_path / "demo" / "arms" / "naive" / "environment.json"
    started.write_text(json.dumps([start | {"commit": "older"} for start in json.loads(started.read_text())]))
    again = conclude(tmp_path / "demo")
    assert again["arms"]["naive"]["commit"] == "older", "the code that ran, not the code that sums up"
    assert again["commit"] == ", ".join(filter(None, ["older", summary["arms"]["robust"]["commit"]]))
    before = sorted((tmp_path / "demo").rglob("*"))
    done = cli("demo", "--quick", "--out", str(tmp_path / "demo"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "demo holds a finished run; choose another --out, or delete the folder first\n" in done.stderr
    assert sorted((tmp_path / "demo").rglob("*")) == before


def test_a_stopped_demo_that_was_reported_on_is_not_a_finished_one(tmp_path: Path) -> None:
    (tmp_path / "arms" / "naive").mkdir(parents=True)
    (tmp_path / "report.html").write_text("as far as it got")
    with pytest.raises(RunError, match="holds a stopped demo with arm 'naive', which was not asked for now"):
        run_demo(arms=["robust"], out=tmp_path)
    with pytest.raises(RunError, match="robust cannot be used as the folder of a run: Not a directory; give --out a"):
        run_demo(arms=["robust"], out=tmp_path / "report.html")
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(RunError, match="holds a finished run; choose another --out"):
        run_demo(arms=["robust"], out=tmp_path)
    assert (tmp_path / "report.html").read_text() == "as far as it got"


@pytest.mark.parametrize(("sets", "says", "code"), [
    (["learn.ration=1"], "learn.ratio", 2), (["steps=many"], "steps", 2), (["model=/no/such/folder"], "/no/such", 2),
    (["suite=nowhere:nothing"], "suite", 2), (["staleness=9"], "max_staleness", 2),
    (["eval.splits=['moon']"], "moon", 2), (["preset=safe_agent", "group=1"], "reinforce", 2),
])
def test_bad_settings_are_one_sentence_with_the_fix(tmp_path: Path, sets: list[str], says: str, code: int) -> None:
    (tmp_path / "c.toml").write_text("name = 'x'\n")
    words = [word for s in sets for word in ("--set", s)]
    done = cli("train", str(tmp_path / "c.toml"), "--out", str(tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3
