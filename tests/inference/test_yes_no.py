"""P(yes) and P(no) come from the tokens that begin an answer in the labeler's own chat."""

from dataclasses import replace

import pytest
import torch
from architectures import BUILDERS, build, build_tokenizer, picture, template
from tokenizers import pre_tokenizers

from rlaifv.inference.logprobs import next_token_logprobs
from rlaifv.inference.yes_no import judge, judge_many, yes_no_ids
from rlaifv.vlm.chat_format import encode_questions

QUESTIONS = ["Is there a cat? Please answer yes or no.", "Is there a blue kite on the left? Please answer yes or no."]


@pytest.mark.parametrize("name", BUILDERS)
def test_the_ids_are_those_of_the_words_after_the_assistant_prefix(name):
    vlm = build(name)
    ids = yes_no_ids(vlm)
    space = " " if "ASSISTANT:" in vlm.tokenizer.chat_template or "Assistant:" in vlm.tokenizer.chat_template else ""
    assert {vlm.tokenizer.convert_ids_to_tokens(i) for i in ids.yes} == {space + "Yes", space + "yes"}
    assert {vlm.tokenizer.convert_ids_to_tokens(i) for i in ids.no} == {space + "No", space + "no"}


def test_probabilities_are_sums_over_the_yes_and_the_no_ids():
    vlm = build("llava")
    ids, image = yes_no_ids(vlm), picture()
    every = next_token_logprobs(vlm, [encode_questions(vlm, image, QUESTIONS)], shared=False)[0].exp()
    for row, (p_yes, p_no) in zip(every, judge(vlm, image, QUESTIONS), strict=True):
        assert p_yes == pytest.approx(float(row[list(ids.yes)].sum()), rel=1e-4)
        assert p_no == pytest.approx(float(row[list(ids.no)].sum()), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "cap", "shared"), [("llava", None, True), ("llava", None, False), ("gemma3", 5.0, True)]
)
def test_in_bfloat16_yes_and_no_are_as_exact_relative_to_each_other_as_in_float32(name, cap, shared):
    vlm = build(name)
    vlm.model.config.get_text_config().final_logit_softcapping = cap
    vlm.model.to(torch.bfloat16)
    head, ids, hidden = vlm.model.get_output_embeddings(), yes_no_ids(vlm), []
    hook = head.register_forward_pre_hook(lambda _head, args: hidden.append(args[0].flatten(0, -2)[-1:]))
    yes, no = ids.yes[0], ids.no[0]
    ((found,),) = next_token_logprobs(vlm, [encode_questions(vlm, picture(), QUESTIONS[:1])], [yes, no], shared=shared)
    hook.remove()
    logits = hidden[-1].double() @ head.weight[[yes, no]].double().T
    exact = torch.tanh(logits / cap) * cap if cap else logits
    assert float(found[0] - found[1]) == pytest.approx(float(exact[0, 0] - exact[0, 1]), abs=1e-5)
    assert not head._forward_hooks, "the model is as it was"


def test_each_distinct_question_is_asked_once_and_answers_fan_out_in_order(monkeypatch):
    vlm, asked = build("llava"), []
    real = next_token_logprobs

    def counting(vlm, encoded, ids):
        asked.append([len(e.rows) for e in encoded])
        return real(vlm, encoded, ids)

    monkeypatch.setattr("rlaifv.inference.yes_no.next_token_logprobs", counting)
    a, b = QUESTIONS
    first, second, none = judge_many(vlm, [(picture(), [a, b, a, a]), (picture(seed=2), [b]), (picture(), [])])
    assert asked == [[2, 1, 0]]
    assert first[0] == first[2] == first[3] != first[1]
    assert len(second) == 1 and none == []


def test_a_tokenizer_without_single_yes_and_no_tokens_is_refused():
    vlm = build("llava")
    letters = build_tokenizer({"image_token": "<image>"}, template("<image>\n"))
    letters.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    with pytest.raises(ValueError, match="single first answer token"):
        yes_no_ids(replace(vlm, tokenizer=letters))


def test_a_token_that_begins_both_answers_is_refused(monkeypatch):
    vlm = build("llava")
    monkeypatch.setattr("rlaifv.inference.yes_no.first_answer_token", lambda vlm, word: 7)
    with pytest.raises(ValueError, match="begins both yes and no"):
        yes_no_ids(vlm)


def test_an_even_answer_is_a_tie():
    vlm = build("llava")
    head = vlm.model.get_output_embeddings()
    ids = yes_no_ids(vlm)
    with torch.no_grad():
        head.weight[list(ids.no)] = head.weight[list(ids.yes)]
    ((p_yes, p_no),) = judge(vlm, picture(), QUESTIONS[:1])
    assert not p_yes > p_no, "a tie is a rejected claim"
