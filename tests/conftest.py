"""Fixtures every room may use: a tokenizer and a model small enough to be made in the test itself."""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import settings

# Before torch and transformers are imported: one thread, so that tests repeat bit for bit, and no network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A shell starts what it puts in the background with Ctrl-C ignored, and children inherit that: some tests send one.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine is no reason to fail; two runs of the same code draw the same examples.
settings.register_profile("here", deadline=None, derandomize=True)
settings.load_profile("here")

CHAT_TEMPLATE = """\
{%- set opening = '' -%}
{%- if messages and messages[0]['role'] == 'system' -%}
  {%- set opening = messages[0]['content'] -%}
{%- endif -%}
{%- if opening or tools -%}
{{- '<|im_start|>system\\n' + opening -}}
  {%- if tools -%}
{{- '\\n\\n# Tools\\n\\nCall them as <tool_call>{"name": ..., "arguments": ...}</tool_call>.\\n<tools>' -}}
    {%- for tool in tools -%}
{{- '\\n' + (tool | tojson) -}}
    {%- endfor -%}
{{- '\\n</tools>' -}}
  {%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' and loop.first -%}
  {%- elif message['role'] == 'tool' -%}
    {%- if loop.first or messages[loop.index0 - 1]['role'] != 'tool' -%}
{{- '<|im_start|>user' -}}
    {%- endif -%}
{{- '\\n<tool_response>\\n' + message['content'] + '\\n</tool_response>' -}}
    {%- if loop.last or messages[loop.index0 + 1]['role'] != 'tool' -%}
{{- '<|im_end|>\\n' -}}
    {%- endif -%}
  {%- else -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] -}}
    {%- for call in message['tool_calls'] or [] -%}
{{- '\\n<tool_call>\\n' + (call['function'] | tojson) + '\\n</tool_call>' -}}
    {%- endfor -%}
{{- '<|im_end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
"""ChatML as Qwen3 speaks it: tools listed in the system message, tool answers inside a user message."""

_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_PLAIN = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
_CORPUS = [
    "system user assistant You are an agent at a desk. Read the files, call the tools and submit an answer.",
    '{"name": "note_get", "arguments": {"path": "/finance/orders.csv", "expr": "1 + 2"}}',
    "The total was wrong: the amount must be in cents, saved in /reports and sent to finance.",
]


@pytest.fixture(scope="session", autouse=True)
def quick_disk() -> Iterator[None]:
    """Nobody cuts the power of this machine: waiting for its disk shows nothing. Power cuts are played in replay/."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, lambda handle: None)
        yield


@pytest.fixture(scope="session")
def one_thread() -> None:
    """Torch keeps to one thread, whatever the environment says: sums repeat bit for bit."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def chat() -> Any:
    """Chat format of the seed model; rooms that go without it have one of :func:`tiny_tokenizer`."""
    from agentsdpo.envs.desk.seed import seed_path
    from agentsdpo.learn.load import load_chat

    return load_chat(seed_path())


@pytest.fixture(scope="module")
def moto() -> Iterator[Any]:
    """An S3 server on loopback with the bucket ``bucket``; its keys, and none of this machine's, in the environment."""
    from tests.replay.replay_s3_server import ENVIRONMENT, Moto

    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        server = Moto()
        yield server
        server.close()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """Byte-level BPE of a few hundred ids with ChatML turns; ends a turn with ``<|im_end|>``, pads with its own id."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=_SPECIAL, initial_alphabet=alphabet,
                                  show_progress=False)
    bpe.train_from_iterator(_CORPUS, trainer)
    bpe.add_tokens([AddedToken(text, special=False, normalized=False) for text in _PLAIN])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   additional_special_tokens=["<|im_start|>"], chat_template=CHAT_TEMPLATE,
                                   clean_up_tokenization_spaces=False, model_max_length=4096)


def make_tiny_model(vocab_size: int, *, seed: int = 0) -> Any:
    """Qwen3 with random float32 weights: 2 layers, width 64, 2 heads of 32; the vocabulary padded to 64s.

    Args:
        vocab_size: ids the tokenizer knows; rounded up so that padded rows of the LM head are exercised.
        seed: of the weights; torch's global generator is put back as it was.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(vocab_size=(vocab_size // 64 + 1) * 64, hidden_size=64, intermediate_size=128,
                         num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
                         max_position_embeddings=4096, tie_word_embeddings=True, use_cache=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    return model.float().eval()


@pytest.fixture
def tiny_model(tiny_tokenizer: Any) -> Any:
    """A fresh :func:`make_tiny_model` for :func:`tiny_tokenizer`; a test may train it."""
    return make_tiny_model(len(tiny_tokenizer))


def chat_answer(text: str = "", *, calls: list[dict[str, Any]] | None = None, tokens: tuple[int, int] = (9, 3)) -> Any:
    """A chat completion as OpenAI's API answers it."""
    message = {"role": "assistant", "content": text, "tool_calls": calls}
    return {"id": "c", "object": "chat.completion", "created": 1, "model": "m",
            "choices": [{"index": 0, "finish_reason": "tool_calls" if calls else "stop", "message": message}],
            "usage": {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)}}


class ChatServer:
    """An OpenAI-compatible server on loopback whose answers a test writes.

    ``answer`` takes the request's body and returns what is sent: text or JSON, or ``(status, either, headers)``.
    ``seen`` holds the bodies so far, ``keys`` their authorization headers.
    """

    say = staticmethod(chat_answer)

    def __init__(self) -> None:
        self.answer: Callable[[Any], Any] = lambda body: chat_answer("hello")
        self.seen: list[Any] = []
        self.keys: list[str] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                owner.seen.append(body)
                owner.keys.append(self.headers.get("authorization", ""))
                said = owner.answer(body)
                status, said, headers = said if isinstance(said, tuple) else (200, said, {})
                data = (said if isinstance(said, str) else json.dumps(said)).encode()
                self.send_response(status)
                fields = {"content-type": "application/json", "content-length": str(len(data)), **headers}
                for name, value in fields.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
                self.close_connection = int(fields["content-length"]) != len(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def chat_server() -> Iterator[ChatServer]:
    """A fresh :class:`ChatServer`; ``chat_server.say`` makes an answer."""
    server = ChatServer()
    yield server
    server.server.shutdown()
    server.server.server_close()
