"""Sample answers: image and prompt are computed once, n samples decode together behind them.

Token t of a sample is drawn by inverse CDF from the t-th number of that sample's own uniform stream, so a sample is a
function of model, prompt and stream: neither batch size nor order nor the other samples change it.

The samples of one prompt share one row of keys and values, `[prompt | t=0 of all samples | t=1 of all samples | …]`;
each step feeds the row one token of every sample, and a mask lets a sample see the prompt and its own tokens. The
prompt's keys are read once a step for all n samples instead of n times, and nothing is copied as the row grows.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import GenerationConfig, LogitsProcessor

from rlaifv.inference.logprobs import shares_prefix
from rlaifv.inference.plain_rows import out_of_memory
from rlaifv.inference.prefix_cache import Prefilled, branch_masks, logits_of, prefill, windowed
from rlaifv.vlm.chat_format import EncodedPrompt, encode
from rlaifv.vlm.collate import collate_inputs, inputs_shape
from rlaifv.vlm.loading import VLM

log = logging.getLogger(__name__)

COMPACT_EVERY = 8
"""Steps between looks at which samples are done (a look makes a GPU wait)."""


@dataclass(frozen=True)
class Prompt:
    """One user turn; `image` is None for a text-only prompt."""

    image: Image.Image | None
    text: str


@dataclass(frozen=True)
class Generation:
    """One sampled answer; `token_ids` leaves out the end token, `finish_reason` is "stop" or "length"."""

    text: str
    token_ids: list[int]
    finish_reason: str


@dataclass(frozen=True)
class Decoding:
    """How a token is chosen; temperature 0 is greedy, top_k 0 and top_p 1 switch those off."""

    temperature: float
    top_k: int
    top_p: float
    max_new_tokens: int


def generate_batch(
    vlm: VLM,
    prompts: Sequence[Prompt],
    streams: Sequence[np.ndarray],
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    max_new_tokens: int,
    shared: bool | None = None,
) -> list[list[Generation]]:
    """Sample answers to several prompts.

    Args:
        vlm: the policy, or a text-only language model.
        prompts: image and question each.
        streams: for each prompt, uniform numbers in [0, 1) of shape (samples, max_new_tokens).
        temperature, top_k, top_p: the distribution's warping, in the order of transformers' warpers.
        max_new_tokens: where an unfinished answer is cut (`finish_reason` "length").
        shared: force the shared (True) or plain (False) path; None decides by `logprobs.shares_prefix`.

    Returns:
        For each prompt, one Generation per row of its stream.

    Raises:
        ValueError: a stream that is too short, or a setting outside its range.
    """
    decoding = Decoding(temperature, top_k, top_p, max_new_tokens)
    check_decoding(decoding, prompts, streams)
    encoded = []
    for prompt in prompts:
        e = encode(vlm, prompt.image, prompt.text)
        encoded.append(EncodedPrompt(e.prompt_ids, [e.prompt_ids], [len(e.prompt_ids)], e.inputs))
    if not encoded:
        return []
    if not (shared if shared is not None else shares_prefix(vlm, encoded)):
        return [sample_plain(vlm, e, u, decoding) for e, u in zip(encoded, streams, strict=True)]
    results: list[list[Generation]] = [[] for _ in prompts]
    # like images and like numbers of samples go together, shortest prompts first, so that little is padding
    groups: dict[tuple, list[int]] = {}
    for i in sorted(range(len(prompts)), key=lambda i: len(encoded[i].prompt_ids)):
        groups.setdefault((inputs_shape(encoded[i].inputs), len(streams[i])), []).append(i)
    waiting = list(groups.values())
    while waiting:
        group = waiting.pop(0)
        try:
            samples = sample_shared(vlm, [encoded[i] for i in group], np.stack([streams[i] for i in group]), decoding)
        except RuntimeError as error:
            if not out_of_memory(error) or len(group) == 1:
                raise
            log.warning("%s: out of memory with %d prompts at once, halving them", vlm.name, len(group))
            waiting[:0] = [group[: len(group) // 2], group[len(group) // 2 :]]
            continue
        for i, generations in zip(group, samples, strict=True):
            results[i] = generations
    return results


def check_decoding(decoding: Decoding, prompts: Sequence[Prompt], streams: Sequence[np.ndarray]) -> None:
    if decoding.temperature < 0 or decoding.top_k < 0 or not 0 < decoding.top_p <= 1 or decoding.max_new_tokens < 1:
        raise ValueError(f"impossible decoding settings {decoding}")
    if len(prompts) != len(streams):
        raise ValueError(f"{len(prompts)} prompts but {len(streams)} streams")
    for stream in streams:
        if np.ndim(stream) != 2 or np.shape(stream)[1] < decoding.max_new_tokens:
            raise ValueError(
                f"a stream of shape {np.shape(stream)} cannot draw {decoding.max_new_tokens} tokens a sample: "
                "its shape is (samples, max_new_tokens)"
            )


def draw(logits: torch.Tensor, uniform: torch.Tensor, decoding: Decoding) -> torch.Tensor:
    """Choose tokens by inverse CDF over the warped distribution, in the order of token ids.

    Args:
        logits: (rows, V) fp32.
        uniform: (rows,) float64 in [0, 1).

    Returns:
        (rows,) token ids.
    """
    if decoding.temperature == 0:
        return logits.argmax(-1)
    scores = logits / decoding.temperature
    ids = None
    if 0 < decoding.top_k < scores.shape[-1]:
        ids = scores.topk(decoding.top_k, dim=-1).indices.sort(-1).values
        scores = scores.gather(-1, ids)
    probs = scores.double().softmax(-1)
    if decoding.top_p < 1:
        ascending, order = probs.sort(-1)
        dropped = ascending.cumsum(-1) <= 1 - decoding.top_p
        dropped[:, -1] = False
        probs = probs.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), 0.0)
    cdf = probs.cumsum(-1)
    chosen = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True).clamp(max=cdf.shape[-1] - 1)
    return (chosen if ids is None else ids.gather(-1, chosen)).squeeze(-1)


class Columns:
    """What the columns behind the prompts hold, and what each query slot may see of them.

    `slots` (B, m) names the sample behind each of the m tokens that a step feeds to a row. When samples are done the
    slots shrink; a prompt with fewer live samples than m feeds done ones along, whose tokens go nowhere.
    """

    def __init__(self, vlm: VLM, state: Prefilled, samples: int, steps: int):
        self.vlm, self.steps, self.step, self.used = vlm, steps, 0, 0
        self.lengths, self.width = state.lengths, state.width
        self.owner = self.offset = state.lengths.new_empty(len(state.lengths), 0)
        self.plan(torch.arange(samples, device=state.lengths.device).expand(len(state.lengths), -1))

    def plan(self, slots: torch.Tensor) -> None:
        """Lay out all steps to come: who owns which column is known, so one mask serves them all."""
        self.slots = slots
        steps = torch.arange(self.step, self.steps, device=slots.device).repeat_interleave(slots.shape[1])
        self.owner = torch.cat([self.owner[:, : self.used], slots.repeat(1, self.steps - self.step)], 1)
        self.offset = torch.cat([self.offset[:, : self.used], steps.expand(len(slots), -1)], 1)
        self.mask = None if windowed(self.vlm) or self.step == self.steps else self.mask_of(self.owner.shape[1])

    def mask_of(self, end: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """The mask (B, 1, m, width + end) of the m tokens in the columns before `end`."""
        queries = slice(end - self.slots.shape[1], end)
        return branch_masks(self.vlm, self.lengths, self.width, self.owner[:, :end], self.offset[:, :end], queries)

    def next_mask(self) -> torch.Tensor | dict[str, torch.Tensor]:
        self.used += self.slots.shape[1]
        self.step += 1
        # a sample's later columns do not exist yet, so the last step's mask, cut, is every step's
        return self.mask_of(self.used) if self.mask is None else self.mask[..., : self.width + self.used]

    def keep_rows(self, rows: torch.Tensor) -> None:
        self.lengths, self.owner, self.offset = self.lengths[rows], self.owner[rows], self.offset[rows]


@torch.inference_mode()
def sample_shared(
    vlm: VLM, encoded: list[EncodedPrompt], uniforms: np.ndarray, decoding: Decoding
) -> list[list[Generation]]:
    """All samples of B prompts with like images; `uniforms` is (B, n, steps)."""
    count, samples, steps = len(encoded), uniforms.shape[1], decoding.max_new_tokens
    if samples == 0:
        return [[] for _ in encoded]
    device, decoder = vlm.device, vlm.network.get_decoder()
    u = torch.from_numpy(np.ascontiguousarray(uniforms)).to(device)
    ends = torch.tensor(vlm.eos_token_ids, device=device)
    # room for some steps; a buffer that is full grows by half
    room = samples * min(steps, 64)
    state = prefill(vlm, [e.prompt_ids for e in encoded], [e.inputs for e in encoded], room)
    cache, position = state.cache, state.positions
    ends_at = (state.lengths - 1).to(state.hidden.device)
    last = logits_of(vlm, state.hidden[torch.arange(count, device=ends_at.device), ends_at]).to(device)
    columns = Columns(vlm, state, samples, steps - 1)
    del state
    tokens = torch.zeros(count, samples, steps, dtype=torch.long, device=device)
    length = torch.full((count, samples), steps, device=device)
    rows = torch.arange(count, device=device)
    logits = last[:, None].expand(-1, samples, -1)
    for step in range(steps):
        slots = columns.slots
        chosen = draw(logits.flatten(0, 1), u[rows[:, None], slots, step].flatten(), decoding).view_as(slots)
        tokens[rows[:, None], slots, step] = chosen
        ended = torch.isin(chosen, ends) & (length[rows[:, None], slots] == steps)
        length[rows[:, None], slots] = torch.where(ended, step, length[rows[:, None], slots])
        if step + 1 == steps:
            break
        if step % COMPACT_EVERY == COMPACT_EVERY - 1:
            live = length[rows] == steps
            if not live.any():
                break
            if live.any(1).float().mean() <= 0.75:
                kept = live.any(1).nonzero().squeeze(1)
                rows, position, live, chosen = rows[kept], position[kept], live[kept], chosen[kept]
                columns.keep_rows(kept)
                columns.slots = slots = slots[kept]
                for layer in cache.layers:
                    layer.keys, layer.values = layer.keys[kept], layer.values[kept]
                columns.plan(slots)
            widest = int(live.sum(1).max())
            if widest <= 0.75 * slots.shape[1]:
                # live samples first, done ones fill up
                order = live.gather(1, slots).long().sort(dim=1, descending=True, stable=True).indices[:, :widest]
                chosen = chosen.gather(1, order)
                columns.plan(slots.gather(1, order))
        output = decoder(
            input_ids=chosen,
            attention_mask=columns.next_mask(),
            position_ids=(position + step)[:, None].expand_as(chosen),
            past_key_values=cache,
            use_cache=True,
        )
        logits = logits_of(vlm, output.last_hidden_state).to(device)
    return [
        [finished(vlm, ids[:end], end < steps) for ids, end in zip(per_prompt, per_length, strict=True)]
        for per_prompt, per_length in zip(tokens.tolist(), length.tolist(), strict=True)
    ]


def finished(vlm: VLM, ids: list[int], stopped: bool) -> Generation:
    return Generation(vlm.tokenizer.decode(ids, skip_special_tokens=True), ids, "stop" if stopped else "length")


class DrawFromStream(LogitsProcessor):
    """Leaves transformers' own sampling loop one token to choose: the one that the stream draws."""

    def __init__(self, uniforms: np.ndarray, decoding: Decoding):
        self.uniforms, self.decoding, self.step = torch.from_numpy(uniforms), decoding, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = draw(scores.float(), self.uniforms[:, self.step].to(scores.device), self.decoding)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen[:, None], 0.0)


