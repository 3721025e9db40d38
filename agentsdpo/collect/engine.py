"""What the collector asks of an engine: token ids in; token ids, behaviour log-probs and policy versions out.

No torch here: engines over HTTP and the transformers engine of :mod:`agentsdpo.collect.inprocess` look the same.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from agentsdpo.types import Completion, Sampling


@runtime_checkable
class Engine(Protocol):
    """A served policy. Many episodes may await :meth:`complete` at once.

    Attributes:
        name: kind of engine, stamped on every episode (``inprocess``, ``vllm``).
        version: policy version of the weights now loaded, 0 or more.
        context_window: longest prompt plus completion, in tokens.
        vocab_size: ids lie in ``[0, vocab_size)``.
        eos_ids: ids that end a completion; the id itself is part of the completion.
    """

    name: str
    context_window: int
    vocab_size: int
    eos_ids: tuple[int, ...]

    @property
    def records_kept(self) -> bool:
        """Whether truncated sampling comes with its kept set."""
        ...

    @property
    def version(self) -> int:
        """Policy version of the weights now loaded."""
        ...

    async def complete(self, prompt_ids: Sequence[int], sampling: Sampling, *, session: str) -> Completion:
        """Sample one completion.

        Args:
            prompt_ids: the whole prompt, at least one id and fewer than ``context_window``.
            sampling: how to draw; with the same seed and weights the completion does not depend on its neighbours
                in the batch, up to the rounding of batched matrix products.
            session: one branch of one episode; what the session's cache already holds is not encoded again.

        Returns:
            The completion; ``logprobs`` are of the distribution drawn from (kind ``processed``), or, when greedy,
            of the distribution at temperature 1 (kind ``raw``, which no ratio may use).

        Raises:
            EngineError: the engine broke, the prompt does not fit, or the session already has a call in flight.
        """
        ...

    def release(self, session: str) -> None:
        """The session will send no more calls; its cache may be used by others. Unknown sessions are ignored."""
        ...
