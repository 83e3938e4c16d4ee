"""The report shows every benchmark beside the paper's rows, says what may be compared, and tests base against final;
whatever a text holds, it stays a text."""

import datetime
import json
import re
import subprocess
from dataclasses import replace

import pytest
from PIL import Image

from rlaifv import ROOT
from rlaifv.benchmarks import published
from rlaifv.evaluation.bootstrap import intervals
from rlaifv.evaluation.scores import Scores
from rlaifv.report import plots
from rlaifv.report.findings import TITLES, fact_rlhf_html, findings_html, rloo_html
from rlaifv.report.page import (
    benchmarks_html,
    day_and_commit,
    errors_html,
    feedback_html,
    headline,
    plan_html,
    recall_lost,
    summarize,
    with_contents,
)
from rlaifv.report.render import data_uri, render
from rlaifv.results import Result, read_result, write_result

RATES = {"response_hallucination": 0.4, "mention_hallucination": 0.2, "recall": 0.9, "mean_words": 20.0, "n": 300}
INTERVALS = {"response_hallucination": (0.3, 0.5), "mention_hallucination": (0.1, 0.3), "recall": (0.8, 1.0)}
RATES |= {f"{rate}_interval": bounds for rate, bounds in INTERVALS.items()}
RATES |= {"yes_no": {"accuracy": 0.875, "n": 90}}
TEST = {"base": 0.4, "aligned": 0.1, "difference": -0.3, "interval": [-0.35, -0.25], "p_value": 0.0005, "n": 300}
EXAM = {"accuracy": 0.97, "per_type": {"existence": 0.99, "color": 0.95}, "n": 10}


def scored(model: str, judge: str) -> dict:
    """What `suite.score` keeps of an Object HalBench result with 2 of 10 answers hallucinated."""
    ones = [1] * 10
    rates = {
        "chair_s_refine": ([1, 1] + [0] * 8, ones),
        "chair_i": ([1] * 10, [10] * 10),
        "recall": ([8] * 10, [9] * 10),
    }
    rates["mean_words"] = ([50] * 10, ones)
    settings = {
        "judge": judge,
        "prompt": "published 01",
        "nouns": "en_core_web_trf",
        "vocabulary": "synonyms_refine.txt",
    }
    scores = Scores("object_halbench", [{"id": str(i)} for i in range(10)], rates, {"n": 300}, settings)
    return {
        "kind": "object_halbench",
        "model": model,
        "metrics": scores.metrics,
        "intervals": intervals(scores),
        "means": list(scores.means),
        "settings": settings,
        "missing": [],
        "published": published.SPECS[scores.benchmark].table(scores, model),
    }


def results(judge: str = "some-open-model", benchmarks: bool = True, recall: float = 0.985) -> dict[str, Result]:
    """A base and an iteration whose chosen checkpoint has this recall on dev."""
    base, aligned = ({"obj": scored(model, judge)} if benchmarks else {} for model in ("base", "iteration 1"))
    return {
        "0": Result(dev=[{"recall": 0.99}], test=RATES, benchmarks=base),
        "1": Result(
            selection={"checkpoint": "checkpoint-1", "recall": recall},
            test={**RATES, "response_hallucination": 0.1},
            paired_test={"response_hallucination": TEST},
            benchmarks=aligned,
        ),
    }


def shown(found: dict[str, Result], **more) -> str:
    """The page of some results, without pictures unless `more` has them."""
    return " ".join(page(summarize(found, [], 0.01, EXAM), **more).split())


def page(summary: dict, **more) -> str:
    given = {
        "figures": {},
        "examples": [],
        "models": {},
        "made": "2026-11-27",
        "benchmarks": "",
        "errors": "",
        "feedback": "",
        "findings": "",
        "plan": "",
        **more,
    }
    return render("report.html", summary=summary, **given)


