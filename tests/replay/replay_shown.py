"""A store with text to read: episodes in the shipped tokenizer, for the tests of the command line."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from replay_factories import make_episode
from tokenizers import Tokenizer

from agentsdpo.replay import ReplayStore
from agentsdpo.replay.cli.decode import SEED
from agentsdpo.types import Branch, Call, Episode, Sampling, StopReason, VersionSpan

TOKENIZER = Tokenizer.from_file(str(SEED / "tokenizer.json"))
TOKENIZER_SHA = hashlib.sha256(TOKENIZER.to_str().encode()).hexdigest()
CALL_TEXT = '<tool_call>\n{"name": "calc", "arguments": {"expr": "1+1"}}\n</tool_call><|im_end|>'


def make_talk(*pieces: tuple[int, str], version: int = 3, **fields: Any) -> Branch:
    """A branch of pieces ``(kind, text)``; kinds 1, 4 and 5 are calls, of which every second token was unlikely."""
    ids, kinds, logps, calls = [], [], [], []
    for kind, text in pieces:
        new = TOKENIZER.encode(text, add_special_tokens=False).ids
        start, prompt = len(ids), hashlib.sha256(np.array(ids, "<i4").tobytes()).hexdigest()
        ids += new
        kinds += [kind] * len(new)
        logps += [(-0.01, -5.0)[i % 2] if kind in (1, 4) else np.nan for i in range(len(new))]
        if kind in (1, 4, 5):
            calls.append(Call(call_id=f"c{len(calls)}", turn=len(calls), start=start, end=len(ids),
                              prompt_sha256=prompt, finish_reason="stop", sampling=Sampling(),
                              versions=(VersionSpan(version=version, start=0, end=len(new)),)))
    return Branch(token_ids=np.array(ids, np.int32), token_kind=np.array(kinds, np.uint8),
                  logprobs=np.array(logps, np.float32), calls=tuple(calls), **fields)


def spoken(episode_id: str, *, version: int = 3, **fields: Any) -> Episode:
    """An episode of two turns in the shipped tokenizer."""
    branch = make_talk((0, "<|im_start|>user\nReport. \x1b[31mred\u202e naïve<|im_end|>\n"), (1, CALL_TEXT),
                       (2, "\n<tool_response>\n2\n</tool_response>"), (1, "two é<|im_end|>"), version=version)
    messages = ({"role": "user", "content": "Report."},
                {"role": "assistant", "content": "", "tool_calls": [
                    {"id": "c", "type": "function", "function": {"name": "calc", "arguments": {"expr": "1+1"}}}]},
                {"role": "tool", "tool_call_id": "c", "content": "2"})
    return make_episode(1, episode_id=episode_id, **{
        "branches": (branch,), "tokenizer_sha256": TOKENIZER_SHA, "vocab_size": 1024, "messages": messages, **fields})


def build(root: Path) -> ReplayStore:
    """Five episodes in three appends: two spoken, one of two branches in an unknown tokenizer, two of one group."""
    store = ReplayStore.open(root)
    for version in range(1, 5):
        store.record_policy(version, {"weights_id": f"w{version}"})
    store.append([spoken("aaaa-1", group_id="g-a", group_size=1)])
    parent = make_talk((0, "start"), (1, " one"), (2, " two"), (1, " three"))
    child = make_talk((0, "start one"), (1, " four"), branch_id=1, parent_branch_id=0, fork_at=2,
                      fork_reason="compaction")
    keep = min(len(parent.token_ids), len(child.token_ids))
    same = int(np.argmin(parent.token_ids[:keep] == child.token_ids[:keep]))
    child = child.model_copy(update={"fork_at": min(same, child.calls[0].start)})
    store.append([make_episode(5, episode_id="bbbb-2", branches=(parent, child), task_id="fork", group_id="g-b",
                               group_size=1, grade=None, hint=False),
                  make_episode(6, episode_id="cccc-3", env_id="other", group_id="g-c", group_size=2, version=1,
                               stop_reason=StopReason.MAX_TURNS)])
    store.append([make_episode(7, episode_id="cccc-4", env_id="other", group_id="g-c", group_size=2, version=2),
                  spoken("dddd-5", version=4, group_id="g-d", group_size=1)])
    store.close()
    return store
