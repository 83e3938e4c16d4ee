"""Experiments: the list is checked before anything runs, what is done is not done again, and the report says what
came out, and of which checkpoints."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from dvc.utils.cli_parse import to_path_overrides
from dvc.utils.hydra import apply_overrides
from ruamel.yaml import YAML

from rlaifv import ROOT
from rlaifv.evaluation.outcome import describe_inputs, flat_rows, score_run
from rlaifv.params import DEFAULT, ParamsError, check_params, load_params, merge, read_content, read_yaml
from rlaifv.profiles import experiments
from rlaifv.profiles.experiments import (
    LIST,
    Experiment,
    collect,
    load_groups,
    needed,
    overrides,
    run_group,
    write_results,
)
from rlaifv.report.findings import experiments_html, findings_html, self_feedback_html, verdict
from rlaifv.results import Result
from rlaifv.steps.models import describe_models

BASE = load_params()
MODELS = describe_models(BASE, BASE.server)


@pytest.fixture(scope="module")
def groups():
    return load_groups()


def changed(params) -> set[str]:
    """The keys in which `params` differ from params.yaml, such as "train.beta"."""
    ours, base = dataclasses.asdict(params), dataclasses.asdict(BASE)
    sections = {key for key in base if isinstance(base[key], dict) and key != "iterations"}
    found = {f"{s}.{key}" for s in sections for key in base[s] if ours[s][key] != base[s][key]}
    return found | {key for key in set(base) - sections if ours[key] != base[key]}


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("control", set()),
        ("whole-answer", {"ablation.whole_answer"}),
        ("mixed-temperatures", {"ablation.temperature_spread"}),
        ("no-length-balance", {"ablation.balance_length"}),
        ("random-labeler", {"ablation.coin_share"}),
    ],
)
def test_an_ablation_changes_the_parameters_it_names_and_nothing_else(groups, name, keys):
    experiment = next(e for e in groups["ablations"].experiments if e.name == name)
    assert changed(experiment.params) == keys | {"iterations"}
    assert list(experiment.params.iterations) == ["1"], "ablations are of one iteration, so that they are cheap"


@pytest.mark.parametrize("name", ["four-iterations", "one-large-iteration", "self"])
def test_an_experiment_with_iterations_is_the_profile_of_its_name(groups, name):
    experiment = next(e for e in groups["rounds"].experiments if e.name == name)
    assert experiment.params == load_params(f"params/{name}.yaml")


def written(tmp_path, change):
    """The list of experiments with a change, as a file."""
    yaml = YAML()
    content = yaml.load(LIST)
    change(content["ablations"])
    yaml.dump(content, tmp_path / "experiments.yaml")
    return tmp_path / "experiments.yaml"


def setting(name: str, **overlay):
    return lambda section: section["experiments"][name].update(set=overlay)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            setting("control", pairs={"nonsense": 1}),
            r"ablations\.control: unknown key pairs\.nonsense; known",
        ),
        (
            setting("control", nonsense={"min_gap": 1}),
            r"ablations\.control: unknown key nonsense; known here: ",
        ),
        (setting("random-labeler", ablation={"coin_share": 2}), r"random-labeler: .*coin_share.*from 0 to 1"),
        (setting("control", iterations={"1": {"prev": 0}}), r"iterations\.1\.prev: expected text, got 0"),
        (setting("control", policy={"path": "a$b"}), r"ablations\.control: policy\.path: DVC cannot set .*'a\$b'"),
        (lambda section: section["experiments"]["control"].update(profile="self"), r"control: expected the keys"),
        (
            lambda section: section["experiments"].update(x={"asks": "?", "profile": "none"}),
            r"ablations\.x\.profile: no profile 'none'",
        ),
        (lambda section: section.update(control="self"), r"ablations\.control: no experiment 'self'"),
        (
            lambda section: section.update(common={"iterations": {"4": {"prev": "3"}}}),
            r"iterations\.4\.prev: no iteration",
        ),
        (lambda section: section.pop("control"), r"experiments\.yaml: missing key ablations\.control"),
        (lambda section: section["experiments"]["control"].pop("asks"), r"control: expected the keys asks and set"),
    ],
)
def test_a_list_that_cannot_be_run_is_refused_with_the_experiments_name(tmp_path, change, message):
    with pytest.raises(ParamsError, match=message):
        load_groups(written(tmp_path, change))


def test_an_unknown_parameter_stops_the_command_before_anything_runs(tmp_path, monkeypatch):
    file = written(tmp_path, setting("random-labeler", feedback={"coins": 1}))
    monkeypatch.setattr(experiments, "load_groups", lambda: load_groups(file))
    monkeypatch.setattr(experiments, "run_experiment", lambda _: pytest.fail("an experiment was run"))
    with pytest.raises(SystemExit, match="random-labeler"):
        experiments.main(["ablations"])


def through_dvc(tmp_path, set_params) -> dict:
    """What params.yaml becomes when DVC's own code sets parameters, as `dvc exp run --set-param` does."""
    copy = shutil.copy(DEFAULT, tmp_path)
    for file, changes in to_path_overrides(set_params).items():
        assert file == "params.yaml"
        apply_overrides(copy, changes)
    return read_content(Path(copy))


