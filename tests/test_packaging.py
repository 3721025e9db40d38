"""What is shipped: links in the checkout, ordinary folders in wheel and sdist, and a command that runs from them."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from agentsdpo import __version__

ROOT = Path(__file__).resolve().parent.parent
LINKS = ("envs", "replay", "benchmarks")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("name", LINKS)
def test_links_are_relative(name: str) -> None:
    """A source archive without git passes too."""
    link = ROOT / "agentsdpo" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"


@pytest.mark.parametrize("name", LINKS)
def test_bare_names_are_refused(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(rf"ImportError: .*agentsdpo\.{name}", done.stderr.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel of this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    return folder


def shipped() -> set[str]:
    """Files of the package as the checkout holds them, by the names they have once installed."""
    found = [path for folder in (ROOT / "agentsdpo", *(ROOT / "agentsdpo" / name for name in LINKS))
             for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(ROOT)) for path in found}


def test_wheel_holds_the_whole_package_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if not name.startswith(f"agentsdpo-{__version__}.dist-info/")}
        assert names == shipped()
        assert not [info for info in wheel.infolist() if info.external_attr >> 28 == 0xA], "no links inside"
    assert {"agentsdpo/py.typed", "agentsdpo/envs/__init__.py", "agentsdpo/replay/__init__.py"} <= names


def test_sdist_holds_what_the_wheel_is_built_from(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert shipped() <= names
    assert {"pyproject.toml", "LICENSE", "README.md", "constraints.txt", "Makefile"} <= names


def test_installed_wheel_runs_without_the_checkout(built: Path, tmp_path: Path) -> None:
    """A fresh environment; the dependencies are lent from this one, so that nothing is downloaded again."""
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    python = home / "bin" / "python"
    wheel = str(next(built.glob("*.whl")))
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "--python", str(python), "install", "--no-deps",
                    "--no-index", wheel], check=True, capture_output=True)
    packages = next((home / "lib").glob("python*")) / "site-packages"
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    clean = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "COLUMNS": "100"}

    def answer(*command: str) -> str:
        return subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=True).stdout

    assert "train" in answer(str(home / "bin" / "agentsdpo"), "--help")
    assert answer(str(home / "bin" / "agentsdpo"), "--version").strip() == __version__
    assert answer(str(python), "-m", "agentsdpo", "--version").strip() == __version__
    where = answer(str(python), "-c", "import agentsdpo.envs as e, agentsdpo.replay as r, agentsdpo.benchmarks as b;"
                                      "print(*(m.__file__ for m in (e, r, b)), sep='\\n')").split()
    assert where == [str(packages / "agentsdpo" / name / "__init__.py") for name in LINKS]
    assert "max_staleness = 8" in answer(str(home / "bin" / "agentsdpo"), "config")


@pytest.mark.parametrize("state", ["without pip", "python gone"])
def test_make_repairs_a_half_made_environment(tmp_path: Path, state: str) -> None:
    """As left by a Python without ensurepip, or by one that was upgraded since; the install itself is cut short."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    python = tmp_path / ".venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / ".venv")], check=True)
    if state == "python gone":
        python.unlink()
        python.symlink_to(tmp_path / "nowhere")
    done = subprocess.run(["make", "setup", f"PYTHON={sys.executable}"], cwd=tmp_path, capture_output=True, text=True,
                          env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PIP_NO_INDEX": "1"})
    assert done.returncode != 0, "nothing can be installed without an index, so the next make tries again"
    assert not (tmp_path / ".venv" / ".agentsdpo-setup").exists()
    subprocess.run([str(python), "-m", "pip", "--version"], check=True, capture_output=True)


def test_version_is_told_once() -> None:
    assert PROJECT["version"] == __version__
    assert re.search(rf"^## {re.escape(__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_constraints_pin_every_dependency_without_addresses() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines)
    pinned = {line.partition("==")[0] for line in lines}
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]
    assert {re.split(r"[\[<>=~ ]", name)[0].lower() for name in wanted} <= pinned
    assert all(">=" in name and "==" not in name for name in wanted)
    assert not any("<" in name for name in PROJECT["dependencies"]), "ranges are open"
