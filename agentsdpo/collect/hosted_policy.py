"""An agent that is a hosted model: messages in, a turn out. There are no token ids, so its episodes teach nobody."""

import json
from typing import Any

from agentsdpo.calls import read_json
from agentsdpo.collect.hosted import HostedModel
from agentsdpo.collect.policy import Context, PromptBudget
from agentsdpo.collect.turns import refusal
from agentsdpo.types import Json, ModelTurn, ToolCall, ToolResult, ToolSpec


class HostedPolicy:
    """Plays through a hosted model; one may serve all episodes at once.

    Args:
        model: the client; its cache, if any, is keyed by the episode's seed and the turn too, so attempts differ.
    """

    def __init__(self, model: HostedModel) -> None:
        self.model = model

    async def act(self, ctx: Context, tools: tuple[ToolSpec, ...]) -> ModelTurn:
        """One request with the whole conversation.

        Raises:
            ProviderError: no usable answer after all retries.
            ContextOverflow: the conversation does not fit into the model's window.
            PromptBudget: the prompts so far have used the budget up.
            SpendLimit, ConfigError: see :meth:`HostedModel.ask`.
        """
        if ctx.prompt_left is not None and ctx.prompt_left <= 0:
            raise PromptBudget(f"the budget of prompt tokens is spent at turn {ctx.turn}",
                               fix="raise the budget's prompt_tokens")
        reply = await self.model.ask([_outgoing(message) for message in ctx.messages], tools=tools,
                                     salt=f"{ctx.seed}/{ctx.turn}", max_tokens=ctx.tokens_left)
        calls, malformed = _calls(reply.calls, ctx.turn)
        return ModelTurn(text=reply.text, calls=calls, malformed=malformed, usage=reply.usage)


def _calls(raw: tuple[Json, ...], turn: int) -> tuple[tuple[ToolCall, ...], tuple[ToolResult, ...]]:
    """Calls with ids that are unique in the turn, and the answers owed to those whose arguments are no object."""
    calls: list[ToolCall] = []
    owed: list[ToolResult] = []
    taken: set[str] = set()
    for i, call in enumerate(raw):
        call_id = call["id"] if call["id"] and call["id"] not in taken else f"call_{turn}_{i}"
        taken.add(call_id)
        arguments, problem = read_json(call["arguments"] or "{}")
        if not problem and not isinstance(arguments, dict):
            problem = "not an object"
        if problem:
            owed.append(refusal(call_id, "bad_arguments", f"the arguments are {problem}"))
        calls.append(ToolCall(id=call_id, name=call["name"], arguments=call["arguments"] if problem else arguments))
    return tuple(calls), tuple(owed)


def _outgoing(message: Json) -> Json:
    """A message as APIs take it: arguments are JSON text, and always an object, since some providers parse them."""
    if not message.get("tool_calls"):
        return message
    return message | {"tool_calls": [_outgoing_call(call) for call in message["tool_calls"]]}


def _outgoing_call(call: Json) -> Json:
    function = call["function"]
    arguments: Any = function["arguments"]
    if not isinstance(arguments, dict):
        arguments = {"unreadable": arguments}
    return call | {"function": function | {"arguments": json.dumps(arguments)}}
