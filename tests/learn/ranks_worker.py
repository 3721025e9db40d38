"""Two processes of a learner, set up as ``torchrun`` would: ``python ranks_worker.py OUT CASES.json``.

Each runs every case and writes what came of it; the test runs the same cases in one process. They are forked, since
importing all of this twice takes longer than most of it.
"""

import json
import os
import runpy
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

from agentsdpo.errors import LearnError, ModelError
from agentsdpo.learn.attention import Segments, segment_attention
from agentsdpo.learn.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from agentsdpo.learn.config import ParallelConfig
from agentsdpo.learn.learner import Learner
from agentsdpo.learn.parallel import Ranks, join_ranks
from agentsdpo.learn.presets import resolve
from agentsdpo.learn.records import whole

HERE = Path(__file__).resolve().parent
build_row = runpy.run_path(str(HERE / "conftest.py"))["build_row"]
make_tiny_model = runpy.run_path(str(HERE.parent / "conftest.py"))["make_tiny_model"]


def rows_of(n: int = 5) -> list[Any]:
    """Rows of different lengths, the last far longer than the others; 64 tokens in turns of 3 to 9."""
    turns = [((4, 3), (3, 2)), ((9, 1), (5, 2), (3, 0)), ((3, 0),), ((5, 4), (4, 4)), ((6, 2), (6, 2), (9, 5))]
    return [build_row(seed=i, episode=f"e{i % 4}", prompt=5 + 6 * i, turns=turns[i], logp=-6.0,
                      versions=(0,) * len(turns[i]), hint=tuple(range(30 + i, 40 + 2 * i))) for i in range(n)]


