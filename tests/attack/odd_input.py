"""Odd parameters, rows, texts and names, through the real commands."""

import json
import re
from pathlib import Path

from checkout import edit_params
from harness import Attempts, Case
from markupsafe import escape
from stages import NAMED, Stage, copy_run, make_checkout, run_stage

from rlaifv.records import read_jsonl, write_jsonl

PARAMETERS = (
    *[("seed", value) for value in (-1, 2**32, 1.5, "1", None, True)],
    *[("generate.temperature", value) for value in (float("inf"), float("nan"), 0, "hot")],
    *[("train.beta", value) for value in (float("inf"), -1, 0)],
    *[("train.weight_decay", value) for value in (float("inf"), -1)],
    *[("train.segment_weight", value) for value in (float("inf"), 0)],
    *[("train.loss_weights", value) for value in ([float("nan")], [0], [-1], [1, 1])],
    *[("train.max_length", value) for value in (0, -5)],
    *[("train.lora_targets", value) for value in ([], [""])],
    *[("train.accelerate_config", value) for value in ("/etc/passwd", "../x.yaml", "")],
    *[("iterations", {name: {"prev": "0"}}) for name in ("007", "٢", "0", "")],
    ("iterations", {"1": {"prev": "1"}}),
    ("labeler.path", "http://me:s3cret@127.0.0.1:9/v1#m"),
    ("policy.path", ""),
    ("prepare.max_reject_rate", 2),
    ("unknown", {"a": 1}),
)


def set_key(content, key: str, value) -> None:
    section, _, name = key.rpartition(".")
    (content[section] if section else content)[name] = value


def parameters(attempts: Attempts, _: Path) -> None:
    """`python -m rlaifv.run` with each of them: one line, at once, with the key."""
    folder = make_checkout(attempts.folder)
    shipped = (folder / "params.yaml").read_text()
    for key, value in PARAMETERS:
        with attempts.attack("parameter files", f"{key}: {value!r}"):
            (folder / "params.yaml").write_text(shipped)
            edit_params(folder, lambda content, key=key, value=value: set_key(content, key, value))
            done = run_stage(folder, Stage("10_prepare"))
            assert done.code == 1, f"exit code {done.code}"
            assert len(done.text.splitlines()) == 1 and key.split(".")[-1] in done.text, done.text
            assert "s3cret" not in done.text, done.text


SPECIAL = ("<image>", "<pad>", "</s>", "<s>", "<unk>", "<|im_end|>", "<|endoftext|>", "[INST]", "<image_soft_token>")
SPECIAL += ("<|image_pad|>", "<0x0A>", "<end_of_turn>")
TEXTS = (
    "<script>alert(7)</script>",
    '"><img src=x onerror=alert(7)>',
    "&lt;b&gt; &amp; <b>bold</b>",
    "</textarea><svg onload=alert(7)>",
    "{{ 7 * 7 }} {% raw %}",
    "$x_{$",
    "$$",
    r"$\frac{1}{$ costs $5 or $10",
    r"$\unknown{x}$",
    "\N{ZERO WIDTH SPACE}\N{RIGHT-TO-LEFT OVERRIDE}left?",
    "\x00null",
    "\x1b[31mred\x07",
    "line\u2028separator\x85next\x0bfeed",
    "\N{THINKING FACE}" * 50,
    "é" + "\u0301" * 500,
    "ﷺ ﷽ 𝕏 ٢",
    "{" * 200 + "}" * 200,
    "None",
    "- a\n- b\n\n# c",
    "x" * 2000,
)


def hostile_rows() -> list[str]:
    """100 lines of an instruction file, each odd in another way, with ids h0 … h99; not all of them are JSON."""
    questions = [f"Is {token} red?" for token in SPECIAL] + [f"{token}What is it?" for token in SPECIAL]
    questions += [f"What is it? {token}{token}" for token in SPECIAL] + [f"Is it {text}?" for text in TEXTS]
    questions += [*TEXTS, "What? " * 20_000, "<image>" * 1000, "<image>\nWhat is it?", " ", "?"]
    lines = [json.dumps({"id": f"h{n}", "image_path": IMAGE, "question": text}) for n, text in enumerate(questions)]
    odd = ["\ud800 half", ["a", "list"], {"deep": {"er": [1]}}, None, False, 7, float("nan")]
    odd += ["\ufeffWhat is it?"]
    lines += [
        json.dumps({"id": f"h{n}", "image_path": IMAGE, "question": value})
        for n, value in enumerate(odd, start=len(lines))
    ]
    lines += ["[" * 5000, "{", '"text"', "\ufeff{}", '{"id": ' + "9" * 5000 + "}"]
    names = ["../../etc/passwd", "/etc/passwd", "nothing.png", "\ud800.png", "a\0.png"]
    lines += [json.dumps({"id": f"n{n}", "image_path": name, "question": "What?"}) for n, name in enumerate(names)]
    return (lines + ["null"] * 100)[:100]


IMAGE = "000000000001.png"


