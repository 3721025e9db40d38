"""The verbs as programs of their own: collectors, hint writer, learner, evaluator, and who keeps them alive.

They meet in the replay store, the policy registry and the run folder, nowhere else: each may be killed at any moment,
started again, multiplied, or moved to another machine.
"""
