"""Interventions from the literature, each as a Patchscope and as the loop over hooks that it stands for.

Causal tracing (Meng et al. 2022, arXiv 2202.05262, section 2.1), attention knockout (Geva et al. 2023, arXiv
2304.14767, section 4), and soft prompts.
"""

from __future__ import annotations

import hooks
import pytest
import tiny
import torch
from by_hand import Hand, ids_of, same_in_every_way
from safetensors.torch import save_file

from patchscope_nn.plan import Optimisations
from patchscope_nn.readouts import Choices, Generate, Hidden, NextToken
from patchscope_nn.spec import Patchscope, Source, Target

ROWS = ({"s": "The Eiffel Tower is in the", "a": "Tower"}, {"s": "Diana is in the city", "a": "Diana"})
FAMILIES = ("llama", "gpt2", "gemma3", "opt")
READOUTS = {
    "next_token": NextToken(top_k=3),
    "generate": Generate(max_new_tokens=3),
    "choices": Choices([" Paris", " the city"]),
}
CHOICES = [ids_of(text) for text in READOUTS["choices"].continuations]
CORRUPT = {"position": {"tokens": "{a}"}, "noise": 2.0, "samples": 2}
families = pytest.mark.parametrize("family", FAMILIES)
readouts = pytest.mark.parametrize("readout", READOUTS)


def subject(row):
    """The tokens of the subject, counted out by hand."""
    return [4] if row["a"] == "Tower" else [*range(len(ids_of("Diana")))]


def corrupted(tiny_model, run_cells, family, rows=ROWS, **fields):
    """The embeddings of the subject once they are disturbed, by row and sample, as a readout gives them."""
    scope = Patchscope(
        source=Source(prompt="{s}", position={"tokens": "{a}"}, layer="embed"),
        target=Target(corrupt=CORRUPT, write="zero", **fields),
        readout=Hidden(clean=True),
    )
    found = run_cells(scope, tiny_model(family), rows=rows)
    return {(cell.row, cell.sample): torch.tensor(given["clean"]) for cell, given in found}


@pytest.fixture(scope="module")
def embeddings(tiny_model, run_cells):
    return {family: corrupted(tiny_model, run_cells, family) for family in FAMILIES}


@families
def test_the_noise_is_in_deviations_of_the_embeddings(family, embeddings):
    drawn = []
    for (number, _), disturbed in embeddings[family].items():
        row = ROWS[number]
        whole = Hand(family).state(ids_of(row["s"]), hooks.EMBED, range(len(ids_of(row["s"]))))
        drawn.append((disturbed - whole[subject(row)]) / (2.0 * whole.std()))
    drawn = torch.cat(drawn)
    assert len(drawn) == 2 * sum(len(subject(row)) for row in ROWS)
    assert drawn.mean().abs() < 0.25
    assert 0.8 < drawn.std() < 1.2
    alike = torch.nn.functional.normalize(drawn) @ torch.nn.functional.normalize(drawn).T
    assert (alike - torch.eye(len(drawn))).abs().max() < 0.9


@readouts
@pytest.mark.parametrize(
    ("family", "site", "window"),
    [("llama", "residual", 1), ("gpt2", "mlp", 3), ("gemma3", "attention", 2), ("opt", "mlp", 2)],
)
def test_causal_tracing(family, site, window, readout, *, embeddings, tiny_model, run_cells):
    """The subject is disturbed in every run; then one state, or a window of a part's, is put back."""
    scope = Patchscope(
        source=Source(prompt="{s}", position={"each": ["{a}", -1]}, layer=[0, 2], site=site),
        target=Target(site=site, corrupt=CORRUPT, window=window, states="own" if window > 1 else "one"),
        readout=READOUTS[readout],
    )
    options = {"rows": ROWS, "controls": ["unpatched"], "rehearsed": family == "gpt2"}
    found = same_in_every_way(run_cells, Optimisations.none(), scope, tiny_model(family), **options)
    assert len(found) == len(ROWS) * 2 * (2 + 2 * 2)
    hand = Hand(family)
    for cell, given in found:
        row = ROWS[cell.row]
        ids = ids_of(row["s"])
        noisy = embeddings[family][cell.row, cell.sample]

        def changes(_count, cell=cell, ids=ids, row=row, noisy=noisy):
            yield hand.write(hooks.EMBED, subject(row), lambda _: noisy)
            for layer in range(cell.source_layer, min(cell.source_layer + window, tiny.N_LAYERS)):
                clean = hand.state(ids, layer, cell.source_positions, site=site)
                yield hand.write(layer, cell.source_positions, lambda _, clean=clean: clean, site=site)

        if cell.control == "unpatched":
            expected = hand.read(
                scope.readout,
                ids,
                lambda _, row=row, noisy=noisy: [hand.write(hooks.EMBED, subject(row), lambda _: noisy)],
                continuations=CHOICES,
            )
        else:
            expected = hand.read(scope.readout, ids, changes, continuations=CHOICES)
        hooks.assert_same(given, expected)


