"""Users of two tenants before an agent that knows one firm's rules: who is corrected, and what their stores hold."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "collect" / "proxy"))

from proxy_stack import Stack  # pyright: ignore[reportMissingImports]

from agentsdpo.benchmarks.tenants.figure import curve
from agentsdpo.benchmarks.tenants.study import FIRMS, Study, leaks, sentences
from agentsdpo.benchmarks.tenants.users import Talk, User
from agentsdpo.calls import write_call
from agentsdpo.collect.proxy.run import load_format
from agentsdpo.envs.desk import DeskSuite
from agentsdpo.envs.desk.agents import oracle, steps
from agentsdpo.envs.desk.firm import Firm
from agentsdpo.envs.desk.text import KINDS

KEYS = {f"{tenant}-has-this-long-key": tenant for tenant in FIRMS}
TASKS = range(3)


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """A proxy with tenants before an agent that works as acme's expert would, for whomever."""
    made = Stack(load_format("seed")[0], tmp_path / "live")
    suite = DeskSuite("desk-mini", firm_seed=FIRMS["acme"])
    tasks = [suite.task("train", index) for index in TASKS]
    done = {task.prompt: steps(task, oracle(task, suite.firm)) for task in tasks}

    def say(prompt: str) -> str:
        way = next((way for asked, way in done.items() if asked in prompt), [])
        turn = prompt.count("<|im_start|>assistant") - 1
        return write_call(*way[turn]) if 0 <= turn < len(way) else "Noted."

    made.engine.say = say
    made.start(KEYS, adapters="pol")
    yield made
    made.stop()


@pytest.fixture
def talks(stack: Stack) -> dict[str, list[Talk]]:
    """What the users of both tenants saw of the same tasks, under the same names."""
    return {tenant: User(stack.url, key, DeskSuite("desk-mini", firm_seed=FIRMS[tenant])).work(TASKS)
            for key, tenant in KEYS.items()}


def test_the_house_rules_are_opposite() -> None:
    one, other = (Firm(seed) for seed in FIRMS.values())
    for kind in KINDS:
        rules = other.rules(kind, "desk-mini")
        assert all(rules[slot] != option for slot, option in one.rules(kind, "desk-mini").items())


def test_who_is_wrong_is_corrected_in_the_next_message(stack: Stack, talks: dict[str, list[Talk]]) -> None:
    stack.stop_proxy()
    assert [(talk.right, talk.said) for talk in talks["acme"]] == [(True, "")] * 3
    assert not any(talk.right for talk in talks["globex"])
    assert {e.task_id: e.hint for e in stack.episodes("acme")} == {f"desk-{i}": None for i in TASKS}
    told = {e.task_id: e.hint for e in stack.episodes("globex")}
    for talk in talks["globex"]:
        hint = told[talk.name]
        assert hint is not None
        assert hint.words == talk.said
        assert hint.source == "user"
        assert talk.said in sentences("globex")
    assert all(e.train_allowed and e.reward is None for e in stack.episodes("globex") for _ in e.branches)


def test_a_leak_would_be_found(stack: Stack, talks: dict[str, list[Talk]]) -> None:
    stack.stop_proxy()
    assert leaks("acme", stack.store / "acme", talks, stack.chat) == []
    assert leaks("globex", stack.store / "globex", talks, stack.chat) == []
    assert "of globex" in leaks("acme", stack.store / "globex", talks, stack.chat)[0]
    foreign = replace(talks["acme"][0], served_by=("base", "pol-globex@v3"))
    assert leaks("acme", stack.store / "acme", {**talks, "acme": [*talks["acme"], foreign]}, stack.chat) == [
        "conversation desk-0 was answered by pol-globex@v3"]


def test_rows_name_the_code_that_runs_though_files_change_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    commits = iter(("running", "later", "later still"))
    monkeypatch.setattr("agentsdpo.benchmarks.tenants.study.git_commit", lambda: next(commits))
    nothing: Any = SimpleNamespace(tenants=list(FIRMS), proxy="", keys=dict.fromkeys(FIRMS, ""),
                                   registry=lambda tenant: SimpleNamespace(latest=lambda: None))
    study = Study(nothing)
    for tenant in FIRMS:
        study._row(tenant, "train", "sampled", {"n": 1, "pass": 0.0, "score": 0.0})
    assert [row["commit"] for row in study.rows] == ["running"] * 2


def test_the_curve_has_a_line_for_each_tenant() -> None:
    rows = [{"arm": tenant, "seed": seed, "episodes": at, "pass": at / 8, "decoding": "greedy"}
            for tenant in FIRMS for seed in (0, 1) for at in (0, 8)]
    (axes,) = curve(rows, {"acme": 0.0}).axes
    bold = [line for line in axes.lines if line.get_label().endswith("own rules")]  # type: ignore[union-attr]
    assert [list(line.get_ydata()) for line in bold] == [[0.0, 1.0]] * 2  # type: ignore[arg-type]
