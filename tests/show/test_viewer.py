"""The token page: what it says of each token, that it stays small, and that text in it is never markup."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentsdpo.benchmarks.perf.viewer import scored
from agentsdpo.collect.collector import Collector
from agentsdpo.collect.config import CollectConfig
from agentsdpo.collect.inprocess import InProcessEngine
from agentsdpo.envs.desk import DeskSuite
from agentsdpo.envs.desk.seed import seed_path
from agentsdpo.errors import ConfigError, HintError
from agentsdpo.hint.config import HintConfig
from agentsdpo.hint.hinter import make_hinter
from agentsdpo.learn.load import load_chat, load_model
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.replay.cli.view import Shown, load
from agentsdpo.replay.store import ReplayStore
from agentsdpo.show.viewer import Scores, document, page
from agentsdpo.show.viewing import Scorer, Wanted
from agentsdpo.types import Branch, Hint
from tests.show.browser import browser, complaints, contrasts, needs_browser

EVIL = "</script><img src=x onerror=document.title='owned'><!-- \u2028 &amp;"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ReplayStore:
    """Three hinted episodes of the shipped model."""
    torch.set_num_threads(1)
    chat = load_chat(seed_path())
    config = CollectConfig(window=768, max_tokens=64)
    engine = InProcessEngine(load_model(seed_path(), chat), chat.eos_id, max_slots=4, window=768)
    played = Collector.of_engine(DeskSuite(), engine, chat, config, run_id="r", model_id="seed").collect(
        "train", range(3), seed=1)
    hints = make_hinter(HintConfig(), DeskSuite()).hints(played)
    found = ReplayStore.open(tmp_path_factory.mktemp("viewer") / "store")
    found.append([e.model_copy(update={"hint": hint}) for e, hint in zip(played, hints, strict=True)])
    return found


def shown(store: ReplayStore, number: int = 0) -> Shown:
    view = store.snapshot()
    return load(store, view, sorted({key.episode_id for key in view.rows})[number])


def score(episode: Shown, wanted: Wanted, hint: str | None = None) -> tuple[Shown, list[Scores | None], str]:
    """The episode shaded, its scores, and who scored."""
    scorer = Scorer(wanted)
    return *scorer.score(episode, hint=hint), scorer.words


def data_of(text: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found.group(1))


def values(data: Any, name: str) -> np.ndarray:
    return np.array([np.nan if one is None else one / data["scale"] for one in data["branches"][0][name]])


def test_the_page_holds_what_the_models_think(store: ReplayStore) -> None:
    episode, scores, words = score(shown(store), Wanted("seed"))
    data = data_of(page(episode, scores, note=words))
    branch, of = data["branches"][0], episode.rows[0].branch
    assert data["modes"] == ["gap", "ratio", "weight", "logprob"]
    assert data["by"] == "gap"
    text = "".join(data["words"][i] for i in branch["text"])
    chat = load_chat(seed_path())
    assert text == chat.decode(of.token_ids.tolist())
    assert branch["ids"] == of.token_ids[branch["at"]].tolist()
    np.testing.assert_allclose(values(data, "behaviour"), of.logprobs[branch["at"]], atol=0.005)
    np.testing.assert_allclose(values(data, "student"), values(data, "behaviour"), atol=0.02)  # the same weights
    gap = values(data, "teacher") - values(data, "student")
    assert np.abs(gap).max() > 0.3, "the hint says something"
    assert np.abs(values(data, "weight")).max() == 1.0
    top = branch["student_top"][0]
    assert len(top) == 10
    chances = np.exp(np.array(top[1::2]) / data["scale"])
    assert 0.99 * chances[0] >= chances[-1]
    assert data["hint"]["text"].startswith("For ")
    assert data["about"]["note"] == "scored by seed"


def test_another_hint_is_another_gap(store: ReplayStore) -> None:
    first = shown(store)
    _, right, _ = score(first, Wanted("seed"))
    _, other, _ = score(first, Wanted("seed"), "Do as you like.")
    assert right[0] is not None
    assert other[0] is not None
    same, changed = (np.nanmax(np.abs(getattr(right[0], side) - getattr(other[0], side)))
                     for side in ("student", "teacher"))
    assert same < 1e-5
    assert changed > 0.1


def test_versions_are_compared_without_a_hint(store: ReplayStore, tmp_path: Path) -> None:
    model = load_model(seed_path(), load_chat(seed_path()))
    registry = PolicyRegistry(tmp_path / "policies")
    registry.publish(model.state_dict(), learner_step=0)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.3)
    registry.publish(model.state_dict(), learner_step=1)
    first = shown(store)
    first = replace(first, rows=[replace(row, hint=None) for row in first.rows])
    _, (found,), words = score(first, Wanted("seed", tmp_path / "policies", 0, 1))
    assert found is not None
    assert words == "version 1 minus 0"
    assert np.nanmax(np.abs(found.teacher - found.student)) > 0.1
    _, (same,), _ = score(first, Wanted("seed", tmp_path / "policies", 1, 1))
    assert same is not None
    assert np.nanmax(np.abs(same.teacher - same.student)) < 1e-6
    with pytest.raises(ConfigError, match="policy versions are named but no registry; give --policies"):
        score(first, Wanted("seed", None, 0, 1))
    with pytest.raises(HintError, match="no hint, so that teacher and student read the same; give one with --hint"):
        score(first, Wanted("seed"))


def test_without_a_model_it_is_shaded_by_the_record(store: ReplayStore) -> None:
    data = document(shown(store), [None])
    assert data["modes"] == ["logprob"]
    assert "student" not in data["branches"][0]
    assert "<kbd>1</kbd>" not in page(shown(store), [None]), "there is nothing to choose from"


def test_hints_of_turns_are_scored_each_with_its_own(store: ReplayStore) -> None:
    first = shown(store)
    hint = Hint(turns=((1, "File it in the board folder."),), source="user", author="u")
    told = replace(first, rows=[replace(row, hint=hint) for row in first.rows])
    _, (found,), _ = score(told, Wanted("seed"))
    assert found is not None
    call = told.rows[0].branch.calls[1]
    scored = np.flatnonzero(np.isfinite(found.teacher))
    assert scored.min() == call.start
    assert scored.max() == call.end - 1


def test_a_long_episode_makes_a_small_file(tmp_path: Path) -> None:
    size = len(page(*scored(20_000, tmp_path)).encode())
    assert size * 5 < 12e6, f"{size} bytes for 20,000 tokens"


@needs_browser
@pytest.mark.slow
def test_a_hundred_thousand_tokens_in_a_browser(tmp_path: Path) -> None:
    (tmp_path / "long.html").write_text(page(*scored(100_000, tmp_path / "store")))
    assert (tmp_path / "long.html").stat().st_size < 12e6
    with browser(tmp_path) as driver:
        driver.get((tmp_path / "long.html").as_uri())
        assert complaints(driver) == []
        spans = driver.execute_script("return document.querySelectorAll('.s').length")
        assert 1 < spans < 10_000, "what is far away stays plain text"
        key(driver, "n")
        first = driver.find_element("css selector", ".here")
        assert first.is_displayed()
        driver.execute_script("document.querySelector('#outline a:last-child').click()")
        key(driver, "p")
        assert driver.execute_script("return window.scrollY") > 10_000


def written(store: ReplayStore, folder: Path) -> Any:
    """The episode that is shown, once its scored page lies in the folder."""
    episode, scores, words = score(shown(store), Wanted("seed"))
    (folder / "page.html").write_text(page(episode, scores, note=words))
    return episode


def key(driver: Any, name: str) -> None:
    driver.find_element("tag name", "body").send_keys(name)


@needs_browser
@pytest.mark.slow
def test_the_page_in_a_browser(store: ReplayStore, tmp_path: Path) -> None:
    episode = written(store, tmp_path)
    with browser(tmp_path) as driver:
        driver.get((tmp_path / "page.html").as_uri())
        assert complaints(driver) == []
        assert driver.find_element("css selector", "button[aria-pressed=true]").text == "gap"
        shaded = [e.text for e in driver.find_elements("css selector", ".u2, .u3, .u4, .d2, .d3, .d4")]
        key(driver, "n")
        card = driver.find_element("id", "card").text
        assert "student's likeliest" in card
        assert driver.find_element("css selector", ".here").text in shaded
        key(driver, "4")
        assert driver.find_element("css selector", "button[aria-pressed=true]").text == "behaviour log-prob"
        key(driver, "p")
        marked = driver.find_elements("css selector", ".d1, .d2, .d3, .d4")
        assert driver.find_element("css selector", ".here") == [one for one in marked if one.tag_name == "span"][-1]
        key(driver, "1")
        assert driver.find_elements("css selector", ".here"), "the token that is looked at stays marked"
        assert len(driver.find_elements("css selector", "#outline a")) == len(episode.rows[0].branch.calls)
        for theme in ("light", "dark"):
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {
                "features": [{"name": "prefers-color-scheme", "value": theme}]})
            for mode in "1234":
                key(driver, mode)
                assert min(contrasts(driver, "body *").values()) >= 4.4, (theme, mode, contrasts(driver, "body *"))
        driver.set_window_size(600, 900)
        assert driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


def ends_of(driver: Any, selector: str) -> tuple[float, float]:
    """Where an element begins and ends on the screen, in pixels from the top."""
    box = driver.execute_script("const b = document.querySelector(arguments[0]).getBoundingClientRect(); "
                                "return [b.top, b.bottom]", selector)
    return box[0], box[1]


@needs_browser
@pytest.mark.slow
def test_nothing_that_is_looked_at_lies_under_the_head(store: ReplayStore, tmp_path: Path) -> None:
    written(store, tmp_path)
    with browser(tmp_path) as driver:
        for width in (1400, 1100, 600):
            driver.set_window_size(width, 700)
            driver.get((tmp_path / "page.html").as_uri())
            for _ in range(3):
                key(driver, "n")
            head, here = ends_of(driver, "header"), ends_of(driver, ".here")
            assert ends_of(driver, "#card dt")[0] >= head[1]
            assert here[0] >= head[1]
            if width == 600:
                assert here[1] <= ends_of(driver, "aside")[0]
                continue
            assert ends_of(driver, "#outline a")[0] >= head[1]
            driver.execute_script("document.querySelector('#outline a:nth-child(3)').click()")
            assert driver.execute_script("return window.scrollY") > 0
            target = driver.execute_script("return document.querySelector('#outline a:nth-child(3)').hash.slice(1)")
            assert ends_of(driver, f"[id={target}]")[0] >= head[1] - 1


@needs_browser
@pytest.mark.slow
def test_of_several_tokens_in_one_character_the_strongest_is_shown(store: ReplayStore, tmp_path: Path) -> None:
    episode, face = shown(store), load_chat(seed_path()).encode("\U0001f642")
    branch = episode.rows[0].branch
    ids, logps, start = branch.token_ids.copy(), branch.logprobs, branch.calls[1].start
    ids[start:start + len(face)] = face
    teacher = logps.copy()
    teacher[start + 1] -= 3.0
    told = replace(episode, rows=[replace(episode.rows[0], branch=branch.model_copy(update={"token_ids": ids}))])
    (tmp_path / "page.html").write_text(page(told, [Scores(logps, teacher, teacher - logps, {}, {})]))
    with browser(tmp_path) as driver:
        driver.get((tmp_path / "page.html").as_uri())
        assert [e.text for e in driver.find_elements("css selector", "#text .d4")] == ["\U0001f642"]
        key(driver, "n")
        assert driver.find_element("css selector", ".here").text == "\U0001f642"
        assert "-3.00" in driver.find_element("id", "card").text


@needs_browser
@pytest.mark.slow
def test_text_is_never_markup(store: ReplayStore, tmp_path: Path) -> None:
    episode, scores, _ = score(shown(store), Wanted("seed"))
    hint = Hint(text=EVIL, turns=((0, EVIL),), source="user", author=EVIL)
    about = episode.episode.model_copy(update={"task_id": EVIL, "model_id": EVIL})
    chat = load_chat(seed_path())
    ids = np.array([*chat.encode(EVIL), *episode.rows[0].branch.token_ids], np.int32)
    branch = Branch(token_ids=ids, token_kind=np.zeros(len(ids), np.uint8), calls=(),
                    logprobs=np.full(len(ids), np.nan, np.float32))
    told = replace(episode, episode=about, rows=[replace(episode.rows[0], hint=hint, branch=branch)])
    text = page(told, [None], note=EVIL)
    assert EVIL not in text
    (tmp_path / "evil.html").write_text(text)
    with browser(tmp_path) as driver:
        driver.get((tmp_path / "evil.html").as_uri())
        assert driver.title == f"{EVIL} · agentsdpo tokens"
        assert driver.find_elements("css selector", "img") == []
        assert EVIL.split(" \u2028")[0] in driver.find_element("id", "text").text
        assert complaints(driver) == []


def test_the_verb(store: ReplayStore, tmp_path: Path) -> None:
    name = sorted({key.episode_id for key in store.snapshot().rows})[0]
    uri, out = store.storage.uri, str(tmp_path / "e.html")

    def run(*more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([sys.executable, "-m", "agentsdpo.cli", "view", uri, name[:12], *more], text=True,
                              capture_output=True, timeout=120)
    done = run("-o", out)
    assert done.returncode == 0, done.stderr
    assert re.search(r"e\.html: \d+ tokens, 0\.\d MB", done.stdout)
    assert data_of(Path(out).read_text())["by"] == "logprob"
    assert "agent · turn 0" in run().stdout
    told = json.loads(run("--json").stdout)
    assert told["schema"] == "agentsdpo/view/1"
    assert len(told["tokens"]) == told["episode"]["n_trainable"]
    assert {row["gap"] for row in told["tokens"]} == {None}
    assert json.loads(run("--json", "-o", out).stdout)["bytes"] == Path(out).stat().st_size
    for more, words in ((("--hint", "x"), "need a model that scores; give --model"), (("--by", "mood"), "--by is"),
                        (("--by", "gap"), "need a model that scores; give --model"),
                        (("--model", "seed", "--hint", "x", "--to", "1"), "without any hint; leave out --hint or --to"),
                        (("--model", "seed", "--preset", "mood"), "there is no preset 'mood'; use one of ")):
        refused = run(*more)
        assert (refused.returncode, words in refused.stderr) == (2, True), refused.stderr
        assert refused.stderr.count("\n") == 1
