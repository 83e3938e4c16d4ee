"""The shared prefix gives the log-probs of plain rows, on every supported architecture."""

import logging
from dataclasses import replace

import pytest
import torch
from architectures import ANSWERS, BUILDERS, QUESTIONS, build, picture
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaifv.inference import logprobs as prefix
from rlaifv.inference import memory
from rlaifv.inference import plain_rows as rows
from rlaifv.inference import prefix_cache as prefill
from rlaifv.inference.logprobs import continuation_logprobs, next_token_logprobs, pack, prefix_path
from rlaifv.inference.self_check import full_distribution
from rlaifv.vlm.chat_format import EncodedPrompt, encode, encode_questions
from rlaifv.vlm.loading import VLM

SHARING = [name for name in BUILDERS if name != "minicpm-v-4.6"]


@pytest.fixture(scope="module")
def models() -> dict[str, VLM]:
    return {}


def model(models: dict[str, VLM], name: str) -> VLM:
    if name not in models:
        models[name] = build(name)
    return models[name]


def asked(vlm: VLM) -> list[EncodedPrompt]:
    """Two image sizes, questions of different lengths, no question at all, and a single one."""
    small, wide = picture(40, 40, seed=1), picture(64, 40, seed=2)
    return [
        encode_questions(vlm, small, QUESTIONS),
        encode_questions(vlm, wide, QUESTIONS[1:3]),
        encode_questions(vlm, small, []),
        encode_questions(vlm, wide, QUESTIONS[:1]),
    ]


def largest_difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    assert [x.shape for x in a] == [x.shape for x in b]
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True) if len(x))


@pytest.mark.parametrize("name", SHARING)
def test_shared_questions_equal_plain_questions(models, name):
    vlm = model(models, name)
    encoded = asked(vlm)
    shared = next_token_logprobs(vlm, encoded, shared=True)
    assert largest_difference(shared, next_token_logprobs(vlm, encoded, shared=False)) < 1e-4
    one_by_one = [next_token_logprobs(vlm, [e], shared=False)[0] for e in encoded]
    assert largest_difference(shared, one_by_one) < 1e-4


@pytest.mark.parametrize("name", SHARING)
def test_shared_answers_equal_plain_answers_token_by_token(models, name):
    vlm = model(models, name)
    several = encode(vlm, picture(40, 40, 1), QUESTIONS[3], ANSWERS)
    encoded = [several, encode(vlm, picture(64, 40, 2), QUESTIONS[0], ["No"])]
    shared, plain = (continuation_logprobs(vlm, encoded, shared=path) for path in (True, False))
    assert [len(t) for t in shared[0]] == [
        len(row) - start for row, start in zip(several.rows, several.answer_starts, strict=True)
    ]
    for a, b in zip(shared, plain, strict=True):
        assert largest_difference(a, b) < 1e-4


@pytest.mark.parametrize("name", BUILDERS)
def test_plain_rows_do_not_depend_on_their_padding(models, name):
    vlm = model(models, name)
    encoded = asked(vlm)
    trees = [rows.plant(k, e) for k, e in enumerate(encoded) if e.rows]
    alone = rows.run_plain(vlm, trees, full_distribution, batch=1)
    padded = rows.run_plain(vlm, trees, full_distribution, batch=8)
    assert max(float((alone[key] - padded[key]).abs().max()) for key in alone) < 1e-4


@pytest.mark.parametrize("name", BUILDERS)
def test_the_image_matters_and_so_does_its_place_in_the_batch(models, name):
    vlm = model(models, name)
    encoded = [encode_questions(vlm, picture(40, 40, seed), QUESTIONS[:1]) for seed in (1, 2)]
    first, second = next_token_logprobs(vlm, encoded)
    assert (first - second).abs().max() > 1e-3
    swapped = next_token_logprobs(vlm, encoded[::-1])
    assert largest_difference([first, second], swapped[::-1]) < 1e-4


@pytest.mark.parametrize("name", SHARING)
def test_the_self_check_accepts_a_model_that_shares(models, name):
    vlm = model(models, name)
    assert prefix_path(vlm, asked(vlm)[:1]) == "packed"


