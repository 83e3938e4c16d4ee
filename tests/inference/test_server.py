"""A labeler behind a real server process: right answers, and no answer lost or asked for twice when it misbehaves."""

import base64
import hashlib
import io
import json
import re
import threading
from functools import partial
from pathlib import Path

import nbformat
import numpy as np
import pytest
from openai_server import seen
from PIL import ExifTags, Image

from rlaifv import run
from rlaifv.inference.roles import load_role, look
from rlaifv.inference.served import PROBES, ask_in_order, data_url, judge_served, open_served
from rlaifv.inference.server import NoReply, ServerRefused, is_served
from rlaifv.inference.yes_no import judge_many
from rlaifv.params import FeedbackParams, ModelParams, ServerParams
from rlaifv.records import Claim, Judgement, read_records
from rlaifv.steps import models
from rlaifv.steps.feedback import feedback
from rlaifv.store import Store
from rlaifv.vlm.images import open_image

QUESTIONS = [f"Is it red, {i}? Please answer yes or no." for i in range(10)]
PARAMS = ServerParams(tries=6)


@pytest.fixture
def red(tmp_path) -> str:
    return data_url(saved(tmp_path / "red.png", Image.new("RGB", (8, 8), (255, 0, 0))))


@pytest.fixture
def serve(start_server):
    """Start a labeler with a habit; returns its address with the model's name."""
    return lambda *habit: start_server("labeler_server.py", *habit) + "#some/model"


def saved(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def asked(address: str) -> list[str]:
    """The questions that came, without those by which a model is recognized."""
    return sorted(question for question in seen(address)["seen"] if question not in PROBES)


def test_p_yes_and_p_no_are_read_off_the_first_tokens_log_probs(serve, tmp_path):
    labeler = open_served(serve("well"), PARAMS)
    black = saved(tmp_path / "black.png", Image.new("RGB", (8, 8)))
    bright = saved(tmp_path / "red.png", Image.new("RGB", (8, 8), (255, 0, 0)))
    items = [(look(labeler, bright), [QUESTIONS[0], "Is it not red?"]), (look(labeler, black), QUESTIONS[:1])]
    (red, not_red), (black,) = judge_many(labeler, items)
    assert red == pytest.approx((0.8, 0.0), abs=1e-6)
    assert not_red == pytest.approx((0.0, 0.8), abs=1e-6)
    assert black == pytest.approx((0.0, 0.8), abs=1e-6)


def test_each_distinct_question_about_an_image_is_asked_once(serve, red):
    path = serve("well")
    answers = judge_served(open_served(path, PARAMS), [(red, [*QUESTIONS[:2], QUESTIONS[0]]), (red, QUESTIONS[:1])])
    assert asked(path) == QUESTIONS[:2]
    assert answers[0][0] == answers[0][2] == answers[1][0]


@pytest.mark.parametrize(("kind", "name"), [("JPEG", "jpeg"), ("PNG", "png"), ("WEBP", "webp")])
def test_an_image_travels_as_its_files_own_bytes(serve, tmp_path, kind, name):
    path, file = serve("well"), saved(tmp_path / "photo", Image.effect_noise((64, 48), 60).convert("RGB"), format=kind)
    judge_served(open_served(path, PARAMS), [(data_url(file), QUESTIONS[:1])])
    assert seen(path)["images"][-1] == [f"data:image/{name}", hashlib.sha256(file.read_bytes()).hexdigest()]


def test_what_a_server_might_see_in_another_way_is_written_anew(tmp_path):
    photo = Image.new("RGB", (64, 32), (200, 30, 30))
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6  # the camera was held upright
    url = data_url(saved(tmp_path / "turned.jpg", photo, exif=turned))
    kind, image = decoded(url)
    assert kind == "image/jpeg" and image.size == (32, 64) and image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    glass = Image.new("RGBA", (8, 8), (10, 200, 10, 0))  # some servers put it on white, we leave alpha out
    deep = Image.fromarray(np.full((8, 8), 32768, np.uint16))
    files = [(glass, "glass.png"), (photo, "drawn.bmp"), (deep, "deep.png")]
    for file in (saved(tmp_path / name, image) for image, name in files):
        kind, image = decoded(data_url(file))
        assert kind == "image/png" and image.mode == "RGB" and image.tobytes() == open_image(file).tobytes()
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ValueError, match=r"broken\.jpg cannot be decoded"):
        data_url(tmp_path / "broken.jpg")


