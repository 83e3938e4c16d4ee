"""Models: who plays policy, labeler and divider in a run, written down once so that every stage depends on it."""

from pathlib import Path

from rlaifv.inference.server import is_served, open_served
from rlaifv.params import ModelParams
from rlaifv.records import ModelRecord, to_json, write_atomic
from rlaifv.vlm.loading import fingerprint_checkpoint


def describe(model: ModelParams) -> ModelRecord:
    """A model of the parameter file with its fingerprint. FileNotFoundError when there is no such checkpoint."""
    served = is_served(model.path)
    mark = open_served(model.path).fingerprint if served else fingerprint_checkpoint(model.path, model.revision)
    return ModelRecord(model.path, model.revision, model.dtype, model.device, mark)


def write_models(models: dict[str, ModelParams], out: Path) -> dict[str, ModelRecord]:
    """Write `out`/ROLE.json for every role; a stage that a role matters to depends on its file."""
    records = {role: describe(model) for role, model in models.items()}
    for role, record in records.items():
        write_atomic(out / f"{role}.json", to_json(record) + "\n")
    return records
