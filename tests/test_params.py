"""Parameters are checked in the first second, and an error says key, value and way out."""

import copy
import dataclasses
import functools
import inspect
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML
from trl import DPOTrainer

from rlaifv import ROOT
from rlaifv.fingerprint import digest
from rlaifv.params import DEFAULT, LOSSES, ParamsError, TrainParams, check_params, load_params, read_yaml

CONTENT = read_yaml(DEFAULT)


def profile(tmp_path: Path, change) -> Path:
    content = YAML(typ="safe", pure=True).load(DEFAULT)
    change(content)
    path = tmp_path / "params.yaml"
    with path.open("w") as stream:
        YAML().dump(content, stream)
    return path


@pytest.mark.parametrize("path", [DEFAULT, *sorted((ROOT / "params").glob("*.yaml"))], ids=lambda p: p.stem)
def test_every_shipped_profile_is_complete_and_valid(path):
    assert load_params(path).seed >= 0


def test_a_small_number_without_a_dot_is_a_number(tmp_path):
    path = tmp_path / "params.yaml"
    written, changed = re.subn(r"(learning_rate:) [\d.e-]+", r"\1 7e-5", DEFAULT.read_text())
    path.write_text(written)
    assert changed and load_params(path).train.learning_rate == 7e-5


def test_a_number_read_as_text_is_refused_with_key_value_and_hint(tmp_path):
    path = profile(tmp_path, lambda c: c["train"].update(learning_rate="5e-7"))
    with pytest.raises(ParamsError, match=r"train\.learning_rate: expected a number, got '5e-7'.*quotes"):
        load_params(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["generate"].update(temprature=1.0),
            r"unknown key generate\.temprature; known here: .*temperature",
        ),
        (lambda c: c["generate"].pop("top_k"), r"missing key generate\.top_k"),
        (lambda c: c["generate"].update(temperature=0), r"generate\.temperature: expected a value above 0, got 0"),
        (lambda c: c["generate"].update(samples=True), r"generate\.samples: expected a whole number, got True"),
        (lambda c: c["ablation"].update(balance_length="true"), r"ablation\.balance_length: expected true or false"),
        (lambda c: c["policy"].update(dtype="fp16"), r"policy\.dtype: expected one of float32, .*got 'fp16'"),
        (lambda c: c["iterations"].update({3: {"prev": "2"}}), "names are text"),
        (lambda c: c["iterations"].update({"3": {"prev": "7"}}), r"iterations\.3\.prev: no iteration '7'"),
        (lambda c: c["iterations"].update({"1": {"prev": "2"}}), r"iterations\.1\.prev: '2' is not before '1'"),
        (lambda c: c["train"].update(learning_rate=1.0), r"train\.learning_rate: .* below 1, got 1"),
        (
            lambda c: c["generate"].update(top_p=0.0),
            r"generate\.top_p: .* above 0 and not above 1, got 0",
        ),
        (
            lambda c: c["train"].update(dtype="float16"),
            r"train\.dtype: expected one of float32, bfloat16,",
        ),
        (lambda c: c["train"].update(loss_type=["sigmiod"]), r"train\.loss_type: expected some of sigmoid, .*sigmiod"),
        (lambda c: c["train"].update(loss_type=[]), r"train\.loss_type: expected some of sigmoid"),
        (lambda c: c["train"].update(scheduler="cosin"), r"train\.scheduler: expected one of cosine, .*'cosin'"),
        (lambda c: c["train"].update(warmup_ratio=1.0), r"train\.warmup_ratio: expected a value from 0 to below 1"),
        (lambda c: c["train"].update(micro_batch_size=3), r"params\.yaml: train\.batch_size 8 is not a multiple"),
        (lambda c: c["reward_model"].update(micro_batch_size=3), r"reward_model\.batch_size 8 is not a multiple"),
        (lambda c: c["sft"].update(micro_batch_size=3), r"sft\.batch_size 16 is not a multiple"),
        (lambda c: c["sft_parts"]["questions"].update(kind="vqa_yes_no"), r"questions\.files: .* is 2 files, got 1"),
        (lambda c: c["sft_parts"]["questions"].update(kind="vqa"), r"questions\.kind: expected one of llava_instruct"),
        (lambda c: c.update(sft_parts={}), r"sft_parts: expected a section with at least one entry"),
        (lambda c: c["reward_model"].update(fact_line="- "), r"reward_model\.fact_line '- ' has no {} for the fact"),
        (lambda c: c["reward_model"].update(facts_prompt=None), r"runs\.captions\.facts: .* needs .*facts_prompt"),
        (lambda c: c["reward_model"].update(captions=None), r"runs\.captions\.facts: captions needs .*captions, the"),
        (lambda c: c["reward_model"].update(preferences="p.json"), r"runs\.some_taste\.taste: 1 is of embedded"),
        (lambda c: c.update(train=None), r"train: expected a section, got None"),
        (lambda c: c["server"].update(key_variable="sk-1"), r"server\.key_variable: .* never the key itself$"),
    ],
)
def test_a_wrong_profile_is_refused_with_the_key(tmp_path, change, message):
    with pytest.raises(ParamsError, match=message):
        load_params(profile(tmp_path, change))


