"""``traces.jsonl`` of verifiers 0.4: one episode a line, its messages as a graph that branches share prefixes of.

A node holds one message and the tokens it adds; a branch is a path from a root to a leaf. What several branches share
stands once, and is trained once. Exports carry the whole episode in ``info["agentsdpo"]``. What somebody else wrote
does not say what its log-probs are of, and rounds them to four decimals: it is kept and never trained on.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from agentsdpo.replay.formats import bag
from agentsdpo.replay.formats.files import valid_text
from agentsdpo.replay.formats.shapes import arguments_of, message_of
from agentsdpo.types import Branch, Call, Episode, Json, StopReason, TokenKind

RELEASE = "0.4.0"
"""Release of verifiers whose records are written."""
STOPS = {
    "agent_completed": StopReason.COMPLETED, "max_turns": StopReason.MAX_TURNS,
    "max_output_tokens": StopReason.MAX_SAMPLED_TOKENS, "max_input_tokens": StopReason.MAX_PROMPT_TOKENS,
    "max_total_tokens": StopReason.CONTEXT_OVERFLOW, "agent_timeout": StopReason.ROLLOUT_TIMEOUT,
    "error": StopReason.ENGINE_ERROR}
"""Stop conditions there and stop reasons here; others keep their name."""


def document(stored: bag.Stored) -> Json:
    """An episode with its one trace."""
    episode = stored.episode
    task = {"type": "Task", "data": {"id": episode.task_id}, "key": episode.task_id}
    failed = episode.stop_reason is StopReason.ENGINE_ERROR
    nodes = valid_text(Graph(episode).nodes)
    trace = {
        "version": 1, "id": episode.episode_id, "verifiers": {"version": RELEASE}, "task": task,
        "agent": {"config": {"model": episode.model_id or None}, "name": "agent", "trainable": True},
        "tools": valid_text([_tool(tool) for tool in episode.tools]), "nodes": nodes,
        "calls": _calls(episode, nodes),
        "rewards": {"reward": None if episode.reward is None else {"score": episode.reward, "weight": 1.0}},
        "metrics": valid_text({r.id: r.score for r in episode.grade.results}) if episode.grade else {},
        "is_completed": not failed, "ok": not failed, "stop_condition": _stop(episode.stop_reason),
        "info": {bag.NAME: bag.pack(stored, nodes)}}
    return {"id": episode.episode_id, "env": {"id": episode.env_id}, "task": task, "ok": not failed,
            **({"group": {"id": episode.group_id}} if episode.group_id else {}), "traces": [trace]}


def _stop(reason: StopReason) -> str:
    return next((theirs for theirs, ours in STOPS.items() if ours is reason), str(reason))


def _tool(tool: Json) -> Json:
    function = tool.get("function") or tool
    return {"type": "function", **{name: function[name] for name in ("name", "description", "parameters")
                                   if name in function}}


def _calls(episode: Episode, nodes: Sequence[Json]) -> list[Json]:
    """The requests to the model, in the order of their nodes."""
    made = {call.turn: call for branch in episode.branches for call in branch.calls}
    turns = [i for i, node in enumerate(nodes) if node["sampled"]]
    return [{"node": i, "model": episode.model_id or None, "finish_reason": _finish(made[turn])}
            for turn, i in enumerate(turns) if turn in made]


def _finish(call: Call) -> str | None:
    return call.finish_reason if call.finish_reason in ("stop", "length", "tool_calls") else None


class Graph:
    """The branches of an episode as nodes, ``nodes``: parents before children, shared prefixes once."""

    def __init__(self, episode: Episode) -> None:
        self.nodes: list[Json] = []
        self._branches = {branch.branch_id: branch for branch in episode.branches}
        self._messages = _by_turn(episode.messages)
        self._ends: dict[tuple[int, int], int | None] = {}
        self._cuts: dict[int, set[int]] = defaultdict(set)
        for branch in episode.branches:
            if branch.fork_at:
                self._cuts[self._owner(branch, branch.fork_at)].add(branch.fork_at)
        last = None
        for branch in episode.branches:
            last = self._add(branch)
        for turn in sorted(self._messages):  # messages of turns that no branch holds tokens of
            last = self._say(turn, last)

    def _owner(self, branch: Branch, position: int) -> int:
        """Which branch holds the token before a position: this one, or one it inherited it from."""
        while position <= (branch.fork_at or 0) and branch.parent_branch_id is not None:
            branch = self._branches[branch.parent_branch_id]
        return branch.branch_id

    def _add(self, branch: Branch) -> int | None:
        """Nodes of what a branch does not inherit; returns the last of its path."""
        at = branch.fork_at or 0
        node = self._ends[self._owner(branch, at), at] if at else None
        edges = sorted({at, len(branch.token_ids), *self._cuts[branch.branch_id],
                        *(edge for call in branch.calls for edge in (call.start, call.end))})
        for start, end in zip(edges, edges[1:], strict=False):
            call = next((call for call in branch.calls if call.start <= start and end <= call.end), None)
            node = self._segment(branch, start, end, call, node)
            self._ends[branch.branch_id, end] = node
        return node

    def _segment(self, branch: Branch, start: int, end: int, call: Call | None, parent: int | None) -> int:
        """A node with the tokens of a span: of the agent's message, or of the messages before the next one."""
        if call is not None:
            for message in self._messages.get(call.turn, ([], None))[0]:
                parent = self._node(message, parent)
            said = self._messages.pop(call.turn, ([], None))[1] or {"role": "assistant", "content": ""}
            return self._node(said, parent, branch, start, end, sampled=True)
        turn = next((call.turn for call in branch.calls if call.start >= end), -1)
        before, said = self._messages.pop(turn, ([], None))
        if said is not None:
            self._messages[turn] = ([], said)
        for message in before[:-1]:
            parent = self._node(message, parent)
        return self._node(before[-1] if before else {"role": "user", "content": ""}, parent, branch, start, end)

    def _say(self, turn: int, parent: int | None) -> int | None:
        before, said = self._messages[turn]
        for message in before:
            parent = self._node(message, parent)
        return parent if said is None else self._node(said, parent, sampled=True)

    def _node(self, message: Json, parent: int | None, branch: Branch | None = None, start: int = 0, end: int = 0, *,
              sampled: bool = False) -> int:
        node: Json = {"parent": parent, "message": _message(message), "sampled": sampled}
        if branch is not None:
            trained = branch.token_kind[start:end] == TokenKind.SAMPLED
            node |= {"token_ids": branch.token_ids[start:end].tolist(), "mask": trained.tolist(),
                     "logprobs": bag.decimals(branch.logprobs[start:end][trained])}
        self.nodes.append(node)
        return len(self.nodes) - 1


