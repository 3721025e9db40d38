"""Speed and memory of the learner, with peers in the same run.

    make bench                                                     # installs the peers, then runs all benchmarks
    python -m agentsdpo.benchmarks.perf.learner [--only loss score ...] [--json]

Every number comes from a fresh process on one thread (``fresh.py``): CPU time of a warm run, and resident memory at its
highest above what was resident once inputs and weights stood. Peers run in turn with ours; medians over rounds. Both
sides are checked to give the same loss before anything is reported. Ratios: above 1 means that this project is better.
"""

from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version

from agentsdpo.benchmarks.perf.figure import Figure, run_all
from agentsdpo.benchmarks.perf.fresh import Cost, fresh, in_turn
from agentsdpo.benchmarks.perf.step_cases import tokens
from agentsdpo.errors import AgentSdpoError
from agentsdpo.types import Json

_HERE = "agentsdpo.benchmarks.perf."
ROUNDS = 3
LOSS: Json = {"n": 512, "width": 512, "vocabulary": 151_936, "dtype": "float32"}
SCORED: Json = {"vocabulary": 11_264, "width": 256, "layers": 8, "mlp": 1024}
"""Head and body in the proportion of Qwen3-0.6B (0.35): with a larger head both sides would mostly wait for logits."""
STEPPED: Json = {"vocabulary": 151_936, "width": 256, "layers": 4, "mlp": 1024}
EPISODES: Json = {"seed": 0, "turns": [6, 12, 18, 24], "sampled": 8, "tool": 32, "prompt": 96, "hint": 48}
LONG: Json = {"vocabulary": 151_936, "width": 256, "layers": 2, "mlp": 768}
BUDGET_MIB, SHARE = 8 * 1024, 0.25
_CLOSE = 2e-3


def loss() -> Iterator[Figure]:
    """The loss alone: ours with a frozen and a trainable head, dense with each, TRL's chunked kernel."""
    def case(name: str, trainable: bool) -> tuple[str, Json]:
        return f"{_HERE}loss_cases:{name}", {**LOSS, "trainable": trainable}
    got = in_turn({"frozen": case("ours", False), "frozen_dense": case("trl_dense", False),
                   "chunked": case("trl_chunked", False), "trainable": case("ours", True),
                   "trainable_dense": case("trl_dense", True), "own_dense": case("own_dense", True)}, ROUNDS)
    _agree(got)
    dense, chunked = f"trl {version('trl')} full_logits", f"trl {version('trl')} chunked, torch fallback"
    about = {**LOSS, "beta": 0.5, "threads": 1, "rounds": ROUNDS}
    frozen, trainable = (got["frozen"], got["frozen_dense"]), (got["trainable"], got["trainable_dense"])
    own = {"own_dense_mib": got["own_dense"].peak_mib, "own_dense_s": got["own_dense"].cpu_s}
    yield _memory("loss_rss_frozen_vs_dense", *frozen, dense, about)
    yield _memory("loss_rss_trainable_vs_dense", *trainable, dense, about | own)
    yield _time("loss_time_frozen_vs_dense", *frozen, dense, about)
    yield _time("loss_time_frozen_vs_trl_chunked", got["frozen"], got["chunked"], chunked,
                about | {"peer_mib": got["chunked"].peak_mib})
    yield _time("loss_time_trainable_vs_dense", *trainable, dense, about | own)


def score() -> Iterator[Figure]:
    """Log-probs of a whole episode: one forward, or one for each turn with its history."""
    for turns, sampled, tool in ((16, 32, 96), (50, 16, 48)):
        about = {"turns": turns, "sampled": sampled, "tool": tool, "shape": SCORED}
        got = in_turn({"mine": (f"{_HERE}score_cases:episode", about),
                       "peer": (f"{_HERE}score_cases:per_turn", about)}, ROUNDS)
        _agree(got)
        yield _time(f"score_{turns}_turns_vs_per_turn", got["mine"], got["peer"], "one forward per turn",
                    {**about, "threads": 1, "rounds": ROUNDS})


def step() -> Iterator[Figure]:
    """A whole step on the same ragged episodes, every turn a padded row for TRL's trainer."""
    held = tokens(STEPPED, EPISODES)
    same = {"shape": STEPPED, "episodes": EPISODES, "support": "full", "top_k": 64}
    got = in_turn({"mine": (f"{_HERE}step_cases:ours", {**same, "forward_tokens": 2048}),
                   "peer": (f"{_HERE}step_cases:trl", {**same, "batch": 4})}, ROUNDS, runs=1)
    _agree(got)
    about = {**held, "shape": STEPPED, "adapter_rank": 16, "forward_tokens": 2048, "peer_batch": 4, "threads": 1,
             "rounds": ROUNDS}
    peer = f"trl {version('trl')} SDPOTrainer.compute_loss"
    speed = [held["loss_tokens"] / got[side].cpu_s for side in ("mine", "peer")]
    yield replace(_time("step_tokens_vs_trl", got["mine"], got["peer"], peer, about), detail={
        **about, "loss_tokens_per_s": round(speed[0], 1), "peer_loss_tokens_per_s": round(speed[1], 1)})
    yield _memory("step_rss_vs_trl", got["mine"], got["peer"], peer, about)


def context() -> Iterator[Figure]:
    """The longest episode a step has room for in 8 GiB, from a line through measured peaks of the whole process."""
    mine = _longest("long_ours", (4096, 8192, 16_384), {"forward_tokens": 1 << 20})
    peer = _longest("long_dense", (1024, 2048, 3072), {})
    about = {"shape": LONG, "loss_share": SHARE, "budget_mib": BUDGET_MIB, "adapter_rank": 16}
    yield Figure("context_8gib_vs_dense", round(mine[0] / peer[0], 1), "ratio", "dense loss, nothing recomputed",
                 {**about, "tokens": mine[0], "peer_tokens": peer[0], "mib": mine[1], "peer_mib": peer[1]})


def _longest(case: str, sizes: tuple[int, ...], fields: Json) -> tuple[int, dict[int, float]]:
    """Tokens at which a least-squares line through the peaks reaches the budget, and the peaks by tokens."""
    import numpy as np

    peaks = {n: fresh(f"{_HERE}step_cases:{case}", runs=1, shape=LONG, context=n, share=SHARE, **fields).whole_mib
             for n in sizes}
    slope, start = np.polyfit(list(peaks), list(peaks.values()), 1)
    return int((BUDGET_MIB - start) / slope), peaks


def _agree(got: dict[str, Cost]) -> None:
    """All sides computed the same thing."""
    values = {name: cost.value for name, cost in got.items()}
    apart = max(values.values()) - min(values.values())
    if not apart <= _CLOSE * max(abs(value) for value in values.values()):
        raise AgentSdpoError(f"the sides of a comparison computed different things: {values}",
                             fix="compare the same work")


def _memory(name: str, mine: Cost, peer: Cost, who: str, about: Json) -> Figure:
    return Figure(name, round(peer.peak_mib / mine.peak_mib, 2), "ratio", who,
                  {**about, "mib": mine.peak_mib, "peer_mib": peer.peak_mib})


def _time(name: str, mine: Cost, peer: Cost, who: str, about: Json) -> Figure:
    return Figure(name, round(peer.cpu_s / mine.cpu_s, 2), "ratio", who,
                  {**about, "cpu_s": round(mine.cpu_s, 2), "peer_cpu_s": round(peer.cpu_s, 2)})


if __name__ == "__main__":
    run_all(__doc__ or "", {"loss": loss, "score": score, "step": step, "context": context})