def many(*keys: str, value, message: str):
    """The same wrong value under each of several keys, such as "train.beta"."""

    def change(content, section: str, name: str):
        (content[section] if section else content).update({name: value})

    for key in keys:
        section, _, name = key.rpartition(".")
        yield pytest.param(lambda c, s=section, n=name: change(c, s, n), rf"{key}.*: {message}", id=f"{key}={value}")


NUMBERS = (
    "generate.temperature", "generate.top_p", "divide.temperature", "feedback.min_answer_mass", "ablation.coin_share",
    "select.max_recall_drop", "train.beta", "train.learning_rate", "train.weight_decay", "train.max_grad_norm",
    "train.label_smoothing", "train.segment_weight", "train.feature_cache_gb", "train.collapse_nats",
)  # fmt: skip
FILES = ("policy.path", "labeler.path", "divider.path", "prepare.image_root", "prepare.instructions")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *many("seed", "world.seed", value=-1, message="expected a whole number from 0 to 4294967295, got -1"),
        *many(
            "seed", "world.seed", value=2**32, message="expected a whole number from 0 to 4294967295, got 4294967296"
        ),
        *many(*NUMBERS, value=math.inf, message="expected a finite number, got inf"),
        *many(*NUMBERS, value=math.nan, message="expected a finite number, got nan"),
        *many("train.loss_weights", value=[math.inf], message="expected a finite number, got inf"),
        *many("train.loss_weights", value=[0], message="expected a value above 0, got 0"),
        *many("train.loss_weights", value=-1, message="expected a value above 0, got -1"),
        *many("train.max_length", value=0, message="expected a value of at least 1, got 0"),
        *many("train.max_length", value=-5, message="expected a value of at least 1, got -5"),
        *many("generate.samples", "train.epochs", value=2**31, message="expected a value of at most 2147483647, got"),
        *many("generate.top_k", value=2**63, message="expected a value of at most 2147483647, got"),
        *many("feedback.suffix", "policy.path", value="a\0", message="expected text without control characters, got"),
        *many(
            "feedback.suffix", "policy.path", value="\ud800", message="expected text without control characters, got"
        ),
        *many("policy.revision", value="", message="expected text that is not empty, got ''"),
        *many("train.lora_targets", value=[], message="expected at least one layer, got \\[\\]"),
        *many(*FILES, value="", message="expected text that is not empty, got ''"),
        *many(*FILES, value=" ", message="expected text that is not empty, got ' '"),
        *many("train.accelerate_config", value="/etc/passwd", message="expected a file of the repository"),
        *many("train.accelerate_config", value="../x.yaml", message="expected a file of the repository"),
    ],
)
def test_a_value_that_would_stop_or_spoil_a_later_stage_is_refused_at_once(tmp_path, change, message):
    with pytest.raises(ParamsError, match=message):
        load_params(profile(tmp_path, change))


