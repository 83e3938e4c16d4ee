"""Samples depend on model, prompt and their own uniform stream, and on nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from architectures import BUILDERS, QUESTIONS, build, picture
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaifv.inference import sampling
from rlaifv.inference.sampling import Decoding, Generation, Prompt, draw, generate_batch, unlikely
from rlaifv.vlm.loading import VLM

SETTINGS, GREEDY = Decoding(1.0, 20, 0.9, 24), Decoding(0, 0, 1.0, 24)


@pytest.fixture(scope="module")
def llava() -> VLM:
    return build("llava")


def eager_to_stop(vlm: VLM, bias: float = 3.0) -> VLM:
    """The model with an end token likely enough that samples stop at different lengths."""
    head = vlm.model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.weight.shape[0]), requires_grad=False)
    head.bias[vlm.eos_token_ids] = bias
    return vlm


def some_prompts(images: bool = True) -> list[Prompt]:
    pictures = [picture(40, 40, 1), picture(64, 40, 2), picture(40, 40, 3)] if images else [None] * 3
    return [Prompt(image, question) for image, question in zip(pictures, QUESTIONS, strict=False)]


def streams(count: int, samples: int, steps: int = 24, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).random((count, samples, steps)))


@pytest.mark.parametrize("name", [*BUILDERS, "llama"])
def test_shared_samples_are_those_of_transformers_own_loop_for_the_same_streams(name):
    vlm = eager_to_stop(build(name))
    prompts = some_prompts(images=vlm.sees_images)
    drawn = streams(len(prompts), 5)
    plain = generate_batch(vlm, prompts, drawn, SETTINGS, shared=False)
    assert generate_batch(vlm, prompts, drawn, SETTINGS) == plain
    lengths = {len(g.token_ids) for samples in plain for g in samples}
    assert len(lengths) > 2, "samples of different lengths"
    greedy = generate_batch(vlm, prompts, [d[:1] for d in drawn], GREEDY, shared=False)
    assert generate_batch(vlm, prompts, [d[:1] for d in drawn], GREEDY) == greedy


@pytest.mark.parametrize("decoding", [SETTINGS, GREEDY])
def test_a_repetition_penalty_is_the_same_on_both_paths_and_counts_the_answers_own_tokens(decoding):
    vlm, prompts, drawn = build("llava"), some_prompts(), streams(3, 5)
    penalized = replace(decoding, repetition_penalty=1.8)
    plain = generate_batch(vlm, prompts, drawn, penalized, shared=False)
    assert generate_batch(vlm, prompts, drawn, penalized) == plain
    without = generate_batch(vlm, prompts, drawn, decoding)
    assert [[g.token_ids[:1] for g in samples] for samples in plain] == [
        [g.token_ids[:1] for g in samples] for samples in without
    ], "no token of the prompt counts"

    def repeated(found: list[list[Generation]]) -> int:
        return sum(len(g.token_ids) - len(set(g.token_ids)) for samples in found for g in samples)

    assert repeated(plain) < repeated(without)


def test_a_sample_does_not_depend_on_its_batch(llava):
    prompts, drawn = some_prompts(), streams(3, 6)
    together = generate_batch(llava, prompts, drawn, SETTINGS)
    alone = [generate_batch(llava, [p], [d], SETTINGS)[0] for p, d in zip(prompts, drawn, strict=True)]
    assert together == alone
    backwards = generate_batch(llava, prompts[::-1], drawn[::-1], SETTINGS)
    assert together == backwards[::-1]
    fewer = generate_batch(llava, prompts, [d[2:3] for d in drawn], SETTINGS)
    assert [samples[2:3] for samples in together] == fewer


def test_prompts_may_ask_for_different_numbers_of_samples(llava):
    drawn = streams(3, 6)
    counts = [4, 0, 6]
    uneven = generate_batch(llava, some_prompts(), [d[:c] for d, c in zip(drawn, counts, strict=True)], SETTINGS)
    even = generate_batch(llava, some_prompts(), drawn, SETTINGS)
    assert uneven == [samples[:c] for samples, c in zip(even, counts, strict=True)]


@pytest.mark.parametrize("every", [1, 3])
def test_dropping_finished_samples_changes_nothing(every, monkeypatch):
    vlm = eager_to_stop(build("gemma3"), bias=4.0)
    prompts, drawn = some_prompts(), streams(3, 8)
    monkeypatch.setattr(sampling, "COMPACT_EVERY", 10**6)
    kept = generate_batch(vlm, prompts, drawn, SETTINGS)
    monkeypatch.setattr(sampling, "COMPACT_EVERY", every)
    assert generate_batch(vlm, prompts, drawn, SETTINGS) == kept


def test_an_answer_ends_at_its_end_token_or_is_marked_as_cut():
    vlm = eager_to_stop(build("llava"), bias=2.0)
    samples = generate_batch(vlm, some_prompts(), streams(3, 20), SETTINGS)
    flat = [g for group in samples for g in group]
    assert {g.finish_reason for g in flat} == {"stop", "length"}
    for g in flat:
        assert (len(g.token_ids) == SETTINGS.max_new_tokens) == (g.finish_reason == "length")
        assert not set(g.token_ids) & set(vlm.eos_token_ids)
        assert "</s>" not in g.text


def test_one_token_and_no_prompt_are_enough(llava):
    one = generate_batch(llava, some_prompts()[:1], streams(1, 2, 1), replace(SETTINGS, max_new_tokens=1))
    assert [len(g.token_ids) for g in one[0]] == [1, 1]
    assert generate_batch(llava, [], [], SETTINGS) == []


def test_running_out_of_memory_halves_the_prompts_and_changes_nothing(llava, monkeypatch, caplog):
    prompts, drawn = [Prompt(picture(seed=i), QUESTIONS[0]) for i in range(4)], streams(4, 3)
    expected = generate_batch(llava, prompts, drawn, SETTINGS)
    real = sampling.sample_shared

    def limited(vlm, encoded, *rest) -> list[list[Generation]]:
        if len(encoded) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(vlm, encoded, *rest)

    monkeypatch.setattr(sampling, "sample_shared", limited)
    assert generate_batch(llava, prompts, drawn, SETTINGS) == expected
    assert "out of memory" in caplog.text


@pytest.mark.parametrize("shared", [True, False])
def test_nothing_is_drawn_from_a_model_that_computes_nan(shared):
    vlm = build("llava")
    vlm.model.get_output_embeddings().weight.data[7] = torch.nan
    with pytest.raises(FloatingPointError, match="llava computes NaN instead of probabilities"):
        generate_batch(vlm, some_prompts(), streams(3, 2), SETTINGS, shared=shared)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1.0}, "decoding settings"),
        ({"top_p": 0.0}, "decoding settings"),
        ({"max_new_tokens": 25}, "cannot draw 25 tokens"),
    ],
)
def test_impossible_settings_are_refused(llava, change, message):
    with pytest.raises(ValueError, match=message):
        generate_batch(llava, some_prompts(), streams(3, 2), replace(SETTINGS, **change))


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 1, exclude_max=True), st.sampled_from([0, 1, 3, 50]), st.sampled_from([0.05, 0.5, 1.0]))
def test_only_tokens_that_transformers_warpers_keep_are_drawn(uniform, top_k, top_p):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(int(uniform * 1000))) * 3
    warped = TemperatureLogitsWarper(0.7)(None, logits)
    warped = TopKLogitsWarper(top_k)(None, warped) if top_k else warped
    warped = TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped
    cdf = warped[0].double().softmax(-1).cumsum(-1)
    expected = int((cdf <= uniform * cdf[-1]).sum())
    chosen = draw(logits, torch.tensor([uniform], dtype=torch.float64), Decoding(0.7, top_k, top_p, 1))
    # the uniform may lie on a step of the CDF up to rounding
    assert warped[0, chosen] > -torch.inf
    assert int(chosen) == expected or abs(float(cdf[min(int(chosen), expected)] / cdf[-1]) - uniform) < 1e-6


def test_draws_follow_the_distribution():
    probs = torch.tensor([0.5, 0.0, 0.3, 0.2])
    uniform = torch.linspace(0, 1, 10_001, dtype=torch.float64)[:-1]
    chosen = draw(probs.log().expand(len(uniform), -1), uniform, Decoding(1.0, 0, 1.0, 1))
    assert torch.allclose(torch.bincount(chosen, minlength=4) / len(uniform), probs, atol=2e-4)


def dropped_by_a_full_sort(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    ascending, order = probs.sort(dim=-1, stable=True)
    dropped = ascending.cumsum(-1) <= 1 - top_p
    dropped[:, -1] = False
    return torch.zeros_like(dropped).scatter(-1, order, dropped)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 60), st.sampled_from([0.05, 0.5, 0.75, 0.9, 1 - 1e-12]), st.booleans())
def test_looking_at_the_likeliest_tokens_first_drops_what_a_full_sort_drops(seed, vocabulary, top_p, tied):
    logits = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3
    probs = (logits.round() if tied else logits).double().softmax(-1)  # bfloat16 logits have many ties
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "NUCLEUS", 12)
        assert torch.equal(unlikely(probs, top_p), dropped_by_a_full_sort(probs, top_p))


def test_a_large_vocabulary_is_not_sorted_where_its_likeliest_tokens_hold_the_nucleus(monkeypatch):
    probs = (torch.randn(4, 20_000, generator=torch.Generator().manual_seed(0)) * 4).double().softmax(-1)
    expected, sizes, sort = dropped_by_a_full_sort(probs, 0.5), [], torch.Tensor.sort
    monkeypatch.setattr(torch.Tensor, "sort", lambda t, *a, **k: (sizes.append(t.shape[-1]), sort(t, *a, **k))[1])
    assert torch.equal(unlikely(probs, 0.5), expected) and max(sizes) == sampling.NUCLEUS
