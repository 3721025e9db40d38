"""All rooms, one engine: the way of a call from what was asked to what was recorded, and who is served by which
weights."""

import asyncio
import logging
from contextlib import nullcontext, suppress
from dataclasses import replace
from hashlib import sha256

from agentsdpo.chat import ChatFormat
from agentsdpo.collect.proxy.anthropic import with_objects
from agentsdpo.collect.proxy.config import ProxyConfig
from agentsdpo.collect.proxy.conversation import Prompt
from agentsdpo.collect.proxy.line import Sampled
from agentsdpo.collect.proxy.refusals import Refused, UpstreamError
from agentsdpo.collect.proxy.room import Room, rendering
from agentsdpo.collect.proxy.shapes import (
    Asked,
    Reply,
    chat_logprobs,
    cut_at_stop,
    finish_reason,
    read_answer,
    text_logprobs,
)
from agentsdpo.collect.proxy.shelf import Shelf, make_shelf
from agentsdpo.collect.proxy.upstream import Upstream, cut
from agentsdpo.errors import ConfigError, StoreError
from agentsdpo.replay.formats.redact import Redactor
from agentsdpo.replay.storage import storage_for
from agentsdpo.types import Json, Sampling

log = logging.getLogger("agentsdpo.proxy")


class House:
    """The rooms of all tenants before one engine.

    Args:
        config: of the proxy. chat: the model's chat template as tokens.
        vocab_size: of the model, 0 where unknown.
        tenants: whether callers have tenants; each then has a store of its own below ``config.store``.
        upstream: of tests; made from the configuration otherwise.
    """

    def __init__(self, config: ProxyConfig, chat: ChatFormat, *, vocab_size: int = 0, tenants: bool = False,
                 upstream: Upstream | None = None) -> None:
        self.config, self.chat, self.tenants, self._vocab = config, chat, tenants, vocab_size
        self.upstream = upstream or Upstream(config.upstream, eos_id=chat.eos_id, timeout_s=config.timeout_s,
                                             retry_s=config.retry_s, vocab_size=vocab_size)
        self.rooms: dict[str, Room] = {}
        self._opening = asyncio.Lock()
        self.recovered = 0

    async def open(self) -> None:
        """Connect to the engine, then recover what an earlier proxy left behind.

        Raises:
            StoreError: a store cannot be opened. EngineError: the engine is not there.
            ConfigError: the folder holds the store of a proxy with tenants, or without, and this one is otherwise.
        """
        await self.upstream.open()
        storage = storage_for(self.config.store)
        if self.tenants and storage.exists("STORE.json"):
            raise ConfigError(f"{self.config.store} is itself a store, tenants would have theirs below it",
                              fix="give another --store")
        named = [name for name in storage.folders("") if storage.exists(f"{name}/STORE.json")
                 or storage.exists(f"{name}/recordings")] if self.tenants else [""]
        for tenant in named:
            with suppress(Refused) if self.tenants else nullcontext():  # logged; the others need not wait for it
                await self.room(tenant)

    @property
    def name(self) -> str:
        """Model name that clients are told."""
        return self.config.name or self.upstream.known.base

    @property
    def window(self) -> int:
        """Longest prompt plus answer, tokens; 0 where nobody says."""
        both = [n for n in (self.config.window, self.upstream.known.window) if n]
        return min(both, default=0)

    async def room(self, tenant: str) -> Room:
        """The room of a tenant, opened at its first request. Raises Refused with 503 where its store cannot be."""
        found = self.rooms.get(tenant)
        if found is not None:
            return found
        async with self._opening:
            if tenant not in self.rooms:
                try:
                    shelf, recovered = await asyncio.to_thread(self._shelf, tenant)
                except StoreError as error:
                    log.error("tenant %r: %s", tenant, error)
                    raise Refused(503, "the store cannot be opened", code="not_recorded", retry_after_s=30,
                                  fix="ask the operator of this proxy to look at its disk") from error
                self.recovered += recovered
                self.rooms[tenant] = Room(tenant, self.chat, shelf, self.config, self._stamp())
        return self.rooms[tenant]

    def _shelf(self, tenant: str) -> tuple[Shelf, int]:
        config = self.config
        redactor = None if config.redact == "off" else Redactor(tokens=config.redact, decoder=self._decoder)
        shelf = make_shelf(f"{config.store.rstrip('/')}/{tenant}" if tenant else config.store, redactor,
                           train_allowed=config.train_allowed, durability=config.durability,
                           spool=f"{config.spool}/{tenant}" if config.spool and tenant else config.spool)
        return shelf, shelf.recover()

    def _decoder(self, tokenizer_sha256: str) -> "_Decoder | None":
        return _Decoder(self.chat) if tokenizer_sha256 == self.chat.tokenizer_sha256 else None

    def _stamp(self) -> Json:
        return {"model_id": self.name, "tokenizer_sha256": self.chat.tokenizer_sha256, "engine": "vllm",
                "chat_template_sha256": self.chat.template_sha256, "vocab_size": self._vocab}

    def serving(self, tenant: str) -> str:
        """Name of the model or adapter that the next call of a tenant goes to."""
        if not self.config.adapters:
            return self.upstream.known.base
        return self.upstream.newest(f"{self.config.adapters}-{tenant}" if tenant else self.config.adapters)

    # ---------------------------------------------------------------------------------------------------- a call

    async def call(self, room: Room, name: str | None, asked: Asked) -> tuple[str, Reply]:
        """Answer one request; the record of the answer is durable when this returns.

        Returns:
            The name of the conversation, and the answer.

        Raises:
            Refused: no answer, with the reason.
        """
        prompt = await room.begin(name, asked)
        fault = "failed"
        try:
            reply = await self._answer(room, prompt, asked)
            fault = ""
        except Refused as error:
            fault = error.code or str(error.status)
            raise
        finally:
            room.done(prompt, fault)
        return prompt.conversation.name, reply

    async def _answer(self, room: Room, prompt: Prompt, asked: Asked) -> Reply:
        sampling = asked.sampling
        room_left = self.window - len(prompt.ids) if self.window else sampling.max_tokens
        if room_left < 1:
            raise Refused(400, f"the prompt has {len(prompt.ids)} tokens, the model's window {self.window}",
                          fix="shorten the history", code="context_length_exceeded", param="messages")
        if sampling.max_tokens > room_left:
            sampling = sampling.model_copy(update={"max_tokens": room_left})
        async with room.opening(prompt):
            sampled = await self._sample(room, prompt, asked, sampling)
        text, stopped, sampled = self._text(asked, sampled)
        answer = None
        if asked.messages is not None:
            thinking = self.chat.decode(prompt.ids[-3:]).rstrip().endswith("<think>")
            answer = read_answer(self.chat, text, prompt.turn, thinking=thinking,
                                 tools=() if asked.no_tools else asked.tools, history=asked.messages)
            answer = with_objects(answer) if asked.objects else answer
        elif prompt.text is None:
            prompt.text = self.chat.decode(prompt.ids)
        await room.record(prompt, sampled, sampling, answer)
        return replace(self._reply(prompt, asked, sampled, answer, text), stopped=stopped)

    async def _sample(self, room: Room, prompt: Prompt, asked: Asked, sampling: Sampling) -> Sampled:
        """Have the engine sample; an adapter that was unloaded in between is replaced by the newest."""
        try:
            sampled = await self._ask(room, prompt, asked, sampling)
        except UpstreamError as error:
            if error.status != 404:
                raise
            await self.upstream.look()
            sampled = await self._ask(room, prompt, asked, sampling)
        if asked.reason is None or sampled.completion.untrusted:
            return sampled
        return replace(sampled, completion=sampled.completion.model_copy(update={"untrusted": asked.reason}))

    async def _ask(self, room: Room, prompt: Prompt, asked: Asked, sampling: Sampling) -> Sampled:
        """One call under the weights that are the tenant's newest now; no other tenant shares its prefix cache."""
        model = self.serving(room.tenant)
        salt = sha256("\0".join((room.tenant, model, self.upstream.label or "")).encode()).hexdigest()
        return await self.upstream.sample(
            prompt.ids, sampling, model=model, salt=salt,
            call=f"{prompt.conversation.episode_id}-{prompt.turn}", extra=asked.extra, logprobs=asked.logprobs or 0)

    def _text(self, asked: Asked, sampled: Sampled) -> tuple[str, str, Sampled]:
        """What the client gets as text, what of ``stop`` ended it, and the completion as far as that goes."""
        if sampled.text is not None:
            return sampled.text, "", sampled
        ids = sampled.completion.token_ids
        stopped = cut_at_stop(self.chat, ids, asked.stop) if asked.stop else None
        if stopped is None:
            return self.chat.strip_end(ids), "", sampled
        return stopped[1], stopped[2], cut(sampled, stopped[0])

    def _reply(self, prompt: Prompt, asked: Asked, sampled: Sampled, answer: Json | None, text: str) -> Reply:
        kind = "cmpl" if answer is None else "chatcmpl"
        logprobs = None
        if asked.logprobs is not None:
            logprobs = (text_logprobs if answer is None else chat_logprobs)(self.chat, sampled)
        name = f"{prompt.conversation.name}.{prompt.conversation.attempt}-{prompt.turn}"
        return Reply(id=f"{kind}-{name}", model=sampled.model or self.name, finish=finish_reason(answer, sampled),
                     prompt_tokens=len(prompt.ids), completion_tokens=len(sampled.completion.token_ids),
                     message=answer, text=text, logprobs=logprobs)

    def count(self, asked: Asked) -> int:
        """Tokens of a chat request's prompt where it goes on from nothing. Raises Refused with 400 as a call does."""
        with rendering():
            return len(self.chat.open(asked.messages or [], asked.tools))

    # ---------------------------------------------------------------------------------------------------- upkeep

    async def sweep(self) -> None:
        """End conversations that have rested too long, in every room; a store that fails keeps no other waiting."""
        for room in list(self.rooms.values()):
            with suppress(Refused):  # logged where it was raised; tried again
                await room.sweep()

    async def close(self) -> None:
        """End every conversation and let go of everything; what the store will not take stays in its journal."""
        for room in self.rooms.values():
            try:
                await room.end(list(room.open))
                await asyncio.to_thread(room.shelf.close)
            except (Refused, StoreError) as error:
                log.error("tenant %r: conversations stay in their journals for the next start: %s", room.tenant, error)
        await self.upstream.close()


class _Decoder:
    """The chat format's tokenizer as the redactor asks for it."""

    def __init__(self, chat: ChatFormat) -> None:
        self._backend = chat.tokenizer.backend_tokenizer

    def decode(self, ids: object, skip_special_tokens: bool = True) -> str:
        """Text of these ids."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)  # pyright: ignore
