"""Many continuations of one image and prompt: the image and the shared prefix are computed once.

Feedback asks dozens of questions about one image, best-of-N and the DPO reference score several answers to one
prompt. Every one of them is a row of tokens that starts with the same image and the same text. Here that prefix goes
through the model's ordinary forward once; the continuations then follow as *branches* in packed rows:

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
from weakref import WeakKeyDictionary

import torch

from rlaifv.inference.plain_rows import Reduce, Results, Tree, out_of_memory, plant, project, run_copied, run_plain
from rlaifv.inference.prefix_cache import branch_masks, prefill, rewind
from rlaifv.vlm.chat_format import EncodedPrompt
from rlaifv.vlm.collate import inputs_shape, pad_rows
from rlaifv.vlm.loading import VLM

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.bfloat16: 0.05, torch.float16: 0.02}
"""Largest accepted difference between shared and plain log-probs, in nats, weighted by the plain probabilities."""

_budgets: WeakKeyDictionary = WeakKeyDictionary()
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
    """Branch tokens a packed row.

    In a row of q branch tokens, a token and layer spend about 2·q·D FLOPs on keys of other branches that the mask
    hides, against 24·D² in the linear layers: q = D wastes under a tenth, and the matrices are large enough.
    """
    return min(2048, max(64, vlm.network.get_decoder().config.hidden_size))


def run_branches(vlm: VLM, trees: list[Tree], capacity: int) -> Iterator[tuple[list[tuple[int, int]], torch.Tensor]]:
    """Yield ((tree, branch) of each wanted place, hidden states (places, D)) of one pack after another."""
    packs = [pack([len(branch) for branch in tree.branches], capacity) for tree in trees]
    widths = [sum(len(tree.branches[i]) for i in row) for tree, rows in zip(trees, packs, strict=True) for row in rows]
    state = prefill(vlm, [tree.prefix for tree in trees], [tree.inputs for tree in trees], max(widths))
    decoder = vlm.network.get_decoder()
    for turn in range(max(len(rows) for rows in packs)):
        ids, owner, offset, place, asked = [], [], [], [], []
        for b, (tree, rows) in enumerate(zip(trees, packs, strict=True)):
            ids.append([]), owner.append([]), offset.append([])
            for i in rows[turn] if turn < len(rows) else []:
                place += [(b, len(ids[b]) + k) for k in tree.wanted[i]]
                asked += [(b, i)] * len(tree.wanted[i])
                ids[b] += tree.branches[i]
                owner[b] += [i] * len(tree.branches[i])
                offset[b] += range(len(tree.branches[i]))
        owners, offsets = pad_rows(owner, -1).to(vlm.device), pad_rows(offset, 0).to(vlm.device)
        rewind(state.cache, state.width)
        output = decoder(
            input_ids=pad_rows(ids, 0).to(vlm.device),
            attention_mask=branch_masks(vlm, state.lengths, state.width, owners, offsets, slice(None)),
            position_ids=state.positions[:, None] + offsets,
            past_key_values=state.cache,
            use_cache=True,
        )
        b, column = torch.tensor(place, device=output.last_hidden_state.device).T
        yield asked, output.last_hidden_state[b, column]


@torch.inference_mode()
def run_shared(vlm: VLM, trees: list[Tree], reduce: Reduce, targets: dict) -> Results:
    """Log-probs of all wanted places by (tree index, branch), trees of like images several to a forward.

    The tokens a forward start at a guess; on running out of memory they are halved, said, and kept.
    """
    results: dict[tuple[int, int], list[torch.Tensor]] = defaultdict(list)
    order = sorted(trees, key=lambda t: (repr(inputs_shape(t.inputs)), len(t.prefix), sum(map(len, t.branches))))
    capacity, start = row_capacity(vlm), 0
    while start < len(order):
        batch = next_batch(order[start:], _budgets.get(vlm.model, default_budget(vlm)), capacity)
        try:
            parts = []
            for asked, hidden in run_branches(vlm, batch, capacity):
                target = [targets[batch[b].index, i] for b, i in dict.fromkeys(asked)] if targets else None
                target = torch.cat(target).to(hidden.device) if target else None
                parts.append((asked, project(vlm, hidden, target, reduce)))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            halve_budget(vlm, sum(row_tokens(tree, capacity) for tree in batch))
            capacity = min(capacity, _budgets[vlm.model])
            continue
        for asked, values in parts:
            for (b, i), value in zip(asked, values, strict=True):
                results[batch[b].index, i].append(value)
        start += len(batch)
    return {key: torch.stack(values) for key, values in results.items()}


def row_tokens(tree: Tree, capacity: int) -> int:
    return max(len(tree.prefix), min(capacity, sum(map(len, tree.branches))))


def next_batch(trees: list[Tree], budget: int, capacity: int) -> list[Tree]:
    """As many of the first trees as have like images and fit the tokens of a forward; at least one."""
    batch, widest = [], 0
    for tree in trees:
        widest = max(widest, row_tokens(tree, capacity))
        alike = not batch or inputs_shape(tree.inputs) == inputs_shape(batch[0].inputs)
        if batch and (not alike or widest * (len(batch) + 1) > budget):
            break
        batch.append(tree)
    return batch


def default_budget(vlm: VLM) -> int:
    """Tokens a forward to start with: what keeps a GPU busy, or a CPU's caches warm."""
    return 16384 if vlm.device.type == "cuda" else 1024


