"""The chat notebook's page: both answers, their claims by the model's own P(yes), and an upload that is answered."""

import datetime
import io

import pytest
from architectures import build
from PIL import Image

from rlaifv.params import load_params
from rlaifv.report import chat_view
from rlaifv.report.chat_view import SideBySide
from rlaifv.steps.divide import Division


@pytest.fixture(scope="module")
def view():
    return SideBySide({"base": build("llava"), "aligned": build("llava-next")}, build("llama"), load_params())


def divided(division: Division):
    """A divider that is not under test here."""
    return lambda _vlm, asked, _params, _seed: [division] * len(asked)


def uploaded(content: bytes) -> dict:
    """What a browser hands to the upload button."""
    today = datetime.datetime(2026, 1, 1)
    return {"name": "a.png", "type": "", "size": 1, "last_modified": today, "content": memoryview(content)}


def test_each_model_judges_the_claims_of_its_own_answer(view, monkeypatch):
    monkeypatch.setattr(chat_view, "divide_answers", divided(Division(["A cat."], ["Is there a cat in the image?"])))
    rows = view.rows(Image.new("RGB", (40, 40), "red"), "Describe the image.")
    values = [row["claims"][0]["p_yes"] for row in rows.values()]
    assert list(rows) == ["base", "aligned"] and values[0] != values[1]
    assert all(0 <= value <= 1 for value in values)


def test_an_answer_that_cannot_be_divided_is_shown_with_the_reason(view, monkeypatch):
    monkeypatch.setattr(chat_view, "divide_answers", divided(Division([], [], "no '### Facts:'")))
    page = view.widget(Image.new("RGB", (40, 40)), "Is there a <cat>?").children[2].value
    assert page.count("no &#39;### Facts:&#39;") == 2 and "&lt;cat&gt;" in page


def test_an_upload_is_shown_and_answered_and_a_broken_one_named(view, monkeypatch):
    monkeypatch.setattr(chat_view, "divide_answers", divided(Division([], [])))
    box = view.widget(Image.new("RGB", (40, 40), "red"), "Describe the image.")
    (upload, _question, _button), picture, answers = box.children[0].children, box.children[1], box.children[2]
    first = answers.value
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), "blue").save(buffer, "PNG")
    upload.set_trait("value", (uploaded(buffer.getvalue()),))
    assert Image.open(io.BytesIO(picture.value)).getpixel((0, 0)) == (0, 0, 255)
    assert "base" in answers.value and answers.value != first
    upload.set_trait("value", (uploaded(b"no image"),))
    assert "cannot be decoded" in answers.value
