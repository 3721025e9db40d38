"""Text and tokens of a conversation, through the tokenizer's own chat template. Pure; no model, no torch.

Tokens are the record: the opening is rendered once, later turns are appended as tokens and nothing is ever
rendered again. Tool calls are read in the form that the template writes them in (:mod:`agentsdpo.calls`).
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from agentsdpo.calls import HERMES, PROBE, PROBED, CallForm, form_of, one_by_one
from agentsdpo.errors import ModelError
from agentsdpo.frames import Frames
from agentsdpo.types import Json, ToolCall, ToolSpec

_ANCHOR = "ANCHOR"
_log = logging.getLogger(__name__)


def sha256(text: str) -> str:
    """Hex digest of a UTF-8 text."""
    return hashlib.sha256(text.encode()).hexdigest()


class ChatFormat:
    """Opening, turn delimiters and hint block of one tokenizer, as token ids.

    Args:
        tokenizer: a transformers tokenizer with a chat template. What the template can be told (``enable_thinking`` of
            Qwen3, say) is set in its own first line, so that its hash says so.

    Attributes:
        calls: the form of its tool calls; ``hermes`` where the template writes none, or in a form that is not read.

    Raises:
        ModelError: the tokenizer has no chat template, or the template cannot be extended turn by turn.
    """

    calls: CallForm

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(f"tokenizer {tokenizer.name_or_path!r} has no chat template",
                             fix="add chat_template.jinja to the model folder: agents need tool turns rendered")
        if tokenizer.eos_token_id is None:
            raise ModelError(f"tokenizer {tokenizer.name_or_path!r} has no end-of-turn token", fix="set eos_token")
        self.tokenizer, self._backend, self._frames = tokenizer, tokenizer.backend_tokenizer, Frames()
        self.eos_id: int = tokenizer.eos_token_id
        self.vocab_size = len(tokenizer)
        self.template_sha256 = sha256(tokenizer.chat_template)
        self.tokenizer_sha256 = sha256(tokenizer.backend_tokenizer.to_str())
        added = (str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)
        self._control = sorted({t for t in (*tokenizer.all_special_tokens, *added) if t}, key=lambda t: (-len(t), t))
        self._probe()
        self.calls = self._form()
        self._marks = [self.encode(mark) for mark in (self.calls.opens, self.calls.closes)]

    def _probe(self) -> None:
        """Render every shape once, so that a template that cannot carry an episode is found when it is loaded."""
        spec = ToolSpec(name="f", description="", parameters={"type": "object"})
        try:
            self._render([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], tools=[spec])
            self._tail([{"role": "tool", "tool_call_id": "call_0_0", "content": "r"}])
            self._tail([{"role": "user", "content": "u"}])
            self.hint("h")
        except ModelError:
            raise
        except Exception as error:  # whatever the author of the template raises: jinja errors, lookups, ...
            raise ModelError(f"the chat template of {self.tokenizer.name_or_path!r} cannot carry an episode: {error!r}",
                             fix="use one that renders tools, tool answers and a system message that stands alone") \
                from error

    def _form(self) -> CallForm:
        """The form of tool calls, by how the template writes one."""
        call = ToolCall(id="call_0_0", name=PROBE.name, arguments=PROBED).openai()
        asked: list[Json] = [{"role": "user", "content": "u"}]
        try:
            befores = [self._render(asked, tools=[PROBE], generate=generate) for generate in (True, False)]
            whole = self._render([*asked, {"role": "assistant", "content": "", "tool_calls": [call]}], tools=[PROBE],
                                 generate=False)
        except Exception:  # noqa: BLE001 - many refuse calls, or these ids of calls
            return HERMES
        before = next((each for each in befores if whole.startswith(each)), "")
        said = whole.removeprefix(before).partition(self.tokenizer.eos_token)[0].rpartition("</think>")[2]
        form = form_of(said)
        if form is None and PROBE.name in said:
            _log.warning("the chat template of %r writes a tool call as %r, a form that is not read: calls are looked "
                         "for in %s", self.tokenizer.name_or_path, said[-120:], HERMES.opens)
        return form or HERMES

    def _render(self, messages: Sequence[Json], *, tools: Sequence[ToolSpec] = (), generate: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            list(messages), tools=[t.openai() for t in tools] or None,
            add_generation_prompt=generate, tokenize=False)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, added tokens recognised, nothing put in front or behind, nothing cut off."""
        if self._backend.truncation is not None or self._backend.padding is not None:  # as another user left it
            self._backend.no_truncation()
            self._backend.no_padding()
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Exact text of ids, special tokens included, no clean-up."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def defuse(self, text: str) -> str:
        """Break control tokens inside text that comes from outside, so that it cannot open or close a turn."""
        for token in self._control:
            text = text.replace(token, token[0] + " " + token[1:])
        return text

    def _safe(self, messages: Sequence[Json]) -> list[Json]:
        """The messages with all text defused but that of system messages, which the environment's author wrote."""
        return [m if m["role"] == "system" else self._defused(m) for m in messages]

    def _defused(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.defuse(value)
        if isinstance(value, dict):
            return {self.defuse(key): self._defused(inner) for key, inner in value.items()}
        return [self._defused(inner) for inner in value] if isinstance(value, list) else value

    def open(self, messages: Sequence[Json], tools: Sequence[ToolSpec]) -> list[int]:
        """Ids of the opening messages up to the place where the agent starts to write.

        Control tokens inside anything but a system message are broken apart: no prompt can open a turn.
        """
        key = json.dumps([tool.openai() for tool in tools])
        return self.encode(self._frames.text(key, self._safe(messages), lambda told: self._opening(told, tools)))

    def _opening(self, messages: Sequence[Json], tools: Sequence[ToolSpec]) -> str:
        """Text of the opening messages; Llama's template takes one call per turn, Qwen3-Coder's none that is broken."""
        try:
            return self._render(messages, tools=tools)
        except Exception:
            plain = one_by_one(messages, self.calls)
            if plain == list(messages):
                raise
            return self._render(plain, tools=tools)

    def extend(self, messages: Sequence[Json]) -> list[int]:
        """Ids between an agent's end-of-turn token (exclusive) and the place where it writes again.

        Args:
            messages: the tool (or user) messages that followed the agent's turn.
        """
        return self.encode(self._frames.text(None, self._safe(messages), self._tail))

    def _tail(self, messages: Sequence[Json]) -> str:
        """Text behind an agent's end-of-turn token that these messages make."""
        head: list[Json] = [{"role": "user", "content": "u"}, {"role": "assistant", "content": _ANCHOR}]
        tail = self._render([*head, *messages]).partition(_ANCHOR)[2]
        end = self.tokenizer.eos_token
        if not tail.startswith(end):
            raise ModelError(f"the chat template closes a turn with {tail[:20]!r} but the end-of-turn token is {end!r}",
                             fix="use a template that ends assistant turns with eos_token")
        return tail[len(end):]

    def hint(self, text: str) -> list[int]:
        """The hint as one leading system message: the teacher's context is these ids, then the student's."""
        return self.encode(self._render([{"role": "system", "content": self.defuse(text)}], generate=False))

    @cached_property
    def header_ids(self) -> list[int]:
        """Ids the template puts in front of what the agent writes."""
        asked = [{"role": "user", "content": "u"}]
        bare, open_ = (self._render(asked, generate=generate) for generate in (False, True))
        return self.encode(open_.removeprefix(bare))

    def strip_end(self, ids: Sequence[int]) -> str:
        """Text of one completion without its end-of-turn token."""
        closed = bool(ids) and ids[-1] == self.eos_id
        return self.decode(ids[:-1] if closed else ids)

    @property
    def marks_calls(self) -> bool:
        """Whether :meth:`in_calls` can tell: the delimiters are single tokens."""
        return all(len(ids) == 1 for ids in self._marks)

    def in_calls(self, ids: Sequence[int]) -> list[bool]:
        """Which tokens of one completion belong to a tool call, its delimiters included; an open call runs to the end.

        Raises:
            ModelError: the delimiters are not single tokens.
        """
        first, last = self._marks
        if not self.marks_calls:
            raise ModelError(f"tool calls of tokenizer {self.tokenizer.name_or_path!r} do not stand between two tokens "
                             f"of their own: {self.calls.opens!r} is {len(first)} tokens",
                             fix="set learn.tool_weight to 1, or use a tokenizer that has tool calls as special tokens")
        inside, found = False, []
        for token in ids:
            inside = inside or token == first[0]
            found.append(inside)
            inside = inside and token != last[0]
        return found


def unfenced(text: str) -> str:
    """A model's reply without the one code fence it stands in; where there are more, or none, it is left as it is.

    >>> unfenced('```json\\n{"x": 1}\\n```'), unfenced("```{}``` and ```{}```"), unfenced(" plain\\n")
    ('{"x": 1}', '```{}``` and ```{}```', 'plain')
    """
    body = text.strip()
    if body.startswith("```") and body.endswith("```") and body.count("```") == 2:
        body = body[3:-3].removeprefix("json").strip()
    return body
