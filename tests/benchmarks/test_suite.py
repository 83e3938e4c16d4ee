"""The benchmarks of a parameter file: a model answers their own files, a stopped run goes on, and no row is lost."""

import base64
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from openai_server import seen
from tiny_llava import picture, save_tiny_llava

from rlaifv.benchmarks import published, suite
from rlaifv.params import BenchmarkParams, EvaluateParams, JudgeParams, ServerParams
from rlaifv.store import Store
from rlaifv.vlm.loading import load_vlm

ANSWERING = EvaluateParams(beams=1, max_new_tokens=6, batch_size=2)


def entry(kind: str, **given) -> BenchmarkParams:
    nothing = {"questions": (), "truth": (), "vocabulary": None, "images": None, "suffix": "", "answers": None}
    return BenchmarkParams(**{**nothing, "judge": None, "beams": 1, "kind": kind, **given})


def write(path: Path, content) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_vlm(str(save_tiny_llava(tmp_path_factory.mktemp("llava"))), device="cpu")


@pytest.fixture
def images(tmp_path) -> str:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in (1, 2, 3):
        (folder / f"COCO_val2014_{number:012d}.jpg").write_bytes(picture(number))
        (folder / f"AMBER_{number}.jpg").write_bytes(picture(number))
    return str(folder)


def pope(tmp_path, images, **given) -> BenchmarkParams:
    rows = [
        {
            "question_id": number,
            "image": f"COCO_val2014_{1 + number % 3:012d}.jpg",
            "text": f"Is there a {word} in the image?",
            "label": label,
        }
        for number, (word, label) in enumerate([("dog", "yes"), ("cat", "no"), ("kite", "no"), ("dog", "no")], start=1)
    ]
    questions = write(tmp_path / "pope.json", lines(rows))
    return entry("pope", questions=(questions,), images=images, **given)


def amber(tmp_path, images) -> BenchmarkParams:
    folder = tmp_path / "amber"
    folder.mkdir()
    truth = [
        {"id": 1, "type": "generative", "truth": ["dog", "kite"], "hallu": ["cat"]},
        {"id": 2, "type": "generative", "truth": ["cat"], "hallu": []},
        {"id": 1005, "type": "discriminative-hallucination", "truth": "no"},
        {"id": 1006, "type": "relation", "truth": "yes"},
    ]
    write(folder / "annotations.json", truth)
    write(folder / "relation.json", {"dog": [], "cat": [], "kite": []})
    write(folder / "safe_words.txt", "")
    described = [{"id": n, "image": f"AMBER_{n}.jpg", "query": "describe it ."} for n in (1, 2)]
    asked = [
        {"id": 1005, "image": "AMBER_1.jpg", "query": "is there a cat ?"},
        {"id": 1006, "image": "AMBER_9.jpg", "query": "is it left of the dog ?"},
    ]
    questions = (write(folder / "generative.json", described), write(folder / "discriminative.json", asked))
    return entry("amber", questions=questions, truth=(str(folder),), images=images, beams=2)


def stores(scratch):
    """The stores of unfinished work, as a stage gives them."""
    return lambda name: Store(f"benchmarks@1-{name}", {}, scratch)


def test_a_model_answers_and_every_question_is_scored_or_listed(tmp_path, images, model):
    benchmarks = {"pope": pope(tmp_path, images), "amber": amber(tmp_path, images)}
    out = tmp_path / "results"
    suite.check_files(benchmarks)
    suite.answer(lambda: model, benchmarks, ANSWERING, stores(tmp_path / "scratch"), out)
    results = suite.score(benchmarks, "1", out, ServerParams(), tmp_path / "scratch")

    answers = read(out / "benchmarks" / "pope" / "answers.jsonl")
    assert [row["question_id"] for row in answers] == ["1", "2", "3", "4"]
    assert answers[0]["question"] == "Is there a dog in the image?"
    said_yes = [row["answer"] == "yes" for row in read(out / "benchmarks" / "pope" / "rows.jsonl")]
    right = sum(yes == truth for yes, truth in zip(said_yes, [True, False, False, False], strict=True))
    assert results["pope"]["metrics"]["accuracy"] == right / 4
    assert results["pope"]["missing"] == []
    low, high = results["pope"]["intervals"]["accuracy"]
    assert low <= right / 4 <= high

    assert results["amber"]["metrics"]["n"] == 3
    (lost,) = results["amber"]["missing"]
    assert lost["id"] == "1006" and "no image AMBER_9.jpg" in lost["reason"]
    assert read(out / "benchmarks" / "amber" / "rejects.jsonl")[0]["id"] == "1006"
    assert "1 rows are not scored" in results["amber"]["published"][0]["because"]

    shown = {(row["benchmark"], row["rate"]) for row in published.rates_table(results)}
    assert {("amber", "hal"), ("amber", "cover"), ("amber", "mean_words"), ("pope", "recall")} <= shown
    assert json.loads((out / "benchmarks" / "scores.json").read_text())["pope"]["model"] == "iteration 1"


