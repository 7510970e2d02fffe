"""Numbers that are not finite: a cell's error says where the first one was, and the other cells are right."""

from __future__ import annotations

import math
from dataclasses import replace

import hooks
import pytest
import tiny
import torch

import patchscope_nn as ps
from patchscope_nn.plan import Optimisations

#: The token of this letter has an embedding that is not finite.
BAD = "Q"
READOUTS = {
    "next_token": ps.NextToken(top_k=3, reference="source"),
    "generate": ps.Generate(max_new_tokens=3, relevancy=True),
    "choices": ps.Choices([" Paris", " the city of"]),
    "hidden": ps.Hidden(clean=True),
}
#: Ways in which cells share passes.
WAYS = {
    "as planned": {},
    "packed with a mask": {"optimisations": replace(Optimisations(), shared_attention=False)},
    "padded": {"optimisations": replace(Optimisations(), prefix_sharing=False, late_entry=False)},
    "read again": {"optimisations": Optimisations.none()},
    "rehearsed": {"remote": "local"},
}


def make(*, bad=float("nan"), family="llama"):
    module = tiny.make_module(family)
    module.config.max_position_embeddings = 256
    with torch.no_grad():
        module.get_input_embeddings().weight[tiny.TOKENIZER(BAD)["input_ids"][0]] = bad
    return module


def blown(states):
    return states * 1e38 * 1e38


@pytest.fixture(scope="module")
def model():
    return ps.load(make(), tokenizer=tiny.TOKENIZER)


def scope_of(readout, **target):
    return ps.Patchscope(
        source=ps.Source(prompt="{s}", layer=[0, 2]),
        target=ps.Target(**{"prompt": "The city of x is", "position": "x", "layer": [0, 1]} | target),
        readout=readout,
    )


def numbers(value):
    if isinstance(value, list | tuple):
        return [number for part in value for number in numbers(part)]
    return [value] if isinstance(value, float) else []


def check(rows, bad, message):
    """The cells of bad data rows have an error and no number, those of the others are whole."""
    for row in rows:
        places = {"scale": row["scale"]}
        if row["row"] in bad:
            assert message in row["error"]
            assert numbers([value for name, value in row.items() if name not in places]) == []
        else:
            assert row["error"] is None
            assert not any(math.isnan(number) for number in numbers(list(row.values())))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("readout", READOUTS)
def test_a_state_that_is_read(way, readout, model):
    rows = [{"s": "Diana"}, {"s": f"Diana {BAD}"}, {"s": "Paris"}]
    run = ps.run(scope_of(READOUTS[readout]), model=model, data=rows, controls=["unpatched"], **WAYS[way])
    bad = [row for row in run.rows if not (readout == "next_token" and row["control"])]
    message = "the hidden state that was read is not finite: layer"
    check([row for row in bad if row["control"] is None], {1}, message)
    if readout != "next_token":
        assert all(row["error"] is None for row in run.rows if row["control"])
    right = ps.run(
        scope_of(READOUTS[readout]), model=model, data=[rows[0], rows[2]], optimisations=Optimisations.none()
    )
    given = [row for row in run.rows if row["control"] is None and row["row"] != 1]
    for one, other in zip(given, right.rows, strict=True):
        for name, value in other.items():
            if name in ("row", "source_model", "target_model"):
                continue
            assert one[name] == value or torch.allclose(
                torch.tensor(numbers(one[name])), torch.tensor(numbers(value)), atol=1e-4
            )


@pytest.mark.quick
@pytest.mark.parametrize("context", ["fused", "session"])
@pytest.mark.parametrize("readout", ["next_token", "choices", "hidden"])
def test_a_single_cell(context, readout, model):
    scope = ps.Patchscope(
        source=ps.Source(prompt=f"Diana {BAD}", layer=1),
        target=ps.Target(prompt="The city of x is", position="x", layer=2),
        readout=ps.Hidden() if readout == "hidden" else READOUTS[readout],
    )
    (row,) = ps.run(scope, model=model, context=context).rows
    assert row["error"].startswith("the hidden state that was read is not finite: layer 1 of LlamaForCausal")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("readout", READOUTS)
def test_a_target_prompt(way, readout, model):
    scope = scope_of(READOUTS[readout], prompt="{t}", position="x")
    rows = [{"s": "Diana", "t": "The city of x is"}, {"s": "Diana", "t": f"The city of {BAD} x is"}]
    run = ps.run(scope, model=model, data=rows, controls=["unpatched"], **WAYS[way])
    message = "not finite"
    patched = [row for row in run.rows if row["control"] is None]
    if readout == "hidden":  # what was written is what was read
        check(patched, {1}, "the reference is not finite")
        return
    check(patched, {1}, message)
    (control,) = (row for row in run.rows if row["control"] and row["row"] == 1)
    assert control["error"] == (
        "the logits of LlamaForCausalLM (float32) are not finite. Another dtype may help."
    )
    assert "although the state that was written is" in patched[-1]["error"]


def test_a_state_that_is_not_finite_and_is_replaced(model):
    """The patched run is sound; what it is compared with is not."""
    scope = ps.Patchscope(
        source=ps.Source(prompt="Diana", layer="embed"),
        target=ps.Target(prompt=f"The city of {BAD} is", position=BAD, layer="embed"),
        readout=ps.NextToken(top_k=3),
    )
    (row,) = ps.run(scope, model=model).rows
    assert row["error"] is None
    scope = scope.model_copy(update={"readout": READOUTS["generate"]})
    (row,) = ps.run(scope, model=model).rows
    assert row["error"].startswith("the reference is not finite")
    target = ps.Target(prompt=f"The city of {BAD} is", position=BAD, layer="embed", write="add")
    (row,) = ps.run(scope.model_copy(update={"target": target}), model=model).rows
    assert row["error"].startswith("the hidden state that the write changes is not finite: Llama")


