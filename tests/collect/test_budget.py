"""Limits, clocks, announcements, loops, the last turn, and how much of a tool's result is shown."""

import asyncio
from typing import Any

import pytest

from agentsdpo.chat import ChatFormat
from agentsdpo.collect.answers import APEX_V1, APEX_V1_1, OutputLimit
from agentsdpo.collect.budget import announcement
from agentsdpo.collect.config import CollectConfig
from agentsdpo.collect.policy import EnginePolicy
from agentsdpo.collect.rollout import Rollout, run_episode
from agentsdpo.types import Budget, ModelTurn, StopReason, ToolResult, Usage


def play(world: Any, *turns: Any, env: Any = None, rules: dict[str, Any] | None = None, **budget: Any) -> Rollout:
    return asyncio.run(run_episode(env or world.env(), world.script(*turns), world.task(**budget), seed=0,
                                   episode_id="e", **(rules or {})))


def adds(world: Any, count: int) -> list[ModelTurn]:
    return [world.turn(("add", {"n": i})) for i in range(count)]


# ------------------------------------------------------------------------------------------------ final answer turn


@pytest.mark.parametrize(("budget", "reason", "said"), [
    ({"turns": 2}, StopReason.MAX_TURNS, "no turns left"),
    ({"tool_calls": 2}, StopReason.MAX_TOOL_CALLS, "no tool calls left"),
    ({"wall_s": 0.0}, StopReason.ROLLOUT_TIMEOUT, "no time left"),
    ({"working_s": 0.0}, StopReason.ROLLOUT_TIMEOUT, "no time left"),
])
def test_a_spent_budget_leaves_exactly_one_turn_for_the_answer(world: Any, budget: dict[str, Any], reason: StopReason,
                                                               said: str) -> None:
    played = 0 if "turns" not in budget and "tool_calls" not in budget else 2
    last = world.turn(("add", {"n": 5}), ("submit", {}), ("get", {}), ids=["x", "y", "z"])
    env = world.env()
    run = play(world, *adds(world, played), last, "never heard", env=env, rules={"final_turn": True}, **budget)
    assert run.stop_reason == reason
    assert env.done()
    assert env.total == (1 if played else 0)
    assert run.counts["turns"] == played + 1
    assert run.counts["final_turn"] == 1
    asks = [m for m in run.messages if m["role"] == "user" and "last turn" in m["content"]]
    assert len(asks) == 1
    assert said in asks[0]["content"]
    assert "by calling submit" in asks[0]["content"]
    refused, taken, after = run.messages[-3:]
    assert "only a final answer" in refused["content"]
    assert "only a final answer" in after["content"]
    assert taken["content"].startswith("total")


def test_the_last_turn_may_be_text_or_nothing(world: Any) -> None:
    rules = {"final_turn": True}
    run = play(world, *adds(world, 1), "It is 1.", rules=rules, turns=1)
    assert (run.answer, run.stop_reason) == ("It is 1.", StopReason.MAX_TURNS)
    run = play(world, *adds(world, 1), "", "never heard", rules=rules, turns=1)
    assert (run.answer, run.stop_reason, run.counts["turns"]) == (None, StopReason.MAX_TURNS, 2)
    assert run.outcome is not None


def test_without_the_rule_a_spent_budget_ends_at_once(world: Any) -> None:
    run = play(world, *adds(world, 9), turns=3)
    assert (run.stop_reason, run.counts["turns"], run.counts["final_turn"]) == (StopReason.MAX_TURNS, 3, 0)


def test_a_turn_cut_off_by_the_clock_can_be_asked_again_and_tokens_stay_append_only(world: Any, tiny_tokenizer: Any
                                                                                    ) -> None:
    chat = ChatFormat(tiny_tokenizer)

    class Slow(world.text_engine):
        async def complete(self, *args: Any, **named: Any) -> Any:
            if len(self.prompts) == 1 and "slept" not in self.released:
                self.released.append("slept")
                await asyncio.sleep(30)
            return await super().complete(*args, **named)

    engine = Slow(chat, world.write("add", {"n": 3}), "It is 3.")
    policy = EnginePolicy(engine, chat, CollectConfig(window=4000))
    run = asyncio.run(run_episode(world.env(), policy, world.task(wall_s=0.3), seed=0, episode_id="e", final_turn=True))
    assert (run.stop_reason, run.answer) == (StopReason.ROLLOUT_TIMEOUT, "It is 3.")
    (branch,) = run.branches
    assert [branch.token_ids[:call.start].tolist() for call in branch.calls] == engine.prompts
    text = chat.decode(branch.token_ids.tolist())
    assert text.count("total 3") == 1
    assert text.count("The budget is spent") == 1


