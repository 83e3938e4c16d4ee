"""Each ablation changes what its parameter names and nothing else; at its neutral value it changes nothing."""

import dataclasses
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_llava import save_tiny_llava

from rlaifv.params import load_params
from rlaifv.records import Candidate, Claim, Instruction, read_jsonl
from rlaifv.steps import feedback as feedback_module
from rlaifv.steps.divide import WHOLE_QUESTION, divide, divide_answers
from rlaifv.steps.feedback import feedback
from rlaifv.steps.generate import generate, temperature_of
from rlaifv.steps.pairs import Pair, balance_lengths, keep_pairs, relative_length_gap
from rlaifv.store import Store
from rlaifv.vlm.loading import load_vlm

PARAMS = load_params()


def generated(policy, folder, spread: float) -> dict[str, str]:
    """Candidate id → answer of 5 samples to each of 4 instructions."""
    params = dataclasses.replace(PARAMS.generate, samples=5, max_new_tokens=8, max_reject_rate=1.0)
    instructions = [Instruction(name, "a.png", "what is in the image ?") for name in "abcd"]
    store, out = Store("generate", {"spread": spread}, folder / "scratch"), folder / str(spread) / "candidates.jsonl"
    generate(lambda: policy, instructions, folder, params, 1, store, out, temperature_spread=spread)
    return {row["id"]: row["answer"] for row in read_jsonl(out)}


def test_mixed_temperatures_change_the_temperature_and_no_random_number(tmp_path):
    policy = load_vlm(str(save_tiny_llava(tmp_path / "policy")))
    (tmp_path / "images").mkdir()
    Image.effect_noise((24, 24), 80).convert("RGB").save(tmp_path / "images" / "a.png")
    alike, mixed = (generated(policy, tmp_path / "images", spread) for spread in (0.0, 0.9))
    # the middle sample has the usual temperature and its own random numbers: its answers are the same
    middle = {key: answer for key, answer in alike.items() if key.endswith("#2")}
    assert middle and middle == {key: answer for key, answer in mixed.items() if key.endswith("#2")}
    assert mixed != alike


@given(samples=st.integers(2, 20), spread=st.floats(0, 0.95))
def test_temperatures_are_spread_evenly_about_the_usual_one(samples, spread):
    params = dataclasses.replace(PARAMS.generate, samples=samples)
    found = [temperature_of(params, sample, spread) for sample in range(samples)]
    assert found == sorted(found)
    assert found[0] == pytest.approx(params.temperature * (1 - spread))
    assert sum(found) / samples == pytest.approx(params.temperature)
    if spread == 0:
        assert set(found) == {params.temperature}


def test_a_whole_answer_is_one_claim_in_its_own_words_and_no_divider_is_asked(tmp_path):
    answers = ["There is a dog. There is a red cup.", "There is a kite."]
    candidates = [Candidate(f"a#{s}", "a", s, text, 9, "stop", 0, "m") for s, text in enumerate(answers)]
    out, store = tmp_path / "claims.jsonl", Store("divide", {}, tmp_path / "s")
    counts = divide(lambda: None, candidates, {"a": "Describe."}, PARAMS.divide, 1, store, out, whole_answer=True)
    assert counts == (2, 0)
    assert {row["claim"]: row["question"] for row in read_jsonl(out)} == {
        answer: WHOLE_QUESTION.format(answer=answer) for answer in answers
    }
    with pytest.raises(AttributeError):  # without the ablation the divider (here None) is asked
        divide_answers(None, [("Describe.", answers[0])], PARAMS.divide, 1)


def judged(tmp_path, monkeypatch, share: float) -> dict[str, tuple[float, float]]:
    """(p_yes, p_no) of 400 claims by a labeler that always says (0.7, 0.2), `share` of them by the coin."""
    monkeypatch.setattr(feedback_module, "judge_fit", lambda _, items: [[(0.7, 0.2)] * len(q) for _, q in items])
    monkeypatch.setattr(feedback_module, "describe_labeler", lambda *_: '{"labeler": "x"}\n')
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    claims = [Claim(f"a#0/{k}", "a#0", f"claim {k}", f"question {k}?") for k in range(400)]
    labeler = SimpleNamespace(name="l", fingerprint="l")
    out = tmp_path / str(share) / "judgements.jsonl"
    store = Store("feedback", {"share": share}, tmp_path / "scratch")
    feedback(lambda: labeler, claims, {"a#0": "a.png"}, tmp_path, PARAMS.feedback, store, out, coin_share=share)
    return {row["claim_id"]: (row["p_yes"], row["p_no"]) for row in read_jsonl(out)}


def test_a_coin_judges_its_share_of_the_claims_and_the_labeler_the_others(tmp_path, monkeypatch):
    none, half, every = (judged(tmp_path, monkeypatch, share) for share in (0.0, 0.5, 1.0))
    assert set(none.values()) == {(0.7, 0.2)}
    assert set(every.values()) == {(1.0, 0.0), (0.0, 1.0)}
    assert 150 < sum(p_yes for p_yes, _ in every.values()) < 250, "a coin is fair"
    by_coin = {claim for claim, p in half.items() if p != (0.7, 0.2)}
    assert 150 < len(by_coin) < 250
    assert all(half[claim] == every[claim] for claim in by_coin), "a claim's coin is its own"


def pair(chosen: int, rejected: int) -> Pair:
    answers = [Candidate(f"a#{n}", "a", n, "word " * n, n, "stop", 0, "m") for n in (chosen, rejected)]
    return Pair(Instruction("a", "a.png", "Describe."), *answers, 0, -2)


def test_without_the_length_balance_all_drawn_pairs_are_kept_in_their_order():
    drawn = [pair(10, 10)] * 4 + [pair(5, 30)] * 2 + [pair(9, 8)] * 3
    assert keep_pairs(drawn, balance_length=False) == (drawn, 1.0)
    assert keep_pairs(drawn) == balance_lengths(drawn)
    assert relative_length_gap(keep_pairs(drawn)[0]) < relative_length_gap(drawn)
