"""Benchmarks read from disk: APEX v1 trees, Harbor folders, task files; and what is refused."""

import asyncio
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentsdpo.benchmarks.apex.checks import check
from agentsdpo.benchmarks.apex.layouts import open_layout
from agentsdpo.collect.hosted import HostedConfig
from agentsdpo.collect.rollout import run_episode
from agentsdpo.envs.archives import Entry, UnsafeArchive, UnsafePath, tar_bytes, unzip
from agentsdpo.errors import ConfigError, FormatError, TrainForbidden
from agentsdpo.types import ModelTurn, Outcome, Task, ToolCall, ToolSpec

WORLD, OTHER = "world_" + "a" * 32, "world_" + "b" * 32
FIRST, SECOND = "task_" + "1" * 32, "task_" + "2" * 32
JUDGE = HostedConfig(model="openai/j")
GOLD = "the golden answer 777"


@check
def wrote_memo(task: Task, outcome: Outcome) -> bool:
    """memo.md stands in the final files and holds the figure of the overlay."""
    final = unzip(outcome.final, "final")
    return "filesystem/memo.md" in final and b"512" in final["filesystem/memo.md"].load()


def rows() -> list[dict[str, Any]]:
    one = {"task_id": FIRST, "task_name": "World221_TR_10", "world_id": WORLD, "domain": "Law", "prompt": "Revenue?",
           "task_input_files": "snap_1", "expected_output": None, "gold_response": GOLD, "gold_response_type": "text",
           "rubric": [{"verifier_id": "ver_" + "1" * 32, "criteria": "States 512",
                       "x_agentsdpo": {"check": f"{__name__}:wrote_memo", "weight": 2.0}}], "new_key": 1}
    two = {**one, "task_id": SECOND, "world_id": OTHER, "task_input_files": None, "expected_output": "make_new_doc",
           "gold_response_type": "file", "rubric": [{"verifier_id": "ver_" + "2" * 32, "criteria": "States 498"},
                                                    {"verifier_id": "ver_" + "3" * 32, "criteria": "Is a memo"}],
           "x_agentsdpo": {"budget": {"turns": 7}, "train_allowed": True}}
    return [one, two]


