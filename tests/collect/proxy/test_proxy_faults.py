"""Engines, clients and disks that fail: no answer that is not recorded, nothing mislabelled, an error that helps."""

import asyncio
import json
import math
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from proxy_stack import Json, Stack, said

from agentsdpo.collect.proxy.conversation import Conversation
from agentsdpo.collect.proxy.room import Room
from agentsdpo.replay.journal import Journal, JournalError


def wrong(change: Callable[[Json], Any]) -> Callable[[Json], Json]:
    """A fault of the engine's first choice."""
    def made(answer: Json) -> Json:
        change(answer["choices"][0])
        return answer
    return made


def drop_logprob(choice: Json) -> None:
    choice["logprobs"]["content"].pop()


def sentinel(choice: Json) -> None:
    choice["logprobs"]["content"][0]["logprob"] = -9999.0


def not_a_number(choice: Json) -> None:
    choice["logprobs"]["content"][0]["logprob"] = math.nan


def other_ids(choice: Json) -> None:
    choice["logprobs"]["content"][0]["token_id"] += 1


def short_span(choice: Json) -> None:
    choice["weight_versions"][0]["end"] -= 1


def default_label(choice: Json) -> None:
    choice["weight_versions"][0]["version"] = "default"


@pytest.mark.parametrize(("change", "reason"), [
    (drop_logprob, "length_mismatch"), (sentinel, "logprob_sentinel"), (not_a_number, "logprob_sentinel"),
    (other_ids, "logprobs_misaligned"), (short_span, "version_unknown"), (default_label, "version_unknown"),
    (lambda choice: choice.pop("logprobs"), "no_logprobs"),
    (lambda choice: choice.pop("weight_versions"), "version_unknown")])
def test_what_cannot_be_trusted_is_kept_with_its_reason(stack: Stack, change: Any, reason: str) -> None:
    stack.engine.faults = [wrong(change)]
    stack.start()
    first = stack.ask("Hi.", conversation="c")
    assert first["choices"][0]["message"]["content"] == "reply 1"
    stack.ask("Hi.", said(first), "More.", conversation="c")
    stack.close("c")
    (branch,) = stack.episodes()[0].branches
    assert [call.untrainable_reason for call in branch.calls] == [reason, None]
    assert branch.n_trainable == branch.calls[1].end - branch.calls[1].start
    assert branch.n_sampled > branch.n_trainable


def test_a_version_change_in_one_answer_is_two_spans(stack: Stack) -> None:
    def split(choice: Json) -> None:
        n = len(choice["token_ids"])
        choice["weight_versions"] = [{"version": "3", "start": 0, "end": 2}, {"version": "4", "start": 2, "end": n}]
    stack.engine.faults = [wrong(split)]
    stack.start()
    stack.ask("Hi.", conversation="c")
    stack.close("c")
    (branch,) = stack.episodes()[0].branches
    assert [(s.version, s.start) for s in branch.calls[0].versions] == [(3, 0), (4, 2)]
    assert branch.policy_versions == (3, 4)
    assert branch.n_trainable


def test_no_ids_gives_an_answer_and_a_new_branch(stack: Stack) -> None:
    def null(answer: Json) -> Json:
        answer["choices"][0]["token_ids"] = None
        return answer
    stack.engine.generate = False
    stack.start()
    stack.ask("Warm.", conversation="w")  # the route is found out
    stack.engine.faults = [null]
    first = stack.ask("Hi.", conversation="c")
    assert first["choices"][0]["message"]["content"] == "reply 1"
    stack.ask("Hi.", said(first), "More.", conversation="c")
    stack.close("c")
    (episode,) = stack.episodes()
    assert [branch.fork_reason for branch in episode.branches] == [None, "retokenised"]
    assert [branch.calls[0].untrainable_reason for branch in episode.branches] == ["no_token_ids", None]
    assert episode.branches[1].policy_versions == (0, 0)


def test_a_server_of_another_model_is_found_out_at_once(stack: Stack) -> None:
    """At its end no store would take such a conversation."""
    stack.vocab_size = stack.chat.vocab_size
    stack.engine.faults = [wrong(lambda choice: choice["token_ids"].__setitem__(0, stack.vocab_size))]
    stack.start()
    refused = stack.post("/c/c/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi."}]})
    assert refused.status_code == 502
    assert f"the vocabulary has {stack.vocab_size} ids; serve the model the tok" in refused.json()["error"]["message"]
    stack.ask("Hi.", conversation="c")
    stack.close("c")
    assert len(stack.episodes()) == 1
    assert not [*stack.store.glob("spool/**/*.arrows")]


