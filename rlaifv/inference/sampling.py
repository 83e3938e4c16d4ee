"""Sample answers: image and prompt are computed once, n samples decode together after them.

Token t of a sample is drawn by inverse CDF from the t-th number of that sample's own uniform stream, so a sample is a
function of model, prompt and stream: neither batch size nor order nor the other samples change it.

The samples of one prompt share one row of keys and values, `[prompt | t=0 of all samples | t=1 of all samples | …]`;
each step feeds the row one token of every sample, and a mask lets a sample see the prompt and its own tokens. The
prompt's keys are read once a step for all n samples instead of n times, and nothing is copied as the row grows.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import GenerationConfig, LogitsProcessor, RepetitionPenaltyLogitsProcessor
from transformers.generation import BaseStreamer

from rlaifv.inference.logprobs import prefix_path
from rlaifv.inference.memory import budget_for, sampling_bytes
from rlaifv.inference.prefix_cache import buffer_cache, feed, logits_of, prefill
from rlaifv.vlm.chat_format import EncodedPrompt, encode_questions
from rlaifv.vlm.collate import collate_inputs, inputs_shape
from rlaifv.vlm.loading import VLM

COMPACT_EVERY = 8
"""Steps between looks at which samples are done (a look makes a GPU wait)."""

NUCLEUS = 1024
"""Likeliest tokens among which top-p looks first."""


@dataclass(frozen=True)
class Prompt:
    """One user turn; `image` is None for a text-only prompt, and for a server a data URL (`roles.look`)."""

    image: Image.Image | str | None
    text: str


@dataclass(frozen=True)
class Generation:
    """One sampled answer; `token_ids` leaves out the end token, `finish_reason` is "stop" or "length". `end_id` is the
    end token that was drawn, None where the answer was cut."""

    text: str
    token_ids: list[int]
    finish_reason: str
    end_id: int | None = None


@dataclass(frozen=True)
class Decoding:
    """How a token is chosen, in the order of transformers' warpers, and where an unfinished answer is cut
    (`finish_reason` "length"); temperature 0 is greedy, top_k 0 and top_p 1 switch those off. `repetition_penalty`
    above 1 makes tokens less likely that the answer has already (arXiv 1909.05858, section 4.1); those of the prompt
    do not count.

    Raises ValueError for a setting outside its range.
    """

    temperature: float
    top_k: int
    top_p: float
    max_new_tokens: int
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        impossible = self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or self.max_new_tokens < 1
        if impossible or self.repetition_penalty < 1:
            raise ValueError(f"impossible decoding settings {self}")


def generate_batch(
    vlm: VLM,
    prompts: Sequence[Prompt],
    streams: Sequence[np.ndarray],
    decoding: Decoding,
    shared: bool | None = None,
) -> list[list[Generation]]:
    """Sample answers to several prompts.

    Args:
        vlm: the policy, or a text-only language model.
        prompts: image and question each.
        streams: for each prompt, uniform numbers in [0, 1) of shape (samples, max_new_tokens).
        decoding: how the tokens are chosen.
        shared: force the shared (True) or plain (False) path; None decides by `logprobs.prefix_path`.

    Returns:
        For each prompt, one Generation per row of its stream.

    Raises:
        ValueError: a stream that is too short, or not one for each prompt.
    """
    if len(prompts) != len(streams):
        raise ValueError(f"{len(prompts)} prompts but {len(streams)} streams")
    for stream in streams:
        if np.ndim(stream) != 2 or np.shape(stream)[1] < decoding.max_new_tokens:
            raise ValueError(
                f"a stream of shape {np.shape(stream)} cannot draw {decoding.max_new_tokens} tokens a sample: "
                "its shape is (samples, max_new_tokens)"
            )
    encoded = [encode_questions(vlm, prompt.image, [prompt.text]) for prompt in prompts]
    return sample_encoded(vlm, encoded, streams, decoding, shared)


def sample_encoded(
    vlm: VLM,
    encoded: list[EncodedPrompt],
    streams: Sequence[np.ndarray],
    decoding: Decoding,
    shared: bool | None = None,
) -> list[list[Generation]]:
    """`generate_batch` for prompts that are encoded already."""
    if not encoded:
        return []
    steps, most = decoding.max_new_tokens, max(map(len, streams))
    if not (shared if shared is not None else prefix_path(vlm, encoded) == "packed"):
        found = []
        for e, u in zip(encoded, streams, strict=True):
            each = sampling_bytes(vlm, 0, 1, len(e.prompt_ids) + steps)  # each has the prompt to itself
            budget = budget_for(vlm, f"plain samples of {steps} tokens", len(u), "samples", each)
            drawn = budget.batches(range(len(u)), partial(sample_part, vlm, e, u, decoding))
            found.append([generation for _, part in drawn for generation in part])
        return found

    def kind(i: int) -> tuple:
        return inputs_shape(encoded[i].inputs), len(streams[i])

    def sample(batch: list[int]) -> list[list[Generation]]:
        return sample_shared(vlm, [encoded[i] for i in batch], np.stack([streams[i] for i in batch]), decoding)

    # like images and like numbers of samples go together, shortest prompts first, so that little is padding
    order = sorted(range(len(encoded)), key=lambda i: (repr(kind(i)), len(encoded[i].prompt_ids)))
    results: dict[int, list[Generation]] = {}
    each = sampling_bytes(vlm, max(len(e.prompt_ids) for e in encoded), most, steps)
    budget = budget_for(vlm, f"{most} samples of {steps} tokens", len(encoded), "prompts", each)
    for batch, samples in budget.batches(order, sample, kind=kind):
        results |= zip(batch, samples, strict=True)
    return [results[i] for i in range(len(encoded))]


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
        probs = probs.masked_fill(unlikely(probs, decoding.top_p), 0.0)
    cdf = probs.cumsum(-1)
    chosen = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True).clamp(max=cdf.shape[-1] - 1)
    return (chosen if ids is None else ids.gather(-1, chosen)).squeeze(-1)


def penalized(logits: torch.Tensor, said: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits (rows, V) with those of the tokens `said` (rows, n) divided by `penalty`, negative ones multiplied."""
    own = logits.gather(-1, said)
    return logits.scatter(-1, said, torch.where(own < 0, own * penalty, own / penalty))


