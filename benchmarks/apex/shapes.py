"""The files of one attempt in archipelago's shapes; what those have no place for stands under ``x_agentsdpo``.

Pure functions from records to JSON. Its models ignore unknown keys, so that the files are read as they are.
"""

import json
from collections.abc import Mapping
from typing import Any

from agentsdpo.benchmarks.apex.records import Attempt, opening_of, outcome_calls
from agentsdpo.collect.rollout import Rollout
from agentsdpo.types import Criterion, Grade, Json, Task, ToolCall, ToolResult

OURS = "x_agentsdpo"
EVAL_CONFIG = "ec_output_llm"
STATUS = {"completed": "completed", "budget_time": "error", "cancelled": "cancelled", "env_error": "error",
          "provider_error": "failed", "judge_error": "completed"}
"""archipelago's word for an outcome; every other one is ``failed``: steps exhausted or nothing usable."""


def trajectory(attempt: Attempt, run: Rollout, *, initial_sha256: str) -> Json:
    """``trajectory.json``: messages with arguments as text, status, usage, answer; calls as the grader saw them."""
    usage = {"prompt_tokens": attempt.prompt_tokens, "completion_tokens": attempt.completion_tokens,
             "total_tokens": attempt.prompt_tokens + attempt.completion_tokens, "final_answer_tokens": 0,
             "max_prompt_tokens": max((len(b.token_ids) for b in run.branches), default=0),
             "compaction_count": attempt.compactions, "reasoning_tokens": 0, "cached_tokens": 0,
             "cache_creation_tokens": 0, "call_log": []}
    ours = {"outcome": attempt.outcome, "error": run.error, "initial_sha256": initial_sha256,
            "tools": [tool.openai() for tool in run.tools], "episode_sha256": attempt.episode_sha256,
            "calls": outcome_calls(run.outcome) if run.outcome else []}
    answer = run.outcome.answer if run.outcome else run.answer
    return {"messages": _named([message_out(m) for m in run.messages[len(opening_of(run.messages)):]]), "output": None,
            "status": STATUS.get(attempt.outcome, "failed"), "time_elapsed": attempt.wall_s, "usage": usage,
            "final_answer": answer, OURS: ours}


def message_out(message: Json) -> Json:
    """A message whose calls carry their arguments as text, as providers have it; what did not parse stays as it was.

    >>> call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    >>> message_out({"role": "assistant", "content": "", "tool_calls": [call]})["tool_calls"][0]["function"]
    {'name': 'f', 'arguments': '{"x": 1}'}
    """
    if not message.get("tool_calls"):
        return dict(message)
    return {**message, "tool_calls": [_call_out(call) for call in message["tool_calls"]]}


def _call_out(call: Json) -> Json:
    arguments = call["function"].get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": text}}


def _named(messages: list[Json]) -> list[Json]:
    """Tool messages with the name of the tool that answered."""
    names: dict[str, str] = {}
    for message in messages:
        names |= {call.get("id", ""): call["function"]["name"] for call in message.get("tool_calls") or ()}
    return [{**m, "name": names.get(m.get("tool_call_id", ""), "")} if m["role"] == "tool" else m for m in messages]


def calls_of(trajectory_json: Json) -> tuple[tuple[ToolCall, ToolResult], ...]:
    """The calls as the grader saw them, from ``trajectory.json``."""
    return tuple((ToolCall(**row["call"]), ToolResult(**row["result"])) for row in trajectory_json[OURS]["calls"])


def verifiers(task: Task) -> list[Json]:
    """``verifiers.json``: one per criterion; index 0 is primary where none says so."""
    some = any(criterion.primary for criterion in task.rubric)
    return [{"verifier_id": c.id, "verifier_version": 1, "world_id": task.world_id, "task_id": task.task_id,
             "eval_config_id": EVAL_CONFIG, "verifier_values": _values(c, primary=c.primary or (not some and i == 0)),
             "verifier_index": i, "verifier_dependencies": None} for i, c in enumerate(task.rubric)]


def _values(criterion: Criterion, *, primary: bool) -> Json:
    return {"criteria": criterion.text, "is_primary_objective": primary, "negative_criteria": criterion.negative,
            OURS: {"check": criterion.check, "weight": criterion.weight, "target": criterion.target}}


def eval_configs() -> list[Json]:
    """``eval_configs.json``."""
    return [{"eval_config_id": EVAL_CONFIG, "eval_config_name": "Output LLM Verifier", "eval_defn_id": "output_llm",
             "eval_config_values": {}}]


def scoring_config() -> Json:
    """``scoring_config.json``: the mean of criteria."""
    return {"scoring_config_id": "sc_default", "scoring_config_name": "Default Scoring", "scoring_defn_id": "template",
            "scoring_config_values": {}}


def grading_settings(judge: Mapping[str, Any]) -> Json:
    """``grading_settings.json``: the judge, None where programs grade."""
    return {"llm_judge_model": judge.get("model"), "llm_judge_extra_args": None, OURS: dict(judge)}


def agent_config(task: Task, attempt: Attempt, agent: Json, budget: Json) -> Json:
    """``agent_config.json``: what played, under which limits."""
    return {"agent_config_id": "agentsdpo_loop", "agent_name": agent["name"],
            "agent_config_values": {"timeout": budget["wall_s"], "max_steps": budget["turns"]},
            OURS: {"agent": agent, "budget": budget, "seed": attempt.seed, "policy_version": attempt.policy_version,
                   "train_allowed": task.train_allowed, "prompt_sha256": attempt.prompt_sha256}}


def grades(attempt: Attempt, grade: Grade | None) -> Json:
    """``grades.json``. ``final_score`` is the mean over criteria, not pass@1; None while unscored."""
    results = [{"verifier_id": r.id, "verifier_version": 1, "score": r.score,
                "verifier_result_values": {"judge_grade": None if r.score is None else "pass" if r.score >= 0.99
                                           else "fail", "grade_rationale": r.rationale},
                "status": r.status, "message": r.rationale if r.status != "ok" else ""}
               for r in (grade.results if grade else ())]
    return {"grading_run_id": f"gr_{attempt.episode_sha256[:8]}",
            "grading_run_status": "completed" if attempt.scored else "error", "verifier_results": results,
            "scoring_results": {"final_score": attempt.score, "scoring_method_result_values": {}},
            OURS: {"grading": attempt.grading, "outcome": attempt.outcome, "passed": attempt.passed,
                   "message": attempt.message, "grade": grade.model_dump(mode="json") if grade else None}}
