"""A real server with the seed model, one a session, and a fake one that replays what real ones got wrong."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests and fixtures share ``fake_vllm``

from fake_vllm import FakeVllm

from agentsdpo.envs.desk.seed import seed_path
from agentsdpo.serve import VENV, ServeOptions, Server

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="session")
def vllm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real vLLM with the seed model as ``policy``, version 0, four adapters of rank up to 16; a test that changes
    its weights puts them back."""
    if not (ROOT / VENV).exists() and not os.environ.get("AGENTSDPO_VLLM_PYTHON"):
        pytest.skip("no .venv-vllm here: make vllm builds it")
    options = ServeOptions(str(seed_path()), port=0, adapters=4, max_rank=16)
    with Server.start(options, log=tmp_path_factory.mktemp("vllm") / "server.log") as server:
        yield server


@pytest.fixture
def fake_vllm() -> Iterator[FakeVllm]:
    """A server that answers as vLLM does, until it is told to go wrong; see ``fake_vllm.py``."""
    with FakeVllm() as fake:
        yield fake
