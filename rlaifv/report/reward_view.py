"""What the reward likes, in a notebook: an image's sampled answers in the order of their reward, token by token."""

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from rlaifv.records import Candidate, Instruction
from rlaifv.report.render import render
from rlaifv.steps.self_feedback import Asked, token_logps
from rlaifv.vlm.images import open_image
from rlaifv.vlm.loading import VLM

FULL_COLOR = 3.0
"""Nats at which the color of a token is full."""
END = "⏎"
"""How the end token is shown."""


def reward_page(
    policy: VLM, reference: VLM, instruction: Instruction, candidates: Sequence[Candidate], image: Path, shown: int = 8
) -> Markup:
    """HTML of one instruction: its `image` and the `shown` distinct answers among its `candidates` of the highest
    normalized reward, which is the log-ratio of the two models."""
    cut = {c.answer: c.finish_reason == "length" for c in candidates}
    asked = Asked(open_image(image), instruction.question, list(cut), list(cut.values()))
    rows = []
    for logps in token_logps(policy, reference, [asked])[0]:
        ratios = logps.policy - logps.reference
        tokens = list(zip(token_texts(policy, logps.ids), ratios.tolist(), strict=True))
        rows.append({"mean": ratios.mean().item(), "sum": ratios.sum().item(), "tokens": tokens})
    rows.sort(key=lambda row: -row["mean"])
    for place, row in enumerate(sorted(rows, key=lambda row: -row["sum"]), start=1):
        row["place"] = place
    return render("reward.html", instruction=instruction, image=image, rows=rows[:shown], full_color=FULL_COLOR)


def token_texts(vlm: VLM, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text of those before it."""
    texts = [vlm.tokenizer.decode(ids[:k], skip_special_tokens=True) for k in range(len(ids) + 1)]
    ends = [END if token == vlm.tokenizer.eos_token_id else "" for token in ids]
    return [after[len(before) :] + end for before, after, end in zip(texts, texts[1:], ends, strict=False)]
