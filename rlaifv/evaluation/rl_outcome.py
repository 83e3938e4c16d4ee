"""DPO and reinforcement learning side by side: what each made of the same base model, measured alike."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rlaifv.evaluation.feedback_truth import interval
from rlaifv.evaluation.hallucination import Split
from rlaifv.inference.sampling import Decoding, Prompt, generate_batch, uniforms
from rlaifv.params import RlooParams
from rlaifv.records import batched
from rlaifv.steps.self_feedback import Asked, answer_logps
from rlaifv.vlm.images import open_image
from rlaifv.vlm.loading import VLM


def sample_answers(policy: VLM, reference: VLM, split: Split, params: RlooParams, seed: int) -> list[dict]:
    """One answer, sampled as in training, to each of the first `params.compared` instructions: rows as
    `hallucination.model_answers` gives them, with `nats`, log π/π_ref of the answer, whose mean estimates KL(π‖π_ref).
    """
    rows, length = [], params.max_new_tokens
    for chunk in batched(split.instructions[: params.compared], 50):
        images = [open_image(split.image_root / i.image_path) for i in chunk]
        streams = [uniforms(seed, f"compare/{i.id}", 0, length)[np.newaxis] for i in chunk]
        prompts = [Prompt(image, i.question) for image, i in zip(images, chunk, strict=True)]
        drawn = generate_batch(policy, prompts, streams, Decoding(params.temperature, 0, 1.0, length))
        asked = [
            Asked(image, i.question, [answer.text.strip()], [answer.finish_reason == "length"])
            for image, i, (answer,) in zip(images, chunk, drawn, strict=True)
        ]
        for i, item, (logps,) in zip(chunk, asked, answer_logps(policy, reference, asked), strict=True):
            row = {"id": i.id, "image": i.image_path, "question": i.question, "answer": item.answers[0]}
            rows.append(row | {"nats": logps.policy - logps.reference})
    return rows


def judged_hallucination(rows: Sequence[Mapping]) -> dict[str, object]:
    """The share of answers with a claim that the labeler rejects, of those with any claim, with its interval over
    images; `rows` are those of `claims.judged_claims`."""
    known = [row for row in rows if row["claims"]]
    return _share("judged", [any(c["p_yes"] <= c["p_no"] for c in row["claims"]) for row in known], known)


def false_answers(rows: Sequence[Mapping], truth: Callable[[str, str], int]) -> dict[str, object]:
    """The share of answers with a claim that is false, whatever it is about (object, number, color or place), with its
    interval over images; `truth` is `feedback_truth.known_truth`."""
    return _share("false", [truth(row["image"], row["answer"]) > 0 for row in rows], rows)


def _share(name: str, wrong: Sequence[bool], rows: Sequence[Mapping]) -> dict[str, object]:
    bounds = interval(np.array(wrong, float), [row["image"] for row in rows]) if rows else (0.0, 0.0)
    share = float(np.mean(wrong)) if rows else 0.0
    return {name: share, f"{name}_interval": bounds, f"{name}_n": len(rows)}


def dpo_tokens(
    prompt: float, instructions: int, answer: float, samples: int, pairs: int, pair: float, epochs: int
) -> float:
    """Tokens that a policy's weights meet in an iteration of DPO, a backward pass counted as two forward ones.

    Sampling reads a prompt of `prompt` tokens (image and all) once for its `samples` answers of `answer` tokens; a
    pair's answers have `pair` tokens behind one prompt, and pass once for the reference and three times an epoch.
    """
    return instructions * (prompt + samples * answer) + (1 + 3 * epochs) * pairs * (prompt + pair)


def rloo_tokens(prompt: float, steps: int, params: RlooParams, answer: float) -> float:
    """The same of `steps` steps of RLOO. Every answer passes behind its own prompt: once for its log-probs before the
    step, once for the reference's, and three times for the gradient."""
    drawn = params.prompts * (prompt + params.samples * answer)
    return steps * (drawn + 5 * params.prompts * params.samples * (prompt + answer))
