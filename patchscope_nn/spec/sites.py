"""Sites: the places in a block whose states are read and written. Each site is one object of this module.

A site's object tells the other packages what it allows, and the model's description (`ModelInfo.width`,
`Architecture.part`) where it is; no other module names a site. Recipes are parsed with these names, so this
module does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, GetJsonSchemaHandler

from patchscope_nn._util.arguments import checked, checked_class
from patchscope_nn._util.plain import shown
from patchscope_nn._util.registry import Registry
from patchscope_nn.errors import InputError, did_you_mean


@checked_class
@dataclass(frozen=True, kw_only=True)
class Site:
    """A place in every block, with one state for each token.

    A site is the output or the input of a module inside the block, or of the block itself. The output and the
    input of blocks are the *residual stream*: the input of block l is the output of block l - 1.

    A write changes what the module at the site passes on (an output) or what it receives (an input, which
    other modules still receive unchanged). The proof at load compares reads and writes at every registered
    site that the model has with plain PyTorch hooks, and refuses the sites that differ.

    Attributes:
        name: The name in recipes, and in `Source.site` and `Target.site`.
        modules: Dotted paths inside a block, for example `mlp.gate_proj`. Families name their modules
            differently; the site is at the first path that a model's blocks have. Empty for the block itself.
        end: `output` if the states are the module's output, `input` if they are its first input.
        label: What reports call the states, for example `Outputs of attention`.
        readable: True if a source may read there.
        writable: True if a target may write there.
    """

    name: str
    modules: tuple[str, ...] = ()
    end: Literal["output", "input"] = "output"
    label: str = ""
    readable: bool = True
    writable: bool = True

    @property
    def in_stream(self) -> bool:
        """True if its states are those of the residual stream."""
        return not self.modules

    @property
    def offset(self) -> int:
        """The number of blocks between layer l and the block whose output is this site's state of layer l."""
        return int(self.in_stream and self.end == "input")

    @property
    def space(self) -> str:
        """The site that fitted mappings record for its states; the whole residual stream is one space."""
        return RESIDUAL.name if self.in_stream else self.name

    @property
    def packs(self) -> bool:
        """True if a packed pass, which runs complete blocks (see `plan/layout.py`), can write there."""
        return self.in_stream

    @property
    def embeds(self) -> bool:
        """True if it has a state at `layer: embed`, the input of block 0."""
        return self.in_stream and not self.offset

    @property
    def cuts(self) -> bool:
        """True if `write: cut` may name it. Cuts are made in complete blocks, named by their outputs."""
        return self.in_stream and not self.offset


_ATTENTION_MODULES = ("self_attn", "attn", "attention", "self_attention")
#: OPT's MLP is two linear layers in the block itself, of which `fc2` gives the MLP's output.
_MLP_MODULES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "fc2")
RESIDUAL = Site(name="residual", label="Hidden states")
BEFORE = Site(name="before", end="input", label="Hidden states")
ATTENTION = Site(name="attention", modules=_ATTENTION_MODULES, label="Outputs of attention")
MLP = Site(name="mlp", modules=_MLP_MODULES, label="Outputs of MLPs")

#: The sites by name, in the order in which messages and the JSON Schema list them.
SITES: dict[str, Site] = {site.name: site for site in (RESIDUAL, BEFORE, ATTENTION, MLP)}


@checked
def register_site(site: Site) -> Site:
    """Let recipes, `Source` and `Target` use a site by its name.

    Register it before models are loaded, so that their proofs compare it. The site itself is returned.

    Raises:
        InputError: Another site has this name.
    """
    if SITES.setdefault(site.name, site) != site:
        raise InputError(
            f"another site named {site.name!r} is already registered: {SITES[site.name]}.",
            hint="Give the new site another name.",
        )
    return site


def _adopt(name: str, loaded: Any) -> Site:
    """Check and register the site that an entry point names."""
    if not isinstance(loaded, Site) or loaded.name != name:
        raise InputError(f"it is not a patchscope_nn.Site with the name {name!r}.")
    return register_site(loaded)


#: The names of all sites. A site of an installed package is added to `SITES` when it is looked up.
SITE_NAMES: Registry[Site] = Registry("patchscope_nn.sites", noun="site", entries=SITES, adopt=_adopt)


def site_named(name: str) -> Site:
    """Return the site of a name.

    Raises:
        InputError: No site has this name.
    """
    try:
        return SITE_NAMES.find(name)
    except ValueError as error:
        raise InputError(f"{error}") from None


def _check_name(name: Any) -> Any:
    if not isinstance(name, str) or name not in SITE_NAMES:
        raise ValueError(f"{shown(name)} is not allowed here. {did_you_mean(str(name), SITE_NAMES.names())}")
    SITE_NAMES.find(name)
    return name


class _RegisteredNames:
    """Lists the names in a JSON Schema that are registered when the schema is generated."""

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(schema) | {"enum": SITE_NAMES.names()}


#: The type of `Source.site` and `Target.site`: the name of a registered site.
SiteName = Annotated[str, BeforeValidator(_check_name), _RegisteredNames()]
