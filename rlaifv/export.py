"""Put a finished iteration into a folder that is ready for a hub upload: checkpoint and pairs, each with its card.

    python -m rlaifv.export --iteration 2 --out release [--params params.yaml] [--license apache-2.0]

`OUT/model` loads with `from_pretrained`, `OUT/dataset` with `datasets.load_dataset`; the cards hold the numbers, the
data statistics and the limits of the very run that made them. Nothing is uploaded.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq
from huggingface_hub import DatasetCardData, EvalResult, ModelCardData
from markupsafe import Markup
from ruamel.yaml import YAML
from safetensors import SafetensorError, safe_open

from rlaifv import stage
from rlaifv.params import DEFAULT, ModelParams, Params, load_params, read_content
from rlaifv.records import rates_of, to_json, write_atomic
from rlaifv.report.render import render, scale
from rlaifv.results import Result, read_result
from rlaifv.stage import Paths
from rlaifv.steps.pairs import COLUMNS
from rlaifv.store import readable_by_all


def lineage(params: Params, iteration: str) -> list[str]:
    """The iterations that led to `iteration`, first to last. Raises ValueError for one that the profile has not."""
    if iteration not in params.iterations:
        raise ValueError(f"no iteration {iteration!r} in the parameter file; there are {', '.join(params.iterations)}")
    chain = [iteration]
    while (prev := params.iterations[chain[0]].prev) != "0":
        chain.insert(0, prev)
    return chain


def export(params: Params, params_file: Path, iteration: str, out: Path, license_name: str | None = None) -> None:
    """Write `out/model` and `out/dataset`, whole or not at all.

    Raises FileNotFoundError for an iteration that has not run, FileExistsError when `out` holds something already,
    ValueError for weights or pairs that are not whole, and for pairs that are somebody else's (`pairs.source`).
    """
    if params.pairs.source:
        where = f"{params.pairs.source} (pairs.source), published already; the model alone is {Paths(iteration).policy}"
        raise ValueError(f"the pairs are those of {where}")
    chain = lineage(params, iteration)
    for name in chain:
        for needed in (Paths(name).policy / "config.json", Paths(name).pairs):
            if not needed.exists():
                raise FileNotFoundError(f"iteration {name} has not run: no {needed} (run `make repro` first)")
    results = {"0": read_result(Paths("0").results, "test")}
    results |= {name: read_result(Paths(name).results, "test", "pairs") for name in chain}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there already and not an empty folder: give another --out")
    check_weights(Paths(iteration).policy)
    for name in chain:
        check_pairs(Paths(name).pairs, results[name].pairs["pairs"])
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as folder:
        partial = Path(folder) / "whole"
        write_folder(partial, params, params_file, chain, results, license_name)
        readable_by_all(partial)
        if out.is_dir():
            out.rmdir()
        partial.rename(out)


def check_weights(folder: Path) -> None:
    """Raise ValueError unless the checkpoint's weights are all there and whole: safetensors files, those of its index
    where it has one, each as long as its header says."""
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
    for name in sorted(names):
        try:
            with safe_open(folder / name, framework="np") as weights:
                if not weights.keys():
                    raise ValueError("it holds no weight")
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"{folder / name} cannot be exported: {error}; run `dvc repro` again") from None


def check_pairs(path: Path, pairs: int) -> None:
    """Raise ValueError unless the parquet has the columns and the number of pairs that the run counted."""
    try:
        found = pq.read_metadata(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be exported: {str(error).splitlines()[0]}; run `dvc repro` again") from None
    if missing := COLUMNS.keys() - set(found.schema.to_arrow_schema().names):
        raise ValueError(f"{path} cannot be exported: it lacks {', '.join(sorted(missing))}")
    if found.num_rows != pairs:
        raise ValueError(f"{path} cannot be exported: {found.num_rows} pairs, but the run counted {pairs}")


def write_folder(
    out: Path,
    params: Params,
    params_file: Path,
    chain: list[str],
    results: Mapping[str, Result],
    license_name: str | None,
) -> None:
    """The model of the last iteration of `chain` and the pairs of all of them, with their cards."""
    model, dataset = out / "model", out / "dataset"
    shutil.copytree(Paths(chain[-1]).policy, model, copy_function=shutil.copyfile)  # DVC's may be read-only
    if params_file.with_name("default.yaml").is_file():  # a profile: with the default that it changes
        with (model / "training_params.yaml").open("w", encoding="utf-8") as stream:
            YAML().dump(read_content(params_file.resolve()), stream)
    else:
        shutil.copyfile(params_file, model / "training_params.yaml")
    metrics = {name: result.test for name, result in results.items()}
    write_atomic(model / "metrics.json", to_json(metrics, indent=2) + "\n")
    exam = json.loads(stage.EXAM.read_text()) if stage.EXAM.is_file() else {}
    write_atomic(model / "README.md", model_card(params, results, exam, license_name, kind_of(model)))
    (dataset / "data").mkdir(parents=True)
    for name in chain:
        shutil.copyfile(Paths(name).pairs, dataset / "data" / f"iteration_{name}.parquet")
    write_atomic(dataset / "README.md", dataset_card(params, results, license_name))


def model_name(model: ModelParams) -> str:
    """Its path, and its revision where it is pinned to one."""
    return model.path + (f" @ {model.revision}" if model.revision else "")


def kind_of(model: Path) -> str:
    """The type of a checkpoint by its configuration."""
    return json.loads((model / "config.json").read_text())["model_type"]


def model_card(
    params: Params, results: Mapping[str, Result], exam: Mapping, license_name: str | None, kind: str = ""
) -> str:
    """The README.md of the checkpoint, metadata first.

    Args:
        kind: the model's type; transformers knows one of ours once this package is imported.
        results: "0" and the iterations that led to the checkpoint, in order.
        exam: how well the labeler did on questions whose answer is known; {} where it was not asked.
    """
    final = list(results.values())[-1].test
    data = ModelCardData(
        base_model=params.policy.path if params.policy.revision else None,  # the hub has nothing of a folder
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        license=license_name,
        tags=["rlaif-v", "dpo", "hallucination"],
        model_name="rlaif-v",
        eval_results=[
            EvalResult(
                "image-text-to-text",
                "test-split",
                "test split of the run",
                rate,
                round(scale(rate) * final[rate], 2),
            )
            for rate in rates_of(final)
        ],
    )
    return render(
        "model_card.md",
        metadata=Markup(data.to_yaml()),
        params=params,
        models={role: model_name(getattr(params, role)) for role in ("policy", "labeler", "divider")},
        results=results,
        final=final,
        exam=exam,
        kind=kind,
        worst=min(exam["per_type"].items(), key=lambda item: item[1]) if exam.get("per_type") else None,
    )


def dataset_card(params: Params, results: Mapping[str, Result], license_name: str | None) -> str:
    """The README.md of the pairs; its metadata tells `datasets` which files are which iteration's.
    That `image` is an image, the files say themselves."""
    made = {name: result for name, result in results.items() if name != "0"}
    total = sum(result.pairs["pairs"] for result in made.values())
    data = DatasetCardData(
        license=license_name,
        task_categories=["image-text-to-text"],
        pretty_name="RLAIF-V preference pairs",
        tags=["rlaif-v", "preference", "dpo"],
        size_categories=size_category(total),
        configs=[
            {"config_name": name, "data_files": [{"split": "train", "path": f"data/{files}.parquet"}]}
            for name, files in [("default", "*"), *((f"iteration_{k}", f"iteration_{k}") for k in made)]
        ],
    )
    return render(
        "dataset_card.md",
        metadata=Markup(data.to_yaml()),
        temperature=params.generate.temperature,
        labeler=model_name(params.labeler),
        results=results,
        made=list(made),
        total=total,
    )


def size_category(n: int) -> str:
    """The hub's name for a number of rows."""
    steps = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
    return next((name for limit, name in steps if n < limit), "1M<n<10M")


def main(arguments: list[str] | None = None) -> None:
    """The command; what cannot be exported ends it with one line and exit code 1."""
    parser = argparse.ArgumentParser(prog="python -m rlaifv.export", description="Checkpoint and pairs with cards")
    parser.add_argument("--iteration", required=True, help="the iteration whose policy is exported")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--params", type=Path, default=DEFAULT, help="the parameter file of the run")
    parser.add_argument("--license", help="of model and pairs, by the hub's name (default: none is claimed)")
    options = parser.parse_args(arguments)
    try:
        export(load_params(options.params.resolve()), options.params, options.iteration, options.out, options.license)
    except (OSError, ValueError) as error:
        sys.exit(f"export: {error}")
    print(f"{options.out}/model and {options.out}/dataset are ready; read both README.md before an upload")
    print(f"next: hf upload OWNER/NAME {options.out}/model", file=sys.stderr)


if __name__ == "__main__":
    main()
