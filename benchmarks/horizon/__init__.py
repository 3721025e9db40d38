"""Does it hold at long horizons? ``python -m agentsdpo.benchmarks.horizon``."""
