"""The client of hosted models against a server on loopback: what is retried, refused, counted, kept and hidden."""

import asyncio
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from agentsdpo.collect.hosted import HostedConfig, HostedModel, Reply, SpendLimit
from agentsdpo.collect.hosted_policy import HostedPolicy
from agentsdpo.collect.policy import Context, ContextOverflow, PromptBudget
from agentsdpo.collect.provider import ProviderError, Transient
from agentsdpo.collect.rollout import run_episode
from agentsdpo.envs.desk import DeskSuite
from agentsdpo.errors import ConfigError
from agentsdpo.types import Budget, StopReason, ToolSpec

SECRET = "hunter2-hunter2-hunter2"
ASK = [{"role": "user", "content": "2 + 3?"}]


def client(server: Any, **settings: Any) -> HostedModel:
    return HostedModel(HostedConfig(**{"model": "openai/m", "api_base": server.url, "retries": 2, "backoff_s": 0.0,
                                       "timeout_s": 20.0, **settings}))


def ask(model: HostedModel, **more: Any) -> Reply:
    async def once() -> Reply:
        try:
            return await model.ask(ASK, **more)
        finally:
            await model.aclose()
    return asyncio.run(once())


def test_an_answer_is_read_and_counted(chat_server: Any) -> None:
    model = client(chat_server, temperature=0.0, max_tokens=50, usd_per_mtok_in=2.0, usd_per_mtok_out=10.0,
                   extra={"seed": 4})
    reply = ask(model, max_tokens=7)
    assert (reply.text, reply.usage.prompt_tokens, reply.usage.completion_tokens) == ("hello", 9, 3)
    assert reply.usage.finish_reason == "stop"
    assert reply.usage.cost_usd == pytest.approx((9 * 2 + 3 * 10) / 1e6)
    assert model.spent.as_json() | {"cost_usd": 0} == {
        "calls": 1, "cached": 0, "retries": 0, "failed": 0, "prompt_tokens": 9, "completion_tokens": 3, "cost_usd": 0,
        "unpriced": 0}
    (body,) = chat_server.seen
    assert (body["messages"], body["temperature"], body["max_tokens"], body["seed"]) == (ASK, 0.0, 7, 4)


