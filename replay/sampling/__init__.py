"""Which branches a learner draws, in what order and how fast."""
