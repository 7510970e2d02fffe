"""The GPU benchmark, rehearsed on the CPU: its contenders say the same, and its figures are right."""

import math
import re
from dataclasses import replace

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import table
from benchmarks.gpu.contenders import ENTRIES
from benchmarks.gpu.measure import Figures, _busy, compare, kernels, measure, union_s
from benchmarks.gpu.shapes import SHAPES, make_model
from benchmarks.gpu.workloads import NAMES, TINY, Sizes, workloads
from benchmarks.speed.attention import Own, Shared, branching
from benchmarks.speed.measure import DisagreementError
from benchmarks.speed.workloads import Said

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return make_model(SHAPES["tiny"], device=CPU, dtype=torch.float32, n_layers=2, proof=False)


def test_a_rehearsal_runs_every_contender_and_says_what_it_is(capsys, tmp_path):
    rehearsal = [
        "--device",
        "cpu",
        "--shape",
        "tiny",
        "--rounds",
        "1",
        "--sample",
        "2",
        "--out",
        str(tmp_path),
    ]
    command.main([*rehearsal, "--workloads", "W2", "W6"])
    page, said = capsys.readouterr()
    assert "All contenders agree on W2 W6 (float32, 4 blocks)." in said
    agreed = re.findall(r"\| (\d+) of (\d+) \|", page)
    assert len(agreed) == 2 * len(ENTRIES)
    assert all(same == compared != "0" for same, compared in agreed)
    assert "A rehearsal with a tiny model: these are not figures of a GPU." in page
    for title in ("W2-3, a tiny shape", "W6, a tiny shape"):
        assert f"### {title}" in page
    for entry in ENTRIES:
        assert page.count(f"| {entry.letter} | {entry.contender.title} |") == 2
    assert "| n/a | n/a |" in page
    assert "2 cells, scaled" in page
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_it_skips_loudly(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command.main(["--out", str(tmp_path)])
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("SKIPPED: ")
    assert "--device cpu --shape tiny" in err
    assert not list(tmp_path.iterdir())


def test_a_model_of_a_real_size_is_not_made_on_the_cpu(capsys):
    with pytest.raises(SystemExit):
        command.main(["--device", "cpu", "--shape", "32b"])
    assert "add --shape tiny" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_cells_differ_so_that_agreement_means_something(model, name):
    for workload in workloads(name, model, TINY):
        answers = ENTRIES[0].run(workload, model, None)
        assert len({said.said for said in answers.values()}) > 1


@pytest.mark.parametrize("name", NAMES)
def test_the_tokenizer_knows_every_word_so_that_no_two_prompts_are_the_same(model, name):
    for workload in workloads(name, model, Sizes()):
        assert len(set(workload.sources)) == len(workload.sources)
        assert not any(model.tokenizer.unk_token_id in ids for ids in (*workload.sources, workload.target))


@pytest.mark.parametrize(("name", "count"), [("W6", 2048 + 27), ("W4", 4096)])
def test_long_prompts_have_as_many_tokens_as_their_titles_say(model, name, count):
    (workload,) = workloads(name, model, Sizes())
    assert len(workload.target) == count


def test_a_run_without_kernels_is_never_busy(model):
    (workload,) = workloads("W1", model, TINY)
    assert _busy(ENTRIES[0], workload, model) == 0


def test_a_contender_that_answers_otherwise_is_found(model):
    def wrong(result, _workload):
        return {cell: Said(said.said, said.logprob - 0.01) for cell, said in result.items()}

    (workload,) = workloads("W1", model, TINY)
    floor = ENTRIES[0]
    compare(workload, [floor, floor], model)
    with pytest.raises(DisagreementError, match=r"W1: f .*differ by up to 1.0e-02 nats"):
        compare(workload, [floor, replace(floor, answers=wrong)], model)
    other = replace(floor, answers=wrong, contender=replace(floor.contender, letter="x"))
    first, second = measure(workload, [floor, other], model, rounds=2, sample=1)
    assert (second.same, second.compared) == (4, 4)
    assert math.isclose(second.worst, 0.01, abs_tol=1e-9)
    assert len(first.seconds) == 2


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.letter)
def test_a_contender_that_runs_out_of_memory_is_shown_and_the_others_go_on(model, entry, monkeypatch):
    mlp = model.module.model.layers[1].mlp
    whole = mlp.forward

    def too_large(*args):
        if failing:
            raise torch.OutOfMemoryError
        return whole(*args)

    (workload,) = workloads("W1", model, TINY)
    monkeypatch.setattr(mlp, "forward", too_large)
    figures, failing = measure(workload, [entry, ENTRIES[0]], model, rounds=1, sample=1), True
    first = next(figures)
    assert first.wall_s is None
    assert "out of memory" in table._row(first)
    failing = False
    assert next(figures).wall_s > 0


