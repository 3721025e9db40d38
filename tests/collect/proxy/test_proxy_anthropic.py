"""Anthropic's Messages API: the official client works against the proxy unchanged, streams included, and the record is
that of one branch."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from proxy_stack import Stack

KEY = "a-key-for-the-tests"
TOOL: Any = {"name": "calc", "description": "Count.", "input_schema": {
    "type": "object", "properties": {"expr": {"type": "string"}}}}
CALL = 'Let me see.\n<tool_call>\n{"name": "calc", "arguments": {"expr": "1+1"}}\n</tool_call>'
WORDS = "It is two, and that is all there is to say about this sum."
MODEL = "any"


@pytest.fixture
def client(stack: Stack) -> Iterator[Any]:
    """The official client, for a conversation and with a key; closed behind the test."""
    import anthropic

    with ExitStack() as open_ones:
        def made(conversation: str = "", key: str = KEY) -> Any:
            base = f"{stack.url}/c/{conversation}" if conversation else stack.url
            return open_ones.enter_context(anthropic.Anthropic(base_url=base, api_key=key, max_retries=0))
        yield made


def script(prompt: str) -> str:
    return WORDS if "<tool_response>" in prompt else CALL


def sent(stack: Stack, *messages: Any, path: str = "/v1/messages", **body: Any) -> httpx.Response:
    return stack.post(path, {"model": MODEL, "max_tokens": 64, "messages": list(messages), **body})


def user(content: Any) -> Any:
    return {"role": "user", "content": content}


def result(call: str, **more: Any) -> Any:
    return {"type": "tool_result", "tool_use_id": call, **more}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", ["", "c"])
def test_a_tool_turn_is_one_branch(stack: Stack, client: Any, streamed: bool, name: str) -> None:
    stack.engine.say = script
    stack.start({KEY: ""})
    messages: list[Any] = [user([{"type": "text", "text": "1+1?", "cache_control": {"type": "ephemeral"}}])]
    about: Any = {"model": MODEL, "max_tokens": 64, "tools": [TOOL], "system": "You count."}

    def ask() -> Any:
        if not streamed:
            return client(name).messages.create(messages=messages, **about)
        with client(name).messages.stream(messages=messages, **about) as events:
            assert len("".join(events.text_stream)) > 5
            return events.get_final_message()

    made = ask()
    words, call = made.content
    assert (words.text, call.name, call.input, made.stop_reason) == ("Let me see.", "calc", {"expr": "1+1"}, "tool_use")
    messages += [{"role": "assistant", "content": made.content},
                 user([result(call.id, content=[{"type": "text", "text": "2"}]),
                       {"type": "text", "text": "<system-reminder>Be kind.</system-reminder>"},
                       {"type": "text", "text": "In words."}])]
    last = ask()
    assert ([block.text for block in last.content], last.stop_reason) == ([WORDS], "end_turn")
    assert last.usage.output_tokens == len(stack.chat.encode(WORDS)) + 1
    count = client().messages.count_tokens(model=MODEL, messages=messages[:1], system="You count.", tools=[TOOL])
    assert count.input_tokens == made.usage.input_tokens
    stack.stop_proxy()
    (episode,) = stack.episodes()
    (branch,) = episode.branches
    assert len(branch.calls) == 2
    text = stack.chat.decode(branch.token_ids.tolist())
    assert "You count." in text
    assert "<tool_response>\n2\n</tool_response>" in text
    assert text.index("Let me see.") < text.index("Be kind.") < text.index("In words.") < text.index(WORDS)
    assert all(call.t_request and call.t_done and call.t_request < call.t_done for call in branch.calls)
    assert branch.n_trainable == sum(len(stack.chat.encode(said)) + 1 for said in (CALL, WORDS))
    assert episode.hint is not None
    assert episode.hint.turns == ((0, "In words."),)


def test_the_stream_has_the_events_of_the_api(stack: Stack) -> None:
    stack.engine.say = lambda prompt: f"<think>\nHm.\n</think>\n\n{CALL}"
    stack.start()
    answer = sent(stack, user("1+1?"), tools=[TOOL], stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [part.split("\n") for part in answer.text.strip().split("\n\n")]
    bodies = [json.loads(data.removeprefix("data: ")) for _, data in events]
    assert [name.removeprefix("event: ") for name, _ in events] == [body["type"] for body in bodies]
    begun = [body["content_block"] for body in bodies if body["type"] == "content_block_start"]
    assert [block["type"] for block in begun] == ["thinking", "text", "tool_use"]
    assert begun[2]["input"] == {}
    assert [bodies[0]["type"], bodies[-2]["delta"]["stop_reason"], bodies[-1]["type"]] == [
        "message_start", "tool_use", "message_stop"]
    assert bodies[0]["message"]["id"].startswith("msg_")


def test_what_was_thought_comes_back_and_the_branch_goes_on(stack: Stack) -> None:
    stack.engine.say = lambda prompt: "<think>\nHm.\n</think>\n\nTwo."
    stack.start()
    first = sent(stack, user("1+1?")).json()
    assert [(block["type"], block.get("text", block.get("thinking"))) for block in first["content"]] == [
        ("thinking", "Hm."), ("text", "Two.")]
    sent(stack, user("1+1?"), {"role": "assistant", "content": first["content"]}, user("And 2+2?"))
    stack.stop_proxy()
    (episode,) = stack.episodes()
    assert [len(branch.calls) for branch in episode.branches] == [2]


def test_a_call_that_is_broken_is_told_as_an_object_and_known_again(stack: Stack, client: Any) -> None:
    """``input`` has to be one: what the model gave instead is in there."""
    broken = '<tool_call>\n{"name": "calc", "arguments": "1+1"}\n</tool_call>'
    stack.engine.say = lambda prompt: WORDS if "<tool_response>" in prompt else broken
    stack.start({KEY: ""})
    made = client().messages.create(model=MODEL, max_tokens=64, tools=[TOOL], messages=[user("1+1?")])
    (call,) = made.content
    assert call.input == {"arguments": '"1+1"'}
    client().messages.create(model=MODEL, max_tokens=64, tools=[TOOL], messages=[
        user("1+1?"), {"role": "assistant", "content": made.content},
        user([result(call.id, content="no expr", is_error=True)])])
    stack.stop_proxy()
    (episode,) = stack.episodes()
    assert [len(branch.calls) for branch in episode.branches] == [2]
    assert episode.hint is not None
    assert episode.hint.turns == ((0, "A tool failed after this: no expr"),)


def test_parameters_reach_the_engine_and_the_stop_is_told(stack: Stack) -> None:
    stack.engine.say = lambda prompt: "One. Two. Three."
    stack.start()
    schema = {"type": "object"}
    answer = sent(stack, user("Count."), temperature=0.5, top_k=7, stop_sequences=["Three", "Two"],
                  output_config={"format": {"type": "json_schema", "schema": schema}}).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "Two")
    assert answer["content"] == [{"type": "text", "text": "One. "}]
    params = stack.engine.requests[-1]["sampling_params"]
    assert (params["temperature"], params["top_k"], params["max_tokens"]) == (0.5, 7, 64)
    assert params["structured_outputs"] == {"json": schema}
    assert sent(stack, user("Count."), max_tokens=2).json()["stop_reason"] == "max_tokens"
    stack.engine.say = script
    assert sent(stack, user("1+1?"), tools=[TOOL], tool_choice={"type": "none"}).json()["content"] == [
        {"type": "text", "text": CALL}]


def test_the_id_of_an_answer_takes_feedback(stack: Stack) -> None:
    stack.start()
    answer = sent(stack, user("Sum?")).json()
    told = stack.post("/v1/feedback", {"conversation": answer["id"], "text": "In thousands."})
    assert told.json()["state"] == "open"
    stack.stop_proxy()
    (episode,) = stack.episodes()
    assert episode.hint is not None
    assert episode.hint.turns == ((0, "In thousands."),)


@pytest.mark.parametrize(("messages", "body", "says"), [
    ([], {}, "at least one message"),
    ("text", {}, "at least one message"),
    ([{"role": "tool", "content": "x"}], {}, "no known role"),
    ([3], {}, "no known role"),
    ([user(3)], {}, "neither a text nor a list of blocks"),
    ([user(["x"])], {}, "neither a text nor a list of blocks"),
    ([user([{"type": "image", "source": {}}])], {}, "something other than text"),
    ([user([{"type": "text"}])], {}, "something other than text"),
    ([user([{"type": "tool_result", "content": [{"type": "image"}]}])], {}, "something other than text"),
    ([user("x"), {"role": "assistant", "content": "The answer is"}], {}, "the model's own"),
    ([user("x"), {"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": "x"}]}, user("y")], {},
     "no object as its input"),
    ([user("x")], {"tools": [{"type": "web_search_20250305", "name": "w"}]}, "none that the request describes"),
    ([user("x")], {"tools": {"a": 1}}, "tools is not a list"),
    ([user("x")], {"tools": ["x"]}, "none that the request describes"),
    ([user("x")], {"tools": [{"name": ""}]}, "no function with a name"),
    ([user("x")], {"system": 7}, "system is neither"),
    ([user("x")], {"max_tokens": 0}, "max_tokens is not a number"),
    ([user("x")], {"stop_sequences": [7]}, "stop is neither")])
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_what_cannot_be_done_is_refused_in_the_shape_of_the_api(stack: Stack, messages: Any, body: Any, says: str,
                                                               path: str) -> None:
    stack.start()
    answer = stack.post(path, {"model": MODEL, "max_tokens": 64, "messages": messages, **body})
    assert answer.status_code == 400
    told = answer.json()
    assert (told["type"], told["error"]["type"]) == ("error", "invalid_request_error")
    assert says in told["error"]["message"]
    assert stack.engine.requests == []


def test_the_client_reads_the_errors(stack: Stack, client: Any) -> None:
    import anthropic

    stack.start({KEY: ""})
    with pytest.raises(anthropic.AuthenticationError, match="the key is missing or wrong"):
        client(key="not-the-right-key").messages.create(model=MODEL, max_tokens=9, messages=[user("x")])
    with pytest.raises(anthropic.BadRequestError, match="something other than text"):
        client().messages.create(model=MODEL, max_tokens=9, messages=[user([{"type": "image", "source": {
            "type": "url", "url": "http://localhost/x.png"}}])])
