"""Drawing by inversion reproduces the distribution, and never draws what was filtered out."""

import numpy as np
import torch

from agentsdpo.collect.sampler import SamplingRows, draw, keep_mask


def rows(n: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> SamplingRows:
    return SamplingRows(np.full(n, temperature, np.float32), np.full(n, top_k), np.full(n, top_p))


def test_an_even_grid_of_uniforms_gives_the_probabilities() -> None:
    logits = torch.randn(1, 11, generator=torch.Generator().manual_seed(0))
    n = 20_000
    grid = (np.arange(n) + 0.5) / n
    drawn = draw(logits.expand(n, -1), rows(n, temperature=0.7), grid)
    share = np.bincount(drawn.ids, minlength=11) / n
    want = torch.softmax(logits[0] / 0.7, -1).numpy()
    np.testing.assert_allclose(share, want, atol=2 / n)
    np.testing.assert_allclose(drawn.logps, np.log(want)[drawn.ids], atol=1e-5)


def test_extreme_uniforms_stay_inside_the_kept_set() -> None:
    logits = torch.tensor([[-torch.inf, 2.0, 1.0, 0.0, -torch.inf]] * 4)
    edge = np.array([0.0, np.nextafter(1.0, 0.0), 0.5, 1 - 1e-16])
    drawn = draw(logits, rows(4, top_k=2), edge)
    assert set(drawn.ids.tolist()) <= {1, 2}
    assert [k.tolist() for k in drawn.kept if k is not None] == [[1, 2]] * 4
    assert set(draw(logits, rows(4), edge).ids.tolist()) <= {1, 2, 3}


def test_singletons_have_log_prob_zero_and_rows_do_not_mix() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
    mixed = SamplingRows(np.array([1.0, 0.0], np.float32), np.array([1, 0]), np.array([1.0, 1.0]))
    drawn = draw(logits, mixed, np.array([0.9, 0.0]))
    assert drawn.ids.tolist() == [0, 2]
    assert drawn.logps[0] == 0.0
    assert drawn.logps[1] == torch.log_softmax(logits[1], -1)[2].item()
    assert drawn.kept[1] is None


def test_top_p_is_taken_after_top_k() -> None:
    logp = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    keep = keep_mask(logp, torch.tensor([2]), torch.tensor([0.57]))
    assert keep.tolist() == [[True, False, False, False]]  # 0.4 of 0.7 is 0.571
