"""What the pages say is done: blocks of code run, commands are put to the real parser, names and links must exist.

Directives stand in HTML comments right before a block and hold for that block alone:

``file: NAME``      the block is a file of this name in the page's folder; nothing else is done with it.
``not run: WHY``    the block is not run; its commands are still parsed, its Python compiled.

Everything else runs, page by page in order, in a temporary folder: ``python`` blocks in one namespace, ``agentsdpo``
commands of ``bash`` and ``sh`` blocks in this process. ``toml`` blocks must be settings that their reader takes.
"""

import contextlib
import glob
import importlib.util
import itertools
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser
from sybil.parsers.markdown.lexers import DirectiveInHTMLCommentLexer
from sybil.region import Region
from typer.main import get_command
from typer.testing import CliRunner

from agentsdpo import config
from agentsdpo.cli import app
from agentsdpo.errors import ConfigError
from agentsdpo.metrics import TABLE, check_keys

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(str(page.relative_to(ROOT)) for page in (
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("**/*.md")))
MADE = {"docs/configuration.md", "docs/metrics.md", "docs/results.md"}
"""Pages that docs/reference.py writes; tests/test_reference.py compares them with the code."""
SLOW = {"docs/tutorial-environment.md"}
"""Pages that train."""

# ------------------------------------------------------------------------------------------------------------- blocks


def directives(document: Any) -> Iterator[Region]:
    """``file`` and ``not run`` comments; each waits for the next block."""
    for lexed in DirectiveInHTMLCommentLexer("file|not run")(document):
        said = lexed.lexemes["directive"], lexed.lexemes["arguments"].strip()
        yield Region(lexed.start, lexed.end, said, wait)


def wait(example: Example) -> None:
    word, words = example.parsed
    follows = example.document.text[example.region.end:].removeprefix("-->").lstrip()
    assert words, f"{word}: says nothing"
    assert re.match(r"```(python|toml|bash|sh)\n", follows), f"{word}: {words} stands before no block"
    example.namespace[""] = word, words


def block(of: Callable[[Example, bool], None]) -> Callable[[Example], None]:
    """An evaluator that obeys the directive before the block; ``of`` gets the block and whether to run it."""
    def evaluate(example: Example) -> None:
        word, words = example.namespace.pop("", ("", ""))
        if word == "file":
            Path(words).write_text(example.parsed)
        of(example, not word)
    return evaluate


def python(example: Example, run: bool) -> None:
    if run:
        PythonEvaluator()(example)
    else:
        compile(example.parsed, example.path, "exec")


def toml(example: Example, run: bool) -> None:
    """Settings of a run, of a benchmark, or a file of tasks: by what stands in it and on which page."""
    data = tomllib.loads(example.parsed)
    if "task" in data:
        assert set(data["task"][0]) <= {"id", "prompt", "files", "rubric"}
    elif example.path.endswith("benchmark.md") or "attempts" in data:
        from agentsdpo.benchmarks.apex.config import BenchConfig
        from agentsdpo.settings_io import build

        build(BenchConfig, data)
    else:
        config.from_mapping(data)


def shell(example: Example, run: bool) -> None:
    """Every command: parsed, and run in this process where nothing speaks against it."""
    for words in commands(example.parsed):
        if words[0] != "agentsdpo":
            assert not run, f"{words[0]} is not agentsdpo: mark the block with <!-- not run: WHY -->"
            continue
        words = [one for word in words for one in (sorted(glob.glob(word)) if "*" in word else ()) or [word]]
        assert_parsed(words[1:])
        if run:
            result = CliRunner().invoke(app, words[1:], prog_name="agentsdpo")
            said = f"{shlex.join(words)}\n{result.output}{result.exception or ''}"
            assert result.exit_code == 0, said


SYBIL = Sybil([directives, CodeBlockParser("python", block(python)), CodeBlockParser("toml", block(toml)),
               CodeBlockParser("bash", block(shell)), CodeBlockParser("sh", block(shell))])


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a block: lines joined at backslashes, comments and settings of variables left out."""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words:
                words[0] = words[0].removeprefix(".venv/bin/")
                yield words


def verb(words: list[str]) -> tuple[Any, typer.Context, list[str]]:
    """The command that words begin with, where it hangs, and the words after it."""
    command: Any = get_command(app)
    context = None
    while hasattr(command, "commands") and words and re.fullmatch(r"[a-z][a-z-]*", words[0]):
        context = typer.Context(command, info_name="agentsdpo", parent=context)
        found = command.get_command(context, words[0])
        assert found is not None, f"no verb {words[0]!r}"
        command, words = found, words[1:]
    return command, context or typer.Context(command), words


def assert_parsed(words: list[str]) -> None:
    """Put a command to the parser as typed, without doing it; placeholders are the page's own."""
    command, context, left = verb(words)
    with contextlib.suppress(typer.Exit):  # --help, --version
        try:
            command.make_context(words[0], left, parent=context)
        except Exception as error:
            error.add_note(f"agentsdpo {shlex.join(words)}")
            raise


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as in a script that lies in the folder


def stored() -> None:
    """``run/replay`` with three episodes, the last of them E: what docs/replay.md speaks of."""
    from agentsdpo.replay.example import episode
    from agentsdpo.replay.store import ReplayStore

    store = ReplayStore.open("run/replay")
    store.append([episode(0), episode(1), episode(2).model_copy(update={"episode_id": "E-2"})])
    store.close()
    Path("rewards.jsonl").write_text('{"episode_id": "e-1", "reward": 0.75}\n')


