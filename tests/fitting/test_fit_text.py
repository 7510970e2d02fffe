"""Maps trained through a text, and soft prompts: their held-out numbers are those of plain hooks."""

from __future__ import annotations

import hooks
import pytest
import tiny
import torch

from patchscope_nn.errors import DataError, InputError, LayerError, MappingError
from patchscope_nn.fitting.trained.soft_prompt import fit_soft_prompt
from patchscope_nn.fitting.trained.through_text import KINDS, fit_through_text
from patchscope_nn.fitting.trained.training import Training
from patchscope_nn.readouts import NextToken
from patchscope_nn.spec import Patchscope, Source, Target
from patchscope_nn.sweep.vectors import load_soft_prompt

LETTERS = "abcdefghijklmnop"
ROWS = [
    {
        "word": "".join(LETTERS[(3 * i + j * (i % 7 + 1)) % 16] for j in range(3)),
        "said": " " + 2 * LETTERS[(3 * i + 2 * (i % 7 + 1)) % 16],
    }
    for i in range(40)
]
TEXTS = ["".join(tiny.PIECES[(7 * i + j * (i % 5 + 1)) % 13] for j in range(8)) for i in range(40)]
SOURCE = Source(prompt="The city of {word}", layer=2)
TARGET = Target(prompt="The Paris -> x", position="x", layer=1)


def quick(rate, **changed):
    return Training(**{"steps": 40, "batch": 16, "learning_rate": rate} | changed)


def fit(model, kind="trained_affine", **changed):
    given = {
        "source": SOURCE,
        "target": TARGET,
        "text": "{said}",
        "training": quick(KINDS[kind].training.learning_rate if kind in KINDS else 0.1),
    } | changed
    return fit_through_text(model, given.pop("rows", ROWS), kind=kind, **given)


def apply(tensors, states):
    mapped = states @ tensors["weight"].T if "weight" in tensors else tensors["scale"] * states
    return mapped + tensors.get("bias", 0)


def nll_by_hand(family, row, f):
    """By plain hooks: -log p of the row's text after T, in which f(h) stands; and its number of tokens."""
    reference, tokenizer = tiny.reference(family), tiny.TOKENIZER
    read = tokenizer(SOURCE.prompt.format(**row))["input_ids"]
    written = tokenizer(TARGET.prompt)["input_ids"]
    text = tokenizer(TARGET.prompt + row["said"])["input_ids"][len(written) :]
    state = reference.state(read, hooks.Site(2), [len(read) - 1])
    patch = hooks.Patch(hooks.Site(1), (len(written) - 1,), lambda _clean: f(state))
    logits = reference.logits(written + text, patch)[len(written) - 1 : -1]
    lost = torch.nn.functional.cross_entropy(logits, torch.tensor(text), reduction="sum")
    return float(lost), len(text)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_held_out_numbers_are_those_of_plain_hooks(family, kind, tiny_model):
    found = fit(
        tiny_model(family), kind, training=quick(KINDS[kind].training.learning_rate, steps=8, stopping=0.0)
    )
    (score,), tensors = found.held_out, found.maps[2, 1]
    held = [row for row in ROWS if row["word"] in held_words(found)]
    assert len({row["word"] for row in held}) == score.n_rows > 1
    for f, given in ((lambda h: apply(tensors, h), score.nll_nats), (lambda h: h, score.untrained_nll_nats)):
        by_hand = {row["word"]: nll_by_hand(family, row, f) for row in held}
        lost, count = (sum(part) for part in zip(*by_hand.values(), strict=True))
        assert count == score.n_tokens
        assert given == pytest.approx(lost / count, abs=1e-4)


def held_words(found):
    """The words whose prompts were held out, once more from the seed."""
    from patchscope_nn.fitting.trained.splits import split_items

    training = found.provenance["training"]
    prompts = [tuple(tiny.TOKENIZER(SOURCE.prompt.format(**row))["input_ids"]) for row in ROWS]
    parts = split_items(prompts, **{name: training[name] for name in ("held_out", "stopping", "seed")})
    return {row["word"] for row, prompt in zip(ROWS, prompts, strict=True) if prompt in parts.held_out}


