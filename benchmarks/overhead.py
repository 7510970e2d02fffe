"""python -m benchmarks.overhead: the host's time a cell, beyond the time inside the model's own modules.

A next-token sweep of a tiny random model, every l x every l* of many contexts, in memory and into a folder
with its report. The host's time is the wall time of the run, minus the time inside the parts of the model's
blocks, its embedding, its last norm and its unembedding; its CPU time, of all threads, depends less on what
else the machine does. Each size runs in a process of its own. Memory is what the process holds at most during
the run, more than before it.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZES = (10_000, 100_000, 1_000_000)
N_LAYERS = 8
_N_WORDS = 256


def main() -> None:
    """Measure all sizes, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=main.__doc__)
    parser.add_argument("--cells", type=int, nargs="*", default=list(SIZES))
    parser.add_argument("--child", choices=("memory", "folder"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        print(json.dumps(measure(chosen.cells[0], into_folder=chosen.child == "folder")))
        return
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores\n")
    print(
        "| cells | into | wall s | s in the model | host us a cell | host CPU us a cell | MiB more at most |"
    )
    print("|---|---|---|---|---|---|---|")
    for cells in chosen.cells:
        for kind in ("memory", "folder"):
            command = [sys.executable, "-m", "benchmarks.overhead", "--cells", str(cells), "--child", kind]
            done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 (starts this module)
            found = json.loads(done.stdout.splitlines()[-1])
            host, cpu = (
                1e6 * (found[all_of] - found[model]) / found["cells"]
                for all_of, model in (("wall", "model"), ("cpu", "model_cpu"))
            )
            into = "memory" if kind == "memory" else "a folder, with report"
            print(
                f"| {found['cells']:,} | {into} | {found['wall']:.2f} | {found['model']:.2f} | {host:.1f} | "
                f"{cpu:.1f} | {found['more']:.0f} |",
                flush=True,
            )


def measure(cells: int, *, into_folder: bool) -> dict[str, float]:
    """Run a sweep of about so many cells, and return its figures."""
    import patchscope_nn as ps

    with tempfile.TemporaryDirectory() as folder:
        model = ps.load(str(_tiny_model(Path(folder) / "model")), proof=False)
        clock = Clock(model.module)
        scope = ps.Patchscope(
            source=ps.Source(prompt="{text}", position=-1, layer="all"),
            target=ps.Target(prompt="w1 w2 w3 w4 w5 w6", position=-1, layer="all"),
            readout=ps.NextToken(top_k=5, reference="source"),
        )
        rows = [{"text": _text(number)} for number in range(max(1, cells // N_LAYERS**2))]
        options: dict[str, Any] = {"model": model, "metrics": ["precision_at_1", "surprisal_nats"]}
        ps.run(scope, data=rows[:2], **options)
        before, clock.seconds, clock.cpu_seconds = _memory("VmRSS"), 0.0, 0.0
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        started, started_cpu = time.perf_counter(), time.process_time()
        out = Path(folder) / "run" if into_folder else None
        run = ps.run(scope, data=rows, out=out, **options)
        wall, cpu = time.perf_counter() - started, time.process_time() - started_cpu
        n_cells = len(run.rows)
    inside = {"model": clock.seconds, "model_cpu": clock.cpu_seconds}
    return {"cells": n_cells, "wall": wall, "cpu": cpu, **inside, "more": _memory("VmHWM") - before}


class Clock:
    """Adds up the time inside the parts of a model that compute."""

    def __init__(self, model: Any) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self._started = self._started_cpu = 0.0
        parts = [part for block in model.model.layers for part in block.children()]
        for part in (model.model.embed_tokens, *parts, model.model.norm, model.lm_head):
            part.register_forward_pre_hook(self._start)
            part.register_forward_hook(self._stop)

    def _start(self, *_: Any) -> None:
        self._started, self._started_cpu = time.perf_counter(), time.thread_time()

    def _stop(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._started
        self.cpu_seconds += time.thread_time() - self._started_cpu


def _text(number: int) -> str:
    """Return the text of a context, all different."""
    words = (number % _N_WORDS, number // _N_WORDS, 7 + number // 31)
    return " ".join(f"w{word % _N_WORDS}" for word in words)


def _tiny_model(folder: Path) -> Path:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    vocabulary = {f"w{number}": number for number in range(_N_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=_N_WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _memory(name: str) -> float:
    """Return a figure of the kernel's about this process, in MiB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main()
