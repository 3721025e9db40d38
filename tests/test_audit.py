"""Hints of a store are judged by what they do: right ones help, shuffled ones do not, and the audit says so."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agentsdpo import audit, cli, lift, loop, offline
from agentsdpo.audit import Sample, Verdict, audit_hints, samples
from agentsdpo.chat import ChatFormat
from agentsdpo.collect.collector import Collector
from agentsdpo.collect.config import CollectConfig
from agentsdpo.collect.inprocess import InProcessEngine
from agentsdpo.config import RunConfig, from_mapping
from agentsdpo.envs.desk import DeskSuite
from agentsdpo.envs.desk.seed import seed_path
from agentsdpo.errors import ConfigError, HintError, TokenizerMismatch
from agentsdpo.hint.config import HintConfig
from agentsdpo.hint.hinter import make_hinter
from agentsdpo.learn.control import derange
from agentsdpo.learn.load import load_model
from agentsdpo.learn.presets import resolve
from agentsdpo.learn.rows import LossRow
from agentsdpo.lift import Player, lift_before, require_lift
from agentsdpo.replay.example import example
from agentsdpo.replay.snapshot import Snapshot
from agentsdpo.replay.store import ReplayStore
from agentsdpo.stats import Interval
from agentsdpo.types import Episode, Hint

COLLECT = CollectConfig(window=768, concurrency=24, max_tokens=64)
CONFIG = resolve("robust", {"lr": 1e-4})
pytestmark = pytest.mark.usefixtures("one_thread")


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
    assert found.tasks == 12
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


def test_one_task_shows_nothing(hinted: list[Episode], tmp_path: Path) -> None:
    ReplayStore.open(tmp_path / "store").append(hinted)
    sets = [f"--set=collect.{key}" for key in ("window=768", "concurrency=24", "max_tokens=64")]
    found = CliRunner().invoke(cli.app, ["hint", "audit", str(tmp_path / "store"), "--rows", "2", "--tasks", "1",
                                         "--json", "--min-lift", "-0.9", *sets])
    (about,) = json.loads(found.stdout)
    assert about["tasks"] == 1
    assert about["lift"][1] < -0.95 < 0.95 < about["lift"][2]
    assert about["verdict"] == "no evidence of use"
    assert found.exit_code == 1
    with pytest.raises(HintError, match=r"hints of peer lift the score by \+0.500 \[-0.962, \+0.988\]"):
        lift.refuse_useless({"peer": lift.difference({"a": 0.75}, {"a": 0.25})}, 0.1)


def test_tasks_that_all_differ_alike_show_no_more_than_their_number_can() -> None:
    def interval(*gaps: float) -> Interval:
        told = {str(task): gap for task, gap in enumerate(gaps)}
        found = lift.difference(told, dict.fromkeys(told, 0.0))
        assert found is not None
        return found

    few, some, many = (interval(*[1.0] * n) for n in (3, 6, 100))
    assert few.low < 0.0 < some.low < 0.9 < many.low < many.estimate == many.high == 1.0
    assert interval(0.0, 0.0, 0.0).low == -interval(0.0, 0.0, 0.0).high < 0.0
    assert interval(0.3, 0.1 + 0.2).low < 0.0, "alike but for rounding"


def test_a_hint_that_leaves_no_room_to_act_is_not_played(player: Player) -> None:
    place = {"desk-mini-train-0": ("train", 0)}
    hint = Hint(text="Read the sheet named audit. " * 200, source="user", author="u")
    assert player.scores(place, {}, 0).keys() == place.keys()
    assert player.scores(place, dict.fromkeys(place, hint), 0) == {}, "or it would pass for harmful"
    assert player.lift(place, dict.fromkeys(place, hint), 0) is None


class Elsewhere(DeskSuite):
    """A suite of other tasks, with other splits."""

    def task(self, split: str, index: int) -> Any:
        """Knows one split."""
        if split != "elsewhere":
            raise ConfigError(f"there is no split {split!r}", fix="choose elsewhere")
        return super().task("val", index)


def test_a_store_of_another_suite_is_not_played(judged: Callable[..., list[Verdict]], hinted: list[Episode],
                                                player: Player) -> None:
    (found,) = judged(hinted, Player(Elsewhere(), player.engine, player.chat, COLLECT))
    assert (found.words, found.wrong_lift) == ("not played", None)
    assert found.gap.estimate > 0.05


def test_no_more_episodes_are_read_than_tasks_are_played(hinted: list[Episode], player: Player, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    store = ReplayStore.open(tmp_path / "store")
    again = [e.model_copy(update={"episode_id": f"again-{i}"}) for i, e in enumerate(hinted)]
    store.append([*hinted, *again])
    view, read = store.snapshot(), list[str]()
    real = Snapshot.gather

    def gather(self: Snapshot, names: Any) -> Any:
        for episode in real(self, names):
            read.append(episode.task_id)
            yield episode

    monkeypatch.setattr(Snapshot, "gather", gather)
    monkeypatch.setattr(Player, "lifts", lambda self, places, hints, seed: (places, hints, 0))
    rows = samples(view, player.chat, size=64, seed=0)["criteria"].rows
    assert len(rows) == 24
    places, hints, _ = audit.lifts(rows, view, player, 5, 0)
    assert len(read) == len(places) == 5 == len(hints)  # type: ignore[arg-type]
    audit.lifts(rows, view, player, 99, 0)
    assert sorted(read[5:]) == sorted({e.task_id for e in hinted}), "one episode for each task"


def test_a_sample_is_of_its_size_even_and_repeats(judged: Callable[..., list[Verdict]], hinted: list[Episode]) -> None:
    def drawn(seed: int, size: int = 4) -> list[int]:
        sample = Sample(size, random.Random(seed))
        for row in range(20):
            sample.add(row, hint, leaked=row % 2 == 0)  # type: ignore[arg-type]
        assert (sample.branches, sample.leaked, len(sample.texts)) == (20, 10, 1)
        return sample.rows  # type: ignore[return-value]

    hint = Hint(text="Read the audit sheet first.", source="user", author="u")
    assert drawn(1) == drawn(1) != drawn(2)
    assert sorted(drawn(3, 99)) == list(range(20)) != drawn(3, 99)
    seen = [row for seed in range(2000) for row in drawn(seed)]
    assert len(seen) == 8000
    assert min(seen.count(row) for row in range(20)) > 320, "400 each, give or take four standard deviations"
    assert max(seen.count(row) for row in range(20)) < 480


def test_a_wrong_hint_that_does_not_fit_is_left_out(hinted: list[Episode], chat: ChatFormat, model: Any,
                                                    tmp_path: Path) -> None:
    store = ReplayStore.open(tmp_path / "store")
    store.append(hinted[:4])
    rows, window = audit._admitted(list(store.snapshot().branches()), chat, CONFIG, model)
    assert window == model.config.max_position_embeddings
    _, gap, wrong = audit._gaps(rows, window, model, CONFIG, 0)
    assert wrong is not None
    longest = max(row.teacher_length for row in rows)
    seen: list[LossRow] = []
    real = audit.both_logps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit, "both_logps", lambda model, row: seen.append(row) or real(model, row))
        _, same, few = audit._gaps(rows, longest - 1, model, CONFIG, 0)
    assert same == gap
    assert all(row.teacher_length < longest for row in seen[len(rows):])
    assert len(seen) < 2 * len(rows)
    assert few != wrong


def required(least: float, *more: str) -> RunConfig:
    return from_mapping({"steps": 1}, [f"hint.min_lift={least}", "collect.window=768", "collect.concurrency=24",
                                       "collect.max_tokens=64", *more])


def test_training_may_require_a_lift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lift, "TASKS", 8)
    require_lift(from_mapping({}))
    require_lift(required(0.1))
    with pytest.raises(HintError, match=r"hints of criteria lift the score by \+0.* hint.min_lift is 0.9; mend the"):
        loop.train(required(0.9), out=tmp_path / "run", mode="none")
    assert not (tmp_path / "run").exists()
    told = from_mapping({"steps": 1}, ["hint.sources=['peer']", *(f"collect.{key}" for key in (
        "window=768", "concurrency=24", "max_tokens=64"))])
    with pytest.raises(HintError, match="none of 4 attempts got a hint, so that hint.min_lift cannot be checked"):
        lift_before(told, tasks=4)


def test_hints_that_cannot_be_played_are_not_shown_to_help() -> None:
    with pytest.raises(HintError, match="hints of next_step could not be played, hint.min_lift is -1.0"):
        lift.refuse_useless({"criteria": Interval(0.3, 0.2, 0.4), "next_step": None}, -1.0)


@pytest.mark.slow
def test_learning_from_a_store_may_require_a_lift(hinted: list[Episode], tmp_path: Path) -> None:
    store = ReplayStore.open(tmp_path / "store")
    store.append(hinted)
    order = derange([tuple((e.hint.text if e.hint else "").encode()) for e in hinted], seed=1) or []
    audit.require_store_lift(required(0.1), store.snapshot(), tasks=12)
    store.add_hints({e.episode_id: h for e, other in zip(hinted, order, strict=True) if (h := hinted[other].hint)})
    with pytest.raises(HintError, match="hints of criteria lift the score by .*, hint.min_lift is 0.1"):
        offline.learn_alone(required(0.1), tmp_path / "store", out=tmp_path / "run", mode="none")
    assert not (tmp_path / "run").exists()


def test_a_store_without_hints_is_said(model: Any, chat: ChatFormat, tmp_path: Path, hinted: list[Episode]) -> None:
    store = ReplayStore.open(tmp_path / "bare")
    store.append([e.model_copy(update={"hint": None}) for e in hinted[:2]])
    with pytest.raises(HintError, match="no branch of the store has a hint; write some"):
        audit_hints(store.snapshot(), model, chat, CONFIG, player=None)
    with pytest.raises(TokenizerMismatch, match="3 of 3 hinted branches are of tokenizer .*; set model to the one"):
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
