"""The one command: quick help, one line for what goes wrong, the exit codes of the modules behind it."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from rlaifv import ROOT, __main__

HEAVY = "torch", "transformers"


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = __main__.main(list(arguments))
    return code, *capsys.readouterr()


def test_without_words_it_lists_its_commands_and_where_to_begin(capsys):
    code, out, _ = run(capsys)
    assert code == 0 and all(
        f"  {name} " in out for name in ("run", "plan", "chat", "judge", "score", "train", "export")
    )
    assert "begin: make repro" in out


def test_help_of_every_command_imports_no_model_library():
    quick = [name for name, (module, *_) in __main__.COMMANDS.items() if not module or find_spec(module)]
    program = f"import sys; from rlaifv.__main__ import main; codes = [main([n, '--help']) for n in {quick}]; "
    program += f"print(set(codes), [m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "{0} []", done.stdout[-500:] + done.stderr[-500:]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["chatt"], 2, "no command 'chatt'; did you mean chat?"),
        (["score", "chiar"], 2, "no benchmark 'chiar'; did you mean chair?"),
        (["run", "no_such_stage"], 2, "no notebook 'no_such_stage'"),
        (["plan", "--params", "none.yaml"], 1, "plan: no parameter file"),
        (["score", "chair", "--answers", "none.json", "--objects", "none.json"], 1, "no such file: none.json"),
        (["profile", "none"], 1, "profile: no profile 'none'"),
        (["train", "--pairs", "x.parquet", "--model", "m", "--out", "o", "--set", "beta"], 2, "expected KEY=VALUE"),
    ],
)
def test_what_goes_wrong_is_one_line_with_the_exit_code_of_its_kind(capsys, arguments, code, said):
    found, _, errors = run(capsys, *arguments)
    assert found == code and said in errors and "Traceback" not in errors


def test_an_answer_is_judged_from_any_folder(tmp_path):
    from rlaifv.tinyworld.scenes import make_scene, render

    render(make_scene(7, 0), 7).save(tmp_path / "photo.png")
    command = [
        sys.executable,
        "-m",
        "rlaifv",
        "judge",
        "--image",
        "photo.png",
        "--answer",
        "There is a purple cat at the bottom of the picture.",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("accepted  P(yes)") == 3 and "3 claims, 0 rejected" in done.stdout


def test_ctrl_c_is_no_traceback(capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(__main__, "run_module", interrupted)
    assert run(capsys, "plan") == (130, "", "plan: stopped\n")


def test_what_to_do_next_is_said_after_what_went_well_alone(capsys, monkeypatch):
    monkeypatch.setattr(__main__, "run_module", lambda *_: None)
    assert run(capsys, "plan") == (0, "", "next: make repro\n")
    monkeypatch.setattr(__main__, "run_module", lambda *_: sys.exit("plan: does not fit"))
    assert run(capsys, "plan") == (1, "", "plan: does not fit\n")


def test_json_in_the_last_line_stays_the_last_line(capsys, tmp_path):
    (tmp_path / "a.json").write_text('[{"image_id": 1, "caption": "A dog."}]')
    (tmp_path / "o.json").write_text('{"1": ["dog"]}')
    files = ["--answers", str(tmp_path / "a.json"), "--objects", str(tmp_path / "o.json")]
    code, out, _ = run(capsys, "score", "chair", *files, "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["chair_s"] == 0