def run_case(case: dict[str, Any], ranks: Ranks | None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Some steps; every metric of them, the gradient of the first, and the weights after the last."""
    model = make_tiny_model(300)
    if not case["tied"]:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 0.01)
        model.config.tie_word_embeddings = False
    learner = Learner(model, resolve(case["preset"], case["fields"]), ranks=ranks)
    gradients: dict[str, torch.Tensor] = {}

    def keep(*_: Any) -> None:
        for name, p in model.named_parameters():
            if p.requires_grad:
                gradients.setdefault(f"gradient/{name}", whole(p.grad).clone())

    learner.optimizer.register_step_pre_hook(keep)
    metrics = [learner.step(rows_of(n), 0).metrics for n in case["rows"]]
    clip = learner.clipper.state_dict() if learner.clipper else {}
    teacher = {f"teacher/{name}": whole(tensor).clone() for name, tensor in learner.teacher.state_dict().items()}
    weights = {name: whole(p.detach()).clone() for name, p in model.named_parameters() if p.requires_grad}
    policy = {f"policy/{name}": tensor.clone() for name, tensor in learner.policy().items()}
    factors, _ = learner.adapter() or ({}, {})
    adapter = {f"adapter/{name}": tensor.clone() for name, tensor in factors.items()}
    tensors = {**gradients, **weights, **policy, **adapter, **teacher}
    return {"metrics": metrics, "clip": clip}, {key: whole(tensor).contiguous() for key, tensor in tensors.items()}


def attention_case(n_q: int, n_kv: int, lengths: tuple[int, ...], ranks: Ranks) -> dict[str, float]:
    """Largest differences of exchanged attention from that of one process: 0 is to the bit."""
    generator = torch.Generator().manual_seed(n_q + n_kv)
    sides: Any = [torch.randn(1, n, sum(lengths), 8, generator=generator).requires_grad_() for n in (n_q, n_kv, n_kv)]
    asked = torch.randn(1, sum(lengths), n_q, 8, generator=generator)
    segments = Segments.of(lengths)
    heads = SimpleNamespace(num_key_value_groups=n_q // n_kv)
    out, _ = segment_attention(heads, sides[0], sides[1], sides[2], None, segments=segments)
    out.backward(asked)
    t = sum(lengths) // ranks.size
    own = slice(ranks.rank * t, (ranks.rank + 1) * t)
    parts: Any = [side.detach()[:, :, own].clone().requires_grad_() for side in sides]
    mine, _ = segment_attention(heads, parts[0], parts[1], parts[2], None,
                                segments=replace(segments, group=ranks.group))
    mine.backward(asked[:, own])
    differences = {"out": mine - out[:, own]}
    for name, part, side in zip("qkv", parts, sides, strict=True):
        assert part.grad is not None
        assert side.grad is not None
        differences[name] = part.grad - side.grad[:, :, own]
    return {name: float(each.detach().abs().max()) for name, each in differences.items()}


def resumed(out: Path, ranks: Ranks, **fields: Any) -> dict[str, bool]:
    """Whether a learner that goes on from a checkpoint is the one that wrote it, to the bit; one of three is left."""
    config = resolve("sdpopp", {"lr": 1e-3, "teacher": "ema", "parallel": {"ranks": 2, **fields}})
    learner, again = (Learner(make_tiny_model(300, seed=seed), config, ranks=ranks) for seed in (0, 1))
    for _ in range(2):
        learner.step(rows_of(4), 0)
        save_checkpoint(out, learner, version=learner.step_count, keep=1)
    load_checkpoint(out, again)
    same = learner.step(rows_of(5), 2).metrics == again.step(rows_of(5), 2).metrics
    weights = zip(learner.policy().values(), again.policy().values(), strict=True)
    return {"metrics": same, "weights": all(torch.equal(a, b) for a, b in weights),
            "one left": len(checkpoints(out)) == 1}


def refusals(ranks: Ranks) -> dict[str, str]:
    """What each process says to what is wrong, and that all of them say it at once."""
    said = {}
    for name, attempt in {
            "other rows": lambda: learner_on(ranks).step(rows_of(5 - ranks.rank), 0),
            "not finite": lambda: broken(learner_on(ranks)).step(rows_of(4), 0),
            "no room": lambda: save_checkpoint(Path("/dev/null/no"), learner_on(ranks), version=0),
            "any fault": lambda: ranks.first(Path("/dev/null/no").mkdir),
            "one process wanted": lambda: join_ranks(ParallelConfig()),
            "odd heads": lambda: attention_case(3, 1, (4, 4), ranks)}.items():
        try:
            attempt()
        except (LearnError, ModelError, OSError) as error:
            said[name] = str(error)
    return said


def learner_on(ranks: Ranks) -> Learner:
    """A learner that is dealt rows."""
    return Learner(make_tiny_model(300), resolve("robust", {"parallel": {"ranks": 2}}), ranks=ranks)


def broken(learner: Learner) -> Learner:
    """Its loss is not a number on the second process alone."""
    if learner.ranks.rank == 1:
        with torch.no_grad():
            learner.model.model.norm.weight.fill_(float("nan"))
    return learner


def main(out: Path, cases: Path) -> None:
    """All cases on this process."""
    torch.set_num_threads(1)
    ranks = join_ranks(ParallelConfig(ranks=2))
    found: dict[str, Any] = {f"attention {n_q} {n_kv}": attention_case(n_q, n_kv, (5, 9, 2), ranks)
                             for n_q, n_kv in ((4, 4), (4, 2), (4, 1), (2, 1))}
    found["resumed"] = resumed(out / "dealt", ranks)
    found["resumed, shard"] = resumed(out / "shard", ranks, shard=True)
    (out / f"alone-{ranks.rank}.json").write_text(json.dumps({**found, "said": refusals(ranks)}))
    for name, case in json.loads(cases.read_text()).items():
        ranks = join_ranks(ParallelConfig(**case["fields"]["parallel"]))
        found, weights = run_case(case, ranks)
        save_file(weights, out / f"{name}-{ranks.rank}.safetensors")
        (out / f"{name}-{ranks.rank}.json").write_text(json.dumps(found))


def both(out: Path, cases: Path) -> int:
    """Start two processes; 1 when one of them failed, which stops the other one."""
    import accelerate.state  # noqa: F401 - each would import it for itself

    children = set()
    for rank in range(2):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            main(out, cases)
            torch.distributed.destroy_process_group()
            return 0
        children.add(child)
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(both(Path(sys.argv[1]), Path(sys.argv[2])))