def _by_turn(messages: Sequence[Json]) -> dict[int, tuple[list[Json], Json | None]]:
    """Per turn what was said before it, and the agent's message; the last one has no message of the agent."""
    found: dict[int, tuple[list[Json], Json | None]] = {}
    before: list[Json] = []
    for message in messages:
        if message.get("role") == "assistant":
            found[len(found)] = (before, message)
            before = []
        else:
            before.append(message)
    return found | ({len(found): (before, None)} if before else {})


def _message(message: Json) -> Json:
    """A message in the shape of verifiers: tool calls are flat there."""
    made = message_of(message)
    made.pop("weight", None)
    if made["role"] == "developer":
        made["role"] = "system"
    if made["role"] not in ("system", "user", "assistant", "tool") or (
            made["role"] == "tool" and "tool_call_id" not in made):
        made = {"role": "user", "content": made["content"]}
    if made["role"] != "tool":
        made.pop("tool_call_id", None)
        made.pop("name", None)
    if "tool_calls" in made:
        made["tool_calls"] = [{"id": call["id"], "type": "function", **call["function"]}
                              for call in made["tool_calls"]]
    return made


def openai(message: Json) -> Json:
    """A message of verifiers in OpenAI's shape.

    >>> openai({"role": "assistant", "content": None, "tool_calls": [{"id": "a", "name": "f", "arguments": "{}"}]})
    {'role': 'assistant', 'content': None, 'tool_calls': [{'id': 'a', 'type': 'function',
     'function': {'name': 'f', 'arguments': {}}}]}
    """
    calls: Any = message.get("tool_calls")
    if not calls:
        return {name: value for name, value in message.items() if value is not None or name == "content"}
    return message | {"tool_calls": [{"id": call.get("id"), "type": "function", "function": {
        "name": call.get("name"), "arguments": arguments_of(call.get("arguments"))}} for call in calls]}
