"""The proxy as a program: killed and started again, what was acknowledged is there; stopped by a signal, all is."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from proxy_stack import Stack

from agentsdpo.errors import AgentSdpoError
from agentsdpo.verbs.proxy import proxy

pytestmark = pytest.mark.slow


class Program:
    """``agentsdpo proxy`` in a process of its own."""

    def __init__(self, stack: Stack, model: Path, *more: str) -> None:
        command = [sys.executable, "-m", "agentsdpo.cli", "proxy", "--upstream",
                   f"http://127.0.0.1:{stack.engine.port}", "--store", str(stack.store), "--model", str(model),
                   "--port", "0", *more]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self._log = model / f"{time.monotonic_ns()}.log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(command, stderr=log, env=environment)
        while self.process.poll() is None and "listening on" not in self.talk:
            time.sleep(0.05)
        found = re.search(r"listening on (http://\S+)/v1", self.talk)
        self.url = found[1] if found else ""

    @property
    def talk(self) -> str:
        """What it said so far."""
        return self._log.read_text()

    def ask(self, name: str, *messages: dict[str, Any]) -> httpx.Response:
        return httpx.post(f"{self.url}/c/{name}/v1/chat/completions", json={"messages": list(messages)}, timeout=30)

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def model(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_kill_nine_loses_no_acknowledged_answer(stack: Stack, model: Path) -> None:
    stack.run(stack.engine.start())
    stack.engine.delay_s = 0.01
    acknowledged: dict[str, int] = {}
    program = Program(stack, model, "--train-allowed")

    def play(name: str) -> None:
        history: list[dict[str, Any]] = []
        while True:
            history.append({"role": "user", "content": f"{name} {len(history)}"})
            try:
                answer = program.ask(name, *history)
                if answer.status_code != 200:
                    return
                message = answer.json()["choices"][0]["message"]
            except (httpx.HTTPError, ValueError):
                return
            acknowledged[name] = acknowledged.get(name, 0) + 1
            history.append({"role": "assistant", "content": message["content"]})

    players = [threading.Thread(target=play, args=(f"c{i}",)) for i in range(4)]
    for player in players:
        player.start()
    deadline = time.monotonic() + 60
    while sum(acknowledged.values()) < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert program.end(signal.SIGKILL) == -signal.SIGKILL
    for player in players:
        player.join(timeout=30)
    again = Program(stack, model, "--train-allowed")
    assert "4 conversations of an earlier proxy recovered" in again.talk
    found = {episode.task_id: episode for episode in stack.episodes()}
    assert set(found) == set(acknowledged)
    for name, count in acknowledged.items():
        calls = found[name].branches[0].calls
        assert count <= len(calls) <= count + 1
        assert found[name].branches[0].n_trainable > 0
        assert found[name].hint is not None
    told = httpx.post(f"{again.url}/v1/feedback", json={"conversation": "c0", "text": "Said after the crash."})
    assert told.json()["state"] == "stored"
    assert again.ask("c0", {"role": "user", "content": "new"}).status_code == 200
    assert again.end(signal.SIGTERM) == 0
    after = [episode for episode in stack.episodes() if episode.task_id == "c0"]
    assert [episode.attempt for episode in after] == [0, 1]
    assert after[0].hint is not None
    assert "Said after the crash." in after[0].hint.text
    assert not list(stack.store.rglob("*.arrows"))


def test_recordings_survive_as_well(stack: Stack, model: Path) -> None:
    stack.run(stack.engine.start())
    program = Program(stack, model)
    assert program.ask("c", {"role": "user", "content": "x"}).status_code == 200
    program.end(signal.SIGKILL)
    assert not list(stack.store.glob("recordings/*.parquet"))
    again = Program(stack, model)
    assert "1 conversations" in again.talk
    assert again.end(signal.SIGINT) == 0
    assert len(list(stack.store.glob("recordings/*.parquet"))) == 1


@pytest.mark.parametrize(("asked", "words"), [
    ({"host": "0.0.0.0"}, "no key is asked for"), ({"redact": "all"}, "redact"),
    ({"sets": ["rate_per_minut=3"]}, "did you mean"), ({"keys": Path("/nowhere")}, "cannot be read"),
    ({"model": "/nowhere"}, "no model folder"), ({}, "cannot be reached")])
def test_wrong_requests_get_one_sentence(tmp_path: Path, model: Path, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(AgentSdpoError, match=words):
        proxy(**{"upstream": "http://127.0.0.1:9", "store": str(tmp_path), "model": str(model), "host": "127.0.0.1",
                 "port": 0, "keys": None, "tenant_header": "", "adapters": "", "train_allowed": False,
                 "redact": "off", "idle": 900.0, "sets": [], **asked})