def test_every_iteration_stands_above_the_papers_rows_and_says_why_it_is_not_comparable():
    section = benchmarks_html(results())
    for text in ("base", "iteration 1", "RLAIF-V 7B (arXiv 2405.17220v2 (CVPR 2025))", "20.0 <small>(", "50.00"):
        assert text in section, text
    assert "<td>10.5</td>" in section and "recall" in section and "mean words" in section
    assert "iteration 1: not comparable with the published rows (judge: some-open-model, published: gpt-3.5" in section


def test_a_score_of_the_papers_judge_and_protocol_is_marked_comparable():
    section = benchmarks_html(results("gpt-3.5-turbo-0613"))
    assert "iteration 1: comparable with the published rows" in section and "not comparable" not in section


def test_without_benchmarks_there_is_no_section():
    assert benchmarks_html(results(benchmarks=False)) == ""
    assert summarize(results(benchmarks=False), [], 0.01, None)["benchmarks"] == {}


def test_a_base_that_imagines_nothing_leaves_nothing_to_reduce():
    found = results()
    found["0"] = replace(found["0"], test={**RATES, "response_hallucination": 0.0})
    assert summarize(found, [], 0.01, EXAM)["relative_reduction"] == 0.0


def test_the_summary_holds_iterations_by_name_the_paired_test_and_the_headline_rates():
    summary = summarize(results(), [{"minutes": 1.5, "peak_memory_gb": 2.0}], 0.01, EXAM)
    assert (summary["peak_memory_gb"], "peak_gpu_gb" in summary) == (2.0, False)
    assert list(summary["iterations"]) == ["1"], "DVC compares what is in dicts, not in lists"
    assert summary["final"]["iteration"] == 1 and summary["relative_reduction"] == pytest.approx(0.75)
    assert summary["paired_test"]["response_hallucination"]["p_value"] == 0.0005
    assert summary["benchmarks"]["obj"]["iteration 1"] == {
        "chair_s_refine": 0.2,
        "chair_i": 0.1,
        "recall": 8 / 9,
        "mean_words": 50,
    }
    json.dumps(summary)


def test_the_most_of_a_gpu_is_told_where_stages_used_one():
    stages = [{"minutes": 1.0, "peak_memory_gb": 2.0, "peak_gpu_gb": gb} for gb in (61.5, 7.0)]
    summary = summarize(results(), [*stages, {"minutes": 1.0, "peak_memory_gb": 3.0}], 0.01, EXAM)
    assert summary["peak_gpu_gb"] == 61.5


def test_the_paired_test_is_one_line_under_the_table():
    html = shown(results(), benchmarks=benchmarks_html(results()))
    assert html.count("paired over the same 300 answers") == 1
    assert "response hallucination -30.0 points (-35.0 to -25.0), p &lt; 0.001." in html


def test_the_labelers_exam_is_told_or_said_not_to_be_measured():
    assert "held-out balanced claims: 97.0 % (existence 99.0, color 95.0)." in shown(results())
    for none in (None, {"n": 0}):
        summary = summarize(results(), [], 0.01, none)
        assert summary["labeler_accuracy"] == {"overall": None, "n": 0}
        assert re.search(r"held-out balanced claims:\s+not measured", page(summary))


def test_an_iteration_that_bought_less_hallucination_with_less_said_is_named_on_the_page():
    assert recall_lost(results(recall=0.85), 0.01) == {"1": {"base": 0.99, "chosen": 0.85}}
    assert recall_lost(results(recall=0.985), 0.01) == {}
    html = shown(results(recall=0.85))
    assert html.count("says less than the base") == 1 and "Iteration 1" in html and "85.0 %" in html
    assert "says less than the base" not in shown(results())


def test_what_is_written_is_what_the_report_reads(tmp_path):
    write_result(tmp_path, benchmarks={"obj": scored("base", "j")})
    read = read_result(tmp_path, "benchmarks")
    assert read.test is None
    assert [row["rate"] for row in published.rates_table(read.benchmarks)] == list(
        published.HEADLINES["object_halbench"]
    )


# ---- judged by claims

