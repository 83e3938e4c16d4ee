"""A model's likeliest answer to a prompt: greedy decoding and beam search."""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial

import numpy as np

from rlaifv.inference.memory import budget_for, sampling_bytes
from rlaifv.inference.sampling import Decoding, Prompt, generate, generate_batch
from rlaifv.inference.served import Served, sample_served
from rlaifv.vlm.chat_format import UnfitText, encode_questions, unfit
from rlaifv.vlm.collate import inputs_shape
from rlaifv.vlm.loading import VLM


def best_answers(
    vlm: VLM, prompts: Sequence[Prompt], beams: int, max_new_tokens: int, repetition_penalty: float = 1.0
) -> list[str]:
    """The model's likeliest answer to each prompt, in the order of the prompts: greedy (1 beam), or by beam search."""
    if beams > 1:
        return beam_search(vlm, prompts, beams, max_new_tokens, repetition_penalty)
    streams = [np.zeros((1, max_new_tokens))] * len(prompts)  # greedy decoding draws nothing
    generations = generate_batch(vlm, prompts, streams, Decoding(0, 0, 1, max_new_tokens, repetition_penalty))
    return [samples[0].text.strip() for samples in generations]


def fit_answers(
    vlm: VLM | Served, prompts: Sequence[Prompt], beams: int, max_new_tokens: int, repetition_penalty: float = 1.0
) -> list[str | UnfitText]:
    """`best_answers`, with the reason in place of the answer to a prompt that cannot be put to this model.

    Raises ValueError for what a server cannot do: beams, and a penalty that leaves the prompt's words out.
    """
    if isinstance(vlm, Served):
        if beams > 1 or repetition_penalty != 1:
            raise ValueError(f"{vlm.name} is behind a server, which decodes greedily: no beams, no repetition_penalty")
        asked = [(prompt.image, prompt.text) for prompt in prompts]
        answers = sample_served(vlm, asked, [[0]] * len(asked), Decoding(0, 0, 1, max_new_tokens))
        return [answer if isinstance(answer, UnfitText) else answer[0].text.strip() for answer in answers]
    best = partial(best_answers, vlm, beams=beams, max_new_tokens=max_new_tokens, repetition_penalty=repetition_penalty)
    try:
        return best(prompts)
    except UnfitText:  # seldom, so only now is each prompt tried alone
        reasons = [unfit(vlm, prompt.image, prompt.text) for prompt in prompts]
    fit = [prompt for prompt, reason in zip(prompts, reasons, strict=True) if not reason]
    answers = iter(best(fit))
    return [reason or next(answers) for reason in reasons]


def beam_search(
    vlm: VLM, prompts: Sequence[Prompt], beams: int, max_new_tokens: int, repetition_penalty: float = 1.0
) -> list[str]:
    """The best of `beams` beams for each prompt, by transformers' own search, whatever the checkpoint's defaults are.

    Only prompts of one length with like images share a batch: nothing is padded, so a neighbor changes no answer.
    """
    search = {"num_beams": beams, "do_sample": False, "length_penalty": 1.0, "early_stopping": False}
    search |= {"repetition_penalty": repetition_penalty}
    encoded = [encode_questions(vlm, prompt.image, [prompt.text]) for prompt in prompts]
    groups: dict[tuple, list[int]] = defaultdict(list)
    for place, e in enumerate(encoded):
        groups[inputs_shape(e.inputs), len(e.prompt_ids)].append(place)
    answers = [""] * len(prompts)

    def search_batch(places: list[int]) -> list[list[int]]:
        return generate(vlm, [encoded[place] for place in places], max_new_tokens, **search)

    for (_, length), places in groups.items():
        each = sampling_bytes(vlm, 0, beams, length + max_new_tokens)  # every beam has the prompt to itself
        budget = budget_for(vlm, f"{beams} beams of {max_new_tokens} tokens", len(places), "prompts", each)
        for batch, found in budget.batches(places, search_batch):
            for place, row in zip(batch, found, strict=True):
                answers[place] = vlm.tokenizer.decode(row, skip_special_tokens=True).strip()
    return answers