KEYS = [(section, None) for section in CONTENT]
KEYS += [(section, name) for section, values in CONTENT.items() if isinstance(values, dict) for name in values]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=9) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@given(key=st.sampled_from(KEYS), value=VALUES)
def test_whatever_stands_at_a_key_is_taken_or_refused_in_one_line(key, value):
    section, name = key
    content = CONTENT | {section: value if name is None else CONTENT[section] | {name: value}}
    try:
        check_params(content, "params.yaml")
    except ParamsError as error:
        assert str(error).startswith("params.yaml: ") and len(str(error).splitlines()) == 1


def leaves(content, place=()):
    """The keys of all numbers in a parameter file."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from leaves(value, (*place, key))
        elif type(value) in (int, float):
            yield *place, key


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, -0.5, 10**400, True])
def test_no_number_takes_what_is_not_finite_below_zero_or_too_large(value):
    numbers = list(leaves(CONTENT))
    assert len(numbers) > 50
    for *sections, name in numbers:
        content = copy.deepcopy(CONTENT)
        functools.reduce(dict.__getitem__, sections, content)[name] = value
        with pytest.raises(ParamsError, match=rf"^params\.yaml: {'.'.join([*sections, name])}: expected "):
            check_params(content, "params.yaml")


JUDGE = {"kind": "mmhal", "questions": ["a"], "truth": [], "vocabulary": None, "images": None, "suffix": "", "beams": 1}
JUDGE |= {"answers": None, "judge": {"name": "x", "engine": "transformers", "prompts": [], "strict_published": False}}


@pytest.mark.parametrize(
    "address", ["http://me:s3cret@host:8000/v1#m", "HTTPS://s3cret@host/v1#m", "http://h/v1?k=s3cret#m"]
)
def test_an_address_that_holds_a_key_is_refused_and_not_shown(address):
    for section in ("labeler", "policy", "divider"):
        with pytest.raises(ParamsError, match=rf"{section}\.path: expected no user, password or query") as caught:
            check_params(CONTENT | {section: CONTENT[section] | {"path": address}}, "params.yaml")
        assert "s3cret" not in str(caught.value)
    entry = JUDGE | {"judge": JUDGE["judge"] | {"base_url": address}}
    with pytest.raises(ParamsError, match=r"benchmarks\.b\.judge\.base_url: expected no user") as caught:
        check_params(CONTENT | {"benchmarks": {"b": entry}}, "params.yaml")
    assert "s3cret" not in str(caught.value)


def test_labeler_and_divider_may_be_behind_an_address_and_the_policy_is_trained():
    path = {"path": "http://127.0.0.1:8000/v1#m@1"}
    for section in ("labeler", "divider"):
        check_params(CONTENT | {section: CONTENT[section] | path}, "params.yaml")
    with pytest.raises(ParamsError, match=r"policy\.path: the policy is trained: .*policy\.engine: vllm"):
        check_params(CONTENT | {"policy": CONTENT["policy"] | path}, "params.yaml")


SERVED = {"policy": CONTENT["policy"] | {"engine": "vllm"}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (SERVED | {"evaluate": CONTENT["evaluate"] | {"beams": 3}}, r"evaluate\.beams: a server samples"),
        (
            SERVED | {"generate": CONTENT["generate"] | {"repetition_penalty": 1.1}},
            r"generate\.repetition_penalty 1\.1",
        ),
        ({"labeler": CONTENT["labeler"] | {"engine": "vllm", "load_in_4bit": True}}, r"labeler\.load_in_4bit: vllm"),
        ({"labeler": CONTENT["labeler"] | {"engine": "vllm", "path": "http://h/v1#m"}}, r"labeler\.engine: .* already"),
        (
            {"server": CONTENT["server"] | {"command": "vllm serve {path} --port {port}"}},
            r"server\.command: has no {name}",
        ),
        ({"server": CONTENT["server"] | {"command": "vllm '{path} {port} {name}"}}, r"server\.command: No closing"),
    ],
)
def test_what_a_server_cannot_do_is_refused_before_it_is_started(change, said):
    with pytest.raises(ParamsError, match=said):
        check_params(CONTENT | change, "params.yaml")


def test_pairs_of_somebody_else_are_for_one_iteration(tmp_path):
    with pytest.raises(ParamsError, match=r"pairs\.source gives the pairs of one iteration: leave one of the 2 under"):
        load_params(profile(tmp_path, lambda c: c["pairs"].update(source="data/public")))


@pytest.mark.parametrize("name", ["007", "01", "٢", "0", "-1", "1.0", "", "9" * 5000])
def test_iterations_are_named_1_2_and_so_on_and_in_no_other_spelling(tmp_path, name):
    path = profile(tmp_path, lambda c: c["iterations"].update({name: {"prev": "0"}}))
    with pytest.raises(ParamsError, match=f'iterations: expected names "1", "2", ..., got {name!r}'):
        load_params(path)


@pytest.mark.parametrize(
    ("value", "hinted"), [("5e-7", True), ("1", True), ("+.5", True), (True, False), (None, False), ("many", False)]
)
def test_only_text_that_would_be_a_number_without_quotes_is_told_to_lose_them(tmp_path, value, hinted):
    path = profile(tmp_path, lambda c: c["train"].update(beta=value))
    with pytest.raises(ParamsError) as error:
        load_params(path)
    assert ("quotes" in str(error.value)) == hinted
    path = profile(tmp_path, lambda c: c["train"].update(epochs=1.5))
    with pytest.raises(ParamsError, match=r"expected a whole number, got 1.5$"):
        load_params(path)


BROKEN = ("&x [*x]", "&x {beta: *x}", "&x {<<: *x}", "&x {? *x : 1}", "{a: 1, a: 2}", "!!python/object:os.system ls")
BROKEN += ("[" * 5000, "2024-13-45", "\x00", "{beta: .inf", '{"a\\nb": 1}')


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_a_recursive_or_broken_value_is_one_line(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text(re.sub(r"^select:\n.*", lambda _: f"select: {text}", DEFAULT.read_text(), flags=re.MULTILINE))
    with pytest.raises(ParamsError) as error:
        load_params(path)
    assert len(str(error.value).splitlines()) == 1


def test_of_several_errors_the_first_is_told(tmp_path):
    path = profile(tmp_path, lambda c: (c["pairs"].update(min_gap=0), c["generate"].update(top_p=2, samples=1)))
    with pytest.raises(ParamsError, match=r"^params\.yaml: generate\.samples: expected a value of at least 2, got 1$"):
        load_params(path)


def test_sections_are_dataclasses_with_lists_as_tuples_and_a_single_value_as_a_list_of_one(tmp_path):
    params = load_params(profile(tmp_path, lambda c: c["train"].update(loss_type="ipo", loss_weights=2)))
    assert params.train.loss_type == ("ipo",) and params.train.loss_weights == (2.0,)
    assert dataclasses.is_dataclass(params)
    assert dataclasses.asdict(params)["train"]["lora_targets"][0] == "q_proj"
    assert dataclasses.replace(params.train, beta=0.2) == TrainParams(
        **dataclasses.asdict(params.train) | {"beta": 0.2}
    )
    assert digest(params) == digest(load_params(tmp_path / "params.yaml")) != digest(load_params())
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.train.beta = 1.0
    with pytest.raises(ValueError, match="beta"):
        dataclasses.replace(params.train, beta=-1.0)


def test_the_losses_that_are_accepted_are_those_of_trl():
    source = inspect.getsource(DPOTrainer._compute_loss)
    assert set(LOSSES) == set(re.findall(r'loss_type == "(\w+)"', source))


def test_broken_yaml_is_one_line(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("seed: [1\n")
    with pytest.raises(ParamsError) as error:
        load_params(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_names_the_profiles_there_are():
    with pytest.raises(ParamsError, match=r"params/\*\.yaml"):
        load_params("params/nothing.yaml")


def test_a_stage_with_a_wrong_profile_stops_before_a_kernel_starts_and_without_a_traceback(tmp_path):
    path = profile(tmp_path, lambda c: c["train"].update(beta=-1))
    command = [sys.executable, "-m", "rlaifv.run", "10_prepare", f"params_file={path}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr.strip() == "params.yaml: train.beta: expected a value above 0, got -1"


def test_reading_parameters_imports_nothing_heavy():
    code = "import sys, rlaifv.params; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'pandas')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