CLAIMS = {"response_rejection": 0.4, "claim_rejection": 0.2, "accepted_claims": 8.5, "mean_words": 20.0, "n": 300}
CLAIMS |= {"response_rejection_interval": (0.3, 0.5), "claim_rejection_interval": (0.1, 0.3)}
CLAIMS |= {"accepted_claims_interval": (8.0, 9.0), "mean_words_interval": (19.0, 21.0), "not_judged": 2}
CLAIMS |= {"labeler": "some/labeler", "same_labeler": True, "yes_no": {"n": 0}}


def judged(said: float = 8.49, **changed) -> dict[str, Result]:
    """A base and an iteration that were judged by claims; the chosen checkpoint has so many accepted ones on dev."""
    base, final = CLAIMS | changed, CLAIMS | {"response_rejection": 0.1, "not_judged": 0} | changed
    accepted = {"base": 8.5, "aligned": 8.4, "difference": -0.1, "interval": [-0.2, 0.05], "p_value": 0.2, "n": 300}
    return {
        "0": Result(dev=[base], test=base, benchmarks={}),
        "1": Result(
            selection={"checkpoint": "checkpoint-1", "accepted_claims": said},
            test=final,
            paired_test={"response_rejection": TEST, "accepted_claims": accepted},
            benchmarks={},
        ),
    }


def test_a_run_without_annotations_shows_claims_and_nothing_that_only_annotations_can_tell():
    html = shown(judged(), figures={"claims": plots.result({name: r.test for name, r in judged().items()})})
    for text in (
        '<p class="headline">40.0 % → 10.0 %</p>',
        "Answers with a rejected claim on test, after 1 iteration (75.0 % less); accepted claims an answer 8.5 → 8.5.",
        "<td>40.0 <small>(30.0–50.0)</small></td>",
        "<td>8.5 <small>(8.0–9.0)</small></td><td>20.0 <small>(19.0–21.0)</small></td>",
        "accepted claims -0.10 (-0.20 to +0.05), p = 0.200.",
        "Of base, 2 answers could not be judged",
    ):
        assert text in html, text
    assert not re.search("CHAIR|hallucinat|recall|Object HalBench", re.sub("data:image[^>]*", "", html), re.IGNORECASE)
    assert "says less than the base" not in html and "keep" not in html


def test_who_judged_stands_in_the_table_and_that_it_judges_its_own_pupil():
    html = shown(judged())
    assert html.count("<td>some/labeler, which also made the feedback</td>") == 2
    assert "learned from this labeler's own verdicts" in html.replace("&#39;", "'")
    html = shown(judged(same_labeler=False))
    assert html.count("<td>some/labeler</td>") == 2 and "own verdicts" not in html


def test_an_iteration_that_lost_accepted_claims_is_said_so():
    assert recall_lost(judged(said=8.3), 0.01) == {"1": {"base": 8.5, "chosen": 8.3}}
    assert "no checkpoint kept enough of its accepted claims on dev (8.50 an answer" in shown(judged(said=8.3))


def test_claim_judged_rates_stand_beside_the_true_ones():
    row = {"n": 500, "by_claims": 0.5, "by_claims_interval": [0.45, 0.55], "true": 0.49, "true_interval": [0.44, 0.54]}
    row |= {"difference": 0.01, "difference_interval": [0.0, 0.02], "accepted_claims": 9.0}
    row |= {"response_hallucination": 0.48, "response_hallucination_interval": [0.4, 0.5]}
    same = {"by_claims": "checkpoint-3", "by_annotations": "checkpoint-3"} | {"true_by_claims": 0.0}
    other = {"by_claims": "checkpoint-1", "by_annotations": "checkpoint-2", "true_by_claims": 0.02}
    choices = {"1": same | {"true_by_annotations": 0.0}, "2": other | {"true_by_annotations": 0.01}}
    result = {"base": "a" * 16, "rates": {"0": row, "2": row}, "choices": choices}
    html = " ".join(render("claim_rates.html", result=result, base="a" * 16).split())
    assert "<td>+1.0 <small>(+0.0 to +2.0)</small></td>" in html and "another base model" not in html
    assert "iteration 1 the same either way, checkpoint-3;" in html
    assert "by claims checkpoint-1 (2.0 % of its answers" in html
    assert "another base model" in render("claim_rates.html", result=result, base="b" * 16)


