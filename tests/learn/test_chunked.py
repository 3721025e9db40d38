"""The chunked loss against the dense one, autograd and finite differences; what it allocates and what it does not."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from agentsdpo.learn import products
from agentsdpo.learn.chunked import chunked_loss
from agentsdpo.learn.config import LearnConfig
from agentsdpo.learn.divergence import divergence, token_logp
from agentsdpo.learn.loss import dense_loss, token_loss
from agentsdpo.learn.ratio import SIGNED
from agentsdpo.learn.records import Head, LossTerms, LossTokens, TokenScores, sampled_logp
from agentsdpo.learn.slope import divergence_slope, token_slope
from agentsdpo.learn.weights import Bounds, Weigher

FULL = LossTerms(divergence=True, token=False)
TOKEN = LossTerms(divergence=False, token=True)


class Given:
    """Weights that were known before, with the terms they are for."""

    turns = teacher = False

    def __init__(self, terms: LossTerms, weight: Tensor) -> None:
        self.terms, self.weight = terms, weight

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor,
                 rows: slice) -> tuple[Tensor | None, Tensor | None]:
        a, b = self.weight[rows], self.weight.flip(0)[rows]
        return a if self.terms.divergence else None, b if self.terms.token else None


class ByTurn(Given):
    """Weights that look at the log-probs of both sides over all tokens."""

    turns = teacher = True

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor,
                 rows: slice) -> tuple[Tensor | None, Tensor | None]:
        assert len(student_logp) == len(self.weight), "a weight that looks at its turn was asked before all is known"
        gap = (teacher_logp - student_logp).abs()
        w = self.weight * (gap <= gap.mean())
        return (w if self.terms.divergence else None), (w * (1.0 + gap) if self.terms.token else None)


def heads(n: int = 9, v: int = 23, h: int = 6, *, seed: int = 0, dtype: torch.dtype = torch.float64,
          frozen: bool = False, kept: bool = False, tempered: bool = False) -> tuple[Head, Head, LossTokens]:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)

    student = Head(draw(n, h).requires_grad_(True), draw(v, h).requires_grad_(not frozen))
    teacher = Head(draw(n, h + 2), draw(v, h + 2))
    wide = torch.promote_types(dtype, torch.float32)
    tok = torch.randint(0, v, (n,), generator=g)
    ids = torch.cat([tok[:, None], (tok[:, None] + torch.arange(1, 5)) % v], dim=1)
    ids[::3, 3:] = -1  # of different sizes, and one row in four was not truncated
    ids[::4] = -1
    tokens = LossTokens(tok=tok, weight=torch.rand(n, generator=g, dtype=wide), turn=torch.arange(n) // 3,
                        behaviour_logp=torch.zeros(n, dtype=wide), kept=ids if kept else None,
                        temperature=0.5 + torch.rand(n, generator=g, dtype=wide) if tempered else None)
    return student, teacher, tokens


def both(case: tuple[Head, Head, LossTokens], terms: LossTerms, weigh: Any, form: Any,
         **options: Any) -> tuple[Tensor, TokenScores, list[Tensor]]:
    student, teacher, tokens = case
    loss, seen = form(student, teacher, tokens, terms, weigh, **options)
    wrt = [t for t in (student.hidden, student.weight) if t.requires_grad]
    return loss.detach(), seen, list(torch.autograd.grad(3.0 * loss, wrt))


def assert_same(left: Any, right: Any, *, atol: float, rtol: float) -> None:
    torch.testing.assert_close(left[0], right[0], atol=atol, rtol=rtol)
    for name in vars(left[1]):
        a, b = getattr(left[1], name), getattr(right[1], name)
        assert not a.requires_grad
        torch.testing.assert_close(a, b, atol=atol, rtol=rtol, msg=lambda m, name=name: f"{name}: {m}")
    for a, b in zip(left[2], right[2], strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


SHAPES: list[tuple[float, Any]] = [(0.0, "unit"), (0.3, "raw"), (0.5, "unit"), (1.0, "raw")]
EVERY_TERM = [LossTerms(divergence=True, token=token, beta=beta, jsd_scale=scale, support=support, top_k=5)
              for token in (False, True) for beta, scale in SHAPES
              for support in ("full", "student", "teacher", "union")] + [TOKEN]


@pytest.mark.parametrize("weigher", [Given, ByTurn])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("terms", EVERY_TERM, ids=str)
def test_equals_the_dense_form_to_the_last_digits(terms: LossTerms, frozen: bool, weigher: type[Given]) -> None:
    case = heads(frozen=frozen, kept=True, tempered=True)
    weigh = weigher(terms, case[2].weight)
    assert_same(both(case, terms, weigh, chunked_loss, chunk=4), both(case, terms, weigh, dense_loss),
                atol=1e-13, rtol=1e-11)


@pytest.mark.parametrize("ratio", sorted(SIGNED))
def test_a_divergence_under_a_ratio_that_goes_by_the_gap_equals_the_dense_form(ratio: Any) -> None:
    student, teacher, tokens = heads(n=12)
    logp = (student.hidden @ student.weight.T).log_softmax(-1).gather(1, tokens.tok[:, None])[:, 0].detach()
    tokens = replace(tokens, behaviour_logp=logp + torch.linspace(-1.0, 1.0, 12).double())
    weigh = Weigher(tokens, LearnConfig(ratio=ratio, parity=True, veto=1e-9), Bounds(m2=0.3))
    assert weigh.turns
    case = student, teacher, tokens
    assert_same(both(case, FULL, weigh, chunked_loss, chunk=5), both(case, FULL, weigh, dense_loss),
                atol=1e-13, rtol=1e-11)


@settings(max_examples=60)
@given(n=st.integers(1, 40), v=st.integers(2, 90), h=st.integers(1, 9), seed=st.integers(0, 9999),
       beta=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
       support=st.sampled_from(["full", "student", "teacher", "union"]),
       top_k=st.integers(1, 100), chunk=st.integers(1, 50), frozen=st.booleans(), token=st.booleans(),
       kept=st.booleans(), tempered=st.booleans())
def test_equals_the_dense_form_in_float32_for_any_shape(
        n: int, v: int, h: int, seed: int, beta: float, support: Any, top_k: int, chunk: int, frozen: bool,
        token: bool, kept: bool, tempered: bool) -> None:
    case = heads(n, v, h, seed=seed, dtype=torch.float32, frozen=frozen, kept=kept and v > 5, tempered=tempered)
    terms = LossTerms(divergence=True, token=token, beta=beta, support=support, top_k=top_k)
    weigh = Given(terms, case[2].weight / n)
    chunked, dense = both(case, terms, weigh, chunked_loss, chunk=chunk), both(case, terms, weigh, dense_loss)
    assert_same(chunked, dense, atol=1e-5, rtol=1e-4)
    for a, b in zip(chunked[2], dense[2], strict=True):
        if b.norm() > 1e-4:
            assert torch.cosine_similarity(a.ravel(), b.ravel(), dim=0) > 0.9999


@pytest.mark.parametrize("able", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("terms", [FULL, replace(FULL, token=True, support="union", beta=0.5), TOKEN], ids=str)
def test_bfloat16_equals_the_dense_form_within_its_rounding(terms: LossTerms, frozen: bool, able: bool,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU that multiplies in bfloat16 and on one that does not, where a head is widened in several tiles."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able})
    monkeypatch.setattr(products, "_TILE", 128)
    case = heads(64, 300, 32, dtype=torch.bfloat16, frozen=frozen)
    weigh = Given(terms, case[2].weight / 64)
    chunked, dense = both(case, terms, weigh, chunked_loss, chunk=16), both(case, terms, weigh, dense_loss)
    torch.testing.assert_close(chunked[0], dense[0], atol=0.0, rtol=1e-5 if able else 1e-2)
    for a, b in zip(chunked[2], dense[2], strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.cosine_similarity(a.float().ravel(), b.float().ravel(), dim=0) > 0.9999


def test_log_probs_without_gradient_and_of_few_tokens_are_those_of_the_chunked_form_in_bfloat16_too(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a reference or a few tokens under a trainable head are off by the rounding of their logits."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    student, teacher, tokens = heads(6, 300, 256, dtype=torch.bfloat16)
    exact = Head(student.hidden.detach().double(), student.weight.detach().double())
    wanted = token_logp(exact.log_probs(tokens.temperature), tokens.tok, tokens.kept).float()
    _, seen = token_loss(student, teacher, tokens, TOKEN, Given(TOKEN, tokens.weight), dense_below=100)
    torch.testing.assert_close(seen.student_logp, wanted, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(sampled_logp(student, tokens), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("terms", [FULL, replace(FULL, beta=0.3, support="union", top_k=3), replace(FULL, beta=1.0),
                                   TOKEN], ids=str)
def test_finite_differences(terms: LossTerms) -> None:
    student, teacher, tokens = heads(4, 7, 3)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return chunked_loss(Head(hidden, weight), teacher, tokens, terms, Given(terms, tokens.weight), chunk=3)[0]

    assert torch.autograd.gradcheck(loss, (student.hidden, student.weight))


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("support", ["full", "student", "teacher", "union"])
def test_slopes_are_those_of_autograd(support: Any, beta: float) -> None:
    g = torch.Generator().manual_seed(1)
    z = (3 * torch.randn(6, 17, generator=g, dtype=torch.float64)).requires_grad_(True)
    log_q = (3 * torch.randn(6, 17, generator=g, dtype=torch.float64)).log_softmax(-1)
    options: dict[str, Any] = {"beta": beta, "jsd_scale": "unit", "support": support, "top_k": 4}
    found = divergence(z.log_softmax(-1), log_q, **options)
    (expected,) = torch.autograd.grad(found.value.sum(), z)
    value, dz, tail_s, tail_t = divergence_slope(z.detach().log_softmax(-1), log_q, **options)
    torch.testing.assert_close(dz, expected, atol=1e-15, rtol=1e-12)
    torch.testing.assert_close((value, tail_s, tail_t), (found.value.detach(), found.tail_student, found.tail_teacher))


def test_slope_of_the_sampled_token_over_its_kept_ids() -> None:
    log_p = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]).log()
    slope = token_slope(log_p, torch.tensor([1, 1]), torch.tensor([[1, 2, -1], [-1, -1, -1]]))
    torch.testing.assert_close(slope, torch.tensor([[0.0, -0.4, 0.4], [0.5, -0.7, 0.2]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("support", ["full", "student", "teacher", "union"])
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(support: Any, beta: float,
                                                                    dtype: torch.dtype) -> None:
    student, _, tokens = heads(12, 50, 8, dtype=dtype)
    terms = LossTerms(divergence=True, token=False, beta=beta, support=support, top_k=7)
    same = Head(student.hidden.detach().clone(), student.weight.detach().clone())
    loss, seen, grads = both((student, same, tokens), terms, Given(terms, tokens.weight), chunked_loss, chunk=5)
    assert loss == 0.0
    assert (seen.divergence == 0.0).all()
    assert all((grad == 0.0).all() for grad in grads)


@pytest.mark.parametrize("support", ["student", "teacher", "union"])
def test_a_support_of_everything_is_the_full_vocabulary(support: Any) -> None:
    case = heads()
    results = [both(case, terms, Given(terms, case[2].weight), chunked_loss)
               for terms in (replace(FULL, beta=0.5), replace(FULL, beta=0.5, support=support, top_k=23))]
    assert_same(*results, atol=1e-13, rtol=1e-12)


def test_the_tail_keeps_its_gradient_where_the_support_holds_nearly_everything() -> None:
    """A clamp on log(1 - mass) would cut it: here the student gives the tail 1e-20 and the teacher a tenth."""
    log_p = torch.tensor([[0.0, -46.0, -47.0]], dtype=torch.float64).log_softmax(-1)
    log_q = torch.tensor([[0.9, 0.06, 0.04]], dtype=torch.float64).log()
    _, dz, tail, _ = divergence_slope(log_p, log_q, beta=0.0, jsd_scale="unit", support="student", top_k=1)
    assert tail < 1e-19
    assert dz[0, 1:].sum() == pytest.approx(-0.1, abs=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
def test_neither_chunk_size_nor_the_split_into_micro_batches_changes_the_result(frozen: bool) -> None:
    student, teacher, tokens = heads(31, frozen=frozen)
    terms = replace(FULL, token=True, support="union", top_k=4)
    whole = both((student, teacher, tokens), terms, Given(terms, tokens.weight), chunked_loss, chunk=31)
    for chunk in (1, 7, 30, 100):
        part = both((student, teacher, tokens), terms, Given(terms, tokens.weight), chunked_loss, chunk=chunk)
        assert_same(whole, part, atol=1e-14, rtol=1e-12)
    weight, terms = tokens.weight, FULL
    for rows in (slice(0, 12), slice(12, 31)):
        piece = LossTokens(tok=tokens.tok[rows], weight=weight[rows], turn=tokens.turn[rows],
                           behaviour_logp=tokens.behaviour_logp[rows])
        chunked_loss(Head(student.hidden[rows], student.weight), Head(teacher.hidden[rows], teacher.weight), piece,
                     terms, Given(terms, weight[rows]), chunk=5)[0].backward()
    loss = dense_loss(student, teacher, tokens, terms, Given(terms, weight))[0]
    leaves = [t for t in (student.hidden, student.weight) if t.requires_grad]
    for leaf, expected in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(leaf.grad, expected, atol=1e-14, rtol=1e-12)


def test_no_gradient_reaches_the_teacher_and_none_is_formed_without_need() -> None:
    student, teacher, tokens = heads()
    live = Head(teacher.hidden.requires_grad_(True), teacher.weight.requires_grad_(True))
    chunked_loss(student, live, tokens, FULL, Given(FULL, tokens.weight))[0].backward()
    assert live.hidden.grad is live.weight.grad is None
    with torch.no_grad():
        loss, _ = chunked_loss(student, teacher, tokens, FULL, Given(FULL, tokens.weight))
    assert not loss.requires_grad


class Made(TorchDispatchMode):
    """Shapes of all that operations make anew: views of, and writes into, what was there before are left out."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.shapes: set[tuple[int, ...]] = set()
        self.keep: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.shapes.add(tuple(t.shape))
                self.keep.append(t)  # so that no later one gets its address
        return out


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_head_gets_no_gradient_and_no_tensor_has_all_rows_and_all_ids(frozen: bool) -> None:
    n, v, h = 40, 70, 6
    student, teacher, tokens = heads(n, v, h, frozen=frozen)
    with Made(student.weight, teacher.weight) as made:
        chunked_loss(student, teacher, tokens, FULL, Given(FULL, tokens.weight), chunk=8)[0].backward()
    assert not made.shapes & {(n, v), (v, n)}
    assert ((v, h) in made.shapes) is not frozen
    assert (student.weight.grad is None) is frozen


