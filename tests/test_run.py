"""The runner of stage notebooks: whatever ends a run is said in one line with the way out."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from ruamel.yaml import YAML

from rlaifv import ROOT, run
from rlaifv.fingerprint import place_of
from rlaifv.params import read_content
from rlaifv.results import read_result, write_result


def notebook(folder: Path, source: str, name: str = "20_generate") -> Path:
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python", "language": "python"}}
    path = folder / f"{name}.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)], metadata=kernel), path)
    return path


@pytest.fixture
def executed(tmp_path, monkeypatch, capfd):
    """Runs a cell as the stage generate → exit code, lines on stderr."""
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")

    def execute(source: str) -> tuple[int, list[str]]:
        code = run.execute(notebook(tmp_path, source), {})
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith(("20_", "the traceback"))]
        return code, lines

    return execute


def test_what_a_notebook_prints_comes_out_and_its_executed_copy_is_kept(executed, tmp_path):
    assert executed("print('one')\n1 + 1") == (0, [])
    (cell,) = nbformat.read(tmp_path / "runs" / "20_generate.ipynb", 4).cells
    assert [output["output_type"] for output in cell.outputs] == ["stream", "execute_result"]


def test_a_failed_cell_is_one_line_and_where_its_traceback_lies(executed):
    code, (line, where) = executed("raise ValueError('no such thing')")
    assert code == 1 and line == "20_generate: ValueError: no such thing"
    assert where.endswith("20_generate.ipynb")


def test_memory_that_runs_out_names_the_key_to_lower(executed):
    code, (line, _) = executed("raise MemoryError()")
    assert code == 1 and line.startswith("20_generate: out of memory: lower generate.batch_size")


def test_memory_that_runs_out_inside_torch_or_for_good_names_the_key_too(executed):
    said = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    for cell in (f"raise RuntimeError({said!r})", 'raise RuntimeError("can\'t start new thread")'):
        code, (line, _) = executed(cell)
        assert code == 1 and line.startswith("20_generate: out of memory: lower generate.batch_size")


def test_an_executed_notebook_that_cannot_be_written_is_one_line(tmp_path):
    path = notebook(tmp_path, "1")
    program = "import resource, sys; from pathlib import Path; from rlaifv import run; "
    program += f"run.RUNS = Path({str(tmp_path)!r}) / 'runs'; "
    program += "resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9)); "
    program += f"sys.exit(run.execute(Path({str(path)!r}), {{}}))"
    with (tmp_path / "said").open("w") as said:  # a pipe is no file: what is printed has no limit
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=said, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("20_generate: no room to write: free some space"), done.stderr


def test_a_disk_that_is_full_is_one_line(executed):
    code, (line, _) = executed("raise OSError(28, 'No space left on device')")
    assert code == 1 and "Errno 28" in line
    assert line.startswith("20_generate: no room to write: free some space and run the same command again")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "no room to write: free some space and run the same command again"),
        (RuntimeError("Kernel died before replying\nto kernel_info"), "RuntimeError: Kernel died before replying to"),
    ],
)
def test_what_goes_wrong_outside_the_cells_is_one_line_too(executed, monkeypatch, error, said):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("papermill.execute_notebook", fail)
    code, (line,) = executed("1")
    assert code == 1 and said in line and "20_generate.ipynb" in line


CAPPED = """
import resource, sys, torch
from safetensors.torch import save_file
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
zeros, file = torch.zeros(9999), sys.argv[1]
for write in (lambda: torch.save(zeros, file), lambda: save_file({"a": zeros}, file)):
    try:
        write()
    except Exception as error:
        print(error)