def test_the_page_names_the_day_and_the_commit_that_it_is_of(tmp_path):
    assert day_and_commit(tmp_path) == str(datetime.date.today())
    for words in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -qm one"):
        (tmp_path / "params.yaml").write_text("seed: 1")
        subprocess.run(["git", *words.split()], cwd=tmp_path, check=True)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d at commit [0-9a-f]{7,}", said := day_and_commit(tmp_path))
    (tmp_path / "params.yaml").write_text("seed: 2")
    assert day_and_commit(tmp_path) == f"{said} with changes"
    assert "Made on 2026-11-27" in shown(results())


# ---- the plan


def took(stage: str, estimate: float, minutes: float, peak: float = 0.0) -> dict:
    return {"stage": stage, "estimate": estimate, "minutes": minutes, "gpu_estimate": 70.0, "peak_gpu_gb": peak}


def test_the_plan_stands_beside_what_stages_took_and_by_how_much_it_was_off():
    rows = [took("generate", 10, 12), took("divide", 20, 20), took("train", 10, 15)]
    html = " ".join(plan_html(rows, "H100").split())
    assert "1.20 times its estimate in the median" in html and "GPU GB" not in html
    assert "<td>train</td><td>10.0</td><td>15.0</td> <td>+50 %</td><td>+25 %</td>" in html
    assert "<td>divide</td><td>20.0</td><td>20.0</td> <td>+0 %</td><td>-17 %</td>" in html


def test_memory_of_a_gpu_is_compared_where_a_stage_used_one():
    html = " ".join(plan_html([took("train", 10, 10, 66.6), took("test", 1, 1)], "H100").split())
    assert "<td>70.0</td> <td>66.6</td>" in html and "<td>70.0</td> <td></td>" in html
    assert plan_html([], "H100") == ""


# ---- texts and pictures that are not harmless

EVIL = '<script>alert("1")</script>'


