"""P(yes) and P(no): how a labeler answers a yes/no question, read off its first answer token (RLAIF-V, section 2.2).

p_yes = P("Yes") + P("yes") and p_no = P("No") + P("no"). "Yes", " Yes" and "▁Yes" are different tokens, and which of
them a model starts its answer with depends on its tokenizer and chat template: the ids are found by tokenizing the
word in its place, after the template's assistant prefix.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from rlaifv.inference.logprobs import next_token_logprobs
from rlaifv.inference.served import NO_WORDS, YES_WORDS, Served, judge_served
from rlaifv.vlm.chat_format import UnfitText, encode_questions, prompt_text, special_tokens_needed, unfit
from rlaifv.vlm.loading import VLM

PROBE = "Is this a question? Please answer yes or no."


@dataclass(frozen=True)
class YesNoIds:
    """Token ids that begin a yes and a no answer, disjoint and in ascending order."""

    yes: tuple[int, ...]
    no: tuple[int, ...]


def yes_no_ids(vlm: VLM) -> YesNoIds:
    """The ids of "Yes", "yes", "No", "no" as the first token of an answer in this model's chat.

    A word that takes several tokens there does not count, for its first piece would stand for other answers too.
    Raises ValueError when no word for yes or none for no is a single token, or one token would mean both.
    """
    yes = {i for word in YES_WORDS if (i := first_answer_token(vlm, word)) is not None}
    no = {i for word in NO_WORDS if (i := first_answer_token(vlm, word)) is not None}
    for words, ids in ((YES_WORDS, yes), (NO_WORDS, no)):
        if not ids:
            raise ValueError(
                f"{vlm.name} cannot be the labeler: its tokenizer makes none of {', '.join(map(repr, words))} a single "
                "first answer token, so P(yes) and P(no) cannot be read; use another labeler"
            )
    if both := yes & no:
        tokens = ", ".join(repr(vlm.tokenizer.decode([i])) for i in sorted(both))
        raise ValueError(f"{vlm.name} cannot be the labeler: its first token {tokens} begins both yes and no")
    return YesNoIds(tuple(sorted(yes)), tuple(sorted(no)))


def first_answer_token(vlm: VLM, word: str) -> int | None:
    """Id of `word` where an answer begins, or None when it is not exactly one known token there.

    Where the template puts a space before the answer (LLaVA: "ASSISTANT: Yes"), the model may draw the space into
    the word's token, so the word is tried as the template renders it.
    """
    image = vlm.sees_images
    prompt = prompt_text(vlm, PROBE, image=image)
    answered = prompt_text(vlm, PROBE, image=image, answer=word, prompt=prompt)
    special = special_tokens_needed(vlm, prompt)
    before, after = (vlm.tokenizer(text, add_special_tokens=special)["input_ids"] for text in (prompt, answered))
    *beginning, token, _end = after
    return token if beginning == before and token != vlm.tokenizer.unk_token_id else None


def judge_many(
    vlm: VLM | Served, items: Sequence[tuple[Image.Image | str, Sequence[str]]]
) -> list[list[tuple[float, float]]]:
    """Ask several images their questions, each image and each distinct question once.

    Args:
        vlm: the labeler, in this process or behind a server.
        items: (image, questions) pairs, the images as `roles.look` gives them; the questions end with the suffix that
            asks for yes or no.

    Returns:
        For each item, (p_yes, p_no) per question, in order. A claim is accepted iff p_yes > p_no: a tie is rejected.
    """
    if isinstance(vlm, Served):
        return [[fit(answer) for answer in row] for row in judge_served(vlm, items)]
    ids = yes_no_ids(vlm)
    distinct = [list(dict.fromkeys(questions)) for _, questions in items]
    encoded = [encode_questions(vlm, image, asked) for (image, _), asked in zip(items, distinct, strict=True)]
    answers = []
    logprobs = next_token_logprobs(vlm, encoded, [*ids.yes, *ids.no])
    for (_, questions), asked, table in zip(items, distinct, logprobs, strict=True):
        p = table.double().exp()
        p_yes, p_no = p[:, : len(ids.yes)].sum(-1).tolist(), p[:, len(ids.yes) :].sum(-1).tolist()
        answer_of = dict(zip(asked, zip(p_yes, p_no, strict=True), strict=True))
        answers.append([answer_of[question] for question in questions])
    return answers


def judge_fit(
    vlm: VLM | Served, items: Sequence[tuple[Image.Image | str, Sequence[str]]]
) -> list[list[tuple[float, float] | UnfitText]]:
    """`judge_many`, with the reason in place of the answer to a question that cannot be put to this model."""
    if isinstance(vlm, Served):
        return judge_served(vlm, items)
    try:
        return judge_many(vlm, items)
    except UnfitText:  # seldom, so only now is each question tried alone
        reasons = [[unfit(vlm, image, question) for question in questions] for image, questions in items]
    fit = [
        (image, [question for question, reason in zip(questions, row, strict=True) if not reason])
        for (image, questions), row in zip(items, reasons, strict=True)
    ]
    judged = map(iter, judge_many(vlm, fit))
    return [[reason or next(answers) for reason in row] for row, answers in zip(reasons, judged, strict=True)]


def fit(answer: tuple[float, float] | UnfitText) -> tuple[float, float]:
    """An answer, where there is one; raises the reason otherwise."""
    if isinstance(answer, UnfitText):
        raise answer
    return answer


def judge(vlm: VLM, image: Image.Image, questions: Sequence[str]) -> list[tuple[float, float]]:
    """`judge_many` for one image."""
    return judge_many(vlm, [(image, questions)])[0]
