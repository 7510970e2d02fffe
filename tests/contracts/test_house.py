"""The house's rules: what imports what, what is public, what a body may name, what imports cost."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import patchscope_nn as ps

pytestmark = pytest.mark.quick

PACKAGE = Path(ps.__file__).parent

#: The order of the rooms, as docs/ARCHITECTURE.md gives it: its table's first column.
ARCHITECTURE = PACKAGE.parent / "docs" / "ARCHITECTURE.md"
ORDER = re.findall(r"^\| `(\w+)`", ARCHITECTURE.read_text(encoding="utf-8"), flags=re.MULTILINE)
#: The modules that are no rooms.
LOOSE = {"__init__", "__main__", "errors"}
#: What `body` may import besides itself: what every server has.
ON_SERVERS = {"torch", "nnsight", "transformers"}


def home(file):
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("patchscope_nn."):
            yield node.module.split(".")[1], node
        elif isinstance(node, ast.ImportFrom) and node.module == "patchscope_nn":
            yield from ((name.name, node) for name in node.names)


FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if file.parent != PACKAGE or file.stem != "__init__"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_nothing_imports_what_stands_to_its_right(file):
    own = home(file)
    assert own in ORDER, f"{own} has no place in the order of the house"
    for other, _ in imports(file):
        if other in ("__version__", own):
            continue
        assert ORDER.index(other) < ORDER.index(own), f"{own} imports {other}"


def test_the_rooms_are_those_of_the_architecture():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and [*path.glob("*.py")]}
    assert len(ORDER) == len({*ORDER})
    assert {*ORDER} == rooms | {"errors", "__main__"}
    assert {path.stem for path in PACKAGE.glob("*.py")} == LOOSE


TESTS = PACKAGE.parent / "tests"
#: What the tests of other rooms go through.
WITHOUT_TESTS = {"errors", "__main__"}


@pytest.mark.parametrize("room", [room for room in ORDER if room not in WITHOUT_TESTS])
def test_each_room_has_its_folder_of_tests_and_a_quick_one(room):
    files = [*(TESTS / room).glob("test_*.py")]
    assert [file for file in files if "@pytest.mark.quick" in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("file", sorted((PACKAGE / "body").glob("*.py")), ids=lambda file: file.name)
def test_what_travels_imports_only_what_servers_have(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            top = name.partition(".")[0]
            ours = name.startswith("patchscope_nn.body")
            assert ours or top in ON_SERVERS or top in sys.stdlib_module_names, name


def test_only_body_opens_a_trace():
    opening = {
        home(file)
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("trace", "session", "generate", "edit", "scan")
    }
    assert opening == {"body"}


def test_a_file_stays_small():
    sizes = {str(file.relative_to(PACKAGE)): len(file.read_text().splitlines()) for file in FILES}
    assert {name: size for name, size in sizes.items() if size > 350} == {}


def test_the_code_of_a_function_stays_short():
    """Its docstring is not counted."""
    sizes = {}
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                code = node.body[1:] if ast.get_docstring(node) and node.body[1:] else node.body
                sizes[f"{file.stem}.{node.name}"] = node.end_lineno - code[0].lineno + 1
    assert {name: size for name, size in sizes.items() if size > 60} == {}


def test_all_names_the_public_names():
    assert sorted(ps.__all__) == ps.__all__
    assert set(ps.__all__) == {name for name in dir(ps) if not name.startswith("_")}
    for name in ps.__all__:
        assert getattr(ps, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="No patchscope_nn attribute Patchscopes"):
        ps.Patchscopes  # noqa: B018 (the access is the test)


HEAVY = {"torch", "transformers", "nnsight", "pandas", "plotly"}


@pytest.mark.parametrize(
    "statement",
    [
        "import patchscope_nn",
        "import patchscope_nn.spec",
        "import patchscope_nn.recipe",
        "import patchscope_nn.plan",
        "import patchscope_nn.metrics",
    ],
)
def test_pure_modules_load_neither_torch_nor_pandas(statement):
    code = f"{statement}\nimport sys\nsys.exit(str({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"


#: What a body runs on a server: the functions of these files that begin so.
INSIDE = ("in_", "_in_")
TRAVELS = {
    "body/contexts": INSIDE,
    "body/attention": INSIDE,
    "body/states": INSIDE,
    "body/batch": INSIDE,
    "body/packed": INSIDE,
    "body/readouts": ("",),
    "body/decoding": ("",),
    "body/mappings": ("",),
}
#: What they may name besides each other. transformers, and so its cache, is on every server.
ALLOWED = {"Any", "torch", "nnsight", "copy", "SimpleNamespace", "DynamicCache", "TorchFunctionMode"}
ALLOWED |= {"apply_mapping", "read_continued", "read_unpatched"}


@pytest.mark.parametrize("module", TRAVELS)
def test_what_travels_names_only_torch_and_what_travels_with_it(module):
    """FACTS of remote bodies: no class of ours, no module that a server lacks."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    ours = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom | ast.Import)
        for alias in node.names
    }
    bodies = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith(TRAVELS[module])
    ]
    assert bodies
    for body in bodies:
        used = {node.id for line in body.body for node in ast.walk(line) if isinstance(node, ast.Name)}
        imported = {name for name in used & ours if not name.startswith(INSIDE)}
        assert imported <= ALLOWED, (body.name, imported)
        assert {name for name in used & names if not name.startswith(TRAVELS[module])} == set()
