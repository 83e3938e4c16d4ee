"""The plan of a run: memory, disk and hours before anything starts, from configurations alone."""

import dataclasses
import json
import re
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import Hub, settings_for
from published import CONFIGS, write_config

from rlaifv import ROOT, plan
from rlaifv.params import load_params
from rlaifv.profiles.choose import render

GB = 1e9


@pytest.fixture(autouse=True)
def _no_checkpoints_yet(tmp_path, monkeypatch):
    """This repository may have run its pipeline, or not."""
    paths = type("Paths", (), {"__init__": lambda self, name: setattr(self, "checkpoints", tmp_path / name)})
    monkeypatch.setattr(plan, "Paths", paths)


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    """A shipped profile with its models' published configurations on disk; train settings may be changed."""
    folder = tmp_path_factory.mktemp("configs")

    def read(name: str, **train):
        params = load_params(f"params/{name}.yaml")
        for role in ("policy", "labeler", "divider"):
            model = getattr(params, role)
            here = dataclasses.replace(model, path=str(write_config(folder, model.path)))
            params = dataclasses.replace(params, **{role: here})
        changes = {"train": dataclasses.replace(params.train, **train)}
        for section in ("sft", "reward_model"):
            if base := (values := getattr(params, section)).base:
                changes[section] = dataclasses.replace(values, base=str(write_config(folder, base)))
        changes["rloo_runs"] = {
            name: dataclasses.replace(run, scored_by=str(write_config(folder, by))) if by in CONFIGS else run
            for name, run in params.rloo_runs.items()
            for by in [run.scored_by]
        }
        return dataclasses.replace(params, **changes)

    return read


def planned(params, gpus: int, disk: float = 4000) -> plan.Plan:
    return plan.make_plan(params, plan.machine_here("H100", gpus), disk * GB, float("inf"))


def need(of: plan.Plan, stage: str) -> plan.Need:
    return next(n for n in of.needs if n.stage == stage)


def about(value: float):
    return pytest.approx(value, rel=0.25)


def test_parameters_are_counted_as_published(profile):
    params = profile("llava15-7b")
    policy, labeler = plan.measure(params.policy), plan.measure(params.labeler)
    assert policy.parameters / 1e9 == pytest.approx(7.06, abs=0.01)
    assert labeler.parameters / 1e9 == pytest.approx(34.75, abs=0.02)
    assert (policy.image, labeler.image) == (576, 2880)


def test_full_training_of_a_7b_on_one_gpu_does_not_fit_and_the_keys_to_change_are_named(profile):
    found = planned(profile("llava15-7b"), 1)
    short, _ = found.shortages()
    assert len(short) == 1 and short[0].startswith("train: 12")
    assert "lora_r" in short[0] and "accelerate_config" in short[0]
    assert need(found, "train").gpu / GB == about(128)
    assert need(found, "train").host / GB == about(42)


def test_full_training_of_a_7b_on_eight_gpus_fits(profile):
    found = planned(profile("llava15-7b"), 8)
    assert found.shortages()[0] == []
    assert need(found, "train").gpu / GB == about(31)
    assert need(found, "train").host / GB == about(8 * 14)


@pytest.mark.parametrize(("file", "gpus", "gb"), [("fsdp2", 2, 74), ("zero2", 8, 34), ("zero2", 4, 48.5)])
def test_sharded_training_takes_what_its_kind_spreads(profile, file, gpus, gb):
    params = profile("llava15-7b", processes=gpus, accelerate_config=f"params/accelerate/{file}.yaml")
    assert need(planned(params, gpus), "train").gpu / GB == about(gb)


def test_lora_of_a_7b_fits_one_gpu_beside_nothing_else(profile):
    found = planned(profile("llava15-7b-lora", micro_batch_size=1), 1)
    assert need(found, "train").gpu / GB == about(20)
    assert 69.5 + 6 < need(found, "feedback").gpu / GB < 69.5 + 9
    short, close = found.shortages()
    assert short == [] and [line.split(":")[0] for line in close] == ["feedback"]


