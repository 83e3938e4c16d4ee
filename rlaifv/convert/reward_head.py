"""LLaVA-RLHF's reward model: its SFT model with the adapter's sum, and the vector that reads a score."""

from pathlib import Path

from rlaifv.convert.layouts import HEAD, Layout
from rlaifv.convert.weights import tensors
from rlaifv.vlm.checkpoint import fingerprint_checkpoint
from rlaifv.vlm.loading import load_reader
from rlaifv.vlm.reward_format import PLACE, RewardFormat, RewardHead, write_reward_files

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
"""What a reward model's conversation begins with (`vicuna_v1`)."""

LINE = "  - {}\n"
"""One of the facts."""


def read_format(prompt: Path, facts: Path | None, base: str) -> RewardFormat:
    """How the reward model is asked.

    Args:
        prompt: the published file of the prompt, which is not part of this repository.
        facts: a file with the sentence that introduces the facts, where the prompt has a place for them.
        base: the fingerprint of the model that the adapter was trained on.
    """
    text = prompt.read_text(encoding="utf-8").strip()
    if (PLACE in text) != (facts is not None):
        needed = f"has a place for facts ({PLACE})" if facts is None else "has no place for facts"
        way_out = "give the sentence that introduces them with --facts" if facts is None else "leave --facts out"
        raise ValueError(f"{prompt} {needed}: {way_out}")
    intro = facts.read_text(encoding="utf-8").strip() + "\n" if facts else ""
    # two spaces: the original's text behind </s> begins with a ▁, and one space more
    return RewardFormat("  " + text, intro, LINE if facts else "{}", base, "released")


def write_head(layout: Layout, form: RewardFormat, out: Path) -> None:
    """Make the checkpoint in `out` a reward model."""
    weights = dict(tensors(layout.adapter / HEAD))
    head = RewardHead(weights["weight"].shape[1])
    head.load_state_dict(weights)
    write_reward_files(out, head, form, load_reader(str(out)))


def base_fingerprint(layout: Layout) -> str:
    return fingerprint_checkpoint(str(layout.base))
