"""The page of one image: its candidates with their judged claims, its pairs, and every text as a text."""

from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rlaifv.records import Candidate, Claim, Instruction, Judgement, write_jsonl
from rlaifv.report.claims_view import load_iteration
from rlaifv.report.render import render

PAIR = {
    "origin_split": '{"instruction": "<i>"}',
    "chosen": "<a>",
    "rejected": "b",
    "chosen_score": 0,
    "rejected_score": -2,
}


def page(folder, pairs) -> str:
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    asked = [Instruction("none", "a.png", "not sampled"), Instruction("<i>", "a.png", "what <is> it?")]
    write_jsonl(folder / "train.jsonl", asked)
    names = ("candidates", "claims", "judgements", "pairs")
    paths = SimpleNamespace(**{name: folder / name for name in names})
    write_jsonl(paths.candidates, [Candidate("<i>#0", "<i>", 0, "A <cat>.", 3, "stop", 0, "m")])
    write_jsonl(paths.claims, [Claim("c0", "<i>#0", "a <cat>", "q"), Claim("c1", "<i>#0", "not judged", "q")])
    write_jsonl(paths.judgements, [Judgement("c0", 0.25, 0.75, False, "m")])
    pq.write_table(pa.Table.from_pylist(pairs, pa.Table.from_pylist([PAIR]).schema), paths.pairs)
    (shown,) = load_iteration(paths, folder, folder)
    return render("claims.html", **shown)


def test_a_candidate_stands_with_its_score_and_its_judged_claims(tmp_path):
    html = page(tmp_path, [])
    for text in ("&lt;i&gt;: what &lt;is&gt; it?", "#0 (score -1) A &lt;cat&gt;.", "p_yes 0.250", "hsl(30 70% 82%)"):
        assert text in html, text
    assert "not judged" not in html and "<cat>" not in html
    assert "none: every candidate has the same score" in html


def test_its_pairs_stand_below(tmp_path):
    html = page(tmp_path, [PAIR, {**PAIR, "origin_split": '{"instruction": "another"}'}])
    assert "<b>chosen</b> (0) &lt;a&gt;" in html and "<b>rejected</b> (-2) b" in html and "none:" not in html
