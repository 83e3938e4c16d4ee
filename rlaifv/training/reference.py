"""Reference log-probs, computed once and kept with the fingerprint of everything that made them.

A stored file is used only when it is whole and its fingerprint is exactly the one asked for; otherwise the log-probs
are computed again, saying so. (The original trusts any `*logp*` file that lies in a folder.)
"""

import hashlib
import json
import logging
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
        fingerprint = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        self.path = folder / f"reference-{fingerprint}.parquet"
        self.made_of, self.pair_ids = made_of, pair_ids

    def load(self) -> np.ndarray | None:
        """The stored log-probs [2, pairs], or None when there are none for exactly this model, data and settings."""
        if not self.path.is_file():
            others = len(list(self.path.parent.glob("reference-*.parquet")))
            why = f"; {others} stored for other models or data are not used" if others else ""
            log.info("reference log-probs: computing %d pairs once%s", len(self.pair_ids), why)
            return None
        try:
            logps = self._read()
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            log.warning("reference log-probs: %s is not used, computing them again: %s", self.path, why)
            return None
        log.info("reference log-probs: %d pairs read from %s", len(self.pair_ids), self.path.name)
        return logps

    def _read(self) -> np.ndarray:
        table = pq.read_table(self.path, page_checksum_verification=True)
        made_of = json.loads((table.schema.metadata or {}).get(KEY, b"{}"))
        if made_of != self.made_of:
            raise ValueError(f"it was made of {made_of}, not of {self.made_of}")
        if table["pair_id"].to_pylist() != self.pair_ids:
            raise ValueError("it is about other pairs")
        logps = np.stack([table[column].to_numpy() for column in COLUMNS])
        if logps.dtype != np.float32 or not np.isfinite(logps).all():
            raise ValueError("it holds values that are no finite float32 numbers")
        return logps

    def save(self, logps: np.ndarray) -> None:
        """Write log-probs [2, pairs] atomically: a killed run leaves the old file or the new one, never half of one."""
        arrays = {column: pa.array(values.astype(np.float32)) for column, values in zip(COLUMNS, logps, strict=True)}
        table = pa.table({"pair_id": self.pair_ids, **arrays})
        table = table.replace_schema_metadata({KEY: json.dumps(self.made_of, sort_keys=True)})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        pq.write_table(table, partial, write_page_checksum=True)
        partial.replace(self.path)
