"""What is read from a patched run. These functions run inside a context, on whatever machine that is.

So they take and give plain lists and tensors, use torch alone, and know nothing of this package's classes.
Each kind of readout names its body here, which takes the run and the kind's own options (see `PatchedRun`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from patchscope_nn.body.decoding import read_continued, read_unpatched
from patchscope_nn.body.program import PatchedRun

#: Taking rows out copies the cache of those that stay; it pays once one in so many has ended.
_LEAVING = 8
#: How many logits of a batch are worked on at a time, on a CPU.
_IN_CACHE = 3 * 2**19
#: The logits whose maximum is looked at before they are.
_BLOCK = 256
#: A logit so far below the top one has a probability of exactly 0.
_NOTHING = -1e4


def read_next_token(
    run: PatchedRun,
    *,
    top_k: int,
    references: list[list[int]],
    compared: list[int],
    from_source: bool,
) -> list[dict[str, Any]]:
    """The next token's distribution, and what it says of reference tokens.

    Args:
        run: The patched run.
        top_k: How many tokens to keep.
        references: For each row the ids of its reference tokens, as many for each; may be empty.
        compared: For each row the number of its own source distribution; empty where nothing is compared.
        from_source: Whether the reference is the source's own top token.

    Returns:
        One dict for each row; log-probabilities and entropies in nats, ranks from 1.
    """
    logits = run.logits
    wanted = torch.tensor(references, dtype=torch.long, device=logits.device)
    before = None
    if compared:
        numbers = list(dict.fromkeys(compared))
        before = torch.stack([run.states[number].to(logits.device) for number in numbers])
        place = {number: at for at, number in enumerate(numbers)}
        own = torch.tensor([place[number] for number in compared], device=logits.device)
        if from_source:
            wanted = before.argmax(-1)[own][:, None]
    # On a CPU what is computed of few rows at a time stays in its cache.
    size = max(1, _IN_CACHE // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    parts = [
        read_logits(
            logits[at : at + size],
            top_k=top_k,
            wanted=wanted[at : at + size],
            before=None if before is None else before[own[at : at + size]],
        )
        for at in range(0, len(logits), size)
    ]
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if before is not None:
        found["surprisal_nats"] = -before[own, found["top_ids"][:, 0]]
        found["source_top_ids"] = top_logits(before, found["top_ids"].shape[1])[1][own]
    if wanted.shape[1]:
        found["reference_ids"] = wanted
        found["nll_nats"] = -found["reference_logprobs"][:, 0]
    else:
        found = {name: value for name, value in found.items() if not name.startswith("reference")}
    listed = {name: value.tolist() for name, value in found.items()}
    return [{name: values[row] for name, values in listed.items()} for row in range(len(logits))]


def read_logits(
    logits: torch.Tensor, *, top_k: int, wanted: torch.Tensor, before: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The same as tensors: `wanted` are (batch, n_references) ids, `before` (batch, vocab) log p_source."""
    scores = logits.float()
    values, ids = top_logits(scores, min(top_k, scores.shape[-1]))
    of_wanted = scores.gather(-1, wanted)
    ranks = [1 + (scores > column[:, None]).sum(-1) for column in of_wanted.unbind(-1)]
    # Below the top by so much, a token (one that is ruled out has a logit of -inf) weighs nothing.
    below = (scores - values[:, :1]).clamp_min_(_NOTHING)
    weights = below.exp()
    total = weights.sum(-1)
    norm = values[:, :1] + total.log()[:, None]
    compared = {}
    if before is not None:
        probs = before.exp()
        # Tokens that the source rules out weigh nothing, even where the patched run rules them out too.
        differs = (before - scores + norm).masked_fill_(probs == 0, 0)
        compared["kl_nats"] = (probs * differs).sum(-1)
    return compared | {
        "top_ids": ids,
        "top_probs": (values - norm).exp(),
        "entropy_nats": total.log() - below.mul_(weights).sum(-1) / total,
        "reference_logprobs": of_wanted - norm,
        "reference_ranks": torch.stack(ranks, dim=-1) if ranks else wanted,
    }


