"""The desk world: rules leak nowhere, everything is determined by seeds, the scale of agents holds."""

import ast
import json
import operator
import os
import random
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from agentsdpo.envs.desk import PRESETS, SPLITS, DeskEnv, DeskGrader, DeskSuite, Firm, agents, families, text, world
from agentsdpo.envs.desk.calc import BadExpression, evaluate
from agentsdpo.envs.desk.firm import SLOTS, hint, slots_of
from agentsdpo.envs.desk.tools import SPECS, TOOLS
from agentsdpo.errors import ConfigError
from agentsdpo.types import Grade, Task, ToolCall


def act(env: DeskEnv, step: families.Step, number: int = 0) -> str:
    name, arguments = step
    return env.apply(ToolCall(id=f"c{number}", name=name, arguments=arguments)).content


def play(suite: DeskSuite, task: Task, agent: agents.ScriptedAgent, *, limit: int = 2000) -> tuple[Grade, DeskEnv]:
    env, seen = suite.env(), None
    env.start(task)
    while not env.done() and len(env.log) < limit:
        seen = act(env, agent.step(seen), len(env.log))
    return suite.grader().judge(task, env.outcome(None)), env


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("n", [1, 2, 4, 8, 48])
def test_oracle_passes_everything(preset: str, family: str, n: int) -> None:
    suite = DeskSuite(preset, families=(family,), n=(n,))
    for split in SPLITS if n < 8 else ("val", "test_firm"):
        if split == "test_n" and n > 1:
            continue
        for index in range(3 if n < 8 else 2):
            task = suite.task(split, index)
            grade, env = play(suite, task, agents.oracle(task, suite.firm))
            assert grade.passed, (task.prompt, grade, env.log)
            assert len(env.log) <= (task.budget.tool_calls or 0)


@pytest.mark.parametrize("preset", PRESETS)
def test_oracle_recovers_from_slips_and_faults(preset: str) -> None:
    suite = DeskSuite(preset, families=families.FAMILIES, n=(1, 2, 4), fault_rate=0.2)
    slips = 0
    for index in range(40):
        task = suite.task("val", index)
        grade, env = play(suite, task, agents.oracle(task, suite.firm, epsilon=0.2, seed=index))
        assert grade.passed, (task.prompt, env.log)
        slips += any(failed for *_, failed in env.log)
    assert slips > 20


def test_horizon_knob_is_close_to_the_sizes_it_was_made_for() -> None:
    suite = DeskSuite("desk", families=("rollup",), n=(8,))
    calls = []
    for index in range(20):
        task = suite.task("val", index)
        calls.append(len(play(suite, task, agents.oracle(task, suite.firm))[1].log))
    assert 25 <= sum(calls) / len(calls) <= 55


def test_guesser_is_the_honest_ceiling() -> None:
    suite, passed, means = DeskSuite(), 0, {"unit": 0.0, "file": 0.0, "notify": 0.0}
    for index in range(1500):
        task = suite.task("train", index)
        grade, _ = play(suite, task, agents.guesser(task, seed=10_007 * index + 5))
        passed += bool(grade.passed)
        for result in grade.results:
            if result.id in means:
                means[result.id] += (result.score or 0.0) / 1500
    assert passed <= 20                                      # 0.4 % of 1 500 is 6
    assert all(0.2 < mean < 0.3 for mean in means.values()), means


async def rollout(suite: DeskSuite, task: Task, agent: object, turns: int = 60) -> Grade:
    env, messages, answer = suite.env(), [], None
    messages = await env.reset(task, seed=0, episode_id="e")
    for _ in range(turns):
        turn = await agent.act(SimpleNamespace(messages=messages), env.tools)  # type: ignore[attr-defined]
        if not turn.calls:
            answer = turn.text
            break
        messages += [{"role": "tool", "content": r.content} for r in await env.call(turn.calls)]
        if env.done():
            break
    return await suite.grader().grade(task, env.outcome(answer))


@pytest.mark.parametrize("kind", ["empty", "colon", "echo", "criteria", "random", "scattergun"])
@pytest.mark.anyio
async def test_agents_without_skill_never_pass(kind: str) -> None:
    for preset in PRESETS:
        suite = DeskSuite(preset, families=families.FAMILIES, n=(1, 2))
        for index in range(20):
            task = suite.task("val", index)
            agent = (agents.RandomAgent(task, seed=index) if kind == "random" else
                     agents.Scattergun(task) if kind == "scattergun" else agents.NullAgent(task, kind))
            assert (await rollout(suite, task, agent)).passed is False


@pytest.mark.anyio
async def test_scattergun_meets_positive_criteria_and_fails_by_the_negative_one() -> None:
    met: set[str] = set()
    for index in range(40):
        suite = DeskSuite(firm_seed=index)
        grade = await rollout(suite, suite.task("val", index), agents.Scattergun(suite.task("val", index)))
        met |= {r.id for r in grade.results if r.score == 1.0}
        assert next(r.score for r in grade.results if r.id == "once") == 0.0
    assert {"notify", "figure"} <= met


