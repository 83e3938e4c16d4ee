"""Models: who plays policy, labeler and divider in a run, written down once so that every stage depends on it."""

import dataclasses
from pathlib import Path

from rlaifv.inference.server import is_served, open_served
from rlaifv.params import ModelParams, Params
from rlaifv.records import ModelRecord, to_json, write_atomic
from rlaifv.vlm.checkpoint import fingerprint_checkpoint

ROLES = ("policy", "labeler", "divider")


def describe(model: ModelParams) -> ModelRecord:
    """A model of the parameter file with its fingerprint. FileNotFoundError when there is no such checkpoint."""
    record = ModelRecord(fingerprint="", **dataclasses.asdict(model))
    if is_served(model.path):
        return dataclasses.replace(record, fingerprint=open_served(model.path).fingerprint)
    mark = fingerprint_checkpoint(model.path, model.revision, record.settings)
    return dataclasses.replace(record, fingerprint=mark)


def describe_models(params: Params) -> dict[str, ModelRecord]:
    """Role → who plays it by the parameter file; nothing needs to have run for it."""
    return {role: describe(getattr(params, role)) for role in ROLES}


def write_models(params: Params, out: Path) -> dict[str, ModelRecord]:
    """Write `out`/ROLE.json for every role; a stage that a role matters to depends on its file."""
    records = describe_models(params)
    for role, record in records.items():
        write_atomic(out / f"{role}.json", to_json(record) + "\n")
    return records