def decoded(url: str) -> tuple[str, Image.Image]:
    kind, data = url.removeprefix("data:").split(";base64,")
    return kind, Image.open(io.BytesIO(base64.b64decode(data)))


def test_as_many_requests_are_in_flight_as_allowed_although_an_images_first_goes_alone():
    gate = threading.Barrier(4, timeout=60)  # nobody passes before four are there
    ask_in_order(lambda question: gate.wait(), [range(10)] * 8, 4)


def test_the_first_question_of_an_image_goes_alone_and_the_others_before_the_next_image(serve, tmp_path):
    path = serve("well")
    items = [
        (data_url(saved(tmp_path / f"{n}.png", Image.new("RGB", (8, 8), (n, 0, 0)))), [f"{n}, {q}" for q in QUESTIONS])
        for n in range(6)
    ]
    labeler = open_served(path, ServerParams(concurrency=4))
    before = seen(path)
    answers = judge_served(labeler, items)
    cold, images = (seen(path)[name][len(before[name]) :] for name in ("cold", "images"))
    assert len({image for _, image in images[:20]}) == 4, "an image is done with before another begins"
    assert len(cold) == len(set(cold)) == 6, "one question an image finds no prefix"
    assert 1 < seen(path)["most"] <= 4, "and no more are in flight than allowed"
    assert [len(row) for row in answers] == [10] * 6 and len(asked(path)) == 60


def test_feedback_by_a_server_rejects_what_cannot_be_read_and_judges_the_rest(serve, tmp_path):
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "red.jpg")
    claims = [Claim(f"{c}/0", c, "It is red.", "Is it red?") for c in ("a#0", "b#0")]
    images, out = {"a#0": "red.jpg", "b#0": "gone.jpg"}, tmp_path / "judgements.jsonl"
    store, load = Store("feedback", {}, tmp_path / "scratch"), partial(open_served, serve("well"), PARAMS)
    params = FeedbackParams(suffix="Yes or no?", batch_size=2, min_answer_mass=0.5, max_reject_rate=0.5)
    assert feedback(load, claims, images, tmp_path, params, store, out) == (1, 1, 2)
    (judgement,) = read_records(out, Judgement)
    assert judgement.claim_id == "a#0/0" and judgement.accepted
    assert json.loads((tmp_path / "labeler.json").read_text())["labeler"] == "some/model"


def test_a_busy_server_is_asked_again(serve, red):
    path = serve("busy", 3)
    answers = judge_served(open_served(path, ServerParams(concurrency=2, tries=6)), [(red, QUESTIONS)])
    assert len(answers[0]) == 10 and asked(path) == QUESTIONS
    assert seen(path)["refused"] == 3


def test_a_server_that_dies_stops_the_run_and_the_next_run_asks_only_for_the_rest_at_another_address(
    serve, tmp_path, red
):
    path = serve("dying", len(PROBES) + 4)
    labeler = open_served(path, ServerParams(concurrency=1, tries=2), tmp_path)
    with pytest.raises(NoReply, match="does not answer after 2 tries") as caught:
        judge_served(labeler, [(red, QUESTIONS)])
    assert "\n" not in str(caught.value) and path in str(caught.value)
    (file,) = tmp_path.glob("served-*.jsonl")
    assert len(file.read_text().splitlines()) == 4
    with file.open("a") as stream:
        stream.write('{"key": "half a li')  # killed while it wrote
    again = serve("well")
    labeler = open_served(again, PARAMS, tmp_path)
    answers = judge_served(labeler, [(red, QUESTIONS)])
    assert len(answers[0]) == 10 and all(a == pytest.approx((0.8, 0.0), abs=1e-6) for a in answers[0])
    assert asked(again) == QUESTIONS[4:]
    judge_served(open_served(again, PARAMS, tmp_path), [(red, QUESTIONS)])
    assert len(asked(again)) == 6, "the third run asks nothing"


