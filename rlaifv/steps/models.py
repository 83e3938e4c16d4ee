"""Models: who plays policy, labeler and divider in a run, written down once so that every stage depends on it."""

from pathlib import Path

from rlaifv.inference.server import is_served, open_served
from rlaifv.params import ModelParams, Params, ServerParams
from rlaifv.records import ModelRecord, to_json, write_atomic
from rlaifv.store import SCRATCH
from rlaifv.vlm.checkpoint import fingerprint_checkpoint

ROLES = ("policy", "labeler", "divider")


def describe(model: ModelParams, server: ServerParams) -> ModelRecord:
    """A model of the parameter file with its fingerprint. FileNotFoundError when there is no such checkpoint; of a
    served one, errors of `open_served`."""
    if is_served(model.path):
        mark = open_served(model.path, server, SCRATCH).fingerprint
    else:
        mark = fingerprint_checkpoint(model.path, model.revision)
    return ModelRecord(model.path, model.revision, model.dtype, model.device, mark)


def describe_models(params: Params) -> dict[str, ModelRecord]:
    """Role → who plays it by the parameter file; no stage needs to have run for it."""
    return {role: describe(getattr(params, role), params.server) for role in ROLES}


def write_models(params: Params, out: Path) -> dict[str, ModelRecord]:
    """Write `out`/ROLE.json for every role; a stage that a role matters to depends on its file."""
    records = describe_models(params)
    for role, record in records.items():
        write_atomic(out / f"{role}.json", to_json(record) + "\n")
    return records
