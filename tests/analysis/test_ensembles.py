"""Prompt ensembles: what several target prompts say of one state, put together."""

from __future__ import annotations

import pandas as pd
import pytest

import patchscope_nn as ps

PROMPTS = ("Diana is x", "The city of x", "x")


def asked(**target):
    return ps.Patchscope(
        source=ps.Source(prompt="The Eiffel Tower is", position={"each": [1, -1]}, layer=[0, 3]),
        target=ps.Target(prompts=PROMPTS, position="x", layer=1, **target),
        readout=ps.NextToken(top_k=8),
    )


@pytest.mark.parametrize("how", ["intersect", "average"])
def test_members_are_put_together_state_by_state(how, tiny_model):
    run = ps.run(asked(combine=how), model=tiny_model(), controls=["unpatched", "random"])
    together, table = run.ensemble(), run.table()
    assert len(together) == 2 * 2 * 2 + 1  # positions, layers, kinds; and T as it is
    assert set(together["n_prompts"]) == {len(PROMPTS)}
    for row in together[together.control.isna()].to_dict("records"):
        same = (
            table.control.isna()
            & (table.source_layer == row["source_layer"])
            & (table.source_position.map(str) == str(row["source_position"]))
        )
        members = [dict(zip(*pair, strict=True)) for pair in table[same][["top_ids", "top_probs"]].to_numpy()]
        assert len(members) == len(PROMPTS)
        tokens = set.intersection(*map(set, members)) if how == "intersect" else set().union(*members)
        expected = {one: sum(member.get(one, 0) for member in members) / len(members) for one in tokens}
        assert dict(zip(row["top_ids"], row["top_probs"], strict=True)) == pytest.approx(expected)
        assert row["top_probs"] == sorted(row["top_probs"], reverse=True)


def test_a_folder_keeps_them(tiny_model, tmp_path):
    run = ps.run(asked(), model=tiny_model(), out=tmp_path / "run")
    kept = pd.read_csv(tmp_path / "run/ensemble.csv")
    assert kept["top_ids"].map(str).tolist() == run.ensemble()["top_ids"].map(str).tolist()


def test_without_next_tokens_there_is_nothing_to_put_together(tiny_model):
    scope = asked().model_copy(update={"readout": ps.Generate(max_new_tokens=2)})
    with pytest.raises(ps.InputError, match="readout: next_token"):
        ps.run(scope, model=tiny_model()).ensemble()
