"""Several attempts at each task: played in groups, stored as groups, drawn as groups, and learnt from end to end."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agentsdpo import loop
from agentsdpo.assemble import Run, assemble
from agentsdpo.config import RunConfig, from_mapping
from agentsdpo.demo import demo_config
from agentsdpo.errors import ConfigError, RunError
from agentsdpo.programs.collecting import assemble_collector
from agentsdpo.replay.ids import Key
from agentsdpo.runfolder import open_run
from agentsdpo.suites import run_id
from agentsdpo.track import read_metrics
from agentsdpo.types import CriterionResult, Grade, Hint

pytestmark = pytest.mark.usefixtures("one_thread")
SETS = ["collect.window=512", "collect.concurrency=16", "collect.max_tokens=64", "episodes_per_step=8", "group=4",
        "eval.final_episodes=2", "eval.episodes=2", "eval.every=9", "eval.splits=['val']", "eval.final_splits=['val']",
        "learn.max_staleness=6"]


def small(preset: str, steps: int = 2, *more: str) -> RunConfig:
    return from_mapping({"name": "t", "preset": preset, "steps": steps}, [*SETS, *more])


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == "step"]


@pytest.mark.parametrize("preset", ["grpo", "opd_grpo", "safe_agent", "sdpo"])
def test_presets_with_groups_train_end_to_end(preset: str, tmp_path: Path) -> None:
    run = loop.train(small(preset, 2, "learn.batch=2" if preset != "sdpo" else "learn.batch=8"), out=tmp_path / "run",
                     mode="none")
    rows = steps_of(tmp_path / "run")
    assert [row["episodes"] for row in rows] == [8, 16]
    assert all(row["learn/rows"] > 0 for row in rows)
    assert ("hint/made" in rows[0]) == (preset != "grpo")
    episodes = [run.store.snapshot().episode(key.episode_id) for key in run.store.snapshot().keys()]  # noqa: SIM118
    groups: dict[str, list[int]] = {}
    for episode in episodes:
        assert episode.group_size == 4
        groups.setdefault(episode.group_id, []).append(episode.attempt)
    assert [sorted(attempts) for attempts in groups.values()] == [[0, 1, 2, 3]] * 4


def collected(tmp_path: Path, preset: str = "grpo", *more: str) -> Run:
    run = assemble(small(preset, 3, "learn.batch=1", *more), tmp_path / "run")
    run.restore_or_begin()
    run.sampler.refresh(only={e.episode_id for e in loop.collect(run)})
    return run


def test_a_group_is_drawn_whole_and_its_advantages_are_its_own(tmp_path: Path) -> None:
    run = collected(tmp_path)
    drawn = run.draw()
    assert len(drawn) == 4
    assert len({row.group_id for row in drawn}) == 1
    other = run.hinted()
    assert len(other) == 4, "nobody writes hints, and nobody needs them"
    assert {row.group_id for row in other}.isdisjoint({row.group_id for row in drawn})
    mixed = next(rows for rows in (drawn, other) if len({row.reward for row in rows}) > 1)
    admitted = run.learner.admit([one for row in mixed for one in run.rows(row)], run.version).rows
    assert sum(row.advantage for row in admitted) == pytest.approx(0.0, abs=1e-6)
    assert len({row.advantage for row in admitted}) > 1


def test_turns_without_a_hint_learn_from_the_grade_alone(tmp_path: Path) -> None:
    run = collected(tmp_path)
    one = next(row for row in run.draw() if len(row.branch.calls) > 1)
    turns = {call.turn for call in one.branch.calls}
    hinted, bare = run.rows(replace(one, hint=Hint(text="", source="user", author="a", turns=((min(turns), "now"),))))
    assert (hinted.turns, bare.turns) == ({min(turns)}, turns - {min(turns)})
    assert hinted.hint_ids
    assert (bare.hint_ids, bare.source) == (None, "")
    (whole,) = run.rows(replace(one, hint=Hint(text="now", source="user", author="a")))
    assert whole.turns == turns
    assert whole.group == one.group_id
    (alone,) = run.rows(replace(one, hint=None, group_id=""))
    assert alone.group == one.key.episode_id, "as the sampler has it"


def test_attempts_of_one_name_have_advantages_of_their_own(tmp_path: Path) -> None:
    run = collected(tmp_path, "grpo", "learn.advantage=reinforce")
    up, down = (replace(row, key=Key("ticket-4711", 0, attempt), reward=1.0 - attempt)  # as a proxy records them
                for attempt, row in enumerate(run.draw()[:2]))
    admitted = run.learner.admit([*run.rows(up), *run.rows(down)], run.version).rows
    assert [row.advantage for row in admitted] == [0.5, -0.5]


def test_a_run_that_goes_on_knows_the_successes_it_knew_before(tmp_path: Path) -> None:
    run = assemble(small("robust", 3, "hint.sources=['peer']", "learn.batch=8"), tmp_path / "run")
    run.restore_or_begin()
    lost = loop.collect(run)[0]
    right, wrong = (Grade.of([CriterionResult(id="unit", score=score)], "") for score in (1.0, 0.0))
    run.keep([lost.model_copy(update={"episode_id": "won", "grade": right})])
    known = lost.model_copy(update={"episode_id": "lost", "grade": wrong, "hint": None})
    expected = run.hinter.hint(known)
    run.folder.release()
    again = assemble(run.config, tmp_path / "run", resume=True)
    again.restore_or_begin()
    assert expected is not None
    assert again.hinter.hint(known) == expected


def test_a_stopped_collection_plays_the_attempts_that_are_missing(tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    run = assemble(small("grpo"), tmp_path / "run")
    run.restore_or_begin()
    first = {(e.metadata["index"], e.attempt): e.episode_id for e in loop.collect(run)}
    assert sorted(first) == [(index, attempt) for index in (0, 1) for attempt in range(4)]
    real = run.stored
    monkeypatch.setattr(run, "stored", lambda wanted: {
        place: found for place, found in real(wanted).items() if place not in ((0, 2), (1, 1), (1, 3))})
    played: list[Any] = []
    monkeypatch.setattr(run, "keep", lambda episodes: played.extend(episodes) or episodes)
    again = loop.collect(run)
    assert {(e.metadata["index"], e.attempt): e.episode_id for e in played} == {
        place: first[place] for place in ((0, 2), (1, 1), (1, 3))}
    assert {e.group_size for e in played} == {4}
    assert len(again) == 8


def test_a_setting_that_came_later_leaves_runs_their_names_and_lets_them_go_on(tmp_path: Path) -> None:
    one, groups = from_mapping({}), from_mapping({}, ["group=2"])
    assert run_id(one) != run_id(groups)
    folder = open_run(tmp_path / "run", one)
    folder.release()
    text = folder.config.read_text()
    assert "\ngroup = 1\n" in text
    folder.config.write_text(text.replace("\ngroup = 1\n", "\n"))
    open_run(tmp_path / "run", one, resume=True).release()
    with pytest.raises(RunError, match="was started with group = 1, resuming asks for 2"):
        open_run(tmp_path / "run", groups, resume=True)


def test_the_demo_draws_as_many_rows_for_every_arm() -> None:
    configs = {arm: demo_config(arm, staleness=3, steps=5, seed=0) for arm in ("robust", "grpo", "sdpo")}
    assert {arm: config.learn.batch * (config.group if config.replay.unit == "group" else 1)
            for arm, config in configs.items()} == dict.fromkeys(configs, 32)


def test_collectors_of_their_own_say_that_they_play_no_groups(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="group is 4, but collectors that are programs"):
        assemble_collector(small("grpo"), str(tmp_path / "s"), str(tmp_path / "p"))
