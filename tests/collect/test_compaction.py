"""Compaction: the model's prompts are the branches, a token carries loss once, calls keep their answers."""

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentsdpo.chat import ChatFormat
from agentsdpo.collect.collector import Collector
from agentsdpo.collect.compaction import HEADING, compactor
from agentsdpo.collect.config import CollectConfig, CompactionConfig
from agentsdpo.collect.metrics import collect_metrics
from agentsdpo.collect.policy import EnginePolicy
from agentsdpo.collect.rollout import Rollout, run_episode
from agentsdpo.errors import ConfigError
from agentsdpo.hint.render import place
from agentsdpo.learn.batch import loss_weights
from agentsdpo.learn.config import LearnConfig
from agentsdpo.learn.rows import TrainRow, admit
from agentsdpo.replay import ReplayStore, Spool
from agentsdpo.replay.rules import check_episode
from agentsdpo.replay.salvage import salvage
from agentsdpo.types import Completion, Episode, Hint, StopReason, TokenKind
from tests.test_calls import TEMPLATES, chat_of

WINDOW = 1600


class Heard:
    """Plays with a seeded engine and keeps every prompt, completion and message list that passes by."""

    def __init__(self, world: Any, tokenizer: Any, manager: str, *, summary: str = "The total is known.", seed: int = 0,
                 turns: int = 30, window: int = WINDOW, env: Any = None, **settings: Any) -> None:
        self.chat, heard = ChatFormat(tokenizer), self
        self.prompts: list[list[int]] = []
        self.completions: list[Completion] = []
        self.seen: list[list[Any]] = []

        class Engine(world.seeded_engine):
            async def complete(self, prompt_ids: Any, sampling: Any, *, session: str) -> Completion:
                heard.prompts.append(list(prompt_ids))
                done = await super().complete(prompt_ids, sampling, session=session)
                heard.completions.append(done)
                return done

        class Watched(EnginePolicy):
            async def act(self, ctx: Any, tools: Any) -> Any:
                heard.seen.append(list(ctx.messages))
                return await super().act(ctx, tools)

        policy = Watched(Engine(self.chat, summary), self.chat, CollectConfig(window=window))
        config = CompactionConfig(manager=manager, **{"keep_turns": 2, **settings})  # type: ignore[arg-type]
        self.run: Rollout = asyncio.run(run_episode(
            env or world.noting_env(), policy, world.task(turns=turns), seed=seed, episode_id="e",
            compaction=compactor(config)))

    def rows(self) -> list[TrainRow]:
        return [TrainRow(branch=branch, hint_ids=(1, 2, 3), episode_id="e", train_allowed=True)
                for branch in self.run.branches]


@pytest.mark.parametrize("manager", ["notes", "summary"])
def test_branches_are_exactly_what_the_model_saw(world: Any, tiny_tokenizer: Any, manager: str) -> None:
    for seed in range(3):
        heard = Heard(world, tiny_tokenizer, manager, seed=seed)
        branches = heard.run.branches
        assert len(branches) == heard.run.counts["compactions"] + 1 >= 3
        prompts = [b.token_ids[:c.start].tolist() for b in branches for c in b.calls]
        assert prompts == heard.prompts
        assert [b.token_ids[c.start:c.end].tolist() for b in branches for c in b.calls] == [
            list(done.token_ids) for done in heard.completions]
        assert max(map(len, prompts)) <= WINDOW
        assert [b.fork_reason for b in branches] == [None, *["compaction"] * (len(branches) - 1)]
        assert [b.parent_branch_id for b in branches] == [None, *range(len(branches) - 1)]
        episode = Episode(episode_id="e", task_id="t", env_id="counter", branches=branches, train_allowed=True,
                          stop_reason=heard.run.stop_reason, messages=heard.run.messages, vocab_size=1000)
        check_episode(episode)


@pytest.mark.parametrize("manager", ["notes", "summary"])
def test_a_sampled_token_carries_loss_in_one_branch_and_the_learner_reads_it_so(world: Any, tiny_tokenizer: Any,
                                                                               manager: str) -> None:
    heard = Heard(world, tiny_tokenizer, manager)
    admitted = admit(heard.rows(), 5, LearnConfig(), window=4000, vocab_size=1000)
    assert not admitted.refused
    learnt = [int(t) for row in admitted.rows for t in row.ids[row.position]]
    assert learnt == [t for done in heard.completions for t in done.token_ids]
    logps = np.concatenate([row.behaviour_logp for row in admitted.rows])
    np.testing.assert_allclose(logps, [lp for done in heard.completions for lp in done.logprobs], atol=1e-6)
    for row in admitted.rows[1:]:  # old turns that were kept are context in the new branch
        first = row.row.branch.calls[0].start
        assert set(row.row.branch.token_kind[:first].tolist()) == {TokenKind.CONTEXT}


