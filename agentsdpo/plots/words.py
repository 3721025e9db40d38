"""Answers in words, computed from the rows that a figure draws; a notebook opens with one."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import numpy as np

from agentsdpo.formats import interval, is_number, number, percent
from agentsdpo.plots.curves import by_seed
from agentsdpo.plots.tables import NEVER, arms_of, final, held_out, judged, kind_of, main_kind, records
from agentsdpo.plots.tokens import PARTS, by_hint, corrections_kept, episode_means, part_shares
from agentsdpo.results import CONTROL_SPLIT, HELD_OUT, POOLED_WORDS, SPLIT_WORDS, criteria_names, evals
from agentsdpo.stats import Interval, difference
from agentsdpo.types import Json


@dataclass(frozen=True)
class Words:
    """A text that notebooks show as Markdown."""

    text: str = field(repr=False)

    def _repr_markdown_(self) -> str:
        return self.text

    def __str__(self) -> str:
        return self.text


def _rate(found: Interval | None) -> str:
    return f"{percent(found.estimate)} {interval(found)}".strip() if found else "an unknown share"


def learning_answer(rows: Sequence[Json]) -> Words:
    """Whether one run, or several seeds of it, learned: held-out rates before and after, and the control.

    A seed that ended early counts with the last that was seen of it.
    """
    if not evals(rows):
        return Words("Nothing was evaluated yet.")
    first, last = min(row["step"] for row in evals(rows)), max(row["step"] for row in evals(rows))
    splits = judged([row for row in rows if row.get("step") == last])
    before, after = held_out(rows, step=first, splits=splits), held_out(rows, splits=splits)
    verdict = "**Yes.**" if before and after and difference(after, before).low > 0 else "**Not visibly.**"
    where = (f"{POOLED_WORDS}," if set(splits) == set(HELD_OUT) else
             " and ".join(f"{SPLIT_WORDS[split]} (`{split}`)" if split in SPLIT_WORDS else f"`{split}`"
                          for split in splits))
    return Words(f"{verdict} The pass rate on {where} goes from {_rate(before)} to {_rate(after)} after "
                 f"{_spent(rows)} episodes ({_sample(rows, last, splits)}). {_control(rows, first)}".strip())


def _spent(rows: Sequence[Json]) -> str:
    """Episodes that each seed collected, the least and the most where they differ."""
    each = sorted(max(row.get("episodes") or 0 for row in own) for own in by_seed(evals(rows)).values())
    return " to ".join(number(int(count)) for count in dict.fromkeys((each[0], each[-1])))


def _sample(rows: Sequence[Json], step: int, splits: Sequence[str]) -> str:
    """What stands behind a rate."""
    seeds = len(final(rows, splits=splits))
    if seeds > 1:
        return f"IQM over {seeds} seeds and the splits, 95 % stratified bootstrap interval"
    n = sum(row["n"] for row in evals(rows, None, "sampled") if row["step"] == step and row["split"] in splits)
    return f"n = {n} episodes, one seed, Wilson's 95 % interval"


def _control(rows: Sequence[Json], first: int) -> str:
    """What the firm whose rules were never taught says, in the seeds that it was asked in before and after."""
    own = [row for row in evals(rows, CONTROL_SPLIT, "sampled") if is_number(row.get("pass"))]
    before = {row["seed"]: row["pass"] for row in own if row["step"] == first}
    after = {seed: row["pass"] for seed, (row,) in final(own, splits=[CONTROL_SPLIT]).items() if row["step"] > first}
    both = before.keys() & after.keys()
    if not both:
        return ""
    rates = (percent(float(np.mean([one[seed] for seed in both]))) for one in (before, after))
    return f"In a firm whose rules were never taught it goes from {' to '.join(rates)}."


def age_answer(frame: Any, *, main: str = "robust") -> Words:
    """How old data may be: the main kind of arm at its freshest and at every other age, then the others at theirs.

    ``main`` is chosen as :func:`agentsdpo.plots.age_curve` does.
    """
    arms = arms_of(records(frame))
    main = main_kind(arms, main)
    ends = {name: (rows[0]["staleness"], held_out(rows), len(final(rows))) for name, rows in arms.items()}
    own = {name: end for name, end in ends.items() if kind_of(name) == main and end[1]}
    others = {name: end for name, end in ends.items() if kind_of(name) != main and end[1]}
    if not own:
        return Words(f"No arm of the kind `{main}` has finished yet.")
    text = (f"`{main}` passes on held-out tasks: {_told(own.values())}.{_oldest(list(own.values()))}")
    for kind in dict.fromkeys(map(kind_of, others)):
        text += f" `{kind}`: {_told(end for name, end in others.items() if kind_of(name) == kind)}."
    seeds = sorted({n for _, _, n in ends.values()})
    return Words(f"{text} Seeds an arm: {' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))}; IQM over seeds "
                 "and splits with its 95 % stratified bootstrap interval, Wilson's over the episodes of a single seed.")


def _told(ends: Iterable[tuple[float, Interval | None, int]]) -> str:
    return "; ".join(f"{_age(age)} {_rate(found)}" for age, found, _ in ends)


def _age(staleness: float) -> str:
    return "from the first policy alone" if staleness >= NEVER else f"at staleness {staleness:.0f}"


def _oldest(ends: Sequence[tuple[float, Interval | None, int]]) -> str:
    """The oldest data that, as all before it, leaves a rate which cannot be told from the freshest arm's."""
    fresh = ends[0][1]
    kept = [age for age, _, _ in takewhile(
        lambda end: fresh and end[1] and not difference(fresh, end[1]).low > 0, ends[1:])]
    if not kept:
        return ""
    oldest = f"Even {_age(kept[-1])}" if kept[-1] >= NEVER else f"Up to staleness {kept[-1]:.0f}"
    return f" **{oldest} it cannot be told from the freshest.**"


