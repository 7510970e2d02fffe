"""Reads tokens after a prompt, from its keys and values or together with it, inside a context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def read_unpatched(
    plain: Callable[..., Any],
    rows: list[dict[str, Any]],
    prompts: list[list[int]],
    *,
    numbered: bool,
    stepwise: bool,
    device: Any,
) -> None:
    """Add to each row the probabilities of its tokens after the unpatched T.

    All rows run in one forward pass over T and all tokens but the last. With `stepwise`, each token is read
    after T from keys and values instead, so that T does not attend to it.
    """
    if stepwise:
        for row, prompt in zip(rows, prompts, strict=True):
            ids = torch.tensor([row["token_ids"]], dtype=torch.long, device=device)
            logits = read_after(plain, prompt, ids[:, :-1], numbered=numbered)[0]
            probs = torch.softmax(logits.float(), dim=-1)
            row["unpatched_token_probs"] = probs[: ids.shape[1]].gather(-1, ids[0, :, None])[:, 0].tolist()
        return
    whole = [prompt + row["token_ids"][:-1] for prompt, row in zip(prompts, rows, strict=True)]
    width = max(map(len, whole))
    ids = torch.tensor([[0] * (width - len(tokens)) + tokens for tokens in whole], device=device)
    mask = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in whole], device=device)
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if numbered and not mask.all() else {}
    logits = plain(input_ids=ids, attention_mask=mask, **positions).logits
    for number, row in enumerate(rows):
        decoded = torch.tensor(row["token_ids"], dtype=torch.long, device=device)
        probs = torch.softmax(logits[number, width - len(decoded) :].float(), dim=-1)
        row["unpatched_token_probs"] = probs.gather(-1, decoded[:, None])[:, 0].tolist()


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