def test_a_model_is_recognized_by_what_it_answers_wherever_it_is_served(serve, tmp_path):
    one = open_served(serve("well"), PARAMS, tmp_path).fingerprint
    noisy = serve("noisy")
    assert {open_served(noisy, PARAMS, tmp_path).fingerprint for _ in range(3)} == {one}
    assert open_served(serve("other"), PARAMS, tmp_path).fingerprint != one
    assert open_served(noisy.replace("some/", "another/"), PARAMS, tmp_path).fingerprint != one
    assert len(list(tmp_path.glob("served-*.json"))) == 3


def test_another_model_behind_the_same_name_is_not_used_until_the_stage_models_has_seen_it(
    serve, tmp_path, monkeypatch
):
    monkeypatch.setattr(models, "SCRATCH", tmp_path)
    monkeypatch.setattr("rlaifv.inference.roles.SCRATCH", tmp_path)
    fields = {"revision": None, "dtype": "float32", "device": "auto"}
    fields |= {"load_in_4bit": False, "processor": {}, "template": {}, "system": None}
    record = models.describe(ModelParams(path=serve("well"), **fields), PARAMS)
    assert load_role(record, PARAMS).fingerprint == record.fingerprint
    replaced = models.describe(ModelParams(path=serve("other"), **fields), PARAMS)
    with pytest.raises(ValueError, match=r"some/model answers otherwise .* run `dvc repro -f models`"):
        load_role(type(record)(**{**vars(record), "path": replaced.path}), PARAMS)


def test_a_server_that_is_not_there_gets_one_clear_line():
    with pytest.raises(NoReply, match="start the server and run the stage again"):
        open_served("http://127.0.0.1:9/v1#some/model", ServerParams(tries=1))


def test_a_server_without_log_probs_is_refused(serve):
    with pytest.raises(ServerRefused, match="no top_logprobs"):
        open_served(serve("silent"), PARAMS)


@pytest.mark.parametrize("value", ["0.5", "nan", "inf", "-inf"])
def test_a_log_prob_that_is_none_is_refused(serve, value):
    with pytest.raises(ServerRefused, match=r"'Yes' the log-prob .*, expected a number up to 0") as caught:
        open_served(serve("wrong", value), PARAMS)
    assert "\n" not in str(caught.value)


def test_the_key_comes_from_the_environment_and_is_kept_and_shown_nowhere(serve, tmp_path, monkeypatch, red):
    path, params = serve("locked"), ServerParams(key_variable="MY_KEY")
    monkeypatch.setenv("MY_KEY", "s3cret")
    with pytest.raises(ServerRefused, match="HTTP 401") as caught:
        open_served(path, params)
    assert "s3cret" not in str(caught.value)
    monkeypatch.setenv("MY_KEY", "right")
    labeler = open_served(path, params, tmp_path)
    judge_served(labeler, [(red, QUESTIONS[:1])])
    assert "right" not in repr(labeler) + "".join(file.read_text() for file in tmp_path.glob("served-*"))


@pytest.mark.parametrize("address", ["http://me:s3cret@127.0.0.1:9/v1", "https://127.0.0.1:9/v1?key=s3cret"])
def test_an_address_with_a_password_is_refused_without_showing_it(address):
    with pytest.raises(ValueError, match=r"no user, no password .*OPENAI_API_KEY") as caught:
        open_served(f"{address}#some/model", PARAMS)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("key", ["two\nlines", "schlüssel"])
