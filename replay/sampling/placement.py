"""Which rank of a distributed learner takes which of the drawn branches. Ranks are told the keys; they never draw."""

import heapq
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def placement(drawn: Sequence[T], lengths: Sequence[int], *, world_size: int, rank: int) -> list[T]:
    """The share of one rank: longest first, each to the rank with the fewest tokens so far (the lower one of equals).

    Every rank that is given the same arguments finds the same division, and together the ranks hold what was drawn,
    whatever the world size.

    Args:
        drawn: keys or rows of one global batch.
        lengths: tokens of each.
        world_size: number of ranks, 1 or more.
        rank: from 0.

    Raises:
        ValueError: a rank outside the world, or lengths that do not fit.

    >>> [placement("abcd", [9, 5, 4, 1], world_size=2, rank=rank) for rank in (0, 1)]
    [['a', 'd'], ['b', 'c']]
    """
    if not 0 <= rank < world_size or len(drawn) != len(lengths):
        raise ValueError(f"rank {rank} of {world_size}, {len(drawn)} drawn with {len(lengths)} lengths")
    loads, mine = [(0, one) for one in range(world_size)], []
    for i in sorted(range(len(drawn)), key=lambda i: (-lengths[i], i)):
        load, to = heapq.heappop(loads)
        heapq.heappush(loads, (load + lengths[i], to))
        if to == rank:
            mine.append(drawn[i])
    return mine
