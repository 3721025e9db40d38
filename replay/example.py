"""A store of three tiny episodes, for examples and golden files: the same content every time."""

import hashlib
import shutil
import tempfile
import weakref

import numpy as np

from agentsdpo.replay.ids import derived_uuid
from agentsdpo.replay.store import ReplayStore
from agentsdpo.types import Branch, Call, CriterionResult, Episode, Grade, Hint, Sampling, StopReason, VersionSpan

TOKENIZER, TEMPLATE, VOCAB = "a" * 64, "b" * 64, 1000


def example() -> ReplayStore:
    """A store in a temporary folder, gone with the last object that uses it.

    It holds the episodes e-0, e-1 and e-2 with rewards 0, 0.5 and 1.

    >>> example().snapshot().scalars("reward >= 0.5").select(["episode_id", "n_tokens"]).to_pylist()
    [{'episode_id': 'e-1', 'n_tokens': 16}, {'episode_id': 'e-2', 'n_tokens': 20}]
    """
    folder = tempfile.mkdtemp(prefix="agentsdpo-example-")
    store = ReplayStore.open(folder)
    weakref.finalize(store.storage, shutil.rmtree, folder, ignore_errors=True)
    store.append([episode(number) for number in range(3)])
    return store


def episode(number: int) -> Episode:
    """Episode ``e-<number>``: two turns of 3 + number sampled tokens, sampled by policy version ``number``."""
    score = min(number / 2, 1.0)
    results = [CriterionResult(id="file", score=score, feedback="" if score == 1 else "the file is not complete")]
    return Episode(
        episode_id=f"e-{number}", task_id=f"task-{number}", env_id="desk", run_id="example", group_id="g",
        group_size=3, branches=(branch(number),), stop_reason=StopReason.COMPLETED, grade=Grade.of(results),
        train_allowed=True, model_id="tiny", tokenizer_sha256=TOKENIZER, chat_template_sha256=TEMPLATE,
        vocab_size=VOCAB, engine="inprocess", hint=Hint(text="write the file", source="feedback", author="grader"),
        messages=({"role": "user", "content": f"Write file {number}."}, {"role": "assistant", "content": "Done."}),
        metadata={"number": number})


def branch(number: int) -> Branch:
    """The one branch of :func:`episode`: prompt, completion, answer of the environment, completion."""
    n = 3 + number
    rng = np.random.default_rng(number)
    kinds = np.repeat(np.array([0, 1, 2, 1], np.uint8), n)
    ids = rng.integers(0, VOCAB, len(kinds)).astype(np.int32)
    logprobs = np.where(kinds == 1, -rng.exponential(1.0, len(kinds)), np.nan).astype(np.float32)
    calls = tuple(_call(number, turn, ids, start, start + n) for turn, start in enumerate((n, 3 * n)))
    return Branch(branch_id=0, token_ids=ids, token_kind=kinds, logprobs=logprobs, calls=calls)


def _call(number: int, turn: int, ids: np.ndarray, start: int, end: int) -> Call:
    return Call(call_id=derived_uuid("call", number, turn), turn=turn, start=start, end=end, finish_reason="stop",
                prompt_sha256=hashlib.sha256(ids[:start].astype("<i4").tobytes()).hexdigest(),
                sampling=Sampling(seed=turn), versions=(VersionSpan(version=number, start=0, end=end - start),))