"""


def test_what_torch_and_safetensors_say_of_a_full_disk_is_understood(tmp_path):
    done = subprocess.run([sys.executable, "-c", CAPPED, tmp_path / "x"], capture_output=True, text=True)
    of_torch, of_safetensors = done.stdout.splitlines()
    assert run.FULL.search(of_torch) and run.FULL.search(of_safetensors)
    assert not run.FULL.search("KeyError: 28")


def test_a_kernel_that_was_killed_is_one_line_with_the_way_out(executed):
    code, (line,) = executed("import os\nos.kill(os.getpid(), 9)")
    assert code == 1
    assert "the kernel was killed, usually for memory: lower generate.batch_size" in line
    assert "goes on where it was" in line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_says_so_and_leaves_no_kernel(tmp_path, number):
    marker = tmp_path / "kernel"
    cell = f"import os, pathlib, time\npathlib.Path({str(marker)!r}).write_text(str(os.getpid()))\ntime.sleep(60)"
    path = notebook(tmp_path, cell)
    program = (
        f"import sys; from pathlib import Path; from rlaifv import run; run.RUNS = Path({str(tmp_path)!r}) / 'runs'; "
    )
    program += f"sys.exit(run.execute(Path({str(path)!r}), {{}}))"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (marker.is_file() and marker.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert f"20_generate: stopped by {number.name}; the same command goes on where it was" in errors
    assert "Traceback" not in errors
    with pytest.raises(ProcessLookupError):
        for _ in range(50):
            os.kill(int(marker.read_text()), 0)
            time.sleep(0.1)


def test_bytecode_that_a_full_disk_has_cut_is_written_anew(tmp_path):
    shutil.copytree(ROOT / "rlaifv", tmp_path / "rlaifv", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)} | {
        "PYTHONDONTWRITEBYTECODE": "",
        "PYTHONPYCACHEPREFIX": "",
    }
    command = [sys.executable, "-c", "import rlaifv.params as p; print(p.__file__)"]
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == str(tmp_path / "rlaifv/params.py"), done.stderr
        (written,) = (tmp_path / "rlaifv/__pycache__").glob("params.*.pyc")
        written.write_bytes(written.read_bytes()[:8192])


def test_telemetry_is_off_whoever_starts_the_run():
    program = "import rlaifv, huggingface_hub.constants as c; print(c.HF_HUB_DISABLE_TELEMETRY)"
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_TELEMETRY"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "True"


def test_a_stage_of_feedback_is_left_out_where_the_pairs_are_there(tmp_path, monkeypatch, capsys):
    profile = tmp_path / "public.yaml"
    text = (ROOT / "params.yaml").read_text().replace("source: null", "source: data/public")
    profile.write_text(text.replace('  "2": {prev: "1"}\n', ""))
    (tmp_path / "notebooks").mkdir()
    notebook(tmp_path / "notebooks", "1 / 0")
    notebook(tmp_path / "notebooks", "1 / 0", "50_pairs")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    for _ in range(2):
        assert run.main(["20_generate", "iteration=1", "prev=0", f"params_file={profile}"]) == 0
    said = "20_generate: nothing to do: the pairs come from pairs.source = data/public"
    assert capsys.readouterr().out.splitlines() == [said] * 2
    (left,) = (tmp_path / "data/iterations/1/candidates").iterdir()
    assert left.read_text() == said.removeprefix("20_generate: ") + "\n"
    assert nbformat.read(tmp_path / "runs/1/20_generate.ipynb", 4).cells[0].outputs == []
    assert run.main(["50_pairs", "iteration=1", "prev=0", f"params_file={profile}"]) == 1, "the pairs stage runs"


def test_benchmarks_are_left_out_where_none_is_configured_and_the_report_reads_on(tmp_path, monkeypatch, capsys):
    (tmp_path / "notebooks").mkdir()
    notebook(tmp_path / "notebooks", "1 / 0", "84_benchmarks")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    folder = tmp_path / "data/results/0"
    write_result(folder, benchmarks={"stale": {}})
    command = ["84_benchmarks", "iteration=0", "prev=0", f"params_file={ROOT / 'params/default.yaml'}"]
    assert run.main(command) == 0
    assert capsys.readouterr().out == "84_benchmarks: nothing to do: no benchmarks are configured\n"
    assert read_result(folder, "benchmarks").benchmarks == {}
    assert [path.name for path in (folder / "benchmarks").iterdir()] == ["scores.json"], (
        "what the notebook itself writes"
    )
    with pytest.raises(FileNotFoundError, match="the stage that writes test has not run"):
        read_result(folder, "benchmarks", "test")
    monkeypatch.setattr(run, "write_result", fail_for_room)
    assert run.main(command) == 1
    assert capsys.readouterr().err.startswith("84_benchmarks: no room to write: free some space")


def fail_for_room(folder, **parts):
    raise OSError(errno.ENOSPC, "No space left on device", str(folder))


def test_a_run_says_where_its_stage_stands_in_the_pipeline():
    places = [
        place_of(*stage, ["1", "2"]) for stage in (("world", ""), ("test", "0"), ("generate", "2"), ("report", ""))
    ]
    numbers = [int(place.split()[-3]) for place in places]
    total = int(places[0].split()[-1])
    assert places[2].startswith("generate@2: stage ") and all(place.endswith(f" of {total}") for place in places)
    assert numbers[0] == 1 and numbers == sorted(numbers) and numbers[-1] == total
    assert place_of("self_feedback", "", ["1"]) == place_of("tiny_checkpoints", "", ["1"]) == ""


LOCK = (ROOT / "dvc.lock").read_text()


@pytest.mark.parametrize(
    ("name", "whole", "cut"),
    [
        (".dvc/tmp/rwlock", '{"read": {}, "write": {}}', ""),
        ("dvc.lock", LOCK, ""),
        ("dvc.lock", LOCK, LOCK[: LOCK.index("    cmd:")]),
        ("experiments/dvc.lock", LOCK, LOCK[: LOCK.index("path") + 2]),
    ],
)
def test_what_a_kill_has_cut_of_dvcs_files_is_removed_and_whole_ones_stay(
    tmp_path, capsys, monkeypatch, name, whole, cut
):
    monkeypatch.setattr(run.time, "sleep", lambda seconds: None)
    run.mend(tmp_path)
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(whole)
    run.mend(tmp_path)
    assert file.read_text() == whole and capsys.readouterr().out == ""
    file.write_text(cut)
    run.mend(tmp_path)
    assert not file.exists() and f"{name} was cut by a kill" in capsys.readouterr().out


@pytest.fixture
def parameters(tmp_path):
    """`parameters(generate="a command")`: a parameter file that gives stages to a queue."""

    def write(**submit: str) -> str:
        content = read_content(ROOT / "params" / "default.yaml")
        content["cluster"]["submit"] = submit
        YAML().dump(content, tmp_path / "params.yaml")
        return f"params_file={tmp_path / 'params.yaml'}"

    return write


def test_a_stage_that_cluster_submit_names_goes_to_the_queue_and_returns_what_its_job_returns(parameters, capfd):
    queue = f"{sys.executable} -c 'import sys; print(sys.argv[1:]); sys.exit(3)'"
    stage = ["20_generate", "iteration=1", "prev=0", parameters(generate=queue)]
    assert run.main(stage) == 3
    said = capfd.readouterr()
    assert repr(stage) in said.out and "20_generate: the job ended with exit code 3" in said.err


def test_a_queue_that_is_not_there_and_a_stage_that_is_not_are_each_a_line(parameters, capfd):
    assert run.main(["20_generate", "iteration=1", "prev=0", parameters(generate="no-such-queue --wait")]) == 1
    assert "cluster.submit: no-such-queue cannot be started" in capfd.readouterr().err
    assert run.main(["20_generate", "iteration=1", "prev=0", parameters(generat="sbatch")]) == 1
    assert "cluster.submit: no stage 'generat'; there are: benchmarks, " in capfd.readouterr().err
