"""How much goes through a model at once: as much as is wanted and free memory has room for, halved when that was too
much; on a GPU a halving is remembered for the next start."""

import json
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch

from rlaifv.records import write_atomic
from rlaifv.store import SCRATCH
from rlaifv.vlm.loading import VLM

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")

HALVINGS = SCRATCH / "batches.json"
"""What fitted after a halving, by model, GPU and use; without the file everything is tried anew."""

USABLE = 0.8
"""Share of the free memory that is planned with: the rest is lost between blocks, or is what the estimate misses."""

GROWTH = 1.5
"""A full buffer of keys and values grows by half (`prefix_cache.BufferLayer`)."""

DRAWING = 40
"""Bytes for one logit of a sample that is drawn: fp32, and in fp64 the sorted and the summed probabilities."""


@dataclass
class Budget:
    """How many of `unit` ("rows", "tokens") one batch of the model called `name` may hold, never below `least`.

    Each halving is logged and kept for as long as the budget is; `note` is told of it.
    """

    name: str
    size: int
    unit: str
    least: int = 1
    halved: bool = False
    note: Callable[[int], None] = lambda size: None

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
        self.note(size)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


_fitted: WeakKeyDictionary = WeakKeyDictionary()  # model → use → what fitted after a halving, None where all did


def budget_for(vlm: VLM, use: str, wanted: int, unit: str, each: float, least: int = 1) -> Budget:
    """The budget of one use of a model.

    Args:
        use: what it is for, all that changes how much fits but the length of the prompts.
        wanted: the most that is asked for.
        each: bytes that one of `unit` takes.
        least: of `Budget`.
    """
    known = _fitted.setdefault(vlm.model, {})
    if use not in known:
        known[use] = recall(vlm, use)
        if known[use]:
            log.info("%s, %s: at most %d %s, more did not fit before (%s)", vlm.name, use, known[use], unit, HALVINGS)
    free = free_memory_for(vlm)
    room = wanted if free is None else max(least, rounded(int(USABLE * free / each)))
    size = min(wanted, room, known[use] or wanted)

    def note(size: int) -> None:
        known[use] = size
        remember(vlm, use, size)

    return Budget(vlm.name, size, unit, least, size < wanted, note)


def rounded(count: int) -> int:
    """A count down to 1, 2, 3, 4, 6, 8, 12, 16, …: a few MB more or less of free memory change no batch."""
    step = 1 << max(0, count.bit_length() - 2)
    return count // step * step


def free_memory_for(vlm: VLM) -> int | None:
    """Bytes that are free for a model's work: of a model on several GPUs, as many times the least of them; None on a
    CPU, whose memory is not planned with."""
    placed = getattr(vlm.network, "hf_device_map", None) or {"": vlm.device}
    devices = {torch.device("cuda", place) if isinstance(place, int) else place for place in placed.values()}
    devices = {torch.device(place) for place in devices if str(place).startswith("cuda")}
    if not devices:
        return None
    free = [
        torch.cuda.mem_get_info(d)[0] + torch.cuda.memory_reserved(d) - torch.cuda.memory_allocated(d) for d in devices
    ]
    return len(devices) * min(free)


def token_bytes(vlm: VLM) -> float:
    """Bytes that a token takes: its keys and values in all layers, and its activations in one."""
    config, size = vlm.network.get_decoder().config, vlm.network.dtype.itemsize
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return size * (GROWTH * 2 * config.num_hidden_layers * heads * width + 3 * inner + 6 * config.hidden_size)


def sampling_bytes(vlm: VLM, prompt: int, samples: int, steps: int) -> float:
    """Bytes of one prompt of so many tokens while its samples decode, should all run to the last step."""
    vocabulary = vlm.network.get_output_embeddings().weight.shape[0]
    return token_bytes(vlm) * (prompt + samples * steps) + samples * vocabulary * DRAWING


# ---- what is remembered between starts; of GPUs only


def _place(vlm: VLM, use: str) -> str:
    gpu = torch.cuda.get_device_name(vlm.device) if vlm.device.type == "cuda" else vlm.device.type
    return f"{vlm.fingerprint} {str(vlm.network.dtype).removeprefix('torch.')} on {gpu}: {use}"


def recall(vlm: VLM, use: str) -> int | None:
    """What fitted after a halving in an earlier start, None where none was needed."""
    if vlm.device.type == "cpu" or not HALVINGS.is_file():
        return None
    return json.loads(HALVINGS.read_text()).get(_place(vlm, use))


def remember(vlm: VLM, use: str, size: int) -> None:
    if vlm.device.type != "cpu":
        known = json.loads(HALVINGS.read_text()) if HALVINGS.is_file() else {}
        write_atomic(HALVINGS, json.dumps(known | {_place(vlm, use): size}, indent=1) + "\n")