def unlikely(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """Which tokens top-p drops: the least likely ones, lower ids first, as long as they add up to 1 - top_p at most.

    Args:
        probs: (rows, V) float64.

    Returns:
        (rows, V) bool. Sorting a vocabulary of 150,000 takes longer than the rest of a step, so it is sorted only where
        the `NUCLEUS` likeliest tokens do not settle it beyond rounding.
    """
    if probs.shape[-1] > NUCLEUS:
        ids = probs.topk(NUCLEUS, dim=-1).indices.sort(-1).values
        likely = probs.gather(-1, ids)
        ascending, order = likely.sort(dim=-1, stable=True)
        below = (probs.sum(-1, keepdim=True) - likely.sum(-1, keepdim=True)) + ascending.cumsum(-1)
        dropped = below <= 1 - top_p
        # tokens as likely as the last of these may stand outside: all of them must go
        if (((below - (1 - top_p)).abs() > 1e-9) & (dropped | (ascending > ascending[:, :1]))).all():
            return torch.ones_like(probs, dtype=torch.bool).scatter(-1, ids.gather(-1, order), dropped)
    ascending, order = probs.sort(dim=-1, stable=True)
    dropped = ascending.cumsum(-1) <= 1 - top_p
    dropped[:, -1] = False
    return torch.zeros_like(dropped).scatter(-1, order, dropped)


class Decode:
    """The n samples of each of B prompts with like images while they decode: a row a prompt, a slot a sample.

    Samples are numbered through, prompt by prompt: `tokens` (B·n, steps) holds what was drawn, `length` (B·n,) where
    a sample ended. `slots` (b, m) are the numbers of the samples that are still fed. They become fewer as samples end;
    a row with fewer live samples than m feeds ended ones along, whose tokens go nowhere. `logits` (b, m, V) are those
    of the next token; `owner` and `offset` (b, columns) the sample and the step of every column after the prompts.
    """

    def __init__(self, vlm: VLM, encoded: list[EncodedPrompt], streams: np.ndarray):
        count, samples, self.steps = streams.shape
        self.vlm, self.step = vlm, 0
        self.streams = torch.from_numpy(streams.reshape(-1, self.steps)).to(vlm.device)
        self.ends = torch.tensor(vlm.eos_token_ids, device=vlm.device)
        self.slots = torch.arange(count * samples, device=vlm.device).view(count, samples)
        self.tokens = torch.zeros(count * samples, self.steps, dtype=torch.long, device=vlm.device)
        self.length = torch.full((count * samples,), self.steps, device=vlm.device)
        self.nan = torch.zeros((), dtype=torch.bool, device=vlm.device)  # looked at once, at the end: a GPU would wait
        room = samples * min(self.steps, 64)  # a buffer that is full grows by half
        cache = buffer_cache(vlm, room)
        self.state = prefill(vlm, [e.prompt_ids for e in encoded], [e.inputs for e in encoded], cache)
        self.owner = self.offset = self.slots[:, :0]
        self.logits = logits_of(vlm, self.state.last).to(vlm.device)[:, None].expand(-1, samples, -1)

    def live(self) -> torch.Tensor:
        """(b, m) whether the sample has not ended."""
        return self.length[self.slots] == self.steps

    def append(self, decoding: Decoding) -> None:
        """Draw one token of every slot by the numbers of this step; an end token ends its sample there."""
        self.nan |= lost(self.logits)
        uniform = self.streams[self.slots, self.step].flatten()
        logits = self.logits.flatten(0, 1)
        if decoding.repetition_penalty != 1:
            said = self.tokens[self.slots, : self.step].flatten(0, 1)
            logits = penalized(logits, said, decoding.repetition_penalty)
        chosen = draw(logits, uniform, decoding).view_as(self.slots)
        ended = torch.isin(chosen, self.ends) & self.live()
        self.tokens[self.slots, self.step] = chosen
        self.length[self.slots] = torch.where(ended, self.step, self.length[self.slots])

    def drop_finished(self) -> None:
        """Every `COMPACT_EVERY` steps, take ended prompts and samples out if the batch gets a quarter smaller."""
        if self.step % COMPACT_EVERY != COMPACT_EVERY - 1:
            return
        live = self.live()
        if live.any(1).float().mean() <= 0.75:
            kept = live.any(1).nonzero().squeeze(1)
            self.state = self.state.keep(kept)
            live, self.slots, self.owner, self.offset = (
                rows[kept] for rows in (live, self.slots, self.owner, self.offset)
            )
        widest = max(live.sum(1).tolist(), default=0)
        if widest <= 0.75 * self.slots.shape[1]:
            # live samples first, ended ones fill up
            order = live.long().sort(dim=1, descending=True, stable=True).indices[:, :widest]
            self.slots = self.slots.gather(1, order)

    def finished(self) -> bool:
        """Whether no sample can grow any more; ended ones count once they are dropped."""
        return self.step + 1 == self.steps or not self.slots.numel()

    def forward(self) -> None:
        """Feed the newest token of every slot: the logits of the next one."""
        self.owner = torch.cat([self.owner, self.slots], 1)
        self.offset = torch.cat([self.offset, torch.full_like(self.slots, self.step)], 1)
        hidden = feed(self.vlm, self.state, self.tokens[self.slots, self.step], self.owner, self.offset)
        self.logits = logits_of(self.vlm, hidden).to(self.vlm.device)
        self.step += 1

    def generations(self) -> list[Generation]:
        """What was drawn, by the samples' numbers. Raises FloatingPointError where it was drawn from NaN."""
        refuse_nan(self.vlm, bool(self.nan))
        ended = zip(self.tokens.tolist(), self.length.tolist(), strict=True)
        return [generation(self.vlm, ids, end) for ids, end in ended]


def lost(logits: torch.Tensor) -> torch.Tensor:
    """Whether no probabilities come of these: one is NaN or too large to be a number (float16 ends at 65504)."""
    return ~logits.amax().isfinite()


def refuse_nan(vlm: VLM, nan: bool) -> None:
    """Raise FloatingPointError for logits that were `lost`: what was drawn from them is no answer of the model's."""
    if nan:
        raise FloatingPointError(f"{vlm.name} computes NaN instead of probabilities: use another dtype or checkpoint")


@torch.inference_mode()
def sample_shared(
    vlm: VLM, encoded: list[EncodedPrompt], uniforms: np.ndarray, decoding: Decoding
) -> list[list[Generation]]:
    """All samples of B prompts with like images; `uniforms` is (B, n, steps)."""
    samples = uniforms.shape[1]
    if samples == 0:
        return [[] for _ in encoded]
    decode = Decode(vlm, encoded, uniforms[..., : decoding.max_new_tokens])
    while True:
        decode.append(decoding)
        decode.drop_finished()
        if decode.finished():
            break
        decode.forward()
    found = decode.generations()
    return [found[start : start + samples] for start in range(0, len(found), samples)]


def generation(vlm: VLM, drawn: list[int], end: int) -> Generation:
    """What was drawn up to its end token, which is at `end`; an answer that was cut has none."""
    ids, end_id = drawn[:end], next(iter(drawn[end:]), None)
    text = vlm.tokenizer.decode(ids, skip_special_tokens=True)
    return Generation(text, ids, "length" if end_id is None else "stop", end_id)


class DrawFromStream(LogitsProcessor):
    """Leaves transformers' own sampling loop one token to choose: the one that the stream draws."""

    def __init__(self, uniforms: np.ndarray, decoding: Decoding):
        self.uniforms, self.decoding, self.step = torch.from_numpy(uniforms), decoding, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = draw(scores.float(), self.uniforms[:, self.step].to(scores.device), self.decoding)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen[:, None], 0.0)


