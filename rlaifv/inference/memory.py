"""How much goes through a model at once: as much as fits, halved whenever memory runs out."""

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Budget:
    """How many of `unit` ("rows", "tokens") one batch of the model called `name` may hold, never below `least`.

    Each halving is logged and kept for as long as the budget is.
    """

    name: str
    size: int
    unit: str
    least: int = 1
    halved: bool = False

    def batches(
        self,
        items: Sequence[T],
        work: Callable[[list[T]], R],
        weigh: Callable[[T], int] = lambda item: 1,
        kind: Callable[[T], Hashable] = lambda item: None,
    ) -> Iterator[tuple[list[T], R]]:
        """Yield each batch of the items, in order, and what `work` makes of it; a batch that does not fit is cut.

        Args:
            weigh: how much of the budget an item takes; all items of a batch are padded to its heaviest.
            kind: only items of one kind share a batch.

        Raises:
            RuntimeError: not even `least` fits.
        """
        start = 0
        while start < len(items):
            batch, heaviest = [], 0
            for item in items[start:]:
                heaviest = max(heaviest, weigh(item))
                if batch and (kind(item) != kind(batch[0]) or heaviest * (len(batch) + 1) > self.size):
                    break
                batch.append(item)
            try:
                result = work(batch)
            except RuntimeError as error:
                if not isinstance(error, torch.OutOfMemoryError) and "not enough memory" not in str(error):
                    raise
            else:
                yield batch, result
                start += len(batch)
                continue
            self.halve(sum(map(weigh, batch)))  # not in `except`: the error holds on to what did not fit

    def halve(self, used: int) -> None:
        """Go on with half of what was `used`."""
        size = min(used, self.size) // 2
        if size < self.least:
            raise RuntimeError(f"{self.name}: out of memory with a single row; use a smaller model or dtype")
        log.warning("%s: out of memory with %d %s at once, going on with %d", self.name, used, self.unit, size)
        self.size, self.halved = size, True
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
