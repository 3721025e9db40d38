"""Inspect logs: ``EvalLog`` version 2 as JSON, one sample per attempt, written without Inspect.

Scores are ``rubric``, a value per criterion, and ``pass``, C or I. An attempt without a score has an ``error`` and no
scores. ``inspect view`` reads the file; ``inspect log convert --to eval`` makes the binary form.
"""

import json
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from agentsdpo import __version__
from agentsdpo.benchmarks.apex.exports.saved import Saved, saved
from agentsdpo.benchmarks.apex.records import Attempt
from agentsdpo.benchmarks.apex.runfolder import BenchFolder
from agentsdpo.benchmarks.apex.shapes import OURS
from agentsdpo.types import Json

LIMITS = {"budget_turns": ("turn", "turns"), "budget_calls": ("custom", "tool_calls"),
          "budget_tokens": ("token", "completion_tokens"), "budget_time": ("time", "wall_s"),
          "budget_repeat": ("custom", "max_repeat"), "context_overflow": ("context", "prompt_tokens")}
"""Inspect's limit for an outcome, and the budget that was reached."""


def write_inspect(folder: BenchFolder, out: Path) -> Path:
    """Write the log; returns the file."""
    about = folder.about()
    records = {attempt.place: attempt for attempt in folder.records()}
    samples = [_sample(one, about) for one in saved(folder)]
    written = {(sample["id"], sample["epoch"] - 1) for sample in samples}
    samples += [_absent(attempt) for place, attempt in records.items() if place not in written]
    log = {"version": 2, "status": "success", "eval": _spec(about, list(records.values())),
           "plan": {"name": "plan", "steps": [{"solver": about["agent"]["name"], "params": {}}], "config": {}},
           "results": _results(list(records.values())),
           "stats": {"started_at": _time(about["started"]), "completed_at": _time(about["started"]), "model_usage": {
               about["agent"]["name"]: _usage(list(records.values()))}},
           "samples": sorted(samples, key=lambda sample: (sample["id"], sample["epoch"]))}
    path = out / f"inspect-{about['run_id']}.json"
    path.write_text(json.dumps(log, indent=1), encoding="utf-8")
    return path


def _time(text: str) -> str:
    """A time with its zone; those without one are UTC."""
    time = datetime.fromisoformat(text)
    return time.isoformat() if time.tzinfo else f"{text}+00:00"


def _id(*parts: Any) -> str:
    return sha256(json.dumps(parts).encode()).hexdigest()[:22]


def _spec(about: Json, records: list[Attempt]) -> Json:
    ids = list(dict.fromkeys(attempt.task_id for attempt in records))
    dataset = about["dataset"]
    return {"eval_id": _id("eval", about["run_id"]), "run_id": about["run_id"], "created": _time(about["started"]),
            "task": about["benchmark"], "task_id": _id("task", about["benchmark"]), "task_version": dataset["version"],
            "dataset": {"name": dataset["name"], "samples": len(ids), "sample_ids": ids, "shuffled": False},
            "model": about["agent"]["name"], "config": {"epochs": about["attempts"]},
            "packages": {"agentsdpo": __version__},
            "metadata": {"train_allowed": about["train_allowed"], "dataset_sha256": dataset["sha256"],
                         "judge": about["judge"], "profile": about["profile"], "seed": about["seed"]}}


def _results(records: list[Attempt]) -> Json:
    """Means over scored attempts, under the names that the samples' scores have."""
    scored = [attempt for attempt in records if attempt.scored]
    means = {"pass": [float(bool(a.passed)) for a in scored], "rubric": [a.score or 0.0 for a in scored]}
    return {"total_samples": len(records), "completed_samples": len(scored), "scores": [
        {"name": name, "scorer": name, "params": {}, "scored_samples": len(values), "metrics": {
            "mean": {"name": "mean", "value": sum(values) / len(values), "params": {}}} if values else {}}
        for name, values in means.items()]}


def _usage(records: list[Attempt]) -> Json:
    given, made = sum(a.prompt_tokens for a in records), sum(a.completion_tokens for a in records)
    return {"input_tokens": given, "output_tokens": made, "total_tokens": given + made}


def _sample(one: Saved, about: Json) -> Json:
    """An attempt that left files."""
    attempt, answer = one.attempt, one.trajectory["final_answer"]
    last = next((m for m in reversed(one.trajectory["messages"]) if m["role"] == "assistant"), None)
    sample: Json = {
        **_base(attempt), "input": [_message(message) for message in one.opening],
        "messages": [_message(message) for message in one.messages],
        "output": {"model": about["agent"]["name"], "completion": answer or "", "usage": _usage([attempt]), "choices": [
            {"message": _message(last), "stop_reason": "stop"}] if last else []},
        "scores": _scores(one, answer)}
    limit = LIMITS.get(attempt.ended or attempt.outcome)
    if limit is not None:
        reached = one.agent[OURS]["budget"].get(limit[1])
        sample["limit"] = {"type": limit[0], "limit": float(reached if reached is not None else 0)}
    return sample


def _absent(attempt: Attempt) -> Json:
    """An attempt that never began."""
    return {**_base(attempt), "input": "", "messages": [], "output": {"model": "", "choices": []}, "scores": {}}


def _base(attempt: Attempt) -> Json:
    """What every sample has: its place, its clocks, what is known of it beside the conversation."""
    made: Json = {"id": attempt.task_id, "epoch": attempt.attempt + 1, "target": "", "store": {}, "events": [],
                  "model_usage": {}, "attachments": {}, "total_time": attempt.wall_s, "working_time": attempt.working_s,
                  "metadata": attempt.model_dump(mode="json", exclude={"criteria"})}
    if not attempt.scored:
        said = f"{attempt.outcome}: {attempt.message}"
        made["error"] = {"message": said, "traceback": said, "traceback_ansi": said}
    return made


def _scores(one: Saved, answer: str | None) -> Json:
    attempt = one.attempt
    if one.grades is None:
        return {}
    told = {row["verifier_id"]: row["verifier_result_values"].get("grade_rationale", "")
            for row in one.grades["verifier_results"]}
    why = "\n".join(f"{name}: {text}" for name, text in told.items() if text)
    return {"rubric": {"value": attempt.criteria or {}, "answer": answer, "explanation": why or None},
            "pass": {"value": "C" if attempt.passed else "I", "answer": answer}}


def _message(message: Json) -> Json:
    """A message as Inspect has it: arguments of calls are objects, what could not be read is an error of its parse."""
    role, content = message["role"], message.get("content") or ""
    made: Json = {"role": role, "content": content}
    if role == "tool":
        return made | {"tool_call_id": message.get("tool_call_id"), "function": message.get("name") or None}
    if message.get("tool_calls"):
        made["tool_calls"] = [_call(call) for call in message["tool_calls"]]
    return made


def _call(call: Json) -> Json:
    function, arguments = call["function"], call["function"]["arguments"]
    made: Json = {"id": call.get("id") or "", "function": function["name"] or "unreadable", "type": "function"}
    try:
        read = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError as error:
        return made | {"arguments": {}, "parse_error": f"{error}: {arguments}"}
    return made | {"arguments": read if isinstance(read, dict) else {"value": read}}
