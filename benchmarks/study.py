"""A study: the same training run for several arms and seeds, and its results as one table.

Every run is an ordinary run folder, ``OUT/<arm>/<seed>``; a run that was stopped goes on, a finished one is left alone,
so a study may be stopped at any time and continued with more seeds, on another machine from its table. Seeds come
before arms: after each round of seeds every arm has as many. The table has one row per evaluation: :data:`COLUMNS`.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from agentsdpo.config import RunConfig, from_mapping
from agentsdpo.errors import LearnError, NotFinite, NothingToLearn
from agentsdpo.files import write_bytes, write_text
from agentsdpo.loop import train
from agentsdpo.results import commits, settings_of, starts_of
from agentsdpo.track import read_metrics
from agentsdpo.types import Json

COLUMNS = pa.schema([
    ("study", pa.string()), ("arm", pa.string()), ("preset", pa.string()), ("staleness", pa.int64()),
    ("seed", pa.int64()), ("step", pa.int64()), ("episodes", pa.int64()), ("env_steps", pa.int64()),
    ("wall_s", pa.float64()), ("split", pa.string()), ("decoding", pa.string()), ("n", pa.int64()),
    ("pass", pa.float64()), ("score", pa.float64()), ("commit", pa.string()), ("hardware", pa.string())])
"""``step`` optimiser steps; ``episodes``, ``env_steps`` (calls of tools) and ``wall_s`` spent until then; ``n``
episodes of this evaluation, their ``pass`` rate and mean ``score`` as fractions."""
ENDED = "ENDED"
"""File of a run that could not be trained to its end, with the reason: non-finite numbers, or every row gated away."""
HEAVY = ("replay", "policies", "checkpoint")
"""What a finished run no longer needs: its numbers are in metrics.jsonl."""


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: short, of the figures' legends and of the run folder.
        sets: overrides of the study's common settings, ``learn.lr=1e-4``.
    """

    name: str
    sets: tuple[str, ...]

    def config(self, common: Mapping[str, Any], seed: int) -> RunConfig:
        """Settings of one run.

        >>> Arm("a", ("learn.lr=1e-4",)).config({"steps": 5, "learn": {"batch": 8}}, seed=3).learn.batch
        8
        """
        return from_mapping(common, (*self.sets, f"name={self.name}", f"seed={seed}"))


def run_study(arms: Sequence[Arm], common: Mapping[str, Any], seeds: Iterable[int], out: Path,
              known: Container[tuple[str, int]] = ()) -> None:
    """Train what is missing, one run after the other; progress goes to stderr.

    Args:
        arms: what to train. common: settings of all of them. seeds: of each.
        out: run folders are made below it.
        known: (arm, seed) that need not be run: their results are there already, see :func:`in_table`.
    """
    runs = [(arm.config(common, seed), out / arm.name / str(seed)) for seed in seeds for arm in arms]
    left = [(config, folder) for config, folder in runs
            if (config.name, config.seed) not in known and not is_done(folder)]
    began = time.monotonic()
    for done, (config, folder) in enumerate(left):
        each = (time.monotonic() - began) / done if done else 0.0
        more = f"; {each:.0f} s a run, {each * (len(left) - done) / 60:.0f} min left" if done else ""
        print(f"{len(runs) - len(left) + done + 1} of {len(runs)}: {config.name}, seed {config.seed}{more}",  # noqa: T201
              file=sys.stderr, flush=True)
        run_one(config, folder)


