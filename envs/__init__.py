"""Worlds that agents act in: each owns its state and tools, and knows neither loop nor reward."""

if not __name__.startswith("agentsdpo."):
    raise ImportError(f"this folder was imported as {__name__!r}; import agentsdpo.envs instead, "
                      "the same files under a name that cannot collide with other distributions")
