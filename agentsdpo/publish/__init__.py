"""Policy versions on disk: what the learner publishes and every other program reads."""