def hint_answer(frame: Any) -> Words:
    """What the hint teaches: where the loss lives, and whether another hint would have taught the same."""
    hints = by_hint(records(frame))
    names, own = list(hints), next(iter(hints.values()))
    shares = part_shares(own)
    most = max(shares, key=lambda part: shares[part][1])
    changed = [row for row in own if row["teacher_best"] != row["text"]]
    kept = corrections_kept(hints)
    sizes = {name: float(np.mean(list(episode_means(rows).values()))) for name, rows in hints.items()}
    controls = "; ".join(f"with {name} it asks for {_rate(kept[name])} of them and moves {sizes[name]:.2f} nats per "
                         "token" for name in names[1:])
    verdict = ("Most of the corrections are the hint's own." if all(kept[name].high < 0.5 for name in names[1:])
               else "Other hints ask for much the same.")
    return Words(f"With {names[0]} the teacher would have written another token in **{len(changed)} of {len(own)}** "
                 f"places, and **{percent(shares[most][1])} of the gradient weight** lies on {PARTS[most]}, which are "
                 f"{percent(shares[most][0])} of the tokens ({sizes[names[0]]:.2f} nats per token, n = "
                 f"{len(episode_means(own))} episodes). The same places under the controls: {controls}. **{verdict}**")


def wishes(frame: Any, limit: int = 12) -> Words:
    """A table of the tokens that weigh most: what was written, and what each teacher holds likeliest there."""
    hints = by_hint(records(frame))
    keyed = {name: {(row["episode"], row["branch"], row["token"]): row for row in rows} for name, rows in hints.items()}
    own = sorted((row for row in next(iter(hints.values())) if row["teacher_best"] != row["text"]),
                 key=lambda row: -abs(row["weight"]))[:limit]
    lines = [["task", "turn", "written", *(f"teacher with {name}" for name in hints)], ["---"] * (3 + len(hints))]
    for row in own:
        at = (row["episode"], row["branch"], row["token"])
        lines.append([row["task"], str(row["turn"]), f"`{row['text'].strip()}`",
                      *(f"`{found[at]['teacher_best'].strip()}`" if at in found else "" for found in keyed.values())])
    return _table(lines)


def card_answer(reports: Mapping[str, Json]) -> Words:
    """How good an agent is: pass@1, reliability over all attempts, the criteria it misses most, what can be told."""
    (name, last), attempts = list(reports.items())[-1], list(reports.values())[-1]["attempts"]
    known = last["overall"]["conditional"]
    words = [f"**{name} passes {_known(known['pass@1'])} of attempts**"]
    power = max((int(key[5:]) for key in known if key.startswith("pass^")), default=1)
    if power > 1:
        words.append(f" and passes all of {power} attempts on {_known(known[f'pass^{power}'])} of the tasks")
    words.append(f" ({last['overall']['n_tasks']} tasks, {attempts} attempts each, 95 % interval by worlds).")
    if len(reports) > 1:
        other, first = next(iter(reports.items()))
        words.append(f" {other}: {_known(first['overall']['conditional']['pass@1'])}.")
    counts = {name: [task["criteria"].get(name, (0, 0)) for task in last["tasks"]] for name in criteria_names(last)}
    shares = {name: sum(met for met, _ in own) / asked for name, own in counts.items()
              if (asked := sum(judged for _, judged in own))}
    worst = min(shares.values(), default=1.0)
    if worst < 1:
        names = ", ".join(f"`{criterion}`" for criterion, share in shares.items() if share == worst)
        words.append(f" Missed most: {names}, met in {percent(worst)} of attempts.")
    if known["pass@1"]["detectable"] is not None:
        words.append(f" Another such run would have to differ by {100 * known['pass@1']['detectable']:.1f} points to "
                     "be told apart.")
    return Words("".join(words))


def _known(found: Json) -> str:
    """One number of a report."""
    return _rate(None if found["partial"] is None else Interval(found["partial"], found["low"], found["high"]))


def card_stamps(reports: Mapping[str, Json]) -> Words:
    """What each run was made with, as a table: enough to make it again, or to see why two cannot be compared."""
    lines: dict[str, list[str]] = {}
    for report in reports.values():
        told = {"benchmark": report["benchmark"], "tasks": report["dataset"]["sha256"][:16],
                "agent": report["agent"]["name"], "engine": report["agent"].get("engine", ""),
                "profile": report["profile"]["name"], "budgets": report["budgets"]["sha256"][:16],
                "judge": report["grading"]["judge"].get("model") or "programs", "attempts": report["attempts"],
                "seed": report["seed"], "unscored": sum(report["overall"]["n_unscored"].values()),
                "commit": str(report["environment"].get("commit"))[:7],
                "command": " ".join(report["environment"].get("command") or [])}
        for key, value in told.items():
            lines.setdefault(key, []).append(f"`{value}`" if key == "command" else str(value))
    rows = [["", *reports], ["---"] * (1 + len(reports)), *([key, *values] for key, values in lines.items())]
    return _table(rows)


def _table(lines: Sequence[Sequence[str]]) -> Words:
    return Words("\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines))