def hostile(content) -> None:
    content["prepare"].update(instructions="data/hostile/train.jsonl", max_reject_rate=0.5)
    content["prepare"]["test"].update(instructions="data/hostile/test.jsonl")
    content["generate"].update(samples=2, batch_size=50, max_new_tokens=12, max_reject_rate=0.9)
    content["divide"].update(batch_size=128, max_reject_rate=0.9)
    content["feedback"].update(batch_size=50, max_reject_rate=0.9)


def hostile_run(attempts: Attempts, whole: Path) -> None:
    """200 instructions of which 100 are hostile, and hostile test questions: from prepare to report."""
    kind, folder = "special tokens and odd text", copy_run(whole, attempts.folder)
    edit_params(folder, hostile)
    lines = hostile_rows()
    attempts.random.shuffle(lines)
    good = [json.dumps({"id": f"g{n}", "image_path": IMAGE, "question": f"What is there, {n}?"}) for n in range(100)]
    rows = [line for both in zip(good, lines, strict=True) for line in both]
    (folder / "data" / "hostile").mkdir()
    (folder / "data" / "hostile" / "train.jsonl").write_text("\n".join(rows) + "\n")
    tests = read_jsonl(folder / "data" / "world" / "instructions_test.jsonl")
    for row, question in zip(
        tests, ('<script>alert("7")</script> $x_{$ what is it?', "$$ &lt; <b>what?"), strict=False
    ):
        row["question"] = question
    text = "".join(json.dumps(row) + "\n" for row in tests)
    (folder / "data" / "hostile" / "test.jsonl").write_text(text)
    for name in ("prepare", "generate@1", "divide@1", "feedback@1", "pairs@1", "train@1", "test@0", "report"):
        if name == "report":
            spoil_gallery(folder)
        with attempts.attack(kind, f"{name} ends well"):
            done = run_stage(folder, NAMED[name])
            assert done.code == 0, done.text[-800:]
        if name == "prepare":  # all that it took are asked
            kept = len(read_jsonl(folder / "data" / "prepared" / "train.jsonl"))
            edit_params(folder, lambda content, kept=kept: content["prepare"].update(per_iteration=kept))
    account(attempts, kind, folder, rows)
    with attempts.attack(kind, "the report shows texts as text"):
        page = (folder / "plots" / "report.html").read_text()
        assert "<script>alert" not in page and "<img src=x" not in page
        missing = [text for text in IN_GALLERY if escape(text) not in page]
        assert not missing, f"the page lacks {missing}"


IN_GALLERY = ("<script>alert(7)</script>", "$x_{$ costs $5", '"><img src=x onerror=alert(7)>', "</s> &amp; <image>")


def spoil_gallery(folder: Path) -> None:
    """Answers and claims of the gallery, as a model might say them."""
    for iteration, (answer, claim) in (("0", IN_GALLERY[:2]), ("1", IN_GALLERY[2:])):
        file = folder / "data" / "results" / iteration / "test" / "gallery.jsonl"
        rows = read_jsonl(file)
        for row in rows:
            row["answer"] = answer
            row["claims"] = [{"claim": claim, "p_yes": 0.25, "p_no": 0.5}]
        write_jsonl(file, rows)


def account(attempts: Attempts, kind: str, folder: Path, rows: list[str]) -> None:
    """Each row is used, or is in a rejects.jsonl with its reason."""
    data = folder / "data"
    prepared = {row["id"] for row in read_jsonl(data / "prepared" / "train.jsonl")}
    refused = read_jsonl(data / "prepared" / "rejects.jsonl")
    where = [re.match(r"train\.jsonl:(\d+): ", row["reason"]) for row in refused]
    reasons = {int(place[1]): row["reason"] for place, row in zip(where, refused, strict=True) if place}
    made = data / "iterations" / "1"
    candidates, lost = (read_jsonl(made / "candidates" / f"{name}.jsonl") for name in ("candidates", "rejects"))
    answers = {(row["instruction_id"], row["sample"]) for row in candidates}
    answers |= {(row["id"].rpartition("#")[0], int(row["id"].rpartition("#")[2])) for row in lost}
    for number, line in enumerate(rows, start=1):
        with attempts.attack(kind, f"row {number} is used or refused with a reason: {line[:60]}"):
            if number in reasons:
                assert len(reasons[number].splitlines()) == 1
                continue
            name = str(json.loads(line)["id"])
            assert name in prepared, "neither among the instructions nor among the rejects"
            assert {(name, 0), (name, 1)} <= answers, "an answer of two is lost"
    with attempts.attack(kind, "every answer has claims or a reason"):
        claims, lost = (read_jsonl(made / "claims" / f"{name}.jsonl") for name in ("claims", "rejects"))
        done = {row["candidate_id"] for row in claims} | {row["id"] for row in lost}
        assert {row["id"] for row in candidates} == done


ODD_INPUT = [
    Case("hostile run", ("special tokens and odd text",), hostile_run),
    Case("parameter files", ("parameter files",), parameters, needs_whole=False),
]
