"""Experiment trackers, through accelerate: they are told what ``metrics.jsonl`` holds, after it was written there.

``metrics.jsonl`` is the record and is always written; a tracker is a window on it. One that fails is said aloud once
and told nothing more, and the run goes on. A resumed run is a new one to trackio and wandb, with the steps continued.
"""

import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from agentsdpo.errors import ConfigError
from agentsdpo.settings import Settings
from agentsdpo.settings_io import flat
from agentsdpo.types import Json

_log = logging.getLogger(__name__)
_ABOUT = ("kind", "step", "split", "decoding")
"""Fields of a line that say which one it is, and are no numbers of their own."""


class TrackConfig(Settings):
    """Who else is told of the metrics.

    >>> TrackConfig(to=("tensorboard",)).project
    'agentsdpo'
    """

    to: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = Field(default=(), description=(
        "experiment trackers told of every line of metrics.jsonl; tensorboard writes into the run folder"))
    project: str = Field(default="agentsdpo", min_length=1, description="name of the trackers' project")


def check_trackers(config: TrackConfig) -> None:
    """Refuse a tracker whose package is not there.

    Raises:
        ConfigError: names the package and how to install it.
    """
    missing = [name for name in config.to if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"track.to names {missing[0]!r} but that package is not installed",
                          fix=f"pip install {' '.join(missing)}")


@contextmanager
def tracking(config: TrackConfig, *, name: str, folder: Path, settings: Json) -> Iterator[Callable[[Json], None]]:
    """Open the trackers of a run; what they are to be told is given to the function that comes back.

    Args:
        config: which ones.
        name: of the run.
        folder: of the run; ``tensorboard --logdir FOLDER/tensorboard`` shows its curves.
        settings: of the run, shown beside the curves.

    Raises:
        ConfigError: as :func:`check_trackers`.
    """
    check_trackers(config)
    opened: list[Any] = []
    try:
        opened += [_open(one, config, name, folder) for one in config.to]
        for tracker in opened:
            tracker.store_init_configuration(plain(settings))
        yield lambda row: _tell(opened, row)
    finally:
        for tracker in opened:
            _done(tracker, tracker.finish)


def _open(kind: str, config: TrackConfig, name: str, folder: Path) -> Any:
    """One started tracker of accelerate."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # its trackers ask it which process they are in
    make = LOGGER_TYPE_TO_CLASS[kind]
    if kind == "tensorboard":
        tracker = make("tensorboard", logging_dir=str(folder))
    elif kind == "wandb":
        tracker = make(config.project, name=name, dir=str(folder))
    else:
        tracker = make(config.project, name=name)
    tracker.start()
    return tracker


def _tell(opened: list[Any], row: Json) -> None:
    values = scalars(row)
    for tracker in list(opened):
        if not _done(tracker, lambda tracker=tracker: tracker.log(values, step=row["step"])):
            opened.remove(tracker)


def _done(tracker: Any, act: Callable[[], None]) -> bool:
    """Whether a tracker did what it was asked to; what went wrong is said."""
    try:
        act()
    except Exception as error:  # noqa: BLE001 - whatever a tracker raises, the run's own record is complete
        _log.warning("%s failed and is told nothing more of this run, metrics.jsonl is: %s", tracker.name, error)
        return False
    return True


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of one line under the keys trackers get: those of an evaluation carry its split and decoding.

    >>> scalars({"kind": "step", "step": 3, "wall_s": 1.5, "learn/loss": 0.25, "learn/lr": None})
    {'wall_s': 1.5, 'learn/loss': 0.25}
    >>> scalars({"kind": "eval", "step": 3, "split": "val", "decoding": "greedy", "pass": 0.5})
    {'eval/val/greedy/pass': 0.5}
    """
    kind = row["kind"]
    stem = {"step": "", "eval": f"eval/{row.get('split')}/{row.get('decoding')}/"}.get(kind, f"{kind}/")
    return {f"{stem}{key}": value for key, value in row.items()
            if key not in _ABOUT and isinstance(value, int | float) and not isinstance(value, bool)}


def plain(settings: Json) -> dict[str, Any]:
    """Settings with dotted keys; what is no number, text or truth value becomes a text.

    >>> plain({"seed": 0, "learn": {"betas": [0.9, 0.95], "lr": 0.1}})
    {'seed': 0, 'learn.betas': '[0.9, 0.95]', 'learn.lr': 0.1}
    """
    return {key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in flat(settings).items()}
