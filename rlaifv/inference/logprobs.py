"""Many continuations of one image and prompt: the image and the shared prefix are computed once.

Feedback asks dozens of questions about one image, best-of-N scores several answers to one prompt. Every one of them is
a row of tokens that starts with the same image and the same text. Here that prefix goes through the model's ordinary
forward once; the continuations then follow as *branches* in packed rows:

    keys     [ prefix .............. | branch 0 | branch 1 | branch 2 ]
    queries                          [ branch 0 | branch 1 | branch 2 ]

A branch sees the prefix and itself, and its positions go on from the prefix's last one. The prefix's keys and values
lie in one buffer that every pack of branches reads and none copies, so memory grows with neither questions × prefix
nor the number of packs. Everything that an architecture does with an image (vision encoder, 3-D positions,
bidirectional image attention, deep-stack features) happens in its own forward, on the prefix.

Which way a model goes is tried once on a real row (`prefix_path`), and the log says so when it is not this one: linear
attention keeps one running state, not keys that a mask could hide, so its branches get copies of the prefix's cache
(`plain_rows.run_copied`); a model that agrees with its plain rows in neither way is asked row by row
(`plain_rows.run_plain`).
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from rlaifv.inference.memory import budget_for, token_bytes
from rlaifv.inference.plain_rows import Reduce, Results, Tree, plant, project, run_copied, run_plain
from rlaifv.inference.prefix_cache import buffer_cache, exact_columns, feed, prefill, rewind
from rlaifv.inference.self_check import disagreement
from rlaifv.vlm.chat_format import EncodedPrompt
from rlaifv.vlm.collate import inputs_shape, pad_rows
from rlaifv.vlm.loading import VLM

log = logging.getLogger(__name__)

_verdicts: WeakKeyDictionary = WeakKeyDictionary()


def pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Indices of branches packed in order into as few rows of about equal length as `capacity` allows."""
    rows = -(-sum(lengths) // max(capacity, max(lengths)))
    target = -(-sum(lengths) // rows)
    packed, used = [[]], 0
    for index, length in enumerate(lengths):
        if used + length // 2 > target and used:
            packed.append([])
            used = 0
        packed[-1].append(index)
        used += length
    return packed


def row_capacity(vlm: VLM) -> int:
    """Branch tokens per packed row.

    In a row of q branch tokens, a token and layer spend about 2·q·D FLOPs on keys of other branches that the mask
    hides, against 24·D² in the linear layers: q = D wastes under a tenth, and the matrices are large enough.
    """
    return min(2048, max(64, vlm.network.get_decoder().config.hidden_size))


@dataclass(frozen=True)
class Layout:
    """Branches of B trees laid out in B packed rows of K columns.

    Attributes:
        ids: (B, K) tokens.
        owner: (B, K) the branch that a token belongs to, -1 for padding.
        offset: (B, K) the token's place in its branch.
        places: (tree, branch, column) of each wanted place; trees in order, their branches in the row's order.
    """

    ids: torch.Tensor
    owner: torch.Tensor
    offset: torch.Tensor
    places: list[tuple[int, int, int]]


def lay_out(trees: list[Tree], packs: list[list[int]], device: torch.device | str = "cpu") -> Layout:
    """One packed row per tree, of those of its branches that `packs` names."""
    cells = [
        [(token, i, k) for i in pack for k, token in enumerate(tree.branches[i])]
        for tree, pack in zip(trees, packs, strict=True)
    ]
    ids, owner, offset = (
        pad_rows([[cell[part] for cell in row] for row in cells], padding).to(device)
        for part, padding in ((0, 0), (1, -1), (2, 0))
    )
    places = [
        (b, i, column)
        for b, (tree, row) in enumerate(zip(trees, cells, strict=True))
        for column, (_, i, k) in enumerate(row)
        if k in tree.wanted[i]
    ]
    return Layout(ids, owner, offset, places)


def run_branches(vlm: VLM, trees: list[Tree], capacity: int) -> Iterator[tuple[list[tuple[int, int]], torch.Tensor]]:
    """Yield ((tree, branch) of each wanted place, hidden states (places, D)) of one pack after another."""
    packs = [pack([len(branch) for branch in tree.branches], capacity) for tree in trees]
    widths = [sum(len(tree.branches[i]) for i in row) for tree, rows in zip(trees, packs, strict=True) for row in rows]
    state = prefill(
        vlm, [tree.prefix for tree in trees], [tree.inputs for tree in trees], buffer_cache(vlm, max(widths))
    )
    for turn in range(max(len(rows) for rows in packs)):
        row = lay_out(trees, [rows[turn] if turn < len(rows) else [] for rows in packs], vlm.device)
        rewind(state.cache, state.width)
        hidden = feed(vlm, state, row.ids, row.owner, row.offset)
        yield (
            [(tree, branch) for tree, branch, _ in row.places],
            hidden[[tree for tree, _, _ in row.places], [column for _, _, column in row.places]],
        )


@torch.inference_mode()
def run_shared(vlm: VLM, trees: list[Tree], reduce: Reduce) -> Results:
    """Log-probs of all wanted places by (tree index, branch), several trees of like images per forward pass."""
    # what keeps a GPU busy, or a CPU's caches warm
    wanted = 16384 if vlm.device.type == "cuda" else 1024
    budget = budget_for(vlm, "branches", wanted, "tokens", token_bytes(vlm), least=16)

    def capacity() -> int:
        return min(row_capacity(vlm), budget.size) if budget.halved else row_capacity(vlm)

    def ask(batch: list[Tree]) -> Results:
        values = defaultdict(list)
        for asked, hidden in run_branches(vlm, batch, capacity()):
            target = torch.cat([batch[b].targets[i] for b, i in dict.fromkeys(asked)])
            for (b, i), value in zip(asked, project(vlm, hidden, target, reduce), strict=True):
                values[batch[b].index, i].append(value)
        return {key: torch.stack(found) for key, found in values.items()}

    def tokens(tree: Tree) -> int:
        return max(len(tree.prefix), min(capacity(), sum(map(len, tree.branches))))

    results: Results = {}
    order = sorted(trees, key=lambda t: (repr(inputs_shape(t.inputs)), len(t.prefix), sum(map(len, t.branches))))
    for _, values in budget.batches(order, ask, tokens, lambda tree: inputs_shape(tree.inputs)):
        results |= values
    return results


PATHS: dict[str, Callable[..., Results]] = {"packed": run_shared, "copied": run_copied, "plain": run_plain}


def prefix_path(vlm: VLM, encoded: list[EncodedPrompt]) -> str:
    """How this model's rows share their prefix: "packed", "copied" or "plain"; tried once a model on a real row.

    The prompt with the most rows is asked the plain and the shared way (`self_check`). A model that does not agree is
    named in a warning.
    """
    if vlm.model not in _verdicts:
        real = max(encoded, key=lambda e: len(e.rows))
        path, reason = "packed", why_not_packed(vlm) or disagreement(vlm, real, run_shared)
        if reason:
            other = disagreement(vlm, real, run_copied)
            path = "plain" if other else "copied"
            way = f"every row alone ({other})" if other else "every row gets a copy of the prefix's state"
            log.warning("%s (%s): no packed branches, %s; %s", vlm.name, type(vlm.network).__name__, reason, way)
        _verdicts[vlm.model] = path
    return _verdicts[vlm.model]


def why_not_packed(vlm: VLM) -> str | None:
    layer_types = getattr(vlm.network.get_decoder().config, "layer_types", None) or []
    foreign = set(layer_types) - {"full_attention", "sliding_attention"}
    return f"its {', '.join(sorted(foreign))} layers keep no keys that a mask could hide" if foreign else None


def target_logprobs(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return logits.gather(-1, target[:, None]).squeeze(-1) - logits.logsumexp(-1)


def run_rows(vlm: VLM, encoded: list[EncodedPrompt], reduce: Reduce, shared: bool | None) -> list[list[torch.Tensor]]:
    """What is kept of each row's wanted places (`plain_rows.plant`), by prompt and row."""
    trees = [plant(k, e) for k, e in enumerate(encoded) if e.rows]
    # rows with nothing in common (text-only prompts that differ from the first token on) have no prefix to share
    rooted = [tree for tree in trees if tree.prefix]
    if shared is None:
        path = prefix_path(vlm, [encoded[tree.index] for tree in rooted]) if rooted else "plain"
    else:
        path = "packed" if shared else "plain"
    values = PATHS[path](vlm, rooted, reduce) | run_plain(vlm, [tree for tree in trees if not tree.prefix], reduce)
    # made under inference_mode: only a copy may take part in a loss
    return [[values[k, i].clone() for i in range(len(e.rows))] for k, e in enumerate(encoded)]


def next_token_logprobs(
    vlm: VLM, encoded: list[EncodedPrompt], token_ids: list[int] | None = None, *, shared: bool | None = None
) -> list[torch.Tensor]:
    """Log-probs of the token that follows each row.

    Args:
        encoded: one per image, its `rows` complete prompts (`chat_format.encode_questions`).
        token_ids: ids to return, normalized over the whole vocabulary, in half precision too as exact relative to each
            other as float32 (`prefix_cache.exact_columns`); None for all of it.
        shared: force the shared (True) or plain (False) path; None decides by `prefix_path`.

    Returns:
        One fp32 CPU tensor (rows, ids) for each element of `encoded`, in order; (0, ids) where there are no rows.
    """

    def reduce(logits: torch.Tensor, _target: torch.Tensor) -> torch.Tensor:
        asked = logits if token_ids is None else logits[:, token_ids]
        return asked - logits.logsumexp(-1, keepdim=True)

    width = len(token_ids) if token_ids is not None else vlm.network.get_output_embeddings().weight.shape[0]
    with exact_columns(vlm, token_ids or []):
        values = run_rows(vlm, encoded, reduce, shared)
    return [torch.cat(rows) if rows else torch.zeros(0, width) for rows in values]


def continuation_logprobs(
    vlm: VLM, encoded: list[EncodedPrompt], *, shared: bool | None = None
) -> list[list[torch.Tensor]]:
    """Log-prob of every answer token, log π(y_t | image, prompt, y_<t), for several answers to each prompt.

    Args:
        encoded: one per prompt, from `chat_format.encode` with answers; row i's answer starts at `answer_starts[i]`.
        shared: as in `next_token_logprobs`.

    Returns:
        For each prompt, for each row, an fp32 CPU tensor (answer tokens + end token); sum it for log π(y | x).
    """
    return run_rows(vlm, encoded, target_logprobs, shared)
