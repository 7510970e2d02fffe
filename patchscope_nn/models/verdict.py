"""The result of the proof at load: which optimisations are correct on a model, and up to which length."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

#: The names that a verdict uses for the fused context, for cuts of attention edges, and for all runs. Its
#: other names are those of `Optimisations` and of sites.
FUSED, CUT, PLAIN = "fused", "cut", "every run"
#: The consequence of switching each of these off; for a site see `cost_of`.
COSTS = {
    FUSED: "source and target run in separate passes",
    "deduplication": "equal cells run once each",
    "source_sharing": "each state is read in a separate pass",
    "row_packing": "each cell runs in a separate pass",
    "mixed_lengths": "prompts of different lengths run in separate passes",
    "prefix_sharing": "each cell reads its whole target prompt",
    "late_entry": "each cell runs through every block",
    "shared_attention": "passes hold fewer cells, and each decoding row copies the shared prefix",
    "lean_readout": "every position is unembedded",
    "cached_decoding": "each decoded token reads its prompt again",
    "early_leaving": "finished rows stay in the batch",
    "memory_reuse": "each pass allocates new memory",
    "overlap": "steps are prepared and written while no step runs",
    CUT: "target.write: cut is refused",
    PLAIN: "longer prompts are refused",
}


def cost_of(name: str) -> str:
    """Describe the consequence of switching off an optimisation or a site."""
    return COSTS.get(name, f"site: {name} is refused")


class Withheld(NamedTuple):
    """An optimisation that is switched off for a model.

    Attributes:
        optimisation: Its name, or `fused`.
        readout: The readout for which it is off; None for every readout.
        beyond: It is off if a prompt, with appended tokens, or a packed pass has more tokens than this; 0
            switches it off for every length.
        why: What is wrong with it.
    """

    optimisation: str
    readout: str | None
    beyond: int
    why: str

    @property
    def name(self) -> str:
        """The optimisation's name in messages, with hyphens."""
        return self.optimisation.replace("_", "-")

    @property
    def longer(self) -> str:
        """The length beyond which it is off, in words; empty if it is off for every length."""
        return f" beyond {self.beyond} tokens" if self.beyond else ""

    def __str__(self) -> str:
        where = f" for {self.readout}" if self.readout else ""
        return f"{self.name} is off{where}{self.longer}"


class Comparison(NamedTuple):
    """A comparison in a proof.

    Attributes:
        what: What was compared.
        blocks: The number of blocks that ran: all of the model's, or a few if all are alike.
        tokens: The length of its longest prompt, in tokens.
        error: The largest difference, in standard deviations of the compared values.
        tolerance: The largest difference that rounding explains.
        outcome: `equal`, or what is switched off because of it.
    """

    what: str
    blocks: int
    tokens: int
    error: float
    tolerance: float
    outcome: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result of a model's proof.

    Attributes:
        key: A hex digest of the model's structure and of everything else that determines the verdict.
        causal: True if a token of a prompt never attends to later tokens.
        terms: How many tensors at the start of a block's output add up to the residual stream.
        limit: The maximum number of tokens that was tested; None if the config names no larger threshold.
        withheld: What is switched off.
        comparisons: What was compared.
        elapsed_s: The duration of the proof.
    """

    key: str
    causal: bool = True
    terms: int = 1
    limit: int | None = None
    withheld: tuple[Withheld, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    elapsed_s: float = 0.0

    def dump(self) -> dict[str, Any]:
        """Convert the verdict to plain values, for JSON."""
        named = {
            "withheld": [entry._asdict() for entry in self.withheld],
            "comparisons": [entry._asdict() for entry in self.comparisons],
        }
        return asdict(self) | named

    def summary(self) -> dict[str, Any]:
        """Convert the verdict to plain values for a manifest, without the comparisons."""
        return {name: value for name, value in self.dump().items() if name != "comparisons"}

    @classmethod
    def parse(cls, plain: dict[str, Any]) -> Verdict:
        """Convert the result of `dump` to a verdict.

        Raises:
            KeyError, TypeError: The values are not a result of `dump`.
        """
        withheld = tuple(Withheld(**entry) for entry in plain["withheld"])
        comparisons = tuple(Comparison(**entry) for entry in plain["comparisons"])
        return cls(**plain | {"withheld": withheld, "comparisons": comparisons})

    def off(self, *, readout: str, tokens: int) -> tuple[Withheld, ...]:
        """List what is off for a readout of prompts with `tokens` tokens, appended ones included."""
        return tuple(
            entry
            for entry in self.withheld
            if entry.readout in (None, readout) and (tokens > entry.beyond or not entry.beyond)
        )

    def why(self, name: str) -> str | None:
        """Return why something is off, for some lengths or all; None if it is not off."""
        return next((entry.why for entry in self.withheld if entry.optimisation == name), None)

    def withholds(self, optimisation: str, *, tokens: int) -> bool:
        """True if an optimisation is off for any readout of prompts with `tokens` tokens."""
        beyond = [entry.beyond for entry in self.withheld if entry.optimisation == optimisation]
        beyond += [] if self.limit is None else [self.limit]
        return any(tokens > length or not length for length in beyond)

    @property
    def batches(self) -> bool:
        """True if texts of equal length may share a pass."""
        return all(entry.optimisation != "source_sharing" for entry in self.withheld)

    @property
    def longest_packed(self) -> int | None:
        """The maximum number of tokens of a packed sequence, its prefix included; None if not limited.

        In a packed sequence, a token's index differs from its index in its prompt. A model that uses the
        index instead of the position id is correct only up to the first threshold.
        """
        limits = [entry.beyond for entry in self.withheld if entry.beyond]
        limits += [] if self.limit is None else [self.limit]
        return min(limits, default=None)