def test_hours_agree_with_those_that_were_worked_out_by_hand(profile):
    slow, fast = planned(profile("llava15-7b"), 1), planned(profile("llava15-7b-lora", micro_batch_size=1), 1)
    hours = {n.stage: n.seconds / 3600 for n in slow.needs}
    assert hours["generate"] == about(2.4) and hours["divide"] == about(3.0)
    assert hours["feedback"] == about(0.9) and hours["evaluate"] == about(0.8)
    hours = {n.stage: n.seconds / 3600 for n in fast.needs}
    assert hours["generate"] == about(0.7) and hours["divide"] == about(0.5) and hours["train"] == about(1.2)


def test_checkpoints_that_the_disk_cannot_hold_are_said_with_the_key(profile):
    found = planned(profile("llava15-7b"), 8, disk=500)
    assert need(found, "train").disk / GB == about(16 * 14.1)
    (line,) = found.shortages()[0]
    assert "of 500 GB of disk" in line and "keep_checkpoints" in line and "checkpoints_per_epoch" in line
    kept = planned(profile("llava15-7b", keep_checkpoints=2), 8, disk=500)
    assert need(kept, "train").disk / GB == about(3 * 14.1) and kept.shortages()[0] == [], "and one being written"


def test_a_role_whose_engine_is_vllm_is_planned_as_in_this_process_and_that_is_said(profile):
    params = profile("llava15-7b-lora")
    served = dataclasses.replace(params, policy=dataclasses.replace(params.policy, engine="vllm"))
    assert need(planned(served, 1), "generate") == need(planned(params, 1), "generate")
    assert "the engine of policy is vllm" in plan.table(planned(served, 1))
    assert "vllm" not in plan.table(planned(params, 1))


def test_a_served_model_takes_nothing_here(profile):
    params = profile("llava15-7b")
    served = dataclasses.replace(params.labeler, path="http://127.0.0.1:8000/v1#big")
    assert "feedback" not in [n.stage for n in planned(dataclasses.replace(params, labeler=served), 8).needs]


def test_the_embedded_default_is_estimated_within_a_factor_of_two_once_one_stage_has_run(tmp_path):
    # minutes of a run on two cores of an AMD EPYC, 2026-11-27
    measured = {"generate": 0.52, "divide": 2.45, "feedback": 0.35, "train": 0.60, "evaluate": 0.48, "test": 0.81}
    params = load_params()
    for stage in measured:
        row = {"stage": f"{stage}@1", "minutes": measured[stage], "policy": params.policy.path}
        (tmp_path / "one.json").write_text(json.dumps(row))
        found = plan.make_plan(params, plan.MACHINES["CPU"], 50 * GB, 8 * GB, tmp_path)
        for n in found.needs:
            ratio = found.scale * n.seconds / 60 / measured[n.stage]
            assert 0.5 < ratio < 2, (stage, n.stage, ratio)


def test_minutes_of_another_policy_calibrate_nothing(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps({"stage": "generate@1", "minutes": 100.0, "policy": "other"}))
    assert plan.measured(tmp_path, "models/tiny/policy") == {}


def test_what_stages_took_stands_beside_their_estimates(tmp_path):
    params, machine = load_params(), plan.MACHINES["CPU"]
    (estimate,) = (n.seconds / 60 for n in plan.make_plan(params, machine).needs if n.stage == "feedback")
    for iteration, share, peak in (("0", 9.0, 90.0), ("1", 1.0, 2.5), ("2", 2.0, 3.5)):
        row = {"stage": f"feedback@{iteration}", "minutes": share * estimate, "peak_gpu_gb": peak}
        (tmp_path / f"{iteration}.json").write_text(json.dumps(row | {"policy": params.policy.path}))
    found = plan.make_plan(params, machine, timings=tmp_path)
    (row,) = found.compared()
    assert row["stage"] == "feedback" and row["estimate"] == pytest.approx(estimate)
    assert row["minutes"] == pytest.approx(1.5 * estimate) and row["peak_gpu_gb"] == 3.5, "of the trained iterations"
    assert found.scale == pytest.approx(1.5)


# ---- the other profiles


