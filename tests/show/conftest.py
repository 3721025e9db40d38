"""A run folder as a training run writes it, with made-up numbers, and the smallest one that can exist."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SPLITS = {"val": 0.93, "test_names": 0.88, "test_period": 0.42, "test_firm": 0.01}


def step_row(step: int, every: float, rng: random.Random) -> dict[str, Any]:
    """One optimiser step of a run that learns as a logistic curve and stays a few versions behind."""
    learnt = 1 / (1 + math.exp(-(step - 55) / 9))
    return {
        "kind": "step", "step": step, "version": step // 2, "episodes": 32 * step, "env_steps": 130 * step,
        "tokens": 6000 * step, "wall_s": every * step, "learn/loss": 0.5 - 0.4 * learnt + rng.gauss(0, 0.01),
        "learn/gap/abs": 0.6 * (1 - 0.85 * learnt) + rng.gauss(0, 0.01), "learn/gap/mean": -0.2 * (1 - learnt),
        "learn/ess_frac": 0.9 - 0.2 * rng.random(), "learn/ratio/p99": 1.8 + rng.random(),
        "learn/ratio/mean": 1.0 + rng.gauss(0, 0.01), "learn/ratio/max": 4 + 6 * rng.random(),
        "learn/grad_norm": 0.4 + 0.3 * rng.random(), "learn/adv_clip/frac": 0.04 * rng.random(),
        "replay/staleness/mean": min(step / 2, 4 + rng.random()), "replay/staleness/max": min(step, 9),
        "collect/pass": max(0.0, learnt * 0.9 + rng.gauss(0, 0.05)),
        "collect/score/mean": 0.25 + 0.72 * learnt + rng.gauss(0, 0.02),
    }


def eval_row(step: int, every: float, split: str, decoding: str, top: float) -> dict[str, Any]:
    """One evaluation of 128 episodes on the same curve."""
    learnt = 1 / (1 + math.exp(-(step - 55) / 9))
    passed = round(128 * learnt * top) / 128
    return {"kind": "eval", "step": step, "split": split, "decoding": decoding, "n": 128, "pass": passed,
            "score": 0.25 + 0.7 * learnt, "episodes": 32 * step, "env_steps": 130 * step, "wall_s": every * step}


def arm_rows(seed: int, *, steps: int = 120, every: float = 2.6, scale: float = 1.0) -> list[dict[str, Any]]:
    """Rows of one arm in the order a run writes them."""
    rng, rows = random.Random(seed), []
    for step in range(steps + 1):
        if step:
            rows.append(step_row(step, every, rng))
        if step % 20 == 0:
            for split in ("val", "test_names"):
                rows.append(eval_row(step, every, split, "sampled", scale * SPLITS[split]))
                rows.append(eval_row(step, every, split, "greedy", min(1.0, scale * SPLITS[split] + 0.06)))
    return rows


def arm_summary(scale: float, staleness: float) -> dict[str, Any]:
    """Summary of one arm; intervals are left to the reader for one split, to see both ways."""
    splits: dict[str, Any] = {
        name: {"zero_shot_pass": 0.0078, "zero_shot_ci95": [0.001, 0.043], "final_pass": top * scale,
               "final_ci95": [max(0.0, top * scale - 0.05), min(1.0, top * scale + 0.04)],
               "final_greedy_pass": min(1.0, top * scale + 0.06), "n": 128}
        for name, top in SPLITS.items()}
    del splits["test_period"]["final_ci95"]
    return {"zero_shot_pass": 0.0078, "final_pass": 0.93 * scale, "staleness": staleness, "steps": 120,
            "final_pass_ci95": [0.93 * scale - 0.05, 0.93 * scale + 0.04], "episodes": 3840, "wall_s": 312.0,
            "peak_rss_mib": 912.4, "splits": splits}


def write_run(path: Path, steps: int = 60) -> Path:
    """Write a finished run of two arms and return its folder."""
    arms = {"off-policy": (1.0, 4.6), "no-correction": (0.4, 4.5)}
    for i, (name, (scale, _)) in enumerate(arms.items()):
        folder = path / "arms" / name
        folder.mkdir(parents=True)
        (folder / "config.toml").write_text(f'[learn]\nratio = "{name}"\nlr = 1e-3\n')
        rows = arm_rows(i, steps=steps, scale=scale)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summaries = {name: arm_summary(*numbers) for name, numbers in arms.items()}
    main = {key: value for key, value in summaries["off-policy"].items() if key != "splits"}
    summary = {**main, "arms": summaries, "seed": 7, "commit": "0123abc", "command": "agentsdpo demo --seed 7",
               "hardware": {"cpu": "2 cores", "ram_gib": 8, "gpu": None}}
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "config.toml").write_text('seed = 7\n[learn]\nlr = 1e-3\nmax_staleness = 16\n')
    return path


@pytest.fixture(scope="session", name="arm_rows")
def arm_rows_fixture() -> Callable[..., list[dict[str, Any]]]:
    """The function that makes rows of an arm."""
    return arm_rows


@pytest.fixture(scope="session", name="arm_summary")
def arm_summary_fixture() -> Callable[[float, float], dict[str, Any]]:
    """The function that makes the summary of an arm."""
    return arm_summary


@pytest.fixture(scope="session", name="write_run")
def write_run_fixture() -> Callable[[Path], Path]:
    """The function that writes a finished run of two arms."""
    return write_run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run of two arms."""
    return write_run(tmp_path / "demo")


@pytest.fixture
def bare_run(tmp_path: Path) -> Path:
    """A run killed after its first evaluation: no summary, no config, a torn last line."""
    folder = tmp_path / "bare" / "arms" / "only"
    folder.mkdir(parents=True)
    row = {"kind": "eval", "step": 0, "split": "val", "decoding": "sampled", "n": 16, "pass": 0.0, "episodes": 0}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + '\n{"kind": "st')
    return tmp_path / "bare"
