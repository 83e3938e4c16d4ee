"""A folder that is there whole or not at all, and whose writing goes on after a kill."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlaifv.records import write_atomic
from rlaifv.store import lock_folder, readable_by_all

JOB = "job.json"
"""In an unfinished folder, what it is going to be: another job does not go on with it."""


@contextmanager
def whole_folder(out: Path, job: Mapping[str, Any]) -> Iterator[Path]:
    """The folder `OUT.partial`, which becomes `out` when the block ends well; what an earlier start of the same job has
    left in it is there again.

    Raises FileExistsError where `out` is there already, or `OUT.partial` is somebody else's, and `store.InUse` while
    another process is at it.
    """
    partial, text = out.with_name(f"{out.name}.partial"), json.dumps(job, sort_keys=True, indent=1, default=str) + "\n"
    if out.exists():
        raise FileExistsError(f"{out} is there already: give another folder, or delete it")
    lock = lock_folder(partial, f"writing {out}")
    try:
        if partial.exists() and not (partial / JOB).is_file():
            raise FileExistsError(f"{partial}, in which it is to be written, is something else: move it")
        if partial.exists() and (partial / JOB).read_text() != text:
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
        write_atomic(partial / JOB, text)
        yield partial
        (partial / JOB).unlink()
        readable_by_all(partial)
        partial.rename(out)
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
