"""Reads tokens after a prompt, from its keys and values or together with it, inside a context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def read_unpatched(
    plain: Callable[..., Any],
    texts: list[list[int]],
    prompts: list[list[int]],
    *,
    numbered: bool,
    mixed: bool,
    stepwise: bool,
    device: Any,
) -> list[list[float]]:
    """Return the probabilities of decoded tokens after the unpatched T, for each row.

    All rows run in one forward pass over T and all tokens but the last, or without `mixed` those of each
    length. With `stepwise`, each token is read after T from keys and values instead, so that T does not
    attend to it.

    Args:
        plain: The model without any patch.
        texts: The ids of each row's tokens.
        prompts: The ids of each row's T.
        numbered: True if `plain` takes position_ids.
        mixed: True if rows of different lengths may share a forward pass.
        stepwise: As above.
        device: The model's device.
    """
    probs: list[list[float]] = [[] for _ in texts]
    groups: dict[int, list[int]] = {}
    for row, (prompt, ids) in enumerate(zip(prompts, texts, strict=True)):
        groups.setdefault(row if stepwise else 0 if mixed else len(prompt) + len(ids), []).append(row)
    for rows in groups.values():
        if stepwise:
            following = torch.tensor([texts[rows[0]]], dtype=torch.long, device=device)
            logits = read_after(plain, prompts[rows[0]], following[:, :-1], numbered=numbered)
        else:
            whole = [prompts[row] + texts[row][:-1] for row in rows]
            width = max(map(len, whole))
            ids = torch.tensor([[0] * (width - len(row)) + row for row in whole], device=device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in whole], device=device)
            positions = (
                {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if numbered and not mask.all() else {}
            )
            logits = plain(input_ids=ids, attention_mask=mask, **positions).logits
        for row, row_logits in zip(rows, logits, strict=True):
            decoded = torch.tensor(texts[row], dtype=torch.long, device=device)
            of_ids = torch.softmax(row_logits[len(row_logits) - len(decoded) :].float(), dim=-1)
            probs[row] = of_ids.gather(-1, decoded[:, None])[:, 0].tolist()
    return probs


def read_after(
    plain: Callable[..., Any], prompt: list[int], ids: torch.Tensor, *, numbered: bool
) -> torch.Tensor:
    """Return the logits after a prompt and after each following token, read one by one: (1, n + 1, vocab)."""
    whole = torch.tensor([prompt], device=ids.device)
    mask = torch.ones_like(whole)
    positions = {"position_ids": mask.cumsum(-1) - 1} if numbered else {}
    output = plain(input_ids=whole, attention_mask=mask, use_cache=True, **positions)
    return read_continued(
        plain, output.logits[:, -1], output.past_key_values, mask, ids, numbered=numbered, stepwise=True
    )


def read_continued(
    forward: Callable[..., Any],
    logits: torch.Tensor,
    cache: Any,
    mask: torch.Tensor,
    ids: torch.Tensor,
    *,
    numbered: bool,
    stepwise: bool,
) -> torch.Tensor:
    """Return the logits after a prompt and after each token that follows it, (batch, n + 1, vocab).

    Args:
        forward: The model.
        logits: (batch, vocab) after the prompt.
        cache: The keys and values of the prompt; they grow.
        mask: (batch, n_tokens) the prompt's attention mask.
        ids: (batch, n) the tokens that follow; n may be 0.
        numbered: True if `forward` takes position_ids.
        stepwise: True if the tokens are read one by one.
    """
    parts = [logits[:, None]]
    for part in ids.split(1 if stepwise else max(1, ids.shape[1]), dim=1) if ids.shape[1] else ():
        before = mask.sum(-1, keepdim=True)
        mask = torch.cat([mask, mask.new_ones(part.shape)], dim=1)
        steps = torch.arange(part.shape[1], device=ids.device)
        more = {"position_ids": before + steps} if numbered else {}
        output = forward(input_ids=part, attention_mask=mask, past_key_values=cache, use_cache=True, **more)
        cache = output.past_key_values
        parts.append(output.logits)
    return torch.cat(parts, dim=1)
