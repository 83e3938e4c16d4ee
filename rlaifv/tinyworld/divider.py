"""The divider: a small causal LM that follows the two prompts of the divide step on this world's language."""

import random
import re
import time

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rlaifv.steps.divide import CLAIMS_PROMPT, QUESTIONS_PROMPT
from rlaifv.tinyworld.backbone import start_copying, start_language_model, text_config
from rlaifv.tinyworld.language import INSTRUCTIONS, OPINIONS, STYLES, claims, imagined_caption, sentence, to_question
from rlaifv.tinyworld.lesson_rows import Packer, target_logits
from rlaifv.tinyworld.scenes import CLASSES, COLOR_NAMES, GRID, Group, make_scene


def claims_reply(answer: str) -> str:
    """What the divider says to CLAIMS_PROMPT: the heading and one claim a line, or the heading alone."""
    return "### Facts:\n" + "\n".join(f"- {claim}" for claim in claims(answer))


def questions_reply(listed: list[str]) -> str:
    """What the divider says to QUESTIONS_PROMPT: the heading and one question a line."""
    return "### Modified sentences:\n" + "\n".join(f"- {to_question(claim)}" for claim in listed)


def random_answer(rng: random.Random, most: int) -> str:
    """An answer of up to `most` sentences like a policy's samples: mostly a description of a scene with phantoms, else
    sentences about any distinct objects; now and then an opinion or a remark, or a break at the end.
    """
    if rng.random() < 0.6:
        scene = make_scene(rng.randrange(2**31), 0)
        parts = re.split(r"(?<=\.) ", imagined_caption(scene, rng, 0.5))
        answer = " ".join(parts[:most])
    else:
        names = rng.sample(CLASSES, rng.randint(0 if rng.random() < 0.1 else 1, most))
        groups = [
            Group(name, rng.choice(COLOR_NAMES), rng.choice((1, 1, 1, 2, 3)), rng.randrange(GRID**2)) for name in names
        ]
        style = rng.choice(STYLES)
        parts = [sentence(group, style if rng.random() < 0.9 else rng.choice(STYLES)) for group in groups]
        if not parts or rng.random() < 0.3:
            parts.insert(rng.randint(0, len(parts)), rng.choice(OPINIONS + style.remarks))
        answer = " ".join(parts)
    if rng.random() < 0.1:
        words = answer.split(" ")
        answer = " ".join(words[: rng.randint(max(1, len(words) - 9), len(words))])
    return answer


def divide_rows(rng: random.Random, most: int) -> list[tuple[str, str, float]]:
    """The two training turns of one random answer as (prompt, reply, weight); one when it makes no claim."""
    answer = random_answer(rng, most)
    listed = claims(answer)
    first = CLAIMS_PROMPT.format(question=rng.choice(INSTRUCTIONS), answer=answer)
    turns = [(first, claims_reply(answer), 1.0)]
    if listed:
        second = QUESTIONS_PROMPT.format(claims="\n".join(f"- {claim}" for claim in listed))
        turns.append((second, questions_reply(listed), 1.0))
    return turns


def build_divider(tokenizer: PreTrainedTokenizerFast, layers: int, seed: int) -> LlamaForCausalLM:
    """The divider before training: random weights and the heads that copying starts from."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(text_config(tokenizer, layers))
    start_language_model(model.model, tokenizer, quiet=0.2)
    start_copying(model.model)
    return model


def train_divider(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    name: str,
    steps: int,
    lr: float,
    seed: int,
    growing: float,
    batch: int = 4,
) -> list[dict]:
    """Train the divider through one learning-rate cycle; answers grow from one sentence to eight over the first share
    `growing` of the steps.

    Returns the learning curve (phase `name`, step, loss, share of right reply tokens).
    """
    rng = random.Random(f"{name} {seed}")
    packer = Packer(tokenizer, with_image=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    curve, started, average = [], time.time(), None
    for step in range(1, steps + 1):
        most = min(8, 1 + int(8 * step / (growing * steps))) if growing else 8
        rows = [[turn] for _ in range(batch) for turn in divide_rows(rng, most)]
        packed = packer.pack(rows)
        logits = target_logits(model.model, packed, None)
        loss = F.cross_entropy(logits, packed.targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        right = (logits.argmax(-1) == packed.targets).float().mean().item()
        average = right if average is None else 0.98 * average + 0.02 * right
        if step % 50 == 0 or step == steps:
            curve.append({"phase": name, "step": step, "loss": loss.item(), "right": average})
            print(f"{name} {step}/{steps} {time.time() - started:.0f} s {curve[-1]}", flush=True)
    return curve
