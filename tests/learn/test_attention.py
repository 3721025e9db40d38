"""Packed rows against one row at a time, for real Qwen3 shapes: outputs and gradients, and the traps on the way."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3Config, Qwen3ForCausalLM

from agentsdpo.errors import ModelError
from agentsdpo.learn.attention import SEGMENTS, use_segments
from agentsdpo.learn.model import prepare_model
from agentsdpo.learn.pack import packed_row

LENGTHS = (7, 1, 30, 12, 3)

SHAPES = {
    "tied, 4 query heads on 2": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
                                 "tie_word_embeddings": True},
    "as 0.6B: heads wider than the model": {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4,
                                            "head_dim": 16, "tie_word_embeddings": True},
    "untied, no shared heads": {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3,
                                "tie_word_embeddings": False},
}


def qwen3(**fields: Any) -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 101, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 32,
             "max_position_embeddings": 128} | fields
    return Qwen3ForCausalLM(Qwen3Config(**shape)).eval()


def branches() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 101, n) for n in LENGTHS]


def gradients(model: Any, outputs: list[Tensor]) -> list[Tensor]:
    """Of a loss that weighs every hidden state differently."""
    hidden = torch.cat(outputs)
    weights = torch.sin(torch.arange(hidden.numel())).reshape(hidden.shape)
    model.zero_grad()
    (hidden * weights).sum().backward()
    return [p.grad.clone() for p in model.get_decoder().parameters()]


@pytest.mark.parametrize("shape", SHAPES, ids=list(SHAPES))
def test_packed_is_unpacked_for_outputs_and_gradients(shape: str) -> None:
    model = qwen3(**SHAPES[shape])
    alone = [model.get_decoder()(input_ids=torch.from_numpy(ids)[None], use_cache=False).last_hidden_state[0]
             for ids in branches()]
    expected = gradients(model, alone)
    use_segments(model)
    row = packed_row(branches())
    packed = model.get_decoder()(input_ids=row.ids, position_ids=row.position_ids, use_cache=False,
                                 segments=row.segments).last_hidden_state[0]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)
    for got, want in zip(gradients(model, [packed]), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5 * float(want.abs().max().clamp_min(1.0)), rtol=1e-4)


def test_without_segments_each_row_is_plainly_causal() -> None:
    model, ids = qwen3(), torch.randint(0, 101, (2, 9), generator=torch.Generator().manual_seed(1))
    before = model(input_ids=ids, use_cache=False).logits
    use_segments(model)
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, before)


def test_branches_do_not_see_each_other_and_the_first_trap_would_be_noticed() -> None:
    """What another branch holds changes nothing; with the wrong segments it does."""
    model = qwen3()
    use_segments(model)
    one, other = branches()[2], branches()[3]

    def second(first: np.ndarray, **lengths: Any) -> Tensor:
        row = packed_row([first, other])
        with torch.no_grad():
            return model.get_decoder()(input_ids=row.ids, position_ids=row.position_ids, use_cache=False,
                                       **({"segments": row.segments} | lengths)).last_hidden_state[0, len(one):]

    assert torch.equal(second(one), second(one[::-1].copy()))
    assert not torch.allclose(second(one, segments=None), second(one[::-1].copy(), segments=None), atol=1e-2)


@pytest.mark.parametrize(("inputs", "what"), [
    ({"attention_mask": torch.ones(1, 5, dtype=torch.long)}, "an attention mask"),
    ({"attention_mask": torch.ones(1, 1, 5, 5, dtype=torch.bool)}, "an attention mask"),
    ({"segments": packed_row([np.arange(3)]).segments}, "segments of 3 tokens in a row of 5"),
])
def test_masks_and_wrong_lengths_are_refused(inputs: dict[str, Any], what: str) -> None:
    model = qwen3()
    use_segments(model)
    with pytest.raises(ModelError, match=what):
        model(input_ids=torch.arange(5)[None], use_cache=False, **inputs)


def test_a_filled_cache_is_refused() -> None:
    model = qwen3()
    use_segments(model)
    cache = model(input_ids=torch.arange(5)[None], use_cache=True).past_key_values
    with pytest.raises(ModelError, match="a cache"):
        model(input_ids=torch.arange(2)[None], past_key_values=cache)


def test_a_window_shorter_than_a_segment_is_refused() -> None:
    model = qwen3(use_sliding_window=True, sliding_window=8, max_window_layers=0)
    use_segments(model)
    model(input_ids=torch.arange(8)[None], use_cache=False)
    with pytest.raises(ModelError, match="sliding window of 8 tokens under a segment of 9"):
        model(input_ids=torch.arange(9)[None], use_cache=False)


def test_attention_sinks_are_named() -> None:
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(
        vocab_size=101, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1)).eval()
    with pytest.raises(ModelError, match="attention sinks"):  # of which the logits say only that they are others
        prepare_model(model)


def test_no_dense_mask_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, Any, int]] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(query: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append((kwargs["attn_mask"], kwargs["is_causal"], query.shape[2]))
        return real(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model, row = qwen3(num_hidden_layers=1), packed_row(branches())
    use_segments(model)
    model.get_decoder()(input_ids=row.ids, position_ids=row.position_ids, use_cache=False, segments=row.segments)
    assert calls == [(None, n > 1, n) for n in LENGTHS]


def test_a_model_that_keeps_its_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = qwen3()
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda self, name: None)
    with pytest.raises(ModelError, match="stays 'sdpa' and cannot be replaced"):
        use_segments(model)


def test_the_choice_is_not_written_into_the_model_s_files(tmp_path: Any) -> None:
    model = qwen3()
    use_segments(model)
    model.save_pretrained(tmp_path)
    assert SEGMENTS not in (tmp_path / "config.json").read_text()
