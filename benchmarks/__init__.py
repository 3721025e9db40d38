"""Measurements: the agent benchmark, the staleness study and the speed of the learner."""

if not __name__.startswith("agentsdpo."):
    raise ImportError(f"this folder was imported as {__name__!r}; import agentsdpo.benchmarks instead, "
                      "the same files under a name that cannot collide with other distributions")
