"""The checks of a proof: what is compared, and what is switched off if it differs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from patchscope_nn.backends import is_out_of_memory
from patchscope_nn.errors import ModelError
from patchscope_nn.models import CUT, FUSED, PLAIN, Comparison, Model, ModelInfo, Verdict, Withheld
from patchscope_nn.models.architecture import setting
from patchscope_nn.plan import Optimisations
from patchscope_nn.proof.hooks import Hooks, distance
from patchscope_nn.proof.reference import Reference
from patchscope_nn.proof.trials import (
    CHOICES,
    DECODED,
    GENERATE,
    HIDDEN,
    NEXT_TOKEN,
    Context,
    Lengths,
    Runner,
    Trial,
)
from patchscope_nn.readouts import Generate
from patchscope_nn.spec import RESIDUAL, SITES, Readout, Site

#: The change of a logit that rounding explains, by dtype, in standard deviations of the logits. In half
#: precision, it is raised to `_TIMES_NOISE` times the measured rounding of the model.
ROUNDING = {"float64": 1e-6, "float32": 1e-3, "float16": 3e-2, "bfloat16": 0.15}
_TIMES_NOISE = 4
#: The lengths of the shortest prompts.
SHORT = Lengths(7, 6)
#: The shortest prompt with a token before its last that can be patched and is not the first.
_SHORTEST = 3
_ALL = Optimisations()
#: The prompts that are tried beside the first one until one of the two ends before the other.
_VARIANTS = (1, 2, 3, 4)
#: The optimisations that can fail only in decoding. The others concern reading a prompt.
OF_DECODING = ("cached_decoding", "mixed_lengths", "early_leaving")


def probed_layers(model: Model) -> tuple[int, ...]:
    """Return the first, a middle and the last block, and the first block of every kind."""
    blocks = model.module.get_submodule(model.info.architecture.blocks)
    types = setting(model.module.config.get_text_config(), "layer_types") or [None] * len(blocks)
    windows = model.info.architecture.windows or (None,) * len(blocks)
    first: dict[object, int] = {}
    for layer, block in enumerate(blocks):
        parts = tuple((name, type(part).__name__) for name, part in block.named_modules())
        first.setdefault((parts, types[layer], windows[layer]), layer)
    return tuple(sorted({0, len(blocks) // 2, len(blocks) - 1, *first.values()}))


def paired_sites(info: ModelInfo) -> Iterator[tuple[Site, Site]]:
    """Yield pairs of a site to read and a site to write, so that each site of a model is read and written.

    The states of paired sites have equal widths. The residual stream is tested by other trials.
    """
    groups: dict[int, list[Site]] = {}
    for site in SITES.values():
        if info.architecture.part(site) is not None:
            groups.setdefault(info.width(site), []).append(site)
    for width, sites in groups.items():
        beside = [RESIDUAL] if width == info.d_model else []
        read = [site for site in sites if site.readable] or beside
        written = [site for site in sites if site.writable] or beside
        # If one of the lists is empty, states of this width cannot be compared without a mapping.
        for number in range(max(len(read), len(written)) if read and written else 0):
            yield read[number % len(read)], written[(number + 1) % len(written)]


@dataclass
class Checks:
    """The checks of a proof, with the comparisons so far and what is switched off.

    Attributes:
        model: The model.
        limit: The maximum number of tokens that is tested; None if there is no larger threshold.
        withheld: What is switched off.
        comparisons: The comparisons so far.
    """

    model: Model
    limit: int | None = None
    withheld: list[Withheld] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.layers = probed_layers(self.model)
        self.middle = self.layers[len(self.layers) // 2]
        self.runner, self.hooks = Runner(self.model), Hooks(self.model)
        self.reference = Reference(self.runner, self.hooks)
        self.tolerance = ROUNDING.get(self.model.info.dtype, max(ROUNDING.values()))
        self.beyond = 0

    def begin(self, lengths: Sequence[int]) -> None:
        """Compare on ordinary prompts: short ones, and ones beyond `lengths`, which decoding also crosses."""
        source = max([SHORT.source, *lengths]) + 4
        across = [Lengths(SHORT.source, length) for length in lengths if length >= _SHORTEST]
        self._measure_rounding()
        # Two source prompts of equal length share a pass, even if prompts of different lengths may not.
        rows = (SHORT, SHORT._replace(variant=1), Lengths(source, source - 1))
        first = Trial(readout=NEXT_TOKEN, rows=rows, layers=self.layers)
        self._orient(first)
        if lengths:
            self._compare_lengths(SHORT.target, source)
        self._check_plain(replace(first, rows=rows[-1:]))
        self._check(first)
        self._check(Trial(readout=HIDDEN, rows=(SHORT,), layers=self.layers[:1]))
        self._check_sites()
        self._check_mask(rows[-1])
        packs, longer = self.model.info.architecture.packs, Lengths(SHORT.source, source - 1)
        self._decode(SHORT, *([] if packs else [longer]), leaving=True)
        if across:
            self._decode(SHORT, *across)
        if packs:
            # The cells of such a model are rows if a site inside a block is written, or if packing is off.
            unpacked = Optimisations(prefix_sharing=False, late_entry=False)
            self._check(self._upwards(CHOICES, (SHORT, longer)), unpacked)
        self._check_fused()

    def compare_next_tokens(self) -> None:
        """Compare only the next tokens of short prompts, with all optimisations."""
        self._measure_rounding()
        trial = Trial(readout=NEXT_TOKEN, rows=(SHORT,), layers=self.layers)
        self._orient(trial)
        self._check(trial)

    def go_beyond(self, length: int) -> bool:
        """Compare on both sides of a length; return False if the model does not run beyond it."""
        self.beyond = length
        # Decoding crosses the length in the first row, and begins beyond it in the second.
        across, behind = Lengths(SHORT.source, length), Lengths(length + 6, length + 4)
        try:
            self._compare_lengths(length, length + 4)
            trial = Trial(readout=NEXT_TOKEN, rows=(SHORT, behind), layers=(self.middle,))
            self.reference.prepare(trial)
            self._check_plain(replace(trial, rows=(behind,)))
            self._check(trial)
            self._check_mask(behind)
            self._decode(across, behind)
        except ModelError as error:
            self.withheld.append(Withheld(PLAIN, None, length, error.message))
            return False
        except Exception:  # noqa: BLE001 (after any error, the proof ends at this length)
            return False
        return True

    def _decode(self, *rows: Lengths, leaving: bool = False) -> None:
        """Compare decoding after prompts; with `leaving`, one row ends early and leaves the batch."""
        trial = Trial(readout=GENERATE, rows=rows, layers=(self.middle,))
        # Two prompts of equal length, of which one ends before the other.
        for variant in _VARIANTS if leaving else ():
            if trial.eos is None:
                trial = replace(trial, rows=(rows[0], rows[0]._replace(variant=variant), *rows[1:]))
                trial = replace(trial, eos=self._end_of_some(trial))
        self._check(trial)
        self._check(self._upwards(CHOICES, rows))

    def _upwards(self, readout: Readout, rows: tuple[Lengths, ...]) -> Trial:
        """Return a trial that reads the first block and writes a middle one."""
        return Trial(readout=readout, rows=rows, layers=self.layers[:1], target_layers=(self.middle,))

    def _check_sites(self) -> None:
        """Compare reads and writes at sites inside a block; switch off the sites that differ."""
        residual = self._upwards(NEXT_TOKEN, (SHORT,))
        trials = [replace(residual, sites=sites) for sites in paired_sites(self.model.info)]
        self.reference.prepare(*trials)
        for trial in trials:
            try:
                self._check(trial)
            except ModelError:
                self.comparisons.pop()
                self._find_wrong_sites(trial)

    def _find_wrong_sites(self, trial: Trial) -> None:
        """Test each site of a trial with the residual stream, or if their widths differ, with itself."""
        info = self.model.info
        for site in dict.fromkeys(trial.sites):
            other = RESIDUAL if info.width(site) == info.d_model else site
            for sites in dict.fromkeys([(site, other), (other, site)]):
                if self._off(site.name) or not (sites[0].readable and sites[1].writable):
                    continue
                alone = replace(trial, sites=sites)
                self.reference.prepare(alone)
                error, problem = self._error(alone, Optimisations.none())
                if problem:
                    self._withhold(site.name, alone, error, problem)

    def _check_mask(self, row: Lengths) -> None:
        """Compare a run with an explicit mask that cuts attention to a later token, so nothing changes."""
        if not (self.model.info.supports("cut") and self.hooks.causal) or self._off(CUT):
            return
        trial = Trial(readout=NEXT_TOKEN, rows=(row,), layers=self.layers, cuts=True)
        self._settle(CUT, "plain path", trial)

    def _measure_rounding(self) -> None:
        """In half precision, raise the tolerance if rounding alone changes more."""
        if self.model.info.dtype in ("float16", "bfloat16"):
            noise = self.hooks.noise(self.runner.target_prompt(SHORT))
            self.tolerance = max(self.tolerance, _TIMES_NOISE * noise) if noise < float("inf") else noise

    def _orient(self, trial: Trial) -> None:
        """Run the first trial's reference, and find out whether tokens of a prompt attend to later tokens."""
        self.reference.prepare(trial)
        ahead = self.reference.ahead
        if not (self.tolerance < float("inf") and ahead < float("inf")):
            raise ModelError(
                f"{self.model.info.name} computes numbers that are not finite in {self.model.info.dtype}.",
                hint="Load it with another dtype, for example dtype='bfloat16' or 'float32'.",
            )
        if ahead > self.tolerance:
            self.hooks.causal = self.hooks.incremental = False
            architecture = replace(self.model.info.architecture, causal=False)
            self.runner.model = replace(self.model, info=replace(self.model.info, architecture=architecture))

    def _compare_lengths(self, count: int, longer_count: int) -> None:
        """Find out whether the logits of a prompt change when more tokens follow it."""
        row = Lengths(longer_count - count, count)
        prompt = self.runner.target_prompt(row)
        longer = [*prompt, *self.runner.source_prompt(row)]
        alone, followed = (self.hooks.logits(ids, [None])[0, count - 1] for ids in (prompt, longer))
        if distance(followed, alone, alone) > self.tolerance:
            self.hooks.incremental = False

    def _check(self, trial: Trial, most: Optimisations = _ALL) -> None:
        """Compare a trial with the optimisations `most`; if it differs, find those that change it."""
        self.reference.prepare(trial)
        self.runner.verdict = Verdict(key="", limit=self.limit, withheld=tuple(self.withheld))
        error, problem = self._error(trial, most)
        if problem:
            self._find_guilty(trial, problem, most)
        else:
            used = "all optimisations" if most == _ALL else "rows of several lengths"
            self._note(f"{used}: {trial.name}", trial, error, "equal")

    def _check_fused(self) -> None:
        """Compare a source and a target that share a forward, with decoding after it if that is cached."""
        decoding = (
            readout
            for readout in (CHOICES, Generate(max_new_tokens=2))
            if not self._off("cached_decoding", readout.name)
        )
        # Prompts of equal length share a forward, even if prompts of different lengths may not.
        row = Lengths(SHORT.target, SHORT.target) if self._off("mixed_lengths") else SHORT
        trial = self._upwards(next(decoding, NEXT_TOKEN), (row,))
        self.reference.prepare(trial)
        self._settle(FUSED, "fused context", trial, context="auto")

    def _check_plain(self, trial: Trial) -> None:
        error, problem = self._error(trial, Optimisations.none())
        self._note(f"plain path: {trial.name}", trial, error, "refused" if problem else "equal")
        if problem:
            raise ModelError(
                f"{self.model.info.name} ({type(self.model.module).__name__}) cannot be traced correctly: "
                f"even without any optimisation, {trial.name} {problem}, compared with plain hooks.",
                hint="Please report the architecture.",
            )

    def _find_guilty(self, trial: Trial, problem: str, most: Optimisations) -> None:
        """Add the optimisations one by one to the plain path, and switch off those that change it."""
        self._check_plain(trial)
        used = Optimisations.none()
        before = len(self.withheld)
        for name in Optimisations.names():
            tried = replace(used, **{name: getattr(most, name)})
            wrong, reason = self._error(trial, tried) if tried != used else (0.0, "")
            if reason:
                # Decoding from rows of different lengths is tested with one readout for both.
                self._withhold(name, trial, wrong, reason, both=most != _ALL or name == "mixed_lengths")
            else:
                used = tried
        if len(self.withheld) == before:
            # Now everything is equal, and before it was not: the difference is not reproducible.
            raise ModelError(
                f"{self.model.info.name}: {trial.name} {problem} with all optimisations in one run, and is "
                "equal in the next: the model does not compute the same numbers twice.",
                hint="Look for dropout or other randomness in it; load(..., proof=False) skips the proof.",
            )

    def _error(self, trial: Trial, used: Optimisations, *, context: Context = "session") -> tuple[float, str]:
        """Run a trial; return its largest error, and what is wrong with it, which is empty if it is equal."""
        try:
            cells = self.runner.run(trial, used, context=context)
            error = max(self.reference.error(trial, cell, raw) for cell, raw in cells)
        except Exception as failure:  # an optimisation that raises any error is off for this model
            if is_out_of_memory(failure):
                raise
            reason = (str(failure).strip().splitlines() or [""])[0]
            return float("inf"), f"raises {type(failure).__name__} ({reason[:120]})"
        return error, "" if error <= self.tolerance else f"differs by {error:.2g} standard deviations"

    def _end_of_some(self, trial: Trial) -> int | None:
        """Find a token that the first row decodes and the second does not; it ends the first row early."""
        self.reference.prepare(trial)
        decoded: list[list[int]] = [[] for _ in trial.rows[:2]]
        for _ in range(DECODED - 1):
            for row, tokens in zip(trial.rows, decoded, strict=False):
                tokens.append(self.reference.next_decoded(row, trial.layers[0], tokens))
            if len({tokens[-1] for tokens in decoded}) > 1:
                return decoded[0][-1]
        return None

    def _off(self, name: str, readout: str | None = None) -> bool:
        """True if something is off for a readout; without a readout, if it is off for any."""
        readouts = [entry.readout for entry in self.withheld if entry.optimisation == name]
        return any(readout is None or off in (None, readout) for off in readouts)

    def _withhold(self, name: str, trial: Trial, error: float, problem: str, *, both: bool = False) -> None:
        """Switch something off: for the trial's readout, for `both` that decode, or for every readout."""
        readouts: tuple[str | None, ...] = (None,)
        if trial.readout.decodes and name in OF_DECODING:
            readouts = ("generate", "choices") if both else (trial.readout.name,)
        for readout in readouts:
            entry = Withheld(name, readout, self.beyond, f"{trial.name} {problem}")
            self.withheld.append(entry)
            self._note(f"{entry.name}: {trial.name}", trial, error, str(entry))
        self.runner.verdict = replace(self.runner.verdict, withheld=tuple(self.withheld))

    def _settle(self, name: str, what: str, trial: Trial, *, context: Context = "session") -> None:
        """Run a trial; record that it is equal, or switch off what it tests."""
        error, problem = self._error(trial, _ALL, context=context)
        if problem:
            self._withhold(name, trial, error, problem)
        else:
            self._note(f"{what}: {trial.name}", trial, error, "equal")

    def _note(self, what: str, trial: Trial, error: float, outcome: str) -> None:
        blocks = self.model.info.n_layers
        self.comparisons.append(Comparison(what, blocks, trial.tokens, error, self.tolerance, outcome))
