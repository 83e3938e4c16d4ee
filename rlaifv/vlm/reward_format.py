"""What makes a checkpoint a reward model: the text in which it is asked for a score, and the vector that reads it.

A reward model's folder is an ordinary checkpoint with two files more. `reward_head.safetensors` holds `weight`
[1, hidden] and `bias` [1]: the reward of an answer is weight · h + bias, h the final-norm hidden state of the last
position of

    image and conversation | answer and its end token | prompt, with the facts in it

(Fact-RLHF, arXiv 2309.14525, section 3). `reward.json` is its `RewardFormat`. The same weights asked in other words or
tokens give numbers that look like rewards and are none, so `reward.json` also holds the tokens of a short example, and
a model whose tokenizer, template or libraries make others of it is refused.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from rlaifv.records import json_object, to_json, write_atomic
from rlaifv.vlm.chat_format import (
    Conversation,
    EncodedPrompt,
    Reader,
    check_length,
    check_text,
    common_length,
    prompt_text,
    special_tokens_needed,
    tokenize,
)
from rlaifv.vlm.checkpoint import find_checkpoint
from rlaifv.vlm.loading import VLM, load_vlm

FORMAT, HEAD = "reward.json", "reward_head.safetensors"

PLACE = "{factual_prompt}"
"""Where a prompt takes its facts; the name is that of the published prompt files."""

EXAMPLE = ("Is it?", "No.", ("It is.",))
"""The question, answer and facts whose tokens a `reward.json` holds."""


@dataclass(frozen=True)
class RewardFormat:
    """How a reward model is asked.

    `prompt` is put behind the answer's end token exactly as it stands, roles and first spaces included. Where it has
    `{factual_prompt}`, every score needs facts: `facts_intro` is put there, and `fact_line` for each of them, with the
    fact in place of its `{}`. `base` is the fingerprint of the checkpoint that training began with, `head` how its
    vector began ("yes_no" or "random"), `example` the tokens of `EXAMPLE` in this format.
    """

    prompt: str
    facts_intro: str
    fact_line: str
    base: str
    head: str
    example: list[int] = dataclasses.field(default_factory=list)

    @property
    def facts(self) -> bool:
        """Whether an answer is scored together with facts about its image."""
        return PLACE in self.prompt

    def filled(self, facts: Sequence[str] | None) -> str:
        """The prompt with these facts in their order. ValueError where it has no place for them, or none are given."""
        if self.facts and not facts:
            raise ValueError("the reward model was trained with facts about the image, and there are none: give them")
        if not self.facts and facts:
            raise ValueError("the reward model was trained without facts, and some are given: leave them out")
        lines = "".join(self.fact_line.replace("{}", fact) for fact in facts or ())
        return self.prompt.replace(PLACE, self.facts_intro + lines)


class RewardHead(torch.nn.Linear):
    """hidden → 1. It computes where and as its own weights are, whatever the model is kept in."""

    def __init__(self, hidden: int):
        super().__init__(hidden, 1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden.to(self.weight))


@dataclass(frozen=True)
class RewardModel:
    """A reward model that is ready to score (`inference.reward`)."""

    vlm: VLM
    head: RewardHead
    format: RewardFormat


def reward_text(
    vlm: Reader, form: RewardFormat, question: Conversation, answer: str, facts: Sequence[str] | None, image: bool
) -> str:
    """The whole text at whose last token an answer's reward is read.

    Raises UnfitText for texts that hold special tokens, ValueError for what `RewardFormat.filled` refuses.
    """
    for fact in facts or ():
        check_text(vlm, fact)
    return prompt_text(vlm, question, image=image, answer=answer) + form.filled(facts)


def encode_answers(
    vlm: Reader,
    form: RewardFormat,
    image: Image.Image | None,
    question: Conversation,
    answers: Sequence[str],
    facts: Sequence[str] | None = None,
) -> EncodedPrompt:
    """Tokenize answers to one question as a reward model reads them: `rows` are whole texts, and `answer_starts` their
    lengths, for what is asked for is at the last token. UnfitText for a row longer than the context."""
    texts = [reward_text(vlm, form, question, answer, facts, image is not None) for answer in answers]
    rows, inputs = tokenize(vlm, image, texts)
    check_length(vlm, max(map(len, rows)), "image, question, answer and reward prompt are")
    shared = min(common_length(rows[0], row) for row in rows)
    return EncodedPrompt(rows[0][:shared], rows, [len(row) for row in rows], inputs)


def example_ids(vlm: Reader, form: RewardFormat) -> list[int]:
    """The tokens of `EXAMPLE`; an image is the one placeholder that the tokenizer makes of it."""
    question, answer, facts = EXAMPLE
    text = reward_text(vlm, form, question, answer, facts if form.facts else None, vlm.sees_images)
    return vlm.tokenizer(text, add_special_tokens=special_tokens_needed(vlm, text))["input_ids"]


def write_reward_files(folder: Path, head: RewardHead, form: RewardFormat, vlm: Reader) -> None:
    """Make the checkpoint in `folder` a reward model; `vlm` reads what it will read."""
    save_file({name: weight.contiguous() for name, weight in head.state_dict().items()}, folder / HEAD)
    form = dataclasses.replace(form, example=example_ids(vlm, form))
    write_atomic(folder / FORMAT, to_json(form, indent=2) + "\n")


def load_reward_model(path: str, **options: Any) -> RewardModel:
    """Load a reward model; `options` are those of `vlm.loading.load_vlm`.

    Raises, in one line: FileNotFoundError for a checkpoint that is no reward model, ValueError for a `reward.json` that
    cannot be read or whose example this tokenizer and template make other tokens of.
    """
    folder = find_checkpoint(path, options.get("revision"))[0]
    form = read_format(folder, path)
    vlm = load_vlm(path, **options)
    check_example(vlm, form)
    head = RewardHead(vlm.network.get_decoder().config.hidden_size)
    try:
        head.load_state_dict(load_file(folder / HEAD))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path}: {HEAD} does not fit it: {' '.join(str(error).split())}") from None
    head.to(vlm.network.get_output_embeddings().weight.device).eval().requires_grad_(False)
    return RewardModel(vlm, head, form)


def read_format(folder: Path, path: str) -> RewardFormat:
    """The format in a checkpoint's folder; `path` is how messages name it."""
    for name in (FORMAT, HEAD):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{path} is no reward model: it has no {name}")
    content = json_object((folder / FORMAT).read_text(encoding="utf-8"))
    names = [field.name for field in dataclasses.fields(RewardFormat)]
    if set(content) != set(names):
        found = ", ".join(content) or "no JSON object"
        raise ValueError(f"{path}: {FORMAT} has {found}, expected {', '.join(names)}")
    return RewardFormat(**content)


def check_example(vlm: Reader, form: RewardFormat) -> None:
    """Raise ValueError, with the first place, where the example's tokens are not those of `form`."""
    found = example_ids(vlm, form)
    if found == form.example:
        return
    place = common_length(found, form.example)
    was, now = (vlm.tokenizer.decode(ids[place : place + 8]) for ids in (form.example, found))
    raise ValueError(
        f"{vlm.name}: its reward prompt is not the one it was trained with: at token {place} {FORMAT} has {was!r}, its "
        f"prompt, tokenizer and chat template now make {now!r}; its scores would mean nothing: bring the files back"
    )
