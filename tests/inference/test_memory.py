"""What does not fit is halved until it does: nothing is left out, nothing comes twice, and each halving is logged."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlaifv.inference.memory import Budget


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