def test_the_initial_state_does_not_know_the_firm_and_the_hint_does_not_know_the_world() -> None:
    hints: dict[tuple[int, str], set[str]] = {}
    for index in range(300):
        states, firm = set(), DeskSuite(firm_seed=index % 3)
        for seed in (7, 8, 9):
            env = DeskSuite(firm_seed=seed).env()
            env.start(DeskSuite(firm_seed=seed).task("train", index))
            states.add(world.state_hash(env.state))
        assert len(states) == 1
        task = firm.task("train", index)
        env = firm.env()
        env.start(task)
        feedback = firm.grader().judge(task, env.outcome("nothing")).feedback
        hints.setdefault((index % 3, task.metadata["kinds"][0]), set()).add(feedback)
    assert all(len(texts) == 1 for texts in hints.values())
    assert len({next(iter(t)) for t in hints.values()}) > 8


def test_no_observation_holds_rubric_text_or_a_rule_sentence() -> None:
    for preset in PRESETS:
        suite = DeskSuite(preset, families=families.FAMILIES, n=(2,))
        for index in range(30):
            task = suite.task("val", index)
            agent, env, seen = agents.oracle(task, suite.firm), suite.env(), None
            opening = " ".join(m["content"] for m in env.start(task))
            kind = task.metadata["kinds"][0]
            secrets = [c.text for c in task.rubric] + [hint(kind, suite.firm.rules(kind, preset))]
            while not env.done():
                seen = act(env, agent.step(seen))
                assert not any(s in seen or s in opening for s in secrets)


def test_the_stranger_shares_no_full_rule_set_and_its_tasks_look_the_same() -> None:
    firm, suite = Firm(7), DeskSuite()
    other = firm.stranger("desk-mini")
    assert all(other.rules(k, "desk-mini") != firm.rules(k, "desk-mini") for k in text.KINDS)
    task = suite.task("test_firm", 3)
    grade, _ = play(suite, task, agents.ScriptedAgent(task, firm.rules(task.metadata["kinds"][0], "desk-mini")))
    assert grade.passed is False


def test_splits_hold_out_one_axis_each() -> None:
    suite, seen = DeskSuite(), set(text.names(held_out=False))
    for index in range(60):
        metas = {split: suite.task(split, index).metadata for split in SPLITS}
        assert set(metas["train"]["clients"]) <= seen
        assert not set(metas["test_names"]["clients"]) & seen
        assert text.year_of(metas["test_period"]["period"]) in "789"
        assert text.year_of(metas["train"]["period"]) in "123456"
        assert metas["train"]["world_seed"] < 1000 <= metas["val"]["world_seed"] < 1100
        assert 10_000 <= metas["test_world"]["world_seed"] < 10_200
        assert metas["test_n"]["n"] >= 8


def test_snapshot_and_restore_at_every_call_leave_the_remainder_identical() -> None:
    suite = DeskSuite("desk", families=families.FAMILIES, n=(1, 2), fault_rate=0.1)
    for index in range(25):
        task = suite.task("val", index)
        steps: list[families.Step] = []
        agent, env, seen = agents.oracle(task, suite.firm, epsilon=0.2, seed=index), suite.env(), None
        env.start(task)
        while not env.done():
            steps.append(agent.step(seen))
            seen = act(env, steps[-1], len(steps))
        again = suite.env()
        again.start(task)
        for step in steps:
            fresh = suite.env()
            fresh.restore(again.snapshot())
            assert fresh.snapshot() == again.snapshot()
            again = fresh
            act(again, step)
        assert again.chain == env.chain
        assert again.snapshot() == env.snapshot()


_CHAIN = """
from agentsdpo.envs.desk import DeskSuite, agents, families
from tests.envs.test_desk_world import play
suite = DeskSuite("desk", families=families.FAMILIES, n=(1, 4), fault_rate=0.1)
for i in range(12):
    task = suite.task("val", i)
    print(play(suite, task, agents.oracle(task, suite.firm, epsilon=0.2, seed=i))[1].chain)
"""


def test_two_processes_with_different_hash_seeds_agree_to_the_byte() -> None:
    outputs = {subprocess.run([sys.executable, "-c", _CHAIN], env={**os.environ, "PYTHONHASHSEED": str(seed)},
                              capture_output=True, text=True, check=True).stdout for seed in (1, 2)}
    assert len(outputs) == 1
    assert len(outputs.pop().split()) == 12


def test_replaying_the_calls_of_an_episode_gives_the_same_bytes() -> None:
    suite = DeskSuite(families=("lookup",))
    task = suite.task("val", 5)
    _, env = play(suite, task, agents.oracle(task, suite.firm, epsilon=0.5, seed=3))
    again = suite.env()
    again.start(task)
    for i, (name, arguments, _) in enumerate(env.log):
        again.apply(ToolCall(id=str(i), name=name, arguments=arguments))
    assert again.snapshot() == env.snapshot()


