"""python -m benchmarks.architectures: the table of model types, docs/architectures.md.

A tiny random model of every model type that transformers knows (tests/registry.py) is loaded, and so proven.
The page says what the proof found. `make test` and `make test-registry` fail where the page is out of date.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, "tests")

import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import registry
import tiny
import torch
import transformers

import patchscope_nn as ps
from patchscope_nn.errors import InputError
from patchscope_nn.models import COSTS, FUSED, Verdict
from patchscope_nn.plan import Optimisations
from patchscope_nn.spec import SITES

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
HEAD = """\
# Model types

Which models can be used, and what is switched off on which? This page answers for every model type that
transformers {version} loads as a causal language model, or as a model that reads images and text.

It is written by `python -m benchmarks.architectures`, from tiny models with random weights. Each is loaded,
and so compared with plain PyTorch hooks: what would give other numbers is switched off, and what cannot be
right is refused. `make test` compares every cell of a sweep with plain hooks again, on one type of each
mechanism; `make test-registry` does so on all others.

A real model of a type may differ, since its config decides as well. It is proven the first time it is loaded,
and `patchscope doctor --model ID` prints what was found.

Of {count} model types, {plain} run with every optimisation, {off} run with some switched off, {refused} are
refused, and {absent} were not tried.

What is switched off costs time, and changes no number:

| switch | without it |
|---|---|
{costs}

Where `attention` or `mlp` is switched off, a Patchscope that reads or writes there is refused. Where `cut` is
switched off, one that cuts attention edges is refused.
"""
OFF, PLAIN, REFUSED, ABSENT = (
    "Run with something switched off",
    "Run with everything",
    "Refused",
    "Not tried",
)
INTROS = {
    OFF: """\
*Other numbers*: with the switch on, a readout differs from plain hooks. *An error*: the model's own code
stops. In brackets are the readouts for which it is off, where it is not off for all. Sites are the parts of a
block, besides the residual stream, that can be read and written.
""",
    PLAIN: "By the sites that can be read and written besides the residual stream.\n",
    REFUSED: "",
    ABSENT: "No tiny model of these can be built. A real one is proven when it is loaded, like any other.\n",
}
_TABLES = {OFF: "| model type | switched off | sites |\n|---|---|---|"}
_REASONS = "| model type | reason |\n|---|---|"


class Family(NamedTuple):
    """What the page says of a model type: its section, the text of its row, and its sites."""

    section: str
    text: str
    sites: str = ""


def family_of(model_type: str) -> Family:
    """Build and load a tiny model of a type, and say what the proof found."""
    if model_type in registry.NOT_BUILT:
        return Family(ABSENT, registry.NOT_BUILT[model_type])
    try:
        model = ps.load(registry.build(model_type), tokenizer=tiny.TOKENIZER)
    except InputError as error:
        return Family(REFUSED, registry.REFUSED.get(model_type, error.message))
    info, verdict = model.info, model.info.verdict
    off = {entry.optimisation for entry in verdict.withheld}
    there = [site.name for site in SITES.values() if info.architecture.part(site) and site.name not in off]
    text = _withheld(verdict)
    return Family(OFF if text else PLAIN, text, " and ".join(there) or "none")


def _withheld(verdict: Verdict) -> str:
    """What is off and what happens with it, without numbers: these vary from machine to machine."""
    found: dict[tuple[str, str], list[str]] = {}
    for entry in verdict.withheld:
        problem = "an error" if " raises " in entry.why else "other numbers"
        readouts = found.setdefault((f"{entry.name}{entry.longer}", problem), [])
        readouts += [entry.readout] if entry.readout else []
    named = ((f"{name} ({', '.join(sorted(of))})" if of else name, why) for (name, why), of in found.items())
    parts = sorted(f"{name}: {why}" for name, why in named)
    both = [] if verdict.causal else ["it reads a prompt in both directions"]
    return "; ".join([*parts, *both])


def page_of(families: Mapping[str, Family]) -> str:
    """The page of some model types."""
    counts = [sum(family.section == section for family in families.values()) for section in INTROS]
    switches = [FUSED, *Optimisations.names()]
    costs = "\n".join(f"| `{name.replace('_', '-')}` | {COSTS[name]} |" for name in switches)
    off, plain, refused, absent = counts
    head = HEAD.format(
        version=transformers.__version__,
        count=len(families),
        plain=plain,
        off=off,
        refused=refused,
        absent=absent,
        costs=costs,
    )
    return "\n".join([head, *(_section(section, families) for section in INTROS)])


def _section(section: str, families: Mapping[str, Family]) -> str:
    rows = sorted((name, family) for name, family in families.items() if family.section == section)
    lines = [f"## {section}", ""]
    lines += [INTROS[section]] if INTROS[section] else []
    if section == PLAIN:
        return "\n".join([*lines, *_by_sites(rows)])
    lines.append(_TABLES.get(section, _REASONS))
    for name, family in rows:
        cells = [f"`{name}`", family.text, *([family.sites] if family.sites else [])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _by_sites(rows: Iterable[tuple[str, Family]]) -> Iterator[str]:
    """The names of each kind of sites, as paragraphs."""
    groups: dict[str, list[str]] = {}
    for name, family in rows:
        groups.setdefault(family.sites, []).append(f"`{name}`")
    for sites, names in sorted(groups.items()):
        yield f"* {sites} ({len(names)}): {', '.join(names)}"
    yield ""


def read(page: str) -> dict[str, Family]:
    """What a page says of each model type."""
    families: dict[str, Family] = {}
    section = ""
    for line in page.splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif section == PLAIN and line.startswith("* "):
            sites = line.removeprefix("* ").partition(" (")[0]
            families |= dict.fromkeys(re.findall("`(.+?)`", line), Family(PLAIN, "", sites))
        elif section and line.startswith("| `"):
            name, *cells = line.strip("| ").split(" | ")
            families[name.strip("`")] = Family(section, *cells)
    return families


def version_of(page: str) -> str:
    """The version of transformers that a page is about."""
    (version,) = re.findall(r"transformers (\d\S+)", page)
    return version


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    families = {}
    names = registry.names()
    for number, name in enumerate(names, 1):
        families[name] = family_of(name)
        print(f"{number}/{len(names)} {name}: {families[name].section.lower()}", flush=True)
    PAGE.write_text(page_of(families), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
