"""Numbers about fresh episodes, under the keys of the metrics table."""

from collections import Counter
from collections.abc import Sequence

from agentsdpo.types import Episode, StopReason


def collect_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """Means over episodes; scores leave out the unscored, and are absent when nothing was scored.

    Keys: ``collect/{episodes,pass,score/mean,unscored_frac}``; ``collect/act/{calls,valid_frac,mutating_ok_frac,
    early_finish_frac}`` (early: completed without one valid call); ``collect/{tokens_per_turn/mean,turns/mean,
    repeat_frac,longest_repeat/max,truncated_frac,branches/mean,sampled_tokens,merge_ratio,wall_s/mean,
    working_s/mean}``; ``collect/stop/<reason>`` shares; ``collect/fork/<reason>`` counts.
    """
    if not episodes:
        return {"collect/episodes": 0.0}
    total = {key: sum(e.metadata.get(key, 0) for e in episodes) for key in _SUMS}
    scored = [e for e in episodes if e.grade is not None and e.grade.mean is not None]
    n = len(episodes)
    metrics = {
        "collect/episodes": float(n),
        "collect/unscored_frac": 1 - len(scored) / n,
        "collect/turns/mean": total["turns"] / n,
        "collect/branches/mean": sum(len(e.branches) for e in episodes) / n,
        "collect/sampled_tokens": float(total["completion_tokens"]),
        "collect/tokens_per_turn/mean": _share(total["completion_tokens"], total["turns"]),
        "collect/truncated_frac": _share(total["truncated"], total["turns"]),
        "collect/repeat_frac": _share(total["repeats"], total["calls"]),
        "collect/longest_repeat/max": float(max(e.metadata.get("longest_repeat", 0) for e in episodes)),
        "collect/merge_ratio": _share(*_merged(episodes)),
        "collect/wall_s/mean": total["wall_s"] / n,
        "collect/working_s/mean": total["working_s"] / n,
        "collect/act/calls": total["calls"] / n,
        "collect/act/valid_frac": _share(total["valid_calls"], total["calls"]),
        "collect/act/mutating_ok_frac": _share(total["mutating_ok"], total["mutating_calls"]),
        "collect/act/early_finish_frac": sum(_early(e) for e in episodes) / n,
    }
    if scored:
        metrics["collect/pass"] = sum(bool(e.grade and e.grade.passed) for e in scored) / len(scored)
        metrics["collect/score/mean"] = sum(e.reward or 0.0 for e in scored) / len(scored)
    forks = Counter(b.fork_reason for e in episodes for b in e.branches if b.fork_reason)
    metrics |= {f"collect/fork/{reason}": float(count) for reason, count in sorted(forks.items())}
    for reason in sorted({e.stop_reason for e in episodes}):
        metrics[f"collect/stop/{reason}"] = sum(e.stop_reason == reason for e in episodes) / n
    return metrics


_SUMS = ("turns", "calls", "valid_calls", "mutating_calls", "mutating_ok", "repeats", "truncated",
         "completion_tokens", "wall_s", "working_s")


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _merged(episodes: Sequence[Episode]) -> tuple[int, int]:
    """Tokens the agent sampled, and tokens of the rows they are learnt from: each branch reads its history again."""
    branches = [branch for episode in episodes for branch in episode.branches]
    return sum(b.n_sampled for b in branches), sum(len(b.token_ids) for b in branches)


def _early(episode: Episode) -> bool:
    return episode.stop_reason == StopReason.COMPLETED and episode.metadata.get("valid_calls", 0) == 0
