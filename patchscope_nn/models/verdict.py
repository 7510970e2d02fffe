"""What the proof at load found out about a model: which optimisations hold on it, and up to which length."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

#: The names under which a verdict withholds the fused context, cuts of attention edges, and any run at all.
#: The other names are those of `Optimisations` and of sites.
FUSED, CUT, PLAIN = "fused", "cut", "every run"
#: What it costs that a thing is off; of a site `cost_of` says it.
COSTS = {
    FUSED: "source and target run in separate passes",
    "deduplication": "equal cells run once each",
    "source_sharing": "each state is read in a pass of its own",
    "row_packing": "each cell runs in a pass of its own",
    "mixed_lengths": "prompts of each length run in passes of their own",
    "prefix_sharing": "each cell reads its whole target prompt",
    "late_entry": "each cell runs through every block",
    "shared_attention": "packed passes hold fewer cells",
    "lean_readout": "every position is unembedded",
    "cached_decoding": "each decoded token reads its prompt again",
    "early_leaving": "rows that met their end stay in the batch",
    "memory_reuse": "each pass allocates its memory anew",
    CUT: "target.write: cut is refused",
    PLAIN: "longer prompts are refused",
}


def cost_of(name: str) -> str:
    """What it costs that an optimisation, a site or anything else with a name here is off."""
    return COSTS.get(name, f"site: {name} is refused")


class Withheld(NamedTuple):
    """An optimisation that is switched off for a model.

    Attributes:
        optimisation: Its name, or `fused`.
        readout: The readout it is off for; None for every readout.
        beyond: It is off where a prompt, with what is appended, or a packed pass has more tokens than this.
        why: What happens with it.
    """

    optimisation: str
    readout: str | None
    beyond: int
    why: str

    @property
    def name(self) -> str:
        """What is off, as messages spell it."""
        return self.optimisation.replace("_", "-")

    @property
    def longer(self) -> str:
        """Beyond which length it is off, in words; empty for every length."""
        return f" beyond {self.beyond} tokens" if self.beyond else ""

    def __str__(self) -> str:
        where = f" for {self.readout}" if self.readout else ""
        return f"{self.name} is off{where}{self.longer}"


class Comparison(NamedTuple):
    """One comparison of the proof.

    Attributes:
        what: What was compared.
        blocks: How many blocks ran: all of the model's, or a few where all are alike.
        tokens: The longest prompt of it, in tokens.
        error: The largest difference, in standard deviations of what was compared.
        tolerance: The largest difference that rounding explains.
        outcome: `equal`, or what is off because of it.
    """

    what: str
    blocks: int
    tokens: int
    error: float
    tolerance: float
    outcome: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What holds on a model.

    Attributes:
        key: Hex digest of the model's structure and of everything else that decides the verdict.
        causal: Whether a token of a prompt never sees those after it.
        limit: Nothing was tried on more tokens than this; None where the config names no larger threshold.
        withheld: What is switched off.
        comparisons: What was compared.
        elapsed_s: How long the proof took.
    """

    key: str
    causal: bool = True
    limit: int | None = None
    withheld: tuple[Withheld, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    elapsed_s: float = 0.0

    def dump(self) -> dict[str, Any]:
        """The verdict as plain values, for JSON."""
        named = {
            "withheld": [entry._asdict() for entry in self.withheld],
            "comparisons": [entry._asdict() for entry in self.comparisons],
        }
        return asdict(self) | named

    def summary(self) -> dict[str, Any]:
        """What a manifest says of it: what is off, and why."""
        plain = self.dump()
        return {name: plain[name] for name in ("key", "causal", "limit", "withheld", "elapsed_s")}

    @classmethod
    def parse(cls, plain: dict[str, Any]) -> Verdict:
        """Read what `dump` gave.

        Raises:
            KeyError, TypeError: It is not that.
        """
        return cls(
            **plain
            | {
                "withheld": tuple(Withheld(**entry) for entry in plain["withheld"]),
                "comparisons": tuple(Comparison(**entry) for entry in plain["comparisons"]),
            }
        )

    def off(self, *, readout: str, tokens: int) -> tuple[Withheld, ...]:
        """What is off for a readout of prompts of so many tokens, appended ones included."""
        return tuple(
            entry
            for entry in self.withheld
            if entry.readout in (None, readout) and (tokens > entry.beyond or not entry.beyond)
        )

    def why(self, name: str) -> str | None:
        """Why something is off, at some length or at all; None where it is not."""
        return next((entry.why for entry in self.withheld if entry.optimisation == name), None)

    def withholds(self, optimisation: str, *, tokens: int) -> bool:
        """Whether an optimisation is off for any readout of prompts of so many tokens."""
        beyond = [entry.beyond for entry in self.withheld if entry.optimisation == optimisation]
        beyond += [] if self.limit is None else [self.limit]
        return any(tokens > length or not length for length in beyond)

    @property
    def batches(self) -> bool:
        """Whether texts of one length may share a pass."""
        return all(entry.optimisation != "source_sharing" for entry in self.withheld)

    @property
    def longest_packed(self) -> int | None:
        """The most tokens of a packed sequence, its prefix included; None where there is no limit.

        A packed sequence puts tokens at places that they do not have in their prompt. Where a model looks at
        the place, and not at the position, it is right up to the first threshold only.
        """
        limits = [entry.beyond for entry in self.withheld if entry.beyond]
        limits += [] if self.limit is None else [self.limit]
        return min(limits, default=None)
