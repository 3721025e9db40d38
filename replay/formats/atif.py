"""ATIF, the Agent Trajectory Interchange Format: one trajectory a line (or one in a ``.json`` file).

An export holds the whole of an episode: its conversation as steps, each with the ids and log-probs that were sampled,
and everything else in ``extra["agentsdpo"]`` (:mod:`agentsdpo.replay.formats.bag`). Prompt ids are not repeated at
every step, which would make a file grow with the square of the episode; they stand in the branches of the bag.
Sub-agents' branches are embedded trajectories.

A trajectory of somebody else is read as messages and, where its steps hold prompt and completion ids, as branches
that are kept and never trained on.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agentsdpo import __version__
from agentsdpo.replay.canonical import to_json
from agentsdpo.replay.formats import bag
from agentsdpo.replay.formats.assembly import Recorded, check_ids
from agentsdpo.replay.formats.atif_models import (
    VERSION,
    Content,
    Metrics,
    Step,
    SubagentRef,
    Trajectory,
    multimodal,
    references,
)
from agentsdpo.replay.formats.files import read_lines, valid_text
from agentsdpo.replay.formats.reading import Foreign, Found, Notes, checked, foreign, ours
from agentsdpo.replay.formats.shapes import arguments_of, text_of
from agentsdpo.types import Branch, Call, Episode, Json

# ------------------------------------------------------------------------------------------------------- writing


def document(stored: bag.Stored) -> Json:
    """An episode as an ATIF 1.8 trajectory."""
    episode = stored.episode
    subagents = [branch for branch in episode.branches if branch.fork_reason == "subagent"]
    said: Json = {"schema_version": VERSION, "session_id": episode.run_id or episode.episode_id,
                  "trajectory_id": episode.episode_id, "agent": _agent(episode), "steps": steps(episode)}
    if subagents:
        said["subagent_trajectories"] = [_subagent(episode, branch) for branch in subagents]
    said["final_metrics"] = _totals(episode)
    said = valid_text(said)
    return said | {"extra": {bag.NAME: bag.pack(stored, _seen(said))}}


def _seen(said: Json) -> Json:
    """The part of a document that its bag is bound to: what people may want to edit."""
    return {"steps": said["steps"], "agent": said["agent"]}


def _agent(episode: Episode) -> Json:
    agent: Json = {"name": "agentsdpo", "version": __version__}
    if episode.model_id:
        agent["model_name"] = episode.model_id
    if episode.tools:
        agent["tool_definitions"] = list(episode.tools)
    return agent


def steps(episode: Episode) -> list[Json]:
    """The conversation; answers of tools stand in the step that called them. Without messages, one step per call."""
    calls: dict[int, list[tuple[Branch, Call]]] = defaultdict(list)
    for branch in episode.branches:
        for call in branch.calls if branch.fork_reason != "subagent" else ():
            calls[call.turn].append((branch, call))
    if not episode.messages:
        return _numbered([_agent_step({}, calls[turn]) for turn in sorted(calls)])
    found: list[Json] = []
    turn = 0
    for message in episode.messages:
        role = message.get("role")
        if role == "assistant":
            found.append(_agent_step(message, calls.get(turn, [])))
            turn += 1
        elif role == "tool" and found and found[-1]["source"] == "agent":
            found[-1].setdefault("observation", {"results": []})["results"].append(_result(message, found[-1]))
        else:
            source = "system" if role in ("system", "developer") else "user"
            found.append({"source": source, "message": text_of(message.get("content"))})
    return _numbered(found)


def _numbered(found: list[Json]) -> list[Json]:
    return [{"step_id": number, **step} for number, step in enumerate(found, 1)]


def _agent_step(message: Json, calls: Sequence[tuple[Branch, Call]]) -> Json:
    """One message of the agent, and the calls to the model that made it."""
    step: Json = {"source": "agent", "message": text_of(message.get("content")), "llm_call_count": len(calls)}
    if calls and isinstance(message.get("reasoning_content"), str):
        step["reasoning_content"] = message["reasoning_content"]
    tools = [_tool_call(call, i) for i, call in enumerate(message.get("tool_calls") or ())]
    if tools and len({tool["tool_call_id"] for tool in tools}) == len(tools):
        step["tool_calls"] = tools
    if calls:
        step["metrics"] = _metrics(calls)
    return step


def _tool_call(call: Json, place: int) -> Json:
    function = call.get("function") or {}
    arguments = arguments_of(function.get("arguments"))
    made: Json = {"tool_call_id": str(call.get("id") or f"call_{place}"), "function_name": str(function.get("name"))}
    if isinstance(arguments, dict):
        return made | {"arguments": arguments}
    text = arguments if isinstance(arguments, str) else to_json(arguments)
    return made | {"arguments": {}, "extra": {"unreadable_arguments": text}}


def _result(message: Json, step: Json) -> Json:
    """A tool's answer; its call is named when it stands in the step."""
    ids = [call["tool_call_id"] for call in step.get("tool_calls", ())]
    named = {"source_call_id": message["tool_call_id"]} if message.get("tool_call_id") in ids else {}
    return {**named, "content": text_of(message.get("content"))}


