r"""The learner alone, on a replay store that others fill: draw, learn, publish; nothing is collected or evaluated.

    agentsdpo learn CONFIG.toml --store URI
    accelerate launch --multi_gpu --num_processes 2 -m agentsdpo.cli learn CONFIG.toml --store URI \
        --set learn.parallel.ranks=2

The store is read, never written. Staleness is counted against the learner's own policy version, which starts at the
newest version in the store and grows with every publish: without fresh episodes all rows are too stale one day, and the
run stops and says so. What others append joins whenever a checkpoint is written, so that a killed run that goes on from
there draws what it drew before; on a store that did not grow it ends with the weights of one that was never killed.
There is no tripwire, which needs evaluations to go by: a step that is not finite ends the run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentsdpo.assemble import make_learner, make_registry, make_sampler, model_path, need_groups
from agentsdpo.audit import require_store_lift
from agentsdpo.config import RunConfig
from agentsdpo.errors import LearnError, TokenizerMismatch
from agentsdpo.learn.load import load_chat
from agentsdpo.learn.parallel import Ranks, join_ranks
from agentsdpo.learn.together import obey
from agentsdpo.learn.trackers import check_trackers
from agentsdpo.learning import REDRAWS, Learning, recording, update
from agentsdpo.replay.layout import missing
from agentsdpo.replay.sampling.index import SideIndex
from agentsdpo.replay.sampling.sampler import Sampler
from agentsdpo.replay.storage import storage_for
from agentsdpo.replay.store import ReplayStore
from agentsdpo.runfolder import open_run
from agentsdpo.show import console
from agentsdpo.signals import uninterrupted
from agentsdpo.types import Json

REASONS = {
    "untrainable": ("without trainable tokens", "collect with an engine that returns token ids and log-probs"),
    "not_allowed": ("of tasks that must not be trained on", "collect tasks whose licence allows training"),
    "tokenizer": ("of another tokenizer", "set model to the one the store was collected with, or one of its family"),
    "template": ("of another chat template", "give the model folder the chat template the store was collected with"),
    "no_logprob": ("without exact behaviour log-probs", "collect with an engine that returns them as sampled"),
    "no_version": ("of unknown policy version", "collect with an engine that says which version sampled"),
    "open_group": ("in groups that are not complete", "wait for their attempts, or set replay.group_mode = \"any\""),
    "stale": ("staler than learn.max_staleness", "collect fresh episodes and go on with --resume, or start a run with "
              "a larger learn.max_staleness or publish.every"),
    "used_up": ("drawn replay.max_uses times", "collect fresh episodes and go on with --resume, or start a run with a "
                "larger replay.max_uses"),
    "resting": ("drawn less than replay.cooldown draws ago", "start a run with a smaller replay.cooldown"),
}
"""Filters of the sampler in words, and what to do when that is what keeps all branches away."""


class Offline(Learning):
    """A learner whose store is filled by others."""

    def refresh(self) -> None:
        """Let what was appended join, and save where that happened."""
        self.sampler.refresh()
        self.checkpoint()

    def feed(self) -> None:
        """Make sure that something can be drawn.

        Raises:
            LearnError, TokenizerMismatch: nothing can, though what was appended joined.
        """
        if not self.sampler.explain(self.version)["eligible"]:
            self.refresh()
            refuse_unfit(self.sampler, self.version, self.store.storage.uri, self.config)

    def unhinted(self) -> LearnError:
        """The error of a step for which no row with a hint can be drawn."""
        return LearnError(f"none of the branches drawn in {REDRAWS} batches of {self.config.learn.batch} has a hint, "
                          f"{self.sampler.explain(self.version)['eligible']} are eligible",
                          fix="add hints with `agentsdpo replay label STORE --from hints.jsonl --kind hint`: without "
                              "one the teacher is the student")


def learn_alone(config: RunConfig, store: Path | str, *, out: Path | str, resume: bool = False,
                mode: str = "auto") -> Json:
    """Learn from a store for ``config.steps`` optimiser steps and return what came of it.

    Args:
        config: resolved settings; ``[collect]``, ``[eval]``, ``[tripwire]`` and the suite are not used.
        store: folder of a replay store or ``s3://bucket/prefix``.
        out: run folder, for metrics, checkpoints and published versions.
        resume: go on with the run in ``out``.
        mode: terminal display, ``auto``, ``plain`` or ``none``.

    Returns:
        ``run``, ``store``, ``steps``, ``version``; ``rows`` and ``tokens`` trained on, ``loss`` of the last step,
        ``wall_s``.

    Raises:
        StoreNotFound: no such store. ModelError, ConfigError, RunError: see the parts.
        LearnError: nothing in the store can be learnt from, or a step is not finite.
        HintError: hints do not help as much as ``hint.min_lift`` asks for.
        TokenizerMismatch: the store was collected with another tokenizer or template.
        KeyboardInterrupt: stopped; all steps up to the newest checkpoint are on disk.
    """
    ranks = join_ranks(config.learn.parallel)
    if ranks.rank:
        obey(make_learner(config, ranks))
    run = assemble_alone(config, store, out, resume=resume, ranks=ranks)
    try:
        with run.together.led():
            summary = turn_over(run, resume=resume, mode=mode)
        run.folder.finish()
    finally:
        run.folder.release()
    return summary


def turn_over(run: Offline, *, resume: bool, mode: str) -> Json:
    """The steps, from where the run stands to its last."""
    config = run.config
    run.restore_or_begin()
    with (recording(run, resume=resume) as metrics, console.training(config.steps, config.name, mode=mode) as view):
        if not resume:
            view.note(standing(run.sampler.explain(run.version), run.version))
        rows = [dict(row) for row in metrics.rows]
        while not run.ends:
            with uninterrupted():
                run.feed()
                row = {"step": run.step + 1, **update(run)}
                metrics.write("step", run.step, {key: value for key, value in row.items() if key != "step"})
                if run.ends:
                    run.checkpoint()
                elif run.step % config.checkpoint_every == 0:
                    run.refresh()
            rows.append(row)
            view.step(row)
        trained = [row for row in rows if "learn/loss" in row]
        return {"run": str(run.folder.path), "store": run.store.storage.uri, "steps": run.step, "version": run.version,
                "rows": sum(row["learn/rows"] for row in rows), "tokens": sum(row["learn/tokens"] for row in rows),
                "loss": trained[-1]["learn/loss"] if trained else None, "wall_s": round(metrics.wall_s, 3)}


def assemble_alone(config: RunConfig, uri: Path | str, out: Path | str, *, resume: bool = False,
                   ranks: Ranks | None = None) -> Offline:
    """Build the parts and the run folder; whatever can be wrong with the request is found before that is made.

    Raises:
        See :func:`learn_alone`.
    """
    need_groups(config)
    check_trackers(config.track)
    path = model_path(config)
    chat, store = load_chat(path), open_store(uri)
    newest = max([0, *(row.version_max for row in store.snapshot().rows.values())])  # -1: unknown
    if not resume:
        refuse_unfit(make_sampler(config, store, chat), newest, store.storage.uri, config)
        require_store_lift(config, store.snapshot())
    learner = make_learner(config, ranks)
    folder = open_run(out, config, resume=resume)
    registry = make_registry(config, folder, chat, first=newest)
    sampler = make_sampler(config, store, chat, index=SideIndex(folder.uses, store.about["store_id"]))
    return Offline(config=config, folder=folder, chat=chat, store=store, sampler=sampler, learner=learner,
                   registry=registry)


def open_store(uri: Path | str) -> ReplayStore:
    """A store that exists.

    Raises:
        StoreNotFound: there is none.
    """
    if not storage_for(uri).exists("STORE.json"):
        raise missing(uri, fix="give --store the folder of one, as RUN/replay of a run is, or s3://bucket/prefix")
    return ReplayStore.open(uri, create=False)


def refuse_unfit(sampler: Sampler, version: int, uri: str, config: RunConfig) -> None:
    """Refuse a store of which nothing can be drawn at a policy version.

    Raises:
        TokenizerMismatch: tokenizer or template of the store are most of the reason.
        LearnError: the store is empty, or another filter is.
    """
    counts = sampler.explain(version)
    if counts["eligible"]:
        return
    if not counts["total"]:
        raise LearnError(f"the store {uri} holds no branch", fix="collect episodes into it, then start again")
    words, chief = why_none(counts)
    about = {"tokenizer": "tokenizer_sha256", "template": "chat_template_sha256"}.get(chief)
    if about:
        theirs = sorted({getattr(row, about) for row in sampler.snapshot.rows.values()})
        words += f" ({', '.join(sha[:12] for sha in theirs)}; that of {config.model!r} is not among them)"
    kind: Any = TokenizerMismatch if about else LearnError
    raise kind(f"none of {counts['total']} branches in the store {uri} can be drawn at policy version {version}: "
               f"{words}", fix=REASONS[chief][1])


def standing(counts: Mapping[str, int], version: int) -> str:
    """How much of a store a run begins with, and how to get at rows that only count as old.

    >>> standing({"total": 12, "tokenizer": 2, "stale": 0, "eligible": 10}, 0)
    '10 of 12 branches can be drawn at policy version 0, 0 are too old'
    """
    words = f"{counts['eligible']} of {counts['total']} branches can be drawn at policy version {version}"
    more = (" for learn.max_staleness, which counts from the newest version in the store, whichever weights this run "
            "begins with; set learn.max_staleness higher to draw them") if counts["stale"] else ""
    return f"{words}, {counts['stale']} are too old{more}"


def why_none(counts: Mapping[str, int]) -> tuple[str, str]:
    """The filters that keep branches away, in words, and the one that keeps most.

    >>> why_none({"total": 5, "tokenizer": 1, "stale": 4, "eligible": 0})
    ('1 of another tokenizer, 4 staler than learn.max_staleness', 'stale')
    """
    found = {name: counts[name] for name in REASONS if counts.get(name)}
    return ", ".join(f"{n} {REASONS[name][0]}" for name, n in found.items()), max(found, key=found.__getitem__)