def test_what_dvc_makes_of_an_experiment_is_what_was_checked(groups, tmp_path):
    # DVC makes no stage at all of an iteration whose name is a number
    for group in groups.values():
        for experiment in group.experiments:
            assert check_params(through_dvc(tmp_path, experiment.overrides), "dvc") == experiment.params


BENCHMARK = read_content(ROOT / "params" / "llava15-7b.yaml")["benchmarks"]["object_halbench"]


@pytest.mark.parametrize(
    "overlay",
    [
        {"train": {"beta": 1e-5, "learning_rate": 5e-7, "max_length": None, "packed": False, "epochs": 1}},
        {"train": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.5], "lora_targets": ["q_proj"]}},
        {
            "labeler": {"path": "http://h:8000/v1#a=b,c", "revision": "1"},
            "feedback": {"suffix": "it's, {x} or [y]: π~+"},
        },
        {"benchmarks": {"mine": BENCHMARK, "yours": {**BENCHMARK, "judge": None}}},
        {"benchmarks": {}, "iterations": {"1": {"prev": "0"}, "2": {"prev": "0"}}, "seed": 1},
        read_yaml(ROOT / "params" / "llava15-7b.yaml"),
    ],
    ids=lambda overlay: ",".join(overlay),
)
def test_every_kind_of_value_reaches_an_experiment_through_dvc_as_it_is(tmp_path, overlay):
    assert through_dvc(tmp_path, tuple(overrides(overlay, "here"))) == merge(read_content(DEFAULT), overlay)


# ---- what was run, and what is run again


def outcome(hallucination: float, rounds=("1",)) -> dict:
    def row(rate: float) -> dict:
        rates = {"response_hallucination": rate, "mention_hallucination": rate / 3, "recall": 0.95}
        bounds = {f"{name}_interval": [max(value - 0.1, 0), min(value + 0.1, 1)] for name, value in rates.items()}
        return {**rates, **bounds, "mean_words": 30.5, "n": 40}

    pairs = {"n": 77, "mean_words_chosen": 29.4, "mean_words_rejected": 30.6}
    truth = {"claim_accuracy": 0.9812, "claim_accuracy_interval": [0.97, 0.99], "pair_agreement": 0.876,
             "pair_agreement_interval": [0.8, 0.93]}  # fmt: skip
    last = {"last_response_hallucination": 0.0123, "last_mention_hallucination": 0.0, "last_recall": 0.765}
    training = {"chosen": "checkpoint-1", "last": "checkpoint-8", **last}
    made = {name: {**row(hallucination), "pairs": pairs, "training": training, **truth} for name in rounds}
    return {"base": row(0.6), "rounds": made}


def test_of(difference: float, p_value: float) -> dict:
    rate = {"base": 0.2, "aligned": 0.2 + difference, "difference": difference,
            "interval": [difference - 0.05, difference + 0.05], "p_value": p_value, "n": 40}  # fmt: skip
    return {"response_hallucination": rate, "mention_hallucination": rate, "recall": {**rate, "p_value": 0.9}}


