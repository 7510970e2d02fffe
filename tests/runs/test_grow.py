"""Runs that grow: more rows, layers, positions, scales and controls in one folder, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import parts
import pytest
import tiny
import torch
from growth import ROWS, grow, ran, same, scope_of
from killed import kill_at

import patchscope_nn as ps
from patchscope_nn.backends.jobs.job_log import Job, JobLog
from patchscope_nn.errors import FolderError
from patchscope_nn.runs import identity
from patchscope_nn.runs.prepare import prepare

EACH = ps.Each((-1, 0))


#: For each way to grow: what the first run has, what the second has, and how many cells the second adds.
WAYS = {
    "rows": ({"data": ROWS[:2]}, {}, 4 * 9),
    "rows before": ({"data": ROWS[2:4]}, {}, 4 * 9),
    "rows in another order": ({"data": ROWS[::-1]}, {}, 0),
    "limit": ({"limit": 1}, {"limit": 6}, 5 * 9),
    "layers": ({"scope": scope_of(layer=[3, 1])}, {}, 6 * 2 * 2),
    "target layers": (
        {"scope": scope_of(target_layer=[2])},
        {"scope": scope_of(target_layer=[0, 2])},
        6 * 4 * 2,
    ),
    "positions": ({}, {"scope": scope_of(position=EACH)}, 6 * 4 * 2 + 6),
    "scales": ({}, {"scope": scope_of(scale=[2.0, 1.0])}, 6 * 4 * 2),
    "controls": ({"controls": []}, {}, 6 + 6 * 4),
    "all at once": (
        {"data": ROWS[1:3], "scope": scope_of(layer=[2]), "controls": ["random"]},
        {},
        6 * 9 - 2 * 2,
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_grows_computes_what_is_missing_and_equals_the_whole(way, tiny_model, tmp_path):
    first, second, n_more = WAYS[way]
    model, out = tiny_model(), tmp_path / "run"
    before = grow(model, out=out, **first)
    kept = parts.contents(out)
    grown = grow(model, out=out, **second)
    assert ran(grown) == [len(before.rows), n_more]
    assert kept.items() <= parts.contents(out).items()
    whole = grow(model, **second)
    assert same(grown, whole)
    assert (grown.manifest["hash"], grown.manifest["n_cells"]) == (whole.manifest["hash"], len(whole.rows))
    assert grown.manifest["state"] == "finished"
    pd.testing.assert_frame_equal(grown.summary(), whole.summary(), atol=1e-6)
    again = grow(model, out=out, **second)
    assert again.manifest == grown.manifest
    assert same(again, whole)


def test_a_run_grows_many_times(tiny_model, tmp_path):
    model, out = tiny_model(), tmp_path / "run"
    for data, layer in ((ROWS[3:4], [1]), (ROWS[2:4], [1, 3]), (ROWS[:4], [0, 1, 3]), (ROWS, "all")):
        grown = grow(model, out=out, data=data, scope=scope_of(layer=layer))
        assert same(grown, grow(model, data=data, scope=scope_of(layer=layer)))
    assert sum(ran(grown)) == len(grown.rows)
    assert len(ran(grown)) == 4


def test_equal_data_rows_are_counted(tiny_model, tmp_path):
    """Each of the equal rows has its own cells; as many of them are kept as there were."""
    model, out = tiny_model(), tmp_path / "run"
    twice = [ROWS[0], ROWS[1], ROWS[0]]
    grow(model, out=out, data=twice[:1])
    grown = grow(model, out=out, data=twice)
    assert ran(grown) == [9, 18]
    assert same(grown, grow(model, data=twice))
    more = [ROWS[2], *twice, ROWS[0]]
    assert ran(grow(model, out=out, data=more)) == [9, 18, 18]
    assert same(grow(model, out=out, data=more), grow(model, data=more))


def test_equal_cells_of_one_row_are_counted(tiny_model, tmp_path):
    scope = scope_of(target=ps.Target(prompts=["The city -> ", "Paris", "The city -> "]))
    model, out = tiny_model(), tmp_path / "run"
    given = {"scope": scope}
    prepared = prepare(scope, model=model, data=ROWS).only
    rows_and_seeds = {(cell.row, cell.seed) for cell in prepared.sweep.cells}
    assert len(rows_and_seeds) < len(prepared.sweep.cells) == len({*prepared.index.keys.tolist()})
    first = grow(model, out=out, **given, data=ROWS[:3])
    grown = grow(model, out=out, **given)
    assert ran(grown) == [len(first.rows), len(first.rows)]
    assert same(grown, grow(model, **given))


def test_shuffled_cells_with_another_partner_run_again(tiny_model, tmp_path):
    model, out = tiny_model(), tmp_path / "run"
    controls = ["unpatched", "shuffled"]
    grow(model, out=out, data=ROWS[:3], controls=controls)
    kept = parts.contents(out)
    grown = grow(model, out=out, controls=controls)
    before, now = ran(grown)
    assert before == 3 * 9
    assert 3 * 9 < now <= 3 * 9 + 3 * 4
    assert same(grown, grow(model, controls=controls))
    assert len(grown.rows) == 6 * 9
    assert kept.items() <= parts.contents(out).items()
    light = grown.light_table()
    assert light["control"].tolist() == grown.table()["control"].tolist()
    assert [row["row"] for row in grown.rows.first(12)] == [row["row"] for row in grown.rows][:12]


def test_a_wide_run_grows_in_its_layers_with_a_fitted_mapping(tiny_model, tmp_path):
    """Weights are compared for each pair of layers that both runs have."""
    model, out = tiny_model(), tmp_path / "run"
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(tiny.D_MODEL, tiny.D_MODEL, generator=generator) for _ in range(4)]
    space = ps.Space(name="x", revision=None, d_model=tiny.D_MODEL, dtype="float32", site="residual")

    def fitted(layers, file, scale=1.0):
        maps = {(layer, layer): {"weight": weights[layer] * scale} for layer in layers}
        about = ps.Provenance(source_model=space, target_model=space)
        ps.Fitted(kind="affine", maps=maps, about=about).save(tmp_path / file)
        return {"mapping": {"fitted": str(tmp_path / file)}}

    grow(model, out=out, scope=scope_of(layer=[1, 2], **fitted([1, 2], "map.safetensors")))
    scope = scope_of(**fitted(range(4), "map.safetensors"))
    grown = grow(model, out=out, scope=scope)
    assert ran(grown) == [6 + 6 * 2 * 2, 6 * 2 * 2]
    assert same(grown, grow(model, scope=scope))
    with pytest.raises(FolderError, match=r"its weights of mapping 0:0 is '[0-9a-f]{16}', and this run's is"):
        grow(model, out=out, scope=scope_of(**fitted(range(4), "map.safetensors", scale=2.0)))


def test_more_layers_go_on_with_a_mapping_that_the_run_fits(tiny_model, tmp_path, monkeypatch):
    """Each pair is fitted by itself, so that its cells stay; with other data it is another mapping."""
    monkeypatch.setenv("PATCHSCOPE_CACHE", str(tmp_path))
    texts = [
        {"text": f"The Eiffel Tower is in {word} the city"} for word in ("a", "b", "Paris", "Diana", "d")
    ]

    def fitted(layer, rows=texts):
        fit = ps.Recipe(
            name="fitted",
            source={"prompt": "{text}", "layer": layer},
            target={"prompt": "The city -> ", "layer": 3},
            mapping={"fit": {"kind": "scale", "data": {"rows": rows}, "column": "text"}},
        )
        return fit.scope

    model, out, given = tiny_model(), tmp_path / "run", {"metrics": []}
    grow(model, out=out, scope=fitted([1]), **given)
    grown = grow(model, out=out, scope=fitted([0, 1]), **given)
    assert ran(grown) == [6 + 6 * 2, 6 * 2]
    assert same(grown, grow(model, scope=fitted([0, 1]), **given))
    with pytest.raises(FolderError, match="its mapping is"):
        grow(model, out=out, scope=fitted([0, 1], texts[1:]), **given)


def test_a_smaller_run_is_refused_and_nothing_is_changed(tiny_model, tmp_path):
    model, out = tiny_model(), tmp_path / "run"
    whole = grow(model, out=out)
    before = parts.contents(out)
    for smaller, n_lost in (
        ({"limit": 2}, 4 * 9),
        ({"scope": scope_of(layer=[0])}, 6 * 3 * 2),
        ({"controls": []}, 6 * 5),
        ({"data": [*ROWS[1:], {"text": "the Tower"}]}, 9),
    ):
        with pytest.raises(
            FolderError, match=f"run has {n_lost} finished cells that are not part of this run"
        ):
            grow(model, out=out, **smaller)
    assert parts.contents(out) == before
    assert same(ps.load_run(out), whole)


OTHERS = {
    "source dtype": ({"dtype": "bfloat16"}, "'float32', and this run's is 'bfloat16'"),
    "source.site": (
        {"scope": scope_of(source=ps.Source(prompt="{text}", site="mlp"))},
        "'residual', and this run's is 'mlp'",
    ),
    "source.prompt": (
        {"scope": scope_of(source=ps.Source(prompt="the {text}"))},
        "'{text}', and this run's is 'the {text}'",
    ),
    "readout": ({"scope": scope_of(readout=ps.NextToken(top_k=2, reference="source"))}, "top_k"),
    "metrics": ({"metrics": ["nll_nats"]}, ", and this run's is"),
    "seed": ({"seed": 3}, "0, and this run's is 3"),
}


@pytest.mark.parametrize("field", OTHERS)
def test_what_may_not_be_mixed_is_refused_with_both_values(field, tmp_path, tiny_model):
    folder, out = tmp_path / "model", tmp_path / "run"
    tiny.make_module("llama").save_pretrained(folder)
    tiny.TOKENIZER.save_pretrained(folder)
    grow(str(folder), out=out, dtype="float32")
    before = parts.contents(out)
    other, values = OTHERS[field]
    with pytest.raises(FolderError) as caught:
        grow(str(folder), out=out, **({"dtype": "float32"} | other))
    assert f"holds cells of another run: its {field} is " in caught.value.message
    assert values in caught.value.message
    assert parts.contents(out) == before


def test_other_weights_at_the_same_place_are_another_model(tmp_path):
    folder, out = tmp_path / "model", tmp_path / "run"
    module = tiny.make_module("llama")
    module.save_pretrained(folder)
    tiny.TOKENIZER.save_pretrained(folder)
    grow(str(folder), out=out, limit=2)
    with torch.no_grad():
        module.model.layers[2].mlp.down_proj.weight.mul_(1.01)
    module.save_pretrained(folder)
    with pytest.raises(FolderError, match=r"its source weights is '\w{16}', and this run's is '\w{16}'"):
        grow(str(folder), out=out)


def test_another_version_of_the_results_is_refused(tiny_model, tmp_path, monkeypatch):
    model, out = tiny_model(), tmp_path / "run"
    grow(model, out=out, limit=2)
    monkeypatch.setattr(identity, "RESULTS", identity.RESULTS + 1)
    with pytest.raises(FolderError, match=r"its result version is 1, and this run's is 2\."):
        grow(model, out=out)


def test_a_folder_without_an_identity_is_read_but_not_continued(tiny_model, tmp_path):
    model, out = tiny_model(), tmp_path / "run"
    run = grow(model, out=out, limit=2)
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["identity"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FolderError, match="was written by an earlier version of patchscope-nn"):
        grow(model, out=out)
    assert same(ps.load_run(out), run)


def test_a_model_on_a_server_may_go_on_with_the_same_model_here(tiny_model, tmp_path):
    """Its weights are not known there; name, revision and dtype are compared."""
    model, out = tiny_model(), tmp_path / "run"
    grow(model, out=out, limit=2)
    manifest = json.loads((out / "manifest.json").read_text())
    known = manifest["identity"]["source weights"]
    manifest["identity"] |= {"source weights": None, "target weights": None}
    (out / "manifest.json").write_text(json.dumps(manifest))
    grown = grow(model, out=out)
    assert ran(grown) == [18, 36]
    assert grown.manifest["identity"]["source weights"] == known


_KILLED = """
from growth import grow
grow(model, out={out!r}, **{given!r})
"""


def test_a_killed_run_grows(tiny_model, tmp_path):
    """kill -9 before the run has grown, and again while it grows."""
    out = tmp_path / "run"
    finished = 0
    for given in ({"limit": 3, "max_rows": 1}, {"limit": 5, "max_rows": 1}):
        kill_at(0, _KILLED.format(out=str(out), given=given))
        before, finished = finished, len(parts.cells(out))
        assert before < finished < 9 * given["limit"]
        assert len(ps.load_run(out).rows) == finished
    grown = grow(tiny_model(), out=out)
    assert ran(grown) == [6 * 9 - finished]
    assert same(grown, grow(tiny_model()))


def test_a_damaged_part_of_a_grown_run_runs_again(tiny_model, tmp_path):
    model, out = tiny_model(), tmp_path / "run"
    grow(model, out=out, data=ROWS[3:])
    grow(model, out=out)
    last = max((out / "cells").glob("*.arrow"))
    (out / "cells/00000000.arrow").unlink()
    last.unlink()
    n_left = len(parts.cells(out))
    grown = grow(model, out=out)
    assert ran(grown)[-1] == 6 * 9 - n_left
    assert same(grown, grow(model))


def test_the_probe_of_a_grown_run_is_trained_again(tiny_model, tmp_path):
    pytest.importorskip("sklearn")
    recipe = {
        "name": "probed",
        "source": {"prompt": "{text}", "layer": [1, 2]},
        "readout": "hidden",
        "probe": {"label": "label", "folds": 2},
    }
    rows = [{**row, "label": "ab"[number % 2]} for number, row in enumerate(ROWS)]
    model, out = tiny_model(), tmp_path / "run"
    ps.run(ps.Recipe(**recipe), model=model, data=rows[:4], out=out)
    for data in (rows, rows[::-1]):
        grown = ps.run(ps.Recipe(**recipe), model=model, data=data, out=out)
        whole = ps.run(ps.Recipe(**recipe), model=model, data=data)
        columns = ["row", "probe_choice", "probe_accuracy"]
        pd.testing.assert_frame_equal(grown.table()[columns], whole.table()[columns])
    assert ran(grown) == [8, 4, 0]


def test_a_title_is_not_part_of_what_a_run_is(tiny_model, tmp_path):
    recipe = {"name": "one", "source": {"prompt": "The city"}, "target": {"prompt": "Paris -> "}}
    model, out = tiny_model(), tmp_path / "run"
    ps.run(ps.Recipe(**recipe, title="First"), model=model, out=out)
    again = ps.run(ps.Recipe(**recipe, title="Second"), model=model, out=out)
    assert again.manifest["recipe"]["title"] == "Second"
    assert ran(again) == [4, 0]


def test_the_report_of_a_smaller_run_does_not_stay_beside_a_larger_table(tiny_model, tmp_path):
    model, out = tiny_model(), tmp_path / "run"
    grow(model, out=out, limit=2)
    grow(model, out=out, limit=2, report=False)
    assert (out / "report.html").exists()
    grow(model, out=out, report=False)
    assert not (out / "report.html").exists()


def test_jobs_of_a_run_that_has_grown_keep_their_cells(tiny_model, tmp_path):
    """A job log names cells by their keys, so that an unfinished job belongs to the same cells afterwards."""
    model = tiny_model()
    small, large = (prepare(scope_of(), model=model, data=data).only for data in (ROWS[4:], ROWS))
    sent = Job(id="one", host="http://x", context="session", passes=(((0, 1), (5,)), ((7,),)), sent="")
    JobLog(tmp_path, small.index).sent(sent)
    assert JobLog(tmp_path, small.index).jobs() == (sent,)
    (job,) = JobLog(tmp_path, large.index).live()
    assert job.cells == (16, 17, 21, 23)
    assert [large.sweep.cells[cell].row for cell in job.cells] == [4, 4, 5, 5]
    (gone,) = JobLog(tmp_path, prepare(scope_of(layer=[1]), model=model, data=ROWS).only.index).live()
    assert gone.passes == (((-1, 4), (5,)), ((-1,),))
    assert gone.results == [(4,), (5,)]


@pytest.mark.quick
def test_a_key_depends_on_the_cell_and_its_data_row_alone(tiny_model):
    model = tiny_model()
    named = [{**row, "name": name} for row, name in zip(ROWS, "abcdef", strict=True)]
    whole = prepare(scope_of(), model=model, data=ROWS, controls=["random"]).only
    keys = whole.index.keys
    assert len({*keys.tolist()}) == len(whole.sweep.cells)
    part = prepare(scope_of(layer=[2, 0]), model=model, data=ROWS[::-1]).only
    found = whole.index.find(part.index.keys)
    for mine, cell in zip(part.sweep.cells, found.tolist(), strict=True):
        theirs = whole.sweep.cells[cell]
        assert (theirs.source_layer, theirs.control) == (mine.source_layer, None)
        assert theirs.row == 5 - mine.row
    np.testing.assert_array_equal(part.index.rows(np.arange(12)), np.repeat(np.arange(6), 2))
    other = prepare(scope_of(), model=model, data=named).only
    assert (whole.index.find(other.index.keys) == -1).all()
