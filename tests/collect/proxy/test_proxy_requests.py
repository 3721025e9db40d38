"""Requests that are none: an error that names the field, and nothing of them in anybody's way."""

import socket
import time
from typing import Any

import pytest
from proxy_stack import Json, Stack


@pytest.mark.parametrize(("body", "param"), [
    ({}, "messages"), ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0]"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": "x"}], "n": 3}, "n"),
    ({"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}, "temperature"),
    ({"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}, "max_tokens"),
    ({"messages": [{"role": "user", "content": "x"}], "top_p": 1.5}, "top_p"),
    ({"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}, "tools[0]"),
    ({"messages": [{"role": "user", "content": "x"}], "stop": [3]}, "stop"),
    ({"messages": [{"role": "user", "content": "x"}],
      "response_format": {"type": "json_schema", "json_schema": "x"}}, "response_format")])
def test_malformed_requests_name_the_field(stack: Stack, body: Json, param: str) -> None:
    stack.start()
    answer = stack.post("/v1/chat/completions", body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert not stack.engine.requests


@pytest.mark.parametrize("prompt", [[1, 2**31], [1, 2**40], [-1], [True], [[1], [2]], {}, []])
def test_prompts_that_are_no_tokens_end_no_conversation_of_others(stack: Stack, prompt: Any) -> None:
    """An id that fits no column could not be stored, and with it nothing else that ended at the same time."""
    stack.start()
    stack.ask("Hi.", conversation="others")
    answer = stack.post("/c/c/v1/completions", {"prompt": prompt})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
    stack.stop_proxy()
    assert [episode.task_id for episode in stack.episodes()] == ["others"]


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff\xfe", b'{"messages": "\\ud800"}', b"[" * 100_000])
def test_bodies_that_are_no_json_object(stack: Stack, raw: bytes) -> None:
    stack.start()
    answer = stack.client.post(f"{stack.url}/v1/chat/completions", content=raw)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_json")


def test_a_body_of_100_mb_is_refused_unread(stack: Stack) -> None:
    stack.start()
    assert stack.proxy is not None
    with socket.create_connection(("127.0.0.1", stack.proxy.port)) as raw:
        raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 104857600\r\n\r\n" + b"x" * 9000)
        assert b" 413 " in raw.recv(4096).split(b"\r\n", 1)[0]
    chunked = stack.client.post(f"{stack.url}/v1/chat/completions", content=iter([b"x" * (1 << 20)] * 9))
    assert (chunked.status_code, chunked.json()["error"]["code"]) == (413, "too_long")
    assert stack.ask("Still there?")


def test_a_body_that_never_arrives_is_given_up(stack: Stack) -> None:
    stack.start(body_s=0.2)
    assert stack.proxy is not None
    with socket.create_connection(("127.0.0.1", stack.proxy.port)) as raw:
        raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert b" 408 " in raw.recv(4096).split(b"\r\n", 1)[0]


def test_a_body_that_breaks_off_is_the_clients_fault(stack: Stack, caplog: pytest.LogCaptureFixture) -> None:
    stack.start()
    answer = stack.client.post(f"{stack.url}/v1/chat/completions", content=b"{}", headers={"Content-Encoding": "gzip"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_body")
    assert stack.proxy is not None
    with caplog.at_level("INFO", "agentsdpo.proxy"):
        with socket.create_connection(("127.0.0.1", stack.proxy.port)) as raw:
            raw.sendall(b"POST /c/left/v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        deadline = time.monotonic() + 10
        while "/c/left/" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.02)
    assert "/c/left/v1/chat/completions 400" in caplog.text
    assert "failed" not in caplog.text
