"""The conformance suite of sites: what goes through a site's object equals plain PyTorch hooks.

Run it on a site of your own, once for each family of tiny models (see tests/tiny.py):

    SiteCheck(site, family="llama", module="mlp.gate_proj", width=48).run()

`module` is the site's path in that family, written down by hand, and `width` the size of its states; the
suite compares these with what the package finds by itself.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

import hooks
import pytest
import tiny

from patchscope_nn.backends import Places, run_steps
from patchscope_nn.errors import InputError
from patchscope_nn.mappings import resolve_mapping
from patchscope_nn.plan import Optimisations, plan
from patchscope_nn.proof import load
from patchscope_nn.readouts import Choices, Generate, Hidden, NextToken
from patchscope_nn.spec import RESIDUAL, SITES, Patchscope, Site, Source, Target
from patchscope_nn.sweep import expand

#: Two lengths, so that passes are padded; the target prompts share a prefix.
ROWS = (
    {"s": "The Tower is in", "t": "The Tower of x ->", "a": " Paris", "b": " the city of"},
    {"s": "Diana", "t": "The Tower of x in the", "a": " Diana of Paris", "b": " in"},
)
READOUTS = {
    "next_token": NextToken(top_k=4, reference=["{a}", "{b}"]),
    "generate": Generate(max_new_tokens=3),
    "choices": Choices(["{a}", "{b}"]),
    "hidden": Hidden(),
}


@dataclass(frozen=True, kw_only=True)
class SiteCheck:
    """The checks of one site on one family.

    Attributes:
        site: The registered site.
        family: A family of tests/tiny.py.
        module: The path of its module inside a block; empty for the block itself.
        width: The size of its states.
        off: The optimisations that are switched off one by one.
        known: What plain hooks gave so far.
    """

    site: Site
    family: str
    module: str
    width: int = tiny.D_MODEL
    off: tuple = Optimisations.names()
    known: dict = field(default_factory=dict, repr=False)

    def run(self):
        """Every check, in the order in which a new site should pass them."""
        self.check_place()
        self.check_proof()
        pairs = [*self.pairs()]
        for read, written in pairs:
            self.check_readout("next_token", read, written)
        for readout in READOUTS:
            self.check_readout(readout, *pairs[0])
        self.check_optimisations(*pairs[0])
        self.check_fused(*pairs[0])
        self.check_rehearsal(*pairs[0])
        self.check_what_it_allows()

    @functools.cached_property
    def model(self):
        """A tiny model, loaded now, so that its proof knows the site."""
        return load_once(self.family, tuple(SITES.values()))

    def pairs(self):
        """The site on both sides, or on the one side that it allows."""
        if self.site.readable and self.site.writable:
            yield self.site, self.site
        if self.width == tiny.D_MODEL:
            if self.site.readable:
                yield self.site, RESIDUAL
            if self.site.writable:
                yield RESIDUAL, self.site

    def check_place(self):
        """The package finds the module and its width."""
        part = self.model.info.architecture.part(self.site)
        assert (part.path if part else "") == self.module
        assert self.model.info.width(self.site) == self.width
        assert SITES[self.site.name] is self.site

    def check_proof(self):
        """The proof at load compared the site, and found it right."""
        verdict = self.model.info.verdict
        assert verdict.why(self.site.name) is None
        compared = " ".join(comparison.what for comparison in verdict.comparisons)
        assert self.site.in_stream or self.site.name in compared

    def check_readout(self, name, read, written):
        """Each readout of each cell, with every optimisation and with none, equals plain hooks."""
        scope = self._scope(READOUTS[name], read, written)
        for used in (Optimisations(), Optimisations.none()):
            self._compare(scope, optimisations=used, context="session")

    def check_optimisations(self, read, written):
        """Without one optimisation after the other nothing changes."""
        scope = self._scope(READOUTS["next_token"], read, written)
        for off in self.off:
            self._compare(scope, optimisations=replace(Optimisations(), **{off: False}), context="session")

    def check_fused(self, read, written):
        """Source and target in one forward."""
        scope = self._scope(READOUTS["choices"], read, written, layers=[1], target_layers=[2, -1])
        self._compare(scope, rows=ROWS[:1], context="fused")

    def check_rehearsal(self, read, written):
        """What travels to a server is enough to find the site there."""
        self._compare(self._scope(READOUTS["next_token"], read, written), rows=ROWS[:1], remote="local")

    def check_what_it_allows(self):
        """Packed passes, `layer: embed`, `write: cut`, reads and writes, only where the site allows them."""
        site = self.site
        if site.writable:
            read = site if site.readable else RESIDUAL
            if self.model.info.width(read) == self.width:
                planned = plan(self._sweep(self._scope(READOUTS["next_token"], read, site)))
                packed = any(target.layout is not None for step in planned.steps() for target in step.targets)
                assert packed == (site.packs and self.model.info.architecture.packs)
            self._allowed(site.embeds, target=Target(prompt="{t}", site=site.name, layer="embed"))
            cut = {"write": {"cut": {"position": 0}}, "layer": 1}
            self._allowed(site.cuts, target=Target(prompt="{t}", site=site.name, **cut))
        if site.readable:
            self._allowed(site.embeds, source=Source(prompt="{s}", site=site.name, layer="embed"))
        self._allowed(site.readable, source=Source(prompt="{s}", site=site.name, layer=1))
        self._allowed(site.writable, target=Target(prompt="{t}", site=site.name, layer=1))

    def _allowed(self, allowed, **side):
        given = {"source": Source(prompt="{s}", layer=1), "target": Target(prompt="{t}", layer=1)} | side
        if allowed:
            self._sweep(Patchscope(**given))
        else:
            with pytest.raises(InputError, match=self.site.name):
                self._sweep(Patchscope(**given))

    def _scope(self, readout, read, written, *, layers=(0, -1), target_layers=(2,)):
        return Patchscope(
            source=Source(prompt="{s}", position=-1, layer=list(layers), site=read.name),
            target=Target(
                prompt="{t}", position={"each": ["x", -1]}, layer=list(target_layers), site=written.name
            ),
            readout=readout,
        )

    def _sweep(self, scope, *, rows=ROWS):
        return expand(scope, rows=rows, source=self.model, target=self.model)

    def _compare(self, scope, *, rows=ROWS, remote=False, **options):
        sweep = self._sweep(scope, rows=rows)
        backend = Places.of(remote).backend
        planned = plan(sweep, remote=backend.remote, **options)
        sites = tuple(SITES[side.site].space for side in (scope.source, scope.target))
        info, pairs = self.model.info, sweep.cells.pairs
        mapping = resolve_mapping(scope.mapping, source=info, target=info, pairs=pairs, sites=sites)
        steps = run_steps(planned, source=self.model, target=self.model, mapping=mapping, backend=backend)
        found = [cell for step in steps for result in step for cell in result.raw(sweep)]
        assert len(found) == planned.n_cells > 0
        for cell, raw in found:
            hooks.assert_same(raw, self._expected(scope, cell))

    def _expected(self, scope, cell):
        """What plain hooks give for a cell, computed once."""
        place = cell.source_layer, cell.target_layer, cell.target_positions
        key = (scope.readout.name, scope.source.site, scope.target.site, cell.row, *place)
        if key not in self.known:
            reference = hooks.Pair(
                scope,
                tiny.reference(self.family),
                tokenizer=tiny.TOKENIZER,
                eos=[tiny.EOS_ID],
                sites={self.site.name: self._place},
            )
            self.known[key] = reference.expected(cell, ROWS[cell.row])
        return self.known[key]

    def _place(self, layer):
        """The place of a cell's layer, which counts the input of a block as the output of the one below."""
        at_input = self.site.end == "input"
        return hooks.Site(layer + (at_input and not self.module), self.module, self.site.end)


@functools.cache
def load_once(family, sites):
    """A tiny model, loaded once for each set of sites."""
    return load(tiny.make_module(family), tokenizer=tiny.TOKENIZER)
