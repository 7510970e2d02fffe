"""What a Patchscope asks that a model, a readout or another of its fields does not give."""

from __future__ import annotations

from patchscope_nn.errors import InputError
from patchscope_nn.models import CUT, Model, ModelInfo, same_vocabulary
from patchscope_nn.spec import RESIDUAL, SITES, Patchscope, Source, Target
from patchscope_nn.spec.layers import LayerSelector


def compares(scope: Patchscope, source: Model, target: Model) -> bool:
    """Whether the source's own next-token distribution is to be read."""
    readout = scope.readout
    named = f"readout.{readout.name}.{readout.texts_field}: source"
    if not readout.from_source and (readout.appends or not readout.texts):
        return False
    if scope.source.vector is not None or scope.source.mean not in (None, "positions"):
        if readout.from_source:
            raise InputError(
                f"{named} needs one source prompt, and there is "
                f"{'none' if scope.source.vector else 'the mean of several'}.",
                hint="Name the reference tokens as texts, or leave the reference out.",
            )
        return False
    comparable = same_vocabulary(source, target)
    if readout.from_source and not comparable:
        raise InputError(
            f"{named} compares the next tokens of {source.info.name} and "
            f"{target.info.name}, whose tokenizers number them differently.",
            hint="Name the reference tokens as texts, or use models with one tokenizer.",
        )
    return comparable


def check_write(scope: Patchscope, info: ModelInfo) -> None:
    """What the target's modes ask of the model, and of each other."""
    target = scope.target
    if target.cut is not None:
        _check_cut(target, info)
    if target.every_step and not info.supports("cache"):
        raise InputError(
            f"target.every_step writes while decoding from keys and values, and {info.family} keeps none.",
            hint="Leave every_step out.",
        )
    if target.every_step and not scope.readout.decodes:
        raise InputError(
            f"target.every_step writes at every token that is decoded, and readout: {scope.readout.name} "
            "decodes none.",
            hint="Use readout: generate or choices, or leave every_step out.",
        )
    if target.every_step and target.cut is not None:
        raise InputError(
            "target.every_step writes at every token that is decoded, and target.write: cut writes nothing.",
            hint="Leave every_step out.",
        )
    if target.scale != (1.0,) and not target.needs_state:
        raise InputError(
            f"target.scale multiplies f(h), and target.write: {target.mode} writes none.",
            hint="Leave scale out; noise and blend have a number of their own.",
        )
    if target.states == "own" and target.layer != "same":
        raise InputError(
            "target.states: own writes the state of l + k in block l* + k, and needs l* = l.",
            hint="Use target.layer: same, or states: one.",
        )


def _check_cut(target: Target, info: ModelInfo) -> None:
    wrong = info.verdict and info.verdict.why(CUT)
    if wrong:
        raise InputError(
            f"target.write: cut is wrong for {info.name}: with a mask of ours {wrong}.",
            hint="Use write: zero, or another model.",
        )
    if not info.supports("cut"):
        raise InputError(
            f"target.write: cut needs blocks with an attention that takes a mask we can make; those of "
            f"{info.name} ({info.family}) are not such.",
            hint="Use write: zero, or another model.",
        )
    cuts = SITES[target.site].cuts
    if embeds(target.layer) or not cuts:
        given = "target.layer: embed" if cuts else f"target.site: {target.site}"
        raise InputError(
            f"target.write: cut is made in the attention of the blocks l*, and {given} is another place.",
            hint="Leave it out.",
        )


def check_text_only(scope: Patchscope) -> None:
    """Whether there is a text to put in the place of a state."""
    if scope.source.prompt is None or scope.source.mean not in (None, "positions"):
        raise InputError(
            "controls: text-only puts the source's text in the place of its state, and there is no one text.",
            hint="Leave text-only out where the source is a vector or the mean of rows.",
        )
    if scope.readout.reads_at >= 0:
        raise InputError(
            "controls: text-only makes target prompts of other lengths, in which "
            f"readout.{scope.readout.name}.position={scope.readout.reads_at} is another token.",
            hint="Count it from the end: -1 is the last token.",
        )


def check_site(name: str, side: Source | Target, info: ModelInfo) -> None:
    """Whether the model has the site, and the site allows what this side does there."""
    site = SITES[side.site]
    given, instead = f"{name}.site={site.name!r}", f"site: {RESIDUAL.name}"
    wrong = info.verdict and info.verdict.why(site.name)
    if wrong:
        raise InputError(
            f"{given}: reads and writes there are wrong for {info.name}: {wrong}.", hint=f"Use {instead}."
        )
    if missing := info.lacks(site):
        raise InputError(f"{given}: {missing}", hint=f"Use {instead}.")
    if not (site.readable if isinstance(side, Source) else site.writable):
        raise InputError(
            f"{given}: states there can be {'written' if isinstance(side, Source) else 'read'} only.",
            hint=f"Use {instead}.",
        )
    if embeds(side.layer) and not site.embeds:
        raise InputError(
            f"{name}.layer='embed' is the input of block 0, which has no {site.name}.",
            hint=f"Leave 'embed' out, or use {name}.{instead}.",
        )


def embeds(layer: LayerSelector) -> bool:
    """Whether a selector names the input of block 0."""
    return "embed" in (layer if isinstance(layer, tuple) else (layer,))
