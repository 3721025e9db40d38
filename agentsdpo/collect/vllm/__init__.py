"""The vLLM engine: token ids over HTTP, log-probs of what was drawn, versions as spans. vLLM itself is never imported.

``engine.py`` samples, ``server.py`` finds out what a server can be trusted with, ``wire.py`` writes requests and reads
answers, ``retry.py`` says which faults pass.
"""

from agentsdpo.collect.vllm.engine import VllmEngine

__all__ = ["VllmEngine"]
