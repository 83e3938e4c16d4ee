"""What a reward model gives answers (`vlm.reward_format`): the image and prompt go through it once for all of them."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image

from rlaifv.inference.logprobs import prefix_path, run_rows
from rlaifv.vlm.chat_format import Conversation, EncodedPrompt
from rlaifv.vlm.loading import VLM
from rlaifv.vlm.reward_format import RewardHead, RewardModel, encode_answers


@dataclass(frozen=True)
class Rated:
    """Answers to one question about one image, and the facts that the reward model reads with them (None: none)."""

    image: Image.Image | None
    question: Conversation
    answers: Sequence[str]
    facts: Sequence[str] | None = None


def score(model: RewardModel, rated: Sequence[Rated], *, shared: bool | None = None) -> list[list[float]]:
    """The reward of every answer, by prompt; equal answers to one question are computed once.

    Args:
        model: from `load_reward_model`.
        rated: prompts with their answers, several to a forward.
        shared: force the shared (True) or plain (False) path; None decides by `logprobs.prefix_path`.

    Raises:
        ValueError: facts where the model was trained without, or none where it was trained with them.
        UnfitText: a text with special tokens in it, or a row that is longer than the context.
        FloatingPointError: a reward that is not finite.
    """
    distinct = [list(dict.fromkeys(item.answers)) for item in rated]
    encoded = [
        encode_answers(model.vlm, model.format, item.image, item.question, answers, item.facts)
        if answers
        else EncodedPrompt([], [], [], {})
        for item, answers in zip(rated, distinct, strict=True)
    ]
    values = score_rows(model, encoded, shared=shared)
    of_answer = [dict(zip(answers, row, strict=True)) for answers, row in zip(distinct, values, strict=True)]
    return [[of[answer] for answer in item.answers] for item, of in zip(rated, of_answer, strict=True)]


def score_rows(
    model: RewardModel, encoded: Sequence[EncodedPrompt], *, shared: bool | None = None
) -> list[list[float]]:
    """The reward at the last token of each row, by prompt."""
    encoded = list(encoded)
    if shared is None and (asked := [item for item in encoded if item.prompt_ids]):
        prefix_path(model.vlm, asked)  # it compares whole vocabularies: before the output layer is another
    with reading_with(model.vlm, model.head):
        values = run_rows(model.vlm, encoded, lambda reward, _target: reward[:, 0], shared)
    rewards = [[float(value[0]) for value in rows] for rows in values]
    if not all(math.isfinite(reward) for row in rewards for reward in row):
        raise FloatingPointError(f"{model.vlm.name} gives rewards that are not finite: load it in float32 or bfloat16")
    return rewards


@contextmanager
def reading_with(vlm: VLM, head: RewardHead) -> Iterator[None]:
    """In here, `head` stands where the model's output layer does: what is computed of a place is its reward."""
    network, config = vlm.network, vlm.network.config.get_text_config()
    own, cap = network.get_output_embeddings(), getattr(config, "final_logit_softcapping", None)
    network.set_output_embeddings(head)
    if cap:  # Gemma's, for logits
        config.final_logit_softcapping = None
    try:
        yield
    finally:
        network.set_output_embeddings(own)
        if cap:
            config.final_logit_softcapping = cap
