"""The bodies of the readouts: they read a patched run, inside a context, perhaps on a server.

They use only torch, and no classes of this package; they take and return plain lists and tensors. Each kind
of readout names its body, which takes the run (see `PatchedRun`) and the kind's own options.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from patchscope_nn.body.decoding import read_continued, read_unpatched
from patchscope_nn.body.devices import in_sent
from patchscope_nn.body.program import PatchedRun

#: Removing rows copies the cache of those that stay. It pays once one row in this many has ended.
_LEAVING = 8
#: How many logits are processed at a time on a CPU.
_IN_CACHE = 3 * 2**19
#: The size of the blocks of logits whose maxima are compared first.
_BLOCK = 256
#: A logit this far below the top logit has a probability of exactly 0.
_NOTHING = -1e4


def read_next_token(
    run: PatchedRun,
    *,
    top_k: int,
    references: torch.Tensor,
    compared: torch.Tensor | None,
    from_source: bool,
) -> dict[str, torch.Tensor]:
    """Read the next token's distribution, and compare it with reference tokens and with the source.

    Args:
        run: The patched run.
        top_k: How many tokens to keep.
        references: (batch, n) the ids of each row's reference tokens; n may be 0.
        compared: (batch,) the index of each row's source distribution in `run.finals`; None if nothing is
            compared.
        from_source: True if the reference is the source's own top token.

    Returns:
        The columns; log-probabilities and entropies in nats, ranks from 1.
    """
    logits = run.logits
    wanted = in_sent(references, logits.device)
    before: Any = None
    own: Any = None
    if compared is not None and run.finals is not None:
        before, own = in_sent(run.finals, logits.device), in_sent(compared, logits.device)
        if from_source:
            wanted = before.argmax(-1)[own][:, None]
    # With few rows at a time, intermediate results stay in the cache of a CPU.
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
    result = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if before is not None:
        result["surprisal_nats"] = -before[own, result["top_ids"][:, 0]]
        result["source_top_ids"] = top_logits(before, result["top_ids"].shape[1])[1][own]
    if wanted.shape[1]:
        result["reference_ids"] = wanted
        result["nll_nats"] = -result["reference_logprobs"][:, 0]
    else:
        result = {name: value for name, value in result.items() if not name.startswith("reference")}
    return result


def read_logits(
    logits: torch.Tensor, *, top_k: int, wanted: torch.Tensor, before: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Return the columns of `read_next_token` as tensors.

    Args:
        logits: (batch, vocab).
        top_k: How many tokens to keep.
        wanted: (batch, n_references) the ids of the reference tokens.
        before: (batch, vocab) the source's log-probabilities; None if nothing is compared.
    """
    scores = logits.float()
    values, ids = top_logits(scores, min(top_k, scores.shape[-1]))
    of_wanted = scores.gather(-1, wanted)
    ranks = [1 + (scores > column[:, None]).sum(-1) for column in of_wanted.unbind(-1)]
    # A token this far below the top has no weight, and a logit of -inf (a token that is ruled out) no NaN.
    below = (scores - values[:, :1]).clamp_min_(_NOTHING)
    weights = below.exp()
    total = weights.sum(-1)
    norm = values[:, :1] + total.log()[:, None]
    compared = {}
    if before is not None:
        probs = before.exp()
        # Tokens that the source rules out have no weight, even if the patched run rules them out too.
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
    """Return the highest logits of each row and their ids, (batch, count), like `topk`.

    On a CPU, the blocks with the highest maxima are found first. They contain all of the highest logits, and
    a maximum is many times cheaper than a search.
    """
    batch, vocab = scores.shape
    blocks = vocab // _BLOCK
    if scores.device.type != "cpu" or count > blocks:
        return scores.topk(count, dim=-1)
    whole = scores[:, : blocks * _BLOCK].view(batch, blocks, _BLOCK)
    best = whole.amax(-1).topk(count, dim=-1).indices.sort(-1).values[:, :, None]
    candidates = whole.gather(1, best.expand(-1, -1, _BLOCK)).flatten(1)
    ids = (best * _BLOCK + torch.arange(_BLOCK)).flatten(1)
    if blocks * _BLOCK < vocab:
        candidates = torch.cat([candidates, scores[:, blocks * _BLOCK :]], dim=1)
        ids = torch.cat([ids, torch.arange(blocks * _BLOCK, vocab).expand(batch, -1)], dim=1)
    values, places = candidates.topk(count, dim=-1)
    return values, ids.gather(1, places)


