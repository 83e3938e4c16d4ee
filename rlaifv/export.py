"""Put a finished round into a folder that is ready for a hub upload: checkpoint and pairs, each with its card.

    python -m rlaifv.export --iteration 2 --out release [--params params.yaml] [--license apache-2.0]

`OUT/model` loads with `from_pretrained`, `OUT/dataset` with `datasets.load_dataset`; the cards hold the numbers, the
data statistics and the limits of the very run that made them. Nothing is uploaded.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import DatasetCardData, EvalResult, ModelCardData

from rlaifv.params import DEFAULT, ModelParams, Params, load_params
from rlaifv.records import RATES, write_atomic
from rlaifv.results import read_result
from rlaifv.stage import Paths
from rlaifv.steps.pairs import SCHEMA

PAPER = "https://arxiv.org/abs/2405.17220"
NAMES = {
    "response_hallucination": "response hallucination ↓",
    "mention_hallucination": "mention hallucination ↓",
    "recall": "object recall ↑",
}


def lineage(params: Params, iteration: str) -> list[str]:
    """The rounds that led to `iteration`, first to last. Raises ValueError for a round that the profile has not."""
    if iteration not in params.iterations:
        raise ValueError(f"no iteration {iteration!r} in the parameter file; there are {', '.join(params.iterations)}")
    chain = [iteration]
    while (prev := params.iterations[chain[0]].prev) != "0":
        chain.insert(0, prev)
    return chain


def publish(params: Params, params_file: Path, iteration: str, out: Path, license_name: str | None = None) -> None:
    """Write `out/model` and `out/dataset`, whole or not at all.

    Raises FileNotFoundError for a round that has not run, FileExistsError when `out` holds something already.
    """
    chain = lineage(params, iteration)
    for name in chain:
        paths = Paths(name)
        for needed in (paths.policy / "config.json", paths.pairs, paths.results / "test.json"):
            if not needed.exists():
                raise FileNotFoundError(f"round {name} has not run: no {needed} (run `make repro` first)")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there already and not an empty folder: give another --out")
    results = {name: read_result(Paths(name).results) for name in ("0", *chain)}
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(Paths(iteration).policy, partial / "model")
    shutil.copyfile(params_file, partial / "model" / "training_params.yaml")
    metrics = {name: results[name]["test"] for name in results}
    write_atomic(partial / "model" / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    write_atomic(partial / "model" / "README.md", model_card(params, chain, results, license_name))
    for name in chain:
        (partial / "dataset" / "data").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Paths(name).pairs, partial / "dataset" / "data" / f"round_{name}.parquet")
    write_atomic(partial / "dataset" / "README.md", dataset_card(params, chain, results, license_name))
    if out.is_dir():
        out.rmdir()
    partial.rename(out)


def percent(metrics: Mapping, rate: str) -> str:
    """ "12.3 (10.1–14.5)": a rate in percent with its interval."""
    low, high = metrics[f"{rate}_interval"]
    return f"{100 * metrics[rate]:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def model_name(model: ModelParams) -> str:
    return model.path + (f" @ {model.revision}" if model.revision else "")


def on_hub(model: ModelParams) -> bool:
    """Whether the parameter file names a hub model rather than a folder (a pinned revision says so)."""
    return model.revision is not None


def results_table(results: Mapping[str, Mapping]) -> str:
    head = "| model | " + " | ".join(NAMES.values()) + " | mean words | yes/no accuracy |\n|---|---|---|---|---|---|\n"
    rows = ""
    for name, result in results.items():
        test = result["test"]
        accuracy = test["yes_no"].get("accuracy")
        cells = ["base" if name == "0" else f"round {name}", *(percent(test, rate) for rate in RATES)]
        cells += [f"{test['mean_words']:.1f}", "not measured" if accuracy is None else f"{100 * accuracy:.1f}"]
        rows += "| " + " | ".join(cells) + " |\n"
    return head + rows


def pairs_table(chain: Sequence[str], results: Mapping[str, Mapping]) -> str:
    head = "| round | pairs | before length balance | instructions | mean words chosen | mean words rejected |\n"
    rows = "|---|---|---|---|---|---|\n"
    for name in chain:
        pairs = results[name]["pairs"]
        rows += f"| {name} | {pairs['pairs']} | {pairs['pairs_before_balance']} | {pairs['instructions_with_pairs']} "
        rows += f"| {pairs['mean_words_chosen']:.1f} | {pairs['mean_words_rejected']:.1f} |\n"
    return head + rows


def limits(params: Params, results: Mapping[str, Mapping]) -> list[str]:
    """What a reader must not conclude from this run, in sentences that carry its own numbers."""
    base, final = results["0"]["test"], list(results.values())[-1]["test"]
    found = [
        f"Measured on {final['n']} greedy answers. Hallucination and recall are those of the 80 COCO object classes, "
        "found by vocabulary: invented attributes, relations, counts and text are not in these rates, and the rates "
        "are not comparable with published figures, which a judge model counted.",
        f"Still hallucinates: {100 * final['response_hallucination']:.1f} % of the answers that name an object name "
        "one that is not in the image.",
    ]
    change = 100 * (final["recall"] - base["recall"])
    if change < 0:
        found.append(f"Says less: recall is {-change:.1f} points below the base model's.")
    labeler = results["0"].get("labeler", {})
    if labeler.get("accuracy") is not None:
        worst = min(labeler["per_type"], key=labeler["per_type"].get)
        found.append(
            f"It learned from a labeler that answers {100 * labeler['accuracy']:.1f} % of held-out questions right "
            f"({worst}: {100 * labeler['per_type'][worst]:.1f} %), and it learned that labeler's errors too."
        )
    else:
        found.append("How often the labeler is right was not measured in this run.")
    found.append(f"Trained on answers of at most {params.generate.max_new_tokens} tokens to single-turn questions.")
    return found


def model_card(params: Params, chain: list[str], results: Mapping[str, Mapping], license_name: str | None) -> str:
    """The README.md of the checkpoint, metadata first."""
    test, train = results[chain[-1]]["test"], params.train
    data = ModelCardData(
        base_model=params.policy.path if on_hub(params.policy) else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        license=license_name,
        tags=["rlaif-v", "dpo", "hallucination"],
        model_name="rlaif-v",
        eval_results=[
            EvalResult("image-text-to-text", "test-split", "test split of the run", rate, round(100 * test[rate], 2))
            for rate in RATES
        ],
    )
    epochs = "1 epoch" if train.epochs == 1 else f"{train.epochs} epochs"
    method = "LoRA, merged" if train.lora_r else "full fine-tuning"
    limit_lines = "\n".join(f"- {text}" for text in limits(params, results))
    return f"""---
{data.to_yaml()}
---