def test_half_precision_says_nearly_the_same():
    half = make_model(SHAPES["tiny"], device=CPU, dtype=torch.bfloat16, n_layers=2, proof=False)
    (workload,) = workloads("W1", half, TINY)
    for figures in measure(workload, ENTRIES, half, rounds=1, sample=99):
        assert figures.compared == 4
        assert figures.same >= 3
        assert figures.worst < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("own", "asked", "shared"), [(1, 1, 9), (2, 2, 9), (5, 1, 2048)])
def test_the_floor_calls_the_kernels_of_other_devices_with_arguments_they_take(dtype, own, asked, shared):
    def made(*shape):
        return torch.empty(*shape, dtype=dtype, device="meta")  # takes the path of a GPU

    rows = Own(made(7, 8, own, 128), made(7, 8, own, 128))
    seen = branching(made(7, asked, 32, 128), rows, Shared(made(8, shared, 128), made(8, shared, 128)), 0.1)
    assert (seen.shape, seen.dtype) == ((7 * asked, 4096), dtype)


def test_time_in_which_kernels_overlap_counts_once():
    events = [
        {"cat": "kernel", "ts": 0.0, "dur": 10.0},
        {"cat": "kernel", "ts": 40.0, "dur": 5.0},
        {"cat": "kernel", "ts": 5.0, "dur": 15.0},
        {"cat": "kernel", "ts": 6.0, "dur": 1.0},
        {"cat": "cuda_runtime", "ts": 0.0, "dur": 99.0},
        {"name": "process_name"},
    ]
    assert union_s(kernels(events)) == pytest.approx(25e-6)
    assert union_s([]) == 0


def figures(letter, *, seconds=(1.0,), busy=None, cells=10):
    return Figures(letter=letter, title=letter, cells=cells, of_cells=10, seconds=seconds, busy=busy)


def test_times_of_a_part_are_scaled():
    assert figures("a", seconds=(3.0, 1.0, 2.0), cells=5).wall_s == 4.0


@pytest.mark.parametrize(
    ("shape", "workload", "found", "rows"),
    [
        ("llama-8b", "W1", {"e": {"seconds": (3.0,)}, "f": {"seconds": (2.0,)}}, [("1.50 times", "met")]),
        ("llama-8b", "W1", {"e": {"seconds": (3.1,)}, "f": {"seconds": (2.0,)}}, [("1.55 times", "missed")]),
        ("llama-8b", "W1", {"e": {}, "f": {"seconds": ()}}, [("not measured", "")]),
        (
            "llama-8b",
            "W2-512",
            {"e": {"busy": 0.7}, "e2": {"busy": 0.4}},
            [("70%", "met"), ("40%", "missed")],
        ),
        ("32b", "W6", {"e": {"seconds": (5.0,)}}, [("5.00 s", "met")]),
        ("tiny", "W1", {"e": {}, "f": {}}, []),
    ],
)
def test_goals_stand_beside_what_was_reached(shape, workload, found, rows):
    part = {"shape": shape, "workload": workload}
    part["figures"] = [vars(figures(letter, **options)) for letter, options in found.items()]
    assert [row[1:] for row in table._goals(part)] == rows


def test_figures_of_a_gpu_are_written_beside_those_of_others(tmp_path, model):
    args = command._parse(["--device", "cpu", "--shape", "tiny"])
    proven = make_model(SHAPES["tiny"], device=CPU, dtype=torch.float32, n_layers=2)
    for shape, workload in (("llama-8b", "W1"), ("32b", "W6")):
        part = {"workload": workload, "title": "title", "cells": 10, "rehearsal": False}
        part |= {**command._setting(args, proven), "shape": shape, "figures": [vars(figures("e"))]}
        command._write(tmp_path, part)
    page = (tmp_path / "gpu.md").read_text()
    assert "rehearsal" not in page
    assert "| 32b, W6: 256 texts in 6 s | 1.00 s | met |" in page
    assert "| llama-8b, W1: within 1.5 times the floor | not measured |  |" in page
    assert page.count("### ") == 2
