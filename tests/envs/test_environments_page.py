"""The environment that the documentation writes is run as it stands there."""

import asyncio
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from agentsdpo.collect.episode_log import EpisodeLog
from agentsdpo.collect.rollout import run_episode
from agentsdpo.types import StopReason

PAGE = Path(__file__).resolve().parents[2] / "docs" / "environments.md"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    assert len([line for line in blocks[0].splitlines() if line.strip()]) <= 60
    script = tmp_path_factory.mktemp("page") / "shelves.py"
    script.write_text("\n\n".join(blocks))
    return runpy.run_path(str(script))


def test_the_page_plays_its_own_environment(page: dict[str, Any]) -> None:
    assert page["episode"].stop_reason == StopReason.COMPLETED
    assert page["episode"].train_allowed


def test_the_pages_environment_survives_a_restart(page: dict[str, Any], tmp_path: Path) -> None:
    class Recalling(page["Sorter"]):
        async def recall(self, ctx: Any, tools: Any, turn: Any) -> None:
            self.plan.pop(0)

    class Dies(Recalling):
        async def act(self, ctx: Any, tools: Any) -> Any:
            if len(self.plan) == 1:
                raise KeyboardInterrupt
            return await super().act(ctx, tools)

    suite = page["Shelves"]()
    task = suite.task("train", 0)

    def play(policy: Any) -> Any:
        return asyncio.run(run_episode(suite.env(), policy, task, seed=0, episode_id="e",
                                       log=EpisodeLog(tmp_path / "e", every=1)))

    with pytest.raises(KeyboardInterrupt):
        play(Dies())
    run = play(Recalling())
    assert run.outcome is not None
    assert asyncio.run(suite.grader().grade(task, run.outcome)).passed


def test_every_member_the_page_names_is_in_the_protocol() -> None:
    from agentsdpo.types import Closes, Env

    members = re.findall(r"`(?:async )?(\w+)\(", PAGE.read_text().split("## Your own")[0])
    for name in set(members) & {"reset", "call", "done", "snapshot", "restore", "outcome", "close"}:
        assert hasattr(Env, name) or hasattr(Closes, name)
    assert {"reset", "call", "done", "snapshot", "restore", "outcome"} <= set(members)
