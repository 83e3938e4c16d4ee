"""The report shows every benchmark beside the paper's rows, says what may be compared, and tests base against final."""

import json

from rlaifv.benchmarks import published
from rlaifv.evaluation.bootstrap import intervals
from rlaifv.evaluation.scores import Scores
from rlaifv.report.page import benchmarks_html, page, paired_html, recall_html, recall_lost, summarize
from rlaifv.results import read_result

RATES = {"response_hallucination": 0.4, "mention_hallucination": 0.2, "recall": 0.9, "mean_words": 20.0, "n": 300}
TEST = {"base": 0.4, "aligned": 0.1, "difference": -0.3, "interval": [-0.35, -0.25], "p_value": 0.0005, "n": 300}


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


def results(judge: str = "some-open-model", benchmarks: bool = True) -> dict[str, dict]:
    found = {
        "0": {"test": RATES, "labeler": {"n": 0}},
        "1": {"test": {**RATES, "response_hallucination": 0.1}, "paired_test": {"response_hallucination": TEST}},
    }
    if benchmarks:
        found["0"]["benchmarks"] = {"obj": scored("base", judge)}
        found["1"]["benchmarks"] = {"obj": scored("round 1", judge)}
    return found


def test_every_round_stands_above_the_papers_rows_and_says_why_it_is_not_comparable():
    section = benchmarks_html(results())
    for text in ("base", "round 1", "RLAIF-V 7B (arXiv 2405.17220v2 (CVPR 2025))", "20.0 <small>(", "10.5", "50.00"):
        assert text in section, text
    assert "recall" in section and "mean words" in section
    assert "round 1: not comparable with the published rows (judge: some-open-model, published: gpt-3.5" in section


def test_a_score_of_the_papers_judge_and_protocol_is_marked_comparable():
    section = benchmarks_html(results("gpt-3.5-turbo-0613"))
    assert "round 1: comparable with the published rows" in section and "not comparable" not in section


def test_without_benchmarks_there_is_no_section():
    assert benchmarks_html(results(benchmarks=False)) == ""
    assert summarize(results(benchmarks=False), [], 0.01)["benchmarks"] == {}


def test_the_summary_holds_the_paired_test_and_the_headline_rates():
    summary = summarize(results(), [], 0.01)
    assert summary["paired_test"]["response_hallucination"]["p_value"] == 0.0005
    assert summary["benchmarks"]["obj"]["round 1"] == {
        "chair_s_refine": 0.2,
        "chair_i": 0.1,
        "recall": 8 / 9,
        "mean_words": 50,
    }
    json.dumps(summary)


def test_the_paired_test_is_one_line_under_the_table():
    line = paired_html({"response_hallucination": TEST})
    assert "response hallucination -30.0 points (-35.0 to -25.0), p &lt; 0.001" in line.replace("p <", "p &lt;")
    rates = [{**results()[name]["test"], "yes_no": {"n": 0}} for name in ("0", "1")]
    summary = summarize(results(), [], 0.01) | {"base": rates[0], "iterations": [{"iteration": 1, **rates[1]}]}
    assert page(summary, {}, [], {}, benchmarks_html(results())).count("paired over the same 300 answers") == 1


def test_a_round_that_bought_less_hallucination_with_less_said_is_named_on_the_page():
    kept = {"selection": {"recall": 0.985}}
    found = {"0": {"dev": {"recall": 0.99}}, "1": kept, "2": {"selection": {"recall": 0.85}}}
    assert recall_lost(found, 0.01) == {"2": {"base": 0.99, "chosen": 0.85}}
    warning = recall_html(recall_lost(found, 0.01))
    assert warning.count("says less than the base") == 1 and "Round 2" in warning and "85.0 %" in warning
    assert recall_html(recall_lost({"0": found["0"], "1": kept}, 0.01)) == ""


def test_what_the_suite_writes_is_what_the_report_reads(tmp_path):
    (tmp_path / "benchmarks.json").write_text(json.dumps({"obj": scored("base", "j")}))
    (tmp_path / "benchmarks" / "obj").mkdir(parents=True)
    (tmp_path / "benchmarks" / "obj" / "rows.jsonl").write_text("{}\n")
    read = read_result(tmp_path)
    assert list(read) == ["benchmarks"]
    assert [row["rate"] for row in published.rates_table(read["benchmarks"])] == list(
        published.HEADLINES["object_halbench"]
    )
