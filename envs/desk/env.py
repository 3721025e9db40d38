"""The desk as an environment: state, tools and a hash chain. It owns no loop, no reward and no rule."""

import hashlib
import json
from typing import Any

from agentsdpo.envs.desk import text, world
from agentsdpo.envs.desk.tools import HANDLERS, SPECS, TOOLS, ToolFault
from agentsdpo.types import ErrorKind, Json, Outcome, Task, ToolCall, ToolResult

_FAULTS = ("time-out, try again", "stale page, try again", "missing cell, try again")


class DeskEnv:
    """One desk, one episode. Everything it does follows from the task and the calls alone.

    >>> import asyncio
    >>> from agentsdpo.envs.desk import DeskSuite
    >>> env, task = DeskEnv(), DeskSuite().task("train", 0)
    >>> [m["role"] for m in asyncio.run(env.reset(task, seed=0, episode_id="e"))]
    ['system', 'user']
    >>> env.apply(ToolCall(id="c", name="note_get", arguments={"key": ""})).content
    'empty'
    """

    env_id = "desk"
    tools = TOOLS

    def __init__(self) -> None:
        self.meta: Json = {}
        self.state: world.State = {}
        self.initial = b""
        self.chain = ""
        self.log: list[list[Any]] = []
        self._hash = ""

    async def reset(self, task: Task, *, seed: int, episode_id: str) -> list[Json]:
        """Build the world of ``task`` and return the system and user messages. Rubric and rules are not read."""
        return self.start(task)

    def start(self, task: Task) -> list[Json]:
        """:meth:`reset` without a loop."""
        self.meta, self.log = task.metadata, []
        self.state = world.build(self.meta)
        self._canonical = world.Canonical(self.state)
        self.initial = self._canonical.of(self.state)
        self.chain = self._hash = hashlib.sha256(self.initial).hexdigest()
        return [{"role": "system", "content": text.SYSTEM}, {"role": "user", "content": task.prompt}]

    async def call(self, calls: tuple[ToolCall, ...]) -> list[ToolResult]:
        """Run the calls in order; one result per id."""
        return [self.apply(call) for call in calls]

    def apply(self, call: ToolCall) -> ToolResult:
        """Run one call. Faults are observations; a call that does not fit its schema changes nothing."""
        content, kind = self._run(call)
        if SPECS.get(call.name) and SPECS[call.name].mutates and kind == "none":
            changed = call.arguments["path"] if call.name == "cell_set" else None  # type: ignore[index]
            self._hash = hashlib.sha256(self._canonical.of(self.state, changed)).hexdigest()
        self.log.append([call.name, call.arguments, kind != "none"])
        self.chain = hashlib.sha256(
            self.chain.encode() + world.canonical([call.name, call.arguments]) + content.encode()).hexdigest()
        return ToolResult(call_id=call.id, content=content, is_error=kind != "none", error_kind=kind,
                          state_hash=self._hash)

    def _run(self, call: ToolCall) -> tuple[str, ErrorKind]:
        if call.name not in HANDLERS:
            return f"error: no tool {call.name}", "unknown_tool"
        problem = _misfit(call)
        if problem:
            return f"error: {problem}", "bad_arguments"
        if self.done():
            return "error: already submitted", "tool"
        fault = self._fault(call)
        if fault:
            return f"error: {fault}", "tool"
        try:
            return HANDLERS[call.name](self.state, **call.arguments), "none"  # type: ignore[arg-type]
        except ToolFault as error:
            return f"error: {error}", "tool"

    def _fault(self, call: ToolCall) -> str:
        """An injected fault of a read; the next try is another draw, so retrying is right."""
        rate = self.meta.get("fault_rate", 0.0)
        if not rate or SPECS[call.name].mutates:
            return ""
        draw = text.digest("fault", self.meta["seed"], len(self.log))
        return _FAULTS[draw % 3] if (draw >> 8) % 1000 < rate * 1000 else ""

    def done(self) -> bool:
        """Whether the answer was handed in."""
        return self.state["submitted"] is not None

    def snapshot(self) -> bytes:
        """State, call log, chain and task as JSON; nothing else is needed to continue.

        Keys keep their order: rows of a sheet are shown in it.
        """
        saved = {"meta": self.meta, "state": self.state, "log": self.log, "chain": self.chain,
                 "initial": self.initial.decode()}
        return json.dumps(saved, separators=(",", ":"), ensure_ascii=False).encode()

    def restore(self, data: bytes) -> None:
        """Continue from :meth:`snapshot`; restoring what was just snapshotted changes nothing."""
        saved = json.loads(data)
        self.meta, self.state, self.log, self.chain = saved["meta"], saved["state"], saved["log"], saved["chain"]
        self.initial = saved["initial"].encode()
        self._canonical = world.Canonical(self.state)
        self._hash = hashlib.sha256(self._canonical.of(self.state)).hexdigest()

    def outcome(self, answer: str | None) -> Outcome:
        """What the grader sees; a submitted answer wins over the final text."""
        submitted = self.state["submitted"]
        calls = tuple((ToolCall(id=str(i), name=name, arguments=arguments),
                       ToolResult(call_id=str(i), content="", is_error=failed))
                      for i, (name, arguments, failed) in enumerate(self.log))
        return Outcome(answer=answer if submitted is None else submitted, initial=self.initial,
                       final=world.canonical(self.state), calls=calls)


def _misfit(call: ToolCall) -> str:
    """Why the arguments do not fit the tool's schema; empty when they do."""
    if not isinstance(call.arguments, dict):
        return "arguments are not an object"
    schema = SPECS[call.name].parameters
    missing = [key for key in schema["required"] if key not in call.arguments]
    extra = [key for key in call.arguments if key not in schema["properties"]]
    if missing or extra:
        return f"missing {missing[0]}" if missing else f"unknown argument {extra[0]}"
    for key, value in call.arguments.items():
        wanted = schema["properties"][key]
        fits = type(value) is int and value >= 1 if wanted["type"] == "integer" else isinstance(value, str)
        if not fits or ("enum" in wanted and value not in wanted["enum"]) or len(str(value)) > 400:
            return f"bad {key}"
    return ""