def test_token_budgets_leave_a_last_turn_too(world: Any, tiny_tokenizer: Any) -> None:
    chat = ChatFormat(tiny_tokenizer)
    call, opening = world.write("get", {}), len(chat.open(asyncio.run(_opening(world)), world.env.tools))
    for budget, reason in (({"completion_tokens": 5}, StopReason.MAX_SAMPLED_TOKENS),
                           ({"prompt_tokens": opening}, StopReason.MAX_PROMPT_TOKENS),
                           ({"prompt_tokens": opening + 3}, StopReason.MAX_PROMPT_TOKENS)):
        engine = world.text_engine(chat, call, "It is 3.")
        policy = EnginePolicy(engine, chat, CollectConfig(window=4000))
        run = asyncio.run(run_episode(world.env(), policy, world.task(**budget), seed=0, episode_id="e",
                                      final_turn=True))
        assert (run.stop_reason, run.counts["final_turn"], run.answer) == (reason, 1, "It is 3.")


async def _opening(world: Any) -> Any:
    return await world.env().reset(world.task(), seed=0, episode_id="e")


# ------------------------------------------------------------------------------------------------------ the clocks


def test_working_time_leaves_queues_out_and_wall_time_does_not(world: Any) -> None:
    class Queued(world.script):
        async def act(self, ctx: Any, tools: Any) -> ModelTurn:
            await asyncio.sleep(0.02)
            turn = await super().act(ctx, tools)
            return turn.model_copy(update={"usage": Usage(working_s=0.001, prompt_tokens=7, retries=2, cost_usd=0.5)})

    task = world.task(working_s=10.0)
    run = asyncio.run(run_episode(world.env(slow_s=0.01), Queued(*adds(world, 3)), task, seed=0, episode_id="e"))
    assert run.wall_s > 0.08
    assert 0.03 < run.working_s < run.wall_s - 0.06
    assert (run.counts["prompt_tokens"], run.counts["retries"], run.cost_usd) == (28, 8, 2.0)
    run = asyncio.run(run_episode(world.env(slow_s=0.01), Queued(*adds(world, 3)), world.task(working_s=0.005), seed=0,
                                  episode_id="e"))
    assert (run.stop_reason, run.counts["turns"]) == (StopReason.ROLLOUT_TIMEOUT, 1)


def test_a_policy_of_its_own_time_outs_is_a_fault_not_a_spent_budget(world: Any) -> None:
    run = play(world, TimeoutError("the provider hung up"))
    assert run.stop_reason == StopReason.ENGINE_ERROR
    assert isinstance(run.fault, TimeoutError)


# -------------------------------------------------------------------------------------------------- announcements


def test_the_agent_is_told_its_budget_in_the_newest_message_only(world: Any) -> None:
    run = play(world, *adds(world, 4), rules={"announce": "every_2"}, turns=9, tool_calls=None, wall_s=None)
    marked = [(i, m["role"], m["content"].partition("\n\n")[2]) for i, m in enumerate(run.messages)
              if "[Budget" in m["content"]]
    assert marked == [(1, "user", "[Budget: 9 turns]"), (5, "tool", "[Budget left: 7 of 9 turns]"),
                      (9, "tool", "[Budget left: 5 of 9 turns]")]
    assert not any("[Budget" in m["content"] for m in play(world, *adds(world, 4), turns=9).messages)
    start = play(world, *adds(world, 4), rules={"announce": "start"}, turns=9, tool_calls=None, wall_s=None)
    assert sum("[Budget" in m["content"] for m in start.messages) == 1


def test_announcing_opens_no_branch(world: Any, tiny_tokenizer: Any) -> None:
    chat = ChatFormat(tiny_tokenizer)
    policy = EnginePolicy(world.text_engine(chat, *[world.write("get", {})] * 4, "3"), chat, CollectConfig(window=4000))
    run = asyncio.run(run_episode(world.env(), policy, world.task(), seed=0, episode_id="e", announce="every_1"))
    assert len(run.branches) == 1
    assert chat.decode(run.branches[0].token_ids.tolist()).count("[Budget left") == 4


