"""Collecting episodes: engines, the loop between agent and environment, and the collector that runs many at once."""