test_of.__test__ = False


def made(groups, name: str, rates: dict[str, float], **extra) -> dict:
    """Results of a group as the driver writes them."""
    group = groups[name]
    rows = [
        {"name": e.name, "asks": e.asks, "overrides": list(e.overrides), "key": e.key,
         **outcome(rates[e.name], list(e.params.iterations))}
        for e in group.experiments if e.name in rates
    ]  # fmt: skip
    keys = {e.name: e.key for e in group.experiments}
    tests = {
        name: {"keys": [keys[group.control], keys[name]], "rates": test_of(rates[name] - rates[group.control], 0.01)}
        for name in rates
        if name != group.control
    }
    results = {"experiments": rows, "tests": tests, "failed": []}
    return {"group": name, "control": group.control, **describe_inputs(BASE, MODELS), **results, **extra}


ABLATIONS = {"control": 0.03, "whole-answer": 0.5, "mixed-temperatures": 0.04, "no-length-balance": 0.02,
             "random-labeler": 0.61}  # fmt: skip
ROUNDS = {"four-iterations": 0.01, "one-large-iteration": 0.2, "self": 0.1}


def names(found) -> set[str]:
    return {experiment.name for experiment in found}


def test_an_experiment_is_not_needed_again_for_the_same_inputs(groups):
    assert needed(groups["ablations"], made(groups, "ablations", ABLATIONS)) == []
    assert names(needed(groups["ablations"], {"experiments": [], "tests": {}})) == set(ABLATIONS)


def test_a_new_experiment_needs_itself_and_the_control_that_it_is_tested_against(groups):
    results = made(groups, "ablations", {k: v for k, v in ABLATIONS.items() if k != "random-labeler"})
    assert names(needed(groups["ablations"], results)) == {"random-labeler", "control"}


def test_other_inputs_make_another_key(groups):
    control = groups["ablations"].experiments[0]
    other = dataclasses.replace(control.params, train=dataclasses.replace(control.params.train, beta=0.2))
    assert dataclasses.replace(control, params=other).key != control.key
    # the report's own settings change nothing that an experiment measures
    report = dataclasses.replace(control.params, report=dataclasses.replace(control.params.report, gallery=3))
    assert dataclasses.replace(control, params=report).key == control.key
    assert dataclasses.replace(control, sources="of yesterday").key != control.key
    assert control.run_name == f"control-{control.key[:8]}"


def test_rows_of_other_inputs_are_dropped(groups, monkeypatch):
    results = made(groups, "ablations", ABLATIONS)
    results["experiments"][1]["key"] = "of yesterday"
    monkeypatch.setattr(experiments, "find_revision", lambda _: None)
    kept = collect(groups["ablations"], results)
    assert [row["name"] for row in kept["experiments"]] == [k for k in ABLATIONS if k != "whole-answer"]
    assert "whole-answer" not in kept["tests"]


def test_a_failure_is_said_at_the_end_and_the_others_go_on(groups, tmp_path, monkeypatch):
    """The driver with DVC replaced by a table of finished experiments."""
    finished, group = {}, groups["ablations"]
    assert len({e.key for e in group.experiments}) == 5  # of this repository's checkpoints, before ROOT is another

    def run(experiment: Experiment) -> bool:
        if experiment.name != "whole-answer":
            finished[experiment.run_name] = experiment.name
        return experiment.name != "whole-answer"

    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    monkeypatch.setattr(experiments, "run_experiment", run)
    monkeypatch.setattr(experiments, "find_revision", finished.get)
    monkeypatch.setattr(
        experiments, "outcome_of", lambda e, _: {"name": e.name, "asks": e.asks, "key": e.key, **outcome(0.1)}
    )
    monkeypatch.setattr(experiments, "compare", lambda a, b: {"keys": [a.key, b.key], "rates": test_of(0.0, 1.0)})
    monkeypatch.setattr(experiments, "load_groups", lambda: {"ablations": group})
    with pytest.raises(SystemExit, match="failed: whole-answer"):
        experiments.main(["ablations"])
    results = json.loads((tmp_path / "metrics/ablations.json").read_text())
    assert [row["name"] for row in results["experiments"]] == [k for k in ABLATIONS if k != "whole-answer"]
    assert results["failed"] == ["whole-answer"]
    assert (tmp_path / "plots/ablations.png").is_file()
    ran = dict(finished)
    assert run_group(group) == ["whole-answer"]
    assert finished == ran, "the second run runs only what failed"