class Watch(LogitsProcessor):
    """Changes nothing; `nan` is whether any scores were `lost`."""

    nan: bool | torch.Tensor = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.nan = lost(scores) | self.nan
        return scores


@torch.inference_mode()
def generate(
    vlm: VLM,
    encoded: Sequence[EncodedPrompt],
    max_new_tokens: int,
    processors: Sequence[LogitsProcessor] = (),
    streamer: BaseStreamer | None = None,
    repetition_penalty: float = 1.0,
    **config: Any,
) -> list[list[int]]:
    """transformers' own decoding of prompts of one length with like images; the new tokens of every row.

    What the checkpoint's generation_config.json says counts only where `config` (the rest of a GenerationConfig) and
    the settings here leave it open; end tokens are the model's. `repetition_penalty` is that of `Decoding`, and comes
    before `processors`. Raises FloatingPointError where that computes NaN.
    """
    watch = Watch()
    ids = torch.tensor([e.prompt_ids for e in encoded], device=vlm.device)
    if repetition_penalty != 1:
        processors = [RepetitionPenaltyLogitsProcessor(repetition_penalty, ids.shape[1]), *processors]
    output = vlm.network.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=GenerationConfig(
            max_new_tokens=max_new_tokens,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            eos_token_id=vlm.eos_token_ids,
            pad_token_id=vlm.tokenizer.pad_token_id,
            **config,
        ),
        logits_processor=[watch, *processors],
        streamer=streamer,
        **collate_inputs(vlm, [e.inputs for e in encoded], [ids.shape[1]] * len(ids)),
    )
    refuse_nan(vlm, bool(watch.nan))
    return output[:, ids.shape[1] :].tolist()


