"""What is published of the package is the package: it installs and works from nothing else."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parent.parent
STRAY = ("shared/model.safetensors", "run/checkpoint/model.safetensors", ".venv/lib/x.py", "x.log")
"""What may lie beside the package in a folder that it is built in."""


def ran(*command: object, cwd: Path | None = None) -> str:
    """The output of a command in which nothing but its own files are on Python's path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist, made in a folder full of other things, and a wheel, made of the
    sdist."""
    tmp = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".venv*", ".git", "__pycache__", ".*_cache", "build", "dist")
    tree = Path(shutil.copytree(ROOT, tmp / "tree", ignore=left_out))
    for name in STRAY:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("x")
    ran(sys.executable, "-m", "venv", tmp / "tool")
    python = tmp / "tool" / "bin" / "python"
    ran(python, "-m", "pip", "install", "--quiet", "build")
    ran(python, "-m", "build", "--outdir", tmp / "dist", tree)
    return tmp / "dist"


@pytest.mark.slow
def test_an_sdist_and_a_wheel_hold_the_package_and_nothing_that_lies_beside_it(built: Path) -> None:
    (sdist,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    with ZipFile(wheel) as archive_of_wheel:
        packed = set(archive_of_wheel.namelist())
    assert not names & set(STRAY) and "pyproject.toml" in names
    tracked = {
        path.relative_to(ROOT).as_posix()
        for folder in ("src", "tests", "scripts", "recipes", "docs")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert tracked <= names
    assert {name for name in packed if not name.startswith("symphony_moe/")} <= {
        name for name in packed if ".dist-info/" in name
    }
    ours = {name.removeprefix("src/") for name in tracked if name.startswith("src/symphony_moe/")}
    assert ours <= packed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_what_is_published_installs_and_runs_the_demo(
    kind: str, built: Path, tmp_path: Path
) -> None:
    """In an environment that has the package from that file alone, and all others from this one's
    folder; the demo, with less text."""
    (published,) = built.glob(kind)
    ran(sys.executable, "-m", "venv", "--without-pip", tmp_path / "fresh")
    binaries = tmp_path / "fresh" / "bin"
    pip = [built.parent / "tool" / "bin" / "python", "-m", "pip", "--python", binaries / "python"]
    ran(*pip, "install", "--quiet", "--no-deps", published)
    (library,) = (tmp_path / "fresh" / "lib").glob("python*/site-packages")
    # What a .pth file names is searched; the .pth files in there are not read.
    (library / "others.pth").write_text(sysconfig.get_path("purelib"))
    code = "import symphony_moe.bundled as b; print(b.__file__, b.demo_recipe(), sep='\\n')"
    where, recipe = ran(binaries / "python", "-c", code, cwd=tmp_path).splitlines()
    assert Path(where).is_relative_to(library)
    assert "4 x llama -> mixtral" in ran(binaries / "symphony", "plan", recipe, cwd=tmp_path)
    less = ["calibration.tokens=4096", "fit.epochs=1", "train.tokens=4096"]
    sets = [word for one in (*less, "evaluation.tokens=2048") for word in ("--set", one)]
    shown = ran(binaries / "symphony", "demo", *sets, cwd=tmp_path)
    assert "report:" in shown and "paper's, trained" in shown
    assert (tmp_path / "symphony-demo" / "report.html").is_file()
