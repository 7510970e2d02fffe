"""python -m benchmarks.quality EXPERIMENT --model NAME=FOLDER: run it on a model, and write what came out."""

from __future__ import annotations

import os

# Before torch and transformers are imported, which read these then.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
from pathlib import Path

from benchmarks.quality import entities, next_token
from benchmarks.quality.models import load_named, short
from patchscope_nn.builtin import NAME

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run one experiment; the same command goes on with one that was stopped."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=main.__doc__)
    parser.add_argument("experiment", choices=("next-token", "entity-description"))
    parser.add_argument("--model", default=NAME, help="NAME=FOLDER, or a name: the name goes into results")
    parser.add_argument("--dtype", default="auto", help="as of `patchscope run`")
    parser.add_argument("--texts", type=Path, help="a WikiText file (next-token)")
    parser.add_argument("--rows", type=int, default=200, help="the most contexts or entities")
    parser.add_argument("--layer", default="all", help="source layers (entity-description)")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="where runs are kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    model = load_named(args.model, dtype=args.dtype)
    out = args.out / short(model.info.name)
    out.mkdir(parents=True, exist_ok=True)
    shared = {"work": args.work, "out": out, "command": _command(args)}
    if args.experiment == "next-token":
        if args.texts is None:
            parser.error("next-token needs --texts, a WikiText file")
        next_token.run(model, texts=args.texts, count=args.rows, **shared)
    else:
        entities.run(model, layers=args.layer, count=args.rows, **shared)
    print(out)


def _command(args: argparse.Namespace) -> str:
    """The command without folders of this machine."""
    name, equals, _ = args.model.partition("=")
    texts = f" --texts {args.texts.parent.name}/{args.texts.name}" if args.texts else ""
    layer = f" --layer '{args.layer}'" if args.layer != "all" else ""
    dtype = f" --dtype {args.dtype}" if args.dtype != "auto" else ""
    model = f"{name}=FOLDER" if equals else name
    options = f"{dtype}{texts}{layer} --rows {args.rows}"
    return f"python -m benchmarks.quality {args.experiment} --model {model}{options}"


if __name__ == "__main__":
    main()
