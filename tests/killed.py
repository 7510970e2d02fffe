"""Starts a run in a process that stores its cells slowly, and kills the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

#: Where the process finds the helpers of the tests, and the tests of runs.
PLACES = [str(Path(__file__).parent), str(Path(__file__).parent / "runs")]
_SLOWLY = f"""
import sys, time
sys.path[:0] = {PLACES!r}
import tiny, torch
import patchscope_nn as ps
from patchscope_nn.runs.folder import RunFolder
torch.set_num_threads(1)

append = RunFolder.append
def slowly(self, rows):
    append(self, rows)
    print(self.n_done, flush=True)
    time.sleep(0.2)
RunFolder.append = slowly
model = ps.load(tiny.make_module("llama"), tokenizer=tiny.TOKENIZER)
"""


def kill_at(count, code):
    """Run `code`, which has a `model`, and kill -9 its process once a run of it has stored `count` cells."""
    command = [sys.executable, "-c", _SLOWLY + code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if int(line) >= count:
                break
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.stdout.close()
        assert process.wait(timeout=60) == -signal.SIGKILL
