"""Lenses: trained, averaged from Jacobians, and scored on texts that are held out."""

from __future__ import annotations

import pytest
import reference_jacobian
import tiny
import torch

from patchscope_nn.errors import DataError, LayerError, ModelError, SpecError
from patchscope_nn.fitting.trained.frozen import frozen
from patchscope_nn.fitting.trained.jacobian import fit_jacobian_lens
from patchscope_nn.fitting.trained.splits import split_texts
from patchscope_nn.fitting.trained.training import Training
from patchscope_nn.fitting.trained.tuned_lens import fit_tuned_lens
from patchscope_nn.models import load

TEXTS = ["".join(tiny.PIECES[(7 * i + j * (i % 5 + 1)) % 13] for j in range(8)) for i in range(50)]
QUICK = Training(steps=60, learning_rate=3e-3)


def by_hand(family, ids):
    """Every layer's states of a text, (n_tokens, d_model), and the model's logits, by plain hooks."""
    reference = tiny.reference(family)
    found = {}
    handles = [
        block.register_forward_hook(
            lambda _module, _given, output, layer=layer: found.update(
                {layer: (output if isinstance(output, torch.Tensor) else output[0])[0]}
            )
        )
        for layer, block in enumerate(reference.blocks)
    ]
    with torch.no_grad():
        logits = reference.module(torch.tensor([ids])).logits[0]
    for handle in handles:
        handle.remove()
    return found, logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "gptj"])
def test_the_last_blocks_states_unembed_to_the_models_logits(family, tiny_model):
    ids = tiny.TOKENIZER(TEXTS[0])["input_ids"]
    states, logits = by_hand(family, ids)
    with frozen(tiny_model(family)) as net:
        assert torch.allclose(net.unembed(states[net.last]), logits, atol=1e-5)
        read = net.run(net.batch([ids, ids[:3]]), read={0, net.last})
    assert torch.allclose(read[0][0], states[0], atol=1e-5)
    assert torch.allclose(read[net.last][1, :3], states[net.last][:3], atol=1e-5)


def test_a_model_that_ends_otherwise_is_refused(tiny_model):
    model = tiny_model("llama", copy="ends")
    handle = model.module.register_forward_hook(
        lambda _module, _given, output: output.__setitem__("logits", output.logits + 1)
    )
    try:
        with pytest.raises(ModelError, match="in an unknown way"), frozen(model):
            pass
    finally:
        handle.remove()