def test_a_stopped_run_goes_on_and_a_repeated_one_asks_the_model_nothing(tmp_path, images, model, monkeypatch):
    benchmarks, out, ask = {"pope": pope(tmp_path, images)}, tmp_path / "results", suite.fit_answers
    calls = []

    def killed_after_one(*arguments):
        if calls:
            raise KeyboardInterrupt
        calls.append(arguments)
        return ask(*arguments)

    monkeypatch.setattr(suite, "fit_answers", killed_after_one)
    with pytest.raises(KeyboardInterrupt):
        suite.answer(lambda: model, benchmarks, ANSWERING, stores(tmp_path / "scratch"), out)
    asked = []
    monkeypatch.setattr(suite, "fit_answers", lambda *a: asked.append(len(a[1])) or ask(*a))
    suite.answer(lambda: model, benchmarks, ANSWERING, stores(tmp_path / "scratch"), out)
    assert asked == [2], "the first two answers are kept"
    finished = (out / "benchmarks" / "pope" / "answers.jsonl").read_bytes()
    suite.answer(lambda: model, benchmarks, ANSWERING, stores(tmp_path / "scratch"), out)
    assert asked == [2]
    suite.answer(lambda: model, benchmarks, ANSWERING, stores(tmp_path / "elsewhere"), out)
    assert (out / "benchmarks" / "pope" / "answers.jsonl").read_bytes() == finished


def test_the_suffix_is_asked_but_not_stored_as_the_question(tmp_path, images, model, monkeypatch):
    prompts = []
    monkeypatch.setattr(suite, "fit_answers", lambda vlm, p, *a: prompts.extend(p) or ["no"] * len(p))
    benchmarks = {"pope": pope(tmp_path, images, suffix="Please answer yes or no.")}
    suite.answer(lambda: model, benchmarks, ANSWERING, stores(tmp_path / "scratch"), tmp_path / "out")
    assert prompts[0].text == "Is there a dog in the image? Please answer yes or no."
    results = suite.score(benchmarks, "0", tmp_path / "out", ServerParams(), tmp_path / "scratch")
    assert results["pope"]["metrics"]["yes_ratio"] == 0


def test_a_question_with_a_special_token_costs_only_itself_and_llava_s_mark_is_none(tmp_path, images, model):
    item, out = pope(tmp_path, images), tmp_path / "results"
    rows = read(Path(item.questions[0]))
    rows[0]["text"], rows[1]["text"] = "<image>\n" + rows[0]["text"], "Is </s> there?"
    write(Path(item.questions[0]), lines(rows))
    suite.answer(lambda: model, {"pope": item}, ANSWERING, stores(tmp_path / "scratch"), out)
    answers, (reject,) = (read(out / "benchmarks" / "pope" / f"{name}.jsonl") for name in ("answers", "rejects"))
    assert len(answers) == 3 and not answers[0]["question"].startswith("<image>")
    assert reject["id"] == "2" and "'</s>', which the tokenizer reads as a token of its own" in reject["reason"]


def test_no_benchmarks_cost_nothing_and_print_one_line(tmp_path, capsys):
    suite.answer(lambda: None, {}, ANSWERING, stores(tmp_path / "scratch"), tmp_path / "out")
    assert suite.score({}, "0", tmp_path / "out", ServerParams(), tmp_path / "scratch") == {}
    assert capsys.readouterr().out == "no benchmarks configured\n"
    assert [p.name for p in tmp_path.rglob("*.*")] == ["scores.json"] and not (tmp_path / "scratch").exists()


def test_someone_elses_answers_are_scored_once_with_the_base_and_no_model_is_asked(tmp_path, images):
    rows = [{"question_id": n, "answer": text} for n, text in enumerate(["Yes", "No", "No", "Yes, a dog"], start=1)]
    answers = write(tmp_path / "theirs.jsonl", lines(rows))
    benchmarks = {"pope": pope(tmp_path, images, answers=answers)}
    suite.answer(lambda: None, benchmarks, ANSWERING, stores(tmp_path / "scratch"), tmp_path / "out")
    results = suite.score(benchmarks, "0", tmp_path / "out", ServerParams(), tmp_path / "scratch")
    assert results["pope"]["metrics"]["accuracy"] == 3 / 4
    assert results["pope"]["model"] == "theirs.jsonl"
    assert suite.score(benchmarks, "1", tmp_path / "out" / "1", ServerParams(), tmp_path / "scratch") == {}


@pytest.fixture
def serve(start_server):
    """Start a judge with a habit; returns its address."""
    return lambda *habit: start_server("judge_server.py", *habit)


def judge(address: str) -> JudgeParams:
    return JudgeParams(name="rules", base_url=address, prompts=(), strict_published=False)


