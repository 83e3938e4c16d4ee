"""The page of one image: its candidates with their judged claims, its pairs, and every text as a text."""

from PIL import Image

from rlaifv.records import Candidate, Claim, Instruction, Judgement
from rlaifv.report.claims_view import IterationView


def view(folder, pairs) -> IterationView:
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    candidates = {"<i>": [Candidate("<i>#0", "<i>", 0, "A <cat>.", 3, "stop", 0, "m")]}
    claims = {"<i>#0": [Claim("c0", "<i>#0", "a <cat>", "q"), Claim("c1", "<i>#0", "not judged", "q")]}
    judgements = {"c0": Judgement("c0", 0.25, 0.75, False, "m")}
    return IterationView([Instruction("<i>", "a.png", "what <is> it?")], candidates, claims, judgements, pairs, folder)


def test_a_candidate_stands_with_its_score_and_its_judged_claims(tmp_path):
    page = view(tmp_path, {"<i>": []}).page("<i>")
    for text in ("&lt;i&gt;: what &lt;is&gt; it?", "#0 (score -1) A &lt;cat&gt;.", "p_yes 0.250", "hsl(30 70% 82%)"):
        assert text in page, text
    assert "not judged" not in page and "<cat>" not in page
    assert "none: every candidate has the same score" in page


def test_its_pairs_stand_below(tmp_path):
    pair = {"chosen": "<a>", "rejected": "b", "chosen_score": 0, "rejected_score": -2}
    page = view(tmp_path, {"<i>": [pair]}).page("<i>")
    assert "<b>chosen</b> (0) &lt;a&gt;" in page and "<b>rejected</b> (-2) b" in page and "none:" not in page
