"""Fits against independent computations: scikit-learn, scipy, a dense SVD, and states from plain hooks."""

from __future__ import annotations

import hooks
import numpy as np
import pytest
import scipy.linalg
import tiny
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from patchscope_nn.backends import Places
from patchscope_nn.data.rows import DataSpec
from patchscope_nn.fitting.closed.fit import fit_mapping, fit_pairs
from patchscope_nn.fitting.closed.score import Scores
from patchscope_nn.fitting.closed.solve import ALPHAS, solve
from patchscope_nn.fitting.closed.states import Paired, Pairing
from patchscope_nn.fitting.closed.sums import Sums
from patchscope_nn.fitting.texts import read_texts
from patchscope_nn.models import load
from patchscope_nn.spec import Fit

D_IN, D_OUT, PAIR = 12, 9, (0, 3)
WORDS = (
    "The",
    " Eiffel",
    " Tower",
    " is",
    " in",
    " the",
    " city",
    " of",
    " Paris",
    " Diana",
    "->",
    " a",
    ".",
)


def texts_of(count, seed=0, longest=12):
    chooser = np.random.default_rng(seed)
    return ["".join(chooser.choice(WORDS, chooser.integers(4, longest))) for _ in range(count)]


def states_of(n, *, d_out=D_OUT, seed=0):
    """States with a mean far larger than their spread, and a target that is nearly an affine map of them."""
    chooser = np.random.default_rng(seed)
    x = chooser.normal(size=(n, D_IN)) * np.geomspace(0.1, 5, D_IN) + 300 * np.arange(D_IN)
    y = x @ np.random.default_rng(9).normal(size=(D_IN, d_out)) + 2 * chooser.normal(size=(n, d_out)) - 50
    return torch.tensor(x), torch.tensor(y)


def sums_of(x, y, *, about=None, batch=37):
    sums = Sums([PAIR], {} if about is None else about)
    for start in range(0, len(x), batch):
        sums.add({0: x[start : start + batch]}, {3: y[start : start + batch]})
    return sums


def solved(options, first, second):
    about = {}
    return solve(options, sums_of(*first, about=about), sums_of(*second, about=about), PAIR)


def test_streamed_sums_are_the_sums_at_once():
    x, y = states_of(200)
    one, other = sums_of(x, y, batch=7).centred(PAIR), sums_of(x, y, batch=200).centred(PAIR)
    dx, dy = x - x.mean(0), y - y.mean(0)
    expected = (200, x.mean(0), y.mean(0), dx.T @ dx, dx.T @ dy, (dy * dy).sum())
    for given, streamed, value in zip(other, one, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(given), torch.as_tensor(value), rtol=1e-9, atol=1e-6)
        torch.testing.assert_close(torch.as_tensor(streamed), torch.as_tensor(value), rtol=1e-9, atol=1e-6)
    zero = torch.zeros(D_IN, dtype=torch.float64)
    about = sums_of(x, y).centred(PAIR, mean_x=zero, mean_y=zero[:D_OUT])
    torch.testing.assert_close(about.xx, x.T @ x, rtol=1e-9, atol=1e-6)
    torch.testing.assert_close(about.xy, x.T @ y, rtol=1e-9, atol=1e-6)