def test_weights_are_held_still_and_given_back(tiny_model):
    weight = tiny_model().module.lm_head.weight
    with frozen(tiny_model()):
        assert not weight.requires_grad
    assert weight.requires_grad


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_tuned_lens_foretells_held_out_texts_better_than_the_logit_lens(family, tiny_model):
    steps = []
    found = fit_tuned_lens(
        tiny_model(family),
        TEXTS,
        layers=("embed", 0, 2),
        training=QUICK,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert set(found.maps) == {(-1, 3), (0, 3), (2, 3)}
    assert steps[-1] == (60, 60)
    assert len(steps) == 60
    for score in found.held_out:
        assert score.kl_nats < 0.8 * score.logit_lens_kl_nats
    assert found.provenance["n_texts"] == {"fitted": 35, "stopping": 5, "held_out": 10}


def test_the_score_is_the_kl_over_the_held_out_tokens(tiny_model):
    """Once more, by hand: the same texts, every token but the first."""
    training = Training(steps=8, learning_rate=3e-3)
    found = fit_tuned_lens(tiny_model("gpt2"), TEXTS, layers=1, training=training)
    maps, (score,) = found.maps[1, 3], found.held_out
    held = fit_parts(training)
    lost, same, count = 0.0, 0, 0
    module = tiny.reference("gpt2").module
    for ids in held:
        states, logits = by_hand("gpt2", ids)
        with torch.no_grad():
            mapped = states[1] @ maps["weight"].T + maps["bias"]
            said = module.lm_head(module.transformer.ln_f(mapped)).log_softmax(-1)[1:]
        own = logits.log_softmax(-1)[1:]
        lost += float((own.exp() * (own - said)).sum())
        same += int((own.argmax(-1) == said.argmax(-1)).sum())
        count += len(ids) - 1
    assert score.n_tokens == count
    assert score.kl_nats == pytest.approx(lost / count, abs=1e-5)
    assert score.agreement == pytest.approx(same / count)


def fit_parts(training):
    parts = split_texts(
        TEXTS,
        tiny.TOKENIZER,
        held_out=training.held_out,
        stopping=training.stopping,
        seed=training.seed,
        max_tokens=128,
        least=2,
    )
    fitted, stopping, held = (set(part) for part in parts)
    assert not (fitted & held) | (fitted & stopping) | (stopping & held)
    return parts.held_out


def test_the_same_seed_gives_the_same_lens(tiny_model):
    first, again, other = (
        fit_tuned_lens(
            tiny_model(), TEXTS, layers=0, training=Training(steps=8, learning_rate=3e-3, seed=seed)
        )
        for seed in (0, 0, 1)
    )
    assert torch.equal(first.maps[0, 3]["weight"], again.maps[0, 3]["weight"])
    assert first.held_out == again.held_out
    assert not torch.equal(first.maps[0, 3]["weight"], other.maps[0, 3]["weight"])


def test_the_last_blocks_translator_stays_the_identity(tiny_model):
    """Nothing can be gained there, and the part that says when to stop finds that out."""
    found = fit_tuned_lens(tiny_model(), TEXTS, layers=-1, training=QUICK)
    assert torch.equal(found.maps[3, 3]["weight"], torch.eye(tiny.D_MODEL))
    assert found.held_out[0].kl_nats == pytest.approx(0, abs=1e-6)
    assert found.provenance["left_at_step"] == {"3": 0}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("rows_at_a_time", [5, 64])
def test_a_jacobian_lens_is_the_mean_of_autograds_jacobians(family, rows_at_a_time, tiny_model):
    """The sum over later positions, the mean over positions, the mean over texts; by autograd's jacobian."""
    texts, skip = TEXTS[:4], 2
    found = fit_jacobian_lens(
        tiny_model(family),
        texts,
        layers=("embed", 1),
        max_tokens=6,
        skip_first=skip,
        rows_at_a_time=rows_at_a_time,
        seed=3,
    )
    parts = split_texts(texts, tiny.TOKENIZER, held_out=0.2, seed=3, max_tokens=6, least=skip + 2)
    assert found.provenance["n_texts"] == {"fitted": len(parts.fitted), "stopping": 0, "held_out": 1}
    for layer in (-1, 1):
        expected = torch.zeros(tiny.D_MODEL, tiny.D_MODEL)
        for ids in parts.fitted:
            whole = reference_jacobian.whole(family, ids, layer)  # (t', d', t, d)
            used = list(range(skip, len(ids) - 1))
            expected += whole[used][:, :, used].sum(0).mean(1) / len(parts.fitted)
        assert torch.allclose(found.maps[layer, 3]["weight"], expected, atol=2e-5), (layer, expected)


def test_the_last_blocks_jacobian_is_the_identity(tiny_model):
    found = fit_jacobian_lens(tiny_model(), TEXTS[:3], layers=-1, skip_first=1)
    assert torch.allclose(found.maps[3, 3]["weight"], torch.eye(tiny.D_MODEL), atol=1e-6)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"layers": 4}, LayerError, "layer=4 is outside this model"),
        ({"texts": ["The"]}, DataError, "none of 1 texts has 2 tokens or more \\(the longest has 1\\)"),
        ({"texts": TEXTS[:2]}, DataError, "2 different texts of 2 tokens or more are too few"),
        ({"texts": TEXTS[:1] * 9}, DataError, "1 different texts"),
        ({"training": Training(held_out=0.9, stopping=0.1)}, DataError, "leave nothing to fit on"),
    ],
)
def test_what_cannot_be_fitted_says_why(given, error, message, tiny_model):
    with pytest.raises(error, match=message):
        fit_tuned_lens(tiny_model(), **{"texts": TEXTS} | given)


def test_a_jacobian_lens_of_short_texts_says_how_long_they_should_be(tiny_model):
    with pytest.raises(DataError, match="none of 50 texts has 18 tokens or more"):
        fit_jacobian_lens(tiny_model(), TEXTS)


def test_training_without_steps_is_refused():
    with pytest.raises(SpecError, match="steps"):
        Training(steps=0)


def test_a_model_without_weights_is_refused(folder):
    with pytest.raises(ModelError, match="has no weights in this process"):
        fit_tuned_lens(load(folder, weights=False), TEXTS)