# A vision-language model aligned against hallucination (RLAIF-V)

{len(chain)} {"round" if len(chain) == 1 else "rounds"} of RLAIF-V ([paper]({PAPER})): the model's own sampled answers,
split into claims, each claim checked against the image by an open model, DPO on the resulting pairs.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("PATH_OR_HUB_ID")
processor = AutoProcessor.from_pretrained("PATH_OR_HUB_ID")
content = [{{"type": "image", "path": "cat.jpg"}}, {{"type": "text", "text": "What is in the picture?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
output = model.generate(**inputs, max_new_tokens=256, do_sample=False)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

## Results

Test split, percent, 95 % bootstrap intervals.

{results_table(results)}
## Training data

{pairs_table(chain, results)}
| role | model |
|---|---|
| policy | `{model_name(params.policy)}` |
| labeler | `{model_name(params.labeler)}` |
| divider | `{model_name(params.divider)}` |

DPO with β {train.beta:g}, {method}, learning rate {train.learning_rate:g}, {epochs} of batches of
{train.batch_size}, {train.dtype}; the checkpoint of each round selected on a dev split. Every parameter is in
`training_params.yaml`, every number of the test split in `metrics.json`.

## Limits

{limit_lines}
"""


def dataset_card(params: Params, chain: list[str], results: Mapping[str, Mapping], license_name: str | None) -> str:
    """The README.md of the pairs; its metadata tells `datasets` the splits and that `image` is an image."""
    kinds = {"string": "string", "int64": "int64"}
    features = [{"name": f.name, "dtype": kinds.get(str(f.type), "image")} for f in SCHEMA]
    splits = [{"split": f"round_{name}", "path": f"data/round_{name}.parquet"} for name in chain]
    total = sum(results[name]["pairs"]["pairs"] for name in chain)
    data = DatasetCardData(
        license=license_name,
        task_categories=["image-text-to-text"],
        pretty_name="RLAIF-V preference pairs",
        tags=["rlaif-v", "preference", "dpo"],
        size_categories=size_category(total),
        configs=[{"config_name": "default", "data_files": splits}],
        dataset_info={"features": features},
    )
    return f"""---
{data.to_yaml()}
---

# Preference pairs of an RLAIF-V run

{total} pairs in the columns of the public RLAIF-V dataset, and the two scores. Both answers of a pair were sampled from
one policy with identical settings (temperature {params.generate.temperature:g}); `chosen` has fewer claims that the
labeler `{model_name(params.labeler)}` rejects. A score is −(number of rejected claims). `origin_split` holds the id of
the instruction.

{pairs_table(chain, results)}
Each split is the data of one round: its answers come from the policy that the round started from.

## Limits

- Preferences are a model's judgement, not a person's; the labeler's errors are in them.
- Images and questions keep the terms of where they come from: check them before you share this dataset.
"""


def size_category(n: int) -> str:
    """The hub's name for a number of rows."""
    steps = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
    return next((name for limit, name in steps if n < limit), "1M<n<10M")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m rlaifv.export", description="Checkpoint and pairs with cards")
    parser.add_argument("--iteration", required=True, help="the round whose policy is published")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--params", type=Path, default=DEFAULT, help="the parameter file of the run")
    parser.add_argument("--license", help="of model and pairs, by the hub's name (default: none is claimed)")
    options = parser.parse_args(arguments)
    try:
        publish(load_params(options.params.resolve()), options.params, options.iteration, options.out, options.license)
    except (OSError, ValueError) as error:
        print(f"publish: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}/model and {options.out}/dataset are ready; read both README.md before an upload")
    return 0


if __name__ == "__main__":
    sys.exit(main())
