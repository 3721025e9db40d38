"""Chat through the proxy: what the engine is asked, what the client gets, and what the store holds afterwards."""

import threading

import numpy as np
import pytest
from proxy_stack import Json, Stack, said

from agentsdpo.replay.store import ReplayStore
from agentsdpo.replay.upkeep.verification import verify
from agentsdpo.types import StopReason, TokenKind

TOOL = {"type": "function", "function": {"name": "note_get", "description": "Read.", "parameters": {"type": "object"}}}


def test_a_conversation_is_one_branch_token_by_token(stack: Stack) -> None:
    stack.start()
    first = stack.ask("Hello.", conversation="c-1")
    second = stack.ask("Hello.", said(first), "And now?", conversation="c-1", seed=5, temperature=0.7)
    assert [first["choices"][0]["message"]["content"], second["choices"][0]["message"]["content"]] == [
        "reply 1", "reply 2"]
    assert second["usage"]["completion_tokens"] == len(stack.chat.encode("reply 2")) + 1
    assert stack.close("c-1") == 1
    (episode,) = stack.episodes()
    (branch,) = episode.branches
    prompts = [request["token_ids"] for request in stack.engine.requests]
    assert branch.token_ids[:len(prompts[1])].tolist() == prompts[1]
    assert prompts[1][:len(prompts[0])] == prompts[0]
    assert [call.sampling.seed for call in branch.calls][1] == 5
    assert branch.calls[1].sampling.temperature == 0.7
    assert [call.versions[0].version for call in branch.calls] == [0, 0]
    assert branch.n_trainable == branch.n_sampled == sum(c.end - c.start for c in branch.calls)
    assert np.allclose(branch.logprobs[branch.calls[0].start], -0.25)
    assert stack.chat.decode(branch.token_ids.tolist()).count("reply") == 2
    assert (episode.stop_reason, episode.train_allowed, episode.task_id) == (StopReason.COMPLETED, True, "c-1")
    assert episode.messages[-1]["content"] == "reply 2"
    assert not verify(ReplayStore.open(stack.store, create=False), level="deep").problems


def test_the_users_next_message_becomes_the_hint(stack: Stack) -> None:
    stack.start()
    first = stack.ask("Sum?", conversation="c")
    stack.ask("Sum?", said(first), "In thousands, please.", conversation="c")
    stack.close("c")
    (episode,) = stack.episodes()
    assert episode.hint is not None
    assert (episode.hint.turns, episode.hint.source) == (((0, "In thousands, please."),), "user")


def test_history_alone_is_enough_to_know_a_conversation_again(stack: Stack) -> None:
    stack.start()
    first = stack.ask("Hello.")
    stack.ask("Hello.")  # somebody else, with the same words
    second = stack.ask("Hello.", said(first), "More.")
    names = {answer["id"].split("-", 1)[1].split(".")[0] for answer in (first, second)}
    assert stack.proxy is not None
    assert len(stack.proxy.house.rooms[""].open) == 2
    stack.stop_proxy()
    assert sorted(len(e.branches[0].calls) for e in stack.episodes()) == [1, 2]
    assert len(names) <= 2


