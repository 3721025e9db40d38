"""The continual study: its stream, what each arm gets to see, its measures, and a real, tiny run."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentsdpo.benchmarks.methods import continual, continual_report
from agentsdpo.benchmarks.methods.continual_learn import (
    EARLIER,
    Distilled,
    Line,
    Retried,
    Tuned,
    Words,
    cross_entropy,
    draw,
    earlier_work,
    lines_of,
)
from agentsdpo.benchmarks.methods.continual_measure import choices, followed, habits
from agentsdpo.benchmarks.methods.continual_stream import (
    COLLECT,
    Correction,
    House,
    Memory,
    Plan,
    Stream,
    delay,
    indices,
    topic,
)
from agentsdpo.chat import ChatFormat
from agentsdpo.collect.inprocess import InProcessEngine
from agentsdpo.envs.desk.seed import seed_path
from agentsdpo.envs.desk.text import KINDS
from agentsdpo.learn.load import load_model
from agentsdpo.learn.model import prepare_model
from agentsdpo.replay.store import ReplayStore
from agentsdpo.types import Episode, Json, StopReason

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")
PLAN = Plan(steps=4, change=2, per_step=4, batch=4, past=2, every=2, episodes=4, skills=2)


@pytest.fixture(scope="module")
def engine(chat: ChatFormat) -> InProcessEngine:
    return InProcessEngine(load_model(seed_path(), chat), chat.eos_id, max_slots=16, window=COLLECT.window)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ReplayStore]:
    with_log = ReplayStore.open(tmp_path / "store")
    yield with_log
    with_log.close()


@pytest.fixture
def said(engine: InProcessEngine, chat: ChatFormat, store: ReplayStore) -> list[Correction]:
    """Corrections of two steps, both before the change."""
    stream = Stream(House.of(0), PLAN, 0, engine, chat, store)
    for step in range(2):
        stream.play(step)
    return [one for due in range(60) for one in stream.arriving(due)]


def correction(name: str, asked: int, topic: str, text: str) -> Correction:
    return Correction(name, 0, asked=asked, due=asked + 1, topic=topic, text=text)


def attempt(**slots: str) -> Episode:
    """An episode about the first training task that took these options."""
    client = "tamori"
    calls = [("file_read", {"path": f"{slots['source']}/{client}"}),
             ("cell_set", {"path": f"{slots['file']}/{client}", "unit": slots["unit"]}),
             ("file_read", {"path": f"ledger/{client}"}),  # looked up again after filing: not where it came from
             ("mail_send", {"to": slots["notify"], "text": "tax filed"})]
    messages = tuple({"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": given}}]}
                     for name, given in calls)
    return Episode(episode_id="e", task_id="t", env_id="desk", branches=(), stop_reason=StopReason.COMPLETED,
                   messages=messages, metadata={"split": "train", "index": 0})


# ------------------------------------------------------------------------------------------------------- the stream


def test_two_kinds_are_never_asked_for_and_the_firms_share_no_rule_set() -> None:
    for seed in range(5):
        house = House.of(seed)
        assert sorted(house.taught + house.untaught) == sorted(KINDS)
        wanted = indices(house.before, "train", house.taught, 64)
        assert {topic(house.before, "train", index) for index in wanted} == set(house.taught)
        assert len(set(wanted)) == 64
        assert all(house.before.firm.rules(kind, "desk-mini") != house.after.firm.rules(kind, "desk-mini")
                   for kind in KINDS)


def test_delays_have_a_long_tail_and_are_at_least_one_step() -> None:
    drawn = sorted(delay(random.Random(i)) for i in range(4000))
    assert drawn[0] == 1
    assert drawn[2000] == 3
    assert 9 <= drawn[3800] <= 15
    assert drawn[3960] > 18


def test_the_rules_change_and_failures_alone_are_corrected_later(
        engine: InProcessEngine, chat: ChatFormat, store: ReplayStore) -> None:
    house = House.of(0)
    stream = Stream(house, PLAN, 0, engine, chat, store)
    played = [stream.play(step) for step in range(4)]
    found = [one for due in range(80) for one in stream.arriving(due)]
    failed = [e.episode_id for own in played for e in own if e.grade and not e.grade.passed]
    assert sorted(one.episode_id for one in found) == sorted(failed)
    assert all(one.due > one.asked for one in found)
    for one in found:
        suite = house.before if one.asked < PLAN.change else house.after
        rules = suite.firm.rules(one.topic, "desk-mini")
        assert all(option in one.text for option in rules.values())
    assert all(row.hint is None for row in store.snapshot().branches())


def test_the_newest_word_counts_from_when_the_work_was_done() -> None:
    memory = Memory(newest=True)
    assert memory.hear([correction("a", 1, "tax", "old"), correction("b", 1, "cost", "c")]) == {"a": "old", "b": "c"}
    assert memory.hear([correction("c", 9, "tax", "new")]) == {"c": "new", "a": "new"}
    assert memory.hear([correction("d", 3, "tax", "old")]) == {"d": "new"}
    assert [memory.holds(memory.heard[name]) for name in "abcd"] == [False, True, True, False]


def test_as_said_each_attempt_keeps_its_word() -> None:
    memory = Memory(newest=False)
    memory.hear([correction("a", 1, "tax", "old")])
    assert memory.hear([correction("c", 9, "tax", "new")]) == {"c": "new"}
    assert memory.word(memory.heard["a"]) == "old"


def test_a_step_takes_all_that_is_fresh_and_fills_up_with_older_ones() -> None:
    rng = random.Random(0)
    known = ["a", "b", "c", "d"]
    assert draw(["d"], known, 0, rng) == ["d"]
    assert sorted(draw(["d"], known, 9, rng)) == known
    assert draw(["d", "e"], known, 1, rng) == ["d", "e"]


# ---------------------------------------------------------------------------------------------- what arms get to see


def test_late_words_reach_the_store_and_older_attempts_are_read_with_the_newest(
        chat: ChatFormat, store: ReplayStore, said: list[Correction]) -> None:
    student = Distilled(load_model(seed_path(), chat), chat, store, batch=8, newest=True, seed=0)
    first = said[0]
    assert student.learn([first])["rows"] == 1
    newer = said[1]
    student.learn([Correction(newer.episode_id, newer.index, asked=99, due=100, topic=first.topic, text="Say so.")])
    hints = {row.key.episode_id: row.hint for row in store.snapshot().branches() if row.hint}
    assert {hint.text for hint in hints.values()} == {"Say so."}
    assert {hint.source for hint in hints.values()} == {"user"}
    assert hints.keys() == {first.episode_id, newer.episode_id}
    assert student.version == 2


def test_nothing_heard_is_no_step(chat: ChatFormat, store: ReplayStore) -> None:
    student = Distilled(load_model(seed_path(), chat), chat, store, batch=8, newest=True, seed=0)
    assert student.learn([]) == {"rows": 0}
    assert student.version == 0


def test_earlier_work_states_its_rules_and_takes_its_share_of_a_batch_without_growing_old(
        engine: InProcessEngine, chat: ChatFormat, store: ReplayStore, said: list[Correction]) -> None:
    past = earlier_work(engine, chat, store, 1, seed=0)
    assert len(set(past)) == len(EARLIER)
    rows = {row.key.episode_id: row for row in store.snapshot().branches()}
    for episode, line in zip(past, lines_of(store, past), strict=True):
        hint = rows[episode].hint
        assert hint is not None
        assert hint.text in chat.decode(line.ids.tolist())  # the student has read it as well
        assert hint.text not in chat.decode(line.ids[line.loss].tolist())
    student = Distilled(load_model(seed_path(), chat), chat, store, batch=6, newest=True, seed=0,
                        earlier=past, share=0.3)
    student.learn(said[:1])
    taken: list[dict[str, float]] = []
    real = student.learner.step

    def step(given: list[Any], version: int) -> Any:
        taken.append({row.episode_id.partition("/")[0]: row.weight for row in given})
        return real(given, version)

    student.learner.step = step  # pyright: ignore[reportAttributeAccessIssue]
    student.learn(said[1:2])
    assert sum(episode in past for episode in taken[0]) == 2  # 30 % of 6
    want = {episode: 1 / 0.97 if episode in past else 1.0 for episode in taken[0]}
    assert taken[0] == pytest.approx(want)


def test_words_learn_the_correction_alone(chat: ChatFormat, store: ReplayStore, said: list[Correction]) -> None:
    one = said[0]
    line = Words(chat, store)([one])[one.episode_id]
    branch = store.episode(one.episode_id).branches[-1]
    assert line.ids[:len(branch.token_ids)].tolist() == branch.token_ids.tolist()
    learnt = chat.decode(line.ids[line.loss].tolist())
    assert one.text in learnt
    assert "assistant" not in learnt


def test_retries_are_good_attempts_without_what_was_said(
        engine: InProcessEngine, chat: ChatFormat, said: list[Correction]) -> None:
    house = House.of(0)
    lines = Retried(engine, chat, house, PLAN, 0)(said)
    assert len(lines) >= len(said) // 2  # told the rules, the first model passes nearly always
    for one in said:
        if one.episode_id not in lines:
            continue
        line = lines[one.episode_id]
        env = house.before.env()
        opening = chat.open(env.start(house.before.task("train", one.index)), env.tools)
        assert line.ids[:len(opening)].tolist() == opening
        assert not line.loss[:len(opening)].any()
        assert line.loss.any()
        assert one.text not in chat.decode(line.ids.tolist())


def test_cross_entropy_is_that_of_each_line_alone(chat: ChatFormat) -> None:
    model = load_model(seed_path(), chat)
    lines = [Line(np.array(chat.encode(text)), np.arange(len(chat.encode(text))) >= 2)
             for text in ("Report tax of @tamori for q3-4.", "file in board; notify cfo")]
    want = []
    with torch.no_grad():
        for line in lines:
            ids = torch.from_numpy(line.ids)
            logp = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            own = logp[torch.arange(len(ids) - 1), ids[1:]]
            want.append(-float(own[torch.from_numpy(line.loss[1:])].mean()))
    prepare_model(model)
    assert float(cross_entropy(model, lines).detach()) == pytest.approx(sum(want) / 2, abs=1e-4)


def test_fine_tuning_learns_and_forgets_lines_whose_word_no_longer_holds(chat: ChatFormat) -> None:
    ids = np.array(chat.encode("Report tax of @tamori for q3-4."))
    seen: list[list[str]] = []

    def make(said: Any) -> dict[str, Line]:
        seen.append([one.episode_id for one in said])
        return {one.episode_id: Line(ids, np.arange(len(ids)) >= 1) for one in said}

    student = Tuned(load_model(seed_path(), chat), make, batch=8, newest=True, seed=0)
    before = float(cross_entropy(student.model, [Line(ids, np.arange(len(ids)) >= 1)]).detach())
    assert student.learn([correction("a", 1, "tax", "old")]) == {"rows": 1}
    assert float(cross_entropy(student.model, [Line(ids, np.arange(len(ids)) >= 1)]).detach()) < before
    assert student.learn([correction("b", 5, "tax", "new")]) == {"rows": 1}  # a is not learnt from again
    assert student.learn([correction("c", 2, "tax", "old")]) == {"rows": 1}  # c came too late, b is rehearsed
    assert seen == [["a"], ["b"], ["c"]]


# ---------------------------------------------------------------------------------------------------------- measures


def test_choices_are_read_off_the_calls() -> None:
    slots = {"source": "bank", "unit": "eur", "file": "share", "notify": "team"}
    assert choices(attempt(**slots)) == slots


def test_habits_tell_a_rule_from_guessing() -> None:
    suite = House.of(0).before
    same = [attempt(source="bank", unit="eur", file="share", notify="team")] * 8
    assert habits(same, suite) == {"entropy": 0.0, "top_share": 1.0, "invented": 1.0}
    spread = [attempt(source=a, unit=b, file=c, notify=d) for a, b, c, d in zip(
        ("ledger", "summary", "bank", "audit"), ("usd", "k_usd", "m_usd", "eur"),
        ("reports", "board", "share", "archive"), ("cfo", "client", "partner", "team"), strict=True)]
    found = habits(spread, suite)
    assert found["entropy"] == pytest.approx(1.0)
    assert (found["top_share"], found["invented"]) == (0.25, 0.0)


def test_following_is_counted_slot_by_slot() -> None:
    suite = House.of(0).before
    rules = suite.firm.rules(topic(suite, "train", 0), "desk-mini")
    assert followed([attempt(**rules)], suite) == 1.0
    wrong = {**rules, "notify": next(who for who in ("cfo", "team") if who != rules["notify"])}
    assert followed([attempt(**rules), attempt(**wrong)], suite) == pytest.approx(7 / 8)


def row(arm: str, step: int, split: str, **values: float) -> Json:
    return {"arm": arm, "seed": 0, "step": step, "split": split, "score": 0.5, "pass": 0.0, "before": 0.2, "after": 0.3,
            "craft": 1.0, "invented": 0.1, "entropy": 0.9, "valid": 1.0, **values}


def rows_of(arm: str, told: float) -> list[Json]:
    return [row(arm, 0, "stream", score=0.4), row(arm, 1, "stream", score=0.8),
            *(row(arm, step, split, **values) for step, own in (
                (0, {"taught": {}, "untaught": {}, "skill: told lookup": {"pass": 0.9}, "skill: correct": {}}),
                (1, {"taught": {"pass": 0.7}, "untaught": {}, "skill: told lookup": {"pass": 0.9},
                     "skill: correct": {}}),
                (2, {"taught": {"pass": 0.8}, "untaught": {"invented": 0.5, "entropy": 0.6},
                     "skill: told lookup": {"pass": told}, "skill: correct": {"craft": 1.5}}))
              for split, values in own.items())]


def test_a_gain_in_one_skill_hides_no_loss_in_another() -> None:
    found = continual_report.record(rows_of("sdpo-replay", told=0.45))
    assert (found["learnt"], found["followed"], found["stream"]) == (0.7, 0.8, pytest.approx(0.6))
    assert (found["worst"], found["kept"]) == (pytest.approx(0.5), pytest.approx(0.75))
    assert (found["invented"], found["first_invented"]) == (0.5, 0.1)


def test_lines_and_figure_name_every_arm() -> None:
    rows = rows_of("sdpo-replay", told=0.9) + rows_of("sft-words", told=0.3)
    said = "\n".join(continual_report.lines(rows))
    text = continual_report.svg(continual_report.figure(rows), "c")
    for arm in ("sdpo-replay", "sft-words"):
        assert f"`{arm}`" in said
        assert arm in text
    assert "the rules change" in text
    assert set(continual_report.STYLES) == set(continual.ARMS)


def test_the_page_holds_the_numbers_of_the_table() -> None:
    page = ROOT / continual_report.PAGE
    assert continual_report.put(continual_report.lines(continual_report.read(ROOT / continual_report.TABLE)),
                                page.read_text()) == page.read_text()


# -------------------------------------------------------------------------------------------------------- a tiny run


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["sdpo-earlier", "sft-retries-earlier"])
def test_a_run_is_written_once(arm: str, tmp_path: Path) -> None:
    table, told = tmp_path / "sub" / "c.parquet", list[str]()
    continual.study([arm], [0], PLAN, table, told.append)
    found = continual_report.read(table)
    assert told[0] == f"{arm}, seed 0"
    assert {r["split"] for r in found if r["step"] == 4} == {
        "taught", "untaught", "skill: told lookup", "skill: told correct", "skill: told reconcile", "skill: correct",
        "skill: reconcile"}
    assert [r["n"] for r in found if r["split"] == "stream"] == [4] * 4
    assert {r["study"] for r in found} == {"continual"}
    count = len(told)
    continual.study([arm], [0], PLAN, table, told.append)
    assert (len(told), continual_report.read(table)) == (count, found)
    assert (continual_report.record(found)["stream"] or 0.0) > 0.3


