"""Rows of tokens one by one: the plain path that every shared computation is measured against.

`run_plain` puts each row whole through the model's ordinary forward. `run_copied` computes the prefix once and gives
each row its own copy of the cache: exact for models with linear attention, whose layers keep one running state and no
keys that a mask could hide.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from transformers import Cache, DynamicCache

from rlaifv.inference.memory import Budget
from rlaifv.inference.prefix_cache import forget_positions, logits_of
from rlaifv.vlm.chat_format import EncodedPrompt, common_length
from rlaifv.vlm.collate import collate_inputs, inputs_shape, pad_rows
from rlaifv.vlm.loading import VLM

ROWS = 8
"""Rows per forward pass."""

HEAD_ELEMENTS = 1 << 26
"""Logits computed at once: a quarter of a GB in fp32."""

Reduce = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""What is kept of the logits (places, V) and targets (places,) of some places: one value or vector each."""

Results = dict[tuple[int, int], torch.Tensor]
"""Reduced logits of each branch's wanted places, by (tree index, branch)."""


@dataclass(frozen=True)
class Tree:
    """One prompt's rows, split into what they share and what they do not.

    `wanted[i]` are the places in branch i whose next-token distribution is asked for.
    """

    index: int
    prefix: list[int]
    branches: list[list[int]]
    wanted: list[range]
    inputs: dict[str, torch.Tensor]


def plant(index: int, encoded: EncodedPrompt, first: list[int], last: list[int]) -> Tree:
    """Split rows at their longest common prefix; places first[i]..last[i] of row i are wanted."""
    shared = min(first)
    for row in encoded.rows[1:]:
        shared = min(shared, common_length(encoded.rows[0], row))
    branches = [row[shared : end + 1] for row, end in zip(encoded.rows, last, strict=True)]
    wanted = [range(a - shared, b - shared + 1) for a, b in zip(first, last, strict=True)]
    return Tree(index, encoded.rows[0][:shared], branches, wanted, encoded.inputs)


def project(vlm: VLM, hidden: torch.Tensor, target: torch.Tensor | None, reduce: Reduce) -> torch.Tensor:
    """Vocabulary projection in slices, so that long answers do not need all their logits at once."""
    size = max(1, HEAD_ELEMENTS // vlm.network.get_output_embeddings().weight.shape[0])
    return torch.cat(
        [
            reduce(logits_of(vlm, hidden[k : k + size]), None if target is None else target[k : k + size]).cpu()
            for k in range(0, len(hidden), size)
        ]
    )


@torch.inference_mode()
def run_plain(
    vlm: VLM, trees: list[Tree], reduce: Reduce, targets: dict, batch: int | None = None, side: str = "right"
) -> Results:
    """The same log-probs with every row whole through the model's forward, `batch` rows at a time."""
    jobs = [(tree, i) for tree in trees for i in range(len(tree.branches))]
    jobs.sort(key=lambda job: (repr(inputs_shape(job[0].inputs)), job[0].index))
    results: Results = {}
    for _, values in Budget(vlm.name, batch or ROWS, "rows").batches(
        jobs, lambda part: plain_batch(vlm, part, reduce, targets, side), kind=lambda job: inputs_shape(job[0].inputs)
    ):
        results |= values
    return results


def plain_batch(vlm: VLM, jobs: list[tuple[Tree, int]], reduce: Reduce, targets: dict, side: str) -> Results:
    """One padded and masked forward pass."""
    rows = [tree.prefix + tree.branches[i] for tree, i in jobs]
    lengths = [len(row) for row in rows]
    ids = pad_rows(rows, vlm.tokenizer.pad_token_id or 0, side).to(vlm.device)
    mask = pad_rows([[1] * length for length in lengths], 0, side).to(vlm.device)
    inputs = collate_inputs(vlm, [tree.inputs for tree, _ in jobs], lengths, side)
    if side == "left" and not hasattr(vlm.network.base_model, "rope_deltas"):
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    shift = [ids.shape[1] - length if side == "left" else 0 for length in lengths]
    wanted = [[shift[k] + len(t.prefix) + w for w in t.wanted[i]] for k, (t, i) in enumerate(jobs)]
    keep = ids.shape[1] - min(place for places in wanted for place in places)
    forget_positions(vlm)
    output = vlm.network(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep, **inputs)
    results = {}
    for k, (tree, i) in enumerate(jobs):
        # counted from the end, for some models (MiniCPM-V 4.6) ignore `logits_to_keep` and return them all
        logits = output.logits[k, [place - ids.shape[1] for place in wanted[k]]].float()
        target = targets[tree.index, i].to(logits.device) if targets else None
        results[tree.index, i] = reduce(logits, target).cpu()
    return results


def prefix_cache(vlm: VLM, tree: Tree) -> tuple[Cache, int]:
    """The model's own kind of cache after the tree's prefix, and the position id that the next token takes."""
    ids = torch.tensor([tree.prefix], device=vlm.device)
    cache = DynamicCache(config=vlm.network.get_decoder().config)
    forget_positions(vlm)
    inputs = collate_inputs(vlm, [tree.inputs], [len(tree.prefix)])
    vlm.network.base_model(
        input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True, **inputs
    )
    deltas = getattr(vlm.network.base_model, "rope_deltas", None)
    return cache, len(tree.prefix) + (int(deltas.reshape(-1)[0]) if deltas is not None else 0)


def copies(cache: Cache, count: int, device: torch.device) -> Cache:
    """`count` rows of a one-row cache; the original stays as it is."""
    copied = copy.deepcopy(cache)
    copied.reorder_cache(torch.zeros(count, dtype=torch.long, device=device))
    return copied


@torch.inference_mode()
def run_copied(vlm: VLM, trees: list[Tree], reduce: Reduce, targets: dict) -> Results:
    """Log-probs of all wanted places with each prefix computed once and its cache copied for some rows at a time."""
    results, rows = {}, Budget(vlm.name, ROWS, "rows")
    for tree in trees:
        cache, position = prefix_cache(vlm, tree)
        ask = partial(copied_batch, vlm, tree, cache=cache, position=position, reduce=reduce, targets=targets)
        for _, values in rows.batches(range(len(tree.branches)), ask):
            results |= values
    return results


def copied_batch(
    vlm: VLM, tree: Tree, part: list[int], cache: Cache, position: int, reduce: Reduce, targets: dict
) -> Results:
    """One forward pass of some branches, padded on the right, each after its copy of the prefix."""
    branches = [tree.branches[i] for i in part]
    ids = pad_rows(branches, vlm.tokenizer.pad_token_id or 0).to(vlm.device)
    lengths = torch.tensor([len(branch) for branch in branches], device=vlm.device)
    column = torch.arange(ids.shape[1], device=vlm.device)
    mask = torch.cat([ids.new_ones(len(ids), len(tree.prefix)), (column < lengths[:, None]).long()], 1)
    output = vlm.network.get_decoder()(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(position + column).expand_as(ids),
        past_key_values=copies(cache, len(ids), vlm.device),
        use_cache=True,
    )
    results: Results = {}
    for k, i in enumerate(part):
        target = targets[tree.index, i].to(vlm.device) if targets else None
        results[tree.index, i] = project(vlm, output.last_hidden_state[k, list(tree.wanted[i])], target, reduce)
    return results
