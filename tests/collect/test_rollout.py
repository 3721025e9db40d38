"""The loop: bad turns are observations, every call id is answered once, budgets end episodes, faults unscore."""

import asyncio
import random
from typing import Any

import pytest

from agentsdpo.collect.rollout import NUDGE, Rollout, run_episode
from agentsdpo.collect.turns import read_turn
from agentsdpo.errors import ConfigError, EngineError, ModelError, TruncatedSampling
from agentsdpo.replay.canonical import to_json
from agentsdpo.types import ModelTurn, StopReason


def play(world: Any, *turns: Any, env: Any = None, **budget: Any) -> Rollout:
    env = env or world.env()
    return asyncio.run(run_episode(env, world.script(*turns), world.task(**budget), seed=0, episode_id="e"))


def answers(run: Rollout) -> list[str]:
    return [m["content"] for m in run.messages if m["role"] == "tool"]


def assert_answered_once(run: Rollout) -> None:
    """After every assistant message its call ids, each once and in order; no id twice in the episode."""
    seen: list[str] = []
    for at, message in enumerate(run.messages):
        if message["role"] == "assistant":
            ids = [call["id"] for call in message.get("tool_calls", [])]
            after = run.messages[at + 1:at + 1 + len(ids)]
            assert [m.get("tool_call_id") for m in after] == ids
            seen += ids
    assert len(seen) == len(set(seen))
    assert sum(m["role"] == "tool" for m in run.messages) == len(seen)


def test_a_good_episode_ends_with_submit(world: Any) -> None:
    run = play(world, world.turn(("add", {"n": 3})), world.turn(("submit", {})))
    assert run.stop_reason == StopReason.COMPLETED
    assert run.outcome is not None
    assert run.outcome.final == b"3"
    assert run.answer is None
    assert run.counts["calls"] == run.counts["valid_calls"] == run.counts["mutating_ok"] == 2


def test_text_without_a_call_is_the_answer_but_a_thought_or_a_call_is_not(world: Any) -> None:
    assert play(world, "The total is 3.").answer == "The total is 3."
    assert play(world, "<think>hm</think>\nThree.").answer == "Three."
    run = play(world, '<tool_call>{"name": ', "<think>endless", "3")
    assert run.answer == "3"
    assert "not closed" in answers(run)[0]
    assert run.messages[-2] == {"role": "user", "content": NUDGE}


def test_what_is_said_beside_calls_stays_in_the_history(world: Any) -> None:
    """A hosted model's calls come beside its text."""
    turn = world.turn(("get", {})).model_copy(update={"text": "I look first."})
    (said, _) = (message for message in play(world, turn, "0").messages if message["role"] == "assistant")
    assert (said["content"], len(said["tool_calls"])) == ("I look first.", 1)


def test_bad_calls_are_answered_and_siblings_still_run(world: Any) -> None:
    turn = world.turn(("add", {"n": "x"}), ("add", {}), ("fly", {}), ("add", "{n: 1}"), ("add", {"n": 2}),
                      ("add", {"n": 1, "m": 1}))
    run = play(world, turn)
    said = answers(run)
    assert "'x' is not of type 'integer'" in said[0]
    assert "'n' is a required property" in said[1]
    assert "no tool 'fly'; the tools are add, get, submit" in said[2]
    assert "must be a JSON object" in said[3]
    assert said[4] == "total 2"
    assert "Additional properties" in said[5]
    assert_answered_once(run)
    assert run.counts["calls"] == 6
    assert run.counts["valid_calls"] == 1


def test_duplicate_and_empty_ids_are_renamed(world: Any) -> None:
    first = world.turn(("get", {}), ("get", {}), ("get", {}), ids=["a", "a", ""])
    run = play(world, first, world.turn(("get", {}), ids=["a"]))
    assert_answered_once(run)
    ids = [c["id"] for m in run.messages for c in m.get("tool_calls", [])]
    assert ids == ["a", "call_0_1", "call_0_2", "call_1_0"]


def test_calls_over_the_cap_are_answered_budget(world: Any) -> None:
    env = world.env()
    run = play(world, world.turn(*[("add", {"n": 1})] * 5), env=env, calls_per_turn=2)
    assert env.total == 2
    assert answers(run)[2:] == ["Error: only 2 calls were left to this turn"] * 3
    assert_answered_once(run)


@pytest.mark.parametrize(("budget", "reason", "total"), [
    ({"turns": 3}, StopReason.MAX_TURNS, 3),
    ({"tool_calls": 2}, StopReason.MAX_TOOL_CALLS, 2),
    ({"wall_s": 0.0}, StopReason.ROLLOUT_TIMEOUT, 0),
])
def test_budgets_end_the_episode_scored(world: Any, budget: dict[str, Any], reason: StopReason, total: int) -> None:
    env = world.env()
    run = play(world, *[world.turn(("add", {"n": 1}))] * 9, env=env, **budget)
    assert run.stop_reason == reason
    assert env.total == total
    assert run.outcome is not None