def _metrics(calls: Sequence[tuple[Branch, Call]]) -> Json:
    """Tokens of one call; of several, only their number, since ids of different prompts are no sequence."""
    metrics: Json = {"prompt_tokens": sum(call.start for _, call in calls),
                     "completion_tokens": sum(call.end - call.start for _, call in calls)}
    if len(calls) == 1:
        (branch, call), = calls
        metrics["completion_token_ids"] = branch.token_ids[call.start:call.end].tolist()
        logprobs = branch.logprobs[call.start:call.end]
        if len(logprobs) and not np.isnan(logprobs).any():
            metrics["logprobs"] = bag.decimals(logprobs)
    return metrics


def _subagent(episode: Episode, branch: Branch) -> Json:
    found = [_agent_step({}, [(branch, call)]) for call in branch.calls]
    return {"schema_version": VERSION, "trajectory_id": f"{episode.episode_id}/{branch.branch_id}",
            "agent": {"name": "agentsdpo", "version": __version__}, "steps": _numbered(found)}


def _totals(episode: Episode) -> Json:
    calls = [call for branch in episode.branches for call in branch.calls]
    return {"total_prompt_tokens": sum(call.start for call in calls),
            "total_completion_tokens": sum(call.end - call.start for call in calls)}


# ------------------------------------------------------------------------------------------------------- reading


def read(path: Path, notes: Notes, siblings: frozenset[Path]) -> Iterator[Found]:
    """Episodes of a file.

    Args:
        path: ``.json`` with one trajectory, otherwise one a line.
        notes: where losses are counted.
        siblings: files that are imported as well; a sub-agent in one of them is an episode of its own.

    Raises:
        FormatError: not ATIF 1.0 to 1.8, or edited after an export.
    """
    for where, value in read_lines(path):
        trajectory = checked(Trajectory, value, where)
        kept = (trajectory.extra or {}).get(bag.NAME)
        if kept is not None:
            yield ours(bag.unpack(kept, _seen(value), where), where)
        else:
            yield _Reader(path, notes, siblings).found(trajectory, where)


