"""Rows of tokens one by one: whole, the plain path that every shared computation is measured against (`run_plain`), or
each after its own copy of the prefix's cache (`run_copied`); rlaifv.inference.logprobs says which models need it.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from transformers import DynamicCache

from rlaifv.inference.memory import budget_for, token_bytes
from rlaifv.inference.prefix_cache import Prefilled, forget_positions, logits_of, prefill
from rlaifv.vlm.chat_format import EncodedPrompt, common_length
from rlaifv.vlm.collate import collate_inputs, inputs_shape, pad_rows
from rlaifv.vlm.loading import VLM

ROWS = 8
"""Rows per forward pass."""

HEAD_ELEMENTS = 1 << 26
"""Logits computed at once: a quarter of a GB in fp32."""

Reduce = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""What is kept of the logits (places, V) of some places and the tokens that follow them: one value or vector each."""

Results = dict[tuple[int, int], torch.Tensor]
"""Reduced logits of each branch's wanted places, by (tree index, branch)."""


@dataclass(frozen=True)
class Tree:
    """One prompt's rows, split into what they share and what they do not.

    `wanted[i]` are the places in branch i whose next-token distribution is asked for, `targets[i]` the tokens that
    follow them (none where the row ends there).
    """

    index: int
    prefix: list[int]
    branches: list[list[int]]
    wanted: list[range]
    targets: list[torch.Tensor]
    inputs: dict[str, torch.Tensor]


def plant(index: int, encoded: EncodedPrompt) -> Tree:
    """Split rows at their longest common prefix. Wanted are the places that a row's answer tokens follow, or its last
    place where it has no answer."""
    starts, rows = encoded.answer_starts, encoded.rows
    ends = [max(start, len(row) - 1) for start, row in zip(starts, rows, strict=True)]
    shared = min(min(starts) - 1, *(common_length(rows[0], row) for row in rows))
    branches = [row[shared:end] for row, end in zip(rows, ends, strict=True)]
    wanted = [range(start - 1 - shared, end - shared) for start, end in zip(starts, ends, strict=True)]
    targets = [torch.tensor(row[start:], dtype=torch.long) for start, row in zip(starts, rows, strict=True)]
    return Tree(index, rows[0][:shared], branches, wanted, targets, encoded.inputs)


def project(vlm: VLM, hidden: torch.Tensor, target: torch.Tensor, reduce: Reduce) -> torch.Tensor:
    """Vocabulary projection in slices, so that long answers do not need all their logits at once."""
    size = max(1, HEAD_ELEMENTS // vlm.network.get_output_embeddings().weight.shape[0])
    values = []
    for k in range(0, len(hidden), size):
        logits = logits_of(vlm, hidden[k : k + size])
        values.append(reduce(logits, target[k : k + size].to(logits.device)).cpu())
    return torch.cat(values)


@torch.inference_mode()
def run_plain(vlm: VLM, trees: list[Tree], reduce: Reduce, batch: int | None = None) -> Results:
    """The same log-probs with every row whole through the model's forward, `batch` rows at a time."""
    jobs = [(tree, i) for tree in trees for i in range(len(tree.branches))]
    jobs.sort(key=lambda job: (repr(inputs_shape(job[0].inputs)), job[0].index))
    results: Results = {}
    longest = max((len(tree.prefix) + len(tree.branches[i]) for tree, i in jobs), default=0)
    budget = budget_for(vlm, "whole rows", batch or ROWS, "rows", token_bytes(vlm) * longest + 1)
    for _, values in budget.batches(
        jobs, lambda part: plain_batch(vlm, part, reduce), kind=lambda job: inputs_shape(job[0].inputs)
    ):
        results |= values
    return results


def plain_batch(vlm: VLM, jobs: list[tuple[Tree, int]], reduce: Reduce) -> Results:
    """One padded and masked forward pass."""
    rows = [tree.prefix + tree.branches[i] for tree, i in jobs]
    lengths = [len(row) for row in rows]
    ids = pad_rows(rows, vlm.tokenizer.pad_token_id or 0).to(vlm.device)
    mask = pad_rows([[1] * length for length in lengths], 0).to(vlm.device)
    inputs = collate_inputs(vlm, [tree.inputs for tree, _ in jobs], lengths)
    wanted = [[len(tree.prefix) + place for place in tree.wanted[i]] for tree, i in jobs]
    keep = ids.shape[1] - min(place for places in wanted for place in places)
    forget_positions(vlm)
    output = vlm.network(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep, **inputs)
    results = {}
    for k, (tree, i) in enumerate(jobs):
        # counted from the end, for some models (MiniCPM-V 4.6) ignore `logits_to_keep` and return them all
        logits = output.logits[k, [place - ids.shape[1] for place in wanted[k]]].float()
        results[tree.index, i] = reduce(logits, tree.targets[i].to(logits.device)).cpu()
    return results


@torch.inference_mode()
def run_copied(vlm: VLM, trees: list[Tree], reduce: Reduce) -> Results:
    """Log-probs of all wanted places with each prefix computed once and its cache copied for some rows at a time."""
    results = {}
    for tree in trees:
        longest = len(tree.prefix) + max(map(len, tree.branches))
        rows = budget_for(vlm, "copied rows", ROWS, "rows", token_bytes(vlm) * longest)
        state = prefill(vlm, [tree.prefix], [tree.inputs], DynamicCache(config=vlm.network.get_decoder().config))
        for _, values in rows.batches(range(len(tree.branches)), partial(copied_batch, vlm, tree, state, reduce)):
            results |= values
    return results


def copied_batch(vlm: VLM, tree: Tree, state: Prefilled, reduce: Reduce, part: list[int]) -> Results:
    """One forward pass of some branches, padded on the right, each after its copy of the prefix."""
    branches = [tree.branches[i] for i in part]
    ids = pad_rows(branches, vlm.tokenizer.pad_token_id or 0).to(vlm.device)
    cache = copy.deepcopy(state.cache)  # the original stays as it is
    cache.reorder_cache(torch.zeros(len(part), dtype=torch.long, device=vlm.device))
    hidden = vlm.network.get_decoder()(
        input_ids=ids,
        attention_mask=pad_rows([[1] * (state.width + len(branch)) for branch in branches], 0).to(vlm.device),
        position_ids=(state.positions + torch.arange(ids.shape[1], device=vlm.device)).expand_as(ids),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    results: Results = {}
    for k, i in enumerate(part):
        results[tree.index, i] = project(vlm, hidden[k, list(tree.wanted[i])], tree.targets[i], reduce)
    return results
