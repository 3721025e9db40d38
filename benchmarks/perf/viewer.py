"""Speed and size of the token page: writing it from a store, and opening it in a headless Chromium.

    python -m agentsdpo.benchmarks.perf.viewer [--only write open ...] [--json]

``write`` times whole processes of ``agentsdpo view`` on a stored episode, wall clock and processor; ``open`` times a
fresh browser from the start of the navigation to the page's own end of set-up, with every second token scored. Medians
over rounds.
"""

import hashlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from typing import Any

import numpy as np

from agentsdpo.benchmarks.perf.figure import Figure, run_all
from agentsdpo.envs.desk.seed import seed_path
from agentsdpo.replay.cli.view import Shown, load
from agentsdpo.replay.store import ReplayStore
from agentsdpo.show.viewer import Scores, page
from agentsdpo.types import Branch, Call, Episode, Sampling, StopReason, VersionSpan

ROUNDS = 5
TURN = 500
"""Tokens of a turn, and of what the environment answers."""


def long_episode(tokens: int) -> Episode:
    """An episode nobody played, in the shipped tokenizer: turns of :data:`TURN` random tokens and answers as long."""
    from tokenizers import Tokenizer

    rng = np.random.default_rng(0)
    ids = rng.integers(20, 900, tokens).astype(np.int32)
    kind = (np.arange(tokens) // TURN % 2).astype(np.uint8)
    kind[(kind == 0) & (np.arange(tokens) >= TURN)] = 2
    logp = np.where(kind == 1, -rng.exponential(1.0, tokens), np.nan).astype(np.float32)
    calls = tuple(Call(call_id=f"c{at}", turn=i, start=at, end=min(at + TURN, tokens), prompt_sha256="",
                       finish_reason="stop", sampling=Sampling(), logprob_kind="processed",
                       versions=(VersionSpan(version=0, start=0, end=min(TURN, tokens - at)),))
                  for i, at in enumerate(range(TURN, tokens, 2 * TURN)))
    branch = Branch(token_ids=ids, token_kind=kind, logprobs=logp, calls=calls)
    text = Tokenizer.from_file(str(seed_path() / "tokenizer.json")).to_str()
    return Episode(episode_id="0" * 32, task_id="long", env_id="desk", branches=(branch,), model_id="seed",
                   stop_reason=StopReason.COMPLETED, train_allowed=True,
                   tokenizer_sha256=hashlib.sha256(text.encode()).hexdigest())


def scored(tokens: int, folder: Path) -> tuple[Shown, list[Scores | None]]:
    """A stored long episode with made-up scores of every sampled token, five likeliest ones on each side."""
    store = ReplayStore.open(folder)
    store.append([long_episode(tokens)])
    view = store.snapshot()
    shown = load(store, view, next(iter(view.rows)).episode_id)
    store.close()
    return shown, [made_up(shown.rows[0].branch)]


def made_up(branch: Branch) -> Scores:
    """Random scores of the sampled tokens of a branch."""
    rng, at = np.random.default_rng(1), np.flatnonzero(np.isfinite(branch.logprobs))
    noise = np.full(len(branch.token_ids), np.nan, np.float32)
    noise[at] = rng.normal(0, 1, len(at))
    tops = {int(i): [(int(t), float(v)) for t, v in zip(rng.integers(20, 900, 5), -rng.exponential(1, 5), strict=True)]
            for i in at}
    return Scores(branch.logprobs, branch.logprobs + noise, noise, tops, tops)


def write() -> Iterator[Figure]:
    """A page of 20,000 tokens from a store, by the command line."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shown, _ = scored(20_000, folder / "store")
        command = ["view", str(folder / "store"), shown.episode.episode_id[:8], "-o", str(folder / "page.html")]
        runs = [_process("-m", "agentsdpo.cli", *command) for _ in range(ROUNDS + 1)][1:]
        wall, cpu = (statistics.median(values) for values in zip(*runs, strict=True))
        size = (folder / "page.html").stat().st_size
    yield Figure("view_20k_s", round(wall, 3), "s", detail={"cpu_s": round(cpu, 3), "rounds": ROUNDS,
                                                            "bytes": size, "tokens": 20_000})


def _process(*arguments: str) -> tuple[float, float]:
    """Wall clock and processor seconds of one process."""
    began, before = time.perf_counter(), getrusage(RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    after = getrusage(RUSAGE_CHILDREN)
    return time.perf_counter() - began, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def opened() -> Iterator[Figure]:
    """A scored page of 100,000 tokens in a browser that has just started."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = page(*scored(100_000, folder / "store"))
        (folder / "page.html").write_text(text, encoding="utf-8")
        ready = [_open(folder / f"profile-{i}", folder / "page.html") for i in range(ROUNDS)]
    yield Figure("view_100k_mb", round(len(text.encode()) / 1e6, 2), "MB", detail={"tokens": 100_000, "scored": 50_000})
    yield Figure("open_100k_s", round(statistics.median(ready), 3), "s", detail={
        "rounds": ROUNDS, "slowest_s": round(max(ready), 3), "browser": "headless Chromium"})


def _open(profile: Path, path: Path) -> float:
    """Seconds from the start of the navigation until the page has set itself up and was painted."""
    driver = _chromium(profile)
    try:
        driver.get(path.as_uri())
        return driver.execute_async_script(
            "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done("
            "Math.max(performance.getEntriesByType('navigation')[0].loadEventEnd,"
            "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0) / 1000)))")
    finally:
        driver.quit()


def _chromium(profile: Path) -> Any:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,900", f"--user-data-dir={profile}"):
        options.add_argument(flag)
    return webdriver.Chrome(options, Service(shutil.which("chromedriver")))


if __name__ == "__main__":
    run_all(__doc__ or "", {"write": write, "open": opened})
