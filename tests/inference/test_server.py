"""A labeler behind a real server process: right answers, and no answer lost or asked for twice when it misbehaves."""

import pytest
from openai_server import seen
from PIL import Image

from rlaifv.inference.server import NoReply, ServerRefused, is_served, judge_served, open_served
from rlaifv.inference.yes_no import judge_many

RED, BLACK = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8))
QUESTIONS = [f"Is it red, {i}? Please answer yes or no." for i in range(10)]


@pytest.fixture
def serve(start_server):
    """Start a labeler with a habit; returns its address with the model's name."""
    return lambda *habit: start_server("labeler_server.py", *habit) + "#some/model"


def test_p_yes_and_p_no_are_read_off_the_first_tokens_log_probs(serve):
    labeler = open_served(serve("well"))
    asked = [(RED, [QUESTIONS[0], "Is it not red?"]), (BLACK, QUESTIONS[:1])]
    (red, not_red), (black,) = judge_many(labeler, asked)
    assert red == pytest.approx((0.8, 0.0), abs=1e-6)
    assert not_red == pytest.approx((0.0, 0.8), abs=1e-6)
    assert black == pytest.approx((0.0, 0.8), abs=1e-6)


def test_each_distinct_question_about_an_image_is_asked_once(serve):
    path = serve("well")
    answers = judge_served(open_served(path), [(RED, [*QUESTIONS[:2], QUESTIONS[0]]), (RED.copy(), QUESTIONS[:1])])
    assert sorted(seen(path)["seen"]) == QUESTIONS[:2]
    assert answers[0][0] == answers[0][2] == answers[1][0]


def test_no_more_requests_are_in_flight_than_allowed(serve):
    path = serve("well")
    judge_served(open_served(path, concurrency=3), [(RED, [f"Question {i}?" for i in range(40)])])
    assert 1 < seen(path)["most"] <= 3


def test_a_busy_server_is_asked_again(serve):
    path = serve("busy", 3)
    answers = judge_served(open_served(path, concurrency=2, tries=6), [(RED, QUESTIONS)])
    assert len(answers[0]) == 10 and sorted(seen(path)["seen"]) == QUESTIONS
    assert seen(path)["refused"] == 3


def test_a_server_that_dies_stops_the_run_and_the_next_run_asks_only_for_the_rest(serve, tmp_path):
    path = serve("dying", 4)
    with pytest.raises(NoReply, match="does not answer after 2 tries") as caught:
        judge_served(open_served(path, tmp_path, concurrency=1, tries=2), [(RED, QUESTIONS)])
    assert "\n" not in str(caught.value) and path in str(caught.value)
    (file,) = tmp_path.glob("served-*.jsonl")
    assert len(file.read_text().splitlines()) == 4
    with file.open("a") as stream:
        stream.write('{"key": "half a li')  # killed while it wrote
    again = serve("well")
    # the same model comes back at another port here, so its answers are handed over by name
    file.rename(open_served(again, tmp_path).answers.path)
    answers = judge_served(open_served(again, tmp_path), [(RED, QUESTIONS)])
    assert len(answers[0]) == 10 and all(a == pytest.approx((0.8, 0.0), abs=1e-6) for a in answers[0])
    assert sorted(seen(again)["seen"]) == QUESTIONS[4:]
    judge_served(open_served(again, tmp_path), [(RED, QUESTIONS)])
    assert len(seen(again)["seen"]) == 6, "the third run asks nothing"


def test_a_server_that_is_not_there_gets_one_clear_line():
    labeler = open_served("http://127.0.0.1:9/v1#some/model", tries=1)
    with pytest.raises(NoReply, match="start the server and run the stage again"):
        judge_served(labeler, [(RED, QUESTIONS)])


def test_a_server_without_log_probs_is_refused(serve):
    with pytest.raises(ServerRefused, match="no top_logprobs"):
        judge_served(open_served(serve("silent")), [(RED, QUESTIONS[:1])])


def test_the_key_comes_from_the_environment_and_is_kept_nowhere(serve, tmp_path, monkeypatch):
    path = serve("locked")
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(ServerRefused, match="HTTP 401"):
        judge_served(open_served(path), [(RED, QUESTIONS[:1])])
    monkeypatch.setenv("OPENAI_API_KEY", "right")
    labeler = open_served(path, tmp_path)
    judge_served(labeler, [(RED, QUESTIONS[:1])])
    assert "right" not in repr(labeler) + labeler.answers.path.read_text()


@pytest.mark.parametrize("path", ["http://127.0.0.1:8000/v1", "models/tiny/labeler#x", "https://host/v1#"])
def test_a_path_that_names_no_model_is_refused(path):
    with pytest.raises(ValueError, match="#MODEL"):
        open_served(path)
    assert not is_served("models/tiny/labeler")