def halve_budget(vlm: VLM, used: int) -> None:
    """Fewer tokens a forward from now on; raises RuntimeError when one row alone does not fit."""
    budget = min(used, _budgets.get(vlm.model, default_budget(vlm))) // 2
    if budget < 16:
        raise RuntimeError(f"{vlm.name}: out of memory with a single short row; use a smaller model or dtype") from None
    log.warning("%s: out of memory with %d tokens a forward, going on with %d", vlm.name, used, budget)
    _budgets[vlm.model] = budget
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


PATHS: dict[str, Callable[..., Results]] = {"packed": run_shared, "copied": run_copied, "plain": run_plain}


def prefix_path(vlm: VLM, encoded: list[EncodedPrompt]) -> str:
    """How this model's rows share their prefix: "packed", "copied" or "plain"; tried once a model on a real row.

    The prompt with the most rows is asked the plain and the shared way, together with a shortened row, so that
    branches of different lengths are packed. A model that does not agree is named in a warning.
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


def shares_prefix(vlm: VLM, encoded: list[EncodedPrompt]) -> bool:
    """Whether this model's branches can be packed behind one prefix."""
    return prefix_path(vlm, encoded) == "packed"


def why_not_packed(vlm: VLM) -> str | None:
    layer_types = getattr(vlm.network.get_decoder().config, "layer_types", None) or []
    foreign = set(layer_types) - {"full_attention", "sliding_attention"}
    return f"its {', '.join(sorted(foreign))} layers keep no keys that a mask could hide" if foreign else None


def disagreement(vlm: VLM, encoded: EncodedPrompt, run: Callable[..., Results]) -> str | None:
    """None when `run` gives the log-probs of plain rows, else why it cannot or does not."""
    shortened = [encoded.rows[0][:-1]] if len(encoded.rows[0]) > 2 else []
    rows = [*encoded.rows[:3], *shortened]
    ends = [len(row) - 1 for row in rows]
    tree = plant(0, EncodedPrompt(encoded.prompt_ids, rows, ends, encoded.inputs), ends, ends)
    try:
        shared = run(vlm, [tree], full_distribution, {})
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        return f"the shared prefix raises {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    plain = run_plain(vlm, [tree], full_distribution, {})
    difference = max(float((plain[key].exp() * (plain[key] - shared[key]).abs()).sum(-1).max()) for key in plain)
    limit = TOLERANCE.get(vlm.network.dtype, 0.05)
    if not difference <= limit:
        return f"the shared prefix changes log-probs by {difference:.2g} nats (more than {limit:g})"
    log.info("%s: shared prefix agrees with plain rows within %.1e nats", vlm.name, difference)
    return None


def full_distribution(logits: torch.Tensor, _target: torch.Tensor | None) -> torch.Tensor:
    return logits.log_softmax(-1)


def target_logprobs(logits: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
    return logits.gather(-1, target[:, None]).squeeze(-1) - logits.logsumexp(-1)


def run_rows(
    vlm: VLM, trees: list[Tree], encoded: list[EncodedPrompt], reduce: Reduce, targets: dict, shared: bool | None
) -> Results:
    # rows with nothing in common (text-only prompts that differ from the first token on) have no prefix to share
    rooted = [tree for tree in trees if tree.prefix]
    if shared is None:
        path = prefix_path(vlm, [encoded[tree.index] for tree in rooted]) if rooted else "plain"
    else:
        path = "packed" if shared else "plain"
    rest = [tree for tree in trees if not tree.prefix]
    values = PATHS[path](vlm, rooted, reduce, targets) | run_plain(vlm, rest, reduce, targets)
    # made under inference_mode: only a copy may take part in a loss
    return {key: value.clone() for key, value in values.items()}


def next_token_logprobs(
    vlm: VLM, encoded: list[EncodedPrompt], token_ids: list[int] | None = None, *, shared: bool | None = None
) -> list[torch.Tensor]:
    """Log-probs of the token that follows each row.

    Args:
        encoded: one per image, its `rows` complete prompts (`chat_format.encode_questions`).
        token_ids: ids to return, normalized over the whole vocabulary; None for all of it.
        shared: force the shared (True) or plain (False) path; None decides by `prefix_path`.

    Returns:
        One fp32 CPU tensor (rows, ids) for each element of `encoded`, in order; (0, ids) where there are no rows.
    """
    ids = None if token_ids is None else torch.tensor(token_ids, device=vlm.device)

    def reduce(logits: torch.Tensor, _target: torch.Tensor | None) -> torch.Tensor:
        if ids is None:
            return logits.log_softmax(-1)
        return logits[:, ids] - logits.logsumexp(-1, keepdim=True)

    ends = [[len(row) - 1 for row in e.rows] for e in encoded]
    trees = [plant(k, e, ends[k], ends[k]) for k, e in enumerate(encoded) if e.rows]
    values = run_rows(vlm, trees, encoded, reduce, {}, shared)
    width = len(token_ids) if token_ids is not None else vlm.network.get_output_embeddings().weight.shape[0]
    return [
        torch.cat([values[k, i] for i in range(len(e.rows))]) if e.rows else torch.zeros(0, width)
        for k, e in enumerate(encoded)
    ]


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
    first = [[start - 1 for start in e.answer_starts] for e in encoded]
    last = [[len(row) - 2 for row in e.rows] for e in encoded]
    trees = [plant(k, e, first[k], last[k]) for k, e in enumerate(encoded) if e.rows]
    targets = {
        (k, i): torch.tensor(row[start:])
        for k, e in enumerate(encoded)
        for i, (row, start) in enumerate(zip(e.rows, e.answer_starts, strict=True))
    }
    values = run_rows(vlm, trees, encoded, target_logprobs, targets, shared)
    return [[values[k, i] for i in range(len(e.rows))] for k, e in enumerate(encoded)]
