"""Talking to a model about a picture: what comes in, what streams out, and one clear line when it cannot work."""

import io
import json
import re
import shutil
import sys

import numpy as np
import pytest
from architectures import BUILDERS, build
from architectures import picture as noise
from PIL import Image
from tiny_llava import picture, save_tiny_llava
from transformers import LlamaConfig, TextStreamer

import rlaifv.chat.conversation
from rlaifv.chat.__main__ import main
from rlaifv.chat.conversation import Chat, default_model, load_chat_model, read_image
from rlaifv.inference.decoding import beam_search, best_answers
from rlaifv.inference.sampling import Decoding, Generation, Prompt, generate_batch
from rlaifv.steps.self_feedback import Asked, answer_logps

QUESTION = "what is in the image ?"
GREEDY = Decoding(0, 0, 1.0, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    save_tiny_llava(folder / "policy", seed=1)
    save_tiny_llava(folder / "base", seed=2)
    LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(folder / "language_model")
    (folder / "cat.png").write_bytes(picture(5))
    return folder


@pytest.fixture(scope="module")
def policy(folder):
    return load_chat_model(str(folder / "policy"))


def chat(vlm, folder, **settings) -> Chat:
    return Chat(vlm, read_image(folder / "cat.png"), **{"max_new_tokens": 12, **settings})


class Pieces(TextStreamer):
    """Keeps what is streamed, piece by piece."""

    def __init__(self, vlm):
        super().__init__(vlm.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.pieces = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.append(text)


def run(capsys, *arguments: str) -> tuple[str, str]:
    main([str(a) for a in arguments])
    return capsys.readouterr()


def test_an_image_comes_as_path_bytes_or_pil_image(folder):
    data = picture(5)
    expected = Image.open(io.BytesIO(data)).convert("RGB").tobytes()
    path = folder / "cat.png"
    for source in (path, str(path), data, Image.open(path)):
        assert read_image(source).tobytes() == expected


def test_a_picture_whose_white_is_not_known_is_refused():
    with pytest.raises(ValueError, match="the image has 32-bit values"):
        read_image(Image.new("I", (8, 8)))


def test_streamed_pieces_are_the_answer_of_ask(policy, folder):
    spoken = Pieces(policy)
    answer = chat(policy, folder).ask(QUESTION, spoken)
    assert len(spoken.pieces) > 1
    assert "".join(spoken.pieces).strip() == answer == chat(policy, folder).ask(QUESTION)


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_every_supported_architecture_streams_and_remembers(name):
    vlm = build(name)
    if not vlm.sees_images:
        pytest.skip("a language model without images is refused by load_chat_model")
    talk = Chat(vlm, noise(), max_new_tokens=4)
    for question in ("Is there a cat in the image?", "What color?"):
        spoken = Pieces(vlm)
        answer = talk.ask(question, spoken)
        assert talk.history[-1] == (question, answer) and "".join(spoken.pieces).strip() == answer
    assert [question for question, _ in talk.history] == ["Is there a cat in the image?", "What color?"]


def test_a_later_turn_reads_the_turns_before_it_and_the_image_once(policy, folder):
    talk = chat(policy, folder)
    first = talk.ask(QUESTION)
    ids = talk.encode("describe it .").prompt_ids
    text = policy.tokenizer.decode(ids)
    assert text.count("USER") == 2 and QUESTION.split()[0] in text and first.split()[0] in text
    assert ids.count(policy.model.config.image_token_id) == 4


def test_sampling_depends_on_the_seed_alone(policy, folder):
    settings = {"temperature": 1.5, "max_new_tokens": 12}
    first, again, other = (chat(policy, folder, seed=seed, **settings).ask(QUESTION) for seed in (1, 1, 2))
    assert first == again != other


def test_best_of_n_says_the_sampled_answer_with_the_highest_reward(policy, folder):
    base = load_chat_model(str(folder / "base"))
    talk = chat(policy, folder, reference=base, temperature=1.0)
    best, answers = talk.ask_best(QUESTION, 6)
    assert best == answers[0][1] and answers == sorted(answers, reverse=True) and len(answers) > 1
    assert talk.history == [(QUESTION, best)]


def test_the_reward_of_a_sampled_answer_is_that_of_its_text(policy, folder):
    base = load_chat_model(str(folder / "base"))
    talk, texts = chat(policy, folder, reference=base), ["a red dog", "yes there is a kite ."]
    samples = [
        Generation(t, policy.tokenizer(t)["input_ids"], end) for t, end in zip(texts, ("stop", "length"), strict=True)
    ]
    scored = talk.score(talk.encode(QUESTION), samples)
    expected = answer_logps(policy, base, [Asked(talk.image, QUESTION, texts, [False, True])])[0]
    assert [s.tokens for s in scored] == [s.tokens for s in expected] == [4, 6]
    assert [s.reward(1.0) for s in scored] == pytest.approx([s.reward(1.0) for s in expected], abs=1e-4)


def test_the_command_prints_the_answer_and_nothing_else(capsys, folder):
    out, err = run(
        capsys, "--image", folder / "cat.png", "--question", QUESTION, "--model", folder / "policy",
        "--max-new-tokens", 8,
    )  # fmt: skip
    assert err == "" and len(out.splitlines()) == 1 and out == out.lstrip()


def test_without_a_question_lines_are_read_until_the_end(capsys, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n\ndescribe it .\n"))
    out, _ = run(capsys, "--image", folder / "cat.png", "--model", folder / "policy", "--max-new-tokens", 4)
    assert len(out.splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "no.png"], "image no.png does not exist"),
        (["--image", "."], "is a folder: give an image file"),
        (["--image", __file__], "cannot be decoded"),
        (["--image", "{}/cat.png", "--model", "{}/language_model"], "is a llama model that sees no images"),
        (["--image", "{}/cat.png", "--model", "{}"], "it is not a checkpoint"),
        (["--image", "{}/cat.png", "--model", "no/such/folder"], "no checkpoint at 'no/such/folder'"),
        (["--image", "{}/cat.png", "--model", "{}/policy", "--question", " "], "the question is empty"),
        (["--image", "{}/cat.png", "--model", "{}/policy", "--question", "Hi", "--temperature=-1"], "give 0 (greedy)"),
        (
            ["--image", "{}/cat.png", "--model", "{}/policy", "--reference", "{}/policy", "--best-of", "4"],
            "is its own --reference",
        ),
    ],
)
def test_what_cannot_work_is_one_clear_line(capsys, folder, arguments, message):
    with pytest.raises(SystemExit, match=re.escape(message)) as end:  # with a text, which Python prints; the code is 1
        run(capsys, *[a.replace("{}", str(folder)) for a in arguments])
    assert capsys.readouterr() == ("", "") and len(end.value.code.splitlines()) == 1