def test_a_model_that_reads_again_is_disturbed_alike(run_cells):
    """Without keys and values the prompt is read anew for each token, with the same noise."""
    transformers = pytest.importorskip("transformers")
    from patchscope_nn.models import load

    config = transformers.MambaConfig(
        vocab_size=tiny.VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=4,
        state_size=8,
        pad_token_id=2,
        eos_token_id=tiny.EOS_ID,
        bos_token_id=0,
    )
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    tiny._spread(module, 0)
    model = load(module, tokenizer=tiny.TOKENIZER)
    fields = {"corrupt": CORRUPT, "write": "zero"}
    source = Source(prompt="{s}", position=-1, layer=1)
    hidden = Patchscope(
        source=Source(prompt="{s}", position={"tokens": "{a}"}, layer="embed"),
        target=Target(**fields),
        readout=Hidden(clean=True),
    )
    noisy = [torch.tensor(given["clean"]) for _, given in run_cells(hidden, model, rows=ROWS[:1])]
    ids, blocks = ids_of(ROWS[0]["s"]), module.backbone.layers

    class Disturbed:
        """The model as a loop over hooks has it."""

        def __init__(self, embeddings):
            self.embeddings = embeddings

        def logits(self, whole, _patch):
            def disturb(_module, args, kwargs):
                states = (args[0] if args else kwargs["hidden_states"]).clone()
                states[0, subject(ROWS[0])] = self.embeddings
                rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
                return (states, *args[1:]), rest

            def blank(_module, _args, output):
                states = (output[0] if isinstance(output, tuple) else output).clone()
                states[0, len(ids) - 1] = 0
                return (states, *output[1:]) if isinstance(output, tuple) else states

            handles = [
                blocks[0].register_forward_pre_hook(disturb, with_kwargs=True),
                blocks[1].register_forward_hook(blank),
            ]
            with torch.no_grad():
                logits = module(input_ids=torch.tensor([list(whole)]), use_cache=False).logits[0]
            for handle in handles:
                handle.remove()
            return logits

    for readout in (READOUTS["generate"], READOUTS["choices"]):
        scope = Patchscope(source=source, target=Target(**fields), readout=readout)
        found = run_cells(scope, model, rows=ROWS[:1])
        for (_, given), disturbed in zip(found, noisy, strict=True):
            by_hand = Disturbed(disturbed)
            if readout.name == "choices":
                expected = hooks.choices(by_hand, ids, None, continuations=CHOICES)
            else:
                said = hooks.generate(by_hand, ids, None, max_new_tokens=readout.max_new_tokens)
                expected = hooks.cut(said, eos=[tiny.EOS_ID])
            hooks.assert_same(given, expected)


@families
@readouts
def test_attention_knockout(readout, family, tiny_model, run_cells):
    """As the model with a mask without these edges, in a window of blocks; `random` cuts other tokens."""
    scope = Patchscope(
        source=Source(prompt="{s}"),
        target=Target(position=[3, -1], layer=[0, 2], write={"cut": {"position": [0, 2]}}, window=2),
        readout=READOUTS[readout],
    )
    options = {"rows": ROWS, "controls": ["unpatched", "random"], "rehearsed": family == "llama"}
    found = same_in_every_way(run_cells, Optimisations.none(), scope, tiny_model(family), **options)
    assert len(found) == len(ROWS) * (1 + 2 * 2)
    hand, model = Hand(family), tiny_model(family)
    plain = {}
    for cell, given in found:
        ids = ids_of(ROWS[cell.row]["s"])
        if cell.control is None:
            assert cell.unseen == (0, 2)
        elif cell.control == "random":
            assert len(cell.unseen) == 2
            assert not {0, 2, len(ids) - 1} & set(cell.unseen)
        if cell.target_layer is None:
            plain[cell.row] = given

        def changes(count, cell=cell):
            if cell.target_layer is None:
                return []
            blocks = range(cell.target_layer, min(cell.target_layer + 2, tiny.N_LAYERS))
            windows = model.info.architecture.windows
            return [
                hand.unseen(layer, cell.target_positions, cell.unseen, window=windows[layer])
                for layer in blocks
            ]

        expected = hand.read(scope.readout, ids, changes, continuations=CHOICES)
        hooks.assert_same(given, expected)
    assert any(given != plain[cell.row] for cell, given in found if cell.control is None)