def test_three_unusable_turns_in_a_row_end_it_but_a_usable_one_starts_the_count_again(world: Any) -> None:
    broken = "<tool_call>{]</tool_call>"
    run = play(world, broken, "", broken)
    assert run.stop_reason == StopReason.PARSE_ERROR
    assert run.counts["turns"] == 3
    run = play(world, broken, "", world.turn(("get", {})), "", broken, "fine")
    assert run.stop_reason == StopReason.COMPLETED
    assert_answered_once(run)


@pytest.mark.parametrize("fault", ["reset", "engine", "ids"])
def test_faults_leave_the_episode_unscored(world: Any, fault: str) -> None:
    env = world.env(broken=fault == "reset", shuffle=fault == "ids")
    turn = EngineError("gone", fix="restart") if fault == "engine" else world.turn(("add", {"n": 1}), ("get", {}))
    run = play(world, turn, env=env)
    assert run.stop_reason == StopReason.ENGINE_ERROR
    assert run.outcome is None
    assert run.error


@pytest.mark.parametrize("fault", [KeyError("x"), ValueError("\ud800"), RecursionError(), TimeoutError("no answer")])
def test_a_bug_in_anybodys_code_unscores_this_episode_and_keeps_what_it_recorded(world: Any, fault: Exception) -> None:
    class Buggy(world.env):
        def done(self) -> bool:
            if self.total:
                raise fault
            return False

    run = play(world, world.turn(("get", {})), world.turn(("add", {"n": 1})), env=Buggy())
    assert (run.stop_reason, run.outcome) == (StopReason.ENGINE_ERROR, None)
    assert run.error.startswith(type(fault).__name__)
    run.error.encode()
    assert run.counts["turns"] == 2


@pytest.mark.parametrize("fault", [ConfigError("a"), ModelError("b"), TruncatedSampling("c")])
def test_a_wrong_setup_is_raised_as_it_is(world: Any, fault: Exception) -> None:
    with pytest.raises(type(fault), match=str(fault)):
        play(world, fault)


def test_what_a_tool_says_can_be_encoded_and_stored(world: Any) -> None:
    class Odd(world.env):
        def _one(self, call: Any) -> Any:
            return super()._one(call).model_copy(update={"content": "half \ud83d a face"})

    assert answers(play(world, world.turn(("get", {})), env=Odd())) == ["half ? a face"]


def test_a_slow_tool_is_answered_timeout_and_the_clock_ends_the_episode(world: Any) -> None:
    run = play(world, world.turn(("add", {"n": 1})), env=world.env(slow_s=30.0), wall_s=0.05)
    assert answers(run) == ["Error: the tool took too long"]
    assert run.stop_reason == StopReason.ROLLOUT_TIMEOUT
    assert run.outcome is not None


def _random_turn(rng: random.Random, world: Any) -> ModelTurn | str:
    """Readable, broken, duplicate, unknown and surplus calls in any mixture, as text or as objects."""
    good = [("add", {"n": 1}), ("get", {}), ("add", {"n": -1}), ("nope", {}), ("add", "text"), ("get", [1])]
    picks = [rng.choice(good) for _ in range(rng.randint(1, 8))]
    if rng.random() < 0.4:
        calls = [(name, args if isinstance(args, dict) else "raw") for name, args in picks]
        return world.turn(*calls, ids=[rng.choice(["a", "b", "", "call_0_1", f"x{rng.random()}"]) for _ in calls])
    text = "".join(world.write(name, args) for name, args in picks)
    for _ in range(rng.randint(0, 3)):
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice(["", "}", '"', "<tool_call>", "</tool_call>", "<think>"]) + text[at + 1:]
    if rng.random() < 0.3:
        text += f'<tool_call>{{"name": "add", "arguments": {{"n": {rng.choice(_NO_JSON)}}}}}</tool_call>'
    return text if rng.random() < 0.5 else read_turn(text, rng.randint(0, 3))


_NO_JSON = ["NaN", "Infinity", "1e999", '"\\ud800"', "[" * 400 + "]" * 400, "9" * 4400]
"""Values that Python's reader takes, or breaks on, and that cannot be stored."""


def test_every_call_id_is_answered_exactly_once_under_300_fuzzed_turns(world: Any) -> None:
    turns = 0
    for seed in range(500):
        rng = random.Random(seed)
        script = [_random_turn(rng, world) for _ in range(20)]
        run = play(world, *script, calls_per_turn=rng.choice([None, 1, 4]), tool_calls=rng.choice([None, 12]))
        assert_answered_once(run)
        assert run.stop_reason != StopReason.ENGINE_ERROR, run.error
        to_json(list(run.messages)).encode()
        turns += run.counts["turns"]
        if turns >= 300:
            break
    assert turns >= 300