def test_a_hybrid_model_copies_its_prefix_and_the_log_says_so(models, caplog):
    vlm = model(models, "minicpm-v-4.6")
    prefix._verdicts.pop(vlm.model, None)
    encoded = asked(vlm)
    with caplog.at_level(logging.WARNING):
        values = next_token_logprobs(vlm, encoded)
    assert "minicpm-v-4.6" in caplog.text and "linear_attention" in caplog.text and "copy" in caplog.text
    assert largest_difference(values, next_token_logprobs(vlm, encoded, shared=False)) < 1e-4
    caplog.clear()
    next_token_logprobs(vlm, encoded)
    assert not caplog.text, "logged once per model"


@pytest.mark.parametrize("name", BUILDERS)
def test_copied_prefixes_give_the_log_probs_of_plain_rows(models, name):
    vlm = model(models, name)
    encoded = encode(vlm, picture(64, 40, 2), QUESTIONS[3], ANSWERS * 3)  # more rows than one forward takes
    trees = [rows.plant(0, encoded)]
    copied, plain = (run(vlm, trees, full_distribution) for run in (rows.run_copied, rows.run_plain))
    assert max(float((copied[key] - plain[key]).abs().max()) for key in plain) < 1e-4


def test_a_model_that_agrees_in_no_shared_way_is_asked_row_by_row(monkeypatch, caplog):
    vlm = build("minicpm-v-4.6")
    real = rows.prefill  # positions start again
    monkeypatch.setattr(rows, "prefill", lambda *a: replace(state := real(*a), positions=0 * state.positions))
    encoded = asked(vlm)
    values = next_token_logprobs(vlm, encoded)
    assert prefix_path(vlm, encoded) == "plain" and "every row alone" in caplog.text
    assert largest_difference(values, next_token_logprobs(vlm, encoded, shared=False)) == 0


def test_log_probs_may_take_part_in_a_loss(models):
    vlm = model(models, "llava")
    ((logprobs,),) = continuation_logprobs(vlm, [encode(vlm, picture(), QUESTIONS[3], ANSWERS[:1])])
    weight = torch.ones((), requires_grad=True)
    (weight * logprobs).sum().backward()
    assert float(weight.grad) == pytest.approx(float(logprobs.sum()))


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl", "gemma3"])
def test_the_self_check_catches_wrong_positions_and_masks(name, monkeypatch, caplog):
    vlm = build(name)
    encoded = asked(vlm)[:1]
    if name == "gemma3":
        monkeypatch.setattr(prefill, "windowed", lambda vlm: False)  # the sliding window forgotten
    else:
        real = prefix.prefill  # the image's 3-D positions forgotten
        monkeypatch.setattr(prefix, "prefill", lambda *a: replace(state := real(*a), positions=state.lengths))
    with caplog.at_level(logging.WARNING):
        assert prefix_path(vlm, encoded) != "packed"
    assert name in caplog.text and "nats" in caplog.text


def test_the_self_check_catches_branches_that_see_each_other(monkeypatch, caplog):
    vlm = build("llava")
    real = prefill.branch_masks

    def leaky(vlm, state, owner, offset, newest):
        everyone, place = torch.zeros_like(owner), torch.arange(owner.shape[1]).expand_as(owner)
        return real(vlm, state, everyone, place, newest)

    monkeypatch.setattr(prefill, "branch_masks", leaky)
    assert prefix_path(vlm, asked(vlm)[:1]) != "packed"


def test_an_error_on_the_shared_path_is_a_fallback_too(monkeypatch, caplog):
    vlm = build("llava")

    def broken(*_):
        raise TypeError("forward() got an unexpected keyword argument 'position_ids'")

    monkeypatch.setattr(prefix, "run_branches", broken)
    monkeypatch.setattr(rows, "prefill", broken)
    encoded = asked(vlm)
    values = next_token_logprobs(vlm, encoded)
    assert "position_ids" in caplog.text
    assert [len(v) for v in values] == [4, 2, 0, 1]


def test_ids_are_normalized_over_the_whole_vocabulary(models):
    vlm = model(models, "llava")
    encoded = asked(vlm)
    every = next_token_logprobs(vlm, encoded)
    some = next_token_logprobs(vlm, encoded, [5, 3])
    assert torch.allclose(every[0][:, [5, 3]], some[0], atol=1e-6)
    assert torch.allclose(every[0].exp().sum(-1), torch.ones(4), atol=1e-5)
    assert some[2].shape == (0, 2)