def test_gemma_has_windows_that_bite(tiny_model):
    """Written down by hand: what the masks of the knockout stand on."""
    windows = tiny_model("gemma3").info.architecture.windows
    assert windows == (tiny.WINDOW, None, tiny.WINDOW, None)
    assert max(len(ids_of(row["s"])) for row in ROWS) > tiny.WINDOW


def test_a_token_does_not_lose_sight_of_itself(tiny_model, run_cells):
    """All that a token can see is cut, itself with it: it sees itself."""
    scope = Patchscope(
        source=Source(prompt="The Tower is"),
        target=Target(position=-1, layer="all", write={"cut": {"position": {"start": 0}}}),
        readout=NextToken(top_k=3),
    )
    hand, ids = Hand("llama"), ids_of("The Tower is")
    for cell, given in run_cells(scope, tiny_model()):
        last = len(ids) - 1
        change = hand.unseen(cell.target_layer, [last], range(last))
        hooks.assert_same(given, hooks.next_token(hand.run(ids, change)[-1], top_k=3))


SOFT = 0.5 * torch.randn(3, tiny.D_MODEL, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def soft(tmp_path_factory):
    file = tmp_path_factory.mktemp("soft") / "soft.safetensors"
    save_file({"soft_prompt": SOFT}, file)
    return str(file)


@families
@readouts
def test_a_soft_prompt(readout, family, soft, tiny_model, run_cells):
    """Learned embeddings stand for the first tokens of T, at the input of block 0, in every run of it."""
    rows = [{"s": "Diana", "t": "x x x is in x"}, {"s": "The Tower", "t": "The city of x"}]
    scope = Patchscope(
        source=Source(prompt="{s}", layer=[0, 2]),
        target=Target(prompt="{t}", position=-1, layer=["embed", 1], soft_prompt=soft),
        readout=READOUTS[readout],
    )
    options = {"rows": rows, "controls": ["unpatched"], "rehearsed": family == "llama"}
    found = same_in_every_way(run_cells, Optimisations.none(), scope, tiny_model(family), **options)
    hand = Hand(family)
    for cell, given in found:
        ids = ids_of(rows[cell.row]["t"])

        def changes(_count, cell=cell):
            yield hand.write(hooks.EMBED, range(3), lambda _: SOFT)
            if cell.target_layer is not None:
                state = hand.state(ids_of(rows[cell.row]["s"]), cell.source_layer, cell.source_positions)
                yield hand.write(cell.target_layer, cell.target_positions, lambda _: state)

        hooks.assert_same(given, hand.read(scope.readout, ids, changes, continuations=CHOICES))


@pytest.mark.parametrize("context", ["nested", "bridged"])
def test_a_soft_prompt_and_noise_for_a_second_model(context, soft, tiny_model, run_cells):
    scope = Patchscope(
        source=Source(prompt="Diana", layer=1),
        target=Target(
            prompt="The Eiffel Tower is in the x",
            position="x",
            layer=2,
            soft_prompt=soft,
            corrupt={"position": "Tower", "noise": 2},
        ),
        readout=Hidden(clean=True),
    )
    local = run_cells(scope, tiny_model(), tiny_model("gpt2"), context=context)
    options = {"remote": "local"} if context == "bridged" else {"optimisations": Optimisations.none()}
    again = run_cells(scope, tiny_model(), tiny_model("gpt2"), context=context, **options)
    hand, source = Hand("gpt2"), Hand("llama")
    ids = ids_of("The Eiffel Tower is in the x")
    embedded = scope.model_copy(
        update={"target": scope.target.model_copy(update={"position": "Tower", "layer": ("embed",)})}
    )
    ((_, noisy),) = run_cells(embedded, tiny_model(), tiny_model("gpt2"), context=context)
    writes = [
        hand.write(hooks.EMBED, range(3), lambda _: SOFT),
        hand.write(hooks.EMBED, [4], lambda _: torch.tensor(noisy["clean"])),
    ]
    clean = hand.state(ids, 2, [len(ids) - 1], changes=writes)
    state = source.state(ids_of("Diana"), 1, [len(ids_of("Diana")) - 1])
    for ((_, given),) in zip((*local, *again), strict=True):
        hooks.assert_same(given, {"hidden": state.tolist(), "clean": clean.tolist()})