@torch.inference_mode()
def sample_plain(vlm: VLM, encoded: EncodedPrompt, uniforms: np.ndarray, decoding: Decoding) -> list[Generation]:
    """The same samples of one prompt through `model.generate`, for architectures that cannot share a prefix."""
    if len(uniforms) == 0:
        return []
    steps = decoding.max_new_tokens
    config = GenerationConfig(
        max_new_tokens=steps,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        num_return_sequences=len(uniforms),
        eos_token_id=vlm.eos_token_ids,
        pad_token_id=vlm.tokenizer.pad_token_id,
    )
    ids = torch.tensor([encoded.prompt_ids], device=vlm.device)
    output = vlm.network.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        logits_processor=[DrawFromStream(uniforms, decoding)],
        **collate_inputs(vlm, [encoded.inputs], [len(encoded.prompt_ids)]),
    )
    generations = []
    for row in output[:, len(encoded.prompt_ids) :].tolist():
        end = next((k for k, token in enumerate(row) if token in vlm.eos_token_ids), steps)
        generations.append(finished(vlm, row[:end], end < steps))
    return generations


def uniforms(seed: int, name: str, sample: int, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) of the stream that belongs to (seed, name, sample)."""
    key = hashlib.blake2b(f"{seed}/{name}/{sample}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(count)
