"""The agent benchmark: task sets in, attempts in a run folder, statistics and reports out."""