def test_a_key_that_no_request_can_carry_is_refused_without_showing_it(monkeypatch, key):
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(ValueError, match="MY_KEY holds no key") as caught:
        open_served("http://127.0.0.1:9/v1#some/model", ServerParams(key_variable="MY_KEY"))
    assert key not in str(caught.value)


# ---- every way in which a server can fail

KEY = 'sk-planted"key/0123456789'
"""What JSON and addresses write otherwise, too."""

LABELER = """
import logging
from pathlib import Path
from rlaifv.inference import server
from rlaifv.inference.served import judge_served, open_served
from rlaifv.benchmarks.judge import Request, ask_all, open_judge
from rlaifv.params import ServerParams
from rlaifv.stage import start_logging
start_logging()
logging.getLogger().setLevel(logging.DEBUG)
server.SILENT = 0.3
params = ServerParams(timeout=1, tries=1, concurrency=2, key_variable="PLANTED_KEY")
here = Path(FOLDER)
"""
WAYS = {
    "locked": "HTTP 401: ",
    "broken": r"\(HTTP 500: ",
    "echo": "repeats the key in its answer",
    "garbage": "no chat completion",
    "empty": "no chat completion",
    "hanging": "APITimeoutError",
    "gone": "APIConnectionError",
    "elsewhere": "HTTP 307 and sends us to localhost",
    "renamed": "answers as the model other: give that name",
    "words": "'Yes' the log-prob 'likely', expected a number",
    "null": "'Yes' the log-prob None, expected a number",
    "sure": "gives 2 tokens a probability of 1.81 together",
}


def test_no_failure_of_a_server_writes_or_says_the_key_and_each_is_one_line_with_its_name(
    start_server, tmp_path, monkeypatch, capfd
):
    """A real kernel asks a labeler and a judge, and its notebook, logs and files are searched for the key."""
    address = start_server("failing_server.py").removesuffix("/v1")
    monkeypatch.setenv("PLANTED_KEY", KEY)
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    cells = [nbformat.v4.new_code_cell(LABELER.replace("FOLDER", repr(str(tmp_path))))]
    for way in WAYS:
        asks = f"open_served('{address}/{way}/v1#some/model', params, here)"
        judge = f"open_judge('some/model', '{address}/{way}/v1', params)"
        judges = f"ask_all([Request('a', 'Rate it.')], {judge}, str, here / '{way}.jsonl').missing"
        cells += [nbformat.v4.new_code_cell(code, metadata={"tags": ["raises-exception"]}) for code in (asks, judges)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=kernel)
    nbformat.write(notebook, tmp_path / "40_feedback.ipynb")
    run.execute(tmp_path / "40_feedback.ipynb", {})
    said = capfd.readouterr()
    executed = nbformat.read(tmp_path / "runs" / "40_feedback.ipynb", 4).cells
    of_labeler = [cell for cell in executed if cell.source.startswith("open_served")]
    for way, labeler in zip(WAYS, of_labeler, strict=True):
        (error,) = (output for output in labeler.outputs if output.output_type == "error")
        assert error.ename in ("NoReply", "ServerRefused") and "\n" not in error.evalue, way
        assert f"the model {address}/{way}/v1#some/model" in error.evalue and re.search(WAYS[way], error.evalue)
    assert "hanging/v1#some/model has said nothing for 0.3 s" in said.out + said.err
    texts = {path: path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()}
    for place, text in {**texts, "stdout": said.out, "stderr": said.err}.items():
        for form in (KEY, json.dumps(KEY)[1:-1], json.dumps(json.dumps(KEY)[1:-1])[1:-1], "planted"):
            assert form not in text, place


@pytest.mark.parametrize("path", ["http://127.0.0.1:8000/v1", "models/tiny/labeler#x", "https://host/v1#"])
def test_a_path_that_names_no_model_is_refused(path):
    with pytest.raises(ValueError, match="#MODEL"):
        open_served(path, PARAMS)
    assert not is_served("models/tiny/labeler")
