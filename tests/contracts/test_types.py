"""What a type checker knows of a user's code: the results of the public calls have types of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import patchscope_nn as ps

USER = """\
import patchscope_nn as ps

scope = ps.Patchscope(source=ps.Source(prompt="The city of Paris"))
run = ps.run(scope, model="a/model", max_rows=4)
reveal_type(run)
reveal_type(run.table())
reveal_type(run.heatmap())
reveal_type(run.summary())
reveal_type(ps.run("next-token", remote="local"))
reveal_type(ps.load_run("runs/mine"))
ps.run(scope, max_rows="4")
ps.run(scope, limits=4)
"""
WRONG = ['ps.run(scope, max_rows="4")', "ps.run(scope, limits=4)"]
TYPES = [
    "Run",
    "pandas.DataFrame",
    "plotly.graph_objects.Figure",
    "pandas.DataFrame",
    "Run | Experiment",
    "Run",
]
#: Stand-ins: the checker follows neither package, so that the test takes seconds.
STUBS = {"pandas": "class DataFrame: ...\n", "plotly": "", "plotly.graph_objects": "class Figure: ...\n"}
CONFIG = """\
[mypy]
follow_imports = silent
plugins = pydantic.mypy
"""
HEAVY = ("torch", "nnsight", "transformers", "scipy", "pyarrow", "datasets", "sklearn", "matplotlib", "httpx")
HEAVY += ("jinja2", "rich", "huggingface_hub", "safetensors", "peft", "starlette", "uvicorn")


def test_a_user_s_code_is_checked(tmp_path):
    for name, text in STUBS.items():
        folder = tmp_path.joinpath("stubs", *name.split("."))
        folder.mkdir(parents=True)
        (folder / "__init__.pyi").write_text(text)
    skipped = "".join(
        f"[mypy-{name}.*]\nfollow_imports = skip\nignore_missing_imports = True\n" for name in HEAVY
    )
    (tmp_path / "mypy.ini").write_text(CONFIG + skipped)
    (tmp_path / "user.py").write_text(USER)
    places = os.pathsep.join([str(tmp_path / "stubs"), str(Path(ps.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "user.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": places},
        capture_output=True,
        text=True,
        check=False,
    )
    revealed = re.findall(r'Revealed type is "(.*)"', done.stdout)
    assert [re.sub(r"patchscope_nn\.[\w.]*\.", "", kind) for kind in revealed] == TYPES, done.stdout
    wrong = {int(line) for line in re.findall(r"user\.py:(\d+): error", done.stdout)}
    assert wrong == {USER.splitlines().index(line) + 1 for line in WRONG}, done.stdout