# ---- what a finished run came to


def test_a_run_is_scored_from_its_results_and_the_truth_where_it_is_known(tmp_path, monkeypatch):
    from rlaifv.evaluation import outcome as module

    found = outcome(0.1)
    last = found["rounds"]["1"]
    results = {
        "0": Result(test={**found["base"], "yes_no": {"n": 0}}),
        "1": Result(
            test={**last, "yes_no": {"n": 0}},
            pairs={"pairs": 77, "mean_words_chosen": 29.4, "mean_words_rejected": 30.6, "score_gaps": {}},
            selection={"checkpoint": "checkpoint-1"},
            dev=[{"checkpoint": f"checkpoint-{k}", **last, "recall": 1 - k / 10} for k in (1, 2)],
        ),
    }
    scored = {"claims": {"accuracy": 0.9, "accuracy_interval": [0.8, 1.0], "n": 9}, "pairs": {"n": 0}}
    monkeypatch.setattr(module, "score_iteration", lambda *_: scored)
    unknown = score_run(results, tmp_path, tmp_path, tmp_path / "absent.json")
    assert unknown["base"]["response_hallucination"] == 0.6
    assert unknown["rounds"]["1"]["pairs"] == {"n": 77, "mean_words_chosen": 29.4, "mean_words_rejected": 30.6}
    assert "claim_accuracy" not in unknown["rounds"]["1"]
    training = unknown["rounds"]["1"]["training"]
    assert (training["chosen"], training["last"], training["last_recall"]) == ("checkpoint-1", "checkpoint-2", 0.8)
    (tmp_path / "instances_train.json").write_text("{}")
    known = score_run(results, tmp_path, tmp_path, tmp_path / "instances_train.json")
    assert known["rounds"]["1"]["claim_accuracy_interval"] == [0.8, 1.0]
    assert "pair_agreement" not in known["rounds"]["1"], "without pairs there is nothing to agree"


def test_a_table_has_a_row_for_the_base_and_every_round(groups):
    rows = flat_rows(made(groups, "rounds", ROUNDS)["experiments"])
    four = [row for row in rows if row["experiment"] == "four-iterations"]
    assert [row["iteration"] for row in four] == ["0", "1", "2", "3", "4"]
    assert (four[0]["claim_accuracy"], four[1]["claim_accuracy_high"], four[1]["pairs_n"]) == ("", 0.99, 77)
    assert len({tuple(row) for row in rows}) == 1, "all rows have the same columns"


# ---- the report


def test_the_report_shows_every_experiment_with_its_intervals_and_its_test(groups):
    section = experiments_html(made(groups, "ablations", ABLATIONS), describe_inputs(BASE, MODELS))
    for text in (*ABLATIONS, "50.0 <small>(40.0–60.0)", "98.1 <small>(97.0–99.0)", "87.6 <small>(80.0–93.0)",
                 "77 (29.4 / 30.6)", "1.2 / 76.5",
                 "whole-answer: hallucinates in more answers (+47.0 points, +42.0 to +52.0",
                 "models/tiny/policy", f"train.learning_rate {BASE.train.learning_rate:g}"):  # fmt: skip
        assert text in section, text
    assert section.count("data:image/png") == 1
    assert "other checkpoints" not in section


def test_the_report_says_plainly_when_the_numbers_are_of_other_checkpoints_or_settings(groups):
    results = made(groups, "ablations", ABLATIONS)
    results["models"]["labeler"]["fingerprint"] = "another"
    results["settings"]["train.epochs"] += 1
    section = experiments_html(results, describe_inputs(BASE, MODELS))
    assert "came from other checkpoints or settings than this report's: labeler, train.epochs changed since" in section
    assert "make ablations" in section