def test_a_judge_that_dies_stops_the_stage_and_the_next_run_asks_for_the_rest_alone(
    tmp_path, images, model, serve, monkeypatch
):
    template = [
        {
            "question_type": "attribute",
            "image_id": f"{n:016x}",
            "image_src": f"https://images.example.org/COCO_val2014_{n:012d}.jpg",
            "image_content": [f"Dog number {n}"],
            "question": "what is in the image ?",
            "gt_answer": "A dog.",
            "model_answer": "",
        }
        for n in (1, 2, 3)
    ]
    questions = write(tmp_path / "template.json", template)
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    monkeypatch.setattr(suite, "fit_answers", lambda vlm, prompts, *a: ["A dog and a cat."] * len(prompts))

    dying = {"mmhal": entry("mmhal", questions=(questions,), images=images, judge=judge(serve("dying", 2)))}
    suite.answer(lambda: model, dying, ANSWERING, stores(scratch), out)
    with pytest.raises(RuntimeError, match=r"1 of mmhal, .*no reply.*Run again"):
        suite.score(dying, "0", out, ServerParams(tries=1, concurrency=1), scratch)
    assert not (out / "benchmarks" / "scores.json").exists()
    well = {"mmhal": entry("mmhal", questions=(questions,), images=images, judge=judge(serve("well")))}
    result = suite.score(well, "0", out, ServerParams(), scratch)["mmhal"]
    assert result["metrics"]["n"] == 3 and result["missing"] == []
    assert len(read(scratch / "judge" / "mmhal.jsonl")) == 3, "two replies before the judge died, one after"
    assert result["settings"]["judge"] == "rules"


def test_object_halbench_takes_images_out_of_its_question_file(tmp_path, model, serve):
    rows = [
        {
            "image_id": n,
            "image": base64.b64encode(picture(n, (48, 48))).decode(),
            "question": "what is in the image ?",
        }
        for n in (1, 2)
    ]
    questions = write(tmp_path / "obj.jsonl", lines(rows))
    truth = write(tmp_path / "truth.json", {"1": ["dog"], "2": ["cat"]})
    item = entry("object_halbench", questions=(questions,), truth=(truth,), beams=3, judge=judge(serve("well")))
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    suite.answer(lambda: model, {"obj": item}, ANSWERING, stores(scratch), out)
    result = suite.score({"obj": item}, "0", out, ServerParams(), scratch)["obj"]
    assert result["metrics"]["n"] == 2 and result["missing"] == []
    assert [row["image"] for row in read(out / "benchmarks" / "obj" / "answers.jsonl")] == ["1", "2"]


def test_an_image_is_never_guessed_from_a_number_that_means_something_else(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "ours__20.jpg").write_bytes(picture(1))
    rows = [{"id": "1", "question": "what ?", "image_url": "https://images.example.org/theirs__20.jpg"}]
    item = entry("refomb", questions=(write(tmp_path / "q.jsonl", lines(rows)),), images=str(folder))
    assert suite.read_questions(item)[0].image is None


def test_wrong_paths_and_images_are_one_clear_line(tmp_path, images, model):
    item = pope(tmp_path, str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"benchmarks\.adversarial\.images: no .*nowhere; .*fetch"):
        suite.check_files({"adversarial": item})
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"benchmarks\.pope: none of 4 questions can be asked.*COCO_val2014_0+2\.jpg"):
        benchmarks = {"pope": pope(tmp_path, str(empty))}
        suite.answer(lambda: model, benchmarks, ANSWERING, stores(tmp_path / "scratch"), tmp_path / "out")


def test_what_benchmarks_will_lack_is_said_at_the_start_of_a_run_a_line_each(tmp_path, serve):
    empty, there = tmp_path / "empty", serve("well")
    empty.mkdir()
    questions = write(tmp_path / "q.jsonl", "{}\n")
    benchmarks = {
        "gone": pope(tmp_path, str(tmp_path / "nowhere")),
        "bare": pope(tmp_path, str(empty)),
        "alone": entry("mmhal", questions=(questions,), images=str(empty.parent), judge=judge("http://127.0.0.1:9/v1")),
        "fine": entry("mmhal", questions=(questions,), images=str(empty.parent), judge=judge(there)),
        "unknown": entry("mmhal", questions=(questions,), images=str(empty.parent), judge=local_judge("no-such")),
    }
    params = SimpleNamespace(benchmarks=benchmarks, server=ServerParams())
    lines = suite.check_inputs(params)
    expected = [
        r"benchmarks\.gone\.images: no .*nowhere; .*fetch",
        r"benchmarks\.bare\.images: .* is empty; docs/benchmarks\.md",
        r"benchmarks\.alone\.judge: the judge rules at http.* does not answer .*: start the server",
        r"benchmarks\.unknown\.judge\.name: no-such is neither a folder nor a hub id",
    ]
    assert len(lines) == len(expected), lines
    for line, pattern in zip(lines, expected, strict=True):
        assert re.match(pattern, line), line
    assert seen(there)["seen"] == 0, "no question is asked"


def local_judge(path: str) -> JudgeParams:
    return JudgeParams(name=path, base_url=None, prompts=(), strict_published=False)
