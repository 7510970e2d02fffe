"""torch for a check on the CPU, without 2 GB of CUDA libraries.

Where the configured package index has a CPU build of torch, that build is installed. PyPI's builds for Linux
on x86-64 load NVIDIA's libraries at import, although nothing calls them on a CPU. For such a build the module

1. installs the wheel (about 530 MB) alone, and the CUDA runtime (2 MB), which reports that there is no GPU;
2. compiles an empty stand-in for every other library, with the names that torch looks up (gcc, readelf);
3. takes the CUDA packages out of torch's metadata, so that pip does not ask for them.

What runs on the CPU is torch's own code. Use such an environment for nothing but this check.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import zipfile
from collections import defaultdict
from pathlib import Path

_CUDA = re.compile(r"^Requires-Dist: (cuda|nvidia|triton)[^\n]*\n", flags=re.MULTILINE)
_RUNTIME = "libcudart"
#: The packages that hold the CUDA runtime of CUDA 12 and of 13.
_RUNTIME_OF = {"12": "nvidia-cuda-runtime-cu12", "13": "nvidia-cuda-runtime"}
#: What unversioned names begin with, by library.
_PREFIXES = {
    "cufile": "cuFile",
    "cusparseLt": "cusparseLt",
    "nccl": "nccl",
    "nvshmem_host": "nvshmem",
    "cusparse": "cusparse",
}


class NoTorchError(Exception):
    """There is no torch for this Python that can run here; the text says why."""


def install(python: Path, requirement: str, *, downloads: Path) -> str:
    """Install torch into an environment.

    Args:
        python: The environment's interpreter.
        requirement: As pip takes it, such as `torch==2.13.0`.
        downloads: A folder for the wheel.

    Returns:
        What was installed, in words.

    Raises:
        NoTorchError: There is none, or the tools for the stand-ins are absent.
    """
    downloads.mkdir(parents=True, exist_ok=True)
    _pip(python, "download", "--no-deps", "--only-binary", ":all:", "--dest", downloads, requirement)
    (wheel,) = downloads.glob("torch-*.whl")
    build = wheel.name.split("-")[1]
    asked = _cuda_version(wheel)
    if asked is None:
        _pip(python, "install", wheel)
        return f"torch {build}, a CPU build"
    if not (shutil.which("gcc") and shutil.which("readelf")):
        raise NoTorchError(f"torch {build} is a CUDA build, and there is no gcc or readelf for stand-ins.")
    _pip(python, "install", "--no-deps", wheel, _RUNTIME_OF[asked])
    site = Path(_output(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    count = _stand_ins(site / "torch/lib", runtime=next(site.glob(f"nvidia/**/{_RUNTIME}.so.*")))
    (metadata,) = site.glob("torch-*.dist-info/METADATA")
    metadata.write_text(_CUDA.sub("", metadata.read_text(encoding="utf-8")), encoding="utf-8")
    _pip(python, "install", wheel.name.split("-")[0] + f"=={build}")  # its dependencies, without CUDA's
    return f"torch {build}, a CUDA build with {count} CUDA libraries replaced by empty stand-ins"


def _cuda_version(wheel: Path) -> str | None:
    """The major version of CUDA that a build needs; None for a CPU build."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        needs = _CUDA.search(text := archive.read(name).decode())
    if needs is None:
        return None
    return "12" if "-cu12" in text else "13"


def _stand_ins(folder: Path, *, runtime: Path) -> int:
    """Put the runtime beside torch's libraries, and a stand-in for each other CUDA library they need."""
    needed, unversioned = _needs(sorted(folder.glob("*.so")))
    shutil.copy(runtime, folder / runtime.name)
    missing = {name: versions for name, versions in needed.items() if not (folder / name).exists()}
    for name, versions in missing.items():
        prefix = _PREFIXES.get(name.split(".")[0].removeprefix("lib"))
        loose = {symbol for symbol in unversioned if prefix and symbol.startswith(prefix)}
        _compile(folder / name, versions, loose)
    return len(missing)


def _needs(libraries: list[Path]) -> tuple[dict[str, dict[str, set[str]]], set[str]]:
    """The CUDA libraries these need, each with its symbols by version; and symbols without a version."""
    needed: dict[str, dict[str, set[str]]] = {}
    unversioned: set[str] = set()
    for library in libraries:
        dynamic = _output("readelf", "-d", library)
        for name in re.findall(r"NEEDED.*\[(lib(?:cu|nccl|nv)[^\]]*)\]", dynamic):
            needed.setdefault(name, defaultdict(set))
        library_of = _versions(_output("readelf", "-W", "--version-info", library))
        symbols = _output("readelf", "-W", "--dyn-syms", library)
        for name, version in re.findall(r"\bUND (\w+)(?:@+(\S+))?", symbols):
            if not version:
                unversioned.add(name)
            elif library_of.get(version) in needed:
                needed[library_of[version]][version].add(name)
    return needed, unversioned


def _versions(text: str) -> dict[str, str]:
    """The library of each symbol version, from what readelf says of the versions that a library needs."""
    library_of: dict[str, str] = {}
    library = ""
    for line in text.splitlines():
        if found := re.search(r"File: (\S+)", line):
            library = found[1]
        elif found := re.search(r"Name: (\S+)\s+Flags", line):
            library_of.setdefault(found[1], library)
    return library_of


def _compile(file: Path, versions: dict[str, set[str]], loose: set[str]) -> None:
    """Compile a library whose functions all return an error."""
    names = set().union(loose, *versions.values())
    source, script = file.with_suffix(".c"), file.with_suffix(".map")
    source.write_text("\n".join(f"int {name}(void) {{ return 999; }}" for name in sorted(names)))
    script.write_text("\n".join(f"{name} {{ global: {'; '.join(of)}; }};" for name, of in versions.items()))
    options = [f"-Wl,-soname,{file.name}", *([f"-Wl,--version-script={script}"] if versions else [])]
    _output("gcc", "-w", "-fno-builtin", "-shared", "-fPIC", *options, "-o", file, source)


def _pip(python: Path, *words: object) -> None:
    _output(python, "-m", "pip", "--quiet", "--disable-pip-version-check", *words)


def _output(*words: object) -> str:
    """What a command prints.

    Raises:
        NoTorchError: It failed.
    """
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoTorchError(f"{' '.join(map(str, words))} failed:\n{done.stderr[-2000:]}")
    return done.stdout