def test_an_episode_counts_once_however_many_branches_it_has(world: Any, tiny_tokenizer: Any) -> None:
    rows = admit(Heard(world, tiny_tokenizer, "notes").rows(), 5, LearnConfig(), window=4000, vocab_size=1000).rows
    weight = np.concatenate(loss_weights(rows, LearnConfig(normaliser="episode")))
    assert len(rows) > 2
    assert weight.sum() == pytest.approx(1.0)
    assert np.ptp(weight) < 1e-9


@pytest.mark.parametrize("manager", ["notes", "summary"])
def test_no_answer_loses_its_call_and_the_whole_history_is_kept(world: Any, tiny_tokenizer: Any, manager: str) -> None:
    heard = Heard(world, tiny_tokenizer, manager)
    for messages in heard.seen:
        owed: list[str] = []
        for message in messages:
            if message["role"] == "tool":
                assert message["tool_call_id"] == owed.pop(0)
            else:
                assert not owed
                owed = [call["id"] for call in message.get("tool_calls", ())]
        assert not owed
        assert messages[:2] == list(heard.run.messages[:2])
    assert len(heard.run.messages) > len(heard.seen[-1]) + 20
    ids = Counter(call["id"] for m in heard.run.messages for call in m.get("tool_calls", ()))
    assert max(ids.values()) == 1
    assert sum(m["role"] == "assistant" for m in heard.run.messages) == heard.run.counts["turns"] == 30


def test_notes_come_back_as_one_answer_the_newest_of_each_in_the_order_of_writing(world: Any,
                                                                                  tiny_tokenizer: Any) -> None:
    heard = Heard(world, tiny_tokenizer, "notes", seed=1)
    last = heard.seen[-1]
    call, listing = last[2]["tool_calls"][0], last[3]
    assert (call["function"]["name"], call["function"]["arguments"]) == ("note_get", {"key": ""})
    notes: dict[str, str] = {}
    for message in heard.run.messages:
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] == "note_add":
                notes[call["function"]["arguments"]["key"]] = call["function"]["arguments"]["text"]
    before = dict(line.split() for line in listing["content"].splitlines())
    assert list(before) == [key for key in notes if key in before] != sorted(before)


def test_without_notes_the_history_is_only_cut(world: Any, tiny_tokenizer: Any) -> None:
    heard = Heard(world, tiny_tokenizer, "notes", env=world.env())
    assert heard.run.counts["compactions"] > 1
    assert heard.seen[-1][2]["role"] == "assistant"
    assert "notes_" not in str(heard.seen[-1])


def test_an_accepted_summary_trains_and_stands_in_the_next_prompt(world: Any, tiny_tokenizer: Any) -> None:
    heard = Heard(world, tiny_tokenizer, "summary")
    for old, new in zip(heard.run.branches, heard.run.branches[1:], strict=False):
        last = old.calls[-1]
        assert heard.chat.decode(old.token_ids[last.start:last.end].tolist()).startswith("The total is known.")
        assert set(old.token_kind[last.start:last.end].tolist()) == {TokenKind.SAMPLED}
        opening = heard.chat.decode(new.token_ids[:new.calls[0].start].tolist())
        assert HEADING + "The total is known." in opening
    assert heard.run.counts["prompt_tokens"] == sum(map(len, heard.prompts))
    assert heard.run.counts["completion_tokens"] == sum(len(done.token_ids) for done in heard.completions)


def test_a_hint_about_a_turn_is_not_read_for_the_summary_that_was_written_before_it(
        world: Any, tiny_tokenizer: Any) -> None:
    """Both have the number of the turn; the summary stands in the branch that it closes."""
    heard = Heard(world, tiny_tokenizer, "summary")
    old, new = heard.run.branches[:2]
    turn = old.calls[-1].turn
    assert turn == new.calls[0].turn
    about = Hint(turns=((turn - 1, "now look"), (turn, "now add")), source="next_step", author="judge")
    assert [one.turns for one in place(heard.chat, about, old)] == [{turn - 1}]
    assert [one.turns for one in place(heard.chat, about, new)] == [{turn}]
    whole = place(heard.chat, about.model_copy(update={"text": "cents, always"}), old)[0]
    assert turn in whole.turns, "what is said of the whole episode is for its summaries too"


@pytest.mark.parametrize("summary", ['<tool_call>{"name": "get", "arguments": {}}</tool_call>', "", "word " * 900,
                                     'cut "a'])
def test_a_summary_that_is_none_is_recorded_without_loss_and_notes_stand_in(world: Any, tiny_tokenizer: Any,
                                                                           summary: str) -> None:
    heard = Heard(world, tiny_tokenizer, "summary", summary=summary, summary_tokens=200)
    old, new = heard.run.branches[:2]
    last = old.calls[-1]
    assert last.end == len(old.token_ids)
    assert set(old.token_kind[last.start:last.end].tolist()) == {TokenKind.MASKED}
    assert last.untrainable_reason is None
    assert HEADING not in heard.chat.decode(new.token_ids.tolist())
    assert "note_get" in heard.chat.decode(new.token_ids[:new.calls[0].start].tolist())


