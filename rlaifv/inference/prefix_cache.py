"""The forward pass over a prompt's prefix, and the masks under which its branches follow (inference.logprobs)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from rlaifv.vlm.collate import collate_inputs, pad_rows
from rlaifv.vlm.loading import VLM


class BufferLayer(CacheLayerMixin):
    """Keys and values of one layer in one buffer with room after them; `length` can be set back at no cost."""

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
        """Write (batch, heads, new, dim) after what is there; return views of everything up to here."""
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
    return Cache(layers=[BufferLayer(room) for _ in range(vlm.network.get_decoder().config.num_hidden_layers)])


def rewind(cache: Cache, length: int) -> None:
    """Forget everything after the first `length` tokens."""
    for layer in cache.layers:
        layer.length = length


@dataclass(frozen=True)
class Prefilled:
    """Prefixes of several prompts after their one forward pass.

    `lengths` (B,) counts each prefix's tokens in the `width` of the padded batch, `positions` (B,) is the position id
    that the next token takes (not the length where an image's tokens share positions), `last` is (B, D), the hidden
    state of each prefix's last token.
    """

    cache: Cache
    width: int
    lengths: torch.Tensor
    positions: torch.Tensor
    last: torch.Tensor

    def keep(self, rows: torch.Tensor) -> "Prefilled":
        """Only these prefixes, with what followed them."""
        self.cache.reorder_cache(rows)
        return Prefilled(
            self.cache, self.width, self.lengths[rows], self.positions[rows], self.last[rows.to(self.last.device)]
        )


def forget_positions(vlm: VLM) -> None:
    """Qwen-VL keeps the last image's position offset on the module and would apply it to the next text."""
    if hasattr(vlm.network.base_model, "rope_deltas"):
        vlm.network.base_model.rope_deltas = None


@torch.inference_mode()
def prefill(vlm: VLM, prefixes: list[list[int]], inputs: list[dict[str, torch.Tensor]], cache: Cache) -> Prefilled:
    """Run the model's own forward over B prefixes with their images, keeping keys and values.

    Args:
        prefixes: token ids of each, image placeholders expanded.
        inputs: what the processor made of each image; alike in `inputs_shape`.
        cache: an empty one, which takes the keys and values.
    """
    lengths = [len(prefix) for prefix in prefixes]
    ids = pad_rows(prefixes, vlm.tokenizer.pad_token_id or 0).to(vlm.device)
    mask = pad_rows([[1] * length for length in lengths], 0).to(vlm.device)
    counts = mask.sum(-1)
    forget_positions(vlm)
    output = vlm.network.base_model(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        **collate_inputs(vlm, inputs, lengths),
    )
    deltas = getattr(vlm.network.base_model, "rope_deltas", None)
    positions = counts if deltas is None else counts + deltas.reshape(-1).to(counts)
    hidden = output.last_hidden_state
    last = hidden[torch.arange(len(ids), device=hidden.device), (counts - 1).to(hidden.device)]
    return Prefilled(cache, ids.shape[1], counts, positions, last)


def logits_of(vlm: VLM, hidden: torch.Tensor) -> torch.Tensor:
    """fp32 logits (..., V) of last hidden states (..., D)."""
    logits = vlm.network.get_output_embeddings()(hidden).float()
    cap = getattr(vlm.network.config.get_text_config(), "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


@contextmanager
def exact_columns(vlm: VLM, ids: list[int]) -> Iterator[None]:
    """In here, the output layer of a half-precision model gives the logits of the tokens `ids` as float32 would.

    bfloat16 rounds logits to a sixteenth or an eighth of a nat: enough to decide between yes and no. Those columns are
    computed anew from the same hidden states and weights; what the model does with its logits afterwards (soft caps,
    scales) comes after. The other columns only add up in the normalizer and stay, as does an output layer that is no
    plain linear one.
    """
    head = vlm.network.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.weight.dtype.itemsize != 2 or head.weight.is_meta:
        yield
        return

    def replaced(head: torch.nn.Linear, args: tuple[torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
        logits, hidden = logits.float(), args[0].to(head.weight.device).float()
        bias = head.bias[ids].float() if head.bias is not None else None
        columns = torch.nn.functional.linear(hidden, head.weight[ids].float(), bias)
        logits[..., ids] = columns.to(logits.device)
        return logits

    hook = head.register_forward_hook(replaced)
    try:
        yield
    finally:
        hook.remove()


def windowed(vlm: VLM) -> bool:
    """Whether some layers see no further than a sliding window."""
    config = vlm.network.get_decoder().config
    layer_types = getattr(config, "layer_types", None)
    return bool(getattr(config, "sliding_window", None)) and (not layer_types or "sliding_attention" in layer_types)


def feed(vlm: VLM, state: Prefilled, ids: torch.Tensor, owner: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Feed tokens of branches after their prefixes: the hidden states (B, Q, D) of the newest.

    Args:
        ids: (B, Q) the newest tokens.
        owner: (B, K) branch that each token after the prefix belongs to, the newest last; -1 for padding.
        offset: (B, K) place of the token in its branch.
    """
    newest = slice(owner.shape[1] - ids.shape[1], None)
    decoder = vlm.network.get_decoder()
    return decoder(
        input_ids=ids,
        attention_mask=branch_masks(vlm, state, owner, offset, newest),
        position_ids=state.positions[:, None] + offset[:, newest],
        past_key_values=state.cache,
        use_cache=True,
    ).last_hidden_state


def branch_masks(
    vlm: VLM, state: Prefilled, owner: torch.Tensor, offset: torch.Tensor, newest: slice
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Additive attention masks (B, 1, Q, width + K) for the newest tokens of branches, see `feed`.

    Returns:
        One mask, or one for each type of layer where the model mixes full attention and a sliding window.
    """
    device, config = owner.device, vlm.network.get_decoder().config
    column = torch.arange(state.width, device=device)
    place = state.lengths[:, None] + offset
    seen_prefix = (column < state.lengths[:, None])[:, None].expand(-1, place[:, newest].shape[1], -1)
    seen_branch = (owner[:, newest, None] == owner[:, None]) & (offset[:, newest, None] >= offset[:, None])
    seen = torch.cat([seen_prefix, seen_branch], -1)[:, None]

    def additive(allowed: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros((), dtype=vlm.network.dtype, device=device)
        return torch.where(allowed, zero, torch.finfo(vlm.network.dtype).min)

    if not windowed(vlm):
        return additive(seen)
    key_place = torch.cat([column.expand(len(place), -1), place], -1)
    near = seen & (place[:, None, newest, None] - key_place[:, None, None] < config.sliding_window)
    if not getattr(config, "layer_types", None):
        return additive(near)
    return {"full_attention": additive(seen), "sliding_attention": additive(near)}