def read_generate(
    run: PatchedRun,
    *,
    max_new_tokens: int,
    stops: list[int],
    temperature: float,
    seeds: list[int],
    prompts: list[list[int]] | None,
) -> dict[str, Any]:
    """Decode each row until an end token, a stop token or the limit.

    Args:
        run: The patched run.
        max_new_tokens: The most tokens to decode.
        stops: Ids of the tokens that contain the stop string; the text is cut later, on the client.
        temperature: 0 is greedy; else the tokens are sampled (see `read_noised`).
        seeds: One seed for each row.
        prompts: For each row the ids of T, if the probabilities of its tokens are requested; else None.

    Returns:
        The columns: `token_ids`, a list for each row; `stopped`, which is `eos`, `stop` or `length`; `sound`,
        the sum of the top logits, which is finite if they are. If requested, `token_probs`, and
        `unpatched_token_probs` after the unpatched T, a list for each row.
    """
    device = run.logits.device
    ends, stopping = (torch.tensor(ids, dtype=torch.long, device=device) for ids in (run.eos, stops))
    ids, sound, probs = read_decoded(
        run,
        max_new_tokens=max_new_tokens,
        ends=torch.cat([ends, stopping]),
        temperature=temperature,
        seeds=seeds,
        probable=prompts is not None,
    )
    by_eos, by_stop = torch.isin(ids, ends), torch.isin(ids, stopping)
    width = ids.shape[1]
    ended = by_eos | by_stop
    end = torch.where(ended.any(-1), ended.int().argmax(-1), width)
    last = end.clamp_max(width - 1)[:, None]
    eos = (end < width) & by_eos.gather(1, last)[:, 0]
    counts = torch.where(eos, end, (end + 1).clamp_max(width)).tolist()
    reasons = torch.where(eos, 0, torch.where(end < width, 1, 2)).tolist()
    columns: dict[str, Any] = {
        "token_ids": [row[:count] for row, count in zip(ids.tolist(), counts, strict=True)],
        "stopped": [("eos", "stop", "length")[reason] for reason in reasons],
        "sound": sound,
    }
    if prompts is not None:
        of_tokens = torch.stack(probs, dim=1).tolist()
        columns["token_probs"] = [row[:count] for row, count in zip(of_tokens, counts, strict=True)]
        columns["unpatched_token_probs"] = read_unpatched(
            run.plain,
            columns["token_ids"],
            prompts,
            numbered=run.numbered,
            mixed=run.mixed,
            stepwise=run.stepwise,
            device=device,
        )
    return columns


def read_decoded(
    run: PatchedRun,
    *,
    max_new_tokens: int,
    ends: torch.Tensor,
    temperature: float,
    seeds: list[int],
    probable: bool,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Decode a batch until all rows have ended.

    Args:
        run: The patched run.
        max_new_tokens: The most tokens to decode.
        ends: The ids that end a row.
        temperature: As in `read_generate`.
        seeds: One seed for each row.
        probable: True if the probabilities of the tokens are requested.

    Returns:
        (batch, n) the ids, which mean nothing after a row's end; (batch,) the sums of the top logits; for
        each step, if requested, (batch,) the probabilities of its tokens.
    """
    logits, cache, mask = run.logits, run.cache, run.mask
    batch = logits.shape[0]
    noises = [torch.Generator().manual_seed(seed) for seed in seeds]
    # Numbers of the rows that are still in the batch. A row that leaves repeats its last token in `chosen`.
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
        if probable:
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
            cache.reorder_cache(stay)  # unlike batch_select_indices, it handles recurrent states
            alive, mask, token, done = alive[stay], mask[stay], token[stay], done[stay]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        logits, cache = read_one_more(run, token, cache, mask)
    return torch.stack(chosen, dim=1), sound, probs


def read_one_more(run: PatchedRun, token: torch.Tensor, cache: Any, mask: torch.Tensor) -> tuple[Any, Any]:
    """Run one more token of each row; return the logits after it, (batch, vocab), and the cache."""
    positions = {"position_ids": mask.sum(-1, keepdim=True) - 1} if run.numbered else {}
    output = run.forward(
        input_ids=token[:, None],
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        **positions,
        **run.extra,
    )
    return output.logits[:, -1], output.past_key_values


def read_noised(scores: torch.Tensor, noises: list[torch.Generator]) -> torch.Tensor:
    """Add Gumbel noise to scores, (batch, vocab): the maximum of each row is then a sample.

    Each row has its own generator, so that its text does not depend on its batch.
    """
    noise = torch.stack([torch.rand(scores.shape[1], generator=generator) for generator in noises])
    return scores - torch.log(-torch.log(noise.clamp_min(1e-20))).to(scores)


def read_choices(run: PatchedRun, *, continuations: list[list[list[int]]]) -> dict[str, torch.Tensor]:
    """Score each row's choices: their summed log-probabilities, and these normalised over the choices.

    Args:
        run: The patched run. Its cache is not changed.
        continuations: (batch, n_choices, n) token ids.

    Returns:
        The columns, (batch, n_choices): `choice_logprobs` in nats, and `choice_probs`, which sum to 1.
    """
    columns = []
    for choice in range(len(continuations[0])):
        rows = [row[choice] for row in continuations]
        longest = max(len(row) for row in rows)
        ids = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in rows], device=run.logits.device)
        real = [[index < len(row) for index in range(longest)] for row in rows]
        counted = torch.tensor(real).to(ids.device)
        if run.rereads:
            # A forward pass that reads the prompt again scores every token of a choice.
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
    return {"choice_logprobs": summed, "choice_probs": torch.softmax(summed, dim=-1)}


def read_hidden(run: PatchedRun, *, clean: bool) -> dict[str, Any]:
    """Return the states that each cell wrote, and with `clean` those they replaced; None if unpatched."""
    names = {"hidden": "states", "clean": "replaced"} if clean else {"hidden": "states"}
    columns: dict[str, list[Any]] = {name: [None] * run.n_cells for name in names}
    if run.written:
        order = run.written["cells"].argsort(stable=True)
        cells, counts = run.written["cells"][order].unique_consecutive(return_counts=True)
        for name, part in names.items():
            states = run.written[part][order].float().cpu().split(counts.tolist())
            for cell, state in zip(cells.tolist(), states, strict=True):
                columns[name][cell] = state
    return columns
