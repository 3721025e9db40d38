"""The official openai client and litellm work against the proxy unchanged, streams included."""

import json
from typing import Any

import pytest
from proxy_stack import Stack

TOOL = {"type": "function", "function": {"name": "calc", "description": "Count.", "parameters": {
    "type": "object", "properties": {"expr": {"type": "string"}}}}}
CALL = '<tool_call>\n{"name": "calc", "arguments": {"expr": "1+1"}}\n</tool_call>'
KEY = "a-key-for-the-tests"


def client(stack: Stack, conversation: str = "") -> Any:
    import openai

    base = f"{stack.url}/c/{conversation}/v1" if conversation else f"{stack.url}/v1"
    return openai.OpenAI(base_url=base, api_key=KEY, max_retries=0)


def script(prompt: str) -> str:
    return "It is two, and that is all there is to say about this sum." if "<tool_response>" in prompt else CALL


def test_openai_plays_a_tool_turn_in_one_branch(stack: Stack) -> None:
    stack.engine.say = script
    stack.start({KEY: ""})
    messages: list[Any] = [{"role": "user", "content": "1+1?"}]
    made = client(stack, "o-1").chat.completions.create(model="gpt-4o", messages=messages, tools=[TOOL])
    call = made.choices[0].message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("calc", {"expr": "1+1"})
    messages += [made.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "2"}]
    last = client(stack, "o-1").chat.completions.create(
        model="gpt-4o", messages=messages, tools=[TOOL], logprobs=True, top_logprobs=0)
    assert last.choices[0].message.content.startswith("It is two")
    assert last.choices[0].logprobs.content[0].logprob == -0.25
    assert last.usage.completion_tokens == len(last.choices[0].logprobs.content)
    assert [model.id for model in client(stack).models.list().data] == ["base"]
    stack.stop_proxy()
    (episode,) = stack.episodes()
    assert [len(branch.calls) for branch in episode.branches] == [2]


def test_openai_streams_text_and_tool_calls(stack: Stack) -> None:
    stack.engine.say = script
    stack.start({KEY: ""})
    messages: list[Any] = [{"role": "user", "content": "1+1?"}]
    with client(stack, "o").chat.completions.create(model="m", messages=messages, tools=[TOOL], stream=True) as parts:
        deltas = [part.choices[0].delta for part in parts if part.choices]
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    assert calls[0].function.name == "calc"
    arguments = "".join(call.function.arguments or "" for call in calls)
    assert json.loads(arguments) == {"expr": "1+1"}
    messages += [{"role": "assistant", "content": None, "tool_calls": [{
        "id": calls[0].id, "type": "function", "function": {"name": "calc", "arguments": arguments}}]},
        {"role": "tool", "tool_call_id": calls[0].id, "content": "2"}]
    parts = list(client(stack, "o").chat.completions.create(
        model="m", messages=messages, tools=[TOOL], stream=True, stream_options={"include_usage": True}))
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == script("<tool_response>")
    assert len([part for part in parts if part.choices]) > 3
    assert parts[-1].usage.completion_tokens == len(stack.chat.encode(text)) + 1
    assert [p.choices[0].finish_reason for p in parts if p.choices][-1] == "stop"
    stack.stop_proxy()
    assert [len(branch.calls) for branch in stack.episodes()[0].branches] == [2]


def test_openai_completions_whole_and_streamed(stack: Stack) -> None:
    stack.engine.say = lambda prompt: " upon a time there was a table of contents, and it was long"
    stack.start({KEY: ""})
    whole = client(stack).completions.create(model="m", prompt="Once")
    parts = list(client(stack).completions.create(model="m", prompt="Once", stream=True))
    assert whole.choices[0].text == "".join(part.choices[0].text for part in parts) == stack.engine.say("")


def test_openai_reads_the_errors(stack: Stack) -> None:
    import openai

    stack.start({KEY: ""})
    wrong = openai.OpenAI(base_url=f"{stack.url}/v1", api_key="not-the-right-key", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        wrong.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.BadRequestError, match="messages"):
        client(stack).chat.completions.create(model="m", messages=[])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # its own, of pydantic
def test_litellm_whole_and_streamed(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it asks the network for prices otherwise
    import litellm

    stack.engine.say = script
    stack.start({KEY: ""})
    named: dict[str, Any] = {"model": "openai/any", "api_base": f"{stack.url}/c/l/v1", "api_key": KEY, "tools": [TOOL],
                             "num_retries": 0}
    messages: list[Any] = [{"role": "user", "content": "1+1?"}]
    complete: Any = litellm.completion
    made = complete(messages=messages, **named).choices[0].message
    messages += [made.model_dump(), {"role": "tool", "tool_call_id": made.tool_calls[0].id, "content": "2"}]
    parts = list(complete(messages=messages, stream=True, **named))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == script("<tool_response>")
    stack.stop_proxy()
    assert [len(branch.calls) for branch in stack.episodes()[0].branches] == [2]
