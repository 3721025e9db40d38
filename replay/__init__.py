"""The replay store: episodes with exact token ids and behaviour log-probs, kept in Parquet."""

if not __name__.startswith("agentsdpo."):
    raise ImportError(f"this folder was imported as {__name__!r}; import agentsdpo.replay instead, "
                      "the same files under a name that cannot collide with other distributions")
