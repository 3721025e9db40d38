"""The shape of the house, read from the syntax tree of every module: imports go one way, files stay short."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("envs", "replay", "collect", "hint", "learn", "publish", "programs", "benchmarks")
BASE = ("__init__", "record", "types", "errors", "calls", "chat", "frames", "files", "settings", "settings_io",
        "metrics")
RANKS = {"envs": 1, "replay": 1, "collect": 2, "hint": 2.5, "learn": 2, "publish": 2, "loop": 4, "demo": 4, "verbs": 5,
         "programs": 4, "cli": 5, "__main__": 5, "benchmarks": 5, **dict.fromkeys(BASE, 0)}
BETWEEN = 3
"""Modules at the top of the package that are not named above (configuration, reports, ...): rooms below, loop above."""
TORCH = ("learn/", "collect/inprocess.py", "collect/sampler.py", "collect/slots.py", "benchmarks/",
         "envs/desk/build_seed.py")
"""Where torch may be imported: learner, in-process engine, measurements, and the script that trains the seed model."""
IN_VLLM = "publish/in_vllm/"
"""What vLLM loads into its own processes."""
MAX_FILE, MAX_FUNCTION = 400, 80


def modules() -> list[Path]:
    folders = [ROOT / "agentsdpo" / room for room in (*ROOMS, "plots", "show", "verbs")]
    found = [*(ROOT / "agentsdpo").glob("*.py"), *(p for folder in folders for p in folder.rglob("*.py"))]
    return sorted(path.relative_to(ROOT / "agentsdpo") for path in found)


def tree(module: Path) -> ast.Module:
    return ast.parse((ROOT / "agentsdpo" / module).read_text(), filename=str(module))


def imports(node: ast.AST) -> Iterator[str]:
    """Dotted names imported anywhere below a node, but for those that only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            assert child.module
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from imports(child)


def home(name: str) -> str:
    """Room or top-level module of a dotted name inside the package."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and ((ROOT / "agentsdpo" / parts[1]).is_dir() or (
        ROOT / "agentsdpo" / f"{parts[1]}.py").is_file()) else "__init__"


def rank(place: str) -> float:
    return RANKS.get(place, BETWEEN)


@pytest.mark.parametrize("module", modules(), ids=str)
def test_imports_go_one_way(module: Path) -> None:
    own = module.parts[0].removesuffix(".py")
    for name in imports(tree(module)):
        if name.split(".")[0] == "agentsdpo":
            other = home(name)
            assert rank(other) <= rank(own), f"{module} imports {name}, which stands above it"
            sideways = own != other and own in ROOMS and other in ROOMS and rank(own) == rank(other)
            assert not sideways, f"{module} imports {name}: rooms of one level meet in the store, not in code"


@pytest.mark.parametrize("module", modules(), ids=str)
def test_heavy_and_foreign_imports_stay_where_they_belong(module: Path) -> None:
    for name in imports(tree(module)):
        top = name.split(".")[0]
        assert top not in ("envs", "replay", "benchmarks"), f"{module} imports {name}; write agentsdpo.{name}"
        assert top != "pickle", f"{module} imports {top}"
        assert top != "vllm" or str(module).startswith(IN_VLLM), f"{module} imports {top}"
        if top in ("torch", "peft", "accelerate"):
            assert str(module).startswith(TORCH), f"{module} imports {name}"
        if top == "litellm":
            assert module.parts[0] in ("collect", "hint", "benchmarks"), f"{module} imports {name}"


@pytest.mark.parametrize("module", modules(), ids=str)
def test_files_and_functions_stay_short(module: Path) -> None:
    source = tree(module)
    lines = len((ROOT / "agentsdpo" / module).read_text().splitlines())
    assert lines <= MAX_FILE, f"{module} has {lines} lines"
    for node in ast.walk(source):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION, f"{module}: {node.name} has {length} lines"


def test_settings_load_nothing_heavy() -> None:
    """Config classes are read by every verb before any work starts."""
    for module in modules():
        if module.name in ("config.py", "settings.py", "settings_io.py", "presets.py"):
            tops = {name.split(".")[0] for name in imports(tree(module))}
            assert not tops & {"torch", "transformers", "pyarrow", "litellm", "matplotlib"}, module


def test_the_walk_sees_what_it_should() -> None:
    seen = {str(module) for module in modules()}
    assert {"cli.py", "learn/sdpo.py", "envs/desk/world.py", "replay/store.py", "hint/render.py"} <= seen
    code = "from agentsdpo.learn import sdpo\ndef f():\n    import torch.nn\nif TYPE_CHECKING:\n    import vllm\n"
    assert list(imports(ast.parse(code))) == ["agentsdpo.learn.sdpo", "torch.nn"]
    assert home("agentsdpo.learn.sdpo") == "learn"
    assert home("agentsdpo.__version__") == "__init__"
