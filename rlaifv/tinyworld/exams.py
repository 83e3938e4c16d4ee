"""Measure the embedded checkpoints on scenes that they have not seen: claims, descriptions, divided answers."""

import random
import re

import torch
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from rlaifv.steps.divide import CLAIMS_PROMPT, QUESTIONS_PROMPT
from rlaifv.tinyworld.divider import claims_reply, questions_reply
from rlaifv.tinyworld.language import INSTRUCTIONS, PLURALS, TYPES, YES_NO, claims, random_claim, to_question
from rlaifv.tinyworld.lesson_rows import Packer, target_logits
from rlaifv.tinyworld.scenes import CLASSES, Scene


@torch.no_grad()
def answer_accuracy(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    scenes: list[Scene],
    features: torch.Tensor,
    seed: int = 0,
) -> dict[str, float]:
    """Share of right yes/no answers per claim type, over one true and one false claim of each type per scene."""
    packer, rng = Packer(tokenizer), random.Random(f"exam {seed}")
    yes, no = tokenizer.convert_tokens_to_ids([" Yes", " No"])
    right = {kind: [] for kind in TYPES}
    for start in range(0, len(scenes), 50):
        rows, asked = [], []
        for scene in scenes[start : start + 50]:
            both = [(kind, answer, random_claim(scene, kind, answer, rng)) for kind in TYPES for answer in (1, 0)]
            both = [(kind, answer, claim) for kind, answer, claim in both if claim]
            rows.append([(f"{to_question(claim)} {YES_NO}", "Yes", 1.0) for _, _, claim in both])
            asked += [(kind, answer) for kind, answer, _ in both]
        logits = target_logits(model.model.language_model, packer.pack(rows), features[start : start + 50])[::2]
        for (kind, answer), says_yes in zip(asked, (logits[:, yes] > logits[:, no]).tolist(), strict=True):
            right[kind].append(says_yes == bool(answer))
    return {kind: sum(values) / len(values) for kind, values in right.items()}


@torch.no_grad()
def describe(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pixels: torch.Tensor,
    questions: list[str],
    temperature: float = 0.0,
    batch: int = 100,
) -> list[str]:
    """Answers of a policy to one question per image: greedy, or sampled (top-k 50) at a temperature above 0."""
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
        ).replace("<image>", "<image>" * 9)
        for question in questions
    ]
    answers = []
    for start in range(0, len(prompts), batch):
        inputs = processor.tokenizer(
            prompts[start : start + batch], padding=True, padding_side="left", return_tensors="pt"
        )
        out = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            pixel_values=pixels[start : start + batch],
            max_new_tokens=128,
            do_sample=temperature > 0,
            temperature=temperature or None,
            top_k=50 if temperature > 0 else None,
        )
        new = out[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.tokenizer.batch_decode(new, skip_special_tokens=True)]
    return answers


def hallucination(answers: list[str], scenes: list[Scene]) -> dict[str, float]:
    """Response and mention hallucination rates (CHAIRs and CHAIRi over distinct classes) and recall."""
    nouns = {form: name for name in CLASSES for form in (name, PLURALS[name])}
    flagged = mentioned = absent = found = present = 0
    for answer, scene in zip(answers, scenes, strict=True):
        said = {nouns[word] for word in re.findall(r"[a-z]+", answer) if word in nouns}
        shown = {group.name for group in scene.groups}
        flagged += bool(said - shown)
        mentioned, absent = mentioned + len(said), absent + len(said - shown)
        found, present = found + len(said & shown), present + len(shown)
    return {
        "response": flagged / len(answers),
        "mention": absent / max(mentioned, 1),
        "recall": found / present,
    }


@torch.no_grad()
def reply(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], batch: int = 32
) -> list[str]:
    """Greedy replies of the divider to user prompts."""
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    replies = []
    for start in range(0, len(texts), batch):
        inputs = tokenizer(texts[start : start + batch], padding=True, padding_side="left", return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=400, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        replies += [text.removeprefix(" ") for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return replies


def division_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, answers: list[str]
) -> dict[str, float]:
    """Share of answers whose claims ("claims") and whose questions ("questions", from right claims) come out exactly
    right, and the share of right lines of each ("claim_lines", "question_lines")."""
    first = [
        CLAIMS_PROMPT.format(question=INSTRUCTIONS[index % len(INSTRUCTIONS)], answer=answer)
        for index, answer in enumerate(answers)
    ]
    listed = [found for found in map(claims, answers) if found]
    second = [QUESTIONS_PROMPT.format(claims="\n".join(f"- {claim}" for claim in found)) for found in listed]
    split, split_lines = _exactness(reply(model, tokenizer, first), [claims_reply(answer) for answer in answers])
    turned, turned_lines = _exactness(reply(model, tokenizer, second), [questions_reply(found) for found in listed])
    return {"claims": split, "questions": turned, "claim_lines": split_lines, "question_lines": turned_lines}


def _exactness(told: list[str], wanted: list[str]) -> tuple[float, float]:
    """Shares of equal texts and of equal lines (at the same place, headings left out)."""
    pairs = [(text.split("\n")[1:], target.split("\n")[1:]) for text, target in zip(told, wanted, strict=True)]
    lines = sum(a == b for text, target in pairs for a, b in zip(text, target, strict=False))
    same = sum(text == target for text, target in zip(told, wanted, strict=True))
    return same / max(len(told), 1), lines / max(sum(len(target) for _, target in pairs), 1)
