"""Puts this folder on the path, so that tests and child processes share ``replay_factories``."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agentsdpo.replay import ReplayStore  # noqa: E402


@pytest.fixture
def store(tmp_path: Path) -> ReplayStore:
    return ReplayStore.open(tmp_path / "store")
