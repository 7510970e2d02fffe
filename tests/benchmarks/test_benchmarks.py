"""The benchmark's contenders say the same; how fast they are is measured elsewhere."""

from dataclasses import asdict, replace

import pytest

from benchmarks.speed import table
from benchmarks.speed.contenders import CONTENDERS
from benchmarks.speed.machine import describe
from benchmarks.speed.made import MAKERS, Scale, make
from benchmarks.speed.measure import DisagreementError, Timing, check, rounds
from benchmarks.speed.workloads import Said, disagreement

SMALL = Scale(times=2, contexts=2, entities=2, tokens=50, before=40, generated=4, describe="The city of x")


def tiny_workload(name, model):
    """A workload whose source prompts are short: the tiny models read 64 tokens."""
    workload = make(name, model, SMALL)
    texts = tuple(text[:24] for text in workload.texts)
    sources = tuple(tuple(model.tokenizer(text)["input_ids"]) for text in texts)
    return replace(workload, texts=texts, sources=sources)


@pytest.fixture(scope="module")
def answers(tiny_model):
    """answers(workload's name, contender): the workload, and what is said of all its cells."""
    source, other = tiny_model("llama"), tiny_model("llama", copy=1)

    def get(name, letter):
        workload = tiny_workload(name, source)
        return workload, CONTENDERS[letter].run(workload, source, other if workload.cross else source)

    return get


@pytest.fixture(scope="module")
def floors(answers):
    return {name: answers(name, "f")[1] for name in MAKERS}


@pytest.mark.parametrize("letter", sorted(set(CONTENDERS) - {"f"}))
@pytest.mark.parametrize("name", MAKERS)
def test_every_contender_says_of_every_cell_what_the_floor_says(answers, floors, name, letter):
    workload, given = answers(name, letter)
    check(floors[name], given, workload, CONTENDERS[letter])


@pytest.mark.parametrize("name", MAKERS)
def test_the_cells_of_a_workload_differ_so_that_agreement_means_something(floors, name):
    first, *others = floors[name].values()
    assert any(disagreement({0: first}, {0: other}) for other in others)


def test_an_answer_that_differs_or_is_missing_is_found(answers, floors):
    workload, given = answers("W1", "e")
    cell, said = next(iter(given.items()))
    for wrong in (Said(-1, said.logprob), Said(said.said, said.logprob + 1e-3)):
        with pytest.raises(DisagreementError, match="W1"):
            check(floors["W1"], given | {cell: wrong}, workload, CONTENDERS["e"])
    del given[cell]
    with pytest.raises(DisagreementError, match="other cells"):
        check(floors["W1"], given, workload, CONTENDERS["e"])


@pytest.mark.parametrize("name", ["W1", "W2"])
def test_samples_hold_what_was_asked_of_every_target_layer(tiny_model, name):
    workload = tiny_workload(name, tiny_model("llama"))
    asked = len(workload.cells) // 2
    for part in (workload.sample(asked), workload.smaller(asked), workload.fewer_targets(asked)):
        assert asked <= len(part.cells) < len(workload.cells)
        assert set(part.cells) < set(workload.cells)
    assert {cell.target_layer for cell in workload.sample(asked).cells} == set(workload.layers)


def test_rounds_take_turns_and_fill_a_table(tiny_model):
    model = tiny_model("llama")
    workload = tiny_workload("W1", model)
    contenders = [CONTENDERS[letter] for letter in "aef"]
    timings = list(rounds(workload, contenders, source=model, target=model, pairs=2, sample=4))
    assert [one.letter for one in timings] == list("aefaef")
    assert [one.cells for one in timings[:3]] == [4, 32, 32]
    part = describe(threads=1, command="test") | {"title": workload.title, "cells": len(workload.cells)}
    page = table.document({"W1": part | {"timings": [asdict(one) for one in timings]}})
    assert "32 cells, 2 rounds. `test`" in page
    assert "| e | ours | all |" in page
    assert "4 cells, scaled" in page


def test_a_ratio_is_the_median_of_the_rounds_own_ratios():
    timings = [
        Timing(workload="W1", letter=letter, round=number, cells=1, of_cells=1, wall_s=wall, cpu_s=0.0)
        for letter, walls in (("e", (2.0, 30.0, 4.0)), ("f", (1.0, 10.0, 1.0)))
        for number, wall in enumerate(walls)
    ]
    assert table.ratio(timings, "e", "f", "wall_s") == 3.0
    assert table.ratio(timings, "e", "a", "wall_s") is None


def test_a_table_of_growth_names_the_budget():
    point = {"workload": "W1", "times": 4, "cells": 3600, "memory_budget": 2**30}
    point |= {"wall_s_per_thousand": 1.0, "cpu_s_per_thousand": 2.0}
    point |= {"resident_before": 2**30, "resident_peak": 3 * 2**29}
    page = table.document({"growth": describe(threads=1, command="test") | {"growth": [point]}})
    assert "| W1 | 4 | 3,600 | 1 | 2 | 1,024 | 1,536 | 512 |" in page
    assert "1,024 MiB" in page
