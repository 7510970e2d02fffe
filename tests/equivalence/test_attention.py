"""Attention to what tokens share, apart from their own: against PyTorch's with a mask, and that it runs."""

from __future__ import annotations

import hooks
import pytest
import tiny
import torch
from torch.nn.functional import scaled_dot_product_attention

from patchscope_nn import Optimisations
from patchscope_nn.body import packed
from patchscope_nn.body.attention import in_attending, in_own_tokens, in_packed_attention
from patchscope_nn.lower import lower
from patchscope_nn.mappings import resolve_mapping
from patchscope_nn.plan import plan
from patchscope_nn.readouts import NextToken
from patchscope_nn.spec import Patchscope, Source, Target
from patchscope_nn.sweep import expand

N_TOKENS, D_HEAD = 6, 8


def own_tokens(*seen):
    """The tokens after the prefix that each token attends to, and which of these are real."""
    most = max(map(len, seen))
    return (
        torch.tensor([[*places, *[0] * (most - len(places))] for places in seen]),
        torch.tensor([[place < len(places) for place in range(most)] for places in seen]),
    )


#: Of six tokens the last two are one cell's, the first of them its patch.
OWN = own_tokens([0], [1], [2], [3], [4], [4, 5])
ONE = own_tokens([0], [1], [2], [3], [4], [4])
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def masked(query, key, value, prefix, own, *, scale):
    """The same as one sequence with a mask."""
    mask = torch.zeros(len(own[0]), key.shape[2], dtype=torch.bool)
    mask[:, :prefix] = True
    for token, (places, real) in enumerate(zip(*own, strict=True)):
        mask[token, prefix + places[real]] = True
    times = query.shape[1] // key.shape[1]
    key, value = (one.repeat_interleave(times, dim=1) for one in (key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("own", [OWN, ONE], ids=["two own", "one own"])
@pytest.mark.parametrize("prefix", [0, 1, 70])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_it_equals_attention_with_a_mask(heads, prefix, own, dtype, scale):
    torch.manual_seed(prefix)
    query = torch.randn(1, heads[0], N_TOKENS, D_HEAD).to(dtype)
    key, value = torch.randn(2, 1, heads[1], prefix + N_TOKENS, D_HEAD).to(dtype)
    found = in_packed_attention(query, key, value, prefix, own, scale=scale)
    assert found.shape == query.shape
    assert found.dtype == dtype
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(
        found, masked(query, key, value, prefix, own, scale=scale), atol=tolerance, rtol=tolerance
    )


def test_large_scores_lose_nothing():
    query = 40 * torch.ones(1, 1, 1, D_HEAD)
    key, value = torch.randn(2, 1, 1, 4, D_HEAD) * 20
    own = own_tokens([0])
    torch.testing.assert_close(
        in_packed_attention(query, key, value, 3, own, scale=None),
        masked(query, key, value, 3, own, scale=None),
    )


def sweep(prompt, position):
    return Patchscope(
        source=Source(prompt="Diana is in Paris", position=-1, layer="all"),
        target=Target(prompt=prompt, position=position, layer="all"),
        readout=NextToken(top_k=2),
    )


@pytest.fixture
def calls(monkeypatch):
    """How often the packed passes of a run attended so."""
    seen = []
    real = packed.in_packed_attention

    def noted(*args, **kwargs):
        seen.append(args[3])
        return real(*args, **kwargs)

    monkeypatch.setattr(packed, "in_packed_attention", noted)
    return seen


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_that_calls_pytorchs_attention_uses_it(family, tiny_model, run_cells, calls):
    model = tiny_model(family)
    cells = run_cells(sweep("The x", -1), model, rows=[{}], context="session")
    assert len(cells) == tiny.N_LAYERS**2
    architecture = model.info.architecture
    wanted = architecture.packs and architecture.attends
    assert len(calls) == (tiny.N_LAYERS - 1) * wanted, (
        "once in every block but the first, which no cell enters"
    )


@pytest.mark.parametrize(
    ("family", "target", "used"),
    [
        ("llama", ("The city of Paris x", -1), Optimisations(shared_attention=False)),
        ("llama", ("x is The city of Paris in The city of Paris", 0), Optimisations()),
        ("mistral", ("The city of Paris x", -1), Optimisations()),
    ],
    ids=["off", "many own tokens", "a window shorter than the prompt"],
)
def test_it_is_left_out(family, target, used, request, calls):
    model, run_cells = request.getfixturevalue("tiny_model")(family), request.getfixturevalue("run_cells")
    scope = sweep(*target)
    assert run_cells(scope, model, rows=[{}], context="session", optimisations=used)
    assert calls == []


def test_a_block_that_attends_otherwise_is_an_error():
    attending = in_attending(None)
    with pytest.raises(RuntimeError, match="block 3 does not call its attention as the first block does"):
        packed._in_attended(lambda **given: given, {}, attending, 3)


def hand_mask(layout, window):
    """What each token of a pass attends to, from its layout alone: (n_tokens, prefix + n_tokens)."""
    names = ("prompt", "first", "count", "is_branch")
    segments = list(zip(*(getattr(layout, name).tolist() for name in names), strict=True))
    tokens = [
        (number, segment, segment[1] + at)
        for number, segment in enumerate(segments)
        for at in range(segment[2])
    ]
    rows = []
    for number, (prompt, first, _, is_branch), position in tokens:
        row = [True] * layout.prefix
        for other, segment, before in tokens:
            is_trunk = is_branch and not segment[3] and segment[0] == prompt and before < first
            row.append(before <= position and (other == number or is_trunk))
        keys = [*range(layout.prefix), *(before for *_, before in tokens)]
        near = [window is None or position - before < window for before in keys]
        rows.append([sees and close for sees, close in zip(row, near, strict=True)])
    return torch.tensor(rows)


@pytest.mark.parametrize("late_entry", [True, False])
@pytest.mark.parametrize("position", [-1, -2, 1])
def test_what_a_token_sees_makes_the_same_mask(position, late_entry, tiny_model):
    """The mask of a pass, with and without a window, and the tokens that are attended to separately."""
    model = tiny_model("llama")
    scope = Patchscope(
        source=Source(prompt="Diana", position=-1, layer="all"),
        target=Target(prompt="The city {t} x", position=position, layer="all"),
        readout=NextToken(),
    )
    rows = [{"t": text} for text in ("of", "in")]
    sweep = expand(scope, rows=rows, controls=["unpatched"], source=model, target=model, seed=0)
    planned = plan(sweep, context="session", optimisations=Optimisations(late_entry=late_entry))
    (step,) = planned.steps()
    ((_, layout),) = step.targets
    mapping = resolve_mapping("identity", source=model.info, target=model.info)
    (target,) = lower(planned, step, source=model, target=model, mapping=mapping)["targets"]
    assert (layout.prefix > 1) == (position < 0)  # with and without a prefix
    assert not layout.is_branch.all()
    assert layout.is_branch.any()
    for window in (None, 3):
        by_hand = hand_mask(layout, window)
        for count in range(1, layout.n_tokens + 1):
            mask = packed._in_mask(target, torch.zeros(1, count, 4), window, {})
            assert torch.equal(mask[0, 0] == 0, by_hand[:count, : layout.prefix + count])
            assert (mask[mask != 0] == torch.finfo(mask.dtype).min).all()
    places, real = in_own_tokens(target, "cpu")
    assert real.any(1).all()
    own = torch.zeros(layout.n_tokens, layout.n_tokens, dtype=torch.int64)
    for token in range(layout.n_tokens):
        for place in places[token][real[token]].tolist():
            own[token, place] += 1  # each is attended to once
    assert torch.equal(own, hand_mask(layout, None)[:, layout.prefix :].long())


def test_it_travels(tiny_model, run_cells):
    """Through nnsight's serialisation the same, where no class of this package may be needed."""
    scope, model = sweep("The city of Paris x", -1), tiny_model("llama")
    found = run_cells(scope, model, rows=[{}], context="session", remote="local")
    expected = run_cells(scope, model, rows=[{}], optimisations=Optimisations.none())
    for (cell, given), (other, wanted) in zip(found, expected, strict=True):
        assert cell == other
        hooks.assert_same(given, wanted)
