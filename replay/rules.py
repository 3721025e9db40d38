"""Row rules checked before anything is written: what a learner may rely on for every row of the store.

The letters are those of the row rules in ``FORMAT.md``. (a), (b), (c), (e) and (f) are also what makes a
:class:`~agentsdpo.types.Branch`; they are checked again because arrays can be changed in place.
"""

import hashlib
import math

import numpy as np

from agentsdpo.errors import RowError, TrainForbidden
from agentsdpo.types import Branch, Episode, check_row

_SAMPLED = (1, 4, 5)


def check_episode(episode: Episode) -> None:
    """Refuse an episode the store must not hold.

    Raises:
        TrainForbidden: the task's licence does not allow training (``train_allowed`` is not true).
        RowError: no branches, branch ids not ascending, a reward that is not finite, or a row rule broken.
    """
    if not episode.train_allowed:
        raise TrainForbidden(f"episode {episode.episode_id} of task {episode.task_id} has train_allowed=False",
                             fix="keep evaluation-only episodes out of the replay store; only a suite sets the stamp")
    ids = [branch.branch_id for branch in episode.branches]
    if not episode.episode_id or not ids or ids != sorted(set(ids)) or ids[0] < 0:
        raise RowError(f"episode {episode.episode_id!r} has branch ids {ids}",
                       fix="give it an id of its own and at least one branch, ids ascending from 0")
    if episode.reward is not None and not math.isfinite(episode.reward):
        raise RowError(f"episode {episode.episode_id} has reward {episode.reward}",
                       fix="leave the grade out (unscored) instead of storing a number that is none")
    parents: dict[int, Branch] = {}
    for branch in episode.branches:
        _check_branch(branch, episode, parents)
        parents[branch.branch_id] = branch


def check_vocabulary(branch: Branch, vocab_size: int) -> None:
    """Rule (d): ``0 <= id < vocab_size``; 0 for ``vocab_size`` means unknown and leaves the upper bound out.

    Raises:
        RowError: an id lies outside.
    """
    ids = branch.token_ids
    if len(ids) and (int(ids.min()) < 0 or (vocab_size and int(ids.max()) >= vocab_size)):
        at = int(np.flatnonzero((ids < 0) | ((ids >= vocab_size) & (vocab_size > 0)))[0])
        raise RowError(f"token {at} has id {ids[at]}, the vocabulary has {vocab_size} ids",
                       fix="record the ids of the engine's own tokenizer, and its size as vocab_size")


def _check_branch(branch: Branch, episode: Episode, parents: dict[int, Branch]) -> None:
    """All rules of one branch; errors name the row."""
    try:
        check_row(branch)
        check_vocabulary(branch, episode.vocab_size)
        _check_kept(branch)
        _check_fork(branch, parents)
        _check_prompts(branch)
    except RowError as error:
        where = f"branch {branch.branch_id} of episode {episode.episode_id}"
        raise RowError(f"{where}: {error.what}", fix=error.fix) from None


def _check_kept(branch: Branch) -> None:
    """Rule (i): one count per sampled token, counts sum to the ids, ids ascend and hold the sampled one."""
    ids, counts = branch.kept_ids, branch.kept_counts
    if ids is None and counts is None:
        return
    if ids is None or counts is None:
        raise RowError("only one of kept_ids and kept_counts is set", fix="set both, or neither")
    if ids.dtype != np.int32 or counts.dtype != np.int32 or ids.ndim != 1 or counts.ndim != 1:
        raise RowError(f"kept sets are {ids.dtype} and {counts.dtype}", fix="use flat int32 arrays")
    if len(counts) != branch.n_sampled or int(counts.sum()) != len(ids) or (counts < 0).any():
        raise RowError(f"{len(counts)} kept counts with sum {int(counts.sum())} for {branch.n_sampled} sampled tokens "
                       f"and {len(ids)} kept ids", fix="record one count per sampled token, 0 where nothing was cut")
    sampled = np.flatnonzero(np.isin(branch.token_kind, _SAMPLED))
    token = np.repeat(np.arange(len(counts)), counts)
    if (np.diff(ids)[np.diff(token) == 0] <= 0).any():
        raise RowError("the kept ids of a token do not ascend", fix="sort them and drop duplicates")
    hit = np.bincount(token[ids == branch.token_ids[sampled][token]], minlength=len(counts))
    if ((counts > 0) & (hit == 0)).any():
        at = int(sampled[np.flatnonzero((counts > 0) & (hit == 0))[0]])
        raise RowError(f"sampled token {at} lies outside its own kept set",
                       fix="mark the call untrainable: token_outside_kept_set")
    alone = sampled[counts == 1]
    if (branch.logprobs[alone] < -1e-4).any():
        raise RowError("a token that was the only one kept has a log-prob other than 0",
                       fix="store log-probs of the truncated, renormalised distribution")


def _check_fork(branch: Branch, parents: dict[int, Branch]) -> None:
    """Rule (j): a child repeats its parent up to ``fork_at`` and samples nothing there."""
    if branch.parent_branch_id is None:
        return
    parent, fork = parents.get(branch.parent_branch_id), branch.fork_at or 0
    if parent is None:
        raise RowError(f"its parent branch {branch.parent_branch_id} is not an earlier branch of the episode",
                       fix="append all branches of an episode together, parents first")
    same = np.array_equal(parent.token_ids[:fork], branch.token_ids[:fork])
    if fork > min(len(parent.token_ids), len(branch.token_ids)) or not same:
        raise RowError(f"it differs from its parent before fork_at={fork}", fix="fork at the longest common prefix")
    if np.isin(branch.token_kind[:fork], _SAMPLED).any():
        raise RowError(f"it has sampled tokens before fork_at={fork}",
                       fix="give inherited tokens kind 0: they are trained once, in the parent")


def _check_prompts(branch: Branch) -> None:
    """Rule (k): each ``prompt_sha256`` hashes the tokens before its call ("" leaves it out)."""
    digest, done = hashlib.sha256(), 0
    data = np.ascontiguousarray(branch.token_ids, "<i4")
    for call in branch.calls:
        digest.update(data[done:call.start].data)
        done = call.start
        if call.prompt_sha256 and call.prompt_sha256 != digest.hexdigest():
            raise RowError(f"call {call.call_id} was sent another prompt than the {call.start} tokens before it",
                           fix="fork a branch when a prompt does not extend the tokens recorded so far")