def write_zip(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A v1 tree of two tasks in two worlds."""
    root = tmp_path / "apex"
    for world in (WORLD, OTHER):
        write_zip(root / "world_files_zipped" / f"{world}.zip", {
            "filesystem/books/q3.txt": b"revenue 498", ".apps_data/mail/1.eml": b"Subject: hi\n\nyes"})
    overlay = root / "task_files" / FIRST / "filesystem" / "books"
    overlay.mkdir(parents=True)
    (overlay / "q3.txt").write_bytes(b"revenue 512, audited")
    (root / "gold_files" / SECOND).mkdir(parents=True)
    (root / "gold_files" / SECOND / "gold.docx").write_text(GOLD)
    (root / "world_descriptions.json").write_text("[]")
    (root / "tasks_and_rubrics.json").write_text(json.dumps(rows()))
    return root


def change(tree: Path, edit: Callable[[list[dict[str, Any]]], Any]) -> None:
    made = rows()
    edit(made)
    (tree / "tasks_and_rubrics.json").write_text(json.dumps(made))


class Scripted:
    """Calls tools from a list, then answers."""

    def __init__(self, *steps: tuple[str, dict[str, Any]]) -> None:
        self.steps = list(steps)

    async def act(self, ctx: Any, tools: tuple[ToolSpec, ...]) -> ModelTurn:
        name, arguments = self.steps.pop(0)
        return ModelTurn(text="", calls=(ToolCall(id=f"c{ctx.turn}", name=name, arguments=arguments),))


def test_a_v1_tree(tree: Path) -> None:
    apex = open_layout(tree, judge=JUDGE)
    assert (apex.name, apex.version) == ("apex-agents", "1")
    one, two = apex.tasks
    assert (one.task_id, one.world_id, one.domain, one.expected_output) == (FIRST, WORLD, "Law", "message_in_console")
    assert (two.expected_output, two.budget.turns) == ("make_new_doc", 7)
    assert [(c.id[:5], c.primary, c.weight) for c in one.rubric + two.rubric] == [
        ("ver_1", True, 2.0), ("ver_2", True, 1.0), ("ver_3", False, 1.0)]
    assert not any(task.train_allowed for task in apex.tasks), "whatever the file says"
    assert GOLD not in repr(apex.tasks), "gold is never read"
    assert apex.grader(two).judged_by()["model"] == "openai/j"


def test_null_outputs_are_console_messages(tree: Path) -> None:
    change(tree, lambda tasks: tasks[0].update(expected_output="make_new_sheet", gold_response_type="text"))
    assert open_layout(tree, judge=JUDGE).tasks[0].expected_output == "message_in_console"


def test_an_episode_runs_and_is_graded_without_containers(tree: Path) -> None:
    apex = open_layout(tree, judge=JUDGE)
    task = apex.tasks[0]
    agent = Scripted(("filesystem_server_read_file", {"path": "/books/q3.txt"}),
                     ("filesystem_server_write_file", {"path": "memo.md", "content": "revenue was 512"}),
                     ("final_answer", {"answer": "512"}))
    run = asyncio.run(run_episode(apex.env(task), agent, task, seed=0, episode_id="e"))
    said = [message["content"] for message in run.messages if message["role"] == "tool"]
    assert said[0] == "revenue 512, audited", "the overlay lies over the world"
    assert run.outcome is not None
    assert run.outcome.answer == "512"
    grade = asyncio.run(apex.grader(task).grade(task, run.outcome))
    assert (grade.passed, grade.mean) == (True, 1.0)
    everything = repr(run.messages) + repr(run.outcome.initial)
    for hidden in (GOLD, *(criterion.text for criterion in task.rubric)):
        assert hidden not in everything, "neither gold nor rubric reaches the agent or its environment"


def test_attempts_share_a_world_and_not_what_they_wrote(tree: Path) -> None:
    apex = open_layout(tree, judge=JUDGE)
    task = apex.tasks[1]
    first, second = apex.env(task), apex.env(task)
    call = ToolCall(id="c", name="filesystem_server_write_file", arguments={"path": "x.txt", "content": "1"})
    asyncio.run(first.call((call,)))
    assert asyncio.run(second.call((call.model_copy(update={
        "name": "filesystem_server_list_files", "arguments": {}}),)))[0].content == "books/q3.txt  11"
    outcome: Any = second.outcome("a")
    assert outcome.initial == (tree / "world_files_zipped" / f"{OTHER}.zip").read_bytes(), "not packed again"


def test_the_hash_covers_what_decides_a_score(tree: Path) -> None:
    before = open_layout(tree, judge=JUDGE).sha256
    assert open_layout(tree, judge=None).sha256 == before, "the judge is stamped by itself"
    (tree / "gold_files" / SECOND / "gold.docx").write_text("another")
    assert open_layout(tree, judge=JUDGE).sha256 == before
    (tree / "task_files" / FIRST / "filesystem" / "books" / "q3.txt").write_text("revenue 513, audited")
    other = open_layout(tree, judge=JUDGE).sha256
    assert other != before
    change(tree, lambda tasks: tasks[0]["rubric"][0].update(criteria="States 513"))
    assert open_layout(tree, judge=JUDGE).sha256 not in (before, other)


@pytest.mark.parametrize(("edit", "words"), [
    (lambda tasks: tasks[0].update(rubric=[]), "has no rubric; give it at least one criterion"),
    (lambda tasks: tasks[0].pop("rubric"), "has no rubric"),
    (lambda tasks: tasks[1].update(task_id=FIRST), "1 task ids appear more than once"),
    (lambda tasks: tasks[1]["rubric"].append(tasks[1]["rubric"][0]), "3 criteria with 2 ids"),
    (lambda tasks: tasks.clear(), "holds no tasks"),
    (lambda tasks: tasks[0].update(task_id="../../etc"), "cannot name a file"),
    (lambda tasks: tasks[0].update(world_id="../w"), "cannot name a file"),
    (lambda tasks: tasks[0].pop("prompt"), "task 1: prompt: Field required"),
    (lambda tasks: tasks[0].update(prompt=7), "task 1: prompt: Input should be a valid string"),
    (lambda tasks: tasks[1].update(task_input_files="snap_2"), "has input files but"),
    (lambda tasks: tasks[1].update(world_id="world_x"), "1 of 2 worlds are missing"),
    (lambda tasks: tasks[0].update(x_agentsdpo={"budget": 40}), "task 1: x_agentsdpo.budget: Input should be"),
])
def test_a_v1_tree_that_cannot_be_scored(tree: Path, edit: Any, words: str) -> None:
    change(tree, edit)
    with pytest.raises(FormatError, match=words):
        open_layout(tree, judge=JUDGE)


def test_checks_and_judges_that_are_not_there(tree: Path) -> None:
    change(tree, lambda tasks: tasks[0]["rubric"][0]["x_agentsdpo"].update(check="os:remove"))
    with pytest.raises(ConfigError, match="os:remove is no check"):
        open_layout(tree, judge=JUDGE)
    change(tree, lambda tasks: None)
    apex = open_layout(tree)
    apex.grader(apex.tasks[0])
    with pytest.raises(ConfigError, match="criteria without a check and there is no judge; name one: --judge"):
        apex.grader(apex.tasks[1])


def test_hostile_worlds(tree: Path) -> None:
    place = tree / "world_files_zipped" / f"{WORLD}.zip"
    write_zip(place, {"filesystem/../../x": b""})
    with pytest.raises(UnsafePath):
        open_layout(tree, judge=JUDGE)
    write_zip(place, {"filesystem/zeros": bytes(4 << 20)})
    with pytest.raises(UnsafeArchive, match="looks like a bomb"):
        open_layout(tree, judge=JUDGE)
    place.write_bytes(b"no zip")
    with pytest.raises(FormatError, match="cannot be read as an archive"):
        open_layout(tree, judge=JUDGE)
    place.unlink()
    with pytest.raises(FormatError, match="worlds are missing"):
        open_layout(tree, judge=JUDGE)


def test_a_link_in_the_overlay(tree: Path) -> None:
    (tree / "task_files" / FIRST / "filesystem" / "passwd").symlink_to("/etc/passwd")
    with pytest.raises(UnsafeArchive, match="passwd is a link"):
        open_layout(tree, judge=JUDGE)


# ------------------------------------------------------------------------------------------------------------- Harbor


@pytest.fixture
def harbor(tmp_path: Path) -> Path:
    """A v1.1 tree of one task."""
    root = tmp_path / "harbor"
    world, task = root / "worlds" / WORLD, root / "tasks" / "ib-001"
    world.mkdir(parents=True)
    (world / "filesystem.tar.gz").write_bytes(tar_bytes({"./q3.txt": Entry.of(b"revenue 512")}))
    (world / "apps_data.tar.gz").write_bytes(tar_bytes({".apps_data/mail/1.eml": Entry.of(b"Subject: hi\n\nyes")}))
    for folder in ("tests", "solution", "environment/files"):
        (task / folder).mkdir(parents=True)
    (root / "manifest.json").write_text('{"agent_config_id": "loop_truncated_tools_agent"}')
    (task / "task.toml").write_text(f'version = "1.0"\n[metadata]\ndomain = "Law"\nworld_id = "{WORLD}"\n'
                                    "[agent]\ntimeout_sec = 900.0\n[verifier]\ntimeout_sec = 60\n")
    (task / "instruction.md").write_text("What was revenue?\n")
    (task / "solution" / "solve.sh").write_text(GOLD)
    (task / "environment" / "files" / "extra.txt").write_text("more")
    (task / "tests" / "verifiers.json").write_text(json.dumps([
        {"verifier_id": "ver_1", "verifier_version": 1, "verifier_values": {
            "criteria": "States 512", "is_primary_objective": True, "x_agentsdpo": {"target": "answer"}}}]))
    return root


def test_a_v1_1_tree(harbor: Path) -> None:
    apex = open_layout(harbor, judge=JUDGE)
    assert (apex.name, apex.version, len(apex.tasks)) == ("apex-agents", "1.1", 1)
    (task,) = apex.tasks
    assert (task.task_id, task.domain, task.world_id, task.prompt) == ("ib-001", "Law", WORLD, "What was revenue?")
    assert (task.budget.wall_s, task.train_allowed, task.rubric[0].target) == (900.0, False, "answer")
    assert sorted(apex.layout.files("ib-001")) == [".apps_data/mail/1.eml", "filesystem/extra.txt", "filesystem/q3.txt"]
    assert GOLD not in repr(apex.tasks)
    assert str(harbor) not in repr(apex.tasks), "the hash does not depend on where it lies"


def test_task_folders_of_other_origin(harbor: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "a-task"
    shutil.copytree(harbor / "tasks" / "ib-001", folder)
    (folder / "task.toml").write_text("")
    (folder / "tests" / "verifiers.json").unlink()
    (folder / "tests" / "rubric.json").write_text('[{"verifier_id": "a", "criteria": "States 512"}]')
    for place in (folder, folder.parent):
        mine = open_layout(place, judge=JUDGE)
        assert (mine.name, mine.tasks[0].task_id, mine.tasks[0].train_allowed) == ("harbor", "a-task", False)
        assert list(mine.layout.files("a-task")) == ["filesystem/extra.txt"]


@pytest.mark.parametrize(("text", "words"), [
    ("[agent]\ntimeout_sec = 'long'", "agent.timeout_sec is 'long'; give seconds"),
    ("metadata = 3", "metadata is 3, no table"), ("[agent]\ntimeout_sec = -5", "is -5"),
    ("[agent]\ntimeout_sec = nan", "is nan"), ("agent = []", "write .agent.")])
def test_a_task_toml_with_mistakes(harbor: Path, text: str, words: str) -> None:
    (harbor / "tasks" / "ib-001" / "task.toml").write_text(text)
    with pytest.raises(FormatError, match=words):
        open_layout(harbor, judge=JUDGE)


def test_harbor_folders_that_cannot_be_scored(harbor: Path) -> None:
    rubric = harbor / "tasks" / "ib-001" / "tests" / "verifiers.json"
    for text, words in (('{"a": 1}', "holds no list of criteria"), ('[{"x": 1}]', "holds no list of criteria"),
                        ("[]", "has no rubric"), ("{", "cannot be read")):
        rubric.write_text(text)
        with pytest.raises(FormatError, match=words):
            open_layout(harbor, judge=JUDGE)
    rubric.unlink()
    with pytest.raises(FormatError, match="no rubric that can be read; .* tests that are scripts need Harbor itself"):
        open_layout(harbor, judge=JUDGE)
    rubric.write_text('[{"verifier_id": "a", "criteria": "x"}]')
    shutil.rmtree(harbor / "worlds" / WORLD)
    with pytest.raises(FormatError, match="has no files in"):
        open_layout(harbor, judge=JUDGE)
    (harbor / "tasks" / "ib-001" / "instruction.md").unlink()
    with pytest.raises(FormatError, match=r"give it task.toml and instruction.md"):
        open_layout(harbor, judge=JUDGE)


# ---------------------------------------------------------------------------------------------------------- task files

TOML = """
name = "quarterly"
version = "2"

[[task]]
id = "q3"
prompt = "What was revenue in Q3?"
files = "worlds/q3"
budget = {turns = 20}
rubric = ["States 512", {id = "memo", text = "There is a memo", check = "CHECK", weight = 2.0}]
"""


def write_toml(folder: Path, text: str = TOML) -> Path:
    (folder / "worlds" / "q3").mkdir(parents=True, exist_ok=True)
    (folder / "worlds" / "q3" / "q3.txt").write_text("revenue 512")
    path = folder / "mine.toml"
    path.write_text(text.replace("CHECK", f"{__name__}:wrote_memo"))
    return path


def test_a_task_file(tmp_path: Path) -> None:
    mine = open_layout(write_toml(tmp_path), judge=JUDGE)
    (task,) = mine.tasks
    assert (mine.name, mine.version, task.budget.turns, task.train_allowed) == ("quarterly", "2", 20, False)
    assert [(c.id, c.weight, c.check is None) for c in task.rubric] == [("c1", 1.0, True), ("memo", 2.0, False)]
    assert list(mine.layout.files("q3")) == ["filesystem/q3.txt"]
    lines = tmp_path / "mine.jsonl"
    lines.write_text('{"suite": {"version": "3"}}\n\n{"id": "a", "prompt": "p", "rubric": ["x"]}\n'
                     '{"id": "b", "prompt": "p", "rubric": [{"text": "x", "target": "answer"}]}')
    mine = open_layout(lines, judge=JUDGE)
    assert (mine.name, mine.version, [task.task_id for task in mine.tasks]) == ("mine", "3", ["a", "b"])


@pytest.mark.parametrize(("old", "new", "words"), [
    ('prompt = "What was revenue in Q3?"', "", "task 1: prompt: Field required"),
    ('prompt = "What', 'promt = "What', "mine.toml: task 1: "),
    ("[[task]]", "[task]", "task is no list; write"),
    ("[[task]]", "[[task", "is no TOML"),
    ('id = "q3"', 'id = "../q3"', "cannot name a file"),
    ("turns = 20", "trns = 20", "budget.trns: Extra inputs"),
    ("turns = 20", "wall_s = inf", "task 'q3' holds a number that is infinite or none; write finite weights"),
    ('"worlds/q3"', '"worlds/q4"', "cannot be read as an archive"),
    ('"worlds/q3"', '"../q3"', "goes up"),
    ('"worlds/q3"', '"/etc"', "is absolute"),
    ('"worlds/q3"', '"out"', "lead to"),
    ('rubric = ["States 512", {', "rubric = []\nignored = [{", "ignored: Extra inputs"),
])
def test_task_files_with_mistakes(tmp_path: Path, old: str, new: str, words: str) -> None:
    (tmp_path / "out").symlink_to("/etc")
    assert old in TOML
    with pytest.raises(FormatError, match=words):
        open_layout(write_toml(tmp_path, TOML.replace(old, new)), judge=JUDGE)


def test_lines_with_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    for text, words in (("", "holds no tasks"), ('{"id": "a"', "line 1 is no JSON"), ("[1]", "line 1: "),
                        ('{"id": "a", "prompt": "p"}', "has no rubric"), ("[" * 100_000, "is no JSON"),
                        ('{"id": "a", "prompt": "p", "rubric": ["x"]}\n' * 2, "appear more than once")):
        path.write_text(text)
        with pytest.raises(FormatError, match=words):
            open_layout(path, judge=JUDGE)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match="write UTF-8"):
        open_layout(path, judge=JUDGE)


def test_what_is_no_benchmark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    for path in (tmp_path, tmp_path / "a.txt", tmp_path / "none"):
        with pytest.raises(FormatError, match="is no benchmark that can be read"):
            open_layout(path)


# --------------------------------------------------------------------------------------------------------- the licence


def test_training_needs_a_licence(tmp_path: Path) -> None:
    asked = 'train_allowed = true\nlicence = "own"\n'
    assert open_layout(write_toml(tmp_path, asked + TOML), judge=JUDGE).tasks[0].train_allowed
    for head, words in (("train_allowed = true\n", "licence None is not known to allow training"),
                        ('train_allowed = true\nlicence = "secret"\n', "licence 'secret' is not known"),
                        (asked + 'dataset = "mercor/apex-agents-v1.1"\n', "under a licence that forbids"),
                        (asked + 'dataset = "Mercor/APEX-Agents"\n', "under a licence that forbids")):
        with pytest.raises(TrainForbidden, match=words):
            open_layout(write_toml(tmp_path, head + TOML), judge=JUDGE)
    copied = asked + TOML.replace('id = "q3"', f'id = "{FIRST}"')
    with pytest.raises(TrainForbidden, match="is one of mercor/apex-agents, whose licence forbids training"):
        open_layout(write_toml(tmp_path, copied), judge=JUDGE)
    stuffed = asked + TOML.replace('id = "memo"', 'id = "ver_' + "0" * 32 + '"')
    with pytest.raises(TrainForbidden):
        open_layout(write_toml(tmp_path, stuffed), judge=JUDGE)


