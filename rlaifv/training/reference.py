"""Reference log-probs, computed once and kept with everything that made them.

A stored file is used only when it is whole and was made of exactly what is asked for; otherwise the log-probs are
computed again, saying so. (The original trusts any `*logp*` file that lies in a folder.)
"""

import json
import logging
from pathlib import Path

import numpy as np

from rlaifv.fingerprint import digest
from rlaifv.records import to_json, write_atomic

log = logging.getLogger(__name__)


class ReferenceStore:
    """One JSON file of log π_ref(answer | image, question) in nats: `logps` [2, pairs] and the `digest` of all else.

    `made_of` is whatever determines the numbers: fingerprint of model, processor and template, of the data, of the
    code, the layout, the dtypes of weights and computation, the segment weight. `pair_ids` are the pairs in training
    order.
    """

    def __init__(self, folder: Path, made_of: dict, pair_ids: list[str]):
        self.made_of = {**made_of, "pairs": pair_ids}
        self.path = folder / f"reference-{digest(self.made_of)}.json"

    def load(self) -> np.ndarray | None:
        """The stored log-probs, float32 [2, pairs], or None when there are none for exactly this model, data and
        settings."""
        n = len(self.made_of["pairs"])
        if not self.path.is_file():
            others = len(list(self.path.parent.glob("reference-*.json")))
            why = f"; {others} stored for other models or data are not used" if others else ""
            log.info("reference log-probs: computing %d pairs once%s", n, why)
            return None
        try:
            stored = json.loads(self.path.read_text())
            if other := [key for key, value in self.made_of.items() if stored["made_of"][key] != value]:
                raise ValueError(f"it was made of another {', another '.join(other)}")
            if stored["digest"] != digest(stored["logps"]) or not np.isfinite(stored["logps"]).all():
                raise ValueError("its log-probs are not finite or not as they were written")
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = str(error) or type(error).__name__
            log.warning("reference log-probs: %s is not used, computing them again: %s", self.path, why)
            return None
        log.info("reference log-probs: %d pairs read from %s", n, self.path.name)
        return np.array(stored["logps"], np.float32)

    def save(self, logps: np.ndarray) -> None:
        """Write log-probs [2, pairs] atomically: a killed run leaves the old file or the new one, never half of one."""
        numbers = logps.tolist()
        write_atomic(self.path, to_json({"made_of": self.made_of, "logps": numbers, "digest": digest(numbers)}))