def recorded() -> None:
    """``runs/live`` with what a proxy has recorded: conversations that may be trained on, without a hint."""
    from agentsdpo.assemble import assemble
    from agentsdpo.envs.desk import DeskSuite

    run = assemble(config.from_mapping({"name": "traffic"}, ["collect.window=512", "collect.max_tokens=48"]), "played")
    run.restore_or_begin()
    run.load_policy(0)
    assert isinstance(run.suite, DeskSuite)
    run.store.append(run.collector.collect("train", range(8), seed=0))
    run.store.close()
    run.folder.release()
    Path("runs").mkdir()
    Path("played/replay").rename("runs/live")


SCENES = {"docs/replay.md": stored, "docs/tutorial-traffic.md": recorded}
"""What must be there before a page begins."""


@pytest.mark.parametrize("page", [pytest.param(page, marks=pytest.mark.slow if page in SLOW else ()) for page in PAGES])
def test_the_page_does_what_it_says(page: str) -> None:
    SCENES.get(page, lambda: None)()
    for example in SYBIL.parse(ROOT / page):
        try:
            example.evaluate()
        except BaseException as error:
            error.add_note(f"{page}, line {example.line}")
            raise


# -------------------------------------------------------------------------------------------------- names and links


def prose(page: str) -> str:
    """A page without its blocks of code and comments."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


def spans(page: str) -> list[str]:
    """What stands between backticks, on one line or broken over two."""
    return [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", prose(page))]


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_prose_have_these_verbs_and_options(page: str) -> None:
    plain = re.findall(r"^```\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^    (.*)$", prose(page), re.MULTILINE)
    for said in [*spans(page), *indented, *(line for text in plain for line in text.splitlines())]:
        for part in said.split("&&"):
            found = re.match(r"(?:\.venv/bin/)?agentsdpo ([^#|]*)", part.strip())
            if found:
                assert_exists(found.group(1).split(), said)


def assert_exists(words: list[str], said: str) -> None:
    """Verbs and options of a command whose values may be dots and capitals."""
    command, context, words = verb([word.strip("[](),;:") for word in words])
    known = {name for one in command.get_params(context) for name in (*one.opts, *one.secondary_opts)} | {"--help"}
    for word in itertools.takewhile(lambda word: word != "--", words):
        assert not word.startswith("--") or word.split("=")[0] in known, f"{said}: no option {word}"


SETTINGS = {setting.key for setting in config.describe()}
TABLES = {key.rpartition(".")[0] for key in SETTINGS}


@pytest.mark.parametrize("page", PAGES)
def test_settings_in_prose_exist(page: str) -> None:
    for said in spans(page):
        found = re.match(r"(?:--set )?([a-z_]+(?:\.[a-z_]+)+)(?: ?=|$)", said)
        if found and found.group(1).split(".")[0] in TABLES and not re.search(r"\.(py|md|toml|json|html|db)$", said):
            key = found.group(1)
            assert key in SETTINGS | TABLES, f"{page}: no setting {key}"


@pytest.mark.parametrize("page", [page for page in PAGES if page not in MADE])
def test_metrics_in_prose_exist(page: str) -> None:
    rooms = {metric.pattern.split("/")[0] for metric in TABLE}
    known = [key for metric in TABLE for key in metric.spelt_out()]
    for said in spans(page):
        if not re.fullmatch(r"[a-z]+(/[\w.{},*]+)+", said) or said.split("/")[0] not in rooms or is_path(said, page):
            continue
        if said.endswith("/*"):
            assert any(key.startswith(said[:-1]) for key in known), f"{page}: no metrics {said}"
        elif said not in {metric.pattern for metric in TABLE}:
            try:
                check_keys([said], "step")
            except ConfigError as error:
                pytest.fail(f"{page}: {error}")


def is_path(said: str, page: str) -> bool:
    """Whether this is a file of the repository."""
    return any((place / said).exists() for place in (ROOT, ROOT / "agentsdpo", (ROOT / page).parent))


@pytest.mark.parametrize("page", PAGES)
def test_files_in_prose_exist(page: str) -> None:
    homes = "agentsdpo|docs|tests/[a-z]+|benchmarks|envs|replay|collect|hint|learn|publish"
    for said in spans(page):
        if re.fullmatch(rf"({homes})(/[\w.-]+)+\.(py|md|toml|json|html|jinja)", said):
            assert is_path(said, page), f"{page}: no file {said}"


@pytest.mark.parametrize("page", PAGES)
def test_modules_and_targets_to_be_run_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    for name in re.findall(r"python3? -m (agentsdpo[\w.]*)", text):
        assert importlib.util.find_spec(name.rstrip(".")), f"{page}: no module {name}"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name in re.findall(r"(?:^|`|&& )make ([a-z-]+)", text, re.MULTILINE):
        assert name in targets, f"{page}: no target {name}"


def anchors(page: Path) -> set[str]:
    """Headings as GitHub names them; of a module, its functions, classes and constants."""
    if page.suffix == ".py":
        return set(re.findall(r"^(?:async def |def |class |)(\w+)", page.read_text(), re.MULTILINE))
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        assert there.exists(), f"{page}: {target}"
        symbol = there.suffix == ".py"  # of which tests/test_method_pages.py takes care
        assert not anchor or symbol or anchor in anchors(there), f"{page}: {target}"


def test_every_page_can_be_reached_from_the_overview() -> None:
    found, left = set(), [ROOT / "docs" / "README.md"]
    while left:
        page = left.pop()
        if page not in found and page.suffix == ".md" and page.is_relative_to(ROOT / "docs"):
            found.add(page)
            left += [(page.parent / target.partition("#")[0]).resolve()
                     for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in target]
    lost = [page for page in PAGES if page.startswith("docs/") and ROOT / page not in found]
    assert not lost, f"no page that docs/README.md leads to has a link to {', '.join(lost)}"
