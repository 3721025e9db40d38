"""Questions to a store, each answered as of now; a snapshot answers the same ones as of the time it was taken."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa

from agentsdpo.replay.rows import Row
from agentsdpo.replay.snapshot import Condition, Snapshot
from agentsdpo.types import Episode

if TYPE_CHECKING:
    import polars

    from agentsdpo.replay.config import ReplayConfig
    from agentsdpo.replay.sampling.sampler import Sampler


class Asking(ABC):
    """What can be asked of anything that takes snapshots."""

    @abstractmethod
    def snapshot(self, at: Mapping[str, Sequence] | None = None) -> Snapshot:
        """The rows that are live now, or were at a position in the log."""

    def __len__(self) -> int:
        return len(self.snapshot())

    def episode(self, episode_id: str, attempt: int | None = None) -> Episode:
        """A whole episode as of now; see :meth:`Snapshot.episode`.

        >>> from agentsdpo.replay.example import example
        >>> example().episode("e-2").messages[0]["content"]
        'Write file 2.'
        """
        return self.snapshot().episode(episode_id, attempt)

    def branches(self, where: Condition | None = None) -> Iterator[Row]:
        """Rows a condition holds for, as of now; see :meth:`Snapshot.branches`.

        >>> from agentsdpo.replay.example import example
        >>> store = example()
        >>> [(row.key.episode_id, row.reward) for row in store.branches("env_id == 'desk' and reward >= 0.5")]
        [('e-1', 0.5), ('e-2', 1.0)]
        """
        return self.snapshot().branches(where)

    def episodes(self, where: Condition | None = None) -> Iterator[Episode]:
        """Episodes with a branch that a condition holds for, as of now; see :meth:`Snapshot.episodes`.

        >>> from agentsdpo.replay.example import example
        >>> [episode.task_id for episode in example().episodes("reward == 1")]
        ['task-2']
        """
        return self.snapshot().episodes(where)

    def to_arrow(self, where: Condition | None = None) -> pa.Table:
        """Everything, or what a condition holds for, as of now; see :meth:`Snapshot.to_arrow`.

        >>> from agentsdpo.replay.example import example
        >>> example().to_arrow("reward < 1").select(["episode_id", "reward"]).to_pylist()
        [{'episode_id': 'e-0', 'reward': 0.0}, {'episode_id': 'e-1', 'reward': 0.5}]
        """
        return self.snapshot().to_arrow(where)

    def to_polars(self, where: Condition | None = None) -> "polars.DataFrame":
        """As :meth:`to_arrow`, as a polars frame; see :meth:`Snapshot.to_polars`.

        >>> from agentsdpo.replay.example import example
        >>> example().to_polars("reward > 0").select("episode_id", "n_tokens").rows()
        [('e-1', 16), ('e-2', 20)]
        """
        return self.snapshot().to_polars(where)

    def sampler(self, config: "ReplayConfig | None" = None, *, seed: int = 0, tokenizer_sha256: str | None = None,
                max_staleness: int | None = None, chat_template_sha256: str | None = None,
                where: str | None = None) -> "Sampler":
        """A position in the store to draw from; see :class:`agentsdpo.replay.Sampler`.

        >>> from agentsdpo.replay.example import example
        >>> sampler = example().sampler(seed=1)
        >>> sorted(row.task_id for row in sampler.sample(2, learner_version=0) + sampler.sample(1, learner_version=0))
        ['task-0', 'task-1', 'task-2']
        """
        from agentsdpo.replay.config import ReplayConfig
        from agentsdpo.replay.sampling.sampler import Sampler

        return Sampler(self, config or ReplayConfig(), seed=seed, tokenizer_sha256=tokenizer_sha256,
                       max_staleness=max_staleness, chat_template_sha256=chat_template_sha256, where=where)