class _Reader:
    """Reads one trajectory of somebody else, with the sub-agents it names."""

    def __init__(self, path: Path, notes: Notes, siblings: frozenset[Path]) -> None:
        self._path, self._notes, self._siblings = path, notes, siblings
        self._messages: list[Json] = []
        self._calls: list[Recorded] = []

    def found(self, trajectory: Trajectory, where: str) -> Found:
        self._conversation(trajectory, where)
        subagents = self._subagents(trajectory, where, {self._path.resolve()})
        source_id = trajectory.trajectory_id or trajectory.session_id or where
        about = trajectory.model_dump(exclude_none=True, include={
            "schema_version", "session_id", "notes", "final_metrics", "continued_trajectory_ref", "extra"})
        agent = trajectory.agent.model_dump(exclude_none=True, exclude={"tool_definitions", "model_name"})
        metadata: Json = {"atif": {**about, "agent": agent}}
        if subagents:
            metadata["subagents"] = [{"id": name, "messages": reader._messages} for name, reader in subagents]
        episode = foreign(Foreign(
            format="atif", messages=self._messages, calls=self._calls, metadata=metadata,
            subagents=[reader._calls for _, reader in subagents], model_id=trajectory.agent.model_name or "",
            tools=trajectory.agent.tool_definitions or ()))
        return Found(episode, _stamp(trajectory), source_id, where)

    def _conversation(self, trajectory: Trajectory, where: str) -> None:
        """Steps to messages and calls; ``weight`` 0 marks what was copied from elsewhere and must not be trained on."""
        blind = False
        for step in trajectory.steps:
            message = {"role": {"agent": "assistant"}.get(step.source, step.source), "content": content(step.message)}
            blind |= multimodal(step.message)
            if step.source == "agent":
                message |= self._said(step)
                place = f"{where}: steps[{step.step_id - 1}].metrics"
                self._calls.append(self._call(step, len(self._calls), blind, place))
            self._messages.append(message)
            for result in step.observation.results if step.observation else ():
                blind |= multimodal(result.content)
                self._messages.append(self._answer(step, result.source_call_id, result.content))
                self._notes.lose("steps[].observation.results[].extra", result.extra)
            for name in ("timestamp", "model_name", "reasoning_effort", "extra"):
                self._notes.lose(f"steps[].{name}", getattr(step, name))

    def _said(self, step: Step) -> Json:
        """What an agent's step adds to its message."""
        message: Json = {}
        if step.reasoning_content:
            message["reasoning_content"] = step.reasoning_content
        if step.tool_calls:
            message["tool_calls"] = [{"id": call.tool_call_id, "type": "function", "function": {
                "name": call.function_name, "arguments": call.arguments}} for call in step.tool_calls]
            for call in step.tool_calls:
                self._notes.lose("steps[].tool_calls[].extra", call.extra)
        if step.is_copied_context:
            message["weight"] = 0
        return message

    def _answer(self, step: Step, call_id: str | None, said: Content | None) -> Json:
        """A tool's answer; one that names no call answers the only one, or is told by the user."""
        ids = [call.tool_call_id for call in step.tool_calls or ()]
        call_id = call_id or (ids[0] if len(ids) == 1 else None)
        if call_id is None:
            return {"role": "user", "content": content(said)}
        return {"role": "tool", "tool_call_id": call_id, "content": content(said)}

    def _call(self, step: Step, turn: int, blind: bool, where: str) -> Recorded:
        """The call to the model that a step of the agent stands for."""
        metrics = step.metrics or Metrics()
        prompt, completion = metrics.prompt_token_ids, metrics.completion_token_ids
        for name in ("cached_tokens", "cost_usd", "extra"):
            self._notes.lose(f"steps[].metrics.{name}", getattr(metrics, name))
        if step.is_copied_context or step.llm_call_count == 0:
            self._notes.lose("steps[].metrics.completion_token_ids of copied steps", completion)
            return Recorded("", turn, reason="imported")
        several = step.llm_call_count is not None and step.llm_call_count > 1
        if completion is not None and (prompt is None or several):
            self._notes.lose("steps[].metrics.completion_token_ids without their prompt", completion)
            completion = None
        if completion is None:
            self._notes.lose("steps[].metrics.prompt_token_ids without a completion", prompt)
            self._notes.lose("steps[].metrics.logprobs without token ids", metrics.logprobs)
            return Recorded("", turn, reason="aggregated_calls" if several else "no_token_ids")
        prompt, completion = check_ids(prompt, f"{where}.prompt_token_ids"), check_ids(
            completion, f"{where}.completion_token_ids")
        call = Recorded("", turn, prompt, completion, metrics.logprobs, "multimodal" if blind else None)
        if metrics.logprobs and not call.scored:
            self._notes.lose("steps[].metrics.logprobs that do not fit their tokens")
        return call

    # --------------------------------------------------------------------------------------------- sub-agents

    def _subagents(self, trajectory: Trajectory, where: str, seen: set[Path]) -> list[tuple[str, "_Reader"]]:
        """Sub-agents of any depth, embedded or in files of the same folder."""
        found: list[tuple[str, _Reader]] = []
        for sub in trajectory.subagent_trajectories or ():
            found += self._subagent(sub, f"{where}: {sub.trajectory_id}", seen)
        embedded = {sub.trajectory_id for sub in trajectory.subagent_trajectories or ()}
        for ref in references(trajectory):
            if ref.trajectory_id is None or ref.trajectory_id not in embedded:
                found += self._follow(ref, seen)
        return found

    def _subagent(self, sub: Trajectory, where: str, seen: set[Path]) -> list[tuple[str, "_Reader"]]:
        reader = _Reader(self._path, self._notes, self._siblings)
        reader._conversation(sub, where)
        self._notes.lose("subagent_trajectories[].extra", sub.extra)
        return [(sub.trajectory_id or where, reader), *reader._subagents(sub, where, seen)]

    def _follow(self, ref: SubagentRef, seen: set[Path]) -> list[tuple[str, "_Reader"]]:
        """The trajectory in another file, if that lies below the folder of this one; nothing else is ever opened."""
        file = _inside(self._path, ref.trajectory_path)
        if file is not None and file in self._siblings:
            return []
        if file is None or file in seen:
            self._notes.lose("subagent_trajectory_ref that cannot be followed")
            return []
        seen.add(file)
        (where, value), *more = read_lines(file)
        for _ in more:
            self._notes.lose("subagent_trajectory_ref to a file of several")
        return self._subagent(checked(Trajectory, value, where), where, seen)


def _inside(path: Path, named: str | None) -> Path | None:
    """The file that a trajectory names, None when it is not a file below the trajectory's own folder."""
    if not named or "\0" in named or "://" in named:
        return None
    folder = path.resolve().parent
    file = (folder / named).resolve()
    return file if file.is_relative_to(folder) and file.is_file() and file.suffix == ".json" else None


def _stamp(trajectory: Trajectory) -> bool | None:
    value = (trajectory.extra or {}).get("train_allowed")
    return value if isinstance(value, bool) else None


def content(said: Content | None) -> Any:
    """A content in OpenAI's shape; media are named, never opened."""
    if said is None or isinstance(said, str):
        return said or ""
    return [{"type": "text", "text": part.text} if part.source is None else
            {"type": "image_url", "image_url": {"url": part.source.path}} if part.type == "image" else
            {"type": part.type, "source": part.source.model_dump(exclude_none=True)} for part in said]
