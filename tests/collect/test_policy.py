"""The token record: prompts only grow, kinds and hashes are right, forks happen only where history was rewritten."""

import asyncio
import hashlib
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from agentsdpo.chat import ChatFormat
from agentsdpo.collect.config import CollectConfig
from agentsdpo.collect.policy import Context, EnginePolicy
from agentsdpo.collect.rollout import Rollout, run_episode
from agentsdpo.errors import TruncatedSampling
from agentsdpo.types import StopReason, TokenKind
from tests.test_calls import chat_of

THINKING = """\
{%- for m in messages -%}
  {%- if m.role == 'tool' -%}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{ '<|im_start|>user' }}{%- endif -%}
    {{ '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{ '<|im_end|>\\n' }}{%- endif -%}
  {%- elif m.role == 'assistant' -%}
    {{ '<|im_start|>assistant\\n' + m.content.split('</think>')[-1] + '<|im_end|>\\n' }}
  {%- else -%}
    {{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{ '<|im_start|>assistant\\n' }}
  {%- if enable_thinking is false -%}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}
  {%- if enable_thinking is true -%}{{ '<think>\\n' }}{%- endif -%}
{%- endif -%}
"""
"""Qwen3's manners: old thoughts are stripped when rendered again, thinking off is an empty block."""


def play(world: Any, chat: ChatFormat, *texts: str, config: CollectConfig | None = None,
         **budget: Any) -> tuple[Rollout, Any]:
    engine = world.text_engine(chat, *texts)
    policy = EnginePolicy(engine, chat, config or CollectConfig(window=4000))
    run = asyncio.run(run_episode(world.env(), policy, world.task(**budget), seed=5, episode_id="e"))
    return run, engine


def assert_prompts_grow(run: Rollout, engine: Any) -> None:
    branch = run.branches[-1]
    ids = branch.token_ids.tolist()
    for prompt, call in zip(engine.prompts, branch.calls, strict=True):
        assert ids[:call.start] == prompt
        assert call.prompt_sha256 == hashlib.sha256(np.asarray(prompt, "<i4").tobytes()).hexdigest()


def test_tokens_equal_one_rendering_of_the_whole_conversation(world: Any, tiny_tokenizer: Any) -> None:
    chat = ChatFormat(tiny_tokenizer)
    texts = [world.write("add", {"n": 1}), world.write("get", {}) + world.write("add", {"n": 2}), "It is 3."]
    run, engine = play(world, chat, *texts)
    (branch,) = run.branches
    assert_prompts_grow(run, engine)
    answers = iter(m["content"] for m in run.messages if m["role"] == "tool")
    messages = [*run.messages[:2]]
    for text, n in zip(texts, (1, 2, 0), strict=True):
        messages.append({"role": "assistant", "content": text})
        messages += [{"role": "tool", "content": next(answers)} for _ in range(n)]
    rendered = chat.open(messages, world.env.tools)
    tail = chat.encode("\n<|im_start|>assistant\n")
    assert branch.token_ids.tolist() == rendered[:-len(tail)]
    assert branch.n_sampled == branch.n_trainable == sum(len(chat.encode(t)) + 1 for t in texts)
    assert set(branch.token_kind.tolist()) == {TokenKind.CONTEXT, TokenKind.SAMPLED, TokenKind.TOOL}
    assert branch.policy_versions == (3, 3)
    assert len({s.seed for s in engine.samplings}) == 3
    assert engine.released == ["e/0"]


def test_calls_say_when_they_were_asked_for_and_answered(world: Any, tiny_tokenizer: Any) -> None:
    began = datetime.now(UTC)
    run, _ = play(world, ChatFormat(tiny_tokenizer), world.write("add", {"n": 1}), "Done.")
    times = [time for call in run.branches[0].calls for time in (call.t_request, call.t_done) if time]
    assert len(times) == 4
    assert [began, *times] == sorted([began, *times])


def test_calls_are_read_in_the_form_that_the_template_writes(world: Any, tiny_tokenizer: Any) -> None:
    chat = chat_of(tiny_tokenizer, "xml")
    xml = "<tool_call>\n<function=add>\n<parameter=n>\n3\n</parameter>\n</function>\n</tool_call>"
    run, engine = play(world, chat, "Adding.\n" + xml, world.write("add", {"n": 1}), "It is 3.")
    assert (run.stop_reason, run.answer) == (StopReason.COMPLETED, "It is 3.")
    assert (run.counts["valid_calls"], run.counts["calls_refused"]) == (1, 1), "another form is answered, not run"
    spoken = [message for message in run.messages if message["role"] == "assistant"]
    assert spoken[0]["content"] == "Adding."
    assert spoken[0]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"n": 3}}
    assert_prompts_grow(run, engine)


def test_a_model_of_another_form_may_speak_of_tags(world: Any, tiny_tokenizer: Any) -> None:
    said = 'They write <tool_call>{"name": "add", "arguments": {"n": 1}}</tool_call> there.'
    run, _ = play(world, chat_of(tiny_tokenizer, "json"), '{"name": "add", "parameters": {"n": 3}}', said)
    assert (run.stop_reason, run.answer) == (StopReason.COMPLETED, said)
    assert (run.counts["valid_calls"], run.counts["calls_refused"]) == (1, 0)