def test_an_empty_list_gives_an_empty_list(models):
    vlm = model(models, "llava")
    assert next_token_logprobs(vlm, []) == []
    assert continuation_logprobs(vlm, []) == []


def test_text_without_an_image_shares_its_prefix_too(models):
    vlm = model(models, "llama")
    encoded = [encode_questions(vlm, None, QUESTIONS), EncodedPrompt([], [[7], [9, 8]], [1, 2], {})]
    shared, plain = (next_token_logprobs(vlm, encoded, shared=path) for path in (True, False))
    assert largest_difference(shared, plain) < 1e-4


def test_running_out_of_memory_halves_the_tokens_per_forward_pass_and_goes_on(models, monkeypatch, caplog):
    vlm = model(models, "llava")
    encoded = [encode_questions(vlm, picture(seed=i), QUESTIONS) for i in range(6)]
    expected = next_token_logprobs(vlm, encoded, shared=True)
    real, sizes = prefix.run_branches, []

    def limited(vlm, trees, capacity):
        sizes.append(len(trees))
        if len(trees) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(vlm, trees, capacity)

    monkeypatch.setattr(prefix, "run_branches", limited)
    with caplog.at_level(logging.WARNING):
        values = next_token_logprobs(vlm, encoded, shared=True)
    assert largest_difference(values, expected) < 1e-4
    assert sizes[0] == 6 and "out of memory" in caplog.text and "llava" in caplog.text
    first_try = len(sizes)
    next_token_logprobs(vlm, encoded, shared=True)
    assert max(sizes[first_try:]) <= 2, "what was learned is kept"
    memory._fitted.pop(vlm.model)


def test_other_errors_are_not_taken_for_a_full_memory(models, monkeypatch):
    vlm = model(models, "llava")

    def broken(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(prefix, "run_branches", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        next_token_logprobs(vlm, asked(vlm), shared=True)


def test_long_branch_lists_go_through_several_packs(models, monkeypatch):
    vlm = model(models, "gemma3")
    encoded = [encode_questions(vlm, picture(), QUESTIONS * 3), encode_questions(vlm, picture(seed=3), QUESTIONS)]
    monkeypatch.setattr(prefix, "row_capacity", lambda vlm: 40)
    shared, plain = (next_token_logprobs(vlm, encoded, shared=path) for path in (True, False))
    assert largest_difference(shared, plain) < 1e-4


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 120))
def test_packs_hold_every_branch_once_in_order_and_little_more_than_fits(lengths, capacity):
    packs = pack(lengths, capacity)
    assert [i for row in packs for i in row] == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in row) for row in packs) <= max(capacity, max(lengths)) + max(lengths)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_packed_row_says_of_every_token_whose_it_is_and_where_what_is_asked_lies(data):
    trees = []
    for number in range(data.draw(st.integers(1, 3))):
        lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
        branches = [data.draw(st.lists(st.integers(1, 99), min_size=n, max_size=n)) for n in lengths]
        wanted = [range(data.draw(st.integers(0, n - 1)), n) for n in lengths]
        trees.append(rows.Tree(number, [0], branches, wanted, [], {}))
    packs = [data.draw(st.lists(st.sampled_from(range(len(t.branches))), unique=True)) for t in trees]
    layout = prefix.lay_out(trees, packs)
    assert [(b, i) for b, i, _ in layout.places] == [
        (b, i) for b, branches in enumerate(packs) for i in branches for _ in trees[b].wanted[i]
    ]
    for b, (tree, branches) in enumerate(zip(trees, packs, strict=True)):
        for i in branches:
            mine = layout.owner[b] == i
            assert layout.ids[b][mine].tolist() == tree.branches[i]
            assert layout.offset[b][mine].tolist() == list(range(len(tree.branches[i])))
            columns = [column for tree, branch, column in layout.places if (tree, branch) == (b, i)]
            assert layout.offset[b][columns].tolist() == list(tree.wanted[i])
            assert layout.owner[b][columns].tolist() == [i] * len(tree.wanted[i])
        assert int((layout.owner[b] >= 0).sum()) == sum(len(tree.branches[i]) for i in branches), "the rest is padding"
