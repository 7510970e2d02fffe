"""Sites: each equals plain hooks on several families, those that ship and a user's own."""

from __future__ import annotations

import pytest
import tiny
from site_check import SiteCheck

import patchscope_nn as ps
from patchscope_nn.errors import InputError
from patchscope_nn.plan import Optimisations
from patchscope_nn.proof.checks import paired_sites
from patchscope_nn.spec import ATTENTION, MLP, RESIDUAL, SITES

FAMILIES = ("llama", "gpt2", "gemma2", "opt")
#: Sites as a user may write them: another width, the input of a module, a name for each family.
OWN = {
    "gate": ps.Site(name="gate", modules=("mlp.gate_proj",)),
    "neurons": ps.Site(name="neurons", modules=("mlp.down_proj", "mlp.c_proj", "fc2"), end="input"),
    "second_norm": ps.Site(
        name="second_norm", modules=("post_attention_layernorm", "ln_2", "final_layer_norm")
    ),
    "second_norm_input": ps.Site(
        name="second_norm_input",
        modules=("post_attention_layernorm", "ln_2", "final_layer_norm"),
        end="input",
    ),
    "read_only": ps.Site(name="read_only", modules=("self_attn.o_proj",), writable=False),
    "write_only": ps.Site(name="write_only", modules=("self_attn.o_proj",), readable=False),
}


@pytest.fixture
def registered(monkeypatch):
    """registered(name): one of the sites above, registered until the test ends."""

    def register(name):
        monkeypatch.setitem(SITES, name, OWN[name])
        return ps.register_site(OWN[name])

    return register


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [*SITES])
def test_a_site_that_ships(name, family):
    parts = {"attention": tiny.FAMILIES[family].attention, "mlp": tiny.FAMILIES[family].mlp}
    off = share([*SITES].index(name) + FAMILIES.index(family))
    SiteCheck(site=SITES[name], family=family, module=parts.get(name, ""), off=off).run()


def share(number):
    """A quarter of the optimisations; four numbers in a row have all of them."""
    return Optimisations.names()[number % 4 :: 4]


def test_every_optimisation_is_off_for_every_site_that_ships_and_on_every_family():
    assert len(SITES) == len(FAMILIES) == 4
    assert sorted(name for number in range(4) for name in share(number)) == sorted(Optimisations.names())


@pytest.mark.parametrize(
    ("name", "family", "module", "width"),
    [
        ("gate", "llama", "mlp.gate_proj", 48),
        ("gate", "gemma2", "mlp.gate_proj", 48),
        ("neurons", "llama", "mlp.down_proj", 48),
        ("neurons", "gpt2", "mlp.c_proj", 48),
        ("neurons", "opt", "fc2", 48),
        ("second_norm", "llama", "post_attention_layernorm", 32),
        ("second_norm", "gpt2", "ln_2", 32),
        ("second_norm", "opt", "final_layer_norm", 32),
        ("second_norm_input", "llama", "post_attention_layernorm", 32),
        ("second_norm_input", "gpt2", "ln_2", 32),
        ("read_only", "llama", "self_attn.o_proj", 32),
        ("write_only", "llama", "self_attn.o_proj", 32),
    ],
)
def test_a_site_of_ones_own(name, family, module, width, registered):
    """On llama with each optimisation off, on the others with none and all of them off."""
    off = Optimisations.names() if family == "llama" else ()
    SiteCheck(site=registered(name), family=family, module=module, width=width, off=off).run()


def test_a_name_has_one_site(registered):
    gate = registered("gate")
    assert ps.register_site(gate) is gate
    with pytest.raises(
        InputError, match=r"another site named 'gate' is already registered: Site\(name='gate'"
    ):
        ps.register_site(ps.Site(name="gate", modules=("mlp.up_proj",)))
    with pytest.raises(InputError, match=r"Allowed: residual, before, attention, mlp, gate\."):
        ps.Source(prompt="x", site="gaet")


def test_widths_must_fit(registered, tiny_model):
    registered("gate")
    scope = ps.Patchscope(
        source=ps.Source(prompt="The city", layer=1, site="gate"), target=ps.Target(layer=2)
    )
    with pytest.raises(InputError, match=r"needs hidden states of one size; the source's have 48 .* 32 "):
        ps.run(scope, model=tiny_model())
    mapped = scope.model_copy(update={"mapping": lambda states: states[..., :32]})
    assert ps.run(mapped, model=tiny_model()).table()["error"].isna().all()


def test_a_fit_between_sites_of_other_widths(registered, tiny_model):
    registered("gate")
    rows = [{"text": f"The Eiffel Tower is in {letter}"} for letter in "abcdefgh"]
    fitted = ps.fit(
        "affine", model=tiny_model(), pairs="1:2", data=rows, sites=("gate", "residual"), positions=4
    )
    assert fitted.parts((1, 2))["weight"].shape == (32, 48)
    assert (fitted.about.source_model.site, fitted.about.source_model.d_model) == ("gate", 48)
    with pytest.raises(InputError, match=r"'gaet' is not a known site\. Did you mean 'gate'\?"):
        ps.fit("affine", model=tiny_model(), pairs="1:2", data=rows, sites=("gaet", "residual"))
    SITES["odd"] = ps.Site(name="odd", modules=("no.such",))
    try:
        with pytest.raises(InputError, match=r"site 'odd': the blocks of LlamaForCausalLM \(llama\) have no"):
            ps.fit("affine", model=tiny_model(), pairs="1:2", data=rows, sites=("odd", "residual"))
    finally:
        del SITES["odd"]


def test_a_proof_pairs_sites_of_one_width(registered, tiny_model):
    info = tiny_model().info
    assert [*paired_sites(info)] == [(ATTENTION, MLP), (MLP, ATTENTION)]
    gate = registered("gate")
    assert [*paired_sites(info)][2:] == [(gate, gate)]
    only = registered("read_only")
    assert [*paired_sites(info)][:3] == [(ATTENTION, MLP), (MLP, ATTENTION), (only, MLP)]
    assert RESIDUAL not in {site for pair in paired_sites(info) for site in pair}