def test_a_cut_completion_is_closed_by_a_forced_token(world: Any, tiny_tokenizer: Any) -> None:
    chat = ChatFormat(tiny_tokenizer)
    run, engine = play(world, chat, '<tool_call>{"name": "a...', "", "3")
    branch = run.branches[0]
    forced = np.flatnonzero(branch.token_kind == TokenKind.FORCED)
    assert forced.tolist() == [branch.calls[0].end]
    assert branch.token_ids[forced[0]] == chat.eos_id
    assert_prompts_grow(run, engine)
    assert run.counts["truncated"] == 1


@pytest.mark.parametrize("enable_thinking", [None, False, True])
def test_thoughts_stay_in_the_tokens_and_out_of_the_parse(world: Any, tiny_tokenizer: Any,
                                                          enable_thinking: bool | None) -> None:
    told = "" if enable_thinking is None else f"{{%- set enable_thinking = {str(enable_thinking).lower()} -%}}\n"
    original = tiny_tokenizer.chat_template
    tiny_tokenizer.chat_template = told + THINKING
    try:
        chat = ChatFormat(tiny_tokenizer)
        opening = "" if enable_thinking else "<think>"
        thought = f"{opening}maybe {world.write('submit', {})}</think>\n"
        run, engine = play(world, chat, thought + world.write("add", {"n": 3}), thought + "Three.")
    finally:
        tiny_tokenizer.chat_template = original
    assert run.answer == "Three."
    assert run.outcome is not None
    assert run.outcome.final == b"3"
    assert len(run.branches) == 1
    assert_prompts_grow(run, engine)
    assert chat.decode(run.branches[0].token_ids.tolist()).count("maybe") == 2


def test_window_and_token_budgets(world: Any, tiny_tokenizer: Any) -> None:
    chat = ChatFormat(tiny_tokenizer)
    call = world.write("get", {})
    opening = len(play(world, chat, "3")[1].prompts[0])
    run, _ = play(world, chat, call, config=CollectConfig(window=opening + 2 + len(chat.encode(call))))
    assert run.stop_reason == StopReason.CONTEXT_OVERFLOW
    assert len(run.branches[0].calls) == 1
    n = len(chat.encode(call)) + 1
    run, engine = play(world, chat, call, call, call, completion_tokens=2 * n)
    assert run.stop_reason == StopReason.MAX_SAMPLED_TOKENS
    assert [s.max_tokens for s in engine.samplings] == [min(256, 2 * n), n]
    run, _ = play(world, chat, call, call, prompt_tokens=opening)
    assert run.stop_reason == StopReason.MAX_PROMPT_TOKENS
    assert run.counts["prompt_tokens"] == opening


def test_a_replaced_history_forks_and_old_tokens_become_context(world: Any, tiny_tokenizer: Any) -> None:
    chat = ChatFormat(tiny_tokenizer)
    engine = world.text_engine(chat, "one", "two", "three")
    policy = EnginePolicy(engine, chat, CollectConfig())
    ctx = Context("e", 0, [{"role": "system", "content": "s"}, {"role": "user", "content": "count"}])

    async def run() -> None:
        for turn in range(3):
            ctx.turn = turn
            await policy.act(ctx, ())
            ctx.messages += [{"role": "assistant", "content": "x"}, {"role": "user", "content": "more"}]
            if turn == 1:
                ctx.messages, ctx.fork_reason = [*ctx.messages[:2], {"role": "user", "content": "sum"}], "compaction"

    asyncio.run(run())
    first, second = ctx.builder.finish()
    assert (second.parent_branch_id, second.fork_reason) == (0, "compaction")
    assert second.fork_at is not None
    assert 0 < second.fork_at < first.calls[0].start
    assert first.token_ids[:second.fork_at].tolist() == second.token_ids[:second.fork_at].tolist()
    assert len(first.calls) == 2
    assert len(second.calls) == 1
    assert not (second.token_kind[:second.calls[0].start] == TokenKind.SAMPLED).any()
    assert engine.released == ["e/0"]


def test_greedy_is_recorded_but_cannot_be_trained(world: Any, tiny_tokenizer: Any) -> None:
    run, _ = play(world, ChatFormat(tiny_tokenizer), "3", config=CollectConfig(temperature=0.0))
    branch = run.branches[0]
    assert branch.calls[0].untrainable_reason == "greedy"
    assert branch.n_trainable == 0
    assert branch.n_sampled > 0
    assert np.isfinite(branch.logprobs[branch.token_kind == TokenKind.MASKED]).all()


def test_truncated_sampling_without_kept_sets_is_refused_for_training(world: Any, tiny_tokenizer: Any) -> None:
    chat = ChatFormat(tiny_tokenizer)
    engine, config = world.text_engine(chat, "3"), CollectConfig(top_p=0.9)
    with pytest.raises(TruncatedSampling, match="top_p=0.9"):
        EnginePolicy(engine, chat, config)
    EnginePolicy(engine, chat, config, training=False)
