"""The room of one tenant: its open conversations, where they are kept, and nothing of anybody else."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

from agentsdpo.chat import ChatFormat
from agentsdpo.collect.proxy.config import ProxyConfig
from agentsdpo.collect.proxy.conversation import Conversation, Late, Prompt
from agentsdpo.collect.proxy.feedback import check_turns
from agentsdpo.collect.proxy.history import digests
from agentsdpo.collect.proxy.line import Sampled
from agentsdpo.collect.proxy.past import Past
from agentsdpo.collect.proxy.refusals import Refused
from agentsdpo.collect.proxy.shapes import Asked
from agentsdpo.collect.proxy.shelf import Shelf
from agentsdpo.errors import AgentSdpoError, ModelError, StoreError
from agentsdpo.replay.ids import derived_uuid, uuid7
from agentsdpo.replay.upkeep.recover import PROXY
from agentsdpo.types import Episode, Json, Sampling, StopReason

log = logging.getLogger("agentsdpo.proxy")
T = TypeVar("T")


@contextmanager
def rendering() -> Iterator[None]:
    """What a chat template cannot render is refused, with 400, in its own words."""
    try:
        yield
    except Exception as error:  # whatever the author of the template raises: jinja errors, lookups, ...
        if isinstance(error, AgentSdpoError) and not isinstance(error, ModelError):
            raise
        raise Refused(400, f"the chat template cannot render these messages: {error}", param="messages",
                      fix="send the roles in an order that the model's template knows") from error


class Room:
    """All conversations of one tenant.

    Args:
        tenant: name, "" where there are no tenants.
        chat: the model's chat template as tokens.
        shelf: keeps what has ended.
        config: of the proxy.
        stamp: fields of every episode (model, tokenizer, vocabulary).
    """

    def __init__(self, tenant: str, chat: ChatFormat, shelf: Shelf, config: ProxyConfig, stamp: Json) -> None:
        self.tenant, self.chat, self.shelf, self.config, self._stamp = tenant, chat, shelf, config, stamp
        self.open: dict[str, Conversation] = {}
        self._heads: dict[bytes, Conversation] = {}
        self._past = Past()
        self._ending = asyncio.Lock()

    # ------------------------------------------------------------------------------------------------- requests

    async def begin(self, name: str | None, asked: Asked) -> Prompt:
        """The call a request asks for, in the conversation it names or is known by; it is under way from now on.

        Args:
            name: of the conversation; None finds the one whose recorded history the request goes on from, or opens
                a new one.

        Raises:
            Refused: 400, the chat template cannot render these messages.
        """
        chain = [] if asked.messages is None else digests(asked.tools, asked.messages)
        conversation = self._locate(name, asked, chain)
        if conversation.ending:
            async with self._ending:  # it is being written to the store: what comes now is its next attempt
                conversation = self._locate(name, asked, chain)
        if conversation.broken:
            raise Refused(503, "this conversation cannot be recorded now", code="not_recorded", retry_after_s=5,
                          fix="ask the operator of this proxy to look at its disk")
        conversation.flying += 1
        try:
            prompt = self._prompt(conversation, asked, chain)
        except BaseException:
            self._landed(conversation)
            raise
        if self.config.auto_feedback and asked.messages is not None and not conversation.lines:
            prompt.late = self._past.late(name, chain, asked.messages)
        prompt.turn, conversation.turns = conversation.turns, conversation.turns + 1
        conversation.used = time.monotonic()
        if prompt.line is not None:
            prompt.line.busy = True
        return prompt

    @staticmethod
    def _prompt(conversation: Conversation, asked: Asked, chain: list[bytes]) -> Prompt:
        """The prompt of a request in its conversation. Raises Refused where the template, or the request, is at fault.
        """
        with rendering():
            if asked.messages is not None:
                return conversation.chat_prompt(asked.messages, asked.tools, chain)
            assert asked.prompt is not None
            return conversation.text_prompt(asked.prompt)

    def _locate(self, name: str | None, asked: Asked, chain: Sequence[bytes]) -> Conversation:
        return self._named(name) if name else self._known(asked, chain) or self._named(uuid7())

    def _named(self, name: str) -> Conversation:
        """The open conversation of a name, or a new attempt at it."""
        found = self.open.get(name)
        if found is None:
            episode_id = self.episode_id(name)
            about = {"episode_id": episode_id, "task_id": name, "env_id": PROXY, "group_id": episode_id,
                     "run_id": self.config.run_id, "train_allowed": self.config.train_allowed,
                     "stop_reason": StopReason.COMPLETED.value, **self._stamp}
            found = self.open[name] = Conversation(name, episode_id, -1, self.chat, about)
        return found

    def episode_id(self, name: str) -> str:
        """Id in the store of a conversation: the same for ever, so that feedback finds it after a restart."""
        return derived_uuid("conversation", self.shelf.identity, name)

    def _known(self, asked: Asked, chain: Sequence[bytes]) -> Conversation | None:
        """The conversation whose end this request goes on from."""
        if asked.messages is None:
            assert asked.prompt is not None
            return next((c for c in reversed(self.open.values()) if c.begun(asked.prompt)), None)
        for n in range(len(asked.messages) - 1, 0, -1):
            found = self._heads.get(chain[n])
            if found is not None:
                point = found.points[chain[n]]
                fresh = point.at == len(point.line.ids) and not point.line.busy and not point.line.ended
                return found if fresh and found.find(chain, asked.messages) == (point, n) else None
        return None

    # ---------------------------------------------------------------------------------------------------- answers

    @asynccontextmanager
    async def opening(self, prompt: Prompt) -> AsyncIterator[None]:
        """Has the journal of a conversation that begins opened while the engine samples, which takes longer.

        Raises:
            Refused: 503, the disk is full or failing.
        """
        task = None if prompt.conversation.journal else asyncio.create_task(self._open(prompt))
        try:
            yield
        finally:
            if task is not None:
                await task

    async def _open(self, prompt: Prompt) -> None:
        async with prompt.conversation.lock:
            if prompt.conversation.journal is None:
                await self._safely(lambda: self._open_journal(prompt))

    def _open_journal(self, prompt: Prompt) -> None:
        conversation = prompt.conversation
        conversation.attempt = self.shelf.attempts(conversation.episode_id)
        about = {**conversation.about, "attempt": conversation.attempt, "metadata": self._metadata(conversation),
                 "tools": [tool.openai() for tool in prompt.tools]}
        conversation.journal = self.shelf.begin(about)

    async def record(self, prompt: Prompt, sampled: Sampled, sampling: Sampling, answer: Json | None) -> None:
        """Have prompt and answer on disk, after :meth:`opening`. The answer must not go out before this returns.

        Raises:
            Refused: 503, the disk is full or failing; the conversation is at its end with what was on disk before.
        """
        conversation, journal = prompt.conversation, prompt.conversation.journal
        assert journal is not None
        async with conversation.lock:
            try:
                growth = conversation.record(prompt, sampled, sampling, answer)
                news = prompt.feedback if self.config.auto_feedback else []
                conversation.feedback += news
                about = {"metadata": self._metadata(conversation)} if news else None
                await asyncio.to_thread(journal.step, [growth], conversation.messages, about=about)
            except StoreError as error:
                conversation.broken = True
                log.error("conversation %s cannot be recorded: %s", conversation.name, error)
                raise Refused(503, "the answer could not be recorded, so it is not given", code="not_recorded",
                              fix="ask the operator of this proxy to look at its disk", retry_after_s=30) from error
        if prompt.chain and answer is not None:
            self._index(conversation)
        if prompt.late is not None:
            await self._say_late(prompt.late)

    async def _say_late(self, late: Late) -> None:
        """Attach what a request said about a conversation that had ended; the request does not fail for it."""
        try:
            await self.say(late.name, late.items, late.attempt)
        except Exception as error:  # it is of another conversation than the one whose answer waits
            log.exception("what was said about conversation %s is lost: %s", late.name, error)
        self._past.heard(late)

    def _metadata(self, conversation: Conversation) -> Json:
        return {"conversation": conversation.name, "tenant": self.tenant, "feedback": conversation.feedback}

    def _index(self, conversation: Conversation) -> None:
        """Make its newest answers known to requests that name no conversation."""
        for digest in list(conversation.points)[-2:]:
            if conversation.points[digest].answered:
                self._heads[digest] = conversation

    def done(self, prompt: Prompt, fault: str = "") -> None:
        """The call is over, well or with a fault."""
        conversation = prompt.conversation
        if prompt.line is not None:
            prompt.line.busy = False
        if fault:
            conversation.faults[fault] = conversation.faults.get(fault, 0) + 1
        self._landed(conversation)

    def _landed(self, conversation: Conversation) -> None:
        conversation.flying -= 1
        conversation.used = time.monotonic()
        if not conversation.lines and not conversation.flying:  # nothing was ever answered
            self._forget(conversation)
            if conversation.journal is not None:
                self._drop(conversation.episode_id)

    def _drop(self, episode_id: str) -> None:
        try:
            self.shelf.drop(episode_id)
        except StoreError as error:  # there is nothing in it, and the next start deletes it
            log.error("tenant %r: %s", self.tenant, error)

    # -------------------------------------------------------------------------------------------------- feedback

    async def say(self, name: str, items: list[Json], attempt: int | None = None) -> str:
        """Attach feedback to a conversation: ``open`` when it is still going on, ``stored`` when it has ended.

        Args:
            name: of the conversation. items: what is said.
            attempt: which one of that name; None is the one that is open, or else the latest.

        Raises:
            Refused: 404, there is no such conversation; 400, no such turn in it; 503, it cannot be written.
        """
        async with self._ending:
            conversation = self.open.get(name)
            if conversation is not None and attempt not in (None, conversation.attempt):
                conversation = None  # another attempt goes on meanwhile
            if conversation is not None and conversation.journal is not None and conversation.lines:
                check_turns(items, range(conversation.turns))
                async with conversation.lock:
                    conversation.feedback += items
                    journal, about = conversation.journal, {"metadata": self._metadata(conversation)}
                    await self._safely(lambda: journal.step(about=about))
                return "open"
            if not await self._safely(lambda: self.shelf.say(self.episode_id(name), items, attempt)):
                raise Refused(404, "there is no such conversation", code="no_conversation", param="conversation")
        return "stored"

    async def _safely(self, work: Callable[[], T]) -> T:
        """Work on the disk in a thread; its faults become 503."""
        try:
            return await asyncio.to_thread(work)
        except StoreError as error:
            log.error("tenant %r: %s", self.tenant, error)
            raise Refused(503, "this could not be written", code="not_recorded", retry_after_s=30,
                          fix="ask the operator of this proxy to look at its disk") from error

    # ---------------------------------------------------------------------------------------------------- ending

    async def end(self, names: Sequence[str]) -> int:
        """End conversations that nobody waits for an answer in; how many were.

        Raises:
            Refused: 503, the store takes nothing now; they stay open and their journals stay.
        """
        async with self._ending:
            ending = [c for name in names if (c := self.open.get(name)) and not c.flying]
            done = [c for c in ending if c.journal is not None]
            for conversation in ending:
                conversation.ending = True
            try:
                if done:
                    await self._safely(lambda: self._put(done))
                for conversation in ending:
                    self._forget(conversation)
            finally:
                for conversation in ending:
                    conversation.ending = False
        return len(done)

    def _put(self, conversations: Sequence[Conversation]) -> None:
        """Have the shelf keep them; one that it refuses for what it is does not keep the others out."""
        try:
            self.shelf.put([self._episode(c) for c in conversations])
            for conversation in conversations:
                if conversation.broken and conversation.journal is not None:
                    conversation.journal.path.unlink(missing_ok=True)  # one that failed does not delete itself
        except ValueError as error:
            if len(conversations) == 1:
                self._rescue(conversations[0], error)
                return
            for conversation in conversations:
                self._put([conversation])

    def _rescue(self, conversation: Conversation, error: ValueError) -> None:
        """Have the shelf keep what the journal holds, which is all that was answered: the next attempt opens another.
        """
        log.error("conversation %s is no episode, what its journal says is kept: %s", conversation.name, error)
        if conversation.journal is not None:
            conversation.journal.close()
            self.shelf.rescue(conversation.episode_id, conversation.journal.path)

    def _episode(self, conversation: Conversation) -> Episode:
        metadata = self._metadata(conversation) | ({"faults": conversation.faults} if conversation.faults else {})
        metadata["turns"] = conversation.turns
        return Episode(**conversation.about, attempt=conversation.attempt, branches=conversation.branches(),
                       messages=tuple(conversation.messages), tools=tuple(t.openai() for t in conversation.tools),
                       metadata=metadata)

    def _forget(self, conversation: Conversation) -> None:
        self._past.keep(conversation)
        if self.open.get(conversation.name) is conversation:
            del self.open[conversation.name]
        for digest in conversation.points:
            if self._heads.get(digest) is conversation:
                del self._heads[digest]

    async def sweep(self) -> int:
        """End what has rested too long, or is too much; how many conversations that were."""
        rested = sorted((c.used, name) for name, c in self.open.items() if not c.flying)
        limit, surplus = time.monotonic() - self.config.idle_s, len(self.open) - self.config.live
        names = [name for i, (used, name) in enumerate(rested)
                 if used < limit or i < surplus or self.open[name].broken]
        return await self.end(names) if names else 0