def test_what_results_came_from_are_the_records_of_the_models_and_the_settings():
    found = describe_inputs(BASE, MODELS)
    assert found["models"]["labeler"] == {"path": BASE.labeler.path, "fingerprint": MODELS["labeler"].fingerprint}
    assert found["settings"]["train.beta"] == BASE.train.beta


def test_a_failed_experiment_is_named_in_the_report(groups):
    results = made(groups, "ablations", {"control": 0.03}, failed=["self"])
    assert "Failed: self." in experiments_html(results, describe_inputs(BASE, MODELS))


def test_the_verdict_says_in_words_which_of_two_is_better():
    def words(difference: float, p_value: float) -> str:
        return verdict({"tests": {"four-iterations": {"rates": test_of(difference, p_value)}}}, "four-iterations")

    assert words(-0.1, 0.01).startswith("four-iterations: hallucinates in fewer answers (-10.0 points, -15.0 to -5.0")
    assert words(0.1, 0.01).startswith("four-iterations: hallucinates in more answers")
    assert words(-0.1, 0.2).startswith("four-iterations: does not differ in response hallucination")
    assert "does not differ in recall" in words(-0.1, 0.01)


def test_rounds_are_drawn_with_the_control_as_a_marker_of_its_own(groups):
    from rlaifv.report.plots import rounds

    figure = rounds(made(groups, "rounds", ROUNDS))
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["four-iterations", "self", "one-large-iteration"]
    lines = {container.get_label(): container[0] for container in figure.axes[0].containers}
    assert len(lines["four-iterations"].get_xdata()) == 5
    assert len(lines["one-large-iteration"].get_xdata()) == 1


def best_of_n() -> dict:
    methods = ("normalized", "summed", "random", "oracle")
    rows = [
        {"method": method, "n": n, "response_hallucination": 0.2, "response_hallucination_interval": [0.1, 0.3],
         "mention_hallucination": 0.1, "mention_hallucination_interval": [0.0, 0.2], "recall": 0.9,
         "recall_interval": [0.85, 0.95], "mean_words": 30.0}
        for method in methods for n in (1, 2, 4)
    ]  # fmt: skip
    keys = ("relative_reduction", "recall_change", "hallucination_against_summed", "recall_against_summed")
    compared = [{"n": n, **dict.fromkeys(keys, 0.25), **{f"{k}_interval": [0.2, 0.3] for k in keys}} for n in (1, 4)]
    one = {"curve": rows, "compare": compared, "left_out": 0}
    return {"policies": {"aligned": "aaaaaaaa", "reference": "bbbbbbbb"}, "base": one, "aligned": one}


def test_best_of_n_has_a_table_with_intervals_and_says_when_the_policy_is_another():
    section = self_feedback_html(best_of_n(), "aaaaaaaa")
    assert "<td>normalized</td><td>4</td><td>20.0 <small>(10.0–30.0)</small></td>" in section
    assert section.count("<td>random</td>") == 2, "a random answer is the same whatever N is"
    assert "N = 4: response hallucination -25 (-30 to -20) % relative" in section
    assert "another aligned policy" not in section
    assert "another aligned policy" in self_feedback_html(best_of_n(), "cccccccc")


def test_without_results_the_report_has_no_such_section(tmp_path, groups, monkeypatch):
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    inputs = describe_inputs(BASE, MODELS)
    for group in groups.values():
        write_results(group, {"experiments": [], "tests": {}}, BASE, [])
    assert findings_html(tmp_path / "metrics", inputs, "aaaaaaaa") == ""
    assert not (tmp_path / "plots").exists()
    (tmp_path / "metrics" / "self_feedback.json").write_text(json.dumps(best_of_n()))
    assert "best of N" in findings_html(tmp_path / "metrics", inputs, "aaaaaaaa")


def test_the_files_that_the_report_depends_on_are_in_the_repository():
    report = YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")["stages"]["report"]
    assert {"metrics/ablations.json", "metrics/rounds.json"} <= set(report["deps"])
    for group in ("ablations", "rounds"):
        results = json.loads((ROOT / "metrics" / f"{group}.json").read_text())
        assert {"experiments", "tests", "failed", "models", "settings"} <= set(results)