@pytest.mark.parametrize("fault", [
    (429, {"error": {"message": "slow down"}}, {"retry-after": "0"}),
    (500, "boom", {}),
    (503, {"error": {"message": "overloaded"}}, {}),
    '{"id": "c", "choi',
    "<html>gateway</html>",
    {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": []},
    {"id": "c"},
    (200, '{"id"', {"content-length": "999"}),
], ids=["429", "500", "503", "half JSON", "HTML", "no choices", "no such field", "cut off"])
def test_what_may_pass_is_tried_again(chat_server: Any, fault: Any) -> None:
    chat_server.answer = lambda body: fault if len(chat_server.seen) < 3 else chat_server.say("at last")
    model = client(chat_server)
    reply = ask(model)
    assert (reply.text, reply.usage.retries, model.spent.retries, model.spent.calls) == ("at last", 2, 2, 1)
    assert len(chat_server.seen) == 3, "one retry layer: nobody else repeats the request"


def test_a_slow_answer_is_a_fault_that_may_pass(chat_server: Any) -> None:
    released = threading.Event()

    def slow(body: Any) -> Any:
        if len(chat_server.seen) == 1:
            released.wait(20)
        return chat_server.say("late")

    chat_server.answer = slow
    reply = ask(client(chat_server, timeout_s=0.5))
    released.set()
    assert (reply.text, reply.usage.retries) == ("late", 1)


def test_after_all_retries_the_fault_is_told(chat_server: Any) -> None:
    chat_server.answer = lambda body: (500, "boom", {})
    model = client(chat_server)
    with pytest.raises(ProviderError, match="model openai/m: InternalServerError: .*boom"):
        ask(model)
    assert (len(chat_server.seen), model.spent.failed, model.spent.calls) == (3, 1, 0)


def test_nobody_at_home() -> None:
    model = HostedModel(HostedConfig(model="openai/m", api_base="http://127.0.0.1:9/v1", retries=1, backoff_s=0.0))
    with pytest.raises(Transient, match="Connection error"):
        ask(model)
    assert model.spent.retries == 1


@pytest.mark.parametrize(("status", "error", "kind", "words"), [
    (401, {"message": "no such key", "code": "invalid_api_key"}, ConfigError, "api_key_env"),
    (403, {"message": "not yours"}, ConfigError, "api_key_env"),
    (404, {"message": "no such model", "code": "model_not_found"}, ConfigError, "check model and api_base"),
    (429, {"message": "You exceeded your quota", "code": "insufficient_quota", "type": "insufficient_quota"},
     ConfigError, "no credit"),
    (400, {"message": "This model's maximum context length is 100 tokens.", "code": "context_length_exceeded"},
     ContextOverflow, "larger window"),
    (400, {"message": "no emoji please"}, ProviderError, "not sent again"),
])
def test_what_never_works_is_not_tried_again(chat_server: Any, status: int, error: Any, kind: type[Exception],
                                             words: str) -> None:
    chat_server.answer = lambda body: (status, {"error": error}, {})
    with pytest.raises(kind, match=words):
        ask(client(chat_server))
    assert len(chat_server.seen) == 1


def test_retry_after_and_back_off(monkeypatch: pytest.MonkeyPatch, chat_server: Any) -> None:
    waits: list[float] = []
    monkeypatch.setattr(asyncio, "sleep", _recording(waits))
    chat_server.answer = lambda body: (429, {"error": {"message": "slow"}}, {"retry-after": "70"})
    with pytest.raises(Transient):
        ask(client(chat_server, retries=4, backoff_s=5.0))
    waits = [wait for wait in waits if wait >= 5]
    assert len(waits) == 4
    assert all(70 <= wait <= 75 for wait in waits), "the provider's wish, with jitter"
    waits.clear()
    monkeypatch.setattr(asyncio, "sleep", _recording(waits))
    chat_server.answer = lambda body: (500, "boom", {})
    with pytest.raises(Transient):
        ask(client(chat_server, retries=4, backoff_s=5.0))
    waits = [wait for wait in waits if wait >= 5]
    assert [5 * 2**n <= wait <= 5 * 2**n + 5 for n, wait in enumerate(waits)] == [True] * 4
    assert len({wait % 5 for wait in waits}) == 4, "no two wait alike"


def _recording(waits: list[float]) -> Any:
    real = asyncio.sleep

    async def sleep(delay: float, *args: Any) -> None:
        waits.append(delay)
        await real(0)
    return sleep


def test_the_limit_on_requests_in_flight(chat_server: Any) -> None:
    inside, most, lock = [0], [0], threading.Lock()

    def count(body: Any) -> Any:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        time.sleep(0.02)
        with lock:
            inside[0] -= 1
        return chat_server.say("ok")

    chat_server.answer = count
    model = client(chat_server, concurrency=3)

    async def crowd() -> None:
        await asyncio.gather(*(model.ask(ASK) for _ in range(12)))
        await model.aclose()
    asyncio.run(crowd())
    assert most[0] == 3
    asyncio.run(crowd())  # another event loop, the same client
    assert model.spent.calls == 24


def test_the_limit_on_money(chat_server: Any) -> None:
    model = client(chat_server, max_cost_usd=20e-6, usd_per_mtok_in=1.0)
    for _ in range(3):
        ask(model)
    assert model.spent.cost_usd == pytest.approx(27e-6)
    with pytest.raises(SpendLimit, match=r"openai/m has cost 0.0000 USD and max_cost_usd is 2e-05; raise max_cost_usd"):
        ask(model)
    assert len(chat_server.seen) == 3


def test_a_limit_without_a_price_is_refused(chat_server: Any) -> None:
    with pytest.raises(ConfigError, match="nobody knows what openai/m costs; set usd_per_mtok_in"):
        ask(client(chat_server, max_cost_usd=1.0))
    free = client(chat_server)
    ask(free)
    assert (free.spent.unpriced, free.spent.cost_usd) == (1, 0.0)


def test_litellms_own_prices(chat_server: Any) -> None:
    model = client(chat_server, model="openai/gpt-4o-mini", max_cost_usd=1.0)
    ask(model)
    assert model.spent.cost_usd == pytest.approx(9 * 1.5e-7 + 3 * 6e-7)


def test_answers_are_kept_by_content(chat_server: Any, tmp_path: Path) -> None:
    chat_server.answer = lambda body: chat_server.say(f"answer {len(chat_server.seen)}")
    first = client(chat_server, cache=tmp_path)
    assert [ask(first).text, ask(first).text, ask(first, salt="2").text] == ["answer 1", "answer 1", "answer 2"]
    again = client(chat_server, cache=tmp_path)
    reply = ask(again)
    assert (reply.text, reply.cached, again.spent.cached, again.spent.calls) == ("answer 1", True, 1, 0)
    assert ask(client(chat_server, cache=tmp_path, temperature=0.5)).text == "answer 3", "another question"
    assert len(chat_server.seen) == 3
    for file in tmp_path.rglob("*.json"):
        json.loads(file.read_text())
        file.write_text('{"text": ')
    assert ask(client(chat_server, cache=tmp_path)).text == "answer 4", "a broken entry is asked for again"
    assert ask(client(chat_server, cache=tmp_path)).text == "answer 4"


def test_half_an_emoji_is_kept_as_a_question_mark(chat_server: Any, tmp_path: Path) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": "\ud83d"}'}}
    chat_server.answer = lambda body: chat_server.say("so \ud83d", calls=[call])
    replies = [ask(client(chat_server, cache=tmp_path)) for _ in range(2)]
    assert [(reply.text, reply.calls[0]["arguments"], reply.cached) for reply in replies] == [
        ("so ?", '{"x": "?"}', False), ("so ?", '{"x": "?"}', True)]


def test_no_fault_is_kept(chat_server: Any, tmp_path: Path) -> None:
    chat_server.answer = lambda body: (500, "boom", {})
    with pytest.raises(Transient):
        ask(client(chat_server, cache=tmp_path, retries=0))
    assert not list(tmp_path.rglob("*.json"))


def test_the_key_is_sent_and_told_nowhere(chat_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", SECRET)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody-else")
    model = client(chat_server, api_key_env="MY_KEY", cache=tmp_path)
    ask(model)
    chat_server.answer = lambda body: (401, {"error": {"message": f"Incorrect API key provided: {SECRET}, "
                                                       "Authorization: Bearer abcdefghijklmnop123"}}, {})
    with pytest.raises(ConfigError) as caught:
        ask(model, salt="2")
    assert "Incorrect API key provided: [key]" in str(caught.value)
    assert "abcdefghijklmnop123" not in str(caught.value)
    assert caught.value.__suppress_context__, "the traceback shows the provider's own message otherwise"
    kept = "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    for text in (kept, repr(model.config), model.config.model_dump_json(), repr(model.__dict__)):
        assert SECRET not in text
    assert chat_server.keys == [f"Bearer {SECRET}"] * 2
    chat_server.answer = lambda body: chat_server.say("ok")
    ask(client(chat_server))
    assert chat_server.keys[-1] == "Bearer none", "a server of one's own never sees the key of the real provider"


def test_settings_that_cannot_be_meant(chat_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="variable NO_SUCH_KEY is not set"):
        ask(client(chat_server, api_key_env="NO_SUCH_KEY"))
    with pytest.raises(ConfigError, match="litellm knows no provider for model 'nonsense'; write provider/model"):
        ask(client(chat_server, model="nonsense"))
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="there is no key in OPENAI_API_KEY; export it"):
        ask(client(chat_server, api_base=None))
    for bad in ({"api_base": "http://me:pw@127.0.0.1/v1"}, {"extra": {"api_key": "x"}}, {"extra": {"num_retries": 3}},
                {"extra": {"headers": {}}}, {"retries": -1}, {"modle": "x"}):
        with pytest.raises(ValidationError):
            HostedConfig(**{"model": "openai/m", **bad})
    assert not chat_server.seen


