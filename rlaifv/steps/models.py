"""Models: who plays policy, labeler and divider in a run, and who judges by claims where that is another labeler;
written down once so that every stage depends on it."""

import dataclasses
from pathlib import Path

from rlaifv.inference.engine import check_command
from rlaifv.inference.served import open_served
from rlaifv.inference.server import is_served
from rlaifv.params import ModelParams, Params, ServerParams
from rlaifv.records import ModelRecord, to_json, write_atomic
from rlaifv.store import SCRATCH
from rlaifv.vlm.checkpoint import fingerprint_checkpoint
from rlaifv.vlm.loading import check_model

ROLES = ("policy", "labeler", "divider")


def describe(model: ModelParams, server: ServerParams, must_see: bool = False) -> ModelRecord:
    """A model of the parameter file with its fingerprint. FileNotFoundError when there is no such checkpoint; of a
    served one, errors of `open_served`."""
    if is_served(model.path):
        return as_record(model, open_served(model.path, server, SCRATCH, must_see).fingerprint)
    settings = as_record(model).settings
    return as_record(model, fingerprint_checkpoint(model.path, model.revision, settings))


def as_record(model: ModelParams, fingerprint: str = "") -> ModelRecord:
    return ModelRecord(fingerprint=fingerprint, **dataclasses.asdict(model))


def describe_models(params: Params, server: ServerParams) -> dict[str, ModelRecord]:
    """Role → who plays it by the parameter file; no stage needs to have run for it."""
    return {role: describe(getattr(params, role), server, role != "divider") for role in ROLES}


def write_models(params: Params, server: ServerParams, out: Path) -> dict[str, ModelRecord]:
    """Write `out`/ROLE.json for every role, and `out`/second_labeler.json where there is `evaluate.labeler`; a stage
    that a role matters to depends on its file.

    Raises FileNotFoundError or ValueError, before any weights are fetched, for a model that cannot play its role or
    whose server cannot be started.
    """
    second = params.evaluate.labeler
    for role, model in [*((role, getattr(params, role)) for role in ROLES), *([("labeler", second)] if second else [])]:
        if model.engine == "vllm":
            check_command(role, server)
        if not is_served(model.path):
            check_model(as_record(model), role)
    records = describe_models(params, server)
    if second:
        records["second_labeler"] = describe(second, server, must_see=True)
    for role, record in records.items():
        write_atomic(out / f"{role}.json", to_json(record) + "\n")
    return records
