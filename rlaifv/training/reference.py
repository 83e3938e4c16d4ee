"""Reference log-probs, computed once and kept with the fingerprint of everything that made them.

A stored file is used only when its fingerprint is exactly the one asked for; any other is left alone and the log-probs
are computed again, saying so. (The original trusts any `*logp*` file that lies in a folder.)
"""

import hashlib
import json
import logging
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

log = logging.getLogger(__name__)

KEY = b"rlaifv.reference"
COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


class ReferenceStore:
    """One parquet file of log π_ref(answer | image, question), one row a pair: `pair_id` and `COLUMNS` (nats).

    `made_of` is whatever determines the numbers: fingerprint of model, processor and template, of the data, of the
    code, the layout, the dtypes of weights and computation, the segment weight. `pair_ids` are the pairs in training
    order.
    """

    def __init__(self, folder: Path, made_of: dict, pair_ids: list[str]):
        text = json.dumps({**made_of, "pairs": pair_ids}, sort_keys=True)
        self.fingerprint = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        self.path = folder / f"reference-{self.fingerprint}.parquet"
        self.made_of, self.pair_ids = made_of, pair_ids
        self.reused = False
        self._done, self._said = 0, time.monotonic()

    def load(self) -> dict[str, np.ndarray] | None:
        """The stored log-probs [pairs], or None when there are none for exactly this model, data and settings."""
        if not self.path.is_file():
            others = len(list(self.path.parent.glob("reference-*.parquet")))
            why = f"; {others} stored for other models or data are not used" if others else ""
            log.info("reference log-probs: computing %d pairs once%s", len(self.pair_ids), why)
            return None
        table = pq.read_table(self.path)
        stored = json.loads((table.schema.metadata or {}).get(KEY, b"{}"))
        if stored != self.made_of or table["pair_id"].to_pylist() != self.pair_ids:
            log.warning(
                "reference log-probs: %s was made of %s, not of %s: not used, computing them again",
                *(self.path, stored, self.made_of),
            )
            return None
        self.reused = True
        log.info("reference log-probs: %d pairs read from %s", len(table), self.path.name)
        return {column: table[column].to_numpy() for column in COLUMNS}

    def report(self, pairs: int) -> None:
        """Count `pairs` more as computed; a log line every few seconds says how many are."""
        self._done += pairs
        if time.monotonic() - self._said >= 5:
            self._said = time.monotonic()
            log.info("reference log-probs: %d of %d pairs", self._done, len(self.pair_ids))

    def save(self, logps: dict[str, list[float]]) -> None:
        """Write atomically: a killed run leaves the old file or the new one, never half of one."""
        arrays = {column: pa.array(np.asarray(logps[column], np.float32)) for column in COLUMNS}
        table = pa.table({"pair_id": self.pair_ids, **arrays})
        table = table.replace_schema_metadata({KEY: json.dumps(self.made_of, sort_keys=True)})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        pq.write_table(table, partial)
        partial.replace(self.path)