def test_litellm_is_loaded_late_and_stays_at_home(tmp_path: Path) -> None:
    """No network and no .env at import; nothing of it before the first request."""
    code = ("import socket, sys, os\n"
            "def no(*a, **k): raise SystemExit('network')\n"
            "from agentsdpo.collect import hosted, hosted_policy, provider\n"
            "assert 'litellm' not in sys.modules and 'openai' not in sys.modules and 'httpx' not in sys.modules\n"
            "socket.socket.connect = socket.getaddrinfo = no\n"
            "library = provider.library()\n"
            "assert os.environ.get('FROM_DOTENV') is None, 'read .env'\n"
            "assert library.telemetry is False\n"
            "print(provider.priced('gpt-4o-mini'))\n")
    (tmp_path / ".env").write_text("FROM_DOTENV=yes\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert (done.stdout.strip(), done.returncode) == ("True", 0), done.stderr


# --------------------------------------------------------------------------------------------------------- the agent


def call(name: str, arguments: str, call_id: str = "") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def act(server: Any, ctx: Context, tools: tuple[ToolSpec, ...] = (), **settings: Any) -> Any:
    async def once() -> Any:
        model = client(server, **settings)
        try:
            return await HostedPolicy(model).act(ctx, tools)
        finally:
            await model.aclose()
    return asyncio.run(once())


def test_calls_of_an_agent_are_read(chat_server: Any) -> None:
    chat_server.answer = lambda body: chat_server.say("look", calls=[
        call("a", '{"x": 1}', "c1"), call("b", '{"x": ', "c1"), call("c", "[1]"), call("d", "", "c4")])
    turn = act(chat_server, Context("e", 0, list(ASK), turn=5, tokens_left=40))
    assert [(c.id, c.name, c.arguments) for c in turn.calls] == [
        ("c1", "a", {"x": 1}), ("call_5_1", "b", '{"x": '), ("call_5_2", "c", "[1]"), ("c4", "d", {})]
    assert [(r.call_id, r.error_kind) for r in turn.malformed] == [
        ("call_5_1", "bad_arguments"), ("call_5_2", "bad_arguments")]
    assert turn.completion is None
    assert turn.usage.completion_tokens == 3
    assert chat_server.seen[0]["max_tokens"] == 40
    assert "tools" not in chat_server.seen[0]


def test_a_conversation_goes_out_as_apis_take_it(chat_server: Any) -> None:
    said = {"role": "assistant", "content": "", "tool_calls": [call("a", "x", "1"), call("b", "x", "2")]}
    said["tool_calls"][0]["function"]["arguments"] = {"x": 1}
    said["tool_calls"][1]["function"]["arguments"] = '{"x": '
    act(chat_server, Context("e", 0, [*ASK, said]), (ToolSpec(name="a", description="A.", parameters={}),))
    sent = chat_server.seen[0]["messages"][1]["tool_calls"]
    assert [json.loads(made["function"]["arguments"]) for made in sent] == [{"x": 1}, {"unreadable": '{"x": '}]
    assert chat_server.seen[0]["tools"][0]["function"]["name"] == "a"


def test_attempts_do_not_share_answers(chat_server: Any, tmp_path: Path) -> None:
    for seed in (1, 1, 2):
        act(chat_server, Context("e", seed, list(ASK)), cache=tmp_path)
    assert len(chat_server.seen) == 2


def test_a_spent_prompt_budget(chat_server: Any) -> None:
    with pytest.raises(PromptBudget):
        act(chat_server, Context("e", 0, list(ASK), prompt_left=0))


def test_a_hosted_agent_plays_an_episode(chat_server: Any) -> None:
    task = DeskSuite().task("val", 0)
    turns = iter([chat_server.say("I look.", calls=[call("note_get", '{"key": ""}', "a"), call("nope", "{}", "b")]),
                  (500, "boom", {}), chat_server.say("", calls=[call("submit", '{"answer": "12"}', "a")])])
    chat_server.answer = lambda body: next(turns)

    async def play() -> Any:
        model = client(chat_server)
        try:
            return await run_episode(DeskSuite().env(), HostedPolicy(model), task, seed=0, episode_id="e",
                                     budget=Budget(prompt_tokens=1000))
        finally:
            await model.aclose()
    rollout = asyncio.run(play())
    assert (rollout.stop_reason, rollout.error) == (StopReason.COMPLETED, "")
    assert rollout.outcome is not None
    assert rollout.outcome.answer == "12"
    assert rollout.branches == (), "no token ids: nothing to train on"
    assert [m["tool_call_id"] for m in rollout.messages if m["role"] == "tool"] == ["a", "b", "call_1_0"]
    assert [m["role"] for m in chat_server.seen[-1]["messages"]] == ["system", "user", "assistant", "tool", "tool"]
    assert chat_server.seen[-1]["messages"][2]["content"] == "I look.", "what was said beside calls stays"


@pytest.mark.parametrize(("answer", "expected"), [((500, "boom", {}), StopReason.ENGINE_ERROR), (
    (400, {"error": {"message": "maximum context length is 9", "code": "context_length_exceeded"}}, {}),
    StopReason.CONTEXT_OVERFLOW)])
def test_faults_of_the_provider_end_an_episode_as_what_they_are(chat_server: Any, answer: Any,
                                                               expected: StopReason) -> None:
    chat_server.answer = lambda body: answer

    async def play() -> Any:
        model = client(chat_server, retries=1)
        try:
            return await run_episode(DeskSuite().env(), HostedPolicy(model), DeskSuite().task("val", 0), seed=0,
                                     episode_id="e")
        finally:
            await model.aclose()
    rollout = asyncio.run(play())
    assert rollout.stop_reason == expected
    assert (rollout.outcome is None) == (expected == StopReason.ENGINE_ERROR)


