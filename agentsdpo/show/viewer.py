"""An episode as one page: every token shaded by what the student and the hinted teacher think of it.

The page is a single file that works from a disk, without a server or a network. Its text is data: it is put into the
page as text and never as markup, and the policy of the page allows no script but its own.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np

from agentsdpo.replay.cli.decode import Decoder, pieces
from agentsdpo.replay.cli.shade import segments
from agentsdpo.replay.cli.view import Shown
from agentsdpo.show.pages import render
from agentsdpo.types import Branch, Json

_SCALE = 100
"""Log-probs stand in the page as whole hundredths of a nat."""


@dataclass(frozen=True)
class Scores:
    """What is known of the sampled tokens of one branch beside their behaviour log-probs; float32[T], NaN elsewhere.

    ``student_top``, ``teacher_top`` hold, by position, the likeliest ids with their log-probs.
    """

    student: np.ndarray
    teacher: np.ndarray
    weight: np.ndarray
    student_top: Mapping[int, Sequence[tuple[int, float]]]
    teacher_top: Mapping[int, Sequence[tuple[int, float]]]


def page(shown: Shown, scores: Sequence[Scores | None], *, by: str = "", note: str = "") -> str:
    """The page of an episode.

    Args:
        shown: the episode, its tokenizer included.
        scores: per branch; None where nothing was scored.
        by: what tokens are shaded by at first: gap, ratio, weight or logprob; the first that is known when not given.
        note: which model scored, and with which hint.
    """
    script = (files("agentsdpo.show") / "templates" / "viewer.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    told = document(shown, scores, by=by, note=note)
    data = json.dumps(told, separators=(",", ":"), allow_nan=False)
    escaped = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return render("viewer.html", title=shown.episode.task_id, script=script, digest=digest, data=escaped,
                  modes=len(told["modes"]))


def document(shown: Shown, scores: Sequence[Scores | None], *, by: str = "", note: str = "") -> Json:
    """Everything the page shows, as JSON."""
    words = _Words(shown.decoder)
    known = ["logprob"] if all(one is None for one in scores) else ["gap", "ratio", "weight", "logprob"]
    branches = [_branch(row.branch, one, words) for row, one in zip(shown.rows, scores, strict=True)]
    first, episode = shown.rows[0], shown.episode
    hint = first.hint
    return {"about": {"episode": episode.episode_id, "task": episode.task_id, "env": episode.env_id,
                      "stop": str(episode.stop_reason), "reward": first.reward, "model": episode.model_id,
                      "criteria": [[one.id, one.score] for one in first.grade.results] if first.grade else [],
                      "note": note},
            "hint": {"text": hint.text, "turns": [list(one) for one in hint.told], "source": hint.source,
                     "author": hint.author} if hint else None,
            "modes": known, "by": by if by in known else known[0], "scale": _SCALE,
            "branches": branches, "words": words.texts}


class _Words:
    """Texts of tokens, each different one once."""

    def __init__(self, decoder: Decoder | None) -> None:
        self._decoder, self.texts = decoder, list[str]()
        self._known: dict[str, int] = {}
        self._of_id: dict[int, int] = {}

    def number(self, text: str) -> int:
        """Place of a text."""
        if text not in self._known:
            self._known[text] = len(self.texts)
            self.texts.append(text)
        return self._known[text]

    def of_id(self, token: int) -> int:
        """Place of the text of one token by itself."""
        if token not in self._of_id:
            text = self._decoder.decode([token], skip_special_tokens=False) if self._decoder else f"{token} "
            self._of_id[token] = self.number(text)
        return self._of_id[token]

    def of_run(self, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """Texts of a run of tokens, and how many tokens each stands for."""
        if self._decoder is None:
            return [self.of_id(token) for token in ids], [1] * len(ids)
        found = [(self.number(text), end - start) for start, end, text in pieces(self._decoder, ids)]
        return [word for word, _ in found], [length for _, length in found]


def _branch(branch: Branch, scores: Scores | None, words: _Words) -> Json:
    texts, lengths = words.of_run(branch.token_ids.tolist())
    sampled = np.flatnonzero(np.isfinite(branch.logprobs) | (branch.token_kind == 1)).tolist()
    found: Json = {
        "id": branch.branch_id, "fork": branch.fork_reason, "text": texts,
        "long": {str(i): n for i, n in enumerate(lengths) if n != 1}, "at": sampled,
        "ids": branch.token_ids[sampled].tolist(), "kind": branch.token_kind[sampled].tolist(),
        "behaviour": _whole(branch.logprobs[sampled]),
        "segments": [[one.writer, one.start, one.end, one.call.turn if one.call else None,
                      [[span.version, one.start + span.start] for span in one.call.versions] if one.call else []]
                     for one in segments(branch)]}
    if scores is not None:
        size = float(np.nanmax(np.abs(scores.weight), initial=0.0)) or 1.0
        found |= {"student": _whole(scores.student[sampled]), "teacher": _whole(scores.teacher[sampled]),
                  "weight": _whole(scores.weight[sampled] / size),
                  "student_top": [_flat(scores.student_top.get(at, ()), words) for at in sampled],
                  "teacher_top": [_flat(scores.teacher_top.get(at, ()), words) for at in sampled]}
    return found


def _whole(values: np.ndarray) -> list[int | None]:
    """Whole hundredths, None for what is not finite."""
    finite = np.isfinite(values)
    numbers = np.rint(np.where(finite, values, 0.0) * _SCALE).astype(np.int64).tolist()
    return [number if known else None for number, known in zip(numbers, finite.tolist(), strict=True)]


def _flat(top: Sequence[tuple[int, float]], words: _Words) -> list[Any]:
    return [part for token, logp in top for part in (words.of_id(token), round(logp * _SCALE))]
