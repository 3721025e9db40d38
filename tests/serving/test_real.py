"""Against a real vLLM with the seed model, on loopback."""

from typing import Any

import pytest

pytestmark = pytest.mark.vllm


def test_the_server_is_what_it_was_started_as(vllm_server: Any) -> None:
    from agentsdpo.collect.vllm import VllmEngine

    engine = VllmEngine(vllm_server.url)
    assert engine.facts.route == "/inference/v1/generate"
    assert engine.facts.kind == "processed"
    assert (engine.version, engine.context_window, engine.model) == (0, 4096, "policy")
