"""The desk world at scale, through the loop: every horizon, split, distractor and fault is within an oracle's reach,
and within nobody's who has no skill."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from agentsdpo.collect.rollout import Rollout, run_episode
from agentsdpo.envs.desk import PRESETS, SPLITS, DeskEnv, DeskSuite, agents, families, text, world
from agentsdpo.types import StopReason, Task, ToolCall

GRID = (1, 2, 4, 8, 16, 32, 48)
DOCS = Path(__file__).resolve().parents[2] / "docs" / "environments.md"


def play(suite: DeskSuite, task: Task, agent: Any, **rules: Any) -> tuple[bool, Rollout]:
    run = asyncio.run(run_episode(suite.env(), agent, task, seed=0, episode_id=task.task_id, **rules))
    assert run.outcome is not None, run.error
    return bool(suite.grader().judge(task, run.outcome).passed), run


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_oracle_passes_every_cell_within_its_budget(preset: str, family: str) -> None:
    for at, n in enumerate(GRID):
        suite = DeskSuite(preset, families=(family,), n=(n,), distractors=20, fault_rate=0.1)
        splits = SPLITS if n <= 4 else (SPLITS[at], "test_firm")
        for split in splits:
            task = suite.task(split, at)
            passed, run = play(suite, task, agents.oracle(task, suite.firm), announce="every_7")
            assert passed, (split, n, task.prompt)
            assert run.stop_reason == StopReason.COMPLETED
            assert run.counts["calls"] == run.counts["valid_calls"] <= (task.budget.tool_calls or 0)


@pytest.mark.parametrize("kind", ["empty", "colon", "opener", "echo", "criteria", "random", "scattergun"])
def test_agents_without_skill_pass_no_cell(kind: str) -> None:
    for preset in PRESETS:
        for at, n in enumerate((1, 4, 16)):
            suite = DeskSuite(preset, families=families.FAMILIES, n=(n,))
            for index in range(4):
                task = suite.task(SPLITS[(at + index) % len(SPLITS)], index)
                agent = (agents.RandomAgent(task, seed=index) if kind == "random" else
                         agents.Scattergun(task) if kind == "scattergun" else agents.NullAgent(task, kind))
                assert not play(suite, task, agent, final_turn=True)[0]


def test_guessing_the_rules_does_not_help_at_any_length() -> None:
    for n in GRID:
        suite = DeskSuite("desk", families=families.FAMILIES, n=(n,))
        task = suite.task("val", n)
        assert not play(suite, task, agents.greedy(task))[0]


def test_faults_and_distractors_make_an_episode_longer_and_no_more() -> None:
    plain, hard = (DeskSuite("desk", families=("correct",), n=(16,), distractors=d, fault_rate=f)
                   for d, f in ((0, 0.0), (100, 0.3)))
    for index in range(3):
        counts = []
        for suite in (plain, hard):
            task = suite.task("test_world", index)
            passed, run = play(suite, task, agents.oracle(task, suite.firm))
            assert passed
            counts.append(run.counts)
        assert counts[1]["calls"] > counts[0]["calls"] + 20
        assert counts[1]["tool_errors"] > 5
        assert counts[0]["tool_errors"] == 0


def test_the_longest_cells_take_about_260_calls() -> None:
    suite = DeskSuite("desk", families=("reconcile",), n=(48,), fault_rate=0.15)
    task = suite.task("val", 0)
    passed, run = play(suite, task, agents.oracle(task, suite.firm))
    assert passed
    assert 250 <= run.counts["calls"] <= 280


def test_test_n_draws_every_long_horizon_evenly() -> None:
    suite = DeskSuite()
    drawn = [suite.task("test_n", index).metadata["n"] for index in range(200)]
    assert {n: drawn.count(n) > 25 for n in (8, 16, 32, 48)} == dict.fromkeys((8, 16, 32, 48), True)


def test_the_table_of_horizons_in_the_documentation_is_measured() -> None:
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")]
            for line in DOCS.read_text().splitlines() if line.startswith(("| desk |", "| desk-mini |"))]
    assert len(rows) == len(PRESETS) * len(families.FAMILIES)
    for preset, family, *means in rows:
        for n, mean in zip(GRID, means, strict=True):
            if n <= 4 or (family, n) == ("reconcile", 48):
                assert f"{oracle_calls(preset, family, n):.0f}" == mean, (preset, family, n)


def oracle_calls(preset: str, family: str, n: int) -> float:
    """Mean tool calls of the oracle over eight tasks."""
    suite, calls = DeskSuite(preset, families=(family,), n=(n,)), 0
    for index in range(8):
        task = suite.task("val", index)
        agent, env, seen = agents.oracle(task, suite.firm), suite.env(), None
        env.start(task)
        while not env.done():
            name, arguments = agent.step(seen)
            seen = env.apply(ToolCall(id="c", name=name, arguments=arguments)).content
        calls += len(env.log)
    return calls / 8


def test_the_state_hash_that_is_kept_up_is_that_of_the_whole_state() -> None:
    rng, env = random.Random(3), DeskEnv()
    env.start(DeskSuite("desk", families=("close",), n=(4,)).task("val", 0))
    for i in range(400):
        name = rng.choice(["cell_set", "cell_set", "mail_send", "cal_add", "note_add", "mail_list"])
        arguments = {"cell_set": {"path": f"{rng.choice(['board', 'ledger'])}/{rng.choice('xyz')}é", "row": "tax",
                                  "col": str(rng.randrange(3)), "value": str(i), "unit": "usd"},
                     "mail_send": {"to": "cfo", "text": f"{i}\u2028"}, "cal_add": {"day": "mon", "title": "é"},
                     "note_add": {"key": rng.choice(text.KINDS), "text": '"'}, "mail_list": {}}[name]
        result = env.apply(ToolCall(id=str(i), name=name, arguments=arguments))
        assert result.state_hash == world.state_hash(env.state)
        if i % 50 == 0:
            again = DeskEnv()
            again.restore(env.snapshot())
            env = again
