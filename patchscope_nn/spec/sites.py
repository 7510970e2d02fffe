"""Sites: the places in a block whose states are read and written. Each site is one object of this module.

The other rooms ask a site's object what it allows, and the model's description (`ModelInfo.part`,
`ModelInfo.width`) where it is; no other module names a site. The names are needed where recipes are parsed,
so this module imports no torch.
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
    """A place that every block has, with one state for each token.

    A site is the output or the input of a module inside the block, or of the block itself. The output and the
    input of blocks are the *residual stream*: the input of block l is the output of block l - 1.

    A write changes what the module at the site passes on (an output) or what it receives (an input, which
    other modules still receive unchanged). The proof at load compares reads and writes at every registered
    site that the model has with plain PyTorch hooks, and refuses the sites that differ.

    Attributes:
        name: The name in recipes, and in `Source.site` and `Target.site`.
        modules: Dotted paths inside a block, for example `mlp.gate_proj`. Families name their modules
            differently; the site is at the first path that a model's blocks have. Empty for the block itself.
        end: Whether the states are the module's `output` or its first `input`.
        label: How reports call the states, for example `Outputs of attention`.
        readable: Whether a source may read there.
        writable: Whether a target may write there.
    """

    name: str
    modules: tuple[str, ...] = ()
    end: Literal["output", "input"] = "output"
    label: str = ""
    readable: bool = True
    writable: bool = True

    @property
    def in_stream(self) -> bool:
        """Whether its states are those of the residual stream."""
        return not self.modules

    @property
    def offset(self) -> int:
        """How many blocks below layer l the block is whose output is the state of layer l."""
        return int(self.in_stream and self.end == "input")

    @property
    def space(self) -> str:
        """The site by which fitted mappings know its states; all of the residual stream is one space."""
        return RESIDUAL.name if self.in_stream else self.name

    @property
    def packs(self) -> bool:
        """Whether a write there can enter a pass late and share a prefix.

        Packed passes run whole blocks one after the other (see `plan/layout.py`), so they can change states
        only between blocks.
        """
        return self.in_stream

    @property
    def embeds(self) -> bool:
        """Whether it has a state at `layer: embed`, the input of block 0."""
        return self.in_stream and not self.offset

    @property
    def cuts(self) -> bool:
        """Whether `write: cut` may name it; a cut is made in whole blocks, named by their outputs."""
        return self.in_stream and not self.offset


RESIDUAL = Site(name="residual", label="Hidden states")
BEFORE = Site(name="before", end="input", label="Hidden states")
ATTENTION = Site(
    name="attention",
    modules=("self_attn", "attn", "attention", "self_attention"),
    label="Outputs of attention",
)
#: OPT's MLP is two linear layers in the block itself, of which `fc2` gives the MLP's output.
MLP = Site(
    name="mlp",
    modules=("mlp", "feed_forward", "ffn", "block_sparse_moe", "fc2"),
    label="Outputs of MLPs",
)

#: The sites by name, in the order in which messages and the JSON Schema list them.
SITES: dict[str, Site] = {site.name: site for site in (RESIDUAL, BEFORE, ATTENTION, MLP)}


@checked
def register_site(site: Site) -> Site:
    """Let recipes, `Source` and `Target` use a site by its name.

    Register it before models are loaded, so that their proofs compare it.

    Args:
        site: The site.

    Returns:
        The same site.

    Raises:
        InputError: Another site has this name.
    """
    if SITES.setdefault(site.name, site) != site:
        raise InputError(
            f"a site named {site.name!r} exists already, and is another: {SITES[site.name]}.",
            hint="Give the new site another name.",
        )
    return site


def _adopt(name: str, loaded: Any) -> Site:
    """What an entry point names, registered."""
    if not isinstance(loaded, Site) or loaded.name != name:
        raise InputError(f"it is not a patchscope_nn.Site with the name {name!r}.")
    return register_site(loaded)


#: The names of all sites; that of an installed package is added to `SITES` when it is asked for.
SITE_NAMES: Registry[Site] = Registry("patchscope_nn.sites", noun="site", entries=SITES, adopt=_adopt)


def site_named(name: str) -> Site:
    """The registered site of a name.

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
    """Lists the names in a JSON Schema, as they are when the schema is made."""

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(schema) | {"enum": SITE_NAMES.names()}


#: The type of `Source.site` and `Target.site`: the name of a registered site.
SiteName = Annotated[str, BeforeValidator(_check_name), _RegisteredNames()]
