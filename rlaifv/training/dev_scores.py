"""A checkpoint's scores on dev as soon as it is written, so that only the best few must keep their weights.

They are the rows that the stages evaluate and select would come to: the same questions, code and rule.
"""

import dataclasses
import gc
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from rlaifv.evaluation.hallucination import ask, load_split, score, share
from rlaifv.fingerprint import digest_files
from rlaifv.params import EvaluateParams
from rlaifv.records import ModelRecord, to_json, write_atomic
from rlaifv.steps.select import ranked
from rlaifv.training.policy import own_device
from rlaifv.training.run_folder import read_whole, record_whole
from rlaifv.vlm.loading import load_model


@dataclass(frozen=True)
class Dev:
    """What a checkpoint is asked on dev, and how it is chosen: `model` says how it is loaded, `prepared` and
    `image_root` are folders, `base` is the base model's row, the rest are parameters of evaluate, feedback and select.
    """

    model: ModelRecord
    prepared: str
    image_root: str
    evaluate: EvaluateParams
    suffix: str
    base: dict[str, Any]
    max_recall_drop: float

    @classmethod
    def read(cls, content: dict[str, Any]) -> "Dev":
        """Its `dataclasses.asdict`, read back."""
        model, evaluate = ModelRecord(**content["model"]), EvaluateParams(**content["evaluate"])
        return cls(**{**content, "model": model, "evaluate": evaluate})

    def data(self) -> list[str]:
        """What is known of the files: their digests change with them."""
        return [digest_files(Path(self.prepared)), digest_files(Path(self.image_root), by_stat_from=0)]


def score_checkpoint(run: Path, part: str, dev: Dev) -> None:
    """Write dev's row of the checkpoint `part` of a run's folder beside it, as the part `<part>.json`.

    Every process loads it on its own GPU and answers its share of dev; the first one puts the shares together.
    """
    state = PartialState()
    state.wait_for_everyone()  # the first process has written it
    split = load_split("dev", Path(dev.prepared), Path(dev.image_root))
    torch.cuda.empty_cache()
    vlm = load_model(dataclasses.replace(dev.model, device=own_device()), run / part)
    mine = ask(vlm, share(split, state.process_index, state.num_processes), dev.evaluate, dev.suffix)
    del vlm
    gc.collect()
    torch.cuda.empty_cache()  # training needs the room
    shares = gather_object([mine])
    if not state.is_main_process:
        return
    said = {row["id"]: row for answers, _ in shares for row in answers}
    answers, asked = [said[i.id] for i in split.instructions], [row for _, rows in shares for row in rows]
    row = {"checkpoint": Path(part).name, **score(answers, asked, split)}
    write_atomic(run / f"{part}.json", to_json(row) + "\n")
    record_whole(run, f"{part}.json")


def surplus(run: Path, dev: Dev, keep: int) -> list[str]:
    """The checkpoints in a run's folder that are not among the `keep` best of those scored so far."""
    scored = [part for part in read_whole(run) if part.startswith("published/checkpoint-") and part.endswith(".json")]
    rows = ranked([json.loads((run / part).read_text()) for part in scored], dev.base, dev.max_recall_drop)
    return [f"published/{row['checkpoint']}" for row in rows[keep:]]
