"""Speak to a checkpoint: render its chat template, and tokenize prompt and answer jointly."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from rlaifv.vlm.loading import VLM


def prompt_text(
    vlm: VLM, question: str, *, image: bool = True, answer: str | None = None, prompt: str | None = None
) -> str:
    """The chat of one user turn, rendered by the checkpoint's own template; `prompt` is its text without the answer,
    for callers who have it.

    Without `answer` the text ends where the model's answer begins. With `answer` it goes on with the answer as the
    template renders it and ends with exactly one end token: the one of the model's that the template ends a turn with
    (Gemma's `<end_of_turn>`), else the tokenizer's. Some templates (LLaVA-1.5) end a turn without one, and a model
    trained on them never learns to stop.

    Raises:
        ValueError: the template changes the answer.
    """
    asked = turn(vlm, "user", question, image)
    if prompt is None:
        prompt = render(vlm, [asked], add_generation_prompt=True)
    if answer is None:
        return prompt
    whole = render(vlm, [asked, turn(vlm, "assistant", answer)])
    if whole.startswith(prompt):
        # the first place after the prompt: a short answer ("end") may stand in the template's own end of turn as well
        start = whole.find(answer, len(prompt))
        # what the template puts between the generation prompt and the answer (a space for LLaVA, nothing for Qwen)
        separator = whole[len(prompt) : start]
    else:
        start, separator = whole.rfind(answer), ""
    if start < 0:
        raise ValueError(f"the chat template of {vlm.name} changes the answer {answer[:40]!r}: cannot train on it")
    after = whole[start + len(answer) :].lstrip()
    ends = vlm.tokenizer.convert_ids_to_tokens(vlm.eos_token_ids)
    end = next((end for end in ends if after.startswith(end)), vlm.tokenizer.eos_token)
    return prompt + separator + answer + end


class UnfitText(ValueError):
    """A text that cannot be put to this model as it is."""


@lru_cache(maxsize=8)
def control_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that steer a model and stand for no text. Added tokens that are not special do not count: Gemma has `\\n\\n`
    among them, Qwen3 `<think>`. Nor does the unknown token, which any strange word becomes."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset({*special, *tokenizer.all_special_ids} - {tokenizer.unk_token_id})


def check_text(vlm: VLM, text: str) -> None:
    """Raise UnfitText where the model would read a part of a text as a token of its own (`<image>`, `</s>`,
    `<|im_end|>`), so that a question could end its turn, or bring an image that is not there; and where the text alone
    is longer than the model's context."""
    ids = vlm.tokenizer(text, add_special_tokens=False)["input_ids"]
    if found := control_ids(vlm.tokenizer).union(vlm.eos_token_ids).intersection(ids):
        token = vlm.tokenizer.decode([next(i for i in ids if i in found)])
        raise UnfitText(f"{text[:40]!r} holds {token!r}, which the tokenizer reads as a token of its own: take it out")
    check_length(vlm, len(ids), f"{text[:40]!r} is")


def check_length(vlm: VLM, tokens: int, what: str) -> None:
    """Raise UnfitText for more tokens than the model's context holds."""
    limit = context_length(vlm)
    if limit and tokens > limit:
        raise UnfitText(f"{what} {tokens} tokens, the context holds {limit}")


def context_length(vlm: VLM) -> int | None:
    """The most tokens that the language model was made for; None where its configuration does not say."""
    return getattr(vlm.network.config.get_text_config(), "max_position_embeddings", None)


def turn(vlm: VLM, role: str, text: str, image: bool = False) -> dict:
    """One message of a chat; `image` puts the picture before its text. UnfitText for what `check_text` refuses."""
    check_text(vlm, text)
    picture = [{"type": "image"}] if image else []
    return {"role": role, "content": [*picture, {"type": "text", "text": text}] if vlm.sees_images else text}


def render(vlm: VLM, turns: list[dict], add_generation_prompt: bool = False) -> str:
    """The text of a chat, by the checkpoint's own template."""
    templated = vlm.processor or vlm.tokenizer
    return templated.apply_chat_template(turns, add_generation_prompt=add_generation_prompt, tokenize=False)


def special_tokens_needed(vlm: VLM, text: str) -> bool:
    """Whether the tokenizer must add its begin token, because the template has not written one."""
    bos = vlm.tokenizer.bos_token
    return not (bos and text.startswith(bos))


@dataclass(frozen=True)
class EncodedPrompt:
    """One image and question with the answers that follow it, tokenized jointly.

    `prompt_ids` is the prompt alone with its image placeholders expanded; `rows[i]` is prompt + answer i + end
    token; `answer_starts[i]` is the index in `rows[i]` of the first token that is not the prompt's. `inputs` holds
    what the processor made of the image (`pixel_values`, ...), with a batch of one.
    """

    prompt_ids: list[int]
    rows: list[list[int]]
    answer_starts: list[int]
    inputs: dict[str, torch.Tensor]


def encode(vlm: VLM, image: Image.Image | None, question: str, answers: Sequence[str] = ()) -> EncodedPrompt:
    """Tokenize a prompt and the answers to it; raises ValueError where the template changes an answer."""
    see = image is not None
    prompt = prompt_text(vlm, question, image=see)
    answered = [prompt_text(vlm, question, image=see, answer=answer, prompt=prompt) for answer in answers]
    (ids, *rows), inputs = tokenize(vlm, image, [prompt, *answered])
    return EncodedPrompt(ids, rows, [common_length(row, ids) for row in rows], inputs)


def encode_questions(vlm: VLM, image: Image.Image | None, questions: Sequence[str], room: int = 0) -> EncodedPrompt:
    """Tokenize several prompts about one image.

    `rows` are the complete prompts, up to where the model's answer begins (so `answer_starts` are their lengths), and
    `prompt_ids` is what they have in common. `room` more tokens must fit the context after each, else UnfitText.
    """
    if not questions:
        return EncodedPrompt([], [], [], {})
    rows, inputs = tokenize(vlm, image, [prompt_text(vlm, q, image=image is not None) for q in questions])
    longest = max(map(len, rows))
    answer = f" and the {room} of an answer" if room else ""
    check_length(vlm, longest + room, f"prompt, image{answer} are")
    shared = min(common_length(rows[0], row) for row in rows)
    return EncodedPrompt(rows[0][:shared], rows, [len(row) for row in rows], inputs)


def tokenize(vlm: VLM, image: Image.Image | None, texts: list[str]) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
    """The ids of texts about one image, and what the processor made of the image, once for all of them.

    The tokens are those of a whole text at once, never of prompt and answer apart. The processor only rewrites the
    image placeholder, so everything after it is tokenized as plain text and put after the expanded part. Raises
    ValueError when the texts differ before the image.
    """
    plain = vlm.tokenizer(texts, add_special_tokens=special_tokens_needed(vlm, texts[0]))["input_ids"]
    expanded, inputs = expand_image(vlm, image, texts[0])
    # the tokens after the image are the same in both: only what stands before them was expanded
    after = common_length(plain[0][::-1], expanded[::-1])
    head, kept = expanded[: len(expanded) - after], len(plain[0]) - after
    for text, ids in zip(texts, plain, strict=True):
        if ids[:kept] != plain[0][:kept]:
            raise ValueError(f"{vlm.name}: the text that ends with {text[-40:]!r} changes tokens before the image")
    return [head + ids[kept:] for ids in plain], inputs


def expand_image(vlm: VLM, image: Image.Image | None, prompt: str) -> tuple[list[int], dict[str, torch.Tensor]]:
    """A prompt's ids with its image placeholders expanded, and what the processor made of the image."""
    special = special_tokens_needed(vlm, prompt)
    if image is None:
        return vlm.tokenizer(prompt, add_special_tokens=special)["input_ids"], {}
    batch = vlm.processor(images=[image], text=[prompt], add_special_tokens=special, return_tensors="pt")
    ids = batch.pop("input_ids")[0].tolist()
    batch.pop("attention_mask")
    return ids, {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}


def common_length(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix."""
    different = (place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(different, min(len(a), len(b)))
