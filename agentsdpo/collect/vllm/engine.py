"""The engine that samples from a vLLM server; see :class:`agentsdpo.collect.engine.Engine`."""

import time
from collections.abc import Sequence

from agentsdpo.collect.vllm.retry import Asker, Line, Passing, Refused, patiently
from agentsdpo.collect.vllm.server import Handshake, ServerFacts, ask_server, base_url, headers
from agentsdpo.collect.vllm.wire import (
    GENERATE,
    adapter_version,
    completions_body,
    generate_body,
    joined,
    label_version,
    read_answer,
)
from agentsdpo.errors import EngineError
from agentsdpo.types import Completion, Sampling


class VllmEngine:
    """A policy served by vLLM: token ids in and out, processed log-probs, version spans.

    A call is whole or it is sent again: of an attempt that failed nothing is used, so nothing is sampled twice into
    one record. A server that is gone is waited for; when it is back it is asked again what it is, since it may have
    been started with other weights or another kind of log-prob. A call that the server cuts short (a publisher that
    aborts) goes on from where it was cut, under whatever weights serve then, and its spans say so.

    Args:
        url: address of the server, ``http://host:port``.
        model: name to ask for: a base model, or an adapter ``name@v12``, whose version is then that of every token;
            None is the server's first base model.
        eos_ids: ids that end a completion, sent along so that both sides agree; () leaves it to the server.
        vocab_size: ids lie below it; 0 does not check.
        version: policy version of weights the server labels ``default`` (nobody has set a label); None: unknown, so
            that such tokens are kept and never trained on.
        api_key: bearer key; None takes ``VLLM_API_KEY`` of the environment.
        timeout_s: seconds without a byte after which an attempt failed.
        patience_s: seconds over which a call is attempted again before it fails.
        wait_s: seconds the constructor waits for a server that is not there yet.

    Raises:
        ConfigError: the address is none.
        EngineError: no server there, or it does not serve the model.
    """

    name = "vllm"

    def __init__(self, url: str, *, model: str | None = None, eos_ids: Sequence[int] = (), vocab_size: int = 0,
                 version: int | None = None, api_key: str | None = None, timeout_s: float = 600.0,
                 patience_s: float = 300.0, wait_s: float = 0.0) -> None:
        self.url, self.eos_ids, self.vocab_size = base_url(url), tuple(eos_ids), vocab_size
        self._initial, self._patience_s, self._timeout_s = version, patience_s, timeout_s
        self._headers = headers(api_key)
        self._line = Line(self.url, self._headers, timeout_s)
        self._facts = self._shake(wait_s)
        self.model = model or self._facts.base
        if self.model not in self._facts.models:
            raise EngineError(f"{self.url} serves {', '.join(self._facts.models)}, not {self.model}",
                              fix="name one of these, or load the adapter first")
        self.context_window = self._facts.window
        self._version = self._first_version()
        self._busy: set[str] = set()
        self._sent = 0
        self._lost = False
        self._handshake = Handshake(lambda: self._shake(0.0))
        self.tokens_sampled = self.attempts_failed = 0

    @property
    def facts(self) -> ServerFacts:
        """What the server said of itself when it was last asked."""
        return self._facts

    @property
    def records_kept(self) -> bool:
        """Whether truncated sampling comes with its kept set."""
        return self._facts.records_kept

    @property
    def version(self) -> int:
        """Newest policy version seen: of the adapter asked for, else of the server's label; -1 while unknown."""
        return self._version

    def use(self, model: str) -> None:
        """Ask for this model from the next call on; calls in flight keep theirs.

        Args:
            model: a name the server serves; an adapter's name carries its version (``name@v12``).
        """
        self.model = model
        self._version = self._first_version()

    async def complete(self, prompt_ids: Sequence[int], sampling: Sampling, *, session: str) -> Completion:
        """Sample one completion; see :meth:`agentsdpo.collect.engine.Engine.complete`.

        Raises:
            EngineError: also when the server did not recover within ``patience_s`` or refuses the request.
        """
        if not 0 < len(prompt_ids) < self.context_window:
            raise EngineError(f"a prompt of {len(prompt_ids)} tokens leaves no room in a window of "
                              f"{self.context_window}", fix="enlarge the window or compact the context")
        if session in self._busy:
            raise EngineError(f"session {session!r} already has a call in flight", fix="await one call per branch")
        self._busy.add(session)
        try:
            return await self._whole(list(prompt_ids), sampling, session)
        finally:
            self._busy.discard(session)

    def release(self, session: str) -> None:
        """Nothing is held for a session: the server's prefix cache forgets by itself."""

    # ------------------------------------------------------------------------------------------------ one call

    async def _whole(self, prompt: list[int], sampling: Sampling, session: str) -> Completion:
        """A completion that came to its own end; what was cut short is continued."""
        parts: list[Completion] = []
        room = min(sampling.max_tokens, self.context_window - len(prompt))
        while True:
            done = [token for part in parts for token in part.token_ids]
            rest = sampling if not done and room == sampling.max_tokens else sampling.model_copy(update={
                "max_tokens": room - len(done), "seed": (sampling.seed + len(done)) % 2**63})
            part = await self._patient([*prompt, *done], rest, session)
            parts.append(part)
            self.tokens_sampled += len(part.token_ids)
            if part.finish_reason != "abort":
                break
            if len(done) + len(part.token_ids) >= room:
                parts[-1] = part.model_copy(update={"finish_reason": "length"})
                break
        whole = joined(parts)
        known = [span.version for span in whole.versions]
        self._version = max([self._version, *known[-1:]])
        return whole

    async def _patient(self, prompt: list[int], sampling: Sampling, session: str) -> Completion:
        """One part, attempted until it comes or patience ends; each attempt has an id of its own.

        Raises:
            EngineError: patience ended, or the server refused.
        """
        async def once(number: int) -> Completion:
            try:
                return await self._attempt(prompt, sampling, session)
            except Passing as fault:
                self.attempts_failed += 1
                self._lost = self._lost or fault.lost
                raise

        return await patiently(self._patience_s, once)

    async def _attempt(self, prompt: list[int], sampling: Sampling, session: str) -> Completion:
        if self._lost:
            await self._ask_again()
        self._sent += 1
        facts, model = self._facts, self.model
        adapter = adapter_version(model)
        make = generate_body if facts.route == GENERATE else completions_body
        body = make(prompt, sampling, model=model, request_id=f"{session}/{self._sent}", salt=f"v{self._version}",
                    stop_ids=self.eos_ids, seeded=facts.seeded)
        spans = facts.route == GENERATE or adapter is not None
        before = self._version if spans else await self._label()
        began = time.monotonic()
        try:
            answer = await self._line.send("POST", facts.route, body)
        except Refused as refusal:
            if refusal.status == 404 and model != self.model:  # unloaded: a newer version is served by now
                raise Passing(refusal.what, fix=refusal.fix) from refusal
            raise
        around = None if spans else (before, await self._label())
        kind = "raw" if sampling.temperature == 0.0 else facts.kind
        part = read_answer(answer, facts.route, kind=kind, vocab_size=self.vocab_size, adapter=adapter,
                           initial=self._initial, around=around)
        if part.finish_reason == "abort" and not part.token_ids:
            raise Passing(f"{self.url} aborted a call before its first token",
                          fix="let the publisher pause with mode=keep")
        return part.model_copy(update={"working_s": time.monotonic() - began})

    async def _label(self) -> int:
        """Version of the weights that serve at this moment, for a route whose answers do not say it."""
        if self._facts.label is None:
            return label_version("default", self._initial)
        return label_version((await self._line.send("GET", "/weight_info"))["weight_version"], self._initial)

    # --------------------------------------------------------------------------------------------- handshake

    def _shake(self, wait_s: float) -> ServerFacts:
        from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

        with Asker(self.url, self._headers) as ask:
            return Retrying(retry=retry_if_exception_type(Passing), wait=wait_fixed(0.5), reraise=True,
                            stop=stop_after_delay(wait_s))(ask_server, ask)

    async def _ask_again(self) -> None:
        """Ask a server that was lost what it is now.

        Raises:
            Passing: it is not there yet.
        """
        self._facts = await self._handshake()
        self._lost, self.context_window, self._version = False, self._facts.window, self._first_version()

    def _first_version(self) -> int:
        adapter = adapter_version(self.model)
        return label_version(self._facts.label or "default", self._initial) if adapter is None else adapter