def test_tools_go_out_as_calls_and_come_back_as_tool_tokens(stack: Stack) -> None:
    wait = 'Wait.\n<tool_call>\n{"name": "note_get", "arguments": {"path": "/a"}}\n</tool_call>'
    stack.engine.say = lambda prompt: "done" if "<tool_response>" in prompt else wait
    stack.start()
    first = stack.ask("Read.", conversation="t", tools=[TOOL])
    choice = first["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert (call["function"]["name"], call["function"]["arguments"]) == ("note_get", '{"path": "/a"}')
    answer = {"role": "tool", "tool_call_id": call["id"], "content": "Error: no such file"}
    second = stack.ask("Read.", said(first), answer, conversation="t", tools=[TOOL])
    assert second["choices"][0]["message"]["content"] == "done"
    stack.close("t")
    (episode,) = stack.episodes()
    (branch,) = episode.branches
    tool = branch.token_ids[branch.token_kind == TokenKind.TOOL]
    assert "no such file" in stack.chat.decode(tool.tolist())
    assert episode.hint is not None
    assert episode.hint.turns == ((0, "A tool failed after this: Error: no such file"),)
    assert episode.tools[0]["function"]["name"] == "note_get"


@pytest.mark.parametrize("arguments", ["[1]", '"{\\"path\\": \\"é\\"}"', "null"])
def test_a_call_whose_arguments_are_no_object_comes_back_as_the_same(stack: Stack, arguments: str) -> None:
    """It goes out with what the model gave as arguments, and not with all of its text, which is an object."""
    stack.start()
    call = f'<tool_call>\n{{"name": "note_get", "arguments": {arguments}}}\n</tool_call>'
    stack.engine.say = lambda prompt: "done" if "<tool_response>" in prompt else call
    first = stack.ask("Read.", conversation="t", tools=[TOOL])
    (sent,) = said(first)["tool_calls"]
    assert sent["function"] == {"name": "note_get", "arguments": arguments}
    answer = {"role": "tool", "tool_call_id": sent["id"], "content": "not an object"}
    stack.ask("Read.", said(first), answer, conversation="t", tools=[TOOL])
    stack.close("t")
    (episode,) = stack.episodes()
    assert [branch.fork_reason for branch in episode.branches] == [None]


def test_a_whole_number_comes_back_as_the_same_however_it_is_written(stack: Stack) -> None:
    """JavaScript has one kind of numbers: its clients send 1250 for the 1250.0 they were told."""
    stack.engine.say = lambda prompt: "done" if "<tool_response>" in prompt else (
        '<tool_call>\n{"name": "note_get", "arguments": {"x": 1250.0, "y": [1e3, 0.5, "1.0"]}}\n</tool_call>')
    stack.start()
    first = said(stack.ask("Read.", conversation="t", tools=[TOOL]))
    first["tool_calls"][0]["function"]["arguments"] = '{"x":1250,"y":[1000,0.5,"1.0"]}'
    answer = {"role": "tool", "tool_call_id": "t", "content": "ok"}
    stack.ask("Read.", first, answer, conversation="t", tools=[TOOL])
    stack.close("t")
    assert [branch.fork_reason for branch in stack.episodes()[0].branches] == [None]


def test_broken_calls_stay_text(stack: Stack) -> None:
    stack.engine.say = lambda prompt: "<tool_call>{\"name\": </tool_call>"
    stack.start()
    message = stack.ask("Read.", tools=[TOOL])["choices"][0]["message"]
    assert "tool_calls" not in message
    assert message["content"].startswith("<tool_call>")


@pytest.mark.parametrize(("change", "reason"), [
    (lambda m: [m[0], {"role": "user", "content": "Summary: all said."}], "compaction"),
    (lambda m: [{"role": "system", "content": "You are another."}, {"role": "user", "content": "x"}], "subagent"),
    (lambda m: [*m[:2], {"role": "assistant", "content": "my words"}, m[3], m[3], m[3]], "template_rewrite"),
    (lambda m: [*m[:2], *m[4:]], "compaction"), (lambda m: m[:2], "retry")])
def test_rewritten_histories_open_branches_with_their_reason(stack: Stack, change: object, reason: str) -> None:
    stack.start()
    history: list[Json] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One."}]
    for words in ("Two.", "Three."):
        answer = stack.ask(*history, conversation="c")
        history += [said(answer), {"role": "user", "content": words}]
    stack.ask(*history, conversation="c")
    stack.ask(*change(history), conversation="c")  # pyright: ignore[reportCallIssue]
    stack.close("c")
    (episode,) = stack.episodes()
    assert [branch.fork_reason for branch in episode.branches] == [None, reason]
    child = episode.branches[1]
    assert child.parent_branch_id == 0
    edits = [one["text"] for one in episode.metadata["feedback"] if one["kind"] == "edit"]
    assert edits == (["my words"] if reason == "template_rewrite" else [])
    assert child.calls[0].start > (child.fork_at or 0) - 1
    if reason == "retry":
        assert child.token_ids[:child.calls[0].start].tolist() == episode.branches[0].token_ids[
            :episode.branches[0].calls[0].start].tolist()


def test_branches_are_gone_on_with_in_turn(stack: Stack) -> None:
    """A main agent and its sub-agent, asked in turn under one name, are two branches and not one per request."""
    stack.start()
    main: list[Json] = [{"role": "system", "content": "Main."}, {"role": "user", "content": "Go."}]
    sub: list[Json] = [{"role": "system", "content": "Sub."}, {"role": "user", "content": "Look."}]
    for i in range(3):
        for history in (main, sub):
            history += [said(stack.ask(*history, conversation="c")), {"role": "user", "content": f"step {i}"}]
    stack.close("c")
    (episode,) = stack.episodes()
    assert [len(branch.calls) for branch in episode.branches] == [3, 3]
    assert episode.branches[1].fork_reason == "subagent"


@pytest.mark.parametrize(("path", "bodies", "reason"), [
    ("chat/completions", [{"messages": [{"role": "system", "content": words}, {"role": "user", "content": "Go."}]}
                          for words in ("Main.", "Sub.")], "subagent"),
    ("completions", [{"prompt": "Main."}, {"prompt": "Sub."}], "template_rewrite")])
def test_first_requests_at_once_are_branches_with_their_reason(stack: Stack, path: str, bodies: list[Json], reason: str
                                                               ) -> None:
    stack.engine.delay_s = 0.3
    stack.start()
    threads = [threading.Thread(target=stack.post, args=(f"/c/c/v1/{path}", body)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stack.close("c") == 1
    first, second = stack.episodes()[0].branches
    assert (second.parent_branch_id, second.fork_reason) == (0, reason)
    same = first.token_ids[:second.fork_at] == second.token_ids[:second.fork_at]
    assert same.all()


def test_an_edited_answer_is_feedback(stack: Stack) -> None:
    stack.start()
    stack.ask("One.", conversation="c")
    stack.ask("One.", {"role": "assistant", "content": "Better words."}, "Two.", conversation="c")
    stack.close("c")
    (episode,) = stack.episodes()
    assert episode.hint is not None
    assert episode.hint.turns == ((0, "The answer should have been:\nBetter words."),)
    assert episode.hint.answer_bearing


def test_an_answer_whose_calls_alone_come_back_as_others_is_not_what_it_should_have_been(stack: Stack) -> None:
    """As from a client that keeps words and no calls."""
    stack.engine.say = lambda prompt: 'I look.\n<tool_call>\n{"name": "note_get", "arguments": {}}\n</tool_call>'
    stack.start()
    stack.ask("One.", conversation="c", tools=[TOOL])
    stack.ask("One.", {"role": "assistant", "content": "I look."}, "Two.", conversation="c", tools=[TOOL])
    stack.close("c")
    (episode,) = stack.episodes()
    assert [branch.fork_reason for branch in episode.branches] == [None, "template_rewrite"]
    assert episode.hint is None


def test_a_name_that_comes_back_is_another_attempt(stack: Stack) -> None:
    stack.start()
    first = stack.ask("One.", conversation="c")
    stack.close("c")
    stack.ask("One.", said(first), "Two.", conversation="c")
    stack.close("c")
    before, after = stack.episodes()
    assert (before.episode_id, before.attempt, after.attempt) == (after.episode_id, 0, 1)
    assert after.branches[0].n_sampled == len(stack.chat.encode("reply 2")) + 1


def test_calls_of_the_next_attempt_have_ids_of_their_own(stack: Stack) -> None:
    """The client's history goes on, and what it answered already it would not answer again."""
    stack.engine.say = lambda prompt: 2 * '<tool_call>\n{"name": "note_get", "arguments": {}}\n</tool_call>'
    stack.start()
    history: list[Json] = [{"role": "user", "content": "Read."}]
    ids = []
    for _ in range(3):
        history.append(said(stack.ask(*history, conversation="c", tools=[TOOL])))
        for call in history[-1]["tool_calls"]:
            ids.append(call["id"])
            history.append({"role": "tool", "tool_call_id": call["id"], "content": "ok"})
        stack.close("c")
    assert len(set(ids)) == 6
    assert [len(episode.branches) for episode in stack.episodes()] == [1, 1, 1]


def test_stop_texts_end_an_answer_and_the_record_alike(stack: Stack) -> None:
    stack.engine.say = lambda prompt: "Action: look Observation: I saw"
    stack.start()
    answer = stack.ask("Go.", conversation="c", stop=["Observation:"])
    assert answer["choices"][0]["message"]["content"] == "Action: look "
    stack.ask("Go.", said(answer), "Saw.", conversation="c")
    stack.close("c")
    (branch,) = stack.episodes()[0].branches
    first = stack.chat.decode(branch.token_ids[branch.calls[0].start:branch.calls[0].end].tolist())
    assert first.endswith("Observation:")
    assert branch.token_kind[branch.calls[0].end] == TokenKind.FORCED


def test_thoughts_are_told_apart_and_kept_in_the_tokens(stack: Stack) -> None:
    stack.engine.say = lambda prompt: "<think>two and two</think>\n\nFour."
    stack.start()
    message = stack.ask("2+2?", conversation="c")["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("Four.", "two and two")
    stack.ask("2+2?", {"role": "assistant", "content": "Four."}, "Sure?", conversation="c")
    assert "two and two" in stack.chat.decode(stack.engine.requests[1]["token_ids"])


def test_a_stop_text_that_the_last_token_completes_ends_the_answer(stack: Stack) -> None:
    stack.engine.say = lambda prompt: "look Observation:"
    stack.start()
    last = len(stack.chat.encode("look Observation:"))
    (choice,) = stack.ask("Go.", conversation="c", stop=["Observation:"], max_tokens=last)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("look ", "stop")
    stack.close("c")
    assert stack.episodes()[0].branches[0].calls[0].finish_reason == "stop"


@pytest.mark.parametrize(("text", "content", "thought"), [
    ("\n<think>so long", "", "so long"), ("Put it behind <think>.", "Put it behind <think>.", None)])
def test_a_thought_begins_an_answer_or_is_none(stack: Stack, text: str, content: str, thought: str | None) -> None:
    stack.engine.say = lambda prompt: text
    stack.start()
    message = stack.ask("How?")["choices"][0]["message"]
    assert (message["content"], message.get("reasoning_content")) == (content, thought)


def test_greedy_and_bent_sampling_is_recorded_but_not_trained_on(stack: Stack) -> None:
    stack.start()
    reasons = {}
    for name, asked in {"greedy": {"temperature": 0}, "kept_set_missing": {"top_p": 0.9},
                        "masked_by_policy": {"presence_penalty": 0.5}}.items():
        stack.ask("Hi.", conversation=name, **asked)
        stack.close(name)
    for episode in stack.episodes():
        (call,) = episode.branches[0].calls
        reasons[episode.task_id] = call.untrainable_reason
        assert episode.branches[0].n_trainable == 0
        assert np.isfinite(episode.branches[0].logprobs[call.start:call.end]).all()
    assert reasons == {name: name for name in reasons}
    assert len(reasons) == 3


def test_completions_take_text_and_ids_and_extend(stack: Stack) -> None:
    stack.engine.say = lambda prompt: " and on"
    stack.start()
    first = stack.post("/v1/completions", {"model": "m", "prompt": "Once", "max_tokens": 3}).json()
    assert first["choices"][0]["text"] == stack.chat.decode(stack.chat.encode(" and on")[:3])
    longer = "Once" + first["choices"][0]["text"] + " there"
    second = stack.post("/v1/completions", {"model": "m", "prompt": longer, "logprobs": 0}).json()
    assert second["choices"][0]["logprobs"]["tokens"][-1] == "<|im_end|>"
    ids = stack.engine.requests[1]["token_ids"]
    done = stack.engine.completion(ids, 99)["choices"][0]["token_ids"]
    stack.post("/v1/completions", {"model": "m", "prompt": [*ids, *done, 5]})
    stack.stop_proxy()
    (episode,) = stack.episodes()
    assert [len(branch.calls) for branch in episode.branches] == [3]