def sample_plain(
    vlm: VLM,
    encoded: EncodedPrompt,
    uniforms: np.ndarray,
    decoding: Decoding,
    streamer: BaseStreamer | None = None,
) -> list[Generation]:
    """The same samples of one prompt through `generate`: for architectures that cannot share a prefix, and to stream
    the one answer that `uniforms` (1, steps) draws."""
    if len(uniforms) == 0:
        return []
    steps, draws = decoding.max_new_tokens, DrawFromStream(uniforms, decoding)
    neutral = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": len(uniforms)}
    generations = []
    for row in generate(vlm, [encoded], steps, [draws], streamer, decoding.repetition_penalty, **neutral):
        end = next((k for k, token in enumerate(row) if token in vlm.eos_token_ids), steps)
        generations.append(generation(vlm, row, end))
    return generations


def sample_part(
    vlm: VLM, encoded: EncodedPrompt, uniforms: np.ndarray, decoding: Decoding, part: list[int]
) -> list[Generation]:
    """`sample_plain` of some of a prompt's samples."""
    return sample_plain(vlm, encoded, uniforms[part], decoding)


def uniforms(seed: int, name: str, sample: int, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) of the stream that belongs to (seed, name, sample)."""
    key = hashlib.blake2b(f"{seed}/{name}/{sample}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(count)