def test_whatever_a_text_holds_it_stays_a_text(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    claim = {"claim": EVIL, "p_yes": 0.5, "p_no": 0.25}
    rows = ({"answer": EVIL, "claims": [claim]}, {"answer": "a", "claims": [], "problem": EVIL})
    found = results(judge=EVIL)
    html = shown(
        found, examples=[(tmp_path / "a.png", *rows)], models={"policy": EVIL}, benchmarks=benchmarks_html(found)
    )
    assert "<script" not in html and html.count("&lt;script&gt;") >= 6
    assert "hsl(80 70% 82%)" in html, "two thirds of yes and no"
    assert "<script" not in shown(found, benchmarks=EVIL), "a section that no template made is a text as well"


@pytest.mark.parametrize("name", ['a.p" onerror="alert(1)" x="', "a.p><script>alert(7)<", "a.jpg"])
def test_a_pictures_type_is_that_of_its_bytes_and_not_of_its_name(tmp_path, name):
    Image.new("RGB", (4, 4)).save(tmp_path / name, "PNG")
    assert re.fullmatch(r"data:image/png;base64,[A-Za-z0-9+/=]+", data_uri(tmp_path / name))


def test_a_photograph_is_embedded_as_it_is_and_what_no_browser_shows_as_png(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "photograph", "JPEG")
    assert data_uri(tmp_path / "photograph").startswith("data:image/jpeg;base64,/9j/")
    Image.new("RGB", (4, 4)).save(tmp_path / "scan.png", "TIFF")
    assert data_uri(tmp_path / "scan.png").startswith("data:image/png;base64,iVBOR")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.png cannot be decoded"):
        data_uri(tmp_path / "text.png")


# ---- the whole page


def test_the_page_of_the_committed_numbers_is_whole_and_says_iteration(tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    answers = [{"answer": "A cat.", "claims": [{"claim": "There is a cat.", "p_yes": 0.9, "p_no": 0.1}]}] * 2
    metrics = ROOT / "metrics"
    groups = {name: json.loads((metrics / f"{name}.json").read_text()) for name in TITLES}
    inputs = {key: groups["rounds"][key] for key in ("models", "settings")}
    found = results()
    html = shown(
        found,
        figures={"Hallucination and recall": plots.result({name: r.test for name, r in found.items()})},
        examples=[(tmp_path / "a.png", *answers)],
        models={role: model["path"] for role, model in inputs["models"].items()},
        benchmarks=benchmarks_html(found),
        findings=findings_html(metrics, inputs, "aligned"),
    )
    (tmp_path / "report.html").write_text(html)  # to look at
    for text in (*TITLES.values(), "<td>iteration 1</td>", "four-iterations, iteration 4", "best of N"):
        assert text in html, text
    assert html.count("data:image/png;base64,") == 8 and "http" not in html, "it needs no other file"
    assert "changed since" not in html and "Undefined" not in html
    ours = html
    for name in (e[key] for group in groups.values() for e in group["experiments"] for key in ("asks", "name")):
        ours = ours.replace(name, "")
    assert not re.search(r"\brounds?\b", ours, re.IGNORECASE), "the word is iteration"


def test_reinforcement_learning_stands_beside_dpo_and_says_of_which_base_model():
    row = {key: value for key, value in RATES.items() if key != "yes_no"}
    row |= {"judged": 0.25, "judged_interval": (0.2, 0.3), "kl": 0.5}
    log = [{"step": step, "judged_hallucination": 0.3, "tokens": 40.0, "kl": 0.01} for step in (1, 2)]
    learned = row | {"samples": 3968, "tokens": 1e6, "tflop": 1.5}
    result = {
        "base": "aaaaaaaa",
        "rows": {"base": row, "DPO": learned | {"minutes": 3.5}, "anchored": learned},
        "tests": {"anchored against DPO": {"recall": TEST}},
        "weights": {"anchored": {"claims": 0.33, "length": 1.0, "reward_model": 0.0}},
        "last_steps": {"anchored": {"claims": -0.4}},
        "logs": {"anchored": log},
        "compared": 500,
    }
    html = rloo_html(result, "aaaaaaaa")
    assert "<td>25.0 <small>(20.0–30.0)</small></td>" in html and "another base model" not in html
    assert "<td>3968</td>" in " ".join(html.split()) and "<td>3.5</td>" in html
    assert "anchored against DPO" in html and "-30.0 points" in html
    assert "<td>0.33 × -0.400</td>" in html and "<td>1.0 × –</td>" in html  # no answer had that reward
    assert "another base model" in rloo_html(result, "bbbbbbbb")


def test_reward_models_stand_with_what_their_annotators_liked_and_a_run_without_truth_leaves_cells_empty():
    row = {
        "run": "plain",
        "taste": 0.0,
        "facts": "none",
        "pairs": 399,
        "labels_right": 0.84,
        "right": [0.98, 0.96, 1.0],
    }
    row |= {"calibration_error": 0.02, "length_correlation": [-0.2, -0.26, -0.13], "image_effect": 0.1}
    row |= {f"{who}_{what}": [0.1, 0.05, 0.15] for who in ("best_of_n", "all") for what in ("error", "tokens")}
    people = {key: row[key] for key in ("run", "taste", "facts", "right", "calibration_error")}
    people |= {"pairs": 0, "labels_right": None, "image_effect": None}
    result = {"base": "aaaaaaaa", "reward_models": [row, people]}
    html = " ".join(fact_rlhf_html(result, None, "aaaaaaaa").split())
    assert "<td>98.0 <small>(96.0–100.0)</small></td>" in html and "<td>-0.20 <small>(-0.26–-0.13)</small></td>" in html
    assert "0.10 sd" in html and html.count("<td>–</td>") == 6 and "another base model" not in html
    curve = [RATES | {"method": "reward_model", "n": n} for n in (1, 2)]
    html = fact_rlhf_html(result, {"run": "plain", "curves": {"base": curve, "aligned": curve}}, "bbbbbbbb")
    assert "another base model" in html and "data:image/png;base64," in html and "<code>plain</code>" in html


def became(before: list[str], after: list[str]) -> dict:
    """A row of `compare` of an answer with these wrong objects before and after."""
    about = {"id": "1", "image": "1.png", "question": "?", "before": "a <b>car</b>", "after": "a cat"}
    kind = "wrong before and after" if after else "mended"
    return about | {"wrong": [before, after], "right": [["cat"], ["cat"]], "kind": kind}


def test_what_is_still_wrong_is_shown_and_counted_by_class(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    rows = [became(["car", "dog"], []), became(["car"], ["dog"]), became(["car"], ["car"])]
    section = " ".join(errors_html(rows, True, tmp_path, shown=1).split())
    assert "<td>mended</td><td>1</td>" in section and "<td>wrong before and after</td><td>2</td>" in section
    assert "<td>car</td><td>3</td><td>1</td>" in section and "<td>dog</td><td>1</td><td>1</td>" in section
    assert "2 answers of the final policy still say" in section and section.count("<img") == 1
    assert "a &lt;b&gt;car&lt;/b&gt;" in section
    assert "object that is not" not in errors_html(rows, False, tmp_path, shown=1)
    assert "No answer of the final policy" in errors_html(rows[:1], True, tmp_path, shown=1)


def test_dvc_compares_a_handful_of_rounded_numbers():
    found = headline(summarize(results(), [], 0.01, EXAM))
    assert found == {
        "response_hallucination": 0.1,
        "mention_hallucination": 0.2,
        "recall": 0.9,
        "mean_words": 20.0,
        "relative_reduction": 0.75,
    }


def test_the_contents_link_to_every_section():
    html = with_contents("<nav></nav><h2>One</h2><p>1</p><h2>Two &amp; three</h2>")
    assert '<nav><a href="#section-1">One</a>' in html and '<a href="#section-2">Two &amp; three</a></nav>' in html
    assert '<h2 id="section-2">Two &amp; three</h2>' in html


def test_every_picture_of_the_page_says_what_it_is(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    answer = {"answer": "a cat", "problem": "", "claims": []}
    figures = {"Rates": plots.calibration([{"p_yes": 0.9, "yes": 1.0, "n": 3}])}
    errors = errors_html([became(["car"], ["dog"])], True, tmp_path, shown=1)
    html = shown(results(), figures=figures, examples=[(tmp_path / "1.png", answer, answer)], errors=errors)
    assert html.count("<img") == 3 and 'alt=""' not in html


def told(rejected: list, answers: int = 100) -> dict:
    """What `describe_feedback` says of an iteration."""
    pair = {"image": "1.png", "question": "?", "chosen": "a <cat>", "rejected": "a car", "scores": [0, -1]}
    per_kind = {"color": [1, 40], "count": [0, 0]}
    return {"answers": answers, "per_kind": per_kind, "rejected": rejected, "examples": [pair]}


def test_what_is_learned_away_stands_beside_how_often_it_is_still_said(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    first, last = told([["There is a car.", 50], ["There is a dog.", 5]]), told([["There is a dog.", 10]], answers=1000)
    section = feedback_html({"0": Result(), "1": Result(feedback=first), "2": Result(feedback=last)}, tmp_path)
    assert "<td>There is a car.</td><td>500.0</td><td>0.0</td>" in section
    assert "<td>There is a dog.</td><td>50.0</td><td>10.0</td>" in section
    assert "<tr><td>color</td>" in section and section.count("<td>2.5</td>") == 2 and "a &lt;cat&gt;" in section
    alone = feedback_html({"0": Result(), "1": Result(feedback=first)}, tmp_path)
    assert "in 1,000 answers" not in alone and "a &lt;cat&gt;" in alone
    assert feedback_html({"0": Result(), "1": Result()}, tmp_path) == ""