@pytest.mark.parametrize("kind", list(KINDS))
def test_training_lowers_what_the_texts_cost(kind, tiny_model):
    (score,) = fit(tiny_model("gpt2"), kind).held_out
    assert score.nll_nats < score.untrained_nll_nats - (
        0.1 if kind in ("trained_low_rank", "trained_affine") else -0.05
    )


def test_the_same_seed_gives_the_same_map(tiny_model):
    training = quick(KINDS["trained_low_rank"].training.learning_rate, steps=8)
    first, again = (fit(tiny_model(), "trained_low_rank", training=training) for _ in range(2))
    assert torch.equal(first.maps[2, 1]["weight"], again.maps[2, 1]["weight"])
    assert first.held_out == again.held_out


def test_without_a_part_to_stop_by_the_last_step_stays(tiny_model):
    found = fit(tiny_model(), training=quick(0.001, stopping=0.0))
    assert found.provenance["left_at_step"] == {"2,1": 40}


def test_every_pair_has_a_map_and_one_vector_may_stand_at_many_placeholders(tiny_model):
    target = Target(prompt="The _ _ -> x", position=[" _", "first: _"], layer="same")
    found = fit(
        tiny_model(), "trained_scale", source=SOURCE.model_copy(update={"layer": ("embed", 1)}), target=target
    )
    assert set(found.maps) == {(-1, -1), (1, 1)}


def test_a_map_between_two_models(tiny_model):
    found = fit(tiny_model("llama"), "trained_affine", target_model=tiny_model("gpt2"))
    assert found.held_out[0].nll_nats < found.held_out[0].untrained_nll_nats


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"kind": "affine"}, MappingError, "Did you mean 'trained_affine'"),
        ({"text": "{siad}"}, DataError, "text asks for the column 'siad'"),
        ({"source": Source(prompt="{wrod}")}, DataError, "source.prompt asks for the column 'wrod'"),
        ({"source": Source(prompt="{word}", layer=4)}, LayerError, "source.layer=4 is outside"),
        ({"source": Source(prompt="{word}", site="mlp")}, MappingError, "source.site='mlp'"),
        ({"target": Target(prompt="x", write="add")}, MappingError, "target.write='add'"),
        ({"target": Target()}, InputError, "target.prompt was not given"),
        ({"target": Target(prompt="x", layer=7)}, LayerError, "target.layer=7 is outside"),
        ({"source": Source(prompt="The {word}", position=[0, 1])}, InputError, r"name \[\(2, 1\)\] tokens"),
        ({"rows": ROWS[:2]}, DataError, "2 different source prompts are too few"),
        ({"kind": "trained_low_rank", "rank": 0}, MappingError, "of rank 0"),
        ({"rank": 2}, MappingError, "rank=2 belongs to trained_low_rank"),
    ],
)
def test_what_cannot_be_trained_says_why(given, error, message, tiny_model):
    with pytest.raises(error, match=message):
        fit(tiny_model(), **given)


def test_models_of_two_sizes_are_refused(tiny_model):
    with pytest.raises(MappingError, match="between states of 32 numbers and of 48"):
        fit(tiny_model(), target_model=tiny_model(d_model=48))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_soft_prompt_scores_as_plain_hooks_do(family, tiny_model, tmp_path):
    found = fit_soft_prompt(
        tiny_model(family), TEXTS, layer=1, tokens=3, offsets=(0, 2), training=quick(0.05, held_out=0.1)
    )
    found.save(tmp_path / "soft.safetensors")
    prompt = load_soft_prompt(str(tmp_path / "soft.safetensors"))
    assert prompt.shape == (3, tiny.D_MODEL)
    scores = {score.offset: score for score in found.held_out}
    lost = {0: [], 2: []}
    for ids in held_texts(found):
        own = tiny.reference(family).logits(ids).log_softmax(-1)
        for t in range(1, len(ids) - 2):
            said = soft_by_hand(family, prompt, ids, t)
            for offset, one in lost.items():
                expected, given = own[t + offset], said[2 + offset]
                one.append(float((expected.exp() * (expected - given)).sum()))
    for offset, one in lost.items():
        assert scores[offset].n_states == len(one)
        assert scores[offset].kl_nats == pytest.approx(sum(one) / len(one), abs=1e-4)


