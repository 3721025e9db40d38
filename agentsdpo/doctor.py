"""Whether what a vLLM server says can be learnt from: one check after the other, each with what to do about it.

    agentsdpo doctor http://127.0.0.1:8000 --model FOLDER

A check that stands on a failed one is not tried, and says so.
"""

import asyncio
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from agentsdpo.chat import ChatFormat
from agentsdpo.collect.branch import untrainable
from agentsdpo.collect.vllm import VllmEngine
from agentsdpo.collect.vllm.retry import REVIVE, Asker, Passing
from agentsdpo.collect.vllm.server import base_url, first_token, headers, probe_kind
from agentsdpo.collect.vllm.wire import GENERATE
from agentsdpo.errors import AgentSdpoError
from agentsdpo.files import sync
from agentsdpo.learn.load import load_chat
from agentsdpo.learn.scoring import ModelScorer
from agentsdpo.publish.control import VllmControl
from agentsdpo.publish.push import BOUND, mean_difference
from agentsdpo.replay.fitness import examine as examine_storage
from agentsdpo.replay.storage import storage_for
from agentsdpo.types import Completion, Json, Sampling, ToolSpec

SAMPLES, TOKENS = 4, 32
"""Completions of the parity check, and tokens of each."""
SLOW_FSYNC_S, LITTLE_BYTES = 0.1, 2**30
"""An fsync above this holds up every turn; less free space than this is soon full."""
TEXTS = ("Read the file, then answer.", "<tool_call>\n{\"name\": \"get\", \"arguments\": {\"n\": 12}}\n</tool_call>",
         "naïve — 漢字 🙂", "  two  spaces\n\n\ttab\r\n", "1234567.50", "<|im_end|>\n<|im_start|>user\nhi")
"""What tokenizers differ over: calls, scripts, white space, digits, control tokens."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: of the check. state: ``ok``, ``bad`` or ``skipped``. what: found. fix: what to do, when it is bad.
    """

    name: str
    state: Literal["ok", "bad", "skipped"]
    what: str
    fix: str = ""

    def line(self) -> str:
        """For people.

        >>> Check("disk", "bad", "1 MiB is free", "make room").line()
        'bad      disk           1 MiB is free; make room'
        """
        return f"{self.state:<8} {self.name:<14} {self.what}{f'; {self.fix}' if self.fix else ''}"

    def as_json(self) -> Json:
        """All fields by name."""
        return asdict(self)


