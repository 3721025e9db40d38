"""An episode cut off at any instant goes on from its log: the same state, messages, tokens and grade, or unscored."""

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentsdpo.chat import ChatFormat
from agentsdpo.collect.compaction import compactor
from agentsdpo.collect.config import CollectConfig, CompactionConfig
from agentsdpo.collect.episode_log import EpisodeLog, LogError, read_events
from agentsdpo.collect.inprocess import InProcessEngine
from agentsdpo.collect.policy import EnginePolicy
from agentsdpo.collect.rollout import Rollout, run_episode
from agentsdpo.envs.desk import DeskSuite, agents
from agentsdpo.types import Budget, StopReason

DESK = DeskSuite("desk", families=("rollup",), n=(2,), fault_rate=0.2)


class Cut(BaseException):
    """The process dies here."""


class Dying(EpisodeLog):
    """Dies in its write number ``at``, of which a random part reaches the disk."""

    def __init__(self, folder: Path, at: int, rng: random.Random, every: int = 3) -> None:
        super().__init__(folder, every=every, sync=False)
        self.at, self.rng = at, rng

    def write(self, events: Any, clock: Any, state_hash: Any) -> None:
        before = self.path.stat().st_size
        super().write(events, clock, state_hash)
        self.at -= 1
        if self.at < 0:
            after = self.path.stat().st_size
            with open(self.path, "r+b") as file:
                file.truncate(self.rng.choice([before, after, self.rng.randint(before, after)]))
            raise Cut


def digest(run: Rollout) -> Any:
    """All that must be the same after a restart: everything but clocks."""
    calls = [[call.model_dump(exclude={"t_request", "t_done"}) for call in b.calls] for b in run.branches]
    tokens = [(b.token_ids.tolist(), b.token_kind.tolist(), repr(b.logprobs.tolist()), made, b.fork_reason,
               b.fork_at, b.parent_branch_id) for b, made in zip(run.branches, calls, strict=True)]
    return run.stop_reason, run.answer, run.messages, run.counts, run.outcome, tokens


def desk_run(log: EpisodeLog | None, index: int = 0, **more: Any) -> Rollout:
    task = DESK.task("val", index)
    policy = agents.oracle(task, DESK.firm, epsilon=0.1, seed=index)
    return asyncio.run(run_episode(DESK.env(), policy, task, seed=1, episode_id=f"e{index}", log=log, **more))


def with_restarts(play: Any, folder: Path, rng: random.Random, *, cuts: int, reach: int, every: int = 3) -> Rollout:
    """Play with ``cuts`` deaths in the first ``reach`` writes of each life, then to the end."""
    for _ in range(cuts):
        try:
            return play(Dying(folder, rng.randrange(reach), rng, every))
        except Cut:
            pass
    return play(EpisodeLog(folder, every=every, sync=False))


def test_a_desk_episode_cut_at_every_write_ends_as_if_it_never_was(tmp_path: Path) -> None:
    whole = desk_run(EpisodeLog(tmp_path / "whole"))
    assert whole.stop_reason == StopReason.COMPLETED
    assert digest(whole) == digest(desk_run(None))
    writes = 2 * whole.counts["turns"] + 2
    rng = random.Random(0)
    for at in range(writes):
        folder = tmp_path / str(at)
        with pytest.raises(Cut):
            desk_run(Dying(folder, at, rng, every=rng.choice([1, 3, 100])))
        run = desk_run(EpisodeLog(folder, every=3, sync=False))
        assert digest(run) == digest(whole), at
    assert whole.outcome is not None
    assert DESK.grader().judge(DESK.task("val", 0), whole.outcome).passed


def test_many_restarts_of_one_episode(tmp_path: Path) -> None:
    rng = random.Random(1)
    for index in range(6):
        run = with_restarts(lambda log, i=index: desk_run(log, i, announce="every_5"), tmp_path / str(index), rng,
                            cuts=12, reach=9)
        assert digest(run) == digest(desk_run(None, index, announce="every_5"))
        types = [event["type"] for event in read_events(tmp_path / str(index))]
        assert types[0] == "start"
        assert types[-1] == "final"
        assert types.count("final") == 1
        assert types.count("model_call") == run.counts["turns"]
        assert types.count("tool_result") == run.counts["calls"] + run.counts["calls_refused"]