def test_a_mapping_and_a_write_that_make_it_so(model):
    for mapping, target, message in (
        (blown, {}, "see mapping blown, scale 1, write replace."),
        ("identity", {"scale": [1.0, 1e39]}, "see mapping identity, scale 1e+39, write replace."),
    ):
        scope = scope_of(READOUTS["next_token"], **target).model_copy(update={"mapping": mapping})
        run = ps.run(scope, model=model, data=[{"s": "Diana"}])
        failed = [row for row in run.rows if row["error"]]
        assert len(failed) == 4
        assert [row["error"] for row in failed if message not in row["error"]] == []
        assert len(run.rows) == (4 if mapping is blown else 8)


def overflowing():
    """A float16 model whose third block overflows where a text has the bad token."""
    module = make(bad=torch.linspace(-2, 2, tiny.D_MODEL)).half()
    with torch.no_grad():
        module.model.layers[2].mlp.down_proj.weight *= 30000
    return module


def test_a_half_precision_model_that_overflows():
    """It overflows for every text, so it is refused as it is loaded; without the proof its cells say so."""
    with pytest.raises(ps.PatchscopeError, match="computes numbers that are not finite in float16"):
        ps.load(overflowing(), tokenizer=tiny.TOKENIZER)
    model = ps.load(overflowing(), tokenizer=tiny.TOKENIZER, proof=False)
    source = ps.Source(prompt="The city of Paris", layer="all")
    target = ps.Target(prompt="The city of x is", position="x", layer=3)
    run = ps.run(ps.Patchscope(source=source, target=target, readout=ps.NextToken(top_k=3)), model=model)
    by_layer = {row["source_layer"]: row["error"] for row in run.rows}
    assert "was read is not finite: layer 2 of LlamaForCausalLM (float16)" in by_layer[2]
    assert by_layer[0] is None or "not finite" in by_layer[0]


def test_a_masked_vocabulary_is_no_error():
    """Logits of -inf rule tokens out, patched or not."""
    module = tiny.make_module("gptj")
    with torch.no_grad():
        module.lm_head.bias[5:40] = -torch.inf
    model = ps.load(module, tokenizer=tiny.TOKENIZER)
    assert model.info.verdict.withheld == ()
    reference = hooks.Reference(module, blocks="transformer.h", attention="attn", mlp="mlp")
    for name, readout in READOUTS.items():
        run = ps.run(scope_of(readout), model=model, data=[{"s": "Diana"}], controls=["unpatched"])
        assert {row["error"] for row in run.rows} == {None}, name
        if name == "next_token":
            logits = reference.logits(tiny.TOKENIZER("The city of x is")["input_ids"])[-1]
            (control,) = (row for row in run.rows if row["control"])
            assert control["top_ids"] == logits.topk(3).indices.tolist()


def test_means_leave_failed_cells_out_and_say_how_many(model, tmp_path, capsys):
    from patchscope_nn.cli.run_printing import print_run

    rows = [{"s": "Diana"}, {"s": f"Diana {BAD}"}, {"s": "Paris"}]
    options = {"model": model, "data": rows, "metrics": ["surprisal_nats"]}
    run = ps.run(scope_of(ps.NextToken(top_k=3, reference="source")), out=tmp_path / "run", **options)
    summary = run.summary()
    assert list(summary["n_rows"].unique()) == [2]
    assert summary["n_cells"].sum() == 8
    assert summary["mean"].notna().all()
    assert run.table()["error"].notna().sum() == 4
    print_run(run, as_json=False)
    shown = " ".join(capsys.readouterr().out.split())
    assert "12 cells in" in shown
    assert "2 of them have no numbers and are left out of means: the hidden state that was read" in shown
    page = run.report(tmp_path / "page.html").read_text()
    assert "4 cells failed" in page
    print_run(run, as_json=True)
    assert '"failed": 4' in capsys.readouterr().out
    again = ps.load_run(tmp_path / "run")
    assert [row["error"] for row in again.rows] == [row["error"] for row in run.rows]


def test_a_quick_look_goes_on(model, capsys):
    from patchscope_nn.cli.printing import print_look

    look = ps.explain(f"Diana {BAD}", model=model, max_new_tokens=2)
    assert look.says[0].error is None
    assert all("was read is not finite" in says.error for says in look.says[1:])
    print_look(look, as_json=False)
    assert "was read is not finite" in capsys.readouterr().out


def test_the_explorer_says_why_it_has_nothing_to_show(tmp_path):
    from explorers import lenses

    from patchscope_nn.explore.answers import Answers
    from patchscope_nn.explore.copies import Options
    from patchscope_nn.explore.views import GridView
    from patchscope_nn.explore.worker import Query

    make().save_pretrained(tmp_path)
    tiny.TOKENIZER.save_pretrained(tmp_path)
    view = GridView(prompt=f"Paris {BAD}", source_model=str(tmp_path), target_model=str(tmp_path))
    answers, told = Answers(lenses(), Options()), []
    Query(lambda query: answers.grid(view, query), told.append).run()
    assert told[-1]["event"] == "error"
    assert "cells failed. The first: the hidden state that was read is not finite" in told[-1]["message"]
