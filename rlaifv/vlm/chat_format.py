"""Speak to a checkpoint: render its chat template, and tokenize prompt and answer jointly."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from rlaifv.vlm.templates import with_variables


@dataclass(frozen=True, kw_only=True)
class Reader:
    """What a checkpoint reads a chat with: all of it but the weights. `processor` is None for a text-only model.

    `context` is the most tokens that the language model was made for; None where its configuration does not say.
    """

    tokenizer: PreTrainedTokenizerBase
    processor: ProcessorMixin | None
    name: str
    eos_token_ids: list[int] = field(default_factory=list)
    context: int | None = None

    @property
    def sees_images(self) -> bool:
        return self.processor is not None


Conversation = str | Sequence[str]
"""A question; or what a user and the model have said in turn, the user first and, with the question, last."""


def prompt_text(
    vlm: Reader, question: Conversation, *, image: bool = True, answer: str | None = None, prompt: str | None = None
) -> str:
    """The chat up to a question, rendered by the checkpoint's own template; the image comes before the first turn.
    `prompt` is its text without the answer, for callers who have it.

    Without `answer` the text ends where the model's answer begins. With `answer` it goes on with the answer as the
    template renders it and ends with exactly one end token: the one of the model's that the template ends a turn with
    (Gemma's `<end_of_turn>`), else the tokenizer's. Some templates (LLaVA-1.5) end a turn without one, and a model
    trained on them never learns to stop.

    Raises:
        ValueError: the template changes the answer.
    """
    said = [question] if isinstance(question, str) else question
    asked = [turn(vlm, ("user", "assistant")[k % 2], text, image and k == 0) for k, text in enumerate(said)]
    if prompt is None:
        prompt = render(vlm, asked, add_generation_prompt=True)
    if answer is None:
        return prompt
    whole = render(vlm, [*asked, turn(vlm, "assistant", answer)])
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


def check_text(vlm: Reader, text: str) -> int:
    """How many tokens a text has. Raises UnfitText where the model would read a part of it as a token of its own
    (`<image>`, `</s>`, `<|im_end|>`), so that a question could end its turn, or bring an image that is not there."""
    ids = vlm.tokenizer(text, add_special_tokens=False)["input_ids"]
    if found := control_ids(vlm.tokenizer).union(vlm.eos_token_ids).intersection(ids):
        token = vlm.tokenizer.decode([next(i for i in ids if i in found)])
        raise UnfitText(f"{text[:40]!r} holds {token!r}, which the tokenizer reads as a token of its own: take it out")
    return len(ids)


def check_length(vlm: Reader, tokens: int, what: str) -> None:
    """Raise UnfitText for more tokens than the model's context holds."""
    if vlm.context and tokens > vlm.context:
        raise UnfitText(f"{what} {tokens} tokens, the context holds {vlm.context}")


def turn(vlm: Reader, role: str, text: str, image: bool = False) -> dict:
    """One message of a chat; `image` puts the picture before its text. UnfitText for what `check_text` refuses,
    and for a question that alone is longer than the model's context."""
    tokens = check_text(vlm, text)
    if role == "user":  # an answer's length counts together with its prompt's, which is not known here
        check_length(vlm, tokens, f"{text[:40]!r} is")
    picture = [{"type": "image"}] if image else []
    return {"role": role, "content": [*picture, {"type": "text", "text": text}] if vlm.sees_images else text}


def render(vlm: Reader, turns: list[dict], add_generation_prompt: bool = False, template: str | None = None) -> str:
    """The text of a chat, by the checkpoint's own template unless another is given."""
    templated = vlm.processor or vlm.tokenizer
    return templated.apply_chat_template(
        turns, chat_template=template, add_generation_prompt=add_generation_prompt, tokenize=False
    )


def special_tokens_needed(vlm: Reader, text: str) -> bool:
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


def encode(
    vlm: Reader, image: Image.Image | None, question: Conversation, answers: Sequence[str] = ()
) -> EncodedPrompt:
    """Tokenize a prompt and the answers to it; raises ValueError where the template changes an answer."""
    see = image is not None
    prompt = prompt_text(vlm, question, image=see)
    answered = [prompt_text(vlm, question, image=see, answer=answer, prompt=prompt) for answer in answers]
    (ids, *rows), inputs = tokenize(vlm, image, [prompt, *answered])
    return EncodedPrompt(ids, rows, [common_length(row, ids) for row in rows], inputs)


def encode_questions(vlm: Reader, image: Image.Image | None, questions: Sequence[str], room: int = 0) -> EncodedPrompt:
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


def unfit(vlm: Reader, image: Image.Image | None, question: str) -> UnfitText | None:
    """Why a question cannot be put to this model; None if it can."""
    try:
        encode_questions(vlm, image, [question])
    except UnfitText as error:
        return error
    return None


def tokenize(
    vlm: Reader, image: Image.Image | None, texts: list[str]
) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
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


def expand_image(vlm: Reader, image: Image.Image | None, prompt: str) -> tuple[list[int], dict[str, torch.Tensor]]:
    """A prompt's ids with its image placeholders expanded, and what the processor made of the image."""
    special = special_tokens_needed(vlm, prompt)
    if image is None:
        return vlm.tokenizer(prompt, add_special_tokens=special)["input_ids"], {}
    batch = vlm.processor(images=[image], text=[prompt], add_special_tokens=special, return_tensors="pt")
    ids = batch.pop("input_ids")[0].tolist()
    batch.pop("attention_mask")
    return ids, {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}


MANY = 4
"""So many equal tokens in a row are an image's: no text repeats one so often."""


def folded_prompt(vlm: Reader, image: Image.Image | None, question: str) -> tuple[str, int]:
    """A prompt as its model gets it: what `folded_tokens` makes of it."""
    return folded_tokens(vlm, expand_image(vlm, image, prompt_text(vlm, question, image=image is not None))[0])


def folded_tokens(vlm: Reader, ids: Sequence[int]) -> tuple[str, int]:
    """Tokens to be looked at on one line, and how many of them are an image's.

    The text is that of the tokens, not of the template; a row of equal tokens is written once (`<image>×576`), a new
    line as ⏎.
    """
    runs = [(token, len(list(run))) for token, run in groupby(ids)]
    text, image_tokens, before = "", 0, []
    for many, group in groupby(runs, key=lambda run: run[1] >= MANY):
        if many:
            for token, count in group:
                text += f"{vlm.tokenizer.decode([token])}×{count}"
                image_tokens += count
                before = [token]
        else:  # decoded behind the token before, because a tokenizer drops the space that a text begins with
            part = vlm.tokenizer.decode([*before, *(token for token, count in group for _ in range(count))])
            text += part.removeprefix(vlm.tokenizer.decode(before))
    return text.replace("\n", "⏎"), image_tokens


def shows_images(vlm: Reader) -> bool:
    """Whether an image takes a place in a prompt."""
    prompt = prompt_text(vlm, "Is it?")
    plain = vlm.tokenizer(prompt, add_special_tokens=special_tokens_needed(vlm, prompt))["input_ids"]
    try:
        return expand_image(vlm, Image.new("RGB", (64, 64)), prompt)[0] != plain
    except ValueError:  # processors count the placeholders and the images
        return False


OPENED_THOUGHT = re.compile(r"[<◁\[](think|thinking|thought)[>▷\]]\s*$", re.IGNORECASE)


def thinks_first(vlm: Reader) -> bool:
    """Whether the model thinks before it answers: its prompt ends in an opened thought, or its template has a switch
    `enable_thinking` that is on of itself. A thought that the template opens and closes again is none."""
    asked = [turn(vlm, "user", "Is it?")]
    prompt = render(vlm, asked, add_generation_prompt=True)
    template = with_variables((vlm.processor or vlm.tokenizer).chat_template, {"enable_thinking": False})
    return bool(OPENED_THOUGHT.search(prompt)) or prompt != render(vlm, asked, True, template)


def common_length(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix."""
    different = (place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(different, min(len(a), len(b)))
