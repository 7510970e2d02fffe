"""python -m benchmarks.quality EXPERIMENT --model NAME=FOLDER: run it on a model, and write what came out."""

from __future__ import annotations

import os

# Before torch and transformers are imported, which read these then.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
from pathlib import Path

from benchmarks.quality import cross_model, entities, next_token
from benchmarks.quality.models import load_named, short
from patchscope_nn.models.builtin import NAME

ACROSS = ("cross-model", "cross-model-entities")
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run one experiment; the same command goes on with one that was stopped."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=main.__doc__)
    parser.add_argument("experiment", choices=("next-token", "entity-description", *ACROSS))
    parser.add_argument("--model", default=NAME, help="NAME=FOLDER, or a name: the name goes into results")
    parser.add_argument("--target-model", help="M*, in the same form (of two models)")
    parser.add_argument("--dtype", default="auto", help="as of `patchscope run`")
    parser.add_argument("--texts", type=Path, help="a WikiText file that contexts are taken from")
    parser.add_argument("--fit-on", type=Path, help="another one, whose passages maps are fitted on")
    parser.add_argument("--fitted", type=int, default=200, help="how many of its passages")
    parser.add_argument("--rows", type=int, default=200, help="the most contexts or entities")
    parser.add_argument("--layer", default="all", help="source layers; a list for two models")
    parser.add_argument("--target-layer", help="target layers, a list (of two models)")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="where runs are kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    model = load_named(args.model, dtype=args.dtype)
    out = args.out / short(model.info.name)
    out.mkdir(parents=True, exist_ok=True)
    print(out)
    shared = {"count": args.rows, "work": args.work, "out": out, "command": _command(args)}
    if args.experiment == "entity-description":
        entities.run(model, layers=args.layer, **shared)
        return
    if args.texts is None and args.experiment != "cross-model-entities":
        parser.error(f"{args.experiment} needs --texts, a WikiText file")
    if args.experiment == "next-token":
        next_token.run(model, texts=args.texts, **shared)
        return
    if None in (args.target_model, args.fit_on, args.target_layer) or args.layer == "all":
        parser.error(
            f"{args.experiment} needs --target-model, --fit-on, and lists as --layer, --target-layer"
        )
    shared |= {"layers": json.loads(args.layer), "target_layers": json.loads(args.target_layer)}
    shared |= {"fit_on": args.fit_on, "fitted": args.fitted}
    other = load_named(args.target_model, dtype=args.dtype)
    if args.experiment == "cross-model":
        cross_model.run(model, other, texts=args.texts, **shared)
    else:
        entities.run_across(model, other, **shared)


def _command(args: argparse.Namespace) -> str:
    """The command without folders of this machine: what was given and is not the default."""
    parts = ["python -m benchmarks.quality", args.experiment]
    for option in ("model", "target_model"):
        if given := getattr(args, option):
            name, equals, _ = given.partition("=")
            parts.append(f"--{option.replace('_', '-')} {name}{'=FOLDER' if equals else ''}")
    parts += [f"--dtype {args.dtype}"] if args.dtype != "auto" else []
    for option in ("texts", "fit_on"):
        if file := getattr(args, option):
            parts.append(f"--{option.replace('_', '-')} {file.parent.name}/{file.name}")
    parts += [f"--fitted {args.fitted}"] if args.fit_on else []
    parts += [f"--layer '{args.layer}'"] if args.layer != "all" else []
    parts += [f"--target-layer '{args.target_layer}'"] if args.target_layer else []
    return " ".join([*parts, f"--rows {args.rows}"])


if __name__ == "__main__":
    main()