def test_nothing_is_announced_where_nothing_is_limited() -> None:
    unlimited = Budget(turns=None, tool_calls=None, wall_s=None)
    from agentsdpo.collect.budget import Clock
    assert announcement("start", 0, unlimited, {}, Clock()) is None


# ---------------------------------------------------------------------------------------------------------- loops


def test_a_loop_is_the_longest_run_of_one_call_that_changes_nothing(world: Any) -> None:
    get, note = world.turn(("get", {})), world.turn(("add", {"n": 0}))
    run = play(world, get, get, get, note, get, get)
    assert (run.counts["longest_repeat"], run.counts["repeats"]) == (3, 3)

    class Hashing(world.env):
        def _one(self, call: Any) -> ToolResult:
            return super()._one(call).model_copy(update={"state_hash": str(self.total)})

    more, same = world.turn(("add", {"n": 1})), world.turn(("add", {"n": 0}))
    assert play(world, more, more, more, more, env=Hashing()).counts["longest_repeat"] == 1
    assert play(world, more, same, same, same, env=Hashing()).counts["longest_repeat"] == 3
    assert play(world, *[world.turn(("fly", {}))] * 2).counts["longest_repeat"] == 2


def test_a_loop_stops_the_episode_only_on_request(world: Any) -> None:
    turns = [world.turn(("get", {}))] * 5
    assert play(world, *turns).stop_reason == StopReason.COMPLETED
    run = play(world, *turns, max_repeat=3)
    assert (run.stop_reason, run.counts["turns"]) == (StopReason.MAX_REPEAT, 3)
    run = play(world, *turns[:3], "0", rules={"final_turn": True}, max_repeat=3)
    assert (run.stop_reason, run.answer) == (StopReason.MAX_REPEAT, "0")


# ------------------------------------------------------------------------------------------------- size of results


def test_results_are_cut_as_the_profiles_say() -> None:
    def cut(limit: OutputLimit, text: str) -> ToolResult:
        return limit.apply(ToolResult(call_id="c", content=text))

    assert cut(APEX_V1, "x" * 96_000).truncated is None
    long = cut(APEX_V1, "a" * 50_000 + "b" * 50_000)
    assert long.truncated == (25_000, 100_000)
    assert long.content.startswith("a" * 20_000 + "\n[75000 characters left out]\n")
    assert long.content.endswith("b" * 5_000)
    refused = cut(APEX_V1, "x" * 200_001)
    assert (refused.is_error, refused.truncated) == (True, (0, 200_001))
    assert "200001 characters" in refused.content
    lines = cut(APEX_V1_1, "row\n" * 300)
    assert lines.content.startswith("row\n" * 199 + "row\n[")
    assert lines.truncated == (799, 1200)
    assert cut(APEX_V1_1, "y" * 40_000).truncated == (32_768, 40_000)
    assert cut(OutputLimit(), "z" * (50 << 20)).truncated == (200_000, 50 << 20)


def test_what_the_loop_shows_is_cut(world: Any) -> None:
    class Loud(world.env):
        def _one(self, call: Any) -> ToolResult:
            return super()._one(call).model_copy(update={"content": "x" * 5000})

    run = play(world, world.turn(("get", {})), env=Loud(), rules={"output": OutputLimit(chars=100)})
    (message,) = [m for m in run.messages if m["role"] == "tool"]
    assert message["content"] == "x" * 100 + "\n[4900 characters left out]"


def test_settings_reach_the_loop(world: Any) -> None:
    from agentsdpo.collect.collector import Collector

    config = CollectConfig(max_turns=2, final_turn=True, announce="start", max_repeat=5)
    (episode,) = Collector(world.suite(), lambda task, seed: world.script(*adds(world, 2), "2"), config).collect(
        "train", [1])
    assert episode.stop_reason == StopReason.MAX_TURNS
    assert episode.metadata["answer"] == "2"
    assert "[Budget: 2 turns" in episode.messages[1]["content"]
    with pytest.raises(ValueError, match="pattern"):
        CollectConfig(announce="sometimes")
