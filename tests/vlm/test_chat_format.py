"""The text that training and scoring read is the template's own, with exactly one end token after the answer."""

import re
from dataclasses import replace

import pytest
from architectures import BUILDERS, build, build_tokenizer, picture, template
from hypothesis import given
from hypothesis import strategies as st

from rlaifv.vlm.chat_format import UnfitText, control_ids, encode, encode_questions, folded_prompt, prompt_text
from rlaifv.vlm.loading import VLM


def chat(end: str, also_ends: list[str]) -> VLM:
    """A text-only model whose template ends a turn with `end`; `also_ends` end an answer beside `</s>`."""
    tokenizer = build_tokenizer({"turn_end": end}, template("", "user\n", end + "\\n", "assistant\n", ""))
    ids = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(also_ends)]
    return replace(build("llama"), tokenizer=tokenizer, eos_token_ids=ids)


@pytest.mark.parametrize("answer", ["A dog.", "end", "user", "_"])
def test_an_answer_is_found_after_the_prompt_also_where_the_template_holds_its_letters(answer):
    text = prompt_text(chat("<|im_end|>", ["<|im_end|>"]), "What is it?", answer=answer)
    assert text == f"user\nWhat is it?<|im_end|>\nassistant\n{answer}<|im_end|>"


def test_an_answer_ends_with_the_token_that_ends_a_turn_when_the_model_stops_there():
    stops_there, does_not = chat("<end_of_turn>", ["<end_of_turn>"]), chat("<end_of_turn>", [])
    assert prompt_text(stops_there, "Why?", answer="A dog.").endswith("A dog.<end_of_turn>")
    assert prompt_text(does_not, "Why?", answer="A dog.").endswith("A dog.</s>")


@pytest.mark.parametrize("name", BUILDERS)
def test_no_text_of_a_user_brings_an_image_or_ends_a_turn(name):
    vlm = build(name)
    for token in (vlm.processor.image_token, "</s>", "<pad>"):
        text = f"Is {token} there?"
        with pytest.raises(
            UnfitText, match=f"holds {re.escape(repr(token))}, which the tokenizer reads as a token of its own"
        ):
            encode_questions(vlm, picture(), ["Is there a cat?", text])
        with pytest.raises(UnfitText, match="take it out"):
            encode(vlm, picture(), "Is there a cat?", ["A dog.", text])
    encode(vlm, picture(), "Is <unk> there, <think> or |image| </ s >?", ["<unk>"])


text_only = chat("<|im_end|>", ["<|im_end|>"])
PIECES = ["<|im_end|>", "</s>", "<pad>", "<s>", "<unk>", "<image>", "<", "/s>", "|im_end|", ">", " ", "a", "dog", "\n"]


@given(pieces=st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=6))
def test_a_text_is_refused_or_has_the_templates_control_tokens_and_no_other(pieces):
    text, control = "".join(pieces), control_ids(text_only.tokenizer)
    try:
        (ids,) = encode_questions(text_only, None, [text]).rows
    except UnfitText:
        assert any(token in text for token in ("<|im_end|>", "</s>", "<pad>", "<s>"))
    else:
        (plain,) = encode_questions(text_only, None, ["a"]).rows
        assert [i for i in ids if i in control] == [i for i in plain if i in control]


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused_with_the_numbers():
    vlm = build("llava")
    (row,) = encode_questions(vlm, picture(), ["a"]).rows
    limit = vlm.context
    encode_questions(vlm, picture(), ["a"], room=limit - len(row))
    with pytest.raises(UnfitText, match=f"are {limit + 1} tokens, the context holds {limit}"):
        encode_questions(vlm, picture(), ["a"], room=limit - len(row) + 1)
    with pytest.raises(UnfitText, match=r"'dog dog .* is \d+ tokens, the context holds"):
        encode_questions(vlm, picture(), ["dog " * limit])


@pytest.mark.parametrize(
    ("name", "prompt", "image_tokens"),
    [
        ("llava", "USER: <image>×9⏎Is there a cat? ASSISTANT:", 9),
        ("qwen3-vl", "user⏎<|vision_start|><|image_pad|>×48<|vision_end|>Is there a cat?⏎assistant⏎", 48),
        (
            "idefics3",
            "User:<fake_token_around_image><row_1_col_1><image>×4<fake_token_around_image><row_1_col_2><image>×4⏎"
            "<fake_token_around_image><row_2_col_1><image>×4<fake_token_around_image><row_2_col_2><image>×4⏎⏎"
            "<fake_token_around_image><global-img><image>×4<fake_token_around_image>Is there a cat?"
            "<end_of_utterance>⏎Assistant:",
            20,
        ),
    ],
)
def test_a_folded_prompt_is_what_the_model_gets_on_one_line(name, prompt, image_tokens):
    assert folded_prompt(build(name), picture(64, 48), "Is there a cat?") == (prompt, image_tokens)


def test_a_prompt_without_an_image_has_nothing_folded():
    assert folded_prompt(build("llama"), None, "Is there\na cat?") == ("USER: Is there⏎a cat? ASSISTANT:", 0)
