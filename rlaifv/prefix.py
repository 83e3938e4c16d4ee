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

What cannot be shared (linear attention keeps one running state, not keys that a mask could hide) or does not agree
with the plain path on a real row (`shares_prefix`) goes the plain path, and the log says so.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from rlaifv.vlm import VLM, EncodedPrompt, common_length

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.bfloat16: 0.05, torch.float16: 0.02}
"""Largest accepted difference between shared and plain log-probs, in nats, weighted by the plain probabilities."""

PLAIN_BATCH = 8
"""Rows a forward on the plain path."""

HEAD_ELEMENTS = 1 << 26
"""Logits computed at once: a quarter of a GB in fp32."""

_budgets: WeakKeyDictionary = WeakKeyDictionary()
_verdicts: WeakKeyDictionary = WeakKeyDictionary()


# --- the cache: one buffer a layer, rewound instead of copied


class BufferLayer(CacheLayerMixin):
    """Keys and values of one layer in one buffer with room behind them; `length` can be set back at no cost."""

    is_sliding = False

    def __init__(self, room: int):
        super().__init__()
        self.room, self.length = room, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            new.new_empty(*new.shape[:2], new.shape[2] + self.room, new.shape[3]) for new in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Write (batch, heads, new, dim) behind what is there; return views of everything up to here."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.length, self.length + key_states.shape[2]
        if end > self.keys.shape[2]:
            more = max(end, self.keys.shape[2] * 3 // 2) - self.keys.shape[2]
            self.keys, self.values = (torch.nn.functional.pad(t, (0, 0, 0, more)) for t in (self.keys, self.values))
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        self.length = end
        if start == 0:
            return key_states, value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


def buffer_cache(vlm: VLM, room: int) -> Cache:
    """A cache whose layers all keep every token (a sliding window is the mask's business) and have room for more."""
    return Cache(layers=[BufferLayer(room) for _ in range(vlm.model.get_decoder().config.num_hidden_layers)])


def rewind(cache: Cache, length: int) -> None:
    """Forget everything behind the first `length` tokens."""
    for layer in cache.layers:
        layer.length = length


# --- the prefix


@dataclass(frozen=True)
class Prefilled:
    """Prefixes of several prompts after their one forward.

    `lengths` (B,) counts each prefix's tokens in the width P of the padded batch, `positions` (B,) is the position id
    that the next token takes (not the length where an image's tokens share positions), `hidden` is (B, P, D).
    """

    cache: Cache
    lengths: torch.Tensor
    positions: torch.Tensor
    hidden: torch.Tensor

    @property
    def width(self) -> int:
        return self.hidden.shape[1]


def pad_rows(rows: list[list[int]], value: int, side: str = "right") -> torch.Tensor:
    """(rows, longest) int64."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value, padding_side=side)


def collate_inputs(vlm: VLM, inputs: list[dict[str, torch.Tensor]], lengths: list[int], side: str = "right") -> dict:
    """What the processor made of several images, as one batch on the model's device.

    Per-token inputs (`token_type_ids`, `mm_token_type_ids`) are cut or zero-padded to each row's length: what follows
    an image is text. Everything else must agree in shape behind the first dimension (see `inputs_shape`).
    """
    batch = {}
    for key in inputs[0]:
        values = [item[key] for item in inputs]
        if "token_type_ids" in key:
            rows = [(value[0].tolist() + [0] * length)[:length] for value, length in zip(values, lengths, strict=True)]
            batch[key] = pad_rows(rows, 0, side)
        elif key == "pixel_values" and "target_sizes" in inputs[0]:
            batch[key] = torch.cat(values, dim=-1)  # MiniCPM-V packs the patches of all images along the last one
        else:
            batch[key] = torch.cat(values)
        batch[key] = batch[key].to(vlm.device)
        if batch[key].is_floating_point():
            batch[key] = batch[key].to(vlm.model.dtype)
    return batch


def inputs_shape(inputs: dict[str, torch.Tensor]) -> tuple:
    """Images with equal values can go in one batch."""
    return tuple((k, tuple(v.shape[1:])) for k, v in sorted(inputs.items()) if "token_type_ids" not in k)


def forget_positions(vlm: VLM) -> None:
    """Qwen-VL keeps the last image's position offset on the module and would apply it to the next text."""
    if hasattr(vlm.model.base_model, "rope_deltas"):
        vlm.model.base_model.rope_deltas = None


@torch.inference_mode()
def prefill(vlm: VLM, prefixes: list[list[int]], inputs: list[dict[str, torch.Tensor]], room: int) -> Prefilled:
    """Run the model's own forward over B prefixes with their images, keeping keys and values.

    Args:
        prefixes: token ids of each, image placeholders expanded.
        inputs: what the processor made of each image; alike in `inputs_shape`.
        room: tokens a row that will follow.
    """
    lengths = [len(prefix) for prefix in prefixes]
    ids = pad_rows(prefixes, vlm.tokenizer.pad_token_id or 0).to(vlm.device)
    counts = torch.tensor(lengths, device=vlm.device)
    mask = (torch.arange(ids.shape[1], device=vlm.device) < counts[:, None]).long()
    cache = buffer_cache(vlm, room)
    forget_positions(vlm)
    output = vlm.model.base_model(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        **collate_inputs(vlm, inputs, lengths),
    )
    positions = counts
    deltas = getattr(vlm.model.base_model, "rope_deltas", None)
    if deltas is not None:
        positions = counts + deltas.reshape(-1).to(counts)
    return Prefilled(cache, counts, positions, output.last_hidden_state)


def logits_of(vlm: VLM, hidden: torch.Tensor) -> torch.Tensor:
    """fp32 logits (..., V) of last hidden states (..., D)."""
    logits = vlm.model.get_output_embeddings()(hidden).float()
    cap = getattr(vlm.model.config.get_text_config(), "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


def windowed(vlm: VLM) -> bool:
    """Whether some layers see no further than a sliding window."""
    config = vlm.model.get_decoder().config
    layer_types = getattr(config, "layer_types", None)
    return bool(getattr(config, "sliding_window", None)) and (not layer_types or "sliding_attention" in layer_types)


def branch_masks(
    vlm: VLM, lengths: torch.Tensor, width: int, owner: torch.Tensor, offset: torch.Tensor, queries: slice
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Additive attention masks (B, 1, Q, width + K) for branches behind padded prefixes.

    Args:
        lengths: (B,) tokens of each prefix, of which `width` are stored.
        owner: (B, K) branch that a token behind the prefix belongs to; -1 for padding.
        offset: (B, K) place of the token in its branch.
        queries: the tokens among the K that are asked now.

    Returns:
        One mask, or one for each type of layer where the model mixes full attention and a sliding window.
    """
    device, config = owner.device, vlm.model.get_decoder().config
    column = torch.arange(width, device=device)
    place = lengths[:, None] + offset
    seen_prefix = (column < lengths[:, None])[:, None].expand(-1, place[:, queries].shape[1], -1)
    seen_branch = (owner[:, queries, None] == owner[:, None]) & (offset[:, queries, None] >= offset[:, None])
    seen = torch.cat([seen_prefix, seen_branch], -1)[:, None]

    def additive(allowed: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros((), dtype=vlm.model.dtype, device=device)
        return torch.where(allowed, zero, torch.finfo(vlm.model.dtype).min)

    if not windowed(vlm):
        return additive(seen)
    key_place = torch.cat([column.expand(len(lengths), -1), place], -1)
    near = seen & (place[:, None, queries, None] - key_place[:, None, None] < config.sliding_window)
    if not getattr(config, "layer_types", None):
        return additive(near)
    return {"full_attention": additive(seen), "sliding_attention": additive(near)}


# --- trees: one prefix and its branches


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
    return min(2048, max(64, vlm.model.get_decoder().config.hidden_size))


def run_branches(vlm: VLM, trees: list[Tree], capacity: int) -> Iterator[tuple[list[tuple[int, int]], torch.Tensor]]:
    """Yield ((tree, branch) of each wanted place, hidden states (places, D)) of one pack after another."""
    packs = [pack([len(branch) for branch in tree.branches], capacity) for tree in trees]
    widths = [sum(len(tree.branches[i]) for i in row) for tree, rows in zip(trees, packs, strict=True) for row in rows]
    state = prefill(vlm, [tree.prefix for tree in trees], [tree.inputs for tree in trees], max(widths))
    decoder = vlm.model.get_decoder()
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
        owners, offsets = pad_rows(owner, -1).long().to(vlm.device), pad_rows(offset, 0).long().to(vlm.device)
        rewind(state.cache, state.width)
        output = decoder(
            input_ids=pad_rows(ids, 0).long().to(vlm.device),
            attention_mask=branch_masks(vlm, state.lengths, state.width, owners, offsets, slice(None)),
            position_ids=state.positions[:, None] + offsets,
            past_key_values=state.cache,
            use_cache=True,
        )
        b, column = torch.tensor(place, device=vlm.device).T
        yield asked, output.last_hidden_state[b, column]


Reduce = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


@torch.inference_mode()
def run_shared(vlm: VLM, trees: list[Tree], reduce: Reduce, targets: dict) -> dict[tuple[int, int], torch.Tensor]:
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


def project(vlm: VLM, hidden: torch.Tensor, target: torch.Tensor | None, reduce: Reduce) -> torch.Tensor:
    """Vocabulary projection in slices, so that long answers do not need all their logits at once."""
    size = max(1, HEAD_ELEMENTS // vlm.model.get_output_embeddings().weight.shape[0])
    return torch.cat(
        [
            reduce(logits_of(vlm, hidden[k : k + size]), None if target is None else target[k : k + size]).cpu()
            for k in range(0, len(hidden), size)
        ]
    )


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
    return 16384 if vlm.device.type == "cuda" else 2048


def out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)


def halve_budget(vlm: VLM, used: int) -> None:
    """Fewer tokens a forward from now on; raises RuntimeError when one row alone does not fit."""
    budget = min(used, _budgets.get(vlm.model, default_budget(vlm))) // 2
    if budget < 16:
        raise RuntimeError(f"{vlm.name}: out of memory with a single short row; use a smaller model or dtype") from None
    log.warning("%s: out of memory with %d tokens a forward, going on with %d", vlm.name, used, budget)
    _budgets[vlm.model] = budget
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- the plain path: each row on its own through the ordinary forward


@torch.inference_mode()
def run_plain(
    vlm: VLM, trees: list[Tree], reduce: Reduce, targets: dict, batch: int | None = None, side: str = "right"
) -> dict[tuple[int, int], torch.Tensor]:
    """The same log-probs with every row whole through the model's forward, `batch` rows at a time."""
    batch = batch or PLAIN_BATCH
    jobs = [(tree, i) for tree in trees for i in range(len(tree.branches))]
    jobs.sort(key=lambda job: (repr(inputs_shape(job[0].inputs)), job[0].index))
    results, start = {}, 0
    while start < len(jobs):
        shape = inputs_shape(jobs[start][0].inputs)
        part = [job for job in jobs[start : start + batch] if inputs_shape(job[0].inputs) == shape]
        try:
            results |= plain_batch(vlm, part, reduce, targets, side)
        except RuntimeError as error:
            if not out_of_memory(error) or batch == 1:
                raise
            batch = max(1, batch // 2)
            log.warning("%s: out of memory, going on with %d rows a forward", vlm.name, batch)
            continue
        start += len(part)
    return results


def plain_batch(vlm: VLM, jobs: list[tuple[Tree, int]], reduce: Reduce, targets: dict, side: str) -> dict:
    """One padded and masked forward."""
    rows = [tree.prefix + tree.branches[i] for tree, i in jobs]
    lengths = [len(row) for row in rows]
    ids = pad_rows(rows, vlm.tokenizer.pad_token_id or 0, side).to(vlm.device)
    mask = pad_rows([[1] * length for length in lengths], 0, side).to(vlm.device)
    inputs = collate_inputs(vlm, [tree.inputs for tree, _ in jobs], lengths, side)
    if side == "left" and not hasattr(vlm.model.base_model, "rope_deltas"):
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    shift = [ids.shape[1] - length if side == "left" else 0 for length in lengths]
    wanted = [[shift[k] + len(t.prefix) + w for w in t.wanted[i]] for k, (t, i) in enumerate(jobs)]
    keep = ids.shape[1] - min(place for places in wanted for place in places)
    forget_positions(vlm)
    output = vlm.model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep, **inputs)
    results = {}
    for k, (tree, i) in enumerate(jobs):
        # counted from the end, for some models (MiniCPM-V 4.6) ignore `logits_to_keep` and return them all
        logits = output.logits[k, [place - ids.shape[1] for place in wanted[k]]].float()
        target = targets[tree.index, i].to(logits.device) if targets else None
        results[tree.index, i] = reduce(logits, target).cpu()
    return results


# --- which path, and the public functions


def shares_prefix(vlm: VLM, encoded: list[EncodedPrompt]) -> bool:
    """Whether this model gives the same log-probs on the shared path; tried once a model on a real row.

    The prompt with the most rows is asked both ways, together with a shortened row, so that branches of different
    lengths are packed. A model that fails is named in a warning and takes the plain path from then on.
    """
    if vlm.model not in _verdicts:
        reason = why_not_shared(vlm, max(encoded, key=lambda e: len(e.rows)))
        if reason:
            log.warning("%s (%s): every row alone, %s", vlm.name, type(vlm.model).__name__, reason)
        _verdicts[vlm.model] = reason is None
    return _verdicts[vlm.model]


def why_not_shared(vlm: VLM, encoded: EncodedPrompt) -> str | None:
    """None when shared and plain log-probs agree, else why they cannot or do not."""
    layer_types = getattr(vlm.model.get_decoder().config, "layer_types", None) or []
    foreign = set(layer_types) - {"full_attention", "sliding_attention"}
    if foreign:
        return f"its {', '.join(sorted(foreign))} layers carry a running state that branches cannot share"
    rows = [*encoded.rows[:3], encoded.rows[0][:-1]]
    ends = [len(row) - 1 for row in rows]
    tree = plant(0, EncodedPrompt(encoded.prompt_ids, rows, ends, encoded.inputs), ends, ends)
    try:
        shared = run_shared(vlm, [tree], full_distribution, {})
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        return f"the shared prefix raises {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    plain = run_plain(vlm, [tree], full_distribution, {})
    difference = max(float((plain[key].exp() * (plain[key] - shared[key]).abs()).sum(-1).max()) for key in plain)
    limit = TOLERANCE.get(vlm.model.dtype, 0.05)
    if not difference <= limit:
        return f"the shared prefix changes log-probs by {difference:.2g} nats (more than {limit:g})"
    log.info("%s: shared prefix agrees with plain rows within %.1e nats", vlm.name, difference)
    return None


def full_distribution(logits: torch.Tensor, _target: torch.Tensor | None) -> torch.Tensor:
    return logits.log_softmax(-1)


def target_logprobs(logits: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
    return logits.gather(-1, target[:, None]).squeeze(-1) - logits.logsumexp(-1)


def _run(vlm: VLM, trees: list[Tree], encoded: list[EncodedPrompt], reduce: Reduce, targets: dict, shared: bool | None):
    # rows with nothing in common (text-only prompts that differ from the first token on) have no prefix to share
    rooted = [tree for tree in trees if tree.prefix]
    if not (shared if shared is not None else (rooted and shares_prefix(vlm, [encoded[t.index] for t in rooted]))):
        return run_plain(vlm, trees, reduce, targets)
    rest = [tree for tree in trees if not tree.prefix]
    return run_shared(vlm, rooted, reduce, targets) | run_plain(vlm, rest, reduce, targets)


def next_token_logprobs(
    vlm: VLM, encoded: list[EncodedPrompt], token_ids: list[int] | None = None, *, shared: bool | None = None
) -> list[torch.Tensor]:
    """Log-probs of the token that follows each row.

    Args:
        encoded: one per image, its `rows` complete prompts (`vlm.encode_questions`).
        token_ids: ids to return, normalized over the whole vocabulary; None for all of it.
        shared: force the shared (True) or plain (False) path; None decides by `shares_prefix`.

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
    values = _run(vlm, trees, encoded, reduce, {}, shared)
    width = len(token_ids) if token_ids is not None else vlm.model.get_output_embeddings().weight.shape[0]
    return [
        torch.cat([values[k, i] for i in range(len(e.rows))]) if e.rows else torch.zeros(0, width)
        for k, e in enumerate(encoded)
    ]


def continuation_logprobs(
    vlm: VLM, encoded: list[EncodedPrompt], *, shared: bool | None = None
) -> list[list[torch.Tensor]]:
    """Log-prob of every answer token, log π(y_t | image, prompt, y_<t), for several answers to each prompt.

    Args:
        encoded: one per prompt, from `vlm.encode` with answers; row i's answer starts at `answer_starts[i]`.
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
    values = _run(vlm, trees, encoded, target_logprobs, targets, shared)
    return [[values[k, i] for i in range(len(e.rows))] for k, e in enumerate(encoded)]