@pytest.mark.parametrize(("call", "says"), [
    (("no_such", {}), "no tool"), (("file_read", {}), "missing path"), (("file_read", {"path": 3}), "bad path"),
    (("file_read", {"path": "ledger/none"}), "no such file"), (("calc", {"expr": "1/0", "unit": "usd",
                                                                       "round": "up"}), "cannot compute"),
    (("cell_set", {"path": "../etc/passwd", "row": "a", "col": "b", "value": "1", "unit": "usd"}), "no such folder"),
    (("file_read", {"path": "x", "bogus": "y"}), "unknown argument"), (("mail_list", {"page": 99}), "no page"),
    (("mail_list", {"page": True}), "bad page"), (("file_list", {"folder": "etc"}), "bad folder"),
    (("calc", {"expr": "(" * 200, "unit": "usd", "round": "up"}), "cannot compute"),
    (("calc", {"expr": "__import__('os')", "unit": "usd", "round": "up"}), "cannot compute"),
])
def test_faults_are_observations_and_change_nothing(call: families.Step, says: str) -> None:
    env = DeskEnv()
    env.start(DeskSuite().task("train", 0))
    before = world.state_hash(env.state)
    result = env.apply(ToolCall(id="c", name=call[0], arguments=call[1]))
    assert result.is_error
    assert says in result.content
    assert world.state_hash(env.state) == before == result.state_hash


def test_all_notes_are_listed_in_the_order_in_which_they_were_written() -> None:
    env = DeskEnv()
    env.start(DeskSuite().task("train", 0))
    for key, words in (("b", "1"), ("a", "2"), ("b", "3")):
        env.apply(ToolCall(id="c", name="note_add", arguments={"key": key, "text": words}))
    assert env.apply(ToolCall(id="c", name="note_get", arguments={"key": ""})).content == "b 3\na 2"


def test_random_agents_never_crash_the_desk() -> None:
    rng = random.Random(0)
    env = DeskEnv()
    env.start(DeskSuite("desk", families=("close",), n=(3,)).task("train", 1))
    for i in range(3000):
        spec = rng.choice([t for t in TOOLS if t.name != "submit"])
        arguments = {k: rng.choice(["", "ledger/x", "reports/", "reports/y", 1, "close", "usd", "mon", "up", "9" * 500])
                     for k in spec.parameters["properties"]}
        assert isinstance(env.apply(ToolCall(id=str(i), name=spec.name, arguments=arguments)).content, str)
    json.loads(env.snapshot())


@pytest.mark.parametrize(("knobs", "words"), [
    ({"families": ("nope",)}, "there is no family 'nope'; choose of lookup, correct"), ({"families": ()}, "is empty"),
    ({"n": (4, 0)}, r"n is \[4, 0\]; give"), ({"n": (100,)}, "each 1 to 48"), ({"n": ()}, r"n is \[\]")])
def test_knobs_that_make_no_task_are_refused(knobs: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DeskSuite("desk", **knobs)


def test_a_sum_too_long_to_compute_is_refused_not_cut() -> None:
    """Cut in the middle of a figure it came to another sum, and nothing said so."""
    assert evaluate("482" + "+4821" * 39) == 482 + 4821 * 39
    for many in (40, 48):
        with pytest.raises(BadExpression, match=f"cannot compute {3 + 5 * many} characters, only 200"):
            evaluate("482" + "+4821" * many)


def test_calc_agrees_with_python_on_random_expressions() -> None:
    rng = random.Random(1)
    for _ in range(300):
        expr = "".join(f"{rng.choice('+-*')}{rng.randint(1, 99)}" for _ in range(rng.randint(1, 6)))[1:]
        if rng.random() < 0.5:
            expr = f"({expr})*3-{expr}"
        assert evaluate(expr) == _python(expr)


def _python(expr: str) -> int:
    ops = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            return ops[type(node.op)](value(node.left), value(node.right))
        assert isinstance(node, ast.Constant)
        assert isinstance(node.value, int)
        return node.value

    return value(ast.parse(expr, mode="eval").body)


def test_feedback_levels_and_scope() -> None:
    task = DeskSuite().task("train", 0)
    env = DeskEnv()
    env.start(task)
    outcome = env.outcome("")
    words = [DeskGrader(Firm(7), level=level).judge(task, outcome).feedback for level in range(4)]
    kind = task.metadata["kinds"][0]
    rules = Firm(7).rules(kind, "desk-mini")
    assert words[0] == ""
    assert "not met" in words[1]
    assert len(words[2]) > len(words[1])
    assert words[3] == hint(kind, rules)
    right = {**rules, "unit": next(u for u in SLOTS["unit"] if u != rules["unit"])}
    _, env = play(DeskSuite(), task, agents.ScriptedAgent(task, right))
    failed = DeskGrader(Firm(7), scope="failed").judge(task, env.outcome(None)).feedback
    assert failed == hint(kind, rules, ["unit"])


def test_schemas_are_closed_and_slots_have_four_options() -> None:
    for spec in SPECS.values():
        assert spec.parameters["additionalProperties"] is False
        assert spec.parameters["type"] == "object"
    assert all(len(SLOTS[slot]) == 4 for slot in slots_of("desk"))


def test_the_world_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, agentsdpo.envs.desk; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
