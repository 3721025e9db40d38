"""The engine against a plain full forward: log-probs, independence of neighbours, caching, weight swaps."""

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

from agentsdpo.collect.inprocess import CHUNK, InProcessEngine, length_groups
from agentsdpo.errors import ConfigError, EngineError, ModelError
from agentsdpo.types import Completion, Sampling

EOS = 5


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def full_logprobs(model: Any, ids: list[int], temperature: float = 1.0) -> np.ndarray:
    """Log-probs of every next token by one uncached forward, float[T - 1, V]."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
    return torch.log_softmax(logits.float() / temperature, -1).numpy()


def check(model: Any, prompt: list[int], done: Completion, temperature: float = 1.0) -> None:
    ids = [*prompt, *done.token_ids]
    table = full_logprobs(model, ids, temperature)[len(prompt) - 1:]
    want = table[np.arange(len(done.token_ids)), list(done.token_ids)]
    np.testing.assert_allclose(done.logprobs, want, atol=1e-4)


async def episode(engine: InProcessEngine, seed: int, turns: int, *, head: int = 40, check_with: Any = None,
                  release: bool = True) -> list[int]:
    """Several turns of random lengths in one session; returns all ids."""
    rng = np.random.default_rng(seed)
    ids = [7] * head + rng.integers(6, 300, rng.integers(3, 60)).tolist()
    for turn in range(turns):
        prompt = list(ids)
        done = await engine.complete(prompt, Sampling(max_tokens=int(rng.integers(1, 20)), seed=1000 * seed + turn),
                                     session=f"s{seed}")
        if check_with is not None:
            check(check_with, prompt, done)
        ids = [*prompt, *done.token_ids, *rng.integers(6, 300, rng.integers(1, 40)).tolist()]
        for _ in range(int(rng.integers(0, 4))):
            await asyncio.sleep(0)
    if release:
        engine.release(f"s{seed}")
    return ids


@pytest.mark.parametrize("slots", [3, 16])
def test_logprobs_equal_a_full_forward_under_concurrency(tiny_model: Any, slots: int) -> None:
    engine = InProcessEngine(tiny_model, EOS, max_slots=slots, window=512)

    async def run() -> None:
        await asyncio.gather(*(episode(engine, seed, 3, check_with=tiny_model) for seed in range(10)))

    asyncio.run(run())


def test_a_completion_does_not_depend_on_its_neighbours(tiny_model: Any) -> None:
    engine = InProcessEngine(tiny_model, EOS, max_slots=8, window=512)
    alone = [asyncio.run(episode(engine, seed, 2)) for seed in range(6)]

    async def together() -> list[list[int]]:
        return await asyncio.gather(*(episode(engine, seed, 2) for seed in range(6)))

    assert asyncio.run(together()) == alone


def test_prefixes_are_encoded_once_within_and_across_sessions(tiny_model: Any) -> None:
    engine = InProcessEngine(tiny_model, EOS, max_slots=4, window=512)

    async def run() -> None:
        prompt = list(range(10, 110))
        done = await engine.complete(prompt, Sampling(max_tokens=4), session="a")
        n = len(done.token_ids)
        assert engine.tokens_encoded == 100 + n - 1
        engine.tokens_encoded = 0
        again = [*prompt, *done.token_ids, 9, 9]
        await engine.complete(again, Sampling(max_tokens=1), session="a")
        assert engine.tokens_encoded == 3  # the last sampled token and the two new ones
        engine.tokens_encoded = 0
        first = await engine.complete([*prompt, 8], Sampling(max_tokens=1, seed=3), session="b")
        assert engine.tokens_encoded == 1  # the shared 100 are copied from the other slot
        check(tiny_model, [*prompt, 8], first)
        engine.tokens_encoded = 0
        fresh = [[*range(200, 260), i] for i in range(3)]
        await asyncio.gather(*(engine.complete(p, Sampling(max_tokens=1), session=f"f{i}")
                               for i, p in enumerate(fresh)))
        assert engine.tokens_encoded == 61 + 2

    asyncio.run(run())


def test_a_shorter_or_different_prompt_resets_the_session(tiny_model: Any) -> None:
    engine = InProcessEngine(tiny_model, EOS, max_slots=1, window=256)

    async def run() -> None:
        for prompt in ([9] * 30, [9] * 12, [8] * 20, [8] * 20):
            done = await engine.complete(prompt, Sampling(max_tokens=5, seed=1), session="a")
            check(tiny_model, prompt, done)
        other = await engine.complete([8] * 25, Sampling(max_tokens=5), session="b")  # takes the idle slot of "a"
        check(tiny_model, [8] * 25, other)

    asyncio.run(run())


@pytest.mark.parametrize("sampling", [Sampling(top_k=5, temperature=0.7, max_tokens=12),
                                      Sampling(top_p=0.6, max_tokens=12),
                                      Sampling(top_p=0.8, top_k=9, temperature=1.3, max_tokens=12)])
def test_truncated_sampling_records_kept_sets_and_exact_logprobs(tiny_model: Any, sampling: Sampling) -> None:
    engine = InProcessEngine(tiny_model, EOS, max_slots=2, window=128)
    prompt = list(range(20, 40))

    async def run() -> tuple[Completion, Completion]:
        plain = engine.complete(prompt, Sampling(max_tokens=12), session="b")
        return tuple(await asyncio.gather(engine.complete(prompt, sampling, session="a"), plain))  # type: ignore

    done, plain = asyncio.run(run())
    assert plain.kept is None
    check(tiny_model, prompt, plain)
    assert done.kept is not None
    table = full_logprobs(tiny_model, [*prompt, *done.token_ids], sampling.temperature)[len(prompt) - 1:]
    for row, token, logp, kept in zip(table, done.token_ids, done.logprobs, done.kept, strict=True):
        assert list(kept) == sorted(set(kept))
        assert token in kept
        assert len(kept) <= (sampling.top_k or len(row))
        assert row[list(kept)].min() >= np.delete(row, kept).max() - 1e-5
        assert logp == pytest.approx(row[token] - np.log(np.exp(row[list(kept)]).sum()), abs=1e-4)


def test_greedy_takes_the_likeliest_and_says_it_is_no_behaviour(tiny_model: Any) -> None:
    engine = InProcessEngine(tiny_model, EOS, window=128)
    done = asyncio.run(engine.complete([3, 4, 6], Sampling(temperature=0.0, max_tokens=6), session="a"))
    table = full_logprobs(tiny_model, [3, 4, 6, *done.token_ids])[2:]
    assert table.argmax(-1).tolist() == list(done.token_ids)
    assert done.logprob_kind == "raw"
    check(tiny_model, [3, 4, 6], done)


def test_eos_stops_and_the_window_cuts(tiny_model: Any) -> None:
    likely = int(full_logprobs(tiny_model, [3, 4, 6, 6])[2].argmax())
    engine = InProcessEngine(tiny_model, likely, window=16)
    done = asyncio.run(engine.complete([3, 4, 6], Sampling(temperature=0.0, max_tokens=9), session="a"))
    assert (done.token_ids, done.finish_reason) == ((likely,), "stop")
    engine = InProcessEngine(tiny_model, [1022], window=16)
    done = asyncio.run(engine.complete([3] * 10, Sampling(max_tokens=9), session="a"))
    assert (len(done.token_ids), done.finish_reason) == (6, "length")


def test_weights_swapped_in_mid_generation_show_as_spans(tiny_model: Any) -> None:
    from copy import deepcopy

    old, new = deepcopy(tiny_model), deepcopy(tiny_model)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    engine = InProcessEngine(tiny_model, 1022, max_slots=2, window=128, version=4)
    prompt = list(range(10, 40))

    async def run() -> Completion:
        job = asyncio.create_task(engine.complete(prompt, Sampling(max_tokens=12), session="a"))
        while engine.tokens_encoded < len(prompt) + 4:
            await asyncio.sleep(0)
        state = {k: v for k, v in new.state_dict().items() if k != "lm_head.weight"}  # tied, as published
        engine.load_weights(state, 5)
        return await job

    done = asyncio.run(run())
    assert [s.version for s in done.versions] == [4, 5]
    assert (done.versions[0].end, done.versions[1].end) == (5, 12)
    ids = [*prompt, *done.token_ids]
    for model, span in zip((old, new), done.versions, strict=True):
        table = full_logprobs(model, ids)[len(prompt) - 1:]
        want = table[np.arange(12), list(done.token_ids)]
        np.testing.assert_allclose(done.logprobs[span.start:span.end], want[span.start:span.end], atol=1e-4)
    assert engine.version == 5


def noisy(model: Any) -> Any:
    """A copy with other weights."""
    from copy import deepcopy

    new = deepcopy(model)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    return new


def test_idle_and_new_sessions_encode_everything_again_under_new_weights(tiny_model: Any) -> None:
    """No call is in flight at the swap: what the slots still hold must not be used by anyone."""
    new, prompt = noisy(tiny_model), list(range(10, 110))
    engine = InProcessEngine(tiny_model, 1022, max_slots=3, window=256)

    async def run() -> None:
        done = await engine.complete(prompt, Sampling(max_tokens=4), session="idle")
        engine.load_weights(new.state_dict(), 1)
        engine.tokens_encoded = 0
        fresh = await engine.complete([*prompt, 8], Sampling(max_tokens=4, seed=2), session="new")
        assert engine.tokens_encoded == 101 + 3, "nothing is borrowed from a slot of the old weights"
        check(new, [*prompt, 8], fresh)
        engine.tokens_encoded = 0
        longer = [*prompt, *done.token_ids, 9]
        again = await engine.complete(longer, Sampling(max_tokens=4, seed=3), session="idle")
        assert engine.tokens_encoded == len(longer) - 100 + 3, "what the new session encoded may be shared"
        check(new, longer, again)
        assert [s.version for s in (*fresh.versions, *again.versions)] == [1, 1]

    asyncio.run(run())


def test_an_idle_session_alone_encodes_again_under_new_weights(tiny_model: Any) -> None:
    new, prompt = noisy(tiny_model), list(range(10, 110))
    engine = InProcessEngine(tiny_model, 1022, max_slots=3, window=256)

    async def run() -> None:
        done = await engine.complete(prompt, Sampling(max_tokens=4), session="idle")
        engine.load_weights(new.state_dict(), 1)
        engine.tokens_encoded = 0
        longer = [*prompt, *done.token_ids, 9]
        again = await engine.complete(longer, Sampling(max_tokens=4, seed=3), session="idle")
        assert engine.tokens_encoded == len(longer) + 3
        check(new, longer, again)

    asyncio.run(run())


@pytest.mark.parametrize("length", [CHUNK, CHUNK + 1, 2 * CHUNK + 1, 2 * CHUNK + 77])
def test_a_prompt_longer_than_a_chunk_is_encoded_in_pieces(tiny_model: Any, length: int) -> None:
    engine = InProcessEngine(tiny_model, 1022, max_slots=2, window=2 * CHUNK + 128)
    prompt = np.random.default_rng(length).integers(6, 300, length).tolist()

    async def run() -> tuple[Completion, Completion]:
        return await asyncio.gather(engine.complete(prompt, Sampling(max_tokens=6), session="long"),
                                    engine.complete(prompt[5:40], Sampling(max_tokens=6), session="short"))

    long, short = asyncio.run(run())
    check(tiny_model, prompt, long)
    check(tiny_model, prompt[5:40], short)


def test_foreign_weights_are_refused_whole(tiny_model: Any) -> None:
    engine = InProcessEngine(tiny_model, EOS, window=64)
    state = dict(tiny_model.state_dict())
    before = state["model.norm.weight"].clone()
    broken = {**state, "model.norm.weight": before + 1, "extra": before}
    broken.pop("model.layers.0.mlp.up_proj.weight")
    with pytest.raises(EngineError, match="up_proj.*extra"):
        engine.load_weights(broken, 9)
    assert torch.equal(tiny_model.state_dict()["model.norm.weight"], before)
    assert engine.version == 0


def test_faults_reach_everyone_who_waits(tiny_model: Any) -> None:
    engine = InProcessEngine(tiny_model, EOS, max_slots=1, window=64)

    async def run() -> list[Any]:
        jobs = [engine.complete([3, 4], Sampling(), session=s) for s in "ab"]
        tiny_model.forward = None
        return await asyncio.gather(*jobs, engine.complete([3] * 64, Sampling(), session="c"), return_exceptions=True)

    results = asyncio.run(run())
    assert [type(r) for r in results] == [EngineError] * 3
    assert "no room" in str(results[2])


def test_a_cancelled_call_frees_its_slot(tiny_model: Any) -> None:
    engine = InProcessEngine(tiny_model, 1022, max_slots=1, window=512)

    async def run() -> Completion:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.complete([3, 4], Sampling(max_tokens=400), session="a"), 0.01)
        return await engine.complete([3, 4], Sampling(max_tokens=3), session="b")

    check(tiny_model, [3, 4], asyncio.run(run()))


def test_what_cannot_be_cached_is_refused(tiny_model: Any) -> None:
    with pytest.raises(ConfigError, match="positions end at 4096"):
        InProcessEngine(tiny_model, EOS, window=5000)
    tiny_model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ModelError, match="sliding_attention"):
        InProcessEngine(tiny_model, EOS, window=64)


def test_groups_cover_every_row_once_with_little_padding() -> None:
    sizes = np.random.default_rng(0).integers(2, 513, 200)
    groups = length_groups(sizes)
    assert sorted(np.concatenate(groups).tolist()) == list(range(200))
    assert all(sizes[g].max() * len(g) - sizes[g].sum() <= 64 for g in groups)
    assert all(sizes[g].max() * len(g) <= 768 for g in groups)