def top_logits(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest logits of each row and their ids, (batch, count), as `topk` gives them.

    On a CPU the blocks of highest maxima are found first: they hold all that is looked for, and a maximum is
    many times cheaper than a search.
    """
    batch, vocab = scores.shape
    blocks = vocab // _BLOCK
    if scores.device.type != "cpu" or count > blocks:
        return scores.topk(count, dim=-1)
    whole = scores[:, : blocks * _BLOCK].view(batch, blocks, _BLOCK)
    best = whole.amax(-1).topk(count, dim=-1).indices.sort(-1).values[:, :, None]
    found = whole.gather(1, best.expand(-1, -1, _BLOCK)).flatten(1)
    ids = (best * _BLOCK + torch.arange(_BLOCK)).flatten(1)
    if blocks * _BLOCK < vocab:
        found = torch.cat([found, scores[:, blocks * _BLOCK :]], dim=1)
        ids = torch.cat([ids, torch.arange(blocks * _BLOCK, vocab).expand(batch, -1)], dim=1)
    values, places = found.topk(count, dim=-1)
    return values, ids.gather(1, places)


def read_generate(
    run: PatchedRun,
    *,
    max_new_tokens: int,
    stops: list[int],
    temperature: float,
    seeds: list[int],
    prompts: list[list[int]] | None,
) -> list[dict[str, Any]]:
    """Decode each row until it meets an end, a stop or the limit.

    Args:
        run: The patched run.
        max_new_tokens: The most tokens to decode.
        stops: Ids of tokens that hold the stop string; the text is cut later, on the client.
        temperature: 0 is greedy; else the tokens are sampled by the Gumbel-max trick, with each row's own
            noise, so that a row's text does not depend on its batch.
        seeds: One seed for each row.
        prompts: For each row the ids of T, where it is asked how likely its tokens are; else None.

    Returns:
        One dict for each row: `token_ids`; `stopped`, which is `eos`, `stop` or `length`; `sound`, the sum of
        the top logits, which is a finite number if they are; where asked, for each token `token_probs`, and
        `unpatched_token_probs` after T as it is.
    """
    logits, cache, mask, eos = run.logits, run.cache, run.mask, run.eos
    batch = logits.shape[0]
    noises = [torch.Generator().manual_seed(seed) for seed in seeds]
    ends = torch.tensor([*eos, *stops], dtype=torch.long, device=logits.device)
    # Rows still in the batch, by number; a row that leaves keeps its last token to the end of `chosen`.
    alive = torch.arange(batch, device=logits.device)
    done = torch.zeros(batch, dtype=torch.bool, device=logits.device)
    latest = torch.zeros(batch, dtype=torch.long, device=logits.device)
    likely = torch.zeros(batch, device=logits.device)
    sound = torch.zeros(batch, device=logits.device)
    chosen, probs = [], []
    for step in range(max_new_tokens):
        scores = logits.float()
        if temperature > 0:
            scores = read_noised(scores / temperature, [noises[row] for row in alive.tolist()])
        best, token = (part[:, 0] for part in top_logits(scores, 1))
        sound = sound.scatter_add(0, alive, best)
        latest = latest.scatter(0, alive, token)
        chosen.append(latest)
        if prompts is not None:
            of_token = torch.softmax(logits.float(), dim=-1).gather(-1, token[:, None])[:, 0]
            likely = likely.scatter(0, alive, of_token)
            probs.append(likely)
        if run.heard is not None:
            run.heard(alive[~done].tolist(), token[~done].tolist())
        done = done | torch.isin(token, ends)
        gone = int(done.sum())
        if step + 1 == max_new_tokens or gone == len(done):
            break
        if run.leaving and gone * _LEAVING >= len(done):
            stay = (~done).nonzero()[:, 0]
            cache.reorder_cache(stay)  # unlike batch_select_indices it knows recurrent states
            alive, mask, token, done = alive[stay], mask[stay], token[stay], done[stay]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        where = {"position_ids": mask.sum(-1, keepdim=True) - 1} if run.numbered else {}
        output = run.forward(
            input_ids=token[:, None],
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **where,
            **run.extra,
        )
        logits, cache = output.logits[:, -1], output.past_key_values
    said = zip(torch.stack(chosen, dim=1).tolist(), sound.tolist(), strict=True)
    rows = [read_ended(ids, eos=eos, stops=stops) | {"sound": total} for ids, total in said]
    if prompts is not None:
        for row, own in zip(rows, torch.stack(probs, dim=1).tolist(), strict=True):
            row["token_probs"] = own[: len(row["token_ids"])]
        for some in read_alike(rows, prompts, mixed=run.mixed):
            read_unpatched(
                run.plain, *some, numbered=run.numbered, stepwise=run.stepwise, device=logits.device
            )
    return rows


def read_noised(scores: torch.Tensor, noises: list[torch.Generator]) -> torch.Tensor:
    """Scores with Gumbel noise, (batch, vocab), each row with its own: their maximum is a sample."""
    noise = torch.stack([torch.rand(scores.shape[1], generator=generator) for generator in noises])
    return scores - torch.log(-torch.log(noise.clamp_min(1e-20))).to(scores)


def read_ended(ids: list[int], *, eos: list[int], stops: list[int]) -> dict[str, Any]:
    """A row's tokens up to where it met its end, and which end that was."""
    end = next((place for place, token in enumerate(ids) if token in eos or token in stops), None)
    if end is None:
        return {"token_ids": ids, "stopped": "length"}
    if ids[end] in eos:
        return {"token_ids": ids[:end], "stopped": "eos"}
    return {"token_ids": ids[: end + 1], "stopped": "stop"}


def read_alike(rows: list[dict[str, Any]], prompts: list[list[int]], *, mixed: bool) -> list[Any]:
    """Rows and prompts that may share a forward: all, or those of each length."""
    lengths = [len(prompt) + len(row["token_ids"]) for prompt, row in zip(prompts, rows, strict=True)]
    groups: dict[int, Any] = {}
    for length, row, prompt in zip(lengths, rows, prompts, strict=True):
        some = groups.setdefault(0 if mixed else length, ([], []))
        some[0].append(row)
        some[1].append(prompt)
    return list(groups.values())


def read_choices(run: PatchedRun, *, continuations: list[list[list[int]]]) -> list[dict[str, Any]]:
    """The summed log-probability of each row's continuations, and these normalised over the choices.

    Args:
        run: The patched run; its cache is left as it is.
        continuations: (batch, n_choices, n) token ids.

    Returns:
        One dict for each row: `choice_logprobs` in nats, and `choice_probs`, which sum to 1.
    """
    columns = []
    for choice in range(len(continuations[0])):
        rows = [row[choice] for row in continuations]
        longest = max(len(row) for row in rows)
        ids = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in rows], device=run.logits.device)
        counted = torch.tensor([[place < len(row) for place in range(longest)] for row in rows]).to(
            ids.device
        )
        if run.rereads:
            # A forward that reads the prompt again scores all of a choice.
            mask = torch.cat([run.mask, run.mask.new_ones(len(rows), longest)], dim=1)
            output = run.forward(input_ids=ids, attention_mask=mask, past_key_values=run.cache)
            scores = output.logits[:, :-1]
        else:
            scores = read_continued(
                run.forward,
                run.logits,
                copy.deepcopy(run.cache),
                run.mask,
                ids[:, :-1],
                numbered=run.numbered,
                stepwise=run.stepwise,
            )
        logprobs = torch.log_softmax(scores.float(), dim=-1)
        of_ids = logprobs.gather(-1, ids[:, :, None])[:, :, 0]
        columns.append((of_ids * counted).sum(-1))
    summed = torch.stack(columns, dim=1)
    return [
        {"choice_logprobs": one, "choice_probs": probs}
        for one, probs in zip(summed.tolist(), torch.softmax(summed, dim=-1).tolist(), strict=True)
    ]


def read_hidden(run: PatchedRun, *, clean: bool) -> list[dict[str, Any]]:
    """What was written for each cell, and with `clean` what stood there; an unpatched cell has nothing."""
    names = ["hidden", "clean"][: 1 + clean]
    return [
        {
            name: run.written[cell][place].float().tolist() if cell in run.written else None
            for place, name in enumerate(names)
        }
        for cell in range(run.n_cells)
    ]
