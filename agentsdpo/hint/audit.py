"""Controls on hints: pairs every row with a hint that is wrong for it. Pure; the scoring happens in the learner.

The size of the gap says nothing about usefulness: an all-wrong hint gave nearly the mean gap of the right one. What
tells them apart is the difference per token, ``hint/wrong_gap`` (objective, section 6).
"""

from collections.abc import Sequence

import numpy as np

from agentsdpo.errors import HintError
from agentsdpo.types import Hint


def wrong_hints(hints: Sequence[Hint], seed: int) -> list[Hint]:
    """A seeded rearrangement in which no row keeps a hint of its own text.

    Rows are sorted into groups of equal text, groups and rows shuffled, and every hint moves on by the size of the
    largest group: far enough to leave its own group, never so far as to come round to it.

    Args:
        hints: the right hint of each row.
        seed: same seed, same pairing.

    Raises:
        HintError: more than half of the rows share one text (a single row too), so no such pairing exists.

    >>> hints = [Hint(text=text, source="criteria", author="g") for text in ("tax", "tax", "cash", "debt")]
    >>> wrong = wrong_hints(hints, seed=0)
    >>> sorted(h.text for h in wrong), any(a.text == b.text for a, b in zip(hints, wrong, strict=True))
    (['cash', 'debt', 'tax', 'tax'], False)
    """
    groups: dict[str, list[int]] = {}
    for row, hint in enumerate(hints):
        groups.setdefault(hint.text, []).append(row)
    largest = max((len(rows) for rows in groups.values()), default=0)
    if 2 * largest > len(hints):
        raise HintError(f"{largest} of {len(hints)} rows carry the same hint, so no row can be given a wrong one",
                        fix="draw rows of more tasks for the wrong-hint control")
    rng = np.random.default_rng(seed)
    order = [int(row) for text in rng.permutation(sorted(groups)) for row in rng.permutation(groups[str(text)])]
    wrong = list(hints)
    for place, row in enumerate(order):
        wrong[row] = hints[order[(place + largest) % len(order)]]
    return wrong