def run_one(config: RunConfig, folder: Path) -> None:
    """Train one run, or go on with it; a collapse that ends it early is a result, written down, not raised.

    Raises:
        AgentSdpoError: whatever else :func:`agentsdpo.loop.train` raises; nothing is written down then.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        train(config, out=folder, resume=(folder / "config.toml").exists(), mode="none")
    except LearnError as error:
        if not isinstance(error, NotFinite) and not isinstance(error.__cause__, NothingToLearn):
            raise
        write_text(folder / ENDED, f"{error}\n")
    for name in HEAVY:
        shutil.rmtree(folder / name, ignore_errors=True)


def is_done(folder: Path) -> bool:
    """Whether a run came to its end, good or bad."""
    return (folder / "FINISHED").exists() or (folder / ENDED).exists()


def in_table(path: Path) -> set[tuple[str, int]]:
    """(arm, seed) of every run whose results a table holds; none without the file."""
    rows = pq.read_table(path, columns=["arm", "seed"]).to_pylist() if path.exists() else []
    return {(row["arm"], row["seed"]) for row in rows}


def table(study: str, out: Path) -> pa.Table:
    """All evaluations of the finished runs under a folder."""
    folders = [path.parent for path in sorted(out.glob("*/*/config.toml")) if is_done(path.parent)]
    return pa.Table.from_pylist([row for folder in folders for row in _rows(study, folder)], COLUMNS)


def _rows(study: str, folder: Path) -> list[Json]:
    settings, starts = settings_of(folder), starts_of(folder)
    machines = {start.get("hardware", start["platform"]) for start in starts}  # an older run knows its system alone
    about = {"study": study, "arm": settings["name"], "preset": settings["preset"], "seed": settings["seed"],
             "staleness": settings["staleness"], "commit": commits(starts) or "",
             "hardware": "; ".join(sorted(machines))}
    return [{**row, **about} for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == "eval"]


def write_table(found: pa.Table, path: Path) -> None:
    """Write results; runs that only the file has stay in it (another machine's), with the columns of ``found``."""
    if path.exists():
        now = {(row["arm"], row["seed"]) for row in found.select(["arm", "seed"]).to_pylist()}
        old = [row for row in pq.read_table(path).to_pylist() if (row["arm"], row["seed"]) not in now]
        found = pa.concat_tables([pa.Table.from_pylist(old, found.schema), found])
    found = found.sort_by([(name, "ascending") for name in ("arm", "seed", "step", "split", "decoding")])
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = BytesIO()
    pq.write_table(found, buffer, compression="zstd")
    write_bytes(path, buffer.getvalue())


# ------------------------------------------------------------------------------------------------------ command line


@dataclass(frozen=True)
class Study:
    """A study as a command: :func:`options` reads what is asked for, :func:`carry_out` does it.

    Attributes:
        name: of its run folders and in the table.
        arms: by name; those of ``main`` run when none are named.
        common: settings of all arms. quick: overrides for a look at whether it runs.
        lines: what a table of results says, for people.
    """

    name: str
    arms: Mapping[str, Arm]
    main: tuple[str, ...]
    common: Json
    quick: tuple[str, ...]
    lines: Callable[[pa.Table], Iterator[str]]

    @property
    def results(self) -> Path:
        """Where its results are kept in the repository."""
        return Path(f"docs/results/{self.name}.parquet")


def options(study: Study, about: str | None) -> argparse.ArgumentParser:
    """The command line of a study; ``about`` is the docstring of its module."""
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=list(study.arms), default=list(study.main),
                        help=f"these; {', '.join(study.main)} if not given")
    parser.add_argument("--seeds", type=int, help="0 to this, exclusive; 5, or 1 when quick")
    parser.add_argument("--quick", action="store_true", help="a few steps and episodes: a look, not a result")
    parser.add_argument("--out", type=Path, help=f"run folders; runs/{study.name}, or that with -quick")
    parser.add_argument("--table", type=Path, help=f"results; {study.results}, or OUT/results.parquet when quick. Runs "
                                                   "it holds are not made again")
    parser.add_argument("--no-run", action="store_true", help="only read what is there")
    return parser


def carry_out(study: Study, args: argparse.Namespace, sets: tuple[str, ...] = ()) -> None:
    """Train what is missing, write the table after each round of seeds, and print what it says.

    Args:
        study: what to do. args: from its :func:`options`. sets: more overrides of every arm.
    """
    out = args.out or Path("runs") / (study.name + "-quick" * args.quick)
    path = args.table or (out / "results.parquet" if args.quick else study.results)
    sets += study.quick if args.quick else ()
    arms = [Arm(name, (*study.arms[name].sets, *sets)) for name in args.arms]
    for seed in range(0 if args.no_run else args.seeds or (1 if args.quick else 5)):
        run_study(arms, study.common, [seed], out, in_table(path))
        write_table(table(study.name, out), path)
    if not path.exists():
        sys.exit(f"there are no results at {path}: leave out --no-run, or name others with --table")
    for line in study.lines(pq.read_table(path)):
        print(line)  # noqa: T201
