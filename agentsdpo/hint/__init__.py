"""Hindsight: what was learned too late, as text that only the teacher reads."""
