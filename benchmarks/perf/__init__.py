"""How long things take, and why."""