class _Bad(Exception):
    """A check failed: what and fix."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


class _Skip(Exception):
    """A check could not be tried: why."""


def examine(url: str, folder: str, *, served: str | None = None, store: str = ".",
            update: bool = False) -> Iterator[Check]:
    """Look at server, model and storage.

    Args:
        url: address of the server.
        folder: model that learns.
        served: name to ask for; the server's own model when not given.
        store: where episodes will be kept.
        update: swap in the weights of ``folder``, which must be those that are served.

    Raises:
        ConfigError: the address is none. ModelError: the folder holds no model.
    """
    patient = _Patient(base_url(url), load_chat(folder), folder, served, store)
    checks: list[tuple[str, Callable[[], str]]] = [
        ("reachable", patient.reachable), ("tokenizer", patient.tokenizer), ("template", patient.template),
        ("token_ids", patient.token_ids), ("versions", patient.versions), ("logprobs", patient.logprobs),
        ("parity", patient.parity), ("weight_update", patient.weight_update if update else patient.no_update),
        ("disk", patient.disk)]
    for name, check in checks:
        yield _try(name, check)


def _try(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, "ok", check())
    except _Bad as bad:
        return Check(name, "bad", bad.what, bad.fix)
    except _Skip as skip:
        return Check(name, "skipped", str(skip))
    except AgentSdpoError as error:
        lost = isinstance(error, Passing) and error.lost  # its fix would send people here
        return Check(name, "bad", error.what, REVIVE if lost else error.fix)


class _Patient:
    """What the checks look at; each returns what is well, or raises."""

    def __init__(self, url: str, chat: ChatFormat, folder: str, served: str | None, store: str) -> None:
        self.url, self.chat, self.folder, self.served, self.store = url, chat, folder, served, store
        self._engine: VllmEngine | None = None
        self._samples: list[tuple[list[int], Completion]] = []

    @property
    def engine(self) -> VllmEngine:
        if self._engine is None:
            raise _Skip("the server is not reachable")
        return self._engine

    @cached_property
    def scorer(self) -> ModelScorer:
        return ModelScorer(self.folder)

    def _ask(self, method: str, path: str, body: Json | None = None) -> Any:
        with Asker(self.url, headers(None)) as ask:
            return ask.send(method, path, body)

    def _complete(self, prompt: list[int], sampling: Sampling) -> Completion:
        return asyncio.run(self.engine.complete(prompt, sampling, session=f"doctor/{len(self._samples)}"))

    # -------------------------------------------------------------------------------------------------- the checks

    def reachable(self) -> str:
        self._engine = VllmEngine(self.url, model=self.served, eos_ids=(self.chat.eos_id,), patience_s=10.0)
        facts = self._engine.facts
        return f"vLLM {facts.software or 'of unknown version'} serves {self.engine.model}, window {facts.window}"

    def tokenizer(self) -> str:
        for text in TEXTS:
            theirs = self._ask("POST", "/tokenize", {"model": self.engine.model, "prompt": text,
                                                     "add_special_tokens": False})["tokens"]
            if theirs != self.chat.encode(text):
                raise _Bad(f"{text!r} is {_few(theirs)} there and {_few(self.chat.encode(text))} in {self.folder}",
                           "serve the model whose tokenizer the learner has")
        return f"{len(TEXTS)} texts give the same ids"

    def template(self) -> str:
        tool = ToolSpec(name="get", description="Read.", parameters={"type": "object", "properties": {}})
        messages: list[Json] = [{"role": "system", "content": "You work."}, {"role": "user", "content": "Go on."}]
        body = {"model": self.engine.model, "messages": messages, "tools": [tool.openai()],
                "add_generation_prompt": True, "add_special_tokens": False}
        theirs, ours = self._ask("POST", "/tokenize", body)["tokens"], self.chat.open(messages, [tool])
        if theirs != ours:
            raise _Bad(f"a conversation is {len(theirs)} ids there and {len(ours)} in {self.folder}",
                       "serve with the learner's template: --chat-template FOLDER/chat_template.jinja")
        return "a conversation with a tool gives the same ids"

    def token_ids(self) -> str:
        facts = self.engine.facts
        for i in range(SAMPLES):
            prompt = [*self.scorer.prompt[:64], *self.chat.encode(str(i))]
            done = self._complete(prompt, Sampling(max_tokens=TOKENS))
            flaw = untrainable(done, Sampling())
            if flaw in ("no_token_ids", "length_mismatch", "logprobs_misaligned", "no_logprobs", "logprob_sentinel"):
                raise _Bad(f"a completion cannot be trained on: {flaw}", "use vLLM 0.32 or newer for this model")
            self._samples.append((prompt, done))
        if facts.route != GENERATE:
            raise _Bad("the token endpoint is off, so that answers do not say which version sampled which token",
                       "start the server with --enable-scale-out, as agentsdpo serve does")
        return f"{sum(len(done.token_ids) for _, done in self._samples)} tokens came with ids and log-probs"

    def versions(self) -> str:
        if not self._samples:
            raise _Skip("nothing was sampled")
        found = {span.version for _, done in self._samples for span in done.versions}
        if -1 in found:
            raise _Bad(f"the weights are labelled {self.engine.facts.label!r}, which is no policy version: nothing "
                       "that is sampled can be trained on", "publish a version to it, or start it with agentsdpo serve")
        return f"sampled by policy version {', '.join(map(str, sorted(found)))}"

    def logprobs(self) -> str:
        facts = self.engine.facts
        with Asker(self.url, headers(None)) as ask:
            seen = probe_kind(first_token(ask, self.engine.model, facts.route))
        if seen != "processed" or facts.kind != "processed":
            raise _Bad(f"log-probs are {seen} at temperatures 1 and 0.5, the server calls them {facts.kind}: they are "
                       "not of the distribution that was drawn from",
                       "start it with --logprobs-mode processed_logprobs")
        return "of the distribution drawn from, at temperatures 1 and 0.5 and with top-k 2"

    def parity(self) -> str:
        off = self._off()
        if not off <= BOUND:
            raise _Bad(f"log-probs differ from those of {self.folder} by {off:.3g} nats in the mean, more than {BOUND}",
                       "serve these weights, in the learner's data type")
        return f"mean difference {off:.2g} nats over {len(self._samples)} completions"

    def _off(self) -> float:
        """Mean absolute difference of the samples' log-probs from the learner's, nats."""
        if not self._samples or any(done.logprob_kind != "processed" for _, done in self._samples):
            raise _Skip("no processed log-probs to compare")
        told = [logp for _, done in self._samples for logp in done.logprobs]
        own = [logp for prompt, done in self._samples
               for logp in self.scorer.logps([*prompt, *done.token_ids], len(done.token_ids))]
        return mean_difference(told, own)

    def no_update(self) -> str:
        raise _Skip("add --update to swap in the weights of --model, which must be those it serves")

    def weight_update(self) -> str:
        if not self._off() <= BOUND:
            raise _Skip("the weights served are not those of --model")
        with VllmControl(self.url, timeout_s=120.0) as server:
            if server.adapters():
                raise _Skip(f"adapters stand on its weights: {', '.join(server.adapters())}")
            label, began = server.label(), time.monotonic()
            server.pause()
            try:
                server.reload(Path(self.folder).resolve())
                server.reset_cache()
                server.set_label(label)
            finally:
                server.resume()
            pause = time.monotonic() - began
            model = server.base()[0]
            ids, told = server.sample(model, self.scorer.prompt, 16)
        off = mean_difference(told, self.scorer.logps([*self.scorer.prompt, *ids], len(ids)))
        if not off <= BOUND:
            raise _Bad(f"after a reload of the same weights it answers {off:.3g} nats off",
                       "start it with agentsdpo serve; restart it now, since it serves neither model")
        return f"the same weights were swapped in within {pause:.2f} s and answer as before ({off:.2g} nats)"

    def disk(self) -> str:
        if "://" in self.store:
            _demand(self.store, self.store)
            return f"{self.store} keeps what a store needs"
        place = Path(self.store).resolve()
        here = next(folder for folder in (place, *place.parents) if folder.is_dir())
        try:
            with tempfile.TemporaryDirectory(dir=here, prefix=".agentsdpo-doctor-") as inside:
                _demand(inside, self.store)
                free, delay = shutil.disk_usage(inside).free, _fsync_s(Path(inside))
        except OSError as error:
            raise _Bad(f"nothing can be written in {here}: {error.strerror}", "choose another folder for the store"
                       ) from error
        if free < LITTLE_BYTES:
            raise _Bad(f"{free / 2**20:.0f} MiB are free in {here}", "make room before episodes are collected")
        if delay > SLOW_FSYNC_S:
            raise _Bad(f"an fsync in {here} takes {delay * 1000:.0f} ms, and every turn of an episode waits for two",
                       "keep the store on a local disk, or set replay.durability to episode")
        return f"{free / 2**30:.0f} GiB free in {here}, fsync {delay * 1000:.1f} ms"


def _demand(place: str, store: str) -> None:
    """Raise when a place breaks a promise that a store is built on."""
    for finding in examine_storage(storage_for(place)):
        if finding.needed and not finding.good:
            raise _Bad(f"{store} cannot keep a store: {finding.what}", finding.fix)


def _fsync_s(folder: Path) -> float:
    """Median seconds of an fsync of 64 KiB in a folder."""
    times = []
    for i in range(7):
        path = folder / f"probe-{i}"
        path.write_bytes(b"x" * 65536)
        began = time.perf_counter()
        sync(path)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _few(ids: list[int]) -> str:
    return f"{ids[:8]}{'...' if len(ids) > 8 else ''}"