def test_the_default_model_is_the_newest_aligned_policy(tmp_path, monkeypatch):
    monkeypatch.setattr(rlaifv.chat.conversation, "ROOT", tmp_path)
    assert default_model() == "models/tiny/policy"
    for name, file in (("0", "pointer.json"), ("2", "config.json"), ("10", "config.json"), ("11", "log.csv")):
        folder = tmp_path / "data/iterations" / name / "policy"
        folder.mkdir(parents=True)
        (folder / file).write_text("{}")
    assert default_model() == "data/iterations/10/policy"


def test_a_checkpoints_own_generation_defaults_change_an_answer_nowhere(folder, tmp_path):
    shutil.copytree(folder / "policy", tmp_path / "strict")
    config = tmp_path / "strict" / "generation_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "repetition_penalty": 1.5, "no_repeat_ngram_size": 1})
    )
    strict = load_chat_model(str(tmp_path / "strict"))
    assert strict.model.generation_config.repetition_penalty == 1.5
    image = read_image(folder / "cat.png")
    expected = best_answers(strict, [Prompt(image, QUESTION)], 1, 12)
    assert chat(strict, folder).ask(QUESTION) == expected[0]
    assert beam_search(strict, [Prompt(image, QUESTION)], 1, 12) == expected
    numbers = [np.zeros((1, 12))]
    plain = generate_batch(strict, [Prompt(image, QUESTION)], numbers, GREEDY, shared=False)
    assert plain[0][0].text.strip() == expected[0]


def test_beams_say_what_their_search_finds_and_draw_nothing(folder, policy, capsys):
    chat = Chat(policy, read_image(folder / "cat.png"), beams=3, max_new_tokens=8)
    first = chat.ask(QUESTION)
    assert first == beam_search(policy, [Prompt(chat.image, QUESTION)], 3, 8)[0]
    assert chat.history == [(QUESTION, first)]
    told = ["--image", str(folder / "cat.png"), "--model", str(folder / "policy"), "--question", QUESTION]
    main([*told, "--beams", "3", "--max-new-tokens", "8"])
    assert capsys.readouterr().out == f"{first}\n"
    with pytest.raises(SystemExit, match="leave --best-of and --temperature out"):
        main([*told, "--beams", "3", "--temperature", "0.7"])
