"""What does not fit is halved until it does: nothing is left out, nothing comes twice, and each halving is logged. On a
GPU it starts from the free memory, and a halving is known at the next start."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_llava import save_tiny_llava

from rlaifv.inference import memory
from rlaifv.inference.memory import Budget, budget_for, rounded, sampling_bytes, token_bytes
from rlaifv.inference.sampling import Decoding, Prompt, generate_batch
from rlaifv.vlm.loading import load_vlm

GB = 1e9


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 9)), max_size=20), st.integers(9, 40), st.integers(9, 40)
)
def test_every_item_comes_once_in_order_in_batches_of_one_kind_that_fit(items, size, fits):
    def work(batch):
        if max(weight for _, weight in batch) * len(batch) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return len(batch)

    budget = Budget("model", size, "tokens")
    found = list(budget.batches(items, work, lambda item: item[1], lambda item: item[0]))
    assert [item for batch, _ in found for item in batch] == items
    assert all(len({kind for kind, _ in batch}) == 1 and count == len(batch) for batch, count in found)
    assert budget.halved == (budget.size < size)


def test_a_halving_is_logged_and_kept_and_an_item_that_never_fits_is_one_clear_line(caplog):
    def work(batch):
        if len(batch) > 2:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate")
        return batch

    budget = Budget("tiny", 8, "rows")
    assert [len(batch) for batch, _ in budget.batches(range(6), work)] == [1] * 6
    assert [record.getMessage() for record in caplog.records] == [
        "tiny: out of memory with 6 rows at once, going on with 3",
        "tiny: out of memory with 3 rows at once, going on with 1",
    ]
    assert [len(batch) for batch, _ in budget.batches(range(3), work)] == [1, 1, 1]
    with pytest.raises(RuntimeError, match="tiny: out of memory with a single row; use a smaller model"):
        list(budget.batches(range(6), lambda batch: work(range(9))))


def test_other_errors_are_not_taken_for_a_full_memory():
    with pytest.raises(ZeroDivisionError):
        list(Budget("tiny", 8, "rows").batches(range(3), lambda batch: 1 / 0))


class Network(SimpleNamespace):
    """What budgets ask of a model; a class of its own, for a SimpleNamespace has no hash."""

    __hash__ = object.__hash__

    def get_decoder(self):
        return self

    def get_output_embeddings(self):
        return SimpleNamespace(weight=torch.empty(32000, 1, device="meta"))


def llama_7b(fingerprint: str = "f") -> SimpleNamespace:
    """Llama-7B's shape in bfloat16, on a GPU."""
    config = SimpleNamespace(num_hidden_layers=32, num_attention_heads=32, hidden_size=4096, intermediate_size=11008)
    network = Network(config=config, dtype=torch.bfloat16)
    return SimpleNamespace(
        name="llama", fingerprint=fingerprint, model=network, network=network, device=torch.device("cuda", 0)
    )


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """An H100 that is not there; set `free` to its free bytes."""
    state = SimpleNamespace(free=60 * GB, name="H100")
    monkeypatch.setattr(memory, "HALVINGS", tmp_path / "batches.json")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (state.free - 5 * GB, 80 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20 * GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 15 * GB)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: state.name)
    return state


def test_a_token_of_a_7b_model_takes_its_keys_and_values_and_some_activations():
    assert token_bytes(llama_7b()) == pytest.approx(1.5 * 524288 + 2 * (3 * 11008 + 6 * 4096))


def test_a_batch_starts_from_what_the_free_memory_has_room_for_and_never_exceeds_what_is_wanted(gpu):
    each = sampling_bytes(llama_7b(), 620, 10, 512)
    sizes = []
    for gpu.free in (60 * GB, 59 * GB, 15 * GB, 1 * GB):
        sizes.append(budget_for(llama_7b(), "10 samples of 512 tokens", 64, "prompts", each).size)
    assert sizes == [8, 8, 2, 1], "about 5 GB a prompt, and one at least"
    gpu.free = 60 * GB
    assert budget_for(llama_7b(), "10 samples of 512 tokens", 3, "prompts", each).size == 3


def test_a_model_on_several_gpus_has_as_many_times_the_least_free_of_them(gpu, monkeypatch):
    vlm = llama_7b()
    vlm.network.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1, "lm_head": "cpu", "embed": "disk"}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((20 + 10 * device.index) * GB, 80 * GB))
    assert memory.free_memory_for(vlm) == 2 * 25 * GB


def test_few_megabytes_more_or_less_change_no_batch():
    assert [rounded(count) for count in range(14)] == [0, 1, 2, 3, 4, 4, 6, 6, 8, 8, 8, 8, 12, 12]


def test_a_halving_is_known_at_the_next_start_for_this_model_this_use_and_this_gpu_alone(gpu, caplog):
    caplog.set_level("INFO", "rlaifv")
    wanted = ("10 samples of 512 tokens", 16, "prompts", 1.0)

    def work(batch):
        if len(batch) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")

    first = llama_7b()
    assert [len(batch) for batch, _ in budget_for(first, *wanted).batches(range(16), work)] == [4, 4, 4, 4]
    assert budget_for(first, *wanted).size == 4, "for the rest of the run"
    caplog.clear()
    restarted = budget_for(llama_7b(), *wanted)
    assert (restarted.size, restarted.halved) == (4, True)
    assert "at most 4 prompts, more did not fit before" in caplog.text
    assert budget_for(llama_7b("another"), *wanted).size == 16
    assert budget_for(llama_7b(), "10 samples of 128 tokens", *wanted[1:]).size == 16
    gpu.name = "H200"
    assert budget_for(llama_7b(), *wanted).size == 16


def test_on_a_cpu_everything_that_is_wanted_goes_at_once_and_nothing_is_written(gpu):
    vlm = llama_7b()
    vlm.device = torch.device("cpu")
    budget = budget_for(vlm, "10 samples of 512 tokens", 64, "prompts", 1e12)
    assert (budget.size, budget.halved) == (64, False)
    budget.halve(64)
    assert budget_for(vlm, "10 samples of 512 tokens", 64, "prompts", 1e12).size == 32, "for the rest of the run"
    assert not memory.HALVINGS.exists()


@pytest.mark.parametrize("shared", [True, False])
def test_answers_do_not_depend_on_how_many_fit(tmp_path, monkeypatch, shared):
    vlm = load_vlm(str(save_tiny_llava(tmp_path)), device="cpu")
    prompts = [Prompt(None, f"Name {n} dogs.") for n in range(3)]
    streams = [torch.rand(4, 6, dtype=torch.float64).numpy() for _ in prompts]

    def answers():
        return generate_batch(vlm, prompts, streams, Decoding(0.7, 0, 1.0, 6), shared)

    whole, sizes = answers(), []
    real = memory.Budget.batches
    monkeypatch.setattr(memory, "free_memory_for", lambda vlm: 1)  # room for the least
    monkeypatch.setattr(memory.Budget, "batches", lambda self, *a, **k: sizes.append(self.size) or real(self, *a, **k))
    assert answers() == whole and set(sizes) == {1}