def test_completions_route_distrusts_a_change_of_weights(stack: Stack) -> None:
    def publish(answer: Json) -> Json:
        stack.engine.version = "9"
        return answer
    stack.engine.generate = False
    stack.start()
    stack.ask("Warm.", conversation="w")
    stack.engine.faults = [publish]
    stack.ask("Hi.", conversation="c")
    stack.close("c")
    (call,) = stack.episodes()[0].branches[0].calls
    assert call.untrainable_reason == "version_unknown"


@pytest.mark.parametrize("fault", [500, 503, 429, "cut", lambda answer: {"choices": []}])
def test_a_stumbling_engine_is_asked_again(stack: Stack, fault: Any) -> None:
    stack.engine.faults = [fault]
    stack.start()
    if callable(fault):
        answer = stack.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi."}]})
        assert answer.status_code == 502
        assert "cannot be used" in answer.json()["error"]["message"]
    else:
        assert stack.ask("Hi.")["choices"][0]["message"]["content"] == "reply 1"
        ids = [request["request_id"] for request in stack.engine.requests]
        assert len(set(ids)) == 2


def test_a_connection_that_rested_is_not_used_again(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine closes it at about the same time, and a call that meets that is broken off."""
    monkeypatch.setattr("agentsdpo.collect.vllm.retry.IDLE_S", 0.05)
    ports, answer = list[int](), stack.engine._answer

    async def noting(request: Any, *args: Any, **named: Any) -> Any:
        ports.append(request.transport.get_extra_info("peername")[1])
        return await answer(request, *args, **named)

    monkeypatch.setattr(stack.engine, "_answer", noting)
    stack.start(poll_s=1000.0)
    for _ in range(2):
        stack.ask("Hi.")
        time.sleep(0.3)
    assert len(set(ports[-2:])) == 2


def test_an_engine_that_stays_away_is_an_error_and_no_episode(stack: Stack) -> None:
    stack.start(retry_s=0.3)
    stack.run(stack.engine.stop())
    answer = stack.post("/c/c/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi."}]})
    assert answer.status_code == 503
    assert answer.headers["Retry-After"]
    stack.run(stack.engine.start())
    stack.ask("Hi.", conversation="c")
    stack.close("c")
    (episode,) = stack.episodes()
    assert len(episode.branches[0].calls) == 1
    assert len(stack.episodes()) == 1


@pytest.mark.parametrize("seen", ["by a call", "by a look"])
def test_an_engine_that_comes_back_as_another_one_is_asked_what_it_is(stack: Stack, seen: str) -> None:
    stack.start(poll_s=1000.0)
    first = stack.ask("Hi.", conversation="c")
    stack.run(stack.engine.stop())
    assert stack.proxy is not None
    if seen == "by a look":
        stack.run(stack.proxy.house.upstream.look())
        stack.engine.mode = "raw_logprobs"
        stack.run(stack.engine.start())
    else:
        stack.engine.mode = "raw_logprobs"
        timer = threading.Timer(0.5, lambda: stack.run(stack.engine.start()))
        timer.start()
    stack.ask("Hi.", said(first), "More.", conversation="c")
    stack.close("c")
    (branch,) = stack.episodes()[0].branches
    assert [(call.logprob_kind, call.untrainable_reason) for call in branch.calls] == [
        ("processed", None), ("raw", "kind_raw")]


def test_an_engine_that_hangs_is_a_timeout(stack: Stack) -> None:
    stack.engine.faults = ["hang"]
    stack.start(timeout_s=0.3)
    answer = stack.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi."}]})
    assert (answer.status_code, answer.json()["error"]["type"]) == (504, "timeout_error")


@pytest.mark.parametrize("arguments", ['{"x": NaN}', '{"x": 1e999}', '{"x": "\\ud800"}', "[" * 2_000])
def test_arguments_that_nobody_could_write_again_stay_text(stack: Stack, arguments: str) -> None:
    stack.start()
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    first = stack.ask("Hi.", conversation="c")
    stack.ask("Hi.", said(first), {"role": "user", "content": "Call."}, {"role": "assistant", "tool_calls": [call]},
              {"role": "tool", "tool_call_id": "1", "content": "ok"}, conversation="c")
    assert stack.close("c") == 1
    (episode,) = stack.episodes()
    assert episode.messages[3]["tool_calls"][0]["function"]["arguments"] == arguments
    assert sum(len(branch.calls) for branch in episode.branches) == 2


def test_a_request_is_one_line_of_the_log_whatever_its_address_says(stack: Stack, caplog: pytest.LogCaptureFixture
                                                                    ) -> None:
    stack.start()
    with caplog.at_level("INFO", "agentsdpo.proxy"):
        stack.client.get(f"{stack.url}/c/x%0A2026-01-01 admin/v1/models?key=secret")
        stack.ask("Hi.")  # by now the first one is logged
    lines = [record.getMessage() for record in caplog.records]
    assert any("/c/x%0A2026-01-01%20admin/v1/models 200" in line for line in lines)
    assert not any("\n" in line or "secret" in line for line in lines)


def test_a_prompt_beyond_the_window_is_refused(stack: Stack) -> None:
    stack.engine.window = 40
    stack.start()
    answer = stack.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 60}]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert stack.ask("Hi.", max_tokens=4000)["usage"]["total_tokens"] <= 40


def test_a_client_that_leaves_before_the_answer_loses_nothing_of_the_record(stack: Stack) -> None:
    stack.engine.delay_s = 0.4
    stack.start()
    with pytest.raises(httpx.ReadTimeout):
        stack.client.post(f"{stack.url}/c/c/v1/chat/completions", timeout=0.1,
                          json={"messages": [{"role": "user", "content": "Hi."}]})
    stack.engine.delay_s = 0.0
    again = stack.ask("Hi.", conversation="c")  # the client's own retry, while or after the first is answered
    deadline = time.monotonic() + 10
    while (busy := stack.post("/v1/close", {"conversation": "c"})).status_code == 409 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert busy.json()["ended"] == 1
    (episode,) = stack.episodes()
    assert [(len(branch.calls), branch.fork_reason) for branch in episode.branches] == [(1, None), (1, "retry")]
    assert again["choices"][0]["message"]["content"] == "reply 1"


def test_a_client_that_leaves_in_mid_stream(stack: Stack) -> None:
    stack.engine.say = lambda prompt: "word " * 3000
    stack.start()
    body = json.dumps({"messages": [{"role": "user", "content": "Hi."}], "stream": True, "max_tokens": 4000}).encode()
    assert stack.proxy is not None
    with socket.create_connection(("127.0.0.1", stack.proxy.port)) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        raw.sendall(b"POST /c/c/v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                    b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        assert b"data:" in raw.recv(600) + raw.recv(600)
    assert stack.ask("Others?")
    assert stack.close("c") == 1
    assert stack.episodes()[0].branches[0].n_trainable > 1000


def test_an_answer_that_cannot_be_recorded_is_not_given(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    stack.start()
    first = stack.ask("One.", conversation="c")
    real = Journal.step

    def full(journal: Journal, *args: Any, **named: Any) -> None:
        journal.close()
        raise JournalError("no room", fix="free space")

    monkeypatch.setattr(Journal, "step", full)
    body = {"messages": [{"role": "user", "content": "One."}, said(first), {"role": "user", "content": "Two."}]}
    refused = stack.post("/c/c/v1/chat/completions", body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_recorded")
    monkeypatch.setattr(Journal, "step", real)
    deadline = time.monotonic() + 10
    while stack.post("/c/c/v1/chat/completions", body).status_code == 503 and time.monotonic() < deadline:
        time.sleep(0.1)
    stack.stop_proxy()
    assert [episode.attempt for episode in stack.episodes()] == [0, 1]
    assert stack.episodes()[1].messages[-1]["content"] == "reply 2"


@pytest.mark.parametrize("train_allowed", [True, False])
def test_what_was_answered_outlives_a_conversation_that_is_no_episode(
        stack: Stack, monkeypatch: pytest.MonkeyPatch, train_allowed: bool) -> None:
    stack.start(train_allowed=train_allowed)
    first = stack.ask("One.", conversation="c")
    tell = {"conversation": "c", "text": "No."}
    assert stack.post("/v1/feedback", tell).json()["state"] == "open"

    def broken(room: Room, conversation: Conversation) -> Any:
        raise ValueError("no episode")

    with monkeypatch.context() as now:
        now.setattr(Room, "_episode", broken)
        assert stack.close("c") == 1
    stack.ask("One.", said(first), "Two.", conversation="c")
    stack.stop_proxy()
    assert not list(stack.store.rglob("*.arrows"))
    if train_allowed:
        assert [episode.attempt for episode in stack.episodes()] == [0, 1]
        assert stack.episodes()[0].hint is not None
        assert stack.episodes()[0].branches[0].n_trainable > 0
    else:
        assert len(list(stack.store.glob("recordings/*.parquet"))) == 2


def test_what_comes_while_a_conversation_is_stored_is_its_next_attempt(stack: Stack, monkeypatch: pytest.MonkeyPatch
                                                                       ) -> None:
    stack.start()
    first = stack.ask("One.", conversation="c")
    assert stack.proxy is not None
    shelf = stack.proxy.house.rooms[""].shelf
    real, storing = shelf.put, threading.Event()

    def slow(episodes: Any) -> None:
        storing.set()
        time.sleep(0.5)
        real(episodes)

    monkeypatch.setattr(shelf, "put", slow)
    closer = threading.Thread(target=lambda: httpx.post(f"{stack.url}/v1/close", json={"conversation": "c"}))
    closer.start()
    assert storing.wait(10)
    stack.ask("One.", said(first), "Two.", conversation="c")
    closer.join()
    stack.stop_proxy()
    assert [episode.attempt for episode in stack.episodes()] == [0, 1]


@pytest.mark.parametrize("train_allowed", [True, False])
def test_requests_that_fail_leave_no_conversation_and_no_journal(stack: Stack, train_allowed: bool) -> None:
    stack.start(train_allowed=train_allowed)
    assert stack.post("/c/c/v1/completions", {"prompt": ""}).status_code == 400
    stack.engine.faults = [400]
    assert stack.post("/c/c/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}).status_code == 400
    assert stack.proxy is not None
    assert not stack.proxy.house.rooms[""].open
    assert not [*stack.store.glob("spool/**/*.arrows")]
    stack.ask("Now.", conversation="c")
    assert stack.close("c") == 1


def test_a_journal_is_opened_while_the_engine_samples_and_takes_no_feedback_yet(
        stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening one waits for the disk twice, and for the store: no client need wait for that after the answer."""
    stack.start()
    assert stack.proxy is not None
    house, sampled = stack.proxy.house, asyncio.Event()
    sample = house._sample

    async def held(*args: Any) -> Any:
        await sampled.wait()
        return await sample(*args)

    monkeypatch.setattr(house, "_sample", held)
    asker = threading.Thread(target=lambda: stack.ask("One.", conversation="c"))
    asker.start()
    try:
        deadline = time.monotonic() + 20
        while not [*stack.store.glob("spool/**/*.arrows")]:
            assert time.monotonic() < deadline, "the journal waits for the engine"
            time.sleep(0.01)
        assert stack.post("/v1/feedback", {"conversation": "c", "text": "No."}).status_code == 404
    finally:
        stack._loop.call_soon_threadsafe(sampled.set)
        asker.join()
    assert stack.post("/v1/feedback", {"conversation": "c", "text": "No."}).json()["state"] == "open"


def test_many_at_once_and_no_two_mixed_up(stack: Stack) -> None:
    stack.engine.say = lambda prompt: prompt.rpartition("user\n")[2].split("<|im_end|>")[0]
    stack.start()

    def play(name: str) -> None:
        history: list[Json] = []
        for i in range(3):
            history.append({"role": "user", "content": f"{name} says {i}"})
            answer = stack.ask(*history)
            assert answer["choices"][0]["message"]["content"] == f"{name} says {i}"
            history.append(said(answer))
        names.append(answer["id"].split("-", 1)[1].rpartition(".")[0])

    names: list[str] = []
    threads = [threading.Thread(target=play, args=(f"agent{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(names)) == 8
    stack.stop_proxy()
    assert sorted(len(e.branches[0].calls) for e in stack.episodes()) == [3] * 8