def held_texts(found):
    from patchscope_nn.fitting.trained.splits import split_texts

    training = found.about.settings["training"]
    shares = {name: training[name] for name in ("held_out", "stopping", "seed")}
    return split_texts(TEXTS, tiny.TOKENIZER, max_tokens=128, least=4, **shares).held_out


def soft_by_hand(family, prompt, ids, t):
    """By plain hooks: T's three tokens are the prompt, h stands at the last at layer 1, the text goes on."""
    reference = tiny.reference(family)
    state = reference.state(ids, hooks.Site(1), [t])
    tokens = torch.tensor([[5, 5, 5, *ids[t + 1 : t + 3]]])

    def embed(_module, arguments, named):
        states = (arguments[0] if arguments else named["hidden_states"]).clone()
        states[0, :3] = prompt
        return (
            ((states, *arguments[1:]), named) if arguments else (arguments, named | {"hidden_states": states})
        )

    def write(_module, _given, output):
        states = (output if isinstance(output, torch.Tensor) else output[0]).clone()
        states[0, 2] = state[0]
        return states if isinstance(output, torch.Tensor) else (states, *output[1:])

    handles = [
        reference.blocks[0].register_forward_pre_hook(embed, with_kwargs=True),
        reference.blocks[1].register_forward_hook(write),
    ]
    with torch.no_grad():
        logits = reference.module(tokens).logits[0]
    for handle in handles:
        handle.remove()
    return logits.log_softmax(-1)


def test_a_soft_prompt_is_learned_and_depends_on_the_state(tiny_model):
    found = fit_soft_prompt(
        tiny_model("gpt2"), TEXTS, layer=1, tokens=3, offsets=(0, 1), training=quick(0.1, steps=60)
    )
    for score in found.held_out:
        assert score.kl_nats < score.untrained_kl_nats
    assert found.held_out[0].kl_nats < 0.7 * found.held_out[0].shuffled_kl_nats


def test_the_same_seed_gives_the_same_soft_prompt(tiny_model):
    first, again = (
        fit_soft_prompt(tiny_model("gpt2"), TEXTS, layer=1, tokens=3, training=quick(0.1, steps=8))
        for _ in range(2)
    )
    assert torch.equal(first.soft_prompt, again.soft_prompt)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"layer": "all"}, LayerError, "names 4 layers"),
        ({"layer": 1.5}, LayerError, "1.5 is not a valid layer"),
        ({"tokens": 0}, DataError, "leave nothing to learn"),
        ({"offsets": (-1,)}, DataError, "leave nothing to learn"),
        ({"offsets": (40,)}, DataError, "none of 40 texts has 42 tokens or more"),
    ],
)
def test_what_cannot_be_learned_says_why(given, error, message, tiny_model):
    with pytest.raises(error, match=message):
        fit_soft_prompt(tiny_model(), TEXTS, **{"layer": 1} | given)


def test_the_compiler_takes_a_soft_prompt(tiny_model, run_cells, tmp_path):
    """Through `target: {soft_prompt: FILE}`, with T any three tokens, the model says what plain hooks say."""
    model, ids = tiny_model(), tiny.TOKENIZER(TEXTS[0])["input_ids"]
    found = fit_soft_prompt(model, TEXTS, layer=1, tokens=3, training=quick(0.05, steps=10))
    file = found.save(tmp_path / "soft.safetensors")
    scope = Patchscope(
        source=Source(prompt=ids, position=4, layer=1),
        target=Target(prompt=[7, 7, 7], soft_prompt=str(file)),
        readout=NextToken(top_k=3),
    )
    ((_, said),) = run_cells(scope, model)
    expected = soft_by_hand("llama", found.soft_prompt, ids, 4)[2].exp().topk(3)
    assert said["top_ids"] == expected.indices.tolist()
    assert said["top_probs"] == pytest.approx(expected.values.tolist(), abs=1e-5)