def test_what_cannot_be_cut_down_overflows_as_before(world: Any, tiny_tokenizer: Any) -> None:
    class Loud(world.noting_env):
        def _one(self, call: Any) -> Any:
            return super()._one(call).model_copy(update={"content": "x " * 1500})

    run = Heard(world, tiny_tokenizer, "notes", env=Loud()).run
    assert run.stop_reason == StopReason.CONTEXT_OVERFLOW
    assert run.outcome is not None


def test_more_turns_are_left_out_when_those_to_keep_are_long(world: Any, tiny_tokenizer: Any) -> None:
    heard = Heard(world, tiny_tokenizer, "notes", keep_turns=100)
    limit = 0.7 * WINDOW
    for branch in heard.run.branches[1:]:
        assert branch.calls[0].start <= limit
    kept = [sum(m["role"] == "assistant" for m in messages) for messages in heard.seen]
    assert max(kept) > 5


def test_scripted_agents_have_no_window_and_summaries_need_who_writes_them(world: Any) -> None:
    class Sized(world.script):
        window = 100

        def prompt_size(self, ctx: Any, tools: Any) -> int:
            return 40 * len(ctx.messages)

    def play(policy: Any, manager: Any) -> Rollout:
        made = compactor(CompactionConfig(manager=manager, keep_turns=1))
        return asyncio.run(run_episode(world.env(), policy, world.task(), seed=0, episode_id="e", compaction=made))

    turns = [world.turn(("add", {"n": i})) for i in range(4)]
    assert play(world.script(*turns), "summary").counts["compactions"] == 0
    assert play(Sized(*turns), "notes").counts["compactions"] == 3
    with pytest.raises(ConfigError, match="Sized cannot write one"):
        play(Sized(*turns), "summary")


def test_a_compacted_episode_goes_through_journal_and_store(world: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    chat, store = ChatFormat(tiny_tokenizer), ReplayStore.open(tmp_path / "store")

    class Suite(world.suite):
        def env(self) -> Any:
            return world.noting_env()

    config = CollectConfig(window=WINDOW, max_turns=20, compaction=CompactionConfig(manager="summary", keep_turns=2))
    collector = Collector.of_engine(Suite(), world.seeded_engine(chat), chat, config, run_id="r", spool=Spool(store))
    # The suite's own budget of six turns is too short for a window to fill.
    collector.suite.task = lambda split, index: world.task(turns=20).model_copy(  # type: ignore[method-assign]
        update={"train_allowed": True})
    (episode,) = collector.collect("train", [3])
    assert episode.metadata["compactions"] >= 1
    (path,) = store.root.glob("spool/*/*/*.arrows")
    left = salvage(path).episode
    assert left is not None
    store.append([episode])
    for again in (left, store.episode(episode.episode_id)):
        assert again.messages == episode.messages
        assert [b.fork_reason for b in again.branches] == [b.fork_reason for b in episode.branches]
        for old, new in zip(episode.branches, again.branches, strict=True):
            assert old.token_ids.tolist() == new.token_ids.tolist()
            assert old.token_kind.tolist() == new.token_kind.tolist()
    metrics = collect_metrics([episode])
    assert metrics["collect/branches/mean"] == len(episode.branches)
    assert metrics["collect/fork/compaction"] == len(episode.branches) - 1
    assert 0.0 < metrics["collect/merge_ratio"] < 1.0


REFUSED = {  # of Qwen3-Coder's template, a broken call; of Llama's, two in a turn
    "xml": "<tool_call>\n<function=add>\n<parameter=n>\n1\n",
    "json": '{"name": "get", "parameters": {}}; {"name": "add", "parameters": {"n": 2}}'}
TAKEN = {"xml": "<tool_call>\n<function=get>\n</function>\n</tool_call>", "json": '{"name": "get", "parameters": {}}'}


@pytest.mark.parametrize("form", REFUSED)
def test_turns_that_the_template_would_not_render_again_are_compacted_all_the_same(
        world: Any, tiny_tokenizer: Any, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    once = "{{- raise_exception('one at a time') if message['tool_calls'] | length > 1 -}}"
    monkeypatch.setitem(TEMPLATES, "strict", once + TEMPLATES[form])
    chat = chat_of(tiny_tokenizer, "strict")
    engine = world.text_engine(chat, *[REFUSED[form], TAKEN[form]] * 20)
    run = asyncio.run(run_episode(
        world.noting_env(), EnginePolicy(engine, chat, CollectConfig(window=WINDOW)), world.task(turns=20), seed=0,
        episode_id="e", compaction=compactor(CompactionConfig(manager="notes", keep_turns=2))))
    assert run.error == ""
    assert run.counts["compactions"]
    assert run.counts["valid_calls"] == {"xml": 10, "json": 30}[form]
