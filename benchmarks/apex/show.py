"""One attempt for the terminal: what the agent said and did, and why it was graded so."""

from agentsdpo.benchmarks.apex.episode import grade_file
from agentsdpo.benchmarks.apex.pages import read_list, read_object, visible
from agentsdpo.benchmarks.apex.runfolder import BenchFolder, RunNotFound
from agentsdpo.formats import percent
from agentsdpo.replay.formats.shapes import text_of
from agentsdpo.types import Json

MOST = 4_000
"""Characters of one message on the terminal."""


def one_attempt(folder: BenchFolder, task_id: str, number: int) -> Json:
    """The record of an attempt with its opening, its trajectory and its grades.

    Raises:
        RunNotFound: the run has no such attempt.
    """
    found = [r for r in folder.records() if r.place == (task_id, number)]
    if not found:
        known = sorted({record.task_id for record in folder.records()})
        raise RunNotFound(f"{folder.path} has no attempt {number} at task {task_id!r}",
                          fix=f"its tasks are {', '.join(known[:5])}{', ...' if len(known) > 5 else ''}")
    place = folder.episode(task_id, number)
    return {"record": found[0].model_dump(mode="json"), "folder": str(place),
            "initial_messages": read_list(place / "initial_messages.json"),
            "trajectory": read_object(place / "trajectory.json"),
            "grades": read_object(grade_file(place, found[0].grading))}


def print_attempt(shown: Json) -> None:
    """The attempt as text on stdout; nothing in it can drive the terminal."""
    from rich.console import Console
    from rich.text import Text

    console, record = Console(highlight=False, markup=False, soft_wrap=True), shown["record"]
    verdict = "unscored" if not record["scored"] else "passed" if record["passed"] else "not passed"
    console.print(Text(visible(f"{record['task_id']} attempt {record['attempt']}: {verdict}, {record['outcome']}"),
                       style="bold"))
    if record["scored"]:
        console.print(f"score {percent(record['score'])}, {record['turns']} turns, {record['tool_calls']} tool calls")
    if record["message"]:
        console.print(Text(visible(record["message"])))
    for one in shown["grades"].get("verifier_results", ()):
        mark = "?" if one["score"] is None else "✓" if one["score"] >= 0.99 else "✗"
        why = one["verifier_result_values"]["grade_rationale"]
        console.print(Text(visible(f"  {mark} {one['verifier_id']}  {why}".rstrip())))
    for message in [*shown["initial_messages"], *shown["trajectory"].get("messages", ())]:
        console.print(Text(visible(f"\n{message['role']} {message.get('name') or ''}".rstrip()), style="bold"))
        for part in _parts(message):
            console.print(Text(visible(part)))
    console.print(Text(visible(f"\nfiles: {shown['folder']}")))


def _parts(message: Json) -> list[str]:
    text = text_of(message.get("content"))
    cut = [f"{text[:MOST]}\n[{len(text) - MOST} more characters]" if len(text) > MOST else text] if text else []
    return cut + [f"-> {call['function']['name']} {call['function']['arguments'][:MOST]}"
                  for call in message.get("tool_calls") or ()]
