"""The text that training and scoring read is the template's own, with exactly one end token after the answer."""

from dataclasses import replace

import pytest
from architectures import build, build_tokenizer, template

from rlaifv.vlm.chat_format import prompt_text
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
