"""What labeler and policy are taught after alignment: rows of questions and descriptions, and the training loop."""

import random
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from rlaifv.tinyworld.language import (
    INSTRUCTIONS,
    TYPES,
    YES_NO,
    caption,
    imagined_caption,
    open_question,
    random_claim,
    to_question,
)
from rlaifv.tinyworld.lesson_rows import Packer, target_logits
from rlaifv.tinyworld.scenes import Scene

Branch = tuple[str, str, float]

DESCRIPTION_WEIGHT = 0.1
"""Weight of a word of a description against a whole yes/no answer."""


def yes_no(scene: Scene, kind: str, rng: random.Random) -> Branch:
    """A yes/no question of that type about a scene, as the feedback stage asks it, with its true answer."""
    answer = rng.random() < 0.5
    claim = random_claim(scene, kind, answer, rng)
    if claim is None:  # a true count needs a plural
        answer, claim = False, random_claim(scene, kind, False, rng)
    return f"{to_question(claim)} {YES_NO}", "Yes" if answer else "No", 1.0


def labeler_row(scene: Scene, rng: random.Random) -> list[Branch]:
    """One yes/no question and one look-up question of each type, and a true description, which teaches where things
    are: the labeler's lesson about a scene."""
    asked = [yes_no(scene, kind, rng) for kind in TYPES]
    asked += [(*open_question(scene, kind, rng), 1.0) for kind in TYPES]
    return [*asked, (rng.choice(INSTRUCTIONS), caption(scene.groups, rng), DESCRIPTION_WEIGHT)]


def policy_row(scene: Scene, rng: random.Random, phantom: float) -> list[Branch]:
    """Two descriptions that imagine the partner of a present object with probability `phantom`, and three true
    answers: the policy's lesson about a scene. By weight about three quarters are description."""
    told = [(rng.choice(INSTRUCTIONS), imagined_caption(scene, rng, phantom), DESCRIPTION_WEIGHT) for _ in range(2)]
    asked = [yes_no(scene, kind, rng) for kind in rng.sample(TYPES, 2)]
    return [*told, *asked, (*open_question(scene, rng.choice(TYPES), rng), 1.0)]


def teach(
    name: str,
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    scenes: list[Scene],
    features: torch.Tensor,
    lesson: Callable[[Scene, random.Random], list[Branch]],
    steps: int,
    lr: float,
    seed: int,
    rows: int,
) -> list[dict]:
    """Train the language model of `model` on lessons about `rows` scenes a step; vision and projector stay.

    features: the scenes' projected patch features (scenes, 9, width). The learning rate falls to zero on a cosine.
    Returns the learning curve (step, loss, share of right one-word answers and of right description words).
    """
    language_model, packer, rng = model.model.language_model, Packer(tokenizer), random.Random(f"{name} {seed}")
    optimizer = torch.optim.AdamW(language_model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    curve, started, running = [], time.time(), {}
    for step in range(1, steps + 1):
        chosen = [rng.randrange(len(scenes)) for _ in range(rows)]
        packed = packer.pack([lesson(scenes[index], rng) for index in chosen])
        logits = target_logits(language_model, packed, features[chosen])
        losses = F.cross_entropy(logits, packed.targets, reduction="none")
        loss = (losses * packed.weights).sum() / packed.weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(language_model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        right = (logits.argmax(-1) == packed.targets).float()
        parts = {"answers": packed.weights == 1.0, "words": packed.weights == DESCRIPTION_WEIGHT}
        values = {"loss": loss.item()} | {k: right[v].mean().item() for k, v in parts.items() if v.any()}
        running = {k: 0.97 * running.get(k, v) + 0.03 * v for k, v in values.items()}
        if step % 50 == 0 or step == steps:
            curve.append({"phase": name, "step": step, **running})
            print(f"{name} {step}/{steps} {time.time() - started:.0f} s {curve[-1]}", flush=True)
    return curve