def test_the_dense_form_stands_for_few_tokens_under_a_trainable_head(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for name in ("dense_loss", "chunked_loss"):
        def spy(*args: Any, name: str = name) -> Any:
            taken.append(name)
            return torch.zeros(()), None
        monkeypatch.setattr(f"agentsdpo.learn.loss.{name}", spy)
    for n, frozen in ((3, False), (4, False), (3, True)):
        token_loss(*heads(n, 11, 64, frozen=frozen), FULL, Given(FULL, torch.ones(n)))
    with torch.no_grad():
        token_loss(*heads(3, 11, 64), FULL, Given(FULL, torch.ones(3)))
    assert taken == ["dense_loss", "chunked_loss", "chunked_loss", "chunked_loss"]


_PEAK = """
import os, re, torch
torch.set_num_threads(1)
from agentsdpo.learn.chunked import chunked_loss
from agentsdpo.learn.records import Head, LossTerms, LossTokens
v, h = 40_000, 64
class Ones:
    turns = teacher = False
    def __call__(self, p, q, rows): return torch.ones_like(p), None
draw = lambda *s: 0.1 * torch.randn(*s)
def once(n, frozen):
    student = Head(draw(n, h).requires_grad_(), draw(v, h).requires_grad_(not frozen))
    zero = torch.zeros(n, dtype=torch.long)
    tokens = LossTokens(tok=zero, weight=zero, turn=zero, behaviour_logp=zero)
    terms = LossTerms(divergence=True, token=False, beta=0.5)
    chunked_loss(student, Head(draw(n, h), draw(v, h)), tokens, terms, Ones(), chunk=32)[0].backward()
def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])
for frozen in (True, False):
    if os.fork() == 0:  # a process of its own, whose peak begins anew
        once(32, frozen)
        base = peak()
        once(512, frozen)
        print(peak() - base, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_tokens() -> None:
    """Sixteen times the tokens of one chunk: whole logits would be 78 MiB a side, the dense form some 1 GiB."""
    done = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True)
    grown = [int(line) / 1024 for line in done.stdout.splitlines()]
    assert len(grown) == 2
    assert max(grown) < 30, f"a frozen head grew by {grown[0]:.0f} MiB, a trainable one by {grown[1]:.0f}"
