"""Leaf through a store: pages of episodes, and one episode at a time in the pager."""

import io
import os
import pydoc
from collections.abc import Callable
from contextlib import redirect_stdout

from agentsdpo.errors import AgentSdpoError
from agentsdpo.replay.cli import view
from agentsdpo.replay.cli.base import Out
from agentsdpo.replay.snapshot import Snapshot
from agentsdpo.replay.store import ReplayStore
from agentsdpo.types import Json

PAGE = 20
"""Episodes on one page."""
HELP = "number: show it · n, p: next, previous page · /EXPR: filter, / alone: all · q: leave"


class Browser:
    """One person's walk through one snapshot, the newest episodes first.

    Args:
        store: what is looked at.
        out: where pages are printed.
        where: filter to begin with.
        ask: reads one answer; raises EOFError when there is no more.
        page: shows a long text.

    Raises:
        ConfigError: ``where`` cannot be read.
    """

    def __init__(self, store: ReplayStore, out: Out, *, where: str | None = None, ask: Callable[[str], str] = input,
                 page: Callable[[str], None] = pydoc.pager) -> None:
        self._store, self._out, self._ask, self._page = store, out, ask, page
        self._view: Snapshot = store.snapshot()
        self._episodes, self._at = self._find(where), 0
        os.environ.setdefault("LESS", "-R")  # else less shows colours as codes

    def _find(self, where: str | None) -> list[Json]:
        """One entry per attempt at an episode, the newest first; its first branch speaks for it."""
        order = [("t_stored", "descending"), ("episode_id", "ascending"), ("branch_id", "ascending")]
        found: dict[tuple[str, int], Json] = {}
        for row in self._view.scalars(where).sort_by(order).to_pylist():
            found.setdefault((row["episode_id"], row["attempt"]), row)
        return list(found.values())

    def run(self) -> None:
        """Go on until the person leaves."""
        self._print()
        while True:
            try:
                answer = self._ask(f"{HELP}\n> ").strip()
            except EOFError:
                return
            if answer in ("q", "quit", "exit"):
                return
            try:
                self._answer(answer)
            except AgentSdpoError as error:
                self._out.say(str(error))

    def _answer(self, answer: str) -> None:
        """Do what was asked for."""
        if answer.isdecimal() and 1 <= int(answer) <= len(self._episodes):
            self._show(self._episodes[int(answer) - 1])
            return
        if answer.startswith("/"):
            self._episodes, self._at = self._find(answer[1:].strip() or None), 0
        elif answer in ("n", "") and self._at + PAGE < len(self._episodes):
            self._at += PAGE
        elif answer == "p":
            self._at = max(self._at - PAGE, 0)
        elif answer:
            self._out.say(f"{answer!r} is none of these")
        self._print()

    def _print(self) -> None:
        page = self._episodes[self._at:self._at + PAGE]
        names = ("task_id", "status", "reward", "n_turns", "n_tokens", "policy_version_min")
        self._out.table(["", "episode", "task", "status", "reward", "turns", "tokens", "policy"],
                        [[str(self._at + i), row["episode_id"][:13], *(row[name] for name in names)]
                         for i, row in enumerate(page, 1)])
        self._out.say(f"{min(self._at + 1, len(self._episodes))} to {self._at + len(page)} of {len(self._episodes)}")

    def _show(self, row: Json) -> None:
        shown = view.load(self._store, self._view, row["episode_id"], attempt=row["attempt"])
        with redirect_stdout(io.StringIO()) as text:
            view.render(self._out, shown, "text", None)
        self._page(text.getvalue())
