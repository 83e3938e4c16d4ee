"""A server that a stage starts for a model: the answers of the plain computation, no question lost or asked twice when
it dies, and no server left behind."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rlaifv import ROOT
from rlaifv.evaluation.hallucination import Split, model_answers
from rlaifv.inference import engine, guard, roles
from rlaifv.inference.engine import EngineFailed, check_command
from rlaifv.inference.roles import OpenQuestion, draw_answers, load_role, look
from rlaifv.inference.sampling import Decoding
from rlaifv.inference.served import Served
from rlaifv.inference.yes_no import judge_fit
from rlaifv.params import EvaluateParams, ServerParams, load_params
from rlaifv.records import Candidate, Instruction, ModelRecord, read_jsonl, read_records
from rlaifv.steps.divide import divide_answers
from rlaifv.steps.generate import generate
from rlaifv.store import Store
from rlaifv.tinyworld.scenes import make_scene, render
from rlaifv.vlm.checkpoint import fingerprint_checkpoint
from rlaifv.vlm.loading import load_model, load_reader, loaded

SCRIPT = Path(__file__).parents[1] / "helpers" / "engine_server.py"
GREEDY, SAMPLED = Decoding(0, 0, 1, 40), Decoding(0.7, 50, 1.0, 40)
QUESTIONS = ["Is there a dog in the picture?", "Is there a red cup in the picture?", "Is the table blue?"]
DIVIDE = load_params().divide
GENERATE = dataclasses.replace(load_params().generate, samples=2, max_new_tokens=40, batch_size=5, max_reject_rate=0.5)
SUFFIX = "Please answer yes or no."


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    for number in range(4):
        render(make_scene(78, number), 78).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Iterator[Served]:
    """The embedded policy behind a server, for the tests that only ask it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "LOGS", tmp_path_factory.mktemp("logs"))
        patch.setattr(roles, "SCRATCH", tmp_path_factory.mktemp("scratch"))
        served = load_role(record("policy"), served_by())
    yield served
    served.close()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """Logs, kept answers and prepared checkpoints of a test are its own."""
    monkeypatch.setattr(engine, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(roles, "SCRATCH", tmp_path)
    monkeypatch.setattr(roles, "SERVABLE", tmp_path / "servable")
    return tmp_path


def record(role: str, engine: str = "vllm", **settings) -> ModelRecord:
    path = f"models/tiny/{role}"
    return ModelRecord(path, None, "float32", "cpu", fingerprint_checkpoint(path, None, settings), engine, **settings)


def served_by(*options: object, **params) -> ServerParams:
    words = [sys.executable, SCRIPT, "{path}", "{port}", "{name}", *options]
    return ServerParams(**{"command": " ".join(map(str, words)), "concurrency": 4, "tries": 1} | params)


def asked(images: list[Path]) -> list[OpenQuestion]:
    return [OpenQuestion(image.stem, "Describe the picture in detail.", image) for image in images]


def test_it_says_what_the_same_model_says_in_this_process(images):
    plain = load_model(record("policy"))
    with loaded(lambda: load_role(record("policy"), served_by())) as policy:
        assert draw_answers(policy(), asked(images), [0], 1, GREEDY) == draw_answers(
            plain, asked(images), [0], 1, GREEDY
        )
        drawn = draw_answers(policy(), asked(images), [0, 1, 2], 1, SAMPLED)
        assert len({answer.text for row in drawn for answer in row}) > 6, "every sample has a seed of its own"
        items = [(look(policy(), image), [f"{q} {SUFFIX}" for q in QUESTIONS]) for image in images]
        ours = [(look(plain, image), [f"{q} {SUFFIX}" for q in QUESTIONS]) for image in images]
        for row, exact in zip(judge_fit(policy(), items), judge_fit(plain, ours), strict=True):
            assert [p for answer in row for p in answer] == pytest.approx([p for a in exact for p in a], abs=1e-3)


def test_a_divider_behind_it_divides_as_in_this_process(tmp_path):
    params = dataclasses.replace(DIVIDE, temperature=0.0)
    texts = [("Describe it.", "There is a red dog on the left. There are two blue cups."), ("Describe it.", "A cat.")]
    plain = divide_answers(load_model(record("divider")), texts, params, 1)
    with loaded(lambda: load_role(record("divider"), served_by())) as divider:
        assert divide_answers(divider(), texts, params, 1) == plain and plain[0].claims


def test_generation_through_it_keeps_and_rejects_what_it_would_in_this_process(policy, images, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows = [Instruction(f"i{n}", str(image), "What is in the picture?") for n, image in enumerate(images)]
    rows += [Instruction("gone", "gone.png", "What?"), Instruction("broken", str(tmp_path / "broken.png"), "What?")]
    rows += [Instruction("steers", str(images[0]), "What </s> is it?"), Instruction("long", str(images[0]), "too long")]
    out = tmp_path / "out" / "candidates.jsonl"
    store = Store("generate", {}, tmp_path / "scratch")
    counts = generate(lambda: dataclasses.replace(policy, close=lambda: None), rows, tmp_path, GENERATE, 1, store, out)
    assert counts == (8, 8)
    assert {c.instruction_id for c in read_records(out, Candidate)} == {"i0", "i1", "i2", "i3"}
    reasons = {row["id"]: row["reason"] for row in read_jsonl(out.parent / "rejects.jsonl")}
    assert "does not exist" in reasons["gone#0"] and "cannot be decoded" in reasons["broken#1"]
    assert "holds '</s>'" in reasons["steers#0"] and "HTTP 400" in reasons["long#0"]


def test_evaluation_through_it_gives_the_same_greedy_answers(policy, images):
    rows = [Instruction(f"i{n}", image.name, "What is in the picture?") for n, image in enumerate(images)]
    split = Split("dev", rows, {}, {}, [], images[0].parent)
    params = EvaluateParams(beams=1, max_new_tokens=40, batch_size=3)
    assert model_answers(policy, split, params) == model_answers(load_model(record("policy")), split, params)
    with pytest.raises(ValueError, match="no beams"):
        model_answers(policy, split, dataclasses.replace(params, beams=3))


def test_a_system_turn_of_the_parameter_file_is_in_the_checkpoint_that_is_served():
    model = record("policy", system="Be brief.", processor={"do_rescale": True})
    with loaded(lambda: load_role(model, served_by())) as policy:
        assert policy().reader.processor.chat_template.count("Be brief.") == 2
    (folder,) = roles.SERVABLE.iterdir()
    own = load_reader(model.path, settings=model.settings).processor
    assert load_reader(str(folder)).processor.chat_template == own.chat_template
    assert (folder / "model.safetensors").resolve() == ROOT / "models/tiny/policy/model.safetensors"


def test_a_server_that_dies_is_started_again_once_and_nothing_is_asked_twice(policy, images, tmp_path, caplog):
    log = tmp_path / "asked.txt"
    with loaded(lambda: load_role(record("policy"), served_by("--log", log, "--dies", 5, 1))) as dying:
        drawn = draw_answers(dying(), asked(images), [0, 1, 2], 1, SAMPLED)
    assert draw_answers(policy, asked(images), [0, 1, 2], 1, SAMPLED) == drawn
    questions = log.read_text().splitlines()
    assert len(questions) == len(set(questions)) == 12
    assert "has died (RuntimeError: CUDA error" in caplog.text and "it is started again" in caplog.text


def test_one_that_dies_twice_ends_the_stage_in_a_line_and_the_next_run_asks_for_the_rest(images, tmp_path):
    log = tmp_path / "asked.txt"
    dying = served_by("--log", log, "--dies", 4, 2)
    with (
        loaded(lambda: load_role(record("policy"), dying)) as policy,
        pytest.raises(EngineFailed, match=r"died 2 times, .* illegal memory access .* so far are kept") as caught,
    ):
        draw_answers(policy(), asked(images), [0, 1, 2], 1, SAMPLED)
    assert "\n" not in str(caught.value)
    with loaded(lambda: load_role(record("policy"), dying)) as policy:  # its third life lasts
        draw_answers(policy(), asked(images), [0, 1, 2], 1, SAMPLED)
    questions = log.read_text().splitlines()
    assert len(questions) == len(set(questions)) == 12


def test_one_that_does_not_start_is_a_line_with_its_last_words():
    with pytest.raises(EngineFailed, match=r"ended with code 2 while it started .*arguments: --no-such") as caught:
        load_role(record("policy"), served_by("--no-such-option"))
    assert "\n" not in str(caught.value) and "logs/models-tiny-policy.log" in str(caught.value)


def test_one_that_never_answers_is_given_up_after_the_minutes_it_has():
    command = f"{sys.executable} -c 'import time; time.sleep(60)' {{path}} {{port}} {{name}}"
    started = time.monotonic()
    with pytest.raises(EngineFailed, match=r"does not answer after server\.start_minutes = 0\.02"):
        load_role(record("policy"), ServerParams(command=command, start_minutes=0.02))
    assert time.monotonic() - started < 30


OWNER = """
import sys
from rlaifv.inference.engine import Engine
from rlaifv.inference.engine import free_port
port = free_port()
engine = Engine("owned", [sys.executable, {script!r}, {path!r}, str(port), "owned"], port, 1)
print(engine._process.pid, flush=True)
sys.stdin.read()
"""


def test_it_ends_with_whoever_started_it_however_that_ends(tmp_path):
    code = OWNER.format(script=str(SCRIPT), path=str(ROOT / "models/tiny/policy"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(SCRIPT.parent)])}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as owner:
        guard = psutil.Process(int(owner.stdout.readline()))
        (server,) = guard.children()
        assert server.is_running()
        owner.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs([guard, server], timeout=30)
    assert not alive


LEAVES = """
import os, subprocess
print(subprocess.Popen(["sleep", "99"], start_new_session=True).pid, flush=True)
os._exit(7)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux hands what a process leaves behind to another")
def test_workers_that_a_dead_server_leaves_behind_are_ended_too():
    command = [sys.executable, "-m", guard.__name__, sys.executable, "-c", LEAVES]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        worker = int(process.stdout.readline())
        assert process.wait(30) == 7
    assert not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE


def test_a_program_that_is_not_there_is_told_before_anything_is_fetched():
    with pytest.raises(ValueError, match=r"labeler\.engine is vllm, .* 'no-such-vllm', which is not installed"):
        check_command("labeler", ServerParams(command="env A=1 no-such-vllm serve {path} {port} {name}"))
    check_command("labeler", ServerParams(command=f"{sys.executable} -m vllm {{path}} {{port}} {{name}}"))


def test_a_checkpoint_that_has_changed_is_not_served():
    changed = dataclasses.replace(record("policy"), fingerprint="0" * 16)
    with pytest.raises(ValueError, match="has changed since the stage models looked at it"):
        load_role(changed, served_by())