@pytest.mark.parametrize(
    ("name", "gpu", "disk"),
    [("qwen3vl-4b", "RTX4090", 120), ("self-8b", "H100", 350), ("public-dataset", "RTX4090", 80)],
)
def test_a_profile_fits_the_machine_that_its_first_lines_name(profile, name, gpu, disk):
    params = profile(name)
    found = plan.make_plan(params, plan.machine_here(gpu, 1), disk * GB, (70 if gpu == "H100" else 32) * GB)
    assert found.shortages() == ([], [])
    text = (ROOT / "params" / f"{name}.yaml").read_text()
    assert f"1 GPU of {found.machine.memory / GB:.0f} GB" in text and f"{disk} GB of disk" in text


def test_parameters_of_qwen3_vl_are_counted_as_published_and_a_cap_bounds_its_images(profile):
    params = profile("qwen3vl-4b")
    policy, labeler = plan.measure(params.policy), plan.measure(params.labeler)
    assert policy.parameters / 1e9 == pytest.approx(4.44, abs=0.01)
    assert labeler.parameters / 1e9 == pytest.approx(8.77, abs=0.01)
    assert (policy.image, policy.largest) == (300, 768), "of a 640 x 480 photo, and of the largest one"
    small = dataclasses.replace(params.policy, processor={"max_pixels": 100 * 32 * 32})
    assert plan.measure(small).image == 100


def test_four_bits_shrink_all_but_embeddings_and_output_layer(profile):
    labeler = profile("qwen3vl-4b").labeler
    whole = plan.measure(dataclasses.replace(labeler, load_in_4bit=False))
    table = 2 * 151936 * 4096
    expected = (whole.parameters - table) * 0.5625 + table * 2
    assert plan.measure(labeler).bytes == pytest.approx(expected) and whole.bytes == 2 * whole.parameters


def test_a_labeler_too_large_for_the_card_names_four_bits(profile):
    short, _ = planned(profile("llava15-7b-lora"), 1).shortages()
    assert short == []
    found = plan.make_plan(profile("llava15-7b-lora"), plan.machine_here("L40S", 1), 4000 * GB)
    lines = [line for line in found.shortages()[0] if line.startswith(("feedback", "test"))]
    assert len(lines) == 2 and all("labeler.load_in_4bit: true" in line for line in lines)


def test_the_public_dataset_plans_no_feedback_and_as_many_pairs_as_its_files_have(profile, tmp_path):
    params = profile("public-dataset")
    found = planned(params, 1)
    assert [n.stage for n in found.needs] == ["train", "evaluate", "test"]
    row = need(found, "train").tokens / plan.PUBLIC_PAIRS
    pq.write_table(pa.table({"chosen": ["a"] * 50}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"chosen": ["a"] * 30}), tmp_path / "b.parquet")
    here = dataclasses.replace(params, pairs=dataclasses.replace(params.pairs, source=str(tmp_path)))
    assert need(planned(here, 1), "train").tokens == pytest.approx(80 * row)


def test_a_rarer_state_to_resume_from_is_written_in_less_time(profile):
    often, seldom = (need(planned(profile("llava15-7b", resume_every=n), 8), "train").seconds for n in (1, 8))
    assert often - seldom == pytest.approx(14 * 12 * 6.76e9 / plan.WRITE, rel=0.05)


def test_small_models_are_not_planned_before_a_run(monkeypatch, capsys):
    monkeypatch.setattr(plan, "make_plan", None)
    plan.main(["--check"])
    assert capsys.readouterr().out == ""


def test_benchmarks_without_their_files_stop_a_run_before_its_first_stage(monkeypatch, tmp_path):
    params = dataclasses.replace(load_params(), benchmarks=load_params("params/llava15-7b.yaml").benchmarks)
    monkeypatch.setattr(plan, "load_params", lambda path: params)
    monkeypatch.setattr("rlaifv.benchmarks.suite.ROOT", tmp_path)
    with pytest.raises(SystemExit) as stop:
        plan.main(["--check"])
    first, *_, last = str(stop.value).splitlines()
    assert first.startswith("benchmarks.pope_random.questions: no data/benchmarks/pope/") and "fetch" in first
    assert last == "`benchmarks: {}` in the parameter file runs without any"


