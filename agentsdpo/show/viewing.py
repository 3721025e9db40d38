"""Scoring an episode to look at it: what a policy version thinks of its tokens, with a hint and without.

    agentsdpo view STORE EPISODE --model seed -o page.html
    agentsdpo view STORE EPISODE --model seed --hint "File it in k_usd."       what if the teacher had read this?
    agentsdpo view STORE EPISODE --policies RUN/policies --from 3 --to 9        what changed between two versions
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from agentsdpo.chat import ChatFormat
from agentsdpo.config import SEED_MODEL
from agentsdpo.envs.desk.seed import seed_path
from agentsdpo.errors import ConfigError, HintError, TokenizerMismatch
from agentsdpo.learn.config import LearnConfig
from agentsdpo.learn.inspect import Inspection, inspect_row
from agentsdpo.learn.load import load_chat, load_model, pick_device, take_weights
from agentsdpo.learn.model import longest_row, prepare_model
from agentsdpo.learn.presets import resolve
from agentsdpo.learn.rows import admit
from agentsdpo.learning import train_rows
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.replay.cli.shade import GAP
from agentsdpo.replay.cli.view import Shown
from agentsdpo.replay.rows import Row
from agentsdpo.show.viewer import Scores
from agentsdpo.types import Hint


@dataclass(frozen=True)
class Wanted:
    """Who scores, and with what.

    Attributes:
        model: folder of the model, or ``seed``.
        policies: policy registry whose weights are put in; None takes the model's own.
        student: version that reads no hint; the newest when not given.
        teacher: version that stands on the other side; ``student`` when not given. With one, no hint is read: the gap
            is what changed between the two.
        preset: objective whose weights are shown.
    """

    model: str
    policies: Path | None = None
    student: int | None = None
    teacher: int | None = None
    preset: str = "robust"


class Scorer:
    """The models that score, loaded once for many episodes; ``words`` says who they are.

    Raises:
        ModelError, RegistryError, ConfigError: they cannot be loaded, or two versions are compared but no registry is
            named, or there is no such preset.
    """

    def __init__(self, wanted: Wanted) -> None:
        self._config = resolve(wanted.preset, {"lr": 1e-6, "max_staleness": None})
        path = seed_path() if wanted.model == SEED_MODEL else wanted.model
        self.chat, self._bare = load_chat(path), wanted.teacher is not None
        self._student, self._teacher, self.words = _models(path, self.chat, wanted)

    def score(self, shown: Shown, *, hint: str | None = None) -> tuple[Shown, list[Scores | None]]:
        """Score every branch of an episode; one that cannot be scored (no hint, no token in the loss) has None.

        Args:
            shown: as loaded.
            hint: read in the place of the recorded one; versions are compared without any.

        Returns:
            The episode shaded by the gap, and the scores of each branch.

        Raises:
            TokenizerMismatch: another model sampled it.
            HintError: no branch can be scored.
        """
        _same(shown, self.chat)
        rows = [_hinted(row, hint, bare=self._bare) for row in shown.rows]
        if not self._bare and all(row.hint is None for row in rows):
            raise HintError("the episode has no hint, so that teacher and student read the same",
                            fix="give one with --hint, or compare two versions with --from and --to")
        found = [_branch(row, self.chat, self._student, self._teacher, self._config, bare=self._bare) for row in rows]
        if all(one is None for one in found):
            raise HintError("no branch has a token that can be scored: the objective admits none of them",
                            fix="name another --preset, or look at it without --model")
        values = [np.full(len(row.branch.token_ids), np.nan, np.float32) if one is None else one.teacher - one.student
                  for row, one in zip(rows, found, strict=True)]
        title = "what changed, in nats" if self._bare else GAP.title
        return replace(shown, rows=rows, values=values, shade=replace(GAP, title=title)), found


def _same(shown: Shown, chat: ChatFormat) -> None:
    theirs = shown.episode.tokenizer_sha256
    if theirs != chat.tokenizer_sha256:
        raise TokenizerMismatch(f"the episode is of tokenizer {theirs[:12]!r}, the model's is "
                                f"{chat.tokenizer_sha256[:12]!r}", fix="give --model the model that sampled it")


def _models(path: Path | str, chat: ChatFormat, wanted: Wanted) -> tuple[Any, Any, str]:
    """Student, teacher, and who they are."""
    if wanted.policies is None:
        if wanted.student is not None or wanted.teacher is not None:
            raise ConfigError("policy versions are named but no registry", fix="give --policies RUN/policies")
        model = _prepared(path, chat)
        return model, model, f"scored by {wanted.model}"
    registry = PolicyRegistry(wanted.policies)
    latest = registry.latest()
    if latest is None:
        raise ConfigError(f"{wanted.policies} holds no policy version", fix="give the folder policies/ of a run")
    first = latest if wanted.student is None else wanted.student
    student = _prepared(path, chat, registry.load(first))
    if wanted.teacher is None:
        return student, student, f"scored by version {first}"
    return student, _prepared(path, chat, registry.load(wanted.teacher)), f"version {wanted.teacher} minus {first}"


def _prepared(path: Path | str, chat: ChatFormat, weights: dict[str, Any] | None = None) -> Any:
    model = load_model(path, chat, device=pick_device())
    if weights is not None:
        take_weights(model, weights)
    prepare_model(model)
    return model


def _hinted(row: Row, hint: str | None, *, bare: bool) -> Row:
    """The row with the hint that is asked for, without one where versions are compared."""
    if bare:
        return replace(row, hint=None)
    return row if hint is None else replace(row, hint=Hint(text=hint, source="feedback", author="you"))


def _branch(row: Row, chat: ChatFormat, student: Any, teacher: Any, config: LearnConfig, *,
            bare: bool) -> Scores | None:
    """Scores of one branch, put together from its rows: one for each turn with a hint of its own.

    ``bare``: both sides read the same, so a hint stands in for admission alone.
    """
    shape = student.config.get_text_config()
    row = replace(row, hint=Hint(text="none", source="feedback", author="")) if bare else row
    version = max(row.policy_versions[1], 0)
    found = admit(train_rows(chat, row), version, config, vocab_size=shape.vocab_size,
                  window=longest_row(student))
    if not found.rows:
        return None
    size = len(row.branch.token_ids)
    values = {name: np.full(size, np.nan, np.float32) for name in ("student", "teacher", "push")}
    tops: tuple[dict[int, Any], dict[int, Any]] = {}, {}
    for one in found.rows:
        one = replace(one, row=replace(one.row, hint_ids=())) if bare else one
        seen = inspect_row(student, one, config, teacher=teacher)
        for name, array in values.items():
            array[seen.position] = getattr(seen, name)
        for top, side in zip(tops, (seen.student_top, seen.teacher_top), strict=True):
            top.update(_tops(seen, side))
    return Scores(values["student"], values["teacher"], values["push"], tops[0], tops[1])


def _tops(seen: Inspection, side: tuple[np.ndarray, np.ndarray]) -> dict[int, Sequence[tuple[int, float]]]:
    ids, logps = side
    return {at: list(zip(row, logp, strict=True)) for at, row, logp in zip(
        seen.position.tolist(), ids.tolist(), logps.tolist(), strict=True)}
