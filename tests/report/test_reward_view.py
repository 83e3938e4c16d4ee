"""The reward notebook's page: answers in the order of their reward, and every token with its own share of it."""

import re
from functools import partial

import pytest
from tiny_llava import picture, save_tiny_llava

from rlaifv.records import Candidate, Instruction
from rlaifv.report.reward_view import END, reward_page, token_texts
from rlaifv.steps.self_feedback import Asked, answer_logps
from rlaifv.vlm.chat_format import encode
from rlaifv.vlm.images import open_image
from rlaifv.vlm.loading import load_vlm

QUESTION = "describe it ."
ANSWERS = ["a red dog", "there is a big blue kite and a small cat .", "yes", "a red dog", "a cat"]


@pytest.fixture(scope="module")
def view(tmp_path_factory):
    folder = tmp_path_factory.mktemp("view")
    for seed, name in enumerate(("policy", "reference"), start=1):
        save_tiny_llava(folder / name, seed=seed)
    (folder / "0.png").write_bytes(picture(0))
    candidates = [
        Candidate(f"<i>#{n}", "<i>", n, answer, 4, "length" if answer == "yes" else "stop", 0, "m")
        for n, answer in enumerate(ANSWERS)
    ]
    policy, reference = (load_vlm(str(folder / name), device="cpu") for name in ("policy", "reference"))
    return partial(reward_page, policy, reference, Instruction("<i>", "0.png", QUESTION), candidates, folder / "0.png")


def table_rows(page: str) -> list[list[str]]:
    """The cells of the page's table, without its head."""
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in page.split("<tr>")[2:]]


def test_distinct_answers_stand_in_the_order_of_their_normalized_reward(view):
    policy, reference, _, _, image = view.args
    distinct = list(dict.fromkeys(ANSWERS))
    asked = Asked(open_image(image), QUESTION, distinct, [answer == "yes" for answer in distinct])
    scored = answer_logps(policy, reference, [asked])[0]
    page = view()
    assert "&lt;i&gt;" in page and "<i>" not in page
    rows = table_rows(page)
    shown = [(float(mean), float(total), int(place), int(tokens)) for mean, total, place, tokens, _ in rows]
    sums = sorted((s.reward(1.0, normalize=False) for s in scored), reverse=True)
    for (mean, total, place, tokens), s in zip(shown, sorted(scored, key=lambda s: -s.reward(1.0)), strict=True):
        assert (mean, tokens) == (pytest.approx(s.reward(1.0), abs=6e-4), s.tokens)
        assert total == pytest.approx(sums[place - 1], abs=6e-3)


def test_the_tokens_of_an_answer_carry_its_whole_reward_and_read_as_the_answer(view):
    for _, total, _, tokens, spans in table_rows(view()):
        ratios = [float(ratio) for ratio in re.findall(r'title="([-+.\d]+)"', spans)]
        assert len(ratios) == int(tokens)
        assert sum(ratios) == pytest.approx(float(total), abs=0.006 * len(ratios))
        text = re.sub(r"<span[^>]*>|</span>", "", spans)
        assert text.removesuffix(END) in ANSWERS
        assert text.endswith(END) == (text != "yes")  # it was cut: it never said the end token


def test_fewer_answers_are_shown_than_there_are_when_asked(view):
    assert table_rows(view(shown=2)) == table_rows(view())[:2]


def test_what_tokens_add_to_a_text_is_the_text(view):
    policy, *_, image = view.args
    coded = encode(policy, open_image(image), QUESTION, ANSWERS[1:2])
    ids = coded.rows[0][coded.answer_starts[0] :]
    assert "".join(token_texts(policy, ids)) == ANSWERS[1] + END
