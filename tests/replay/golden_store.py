"""The golden store of a release: ``.venv/bin/python tests/replay/golden_store.py`` writes that of this release.

``golden/<release>/STORE`` holds a bit of everything the format has; ``expected.json`` is what must be read from it by
every later release. Neither is ever written again.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from agentsdpo import __version__
from agentsdpo.replay import Key, ReplayStore, compact, evict, gc
from agentsdpo.replay.example import TEMPLATE, TOKENIZER, VOCAB, branch, episode
from agentsdpo.replay.overlay import Slot
from agentsdpo.replay.rows import Row
from agentsdpo.replay.snapshot import Snapshot
from agentsdpo.types import Branch, Episode, Grade, Hint, Sampling, StopReason

GOLDEN = Path(__file__).with_name("golden")
POLICY = {"tokenizer_sha256": TOKENIZER, "chat_template_sha256": TEMPLATE, "vocab_size": VOCAB}


def alone(number: int, **fields: Any) -> Episode:
    """An episode that is no part of a group."""
    return episode(number).model_copy(update={"group_id": f"g-{number}", "group_size": 1, **fields})


def truncated(number: int) -> Branch:
    """A branch sampled with top_k 2 and its kept sets."""
    plain = branch(number)
    calls = tuple(call.model_copy(update={"sampling": Sampling(seed=call.turn, top_k=2)}) for call in plain.calls)
    sampled = plain.token_ids[plain.token_kind == 1].astype(np.int64)
    pairs = np.sort(np.stack([sampled, (sampled + 1) % VOCAB], 1), 1)
    return plain.model_copy(update={"calls": calls, "kept_ids": pairs.ravel().astype(np.int32),
                                    "kept_counts": np.full(len(sampled), 2, np.int32)})


def forked(number: int) -> tuple[Branch, Branch]:
    """Two branches, the second from the middle of the first on."""
    parent = branch(number)
    at = parent.calls[0].end
    kinds = parent.token_kind.copy()
    kinds[:at] = 0
    child = parent.model_copy(update={
        "branch_id": 1, "parent_branch_id": 0, "fork_at": at, "fork_reason": "compaction", "token_kind": kinds,
        "logprobs": np.where(kinds == 1, parent.logprobs, np.float32(np.nan)), "calls": parent.calls[1:]})
    return parent, child


def make(root: Path) -> ReplayStore:
    """Write a store with something of everything."""
    store = ReplayStore.open(root)
    for version in range(7):
        store.record_policy(version, POLICY | {"weights_id": f"w{version}"})
    store.append([alone(0), alone(1, branches=(truncated(1),)), alone(2, branches=forked(2))])
    store.append([alone(3, stop_reason=StopReason.MAX_TURNS, grade=None), alone(4, hint=None, messages=())])
    store.close()
    store.add_rewards({"e-0": 0.25}, author="one", status="provisional")
    store.add_rewards({"e-0": 0.75, "e-3": 0.5}, author="two")
    store.add_labels({"e-1": "reviewed"}, author="me")
    store.add_hints({"e-2": Hint(text="later", source="user", author="me")})
    store.add_relogprobs({Key("e-0", 0, 0): np.linspace(-1, -2, 12)}, policy_version=7, trainer_id="trainer")
    store.close()
    evict(store, [Key("e-4", 0, 0)], reason="golden")
    compact(store)
    gc(store, grace_s=0)
    time.sleep(0.01)
    gc(store, grace_s=0)
    store.append([alone(5)])
    evict(store, [Key("e-5", 0, 0)], reason="golden")
    store.append([alone(6, attempt=1)])
    store.close()
    return store


def describe(store: ReplayStore) -> dict[str, Any]:
    """All that a reader of this release reads, as JSON; log-probs as hexadecimal numbers, null for NaN."""
    view = store.snapshot()
    rows = {}
    for row in view.branches():
        part = row.branch
        rows[str(row.key)] = {
            "token_ids": part.token_ids.tolist(), "token_kind": part.token_kind.tolist(),
            "logprobs": [None if value != value else float(value).hex() for value in part.logprobs],
            "kept_ids": _list(part.kept_ids), "kept_counts": _list(part.kept_counts),
            "calls": [call.model_dump(mode="json", exclude={"t_request", "t_done"}) for call in part.calls],
            "fork": [part.parent_branch_id, part.fork_at, part.fork_reason], "reward": row.reward, "label": row.label,
            "hint": row.hint.text if row.hint else None, "task_id": row.task_id, "group_id": row.group_id,
            "grade": _grade(view, row), "versions": list(row.policy_versions),
            "content_sha256": view.rows[row.key].content_sha256, "status": view.rows[row.key].status,
            "relogprobs": {f"{version}/{trainer}": [float(x).hex() for x in values]
                           for (version, trainer), values in view.relogprobs(row.key).items()}}
    return {"rows": rows, "policy": store.policy(0), "format": store.about["format"],
            "messages": {e.episode_id: list(e.messages) for e in view.episodes()}}


def _grade(view: Snapshot, row: Row) -> Any:
    """The late grade as it was written, where there is one; the row must show its verdict, its criteria or else those
    that are stored."""
    late = view.late.find(Slot("reward", row.key), view.rows[row.key])
    shown = row.grade.model_dump(mode="json") if row.grade else None
    if not late:
        return shown
    written = json.loads(late.value or "null")["grade"]
    (stored,) = view.stored([row.key], ["rewards_json"]).column("rewards_json").to_pylist()
    own = Grade(**json.loads(stored)).model_dump(mode="json") if stored and not written["results"] else written
    assert shown == written | {"results": own["results"], "feedback": written["feedback"] or own["feedback"]}
    return written


def _list(array: np.ndarray | None) -> list[int] | None:
    return None if array is None else array.tolist()


def main() -> None:
    """Write the golden store of this release."""
    folder = GOLDEN / __version__
    if folder.exists():
        sys.exit(f"{folder} exists: a release is written once")
    with patch("socket.gethostname", return_value="host"):
        store = make(folder / "STORE")
    text = json.dumps(describe(store), indent=1, sort_keys=True)
    (folder / "expected.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