def test_a_budget_that_ran_out_and_its_last_turn_survive(tmp_path: Path) -> None:
    rng, budget = random.Random(2), Budget(turns=7)
    whole = desk_run(None, budget=budget, final_turn=True)
    assert (whole.stop_reason, whole.counts["turns"]) == (StopReason.MAX_TURNS, 8)
    for at in range(12):
        run = with_restarts(lambda log: desk_run(log, budget=budget, final_turn=True), tmp_path / str(at), rng,
                            cuts=2, reach=19)
        assert digest(run) == digest(whole)


def engine_run(world: Any, chat: ChatFormat, manager: Any, log: EpisodeLog | None, seed: int = 3, turns: int = 30,
               **more: Any) -> Rollout:
    policy = EnginePolicy(world.seeded_engine(chat), chat, CollectConfig(window=1600))
    return asyncio.run(run_episode(world.noting_env(), policy, world.task(turns=turns), seed=seed, episode_id="e",
                                   log=log, compaction=manager, **more))


@pytest.mark.parametrize("manager", [None, "notes", "summary"])
def test_sampled_tokens_are_the_same_after_restarts(world: Any, tiny_tokenizer: Any, tmp_path: Path, manager: Any
                                                    ) -> None:
    chat = ChatFormat(tiny_tokenizer)
    made = compactor(CompactionConfig(manager=manager, keep_turns=2)) if manager else None
    rng = random.Random(4)
    for seed in range(4):
        whole = engine_run(world, chat, made, None, seed)
        assert (whole.counts["compactions"] == 0) == (manager is None)
        assert len(whole.branches) == whole.counts["compactions"] + 1
        run = with_restarts(lambda log, s=seed: engine_run(world, chat, made, log, s), tmp_path / str(seed), rng,
                            cuts=8, reach=14)
        assert digest(run) == digest(whole)


