"""Reads ``traces.jsonl`` of verifiers: graphs of messages to branches. What is written stands in ``verifiers.py``."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from agentsdpo.errors import FormatError
from agentsdpo.replay.formats import bag
from agentsdpo.replay.formats.assembly import Recorded, check_ids, why
from agentsdpo.replay.formats.files import read_lines
from agentsdpo.replay.formats.reading import ENV_ID, Found, Notes, checked, digest, ours, task_of
from agentsdpo.replay.formats.shapes import Message
from agentsdpo.replay.formats.verifiers import STOPS, openai
from agentsdpo.replay.ids import derived_uuid
from agentsdpo.types import (
    Branch,
    Call,
    CriterionResult,
    Episode,
    Grade,
    Json,
    Sampling,
    StopReason,
    TokenKind,
    VersionSpan,
)


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)


class Node(_Open):
    """One message and the tokens it adds."""

    parent: int | None = None
    message: dict[str, Any]
    sampled: bool = False
    token_ids: list[int] = []
    mask: list[bool] = []
    logprobs: list[float] = []

    @model_validator(mode="after")
    def _lengths(self) -> "Node":
        if len(self.mask) != len(self.token_ids):
            raise ValueError(f"{len(self.mask)} mask entries for {len(self.token_ids)} token_ids")
        return self


class Reward(_Open):
    """One named reward."""

    score: float
    weight: float = 1.0


class Request(_Open):
    """One request to the model."""

    node: int | None = None
    model: str | None = None
    finish_reason: str | None = None
    sampling: dict[str, Any] | None = None


class Trace(_Open):
    """What one agent did."""

    id: str = ""
    agent: dict[str, Any] = {}
    nodes: list[Node]
    calls: list[Request] = []
    tools: list[dict[str, Any]] = []
    rewards: dict[str, Reward | None] = {}
    info: dict[str, Any] = {}
    metrics: dict[str, float | None] = {}
    task: dict[str, Any] = {}
    stop_condition: str | None = None

    @model_validator(mode="after")
    def _parents(self) -> "Trace":
        for i, node in enumerate(self.nodes):
            if node.parent is not None and not 0 <= node.parent < i:
                raise ValueError(f"nodes[{i}].parent is {node.parent}: parents come before their children")
        return self


class Record(_Open):
    """One line: an episode with a trace per agent."""

    id: str = ""
    env: dict[str, Any] = {}
    task: dict[str, Any] = {}
    group: dict[str, Any] | None = None
    run: dict[str, Any] | None = None
    traces: list[Trace]


_KEPT = {"version", "verifiers", "is_completed", "ok"}
"""Fields that say nothing which the others do not."""


def read(path: Path, notes: Notes, siblings: frozenset[Path]) -> Iterator[Found]:
    """Traces of a file, each an episode; a line may also be a bare trace, as older releases wrote them.

    Raises:
        FormatError: no traces, wrong types, a parent that comes after its child, lengths that differ.
    """
    for where, value in read_lines(path):
        bare = isinstance(value, dict) and "nodes" in value
        record = checked(Record, {"traces": [value]} if bare else value, where)
        for i, trace in enumerate(record.traces):
            kept, place = trace.info.get(bag.NAME), f"{where}: traces[{i}]"
            if kept is not None:
                nodes = (value if bare else value["traces"][i])["nodes"]
                yield ours(bag.unpack(kept, nodes, place), place)
            else:
                yield _found(record, trace, place, notes)
        for name in record.model_extra or ():
            if name not in _KEPT:
                notes.lose(name, value[name])


def _found(record: Record, trace: Trace, where: str, notes: Notes) -> Found:
    """An episode of somebody else."""
    paths = [_path(trace.nodes, leaf) for leaf in _leaves(trace.nodes)]
    talks = [[_said(trace.nodes[i], f"{where}.nodes[{i}]") for i in path] for path in paths]
    messages = talks[-1] if talks else []
    about: Json = {"id": trace.id, "episode": record.id, "info": trace.info, "metrics": trace.metrics,
                   "stop_condition": trace.stop_condition, "agent": trace.agent.get("name"), "run": record.run}
    metadata: Json = {"verifiers": about} | ({"branches": talks[:-1]} if len(talks) > 1 else {})
    _count_lost(trace, notes)
    branches = _Branches(trace, where, digest(messages, metadata)).build(paths)
    names = {"task_id": record.task.get("key") or trace.task.get("key"), "env_id": record.env.get("id"),
             "group_id": (record.group or {}).get("id"), "run_id": (record.run or {}).get("id"),
             "model_id": next((call.model for call in trace.calls if call.model), None)}
    texts: Json = {name: value for name, value in names.items() if isinstance(value, str) and value}
    episode = Episode(**{"task_id": task_of(messages), "env_id": ENV_ID, **texts}, episode_id=trace.id or record.id,
                      branches=branches, stop_reason=_stop(trace.stop_condition), grade=_grade(trace.rewards),
                      messages=tuple(messages), tools=tuple(trace.tools), metadata=metadata, engine="verifiers")
    stamp = trace.info.get("train_allowed")
    return Found(episode, stamp if isinstance(stamp, bool) else None, trace.id or record.id or where, where)


def _stop(condition: str | None) -> StopReason:
    named = condition or ""
    if named in {str(reason) for reason in StopReason}:
        return StopReason(named)
    return STOPS.get(named, StopReason.ENGINE_ERROR if named.endswith("error") else StopReason.COMPLETED)


def _said(node: Node, where: str) -> Json:
    message = openai(node.message)
    checked(Message, message, f"{where}.message")
    return message


def _count_lost(trace: Trace, notes: Notes) -> None:
    for name, value in (trace.model_extra or {}).items():
        if name not in _KEPT:
            notes.lose(f"traces[].{name}", value)
    for node in trace.nodes:
        for name, value in (node.model_extra or {}).items():
            notes.lose(f"traces[].nodes[].{name}", value)
    for call in trace.calls:
        for name, value in (call.model_extra or {}).items():
            notes.lose(f"traces[].calls[].{name}", value)


def _grade(rewards: dict[str, Reward | None]) -> Grade | None:
    """Named rewards as criteria; their weighted sum, as verifiers has it, is the reward."""
    given = {name: reward for name, reward in rewards.items() if reward is not None}
    if not given:
        return None
    results = tuple(CriterionResult(id=name, score=reward.score) for name, reward in given.items())
    return Grade(results=results, mean=sum(reward.score * reward.weight for reward in given.values()), passed=None)


def _leaves(nodes: Sequence[Node]) -> list[int]:
    inner = {node.parent for node in nodes}
    return [i for i in range(len(nodes)) if i not in inner]


def _path(nodes: Sequence[Node], leaf: int) -> list[int]:
    """Nodes from the root to a leaf."""
    path, at = [], leaf
    while at is not None:
        path.append(at)
        at = nodes[at].parent
    return path[::-1]


class _Branches:
    """Builds the branches of one trace; a node's tokens are sampled in the first branch that holds it alone.

    Versions are unknown (-1): the numbers of another run's policies mean nothing here.
    """

    def __init__(self, trace: Trace, where: str, identity: str) -> None:
        self._trace, self._where, self._identity = trace, where, identity
        self._reason = None if trace.agent.get("trainable", True) is not False else "masked_by_policy"
        self._made = {call.node: call for call in trace.calls if call.node is not None}
        self._turn = {i: turn for turn, i in enumerate(i for i, node in enumerate(trace.nodes) if node.sampled)}
        self._owner: dict[int, tuple[int, int]] = {}

    def build(self, paths: Sequence[Sequence[int]]) -> tuple[Branch, ...]:
        """One branch per path, an empty one when there is none."""
        return tuple(self._branch(number, path) for number, path in enumerate(paths or [[]]))

    def _branch(self, branch_id: int, path: Sequence[int]) -> Branch:
        ids, kinds, logps, calls = [], [], [], []
        fork: Json = {}
        for at in path:
            node, start, where = self._trace.nodes[at], len(ids), f"{self._where}.nodes[{at}]"
            ids += check_ids(node.token_ids, f"{where}.token_ids")
            shared, count = at in self._owner, len(node.token_ids)
            if shared:
                fork = {"parent_branch_id": self._owner[at][0], "fork_at": len(ids), "fork_reason": "template_rewrite"}
            call = Recorded("", 0, [], [0] * sum(node.mask), node.logprobs, self._reason)
            kinds += _kinds(node, call) if not shared else [int(TokenKind.CONTEXT)] * count
            logps += _spread(node, call) if not shared else [np.nan] * count
            if not shared and (node.sampled or any(node.mask)):
                calls += self._calls(at, node, call, start, ids)
            self._owner.setdefault(at, (branch_id, len(ids)))
        return Branch(branch_id=branch_id, **fork, token_ids=np.array(ids, np.int32),
                      token_kind=np.array(kinds, np.uint8), logprobs=np.array(logps, np.float32), calls=tuple(calls))

    def _calls(self, at: int, node: Node, recorded: Recorded, start: int, ids: list[int]) -> list[Call]:
        """The runs of sampled tokens of a node; a call without tokens when there are none."""
        mask = np.array([False, *node.mask, False])
        edges = np.flatnonzero(mask[1:] != mask[:-1]) + start
        spans = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)) or [(len(ids), len(ids))]
        made = self._made.get(at)
        reason = why(recorded) if any(node.mask) else self._reason or "no_token_ids"
        return [Call(
            call_id=derived_uuid(self._identity, at, i), turn=self._turn.get(at, 0), start=first, end=last,
            prompt_sha256=hashlib.sha256(np.array(ids[:first], "<i4").tobytes()).hexdigest(),
            finish_reason=(made.finish_reason if made else None) or "unknown", sampling=_sampling(made, self._where),
            versions=(VersionSpan(version=-1, start=0, end=last - first),) if last > first else (),
            logprob_kind="unknown" if node.logprobs else "none", untrainable_reason=reason)
            for i, (first, last) in enumerate(spans)]


def _kinds(node: Node, call: Recorded) -> list[int]:
    sampled = TokenKind.MASKED if call.scored else TokenKind.UNUSABLE
    other = TokenKind.TOOL if node.message.get("role") == "tool" else TokenKind.CONTEXT
    return [int(sampled if masked else other) for masked in node.mask]


def _spread(node: Node, call: Recorded) -> list[float]:
    """Log-probs at the places of the sampled tokens."""
    values = iter(node.logprobs)
    return [next(values) if masked and call.scored else np.nan for masked in node.mask]


def _sampling(made: Request | None, where: str) -> Sampling:
    """What is known of how tokens were drawn."""
    given = {name: value for name, value in ((made.sampling if made else None) or {}).items()
             if name in Sampling.model_fields and value is not None}
    try:
        return Sampling(**given)
    except ValidationError as error:
        raise FormatError(f"{where}.calls: sampling {bag.describe(error)}", fix="mend the file") from error
