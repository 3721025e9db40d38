"""Hints of a store are judged by what they do: right ones help, shuffled ones do not, and the audit says so."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from agentsdpo import cli
from agentsdpo.audit import Player, Verdict, audit_hints
from agentsdpo.chat import ChatFormat
from agentsdpo.collect.collector import Collector
from agentsdpo.collect.config import CollectConfig
from agentsdpo.collect.inprocess import InProcessEngine
from agentsdpo.envs.desk import DeskSuite
from agentsdpo.envs.desk.seed import seed_path
from agentsdpo.errors import HintError, TokenizerMismatch
from agentsdpo.hint.config import HintConfig
from agentsdpo.hint.hinter import make_hinter
from agentsdpo.learn.control import derange
from agentsdpo.learn.load import load_chat, load_model
from agentsdpo.learn.presets import resolve
from agentsdpo.replay.example import example
from agentsdpo.replay.store import ReplayStore
from agentsdpo.stats import Interval
from agentsdpo.types import Episode, Hint

COLLECT = CollectConfig(window=768, concurrency=24, max_tokens=64)
CONFIG = resolve("robust", {"lr": 1e-4})


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return load_chat(seed_path())


@pytest.fixture(scope="module")
def model(chat: ChatFormat) -> Any:
    return load_model(seed_path(), chat)


@pytest.fixture(scope="module")
def player(chat: ChatFormat) -> Player:
    engine = InProcessEngine(load_model(seed_path(), chat), chat.eos_id, max_slots=24, window=768)
    return Player(DeskSuite(), engine, chat, COLLECT)


@pytest.fixture(scope="module")
def hinted(player: Player) -> list[Episode]:
    """A dozen attempts of the bare model, each with the grader's words."""
    played = Collector.of_engine(player.suite, player.engine, player.chat, COLLECT, run_id="r").collect(
        "train", range(12), seed=3)
    hints = make_hinter(HintConfig(), player.suite).hints(played)
    return [e.model_copy(update={"hint": hint}) for e, hint in zip(played, hints, strict=True)]


@pytest.fixture
def judged(tmp_path: Path, chat: ChatFormat, model: Any) -> Callable[..., list[Verdict]]:
    def judge(episodes: list[Episode], player: Player | None) -> list[Verdict]:
        store = ReplayStore.open(tmp_path / "store")
        store.append(episodes)
        return audit_hints(store.snapshot(), model, chat, CONFIG, player=player, rows=12, tasks=12)
    return judge


def test_right_hints_are_useful(judged: Callable[..., list[Verdict]], hinted: list[Episode], player: Player) -> None:
    (found,) = judged(hinted, player)
    assert (found.source, found.branches, found.words) == ("criteria", 12, "useful")
    assert found.empty_gap < 1e-3
    assert found.lift is not None
    assert found.wrong_lift is not None
    assert found.wrong_gap is not None
    assert found.wrong_gap.low > 0.01
    assert found.lift.low > 0.1
    assert found.wrong_lift.high < found.lift.low
    assert found.warnings == []


def test_wrong_hints_are_not(judged: Callable[..., list[Verdict]], hinted: list[Episode], player: Player) -> None:
    order = derange([tuple((e.hint.text if e.hint else "").encode()) for e in hinted], seed=1)
    assert order is not None
    wrong = [e.model_copy(update={"hint": hinted[other].hint}) for e, other in zip(hinted, order, strict=True)]
    (found,) = judged(wrong, player)
    assert found.words in ("no evidence of use", "harmful")
    assert found.gap.estimate > 0.05, "the size of the gap does not tell"


def test_sources_are_judged_apart_and_turns_are_not_played(judged: Callable[..., list[Verdict]],
                                                           hinted: list[Episode], player: Player) -> None:
    turns = Hint(turns=((0, "Read the audit sheet first."),), source="user", author="u")
    mixed = [e if i < 8 else e.model_copy(update={"hint": turns}) for i, e in enumerate(hinted)]
    first, second = judged(mixed, None)
    assert [first.source, second.source] == ["criteria", "user"]
    assert (first.words, second.words) == ("not played", "not played")
    assert second.warnings == ["all hints are one text"]
    assert second.wrong_gap is None
    assert (first.branches, second.branches) == (8, 4)


def test_a_hint_in_the_agents_own_words_is_a_leak(judged: Callable[..., list[Verdict]], hinted: list[Episode],
                                                  chat: ChatFormat) -> None:
    said = hinted[0].branches[0]
    call = said.calls[0]
    words = Hint(text=chat.decode(said.token_ids[call.start:call.end - 1].tolist()), source="criteria", author="g")
    (found,) = judged([hinted[0].model_copy(update={"hint": words}), *hinted[1:4]], None)
    assert found.leaked == 0.25
    assert found.warnings == ["25.0% of the agents say their hint, which they never read"]


def test_verdicts_go_by_the_interval() -> None:
    about = {"source": "peer", "branches": 9, "distinct": 1.0, "leaked": 0.0, "empty_gap": 0.5,
             "gap": Interval(1, 1, 1), "wrong_gap": Interval(0.001, 0.0, 0.002)}
    found = [Verdict(**about, lift=Interval(0, low, high), wrong_lift=Interval(0.2, 0.1, 0.3))
             for low, high in ((0.01, 0.2), (-0.1, 0.2), (-0.3, -0.1))]
    assert [one.words for one in found] == ["useful", "no evidence of use", "harmful"]
    assert found[0].warnings == ["without a hint teacher and student differ by 0.5 nats per token",
                                 "another row's hint makes no difference",
                                 "another task's hint helps as well: any text does"]
    assert found[0].json()["lift"] == [0, 0.01, 0.2]


def test_a_store_without_hints_is_said(model: Any, chat: ChatFormat, tmp_path: Path, hinted: list[Episode]) -> None:
    store = ReplayStore.open(tmp_path / "bare")
    store.append([e.model_copy(update={"hint": None}) for e in hinted[:2]])
    with pytest.raises(HintError, match="no branch of the store has a hint; write some"):
        audit_hints(store.snapshot(), model, chat, CONFIG, player=None)
    with pytest.raises(TokenizerMismatch, match="hinted branches are of tokenizer .*; give --model the model"):
        audit_hints(example().snapshot(), model, chat, CONFIG, player=None)


def test_the_verb_says_the_verdict(hinted: list[Episode], tmp_path: Path) -> None:
    ReplayStore.open(tmp_path / "store").append(hinted)

    def run(*more: str) -> Any:
        words = ["hint", "audit", str(tmp_path / "store"), "--rows", "4", "--tasks", "0", *more]
        return CliRunner().invoke(cli.app, words)
    found = run("--json")
    (about,) = json.loads(found.stdout)
    assert (about["source"], about["verdict"], about["lift"]) == ("criteria", "not played", None)
    assert "lift            not measured" in run().stdout
    asked = run("--min-lift", "0.05")
    assert asked.exit_code == 1
    assert "lift of criteria is not shown to be at least 0.05" in asked.stderr