def test_sums_that_are_added_are_the_sums_of_both():
    about, (x, y), (u, v) = {}, states_of(50), states_of(30, seed=1)
    both = sums_of(x, y, about=about).plus(sums_of(u, v, about=about)).centred(PAIR)
    whole = sums_of(torch.cat([x, u]), torch.cat([y, v])).centred(PAIR)
    for given, expected in zip(both, whole, strict=True):
        torch.testing.assert_close(torch.as_tensor(given), torch.as_tensor(expected), rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("chosen", [1e-3, 0.3, 10.0])
def test_affine_is_scikit_learns_ridge(chosen):
    first, second = states_of(80), states_of(20, seed=1)
    x, y = (torch.cat(pair) for pair in zip(first, second, strict=True))
    found = solved(Fit(lambdas=[chosen]), first, second)
    alpha = chosen * ((x - x.mean(0)) ** 2).sum().item() / D_IN
    ridge = Ridge(alpha=alpha, solver="cholesky").fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(found.parts["weight"].numpy(), ridge.coef_, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.parts["bias"].numpy(), ridge.intercept_, rtol=1e-4, atol=1e-2)
    assert found.n == 100


def test_lambda_is_the_one_with_the_least_error_on_texts_that_were_not_fitted_on():
    first, second = states_of(14), states_of(200, seed=1)
    grid = Fit().lambdas
    errors = []
    for one in grid:
        alpha = one * ((first[0] - first[0].mean(0)) ** 2).sum().item() / D_IN
        ridge = Ridge(alpha=alpha, solver="cholesky").fit(first[0].numpy(), first[1].numpy())
        errors.append(((ridge.predict(second[0].numpy()) - second[1].numpy()) ** 2).sum())
    found = solved(Fit(), first, second)
    assert found.settings["lambda"] == grid[int(np.argmin(errors))]
    assert len(set(errors)) == len(grid)


def test_orthogonal_is_scipys_procrustes():
    first, second = states_of(60, d_out=D_IN), states_of(20, d_out=D_IN, seed=1)
    x, y = (torch.cat(pair) for pair in zip(first, second, strict=True))
    found = solved(Fit(kind="orthogonal"), first, second)
    dx, dy = (x - x.mean(0)).numpy(), (y - y.mean(0)).numpy()
    rotation, _ = scipy.linalg.orthogonal_procrustes(dx, dy)
    weight = found.parts["weight"].double()
    np.testing.assert_allclose(weight.numpy(), rotation.T, atol=1e-5)
    torch.testing.assert_close(weight @ weight.T, torch.eye(D_IN).double(), atol=1e-5, rtol=0)
    expected = y.mean(0) - torch.tensor(rotation.T) @ x.mean(0)
    torch.testing.assert_close(found.parts["bias"].double(), expected, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("rank", [1, 3, D_OUT])
@pytest.mark.parametrize("chosen", [1e-4, 0.5])
def test_low_rank_is_the_dense_formula(rank, chosen):
    """Ridge is least squares with sqrt(lambda) I below x and 0 below y; the rank cuts the fitted values."""
    first, second = states_of(70), states_of(30, seed=1)
    x, y = (torch.cat(pair).numpy() for pair in zip(first, second, strict=True))
    found = solved(Fit(kind="low_rank", rank=rank, lambdas=[chosen]), first, second)
    dx, dy = x - x.mean(0), y - y.mean(0)
    more = np.sqrt(chosen * (dx**2).sum() / D_IN) * np.eye(D_IN)
    longer, zeros = np.vstack([dx, more]), np.vstack([dy, np.zeros((D_IN, D_OUT))])
    whole = np.linalg.lstsq(longer, zeros, rcond=None)[0]
    right = np.linalg.svd(longer @ whole)[2][:rank]
    expected = (whole @ right.T @ right).T
    assert found.parts["up"].shape == (D_OUT, rank)
    given = (found.parts["up"] @ found.parts["down"]).numpy()
    np.testing.assert_allclose(given, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    bias = y.mean(0) - expected @ x.mean(0)
    np.testing.assert_allclose(found.parts["bias"].numpy(), bias, rtol=1e-3, atol=1e-2 * np.abs(bias).max())


def test_a_scale_is_the_best_of_its_grid():
    chooser = np.random.default_rng(0)
    x = [torch.tensor(chooser.normal(size=(40, D_IN)) + 1) for _ in range(2)]
    y = [1.7 * one + 0.1 for one in x]
    found = solved(Fit(kind="scale"), (x[0], y[0]), (x[1], y[1]))
    errors = [((alpha * x[1] - y[1]) ** 2).sum().item() for alpha in ALPHAS]
    assert found.settings["alpha"] == ALPHAS[int(np.argmin(errors))]
    assert found.parts.keys() == {"scale"}
    assert 1.0 in ALPHAS
    assert not found.settings["at_end_of_grid"]


def test_the_numbers_are_those_of_scikit_learn():
    found = solved(Fit(), states_of(80), states_of(20, seed=1))
    x, y = states_of(90, seed=2)
    scores = Scores({PAIR: found})
    for start in (0, 13, 60):
        stop = {0: 13, 13: 60, 60: 90}[start]
        scores.add(Paired({0: x[start:stop]}, {3: y[start:stop]}, 0))
    given = scores.numbers()[PAIR]
    mapped = (x.float() @ found.parts["weight"].T + found.parts["bias"]).double()
    expected = r2_score(y.numpy(), mapped.numpy(), multioutput="variance_weighted")
    assert given["fraction_of_variance"] == pytest.approx(expected, abs=1e-5)
    cosine = torch.cosine_similarity(mapped, y, dim=-1).mean().item()
    assert given["cosine"] == pytest.approx(cosine, abs=1e-6)
    of_mean = torch.cosine_similarity(found.mean.double().expand_as(y), y, dim=-1).mean().item()
    assert given["cosine_of_mean"] == pytest.approx(of_mean, abs=1e-6)
    assert given["n"] == 90


def collected(pairing, texts, pairs):
    """Every state that a stream gives, by layer."""
    found = [one for one in pairing.stream(texts, pairs) if one.source]
    return tuple(
        {layer: torch.cat([one[side][layer] for one in found]) for layer in found[0][side]} for side in (0, 1)
    )


def by_rows(states):
    return sorted(tuple(round(value, 3) for value in row) for row in states.tolist())


@pytest.mark.parametrize("remote", [False, "local"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt"])
def test_streamed_states_are_those_of_plain_hooks(family, remote, tiny_model):
    pairs, texts = [(-1, 2), (0, 3), (1, 3)], texts_of(9)
    model, reference = tiny_model(family), tiny.reference(family)
    pairing = Pairing(
        source=model,
        target=model,
        backend=Places.of(remote).backend,
        sites=("residual", "mlp"),
        options=Fit(positions=None),
    )
    source, target = collected(pairing, texts, pairs)
    for found, layers, part in ((source, (-1, 0, 1), ""), (target, (2, 3), tiny.FAMILIES[family].mlp)):
        assert set(found) == set(layers)
        for layer in layers:
            expected = [
                reference.state(ids, hooks.Site(layer, part), range(1, len(ids)))
                for ids in (tiny.TOKENIZER(text)["input_ids"] for text in texts)
            ]
            given, wanted = torch.tensor(by_rows(found[layer])), torch.tensor(by_rows(torch.cat(expected)))
            torch.testing.assert_close(given, wanted, atol=3e-3, rtol=1e-3)


@pytest.mark.parametrize("bos", [(False, True), (True, False), (True, True)])
def test_states_of_two_models_are_of_the_same_text(bos, tiny_model):
    """One tokenizer knows fewer pieces than the other: only where both end a token is a state taken."""
    coarse, fine = (
        tiny.make_tokenizer(bos=bos[0]),
        tiny.make_tokenizer(bos=bos[1], pieces=(" is", " of", "The")),
    )
    source = load(tiny.make_module("llama"), tokenizer=coarse)
    target = load(tiny.make_module("gpt2", d_model=48, vocab_size=len(fine)), tokenizer=fine)
    texts = texts_of(6, seed=3)
    pairing = Pairing(
        source=source,
        target=target,
        backend=Places.of().backend,
        sites=("residual", "residual"),
        options=Fit(positions=None),
    )
    given = collected(pairing, texts, [(1, 2)])
    references = tiny.reference("llama"), tiny.reference("gpt2", d_model=48, vocab_size=len(fine))
    expected = ([], [])
    for text in texts:
        ids = [tokenizer(text)["input_ids"] for tokenizer in (coarse, fine)]
        ends = []
        for tokenizer, tokens in zip((coarse, fine), ids, strict=True):
            # By decoding ever longer beginnings: the first token is left out on either side.
            lengths = [
                len(tokenizer.decode(tokens[: at + 1], skip_special_tokens=True)) for at in range(len(tokens))
            ]
            ends.append({length: at for at, length in enumerate(lengths) if at > 0})
        shared = sorted(ends[0].keys() & ends[1].keys())
        assert 0 < len(shared) <= min(map(len, ends))
        for side, (reference, layer) in enumerate(zip(references, (1, 2), strict=True)):
            places = [ends[side][end] for end in shared]
            expected[side].append(reference.state(ids[side], hooks.Site(layer), places))
    # One to one: each source state stands beside the target state of the same text.
    together = torch.cat([given[0][1], given[1][2]], dim=1)
    wanted = torch.cat([torch.cat(expected[0]), torch.cat(expected[1])], dim=1)
    assert together.shape == wanted.shape
    torch.testing.assert_close(
        torch.tensor(by_rows(together)), torch.tensor(by_rows(wanted)), atol=3e-3, rtol=1e-3
    )
    assert len(given[0][1]) == len(given[1][2]) < sum(len(coarse(text)["input_ids"]) for text in texts)


def test_a_whole_fit_is_ridge_on_all_its_states(tiny_model):
    model, other = tiny_model("llama"), tiny_model("gpt2", d_model=48)
    options = Fit(lambdas=[0.01], positions=None)
    texts = read_texts(DataSpec(rows=tuple({"text": text} for text in texts_of(60))), seed=1)
    pairing = Pairing(
        source=model,
        target=other,
        backend=Places.of().backend,
        sites=("residual", "residual"),
        options=options,
    )
    pairs = [(0, 1), (2, 3)]
    fitted = fit_pairs(options, pairing, texts, pairs)
    source, target = collected(pairing, [*texts.fitted, *texts.choosing], pairs)
    held_source, held_target = collected(pairing, texts.held_out, pairs)
    for pair in pairs:
        x, y = source[pair[0]].double().numpy(), target[pair[1]].double().numpy()
        ridge = Ridge(alpha=0.01 * ((x - x.mean(0)) ** 2).sum() / x.shape[1], solver="cholesky").fit(x, y)
        np.testing.assert_allclose(fitted.parts(pair)["weight"].numpy(), ridge.coef_, rtol=1e-3, atol=1e-4)
        held = held_source[pair[0]].double().numpy(), held_target[pair[1]].double().numpy()
        expected = r2_score(held[1], ridge.predict(held[0]), multioutput="variance_weighted")
        assert fitted.about.held_out[pair]["fraction_of_variance"] == pytest.approx(expected, abs=1e-4)
        assert fitted.about.held_out[pair]["n"] == len(held[0])
    assert fitted.about.data["fitted_on"]["n_positions"] == len(source[0])


def test_the_rehearsal_of_a_server_gives_the_same_fit(tiny_model):
    options = {
        "model": tiny_model("llama"),
        "target_model": tiny_model("gpt2"),
        "pairs": "1:2",
        "data": {"rows": [{"text": text} for text in texts_of(30)]},
    }
    local, remote = fit_mapping(**options), fit_mapping(**options, remote="local")
    for name, tensor in local.parts((1, 2)).items():
        torch.testing.assert_close(remote.parts((1, 2))[name], tensor, atol=1e-5, rtol=1e-4)