def test_a_history_cut_down_for_the_last_turn_survives(world: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Between the budget that ran out and the turn it leaves, a history too long is cut down, killed there or not."""
    chat, made, found = ChatFormat(tiny_tokenizer), compactor(CompactionConfig(manager="notes", keep_turns=2)), 0
    for turns in range(4, 20):
        place = tmp_path / str(turns)
        whole = engine_run(world, chat, made, EpisodeLog(place, sync=False), turns=turns, final_turn=True)
        types = [event["type"] for event in read_events(place)]
        at = types.index("budget") + 1
        found += types[at] == "compaction"
        lines = (place / "events.jsonl").read_bytes().splitlines(keepends=True)
        (place / "events.jsonl").write_bytes(b"".join(lines[:at]))
        run = engine_run(world, chat, made, EpisodeLog(place, sync=False), turns=turns, final_turn=True)
        assert digest(run) == digest(whole)
        if found:
            return
    raise AssertionError("no episode was cut down for its last turn")


@pytest.mark.slow
def test_the_in_process_engine_repeats_its_tokens_after_restarts(tmp_path: Path) -> None:
    from agentsdpo.envs.desk.seed import seed_path
    from agentsdpo.learn.load import load_chat, load_model

    chat, suite = load_chat(seed_path()), DeskSuite(n=(2,))
    model, task = load_model(seed_path(), chat), suite.task("val", 1)

    def play(log: EpisodeLog | None) -> Rollout:
        engine = InProcessEngine(model, chat.eos_id, max_slots=1, window=512)
        policy = EnginePolicy(engine, chat, CollectConfig(window=512, max_tokens=64))
        made = compactor(CompactionConfig(manager="notes", compact_at=0.4, keep_turns=2))
        return asyncio.run(run_episode(suite.env(), policy, task, seed=5, episode_id="e", log=log, compaction=made))

    whole, rng = play(None), random.Random(6)
    assert len(whole.branches) > 1
    run = with_restarts(play, tmp_path / "e", rng, cuts=3, reach=8)
    assert (run.messages, run.outcome) == (whole.messages, whole.outcome)
    for branch, same in zip(run.branches, whole.branches, strict=True):
        assert branch.token_ids.tolist() == same.token_ids.tolist()
        assert branch.token_kind.tolist() == same.token_kind.tolist()
        # A prompt encoded at once rounds otherwise than one that grew turn by turn.
        np.testing.assert_allclose(branch.logprobs, same.logprobs, atol=1e-4)


def test_the_log_grows_with_the_episode_and_repeats_nothing(tmp_path: Path) -> None:
    sizes = {}
    for n in (4, 16):
        suite = DeskSuite("desk", families=("rollup",), n=(n,))
        task = suite.task("val", 0)
        run = asyncio.run(run_episode(suite.env(), agents.oracle(task, suite.firm), task, seed=0, episode_id="e",
                                      log=EpisodeLog(tmp_path / str(n), sync=False)))
        sizes[n] = (tmp_path / str(n) / "events.jsonl").stat().st_size / run.counts["calls"]
        assert len(list((tmp_path / str(n) / "checkpoints").iterdir())) <= 2
    assert sizes[16] < 1.3 * sizes[4]


def test_an_environment_that_answers_otherwise_is_unscored_and_never_starts_over(tmp_path: Path, world: Any) -> None:
    class Drifting(world.env):
        drift = 0

        def _one(self, call: Any) -> Any:
            result = super()._one(call)
            return result.model_copy(update={"content": f"{result.content} at {self.drift}"})

    def play(log: EpisodeLog, drift: int, every: int = 100) -> Rollout:
        env = Drifting()
        env.drift = drift
        turns = [world.turn(("add", {"n": 1}), ids=[f"t{i}"]) for i in range(5)]
        return asyncio.run(run_episode(env, Recalled(*turns), world.task(), seed=0, episode_id="e", log=log))

    class Recalled(world.script):
        async def recall(self, ctx: Any, tools: Any, turn: Any) -> None:
            self.turns.pop(0)

    with pytest.raises(Cut):
        play(Dying(tmp_path / "a", 6, random.Random(5), every=100), 0)
    run = play(EpisodeLog(tmp_path / "a", every=100), 1)
    assert (run.stop_reason, run.outcome) == (StopReason.ENGINE_ERROR, None)
    assert "after the restart add of turn 0 gave content 'total 1 at 1', before it 'total 1 at 0'" in run.error
    assert [e["type"] for e in read_events(tmp_path / "a")][-1] == "error"
    same = play(EpisodeLog(tmp_path / "a", every=100), 0)
    assert same.stop_reason == StopReason.COMPLETED
    with pytest.raises(Cut):
        play(Dying(tmp_path / "b", 6, random.Random(5), every=1), 0)
    assert play(EpisodeLog(tmp_path / "b", every=1), 1).stop_reason == StopReason.COMPLETED


def test_a_log_of_another_episode_or_in_use_is_refused(tmp_path: Path) -> None:
    desk_run(EpisodeLog(tmp_path / "a"))
    with pytest.raises(LogError, match="log is of an episode with episode_id 'e0', not 'e1'"):
        desk_run(EpisodeLog(tmp_path / "a"), 1)
    with pytest.raises(LogError, match="budget"):
        desk_run(EpisodeLog(tmp_path / "a"), budget=Budget(turns=99))
    held = EpisodeLog(tmp_path / "a")
    held.open()
    with pytest.raises(LogError, match="another process plays"):
        desk_run(EpisodeLog(tmp_path / "a"))
    held.close()


def test_a_damaged_line_is_unscored_and_a_damaged_checkpoint_is_done_without(tmp_path: Path) -> None:
    whole = desk_run(EpisodeLog(tmp_path / "a", every=2))
    for path in (tmp_path / "a" / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert digest(desk_run(EpisodeLog(tmp_path / "a", every=2))) == digest(whole)
    lines = (tmp_path / "a" / "events.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "a" / "events.jsonl").write_bytes(b"".join([*lines[:3], b"{]\n", *lines[4:]]))
    run = desk_run(EpisodeLog(tmp_path / "a", every=2))
    assert run.stop_reason == StopReason.ENGINE_ERROR
    assert "line 4" in run.error


def test_time_between_crash_and_resume_does_not_count_and_events_say_when(tmp_path: Path) -> None:
    with pytest.raises(Cut):
        desk_run(Dying(tmp_path / "a", 9, random.Random(0)))
    at = read_events(tmp_path / "a")[-1]
    lines = (tmp_path / "a" / "events.jsonl").read_text().splitlines()
    lines[-1] = json.dumps({**at, "t_wall": 5000.0, "t_working": 40.0})
    (tmp_path / "a" / "events.jsonl").write_text("\n".join(lines) + "\n")
    run = desk_run(EpisodeLog(tmp_path / "a"))
    assert 5000.0 < run.wall_s < 5100.0
    assert 40.0 < run.working_s < 100.0
    walls = [event["t_wall"] for event in read_events(tmp_path / "a")]
    assert walls == sorted(walls)


def test_a_grade_is_added_and_a_finished_episode_is_not_played_again(tmp_path: Path) -> None:
    whole = desk_run(EpisodeLog(tmp_path / "a"))
    EpisodeLog(tmp_path / "a").add("grade", {"passed": True})
    again = desk_run(EpisodeLog(tmp_path / "a"))
    assert digest(again) == digest(whole)
    assert read_events(tmp_path / "a")[-1]["type"] == "grade"