def test_what_was_written_already_is_not_asked_of_the_disk_again(profile, tmp_path):
    before = planned(profile("llava15-7b"), 8)
    for name in ("1", "2", "3"):
        (tmp_path / name).mkdir()
    after = planned(profile("llava15-7b"), 8, disk=500)
    assert (before.ahead, after.ahead) == (4, 1) and after.shortages()[0] == []


def test_hub_models_are_planned_from_their_configurations_and_no_weights_are_fetched(tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text(re.sub(r"revision: \w{40}", "revision: null", render("llava15-7b")))
    command = [sys.executable, "-m", "rlaifv.plan", "--params", str(file), "--disk", "4000", "--gpu", "H100", "--gpus"]
    with Hub() as hub:
        for name in CONFIGS:
            folder = write_config(tmp_path, name)
            (folder / "model.safetensors").write_bytes(b"not for the plan")
            hub.push(name, folder)
        environment = settings_for(hub.endpoint, tmp_path / "home")
        one, eight = (
            subprocess.run([*command, gpus], cwd=ROOT, env=environment, capture_output=True, text=True)
            for gpus in ("1", "8")
        )
        assert not hub.downloads("model.safetensors")
    assert eight.returncode == 0 and eight.stdout.splitlines()[-1] == "it fits", eight.stderr
    stages = ["generate", "divide", "feedback", "train", "evaluate", "test"]
    assert [line.split()[0] for line in eight.stdout.splitlines()[2:8]] == stages
    said = [line for line in one.stderr.splitlines() if line.startswith("does not fit: ")]
    assert one.returncode == 1 and said[0].startswith("does not fit: train: 124 of 80 GB on a GPU")


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text(render("default").replace("models/tiny/divider", "models/absent"))
    with pytest.raises(SystemExit) as stop:
        plan.main(["--params", str(file)])
    assert str(stop.value).startswith("plan: no checkpoint at 'models/absent'") and "\n" not in str(stop.value)


def test_rloo_needs_policy_and_judges_in_memory_together_and_is_planned_on_request(profile):
    params = profile("rloo-claims-7b")
    assert "rloo" not in {n.stage for n in planned(params, 1).needs}
    found = plan.make_plan(params, plan.machine_here("H100", 1), 4000 * GB, float("inf"), also=["rloo"])
    judges = sum(plan.measure(getattr(params, role)).bytes for role in ("labeler", "divider"))
    assert found.shortages()[0] == [] and need(found, "rloo").gpu > judges + plan.measure(params.policy).bytes
    whole = dataclasses.replace(params, labeler=dataclasses.replace(params.labeler, load_in_4bit=False))
    short, _ = plan.make_plan(whole, plan.machine_here("H100", 1), 4000 * GB, float("inf"), also=["rloo"]).shortages()
    assert [line for line in short if line.startswith("rloo: ") and "labeler.load_in_4bit: true" in line]


@pytest.mark.parametrize(("name", "gpu"), [("llava-rlhf-7b", "H100"), ("llava-rlhf-13b", "H200")])
def test_llava_rlhf_with_all_that_is_run_beside_the_pipeline_fits_the_machine_of_its_first_lines(profile, name, gpu):
    params, text = profile(name), (ROOT / "params" / f"{name}.yaml").read_text()
    memory, host, disk = map(int, re.search(r"1 GPU of (\d+) GB, (\d+) GB .* and (\d+) GB of disk", text).groups())
    machine = plan.machine_here(gpu, 1)
    found = plan.make_plan(params, machine, disk * GB, host * GB, also=list(plan.BESIDE))
    assert [n.stage for n in found.needs][-3:] == ["sft", "reward_model", "rloo"]
    assert found.shortages() == ([], []) and machine.memory == memory * GB
    whole = dataclasses.replace(params.reward_model, lora_r=0)
    short, _ = plan.make_plan(
        dataclasses.replace(params, reward_model=whole), machine, also=["reward_model"]
    ).shortages()
    assert [line for line in short if line.startswith("reward_model: ") and "reward_model.lora_r: 64" in line]


def test_a_reward_model_lies_beside_the_policy_while_rloo_asks_it(profile):
    params, machine = profile("llava-rlhf-7b"), plan.machine_here("H100", 1)
    alone = dataclasses.replace(params, rloo_runs={"claims": params.rloo_runs["claims"]})
    scored = params.rloo_runs["fact_rlhf"]
    both = dataclasses.replace(params, rloo_runs={"both": dataclasses.replace(scored, claims=0.33)})
    asked, free, all_judges = (need(plan.make_plan(p, machine, also=["rloo"]), "rloo") for p in (params, alone, both))
    assert all_judges.gpu - free.gpu > 26 * GB and all_judges.seconds > free.seconds
    assert all_judges.gpu - asked.gpu > plan.measure(params.labeler).bytes, "judges that no reward counts stay out"


def test_a_tower_that_is_larger_than_what_reads_it_counts(profile):
    found = planned(profile("rlaifv-12b-self"), 8)
    policy = plan.measure(profile("rlaifv-12b-self").policy)
    assert policy.parameters / 1e9 == pytest.approx(11.61, abs=0.01)
    assert (policy.image, policy.seeing / 1e12) == (64, pytest.approx(8.95, abs=0.05)), "1,024 patches of an image"
    assert need(found, "feedback").flops / 1e12 == about(2 * 7.1e-3 * 4.6e6 + 4000 * 8.95)
    assert need(found, "train").flops / 1e12 == about(398e3 + 4000 * 5 * 8.95)
    assert found.shortages()[0] == []


TABLE = (ROOT / "docs" / "hardware.md").read_text()
ROWS = re.findall(
    r"^\| `(\S+)` \| (\d) × \d+ GB \((.*?)\) \| (\d+) GB \| ([\d.]+) ([GT]B) \|.*\| ([\d.]+) h \|$", TABLE, re.M
)


@pytest.mark.parametrize(("name", "gpus", "gpu", "host", "disk", "unit", "hours"), ROWS, ids=lambda value: str(value))
def test_the_table_of_hardware_says_what_the_profile_and_its_plan_say(
    profile, name, gpus, gpu, host, disk, unit, hours
):
    first_lines = " ".join(
        (ROOT / "params" / f"{name}.yaml").read_text().partition("\n\n")[0].replace("#", " ").split()
    )
    for asked in (f"For {gpus} GPU", f"{host} GB of main memory", f"{disk} {unit} of disk"):
        assert asked in first_lines
    room = float(disk) * (1000 if unit == "TB" else 1) * GB
    found = plan.make_plan(profile(name), plan.machine_here(gpu.replace(" ", ""), int(gpus)), room, float(host) * GB)
    assert found.shortages()[0] == []
    assert found.iterations * sum(n.seconds for n in found.needs) / 3600 == pytest.approx(float(hours), rel=0.1)


def test_every_profile_of_a_real_model_is_in_the_table_or_is_not_run_by_dpo():
    real = {
        path.stem
        for path in (ROOT / "params").glob("*.yaml")
        if "1 GPU" in path.read_text() or "8 GPUs" in path.read_text()
    }
    assert real - {row[0] for row in ROWS} <= {"rloo-claims-7b", "llava-rlhf-7b", "llava-rlhf-13b"}


def test_judging_by_claims_is_planned_for_all_answers_and_for_the_second_labeler(profile):
    params = profile("llava15-7b", keep_checkpoints=None)
    none = {"instances": None, "captions": None}
    dev, test = (dataclasses.replace(split, **none) for split in (params.prepare.dev, params.prepare.test))
    claims = dataclasses.replace(params, prepare=dataclasses.replace(params.prepare, dev=dev, test=test))
    before, found = planned(params, 1), planned(claims, 1)
    for stage in ("evaluate", "test"):
        assert need(found, stage).seconds > 1.2 * need(before, stage).seconds, stage
    small = dataclasses.replace(params.policy, dtype="float16")
    second = dataclasses.replace(claims, evaluate=dataclasses.replace(params.evaluate, labeler=small))
    assert need(planned(second, 1), "test").seconds < need(found, "test").seconds, "7B judge in place of 34B"
