"""A registry with one version, and the counting world."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from agentsdpo.envs.desk.seed import seed_path
from agentsdpo.learn.load import load_chat
from agentsdpo.publish.registry import PolicyRegistry


@pytest.fixture(scope="session")
def counting() -> SimpleNamespace:
    path = Path(__file__).with_name("counting.py")
    return SimpleNamespace(path=path, **runpy.run_path(str(path)))


@pytest.fixture
def registry(tmp_path: Path) -> PolicyRegistry:
    chat = load_chat(seed_path())
    made = PolicyRegistry(tmp_path / "policies", tokenizer_sha256=chat.tokenizer_sha256,
                          chat_template_sha256=chat.template_sha256)
    made.publish({"w": np.zeros(4, np.float32)}, learner_step=0)
    return made
