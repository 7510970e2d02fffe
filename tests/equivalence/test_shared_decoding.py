"""Rows that decode hold keys and values of a shared prefix once: against plain hooks, and that it runs."""

from __future__ import annotations

import hooks
import pytest
import tiny
import torch
from torch.nn.functional import scaled_dot_product_attention

from patchscope_nn import Optimisations
from patchscope_nn.body import attention, shared
from patchscope_nn.body.attention import in_row_attention
from patchscope_nn.plan import plan
from patchscope_nn.readouts import Choices, Generate
from patchscope_nn.spec import Patchscope, Source, Target
from patchscope_nn.sweep import expand

D_HEAD = 8
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
READOUTS = {
    "greedy": Generate(max_new_tokens=6),
    "sampled": Generate(max_new_tokens=6, temperature=0.8),
    "choices": Choices(["{a}", "{b}"]),
}
#: Choices of one token and of several; two target prompts of one length, which begin with the same tokens.
ROWS = (
    {"s": "Diana is in Paris", "t": "The city of Paris in x", "a": " Paris", "b": " the city of"},
    {"s": "The Eiffel Tower", "t": "The city of Paris is x", "a": " Diana of Paris", "b": " in"},
)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize(("n_own", "count"), [(1, 1), (5, 1), (5, 3), (4, 4)])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("fused", [True, False])
def test_it_equals_attention_over_whole_rows(*, heads, n_own, count, dtype, scale, fused, monkeypatch):
    if not fused:  # as on a device that has no fused kernel with a normaliser
        monkeypatch.delitem(attention._KERNELS, "cpu")
    torch.manual_seed(n_own)
    n_rows, n_prefix = 3, 70
    queries = torch.randn(n_rows, heads[0], count, D_HEAD).to(dtype)
    prefix = torch.randn(2, 1, heads[1], n_prefix, D_HEAD).to(dtype)
    keys, values = torch.randn(2, n_rows, heads[1], n_own, D_HEAD).to(dtype)
    found = in_row_attention(queries, keys, values, tuple(prefix), scale=scale)
    assert found.shape == queries.shape
    assert found.dtype == dtype
    whole = [
        torch.cat([once.expand(n_rows, -1, -1, -1), own], dim=2).repeat_interleave(
            heads[0] // heads[1], dim=1
        )
        for once, own in zip(prefix, (keys, values), strict=True)
    ]
    mask = torch.ones(count, n_prefix + n_own, dtype=torch.bool).tril(n_prefix + n_own - count)
    wanted = scaled_dot_product_attention(queries, *whole, attn_mask=mask, scale=scale)
    torch.testing.assert_close(found, wanted, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


def test_the_kernel_of_cuda_returns_a_normaliser_for_each_query():
    """Only the shapes: `proof` compares its numbers where such a device is."""
    queries, keys = (torch.empty(1, 2, count, 64, device="meta") for count in (45, 70))
    seen, norm = attention._KERNELS["cuda"](queries, keys, keys, 0.5)
    assert seen.shape == queries.shape
    assert norm.shape == queries.shape[:3]


def scope(readout="greedy", *, position=-1):
    return Patchscope(
        source=Source(prompt="{s}", position=-1, layer="all"),
        target=Target(prompt="{t}", position=position, layer=["embed", 1]),
        readout=READOUTS[readout],
    )


@pytest.fixture
def held(monkeypatch):
    """The number of tokens whose keys and values each row holds, and of those of the prefix, at each call."""
    seen = []
    real = shared.in_row_attention

    def noted(queries, keys, values, prefix, **options):
        seen.append((keys.shape[2], prefix[0].shape[2]))
        return real(queries, keys, values, prefix, **options)

    monkeypatch.setattr(shared, "in_row_attention", noted)
    return seen


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_decodes_as_before(family, readout, tiny_model, run_cells, held):
    """Off gives the same; a family that calls PyTorch's attention uses it, with rows of their own tokens."""
    model = tiny_model(family)
    found = run_cells(scope(readout), model, rows=ROWS, controls=["unpatched"], context="session")
    used = bool(held)
    off = Optimisations(shared_attention=False)
    before = run_cells(
        scope(readout), model, rows=ROWS, controls=["unpatched"], context="session", optimisations=off
    )
    for (cell, given), (other, wanted) in zip(found, before, strict=True):
        assert cell == other
        hooks.assert_same(given, wanted)
    windows = [window for window in model.info.architecture.windows if window is not None]
    longest = max(len(tiny.TOKENIZER(row["t"])["input_ids"]) for row in ROWS) + 6
    features = ("packing", "shared_attention", "positions")
    possible = all(model.info.supports(feature) for feature in features)
    assert used == (possible and min(windows, default=longest) >= longest), family
    if used:
        own, prefix = zip(*held, strict=True)
        assert max(own) < longest - min(prefix)


@pytest.mark.parametrize("readout", ["greedy", "choices"])
@pytest.mark.parametrize("position", [-1, -2])
def test_it_equals_plain_hooks(readout, position, tiny_model, run_cells, held):
    used = scope(readout, position=position)
    found = run_cells(used, tiny_model(), rows=ROWS, controls=["unpatched", "shuffled"], context="session")
    assert held
    pair = hooks.Pair(used, tiny.reference("llama"), tokenizer=tiny.TOKENIZER, eos=[tiny.EOS_ID])
    for cell, given in found:
        if cell.control != "shuffled":
            hooks.assert_same(given, pair.expected(cell, ROWS[cell.row]))


@pytest.mark.parametrize("readout", READOUTS)
def test_it_travels(readout, tiny_model, run_cells):
    """Through nnsight's serialisation the same, where no class of this package may be needed."""
    found = run_cells(scope(readout), tiny_model(), rows=ROWS, context="session", remote="local")
    wanted = run_cells(scope(readout), tiny_model(), rows=ROWS, optimisations=Optimisations.none())
    for (cell, given), (other, expected) in zip(found, wanted, strict=True):
        assert cell == other
        hooks.assert_same(given, expected)


@pytest.mark.parametrize(
    ("family", "readout", "used", "why"),
    [
        ("llama", "greedy", Optimisations(), None),
        ("llama", "greedy", Optimisations(shared_attention=False), "shared attention is off"),
        ("mistral", "greedy", Optimisations(), "a window of mistral is shorter than prompt and text"),
        ("gptj", "choices", Optimisations(), "gptj does not compute attention by PyTorch's function"),
    ],
)
def test_the_plan_says_whether_rows_copy_the_prefix(family, readout, used, why, tiny_model):
    model = tiny_model(family)
    sweep = expand(scope(readout), rows=ROWS, controls=[], source=model, target=model, seed=0)
    text = str(plan(sweep, context="session", optimisations=used))
    shared = "all rows share the prefix's keys and values"
    copied = f"each row copies the prefix's keys and values, since {why}"
    assert f"decoding: {copied if why else shared}" in text


def test_a_block_that_attends_otherwise_is_an_error():
    class Layers:
        layers = (None, None)

        def get_seq_length(self):
            return 3

    forward, cache = shared.in_shared(lambda **given: given, Layers())
    assert cache.get_seq_length() == 3
    with pytest.raises(RuntimeError, match="do not call their attention once each"):
        forward(input_ids=torch.zeros(1, 1, dtype=torch.long))
