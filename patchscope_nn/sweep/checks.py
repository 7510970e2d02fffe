"""Checks that the fields of a Patchscope fit its models, its readout and each other."""

from __future__ import annotations

from patchscope_nn.errors import InputError, LayerError, PositionError
from patchscope_nn.models import CUT, Model, ModelInfo, same_vocabulary
from patchscope_nn.spec import RESIDUAL, SITES, Patchscope, Readout, Source, Target
from patchscope_nn.spec.layers import LayerSelector
from patchscope_nn.sweep.entry import PositionSet


def compares(scope: Patchscope, source: Model, target: Model) -> bool:
    """Return whether cells are compared with the source's own next-token distribution.

    Raises:
        InputError: The readout needs that comparison, and the source or the tokenizers do not allow it.
    """
    readout = scope.readout
    named = f"readout.{readout.name}.{readout.texts_field}: source"
    if not readout.from_source and (readout.appends or not readout.texts):
        return False
    if scope.source.vector is not None or scope.source.mean not in (None, "positions"):
        if readout.from_source:
            raise InputError(
                f"{named} needs one source prompt, and the source is "
                f"{'a vector' if scope.source.vector else 'the mean of several prompts'}.",
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
    """Check that the target's modes fit the model and each other."""
    target = scope.target
    if target.cut is not None:
        _check_cut(target, info)
    if target.every_step and not info.supports("cache"):
        raise InputError(
            f"target.every_step writes while decoding from cached keys and values, and {info.family} keeps "
            "none.",
            hint="Leave every_step out.",
        )
    if target.every_step and not scope.readout.decodes:
        raise InputError(
            f"target.every_step writes at every decoded token, and readout: {scope.readout.name} decodes "
            "none.",
            hint="Use readout: generate or choices, or leave every_step out.",
        )
    if target.every_step and target.cut is not None:
        raise InputError(
            "target.every_step writes at every decoded token, and target.write: cut writes nothing.",
            hint="Leave every_step out.",
        )
    if target.scale != (1.0,) and not target.needs_state:
        raise InputError(
            f"target.scale multiplies f(h), and target.write: {target.mode} writes none.",
            hint="Leave scale out; noise and blend have their own number.",
        )
    if target.states == "own" and target.layer != "same":
        raise InputError(
            "target.states: own writes the state of block l + k in block l* + k, and needs l* = l.",
            hint="Use target.layer: same, or states: one.",
        )


def check_engine(readout: Readout, info: ModelInfo) -> None:
    """Check that the engine of M* can serve the readout."""
    if readout.decodes and not readout.proven and info.supports("requests"):
        raise InputError(
            f"readout: {readout.name} runs the model itself, and the engine {info.engine} runs only prompts.",
            hint="Use the engine transformers, or one of the readouts of this package.",
        )


def _check_cut(target: Target, info: ModelInfo) -> None:
    wrong = info.verdict and info.verdict.why(CUT)
    if wrong:
        raise InputError(
            f"target.write: cut gives wrong results for {info.name}: with our attention mask {wrong}.",
            hint="Use write: zero, or another model.",
        )
    if info.supports("requests"):
        raise InputError(
            f"target.write: cut changes attention masks, which the engine {info.engine} does not take.",
            hint="Use the engine transformers, or write: zero.",
        )
    if not info.supports("cut"):
        raise InputError(
            f"target.write: cut needs blocks that accept an attention mask in a known form; the blocks of "
            f"{info.name} ({info.family}) do not.",
            hint="Use write: zero, or another model.",
        )
    cuts = SITES[target.site].cuts
    if embeds(target.layer) or not cuts:
        field = "target.layer: embed" if cuts else f"target.site: {target.site}"
        raise InputError(
            f"target.write: cut changes the attention of the blocks l*, and cannot be used with {field}.",
            hint=f"Leave {field} out.",
        )


def check_text_only(scope: Patchscope) -> None:
    """Check that the source has one text, which can replace its state."""
    if scope.source.prompt is None or scope.source.mean not in (None, "positions"):
        raise InputError(
            "controls: text-only replaces the source's state by its text, and this source does not have a "
            "single text.",
            hint="Leave text-only out if the source is a vector or the mean of rows.",
        )
    if scope.readout.reads_at >= 0:
        raise InputError(
            "controls: text-only changes the length of the target prompt, and then "
            f"readout.{scope.readout.name}.position={scope.readout.reads_at} is a different token.",
            hint="Count it from the end: -1 is the last token.",
        )


def check_site(name: str, side: Source | Target, info: ModelInfo) -> None:
    """Check that the model has the site, and that the site can be read (for M) or written (for M*)."""
    site = SITES[side.site]
    field, instead = f"{name}.site={site.name!r}", f"site: {RESIDUAL.name}"
    wrong = info.verdict and info.verdict.why(site.name)
    if wrong:
        raise InputError(
            f"{field}: reads and writes at this site give wrong results for {info.name}: {wrong}.",
            hint=f"Use {instead}.",
        )
    if missing := info.lacks(site):
        raise InputError(f"{field}: {missing}", hint=f"Use {instead}.")
    if not (site.readable if isinstance(side, Source) else site.writable):
        raise InputError(
            f"{field}: states at this site can only be {'written' if isinstance(side, Source) else 'read'}.",
            hint=f"Use {instead}.",
        )
    if embeds(side.layer) and not site.embeds:
        raise InputError(
            f"{name}.layer='embed' is the input of block 0, which has no {site.name}.",
            hint=f"Leave 'embed' out, or use {name}.{instead}.",
        )


def embeds(layer: LayerSelector) -> bool:
    """Return whether a selector names the input of block 0."""
    return "embed" in (layer if isinstance(layer, tuple) else (layer,))


def same_layer(layer: int, shifts: int, depth: int) -> int:
    """Return the target layer that `same` pairs with `layer`, after the offsets of both sites."""
    if layer + shifts >= depth:
        raise LayerError(
            f"target.layer: same pairs layer {layer} of the source with layer {layer} of the target, "
            f"whose blocks are 0..{depth - 1}.",
            hint="Narrow source.layer, or give target.layer as a list.",
        )
    return layer + shifts


def check_positions(positions: PositionSet, written: PositionSet) -> None:
    """Check that i is one token, or as many tokens as i*."""
    if len(written) != len(positions) != 1:
        raise PositionError(
            f"source.position names {len(positions)} tokens and target.position {len(written)}; several "
            "tokens are patched one to one.",
            hint="Name as many tokens on both sides, or one source token for all.",
        )


def check_readout_position(readout: Readout, patched: PositionSet, n_tokens: int) -> None:
    """Check that the readout position is in the target prompt, and not before the first patched token."""
    named = f"readout.{readout.name}.position={readout.reads_at}"
    if not -n_tokens <= readout.reads_at < n_tokens:
        raise PositionError(
            f"{named} is outside the {n_tokens}-token target prompt.",
            hint="Use -1 for its last token.",
        )
    if readout.reads_at % n_tokens < min(patched):
        raise PositionError(
            f"{named} is before the patched position {min(patched)}, where the patch has no effect.",
            hint="Read at the patched token or after it; -1 is the last.",
        )
