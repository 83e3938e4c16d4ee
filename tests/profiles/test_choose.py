"""A profile holds what differs from the default, `make profile` writes the whole of it, and nobody's edits are lost."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from rlaifv import ROOT
from rlaifv.params import IterationParams, ParamsError, load_params, merge, read_yaml
from rlaifv.profiles.choose import main, render, write_profile
from rlaifv.stage import Stage

PROFILES = sorted(path.stem for path in (ROOT / "params").glob("*.yaml"))
DEFAULT = load_params("params/default.yaml")


def profile(name: str):
    return load_params(f"params/{name}.yaml")


def in_checkout(folder: Path, name: str = "mine", text: str = "") -> Path:
    """A params.yaml of the default and the profiles beside it, with one more of that text."""
    shutil.copytree(ROOT / "params", folder / "params")
    (folder / "params" / f"{name}.yaml").write_text(text)
    write_profile("default", folder / "params.yaml")
    return folder / "params.yaml"


def test_the_shipped_profiles():
    names = (
        "default four-iterations llava-rlhf-13b llava-rlhf-7b llava15-7b llava15-7b-lora one-large-iteration "
        "public-dataset qwen3vl-4b rlaifv-12b-self rlaifv-7b rloo-claims-7b self self-8b"
    )
    assert names.split() == PROFILES


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_is_valid_and_says_the_same_written_whole(name, tmp_path):
    whole = tmp_path / "params.yaml"
    whole.write_text(render(name))
    assert load_params(whole) == profile(name)
    assert list(read_yaml(whole)) == list(read_yaml(ROOT / "params" / "default.yaml")), "the default's order"
    assert all(len(line) <= 120 for line in whole.read_text().splitlines())
    assert "round" not in render(name), "the project says iteration"


@pytest.mark.parametrize("name", [name for name in PROFILES if name != "default"])
def test_a_profile_holds_only_what_differs_from_the_default(name):
    def differs(value, default) -> bool:
        if isinstance(value, dict) and isinstance(default, dict):
            return bool(value) and all(differs(value[key], default.get(key)) for key in value)
        return value != default

    overlay, default = read_yaml(ROOT / "params" / f"{name}.yaml"), read_yaml(ROOT / "params" / "default.yaml")
    overlay.pop("iterations", None)  # replaced whole, so it repeats the default's first ones
    assert all(differs(value, default[key]) for key, value in overlay.items())


def test_params_yaml_is_what_its_profile_gives():
    text = (ROOT / "params.yaml").read_text()
    assert text.startswith("# Profile: default. ") and "make profile NAME=" in text.splitlines()[0]
    assert text == render("default")


def test_the_whole_file_keeps_the_default_s_comments_and_opens_with_the_profile_s_own():
    text = render("llava15-7b")
    assert "#     make profile NAME=llava15-7b && make repro" in text.split("seed:")[0]
    assert "The embedded world" not in text.split("seed:")[0]
    assert "learning_rate: 5.0e-7     # (paper, 7B: 5.0e-7; LoRA 1.0e-5)" in text
    assert "# POPE's questions carry their answers" in text, "a replaced section has the profile's comments"
    assert '  "4": {prev: "3"}\n\n# The three models' in text
    assert "questions: null" in text


def test_self_alignment_changes_the_labeler_to_the_unaligned_policy_alone():
    own = dataclasses.replace(DEFAULT.labeler, path=DEFAULT.policy.path)
    assert profile("self") == dataclasses.replace(DEFAULT, labeler=own)


def test_four_iterations_add_two_and_change_nothing_of_the_first_two():
    iterations = {str(k): IterationParams(prev=str(k - 1)) for k in range(1, 5)}
    assert profile("four-iterations") == dataclasses.replace(DEFAULT, iterations=iterations)


def test_the_control_has_one_iteration_with_the_instructions_of_all_four():
    four = profile("four-iterations")
    prepare = dataclasses.replace(four.prepare, per_iteration=4 * four.prepare.per_iteration)
    one = {"1": IterationParams(prev="0")}
    assert profile("one-large-iteration") == dataclasses.replace(four, prepare=prepare, iterations=one)
    assert prepare.per_iteration <= four.world.train


@pytest.mark.parametrize("name", PROFILES)
def test_no_profile_runs_an_ablation_unasked(name):
    method = {"whole_answer": False, "temperature_spread": 0.0, "coin_share": 0.0, "balance_length": True}
    assert dataclasses.asdict(profile(name).ablation) == method


def test_sections_are_merged_and_names_are_replaced():
    base = {"train": {"beta": 1, "epochs": 2}, "iterations": {"1": {"prev": "0"}, "2": {"prev": "1"}}, "benchmarks": {}}
    overlay = {"train": {"beta": 3}, "iterations": {"1": {"prev": "0"}}, "benchmarks": {"a": {"kind": "pope"}}}
    assert merge(base, overlay) == {"train": {"beta": 3, "epochs": 2}, **{k: overlay[k] for k in list(overlay)[1:]}}
    assert base["train"] == {"beta": 1, "epochs": 2}, "the base is left as it is"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {bta: 1.0}", r"mine\.yaml: unknown key train\.bta; known here: .*beta"),
        ("train: {beta: -1}", r"mine\.yaml: train\.beta: expected a value above 0, got -1"),
        ("trian: {}", r"mine\.yaml: unknown key trian; known here: ablation"),
        ("iterations: {}", r"mine\.yaml: iterations: expected a section with at least one entry"),
        ("iterations: {1: {prev: '0'}}", r"mine\.yaml: iterations: names are text"),
        ("train: null", r"mine\.yaml: train: expected a section, got None"),
        ("- a", r"mine\.yaml: the file: expected a section, got \['a'\]"),
        ("seed: &x {a: *x}", r"mine\.yaml: seed: expected a whole number"),
        ("train: {beta: 1", r"mine\.yaml is not YAML"),
    ],
)
def test_a_wrong_profile_is_one_line_that_names_it_and_params_yaml_stays(tmp_path, text, message):
    file = in_checkout(tmp_path, text=text)
    before = file.read_text()
    for attempt in (lambda: load_params(tmp_path / "params" / "mine.yaml"), lambda: write_profile("mine", file)):
        with pytest.raises(ParamsError, match=message) as error:
            attempt()
        assert len(str(error.value).splitlines()) == 1
    assert file.read_text() == before


@pytest.mark.parametrize("text", ["", "# nothing differs\n"])
def test_an_empty_profile_is_the_default(tmp_path, text):
    assert load_params(in_checkout(tmp_path, text=text).with_name("params") / "mine.yaml") == DEFAULT


def test_an_error_in_the_default_is_told_of_the_default(tmp_path):
    in_checkout(tmp_path)
    default = tmp_path / "params" / "default.yaml"
    default.write_text(default.read_text().replace("  beta: 0.1 ", "  beta: -1 "))
    with pytest.raises(ParamsError, match=r"^default\.yaml: train\.beta"):
        load_params(tmp_path / "params" / "self.yaml")


def test_a_profile_takes_the_place_of_another_but_not_of_an_edit(tmp_path):
    file = in_checkout(tmp_path)
    write_profile("self", file)
    assert file.read_text().startswith("# Profile: self. ")
    write_profile("four-iterations", file)
    edited = file.read_text().replace("epochs: 4 ", "epochs: 5 ")
    file.write_text(edited)
    with pytest.raises(ParamsError, match=r"params\.yaml was edited.* FORCE=1$"):
        write_profile("self", file)
    assert file.read_text() == edited
    write_profile("self", file, force=True)
    assert load_params(file) == profile("self")


@pytest.mark.parametrize("text", ["seed: 1\n", "", "# Profile: gone. Change\nseed: 1\n"])
def test_a_file_that_no_profile_gives_counts_as_edited(tmp_path, text):
    file = in_checkout(tmp_path)
    file.write_text(text)
    with pytest.raises(ParamsError, match="was edited"):
        write_profile("default", file)


def test_a_fresh_folder_needs_no_force(tmp_path):
    file = in_checkout(tmp_path)
    file.unlink()
    write_profile("self", file)
    assert load_params(file) == profile("self")


@pytest.mark.parametrize("name", ["", "nothing", "../params"])
def test_an_unknown_profile_is_one_line_with_those_there_are(name):
    before = (ROOT / "params.yaml").read_bytes()
    with pytest.raises(SystemExit, match=f"^profile: no profile {name!r}; there are: default, four-iterations, llava"):
        main([name])
    assert (ROOT / "params.yaml").read_bytes() == before


def test_a_stage_by_hand_reads_a_profile():
    assert Stage("feedback", "params/self.yaml", "1", "0").params.feedback == profile("self").feedback
