"""Linear relational embeddings: their slope is autograd's, their offset closes the gap, and betas scale."""

from __future__ import annotations

import pytest
import reference_jacobian
import tiny
import torch

from patchscope_nn.errors import DataError, LayerError, PositionError
from patchscope_nn.fitting.trained.lre import BETAS, fit_lre

LETTERS = "abcdefghijklmnop"
ROWS = [{"word": "".join(LETTERS[(3 * i + j * (i % 7 + 1)) % 16] for j in range(2))} for i in range(12)]
PROMPT = "The city of {word} is"


def at_subjects(family, layer, words):
    """By autograd and plain hooks: for each word do/ds (d_model, d_model), s and o (d_model,)."""
    for word in words:
        ids = tiny.TOKENIZER(PROMPT.format(word=word))["input_ids"]
        subject = len(tiny.TOKENIZER(f"The city of {word}")["input_ids"]) - 1
        whole, states, outputs = reference_jacobian.whole_with_states(family, ids, layer)
        yield whole[-1, :, subject], states[subject], outputs[-1]


def fitted_words(found):
    return [row["word"] for row in ROWS if row["word"] in found.provenance["subjects"]]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("layer", [-1, 1])
def test_it_is_the_mean_of_autograds_slopes_and_offsets(family, layer, tiny_model):
    found = fit_lre(
        tiny_model(family),
        ROWS,
        prompt=PROMPT,
        subject="word",
        layers="embed" if layer < 0 else layer,
        subjects=3,
        beta=2.0,
        rows_at_a_time=7,
    )
    tensors = found.maps[layer, 3]
    words = fitted_words(found)
    assert len(words) == 3
    slopes, offsets = [], []
    for slope, state, output in at_subjects(family, layer, words):
        slopes.append(slope)
        offsets.append(output - slope @ state)
    assert torch.allclose(tensors["weight"], 2 * torch.stack(slopes).mean(0), atol=2e-5)
    assert torch.allclose(tensors["bias"], torch.stack(offsets).mean(0), atol=1e-4)


def test_at_one_subject_and_beta_one_it_gives_that_subjects_output(tiny_model):
    found = fit_lre(tiny_model(), ROWS, prompt=PROMPT, subject="word", layers=1, subjects=1, beta=1.0)
    (word,) = fitted_words(found)
    ((_, state, output),) = at_subjects("llama", 1, [word])
    tensors = found.maps[1, 3]
    assert torch.allclose(tensors["weight"] @ state + tensors["bias"], output, atol=1e-4)


def test_a_rank_keeps_the_largest_directions(tiny_model):
    whole, cut = (
        fit_lre(tiny_model(), ROWS, prompt=PROMPT, subject="word", layers=1, beta=1.0, rank=rank).maps[1, 3]
        for rank in (None, 4)
    )
    sizes = torch.linalg.svdvals(whole["weight"])
    assert torch.linalg.matrix_rank(cut["weight"], rtol=1e-4) == 4
    assert torch.linalg.norm(whole["weight"] - cut["weight"]) == pytest.approx(
        float(sizes[4:].norm()), rel=1e-3
    )
    assert torch.equal(whole["bias"], cut["bias"])


def test_it_is_scored_on_the_other_subjects(tiny_model):
    found = fit_lre(tiny_model(), ROWS, prompt=PROMPT, subject="word", layers=[0, 2])
    assert [score.source_layer for score in found.held_out] == [0, 2]
    for score in found.held_out:
        assert score.n_subjects == len(ROWS) - 8
        assert score.beta in BETAS
        assert score.kl_nats > 0
    again = fit_lre(tiny_model(), ROWS, prompt=PROMPT, subject="word", layers=[0, 2])
    assert again.held_out == found.held_out


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"subject": "wrod"}, DataError, "subject='wrod' is not a column of the data. Did you mean 'word'"),
        ({"prompt": "The city"}, DataError, "does not name the subject"),
        ({"prompt": "The {city} of {word}"}, DataError, "asks for the column 'city'"),
        (
            {"prompt": "The {word}ff", "rows": [{"word": "i"}]},
            PositionError,
            "does not end with a whole token",
        ),
        ({"rows": ROWS[:8]}, DataError, "8 different prompts are too few to fit on 8"),
        ({"layers": 9}, LayerError, "layer=9 is outside"),
        ({"rank": 33}, DataError, "rank=33"),
        ({"subjects": 0}, DataError, "subjects=0"),
    ],
)
def test_what_cannot_be_fitted_says_why(given, error, message, tiny_model):
    given = {"rows": ROWS, "prompt": PROMPT, "subject": "word"} | given
    rows = given.pop("rows")
    with pytest.raises(error, match=message):
        fit_lre(tiny_model(), rows, **given)
