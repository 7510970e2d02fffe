"""Faults that a test plants in the compiler: each makes some optimisations give other numbers than the rest.

A fault replaces a function that bodies or `lower` call by its name, so it takes effect inside traces too.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from patchscope_nn.body import batch, packed, shared
from patchscope_nn.lower import rows, segments, step


class Fault(NamedTuple):
    """A fault, the family of tests/tiny.py it is planted for, and the optimisations that it makes wrong."""

    plant: object
    family: str
    wrong: frozenset


def _shared_attention(patch):
    """Tokens that see several of their own do not see the first of them."""
    true = packed.in_own_tokens

    def fewer(*args):
        places, real = true(*args)
        real[real.sum(1) > 1, 0] = False
        return places, real

    patch.setattr(packed, "in_own_tokens", fewer)


def _shared_decoding(patch):
    """What is decoded does not see the first token of the shared prefix."""
    true = shared.in_row_attention

    def fewer(queries, keys, values, prefix, **options):
        return true(queries, keys, values, [part[:, :, 1:] for part in prefix], **options)

    patch.setattr(shared, "in_row_attention", fewer)


def _packed_windows(patch):
    """Packed passes forget the windows of blocks."""
    true = packed._in_mask
    patch.setattr(packed, "_in_mask", lambda target, hidden, _, masks: true(target, hidden, None, masks))


def _prefix(patch):
    """What prompts begin with is read as other tokens."""
    true = step._prefix

    def other(*args, **options):
        made = true(*args, **options)
        if made:
            made["inputs"]["input_ids"] += 1
        return made

    patch.setattr(step, "_prefix", other)


def _late_entry(patch):
    """Tokens that enter late stand for the tokens before them."""
    true = segments._bases

    def shifted(layout):
        return {layer: (places - 1).clamp_min(0) for layer, places in true(layout).items()}

    patch.setattr(segments, "_bases", shifted)


def _leaving(patch):
    """Rows that stay go on from the keys and values of other rows."""
    true = DynamicCache.reorder_cache

    def reorder(cache, places):
        whole = torch.equal(places, torch.arange(int(places[0]), int(places[0]) + len(places)))
        others = torch.where(places > 0, places - 1, places + 1)
        return true(cache, places if whole and len(places) > 1 else others)

    patch.setattr(DynamicCache, "reorder_cache", reorder)


def _positions(patch):
    """Padding counts as positions."""
    true = rows.batch_of

    def counted(*args, **options):
        made = true(*args, **options)
        if "position_ids" in made:
            rows, width = made["input_ids"].shape
            made["position_ids"] = torch.arange(width).expand(rows, -1)
        return made

    reading = sys.modules["patchscope_nn.lower.reading"]  # its function has its name
    for module in (rows, step, reading):
        patch.setattr(module, "batch_of", counted)


def _cache(patch):
    """What is decoded does not see the value of a row's second token."""
    true = DynamicLayer.update

    def losing(layer, keys, values, *args, **options):
        decodes = layer.get_seq_length() > 4 and keys.shape[-2] <= 2
        keys, values = true(layer, keys, values, *args, **options)
        if decodes:
            values = layer.values = values.clone()
            values[:, :, 1] = 0
        return keys, values

    patch.setattr(DynamicLayer, "update", losing)


def _fused(patch):
    """In a fused trace a row gives what the one before it says."""
    true = batch._in_fused_readout

    def shifted(model, output, *args, **options):
        output.logits = output.logits.roll(1, 0)
        return true(model, output, *args, **options)

    patch.setattr(batch, "_in_fused_readout", shifted)


def lost_writes(patch):
    """Writes into padded batches, of which the plain path consists, have no effect."""
    true = batch.in_write
    patch.setattr(batch, "in_write", lambda value, *args: true(value.clone(), *args))


def other_reads(patch):
    """The state of the token before is read."""
    true = batch.in_read
    patch.setattr(batch, "in_read", lambda value, reads: true(value.roll(1, 1), reads))


FAULTS = {
    "shared attention": Fault(_shared_attention, "llama", frozenset({"shared_attention"})),
    "shared decoding": Fault(_shared_decoding, "llama", frozenset({"shared_attention"})),
    "windows": Fault(_packed_windows, "mistral", frozenset({"prefix_sharing", "late_entry"})),
    "prefix": Fault(_prefix, "llama", frozenset({"prefix_sharing"})),
    "late entry": Fault(_late_entry, "llama", frozenset({"late_entry"})),
    "leaving": Fault(_leaving, "gpt2", frozenset({"early_leaving", "fused"})),
    "positions": Fault(_positions, "gpt2", frozenset({"mixed_lengths"})),
    "cache": Fault(_cache, "llama", frozenset({"cached_decoding"})),
    "fused": Fault(_fused, "llama", frozenset({"fused"})),
}
