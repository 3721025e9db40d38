"""What verbs share: options, the words of an end that was not planned, a folder whose modules can be found."""

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from agentsdpo.errors import AgentSdpoError
from agentsdpo.files import FULL


def override(example: str) -> Any:
    """The option ``--set`` of a verb, with one of the settings that the verb has."""
    return typer.Option("--set", metavar="KEY=VALUE",
                        help=f"Override one setting, as in --set {example}; may be repeated.")


Sets = Annotated[list[str] | None, override("learn.lr=1e-4")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of words.")]


def find_here() -> None:
    """Let modules of the folder this was called from be imported, after all installed ones."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)


@contextmanager
def keeping(folder: Path, *, resume: str | None) -> Iterator[None]:
    """Let modules of this folder be imported; on Ctrl-C and on a full disk, say what is kept and how to go on.

    Args:
        folder: of the run.
        resume: the flag with which the verb goes on with a run; None when it does so by itself.
    """
    find_here()
    try:
        yield
    except KeyboardInterrupt:
        stopped(f"; {_way_on(folder, resume)}")
    except OSError as error:
        if isinstance(error, AgentSdpoError) or error.errno not in FULL:
            raise
        fail(f"{full(error)} free some space; {_way_on(folder, resume)}", 1)


def _way_on(folder: Path, resume: str | None) -> str:
    """What is kept and the command that goes on with it."""
    words = [word for word in sys.argv[1:] if word != resume]
    begun = (folder / "config.toml").is_file() or any(folder.glob("arms/*/config.toml"))
    again = shlex.join(["agentsdpo", *words, *([resume] if resume and begun else [])])
    kept = (f"finished episodes and the newest checkpoint are kept in {folder}, go on" if begun
            else "nothing was done yet, start again")
    return f"{kept} with: {again}"


def full(error: OSError) -> str:
    """A full disk, in words."""
    return f"the disk is full{f' while writing {error.filename}' if error.filename else ''} ({error.strerror});"


def stopped(more: str) -> NoReturn:
    """The end after Ctrl-C; a second one while libraries tidy up would only print their traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    fail(f"stopped{more}", 1)


def fail(message: str, code: int) -> NoReturn:
    """One sentence on stderr, then the exit code."""
    typer.echo(f"agentsdpo: {message}", err=True)
    sys.exit(code)
