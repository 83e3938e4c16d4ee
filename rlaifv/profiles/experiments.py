"""Experiments: ablations of the method and comparisons of iterations, each one `dvc exp run` with a few other values.

    python -m rlaifv.profiles.experiments ablations     # or: rounds

runs what experiments/experiments.yaml lists under that name, each in a temporary copy of the repository (the workspace
stays as it is; stages that are equal come from DVC's run cache), and collects what came out in metrics/NAME.json,
plots/NAME.csv and plots/NAME.png. An experiment whose inputs have not changed since is not run again; a failed one does
not stop the others.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlaifv import ROOT
from rlaifv.fingerprint import digest, digest_files, stages
from rlaifv.params import (
    DEFAULT,
    NAMED,
    Params,
    ParamsError,
    Section,
    build,
    check_params,
    load_params,
    merge,
    read_content,
    read_yaml,
)
from rlaifv.records import read_jsonl, to_json, write_atomic
from rlaifv.results import FILES

# what takes seconds to import is imported where it is used: --help and a wrong name of a group need none of it

LIST = ROOT / "experiments" / "experiments.yaml"
STAGE = "experiments/dvc.yaml:experiment"
OUTCOME = "metrics/experiment.json"
NOT_RUN = ("tiny_checkpoints", "report", "self_feedback")
"""The stages of both dvc.yaml that an experiment does not run."""


@dataclass(frozen=True)
class Experiment:
    """One `dvc exp run`: its overlay as DVC's `overrides`, the parameters that it makes of params.yaml, and the
    `digest_sources` of the repository that it runs in."""

    name: str
    asks: str
    overrides: tuple[str, ...]
    params: Params
    sources: str

    @functools.cached_property
    def key(self) -> str:
        """16 hex digits of all that determines the outcome: parameters, checkpoints, and the files of the repository
        that the pipeline's stages depend on. What the report alone reads is left out."""
        from rlaifv.steps.models import describe_models

        read = {key: value for key, value in vars(self.params).items() if key not in ("report", "self_feedback")}
        marks = {role: model.fingerprint for role, model in describe_models(self.params, self.params.server).items()}
        return digest([read, marks, self.sources])

    @property
    def run_name(self) -> str:
        """What DVC calls it; the key is in it, so that other inputs make another experiment."""
        return f"{self.name}-{self.key[:8]}"


@dataclass(frozen=True)
class Group:
    """Experiments that are shown together; each is tested against the one called `control`."""

    name: str
    control: str
    experiments: tuple[Experiment, ...]


class Listed(Section):
    """A group as experiments.yaml lists it."""

    control: str
    common: dict[str, Any]
    experiments: dict[str, dict[str, Any]]


def load_groups(path: Path = LIST) -> dict[str, Group]:
    """Read the list and compose every experiment's parameters.

    Raises ParamsError that names the experiment when it sets an unknown parameter or gives one an impossible value.
    """
    base, code = read_content(DEFAULT), digest_sources()  # once: it reads every source and checkpoint of the repository
    groups = build(dict[str, Listed], read_yaml(path), path.name)
    return {name: _group(name, listed, path.name, base, code) for name, listed in groups.items()}


def _group(name: str, listed: Listed, file: str, base: Mapping, code: str) -> Group:
    made = []
    for key, row in listed.experiments.items():
        where = f"{file}: {name}.{key}"
        if set(row) not in ({"asks", "set"}, {"asks", "profile"}):
            raise ParamsError(f"{where}: expected the keys asks and set, or asks and profile, got {list(row)}")
        profile = ROOT / "params" / f"{row.get('profile', 'default')}.yaml"
        if not profile.is_file():
            raise ParamsError(f"{where}.profile: no profile {row['profile']!r} in params/")
        overlay = merge(listed.common, row["set"] if "set" in row else read_yaml(profile))
        params = check_params(merge(base, overlay), where)
        made.append(Experiment(key, row["asks"], tuple(overrides(overlay, where)), params, code))
    if listed.control not in listed.experiments:
        raise ParamsError(f"{file}: {name}.control: no experiment {listed.control!r} in this group")
    return Group(name, listed.control, tuple(made))


def overrides(overlay: Mapping[str, Any], where: str, path: str = "") -> Iterator[str]:
    """An overlay as `dvc exp run --set-param` takes it: in Hydra's syntax, in which ~ removes a key, + adds one, and
    ++ adds or sets one."""
    for key, value in overlay.items():
        if key in NAMED:
            yield f"~{key}"
            yield from overrides(value, where, f"+{key}.") if value else [f"+{key}={{}}"]
        elif isinstance(value, Mapping):
            added = "++" if key in ("processor", "template") else ""  # sections without keys of their own
            yield from overrides(value, where, f"{added}{path}{key}.")
        else:
            text = json.dumps(value, ensure_ascii=False)
            if "\\" in text or "$" in text:
                raise ParamsError(f"{where}: {path}{key}: DVC cannot set text with quotes, \\ or $: {value!r}")
            yield f"{path}{key}={text}"


def digest_sources() -> str:
    """16 hex digits of the files of the repository that the stages of an experiment depend on, and of what `dvc add`
    tracks below data/."""
    run = [stage for name, stage in stages().items() if name not in NOT_RUN]
    deps = {dep for stage in run for dep in stage["deps"] if "$" not in dep and not dep.startswith("data/")}
    return digest_files(*(ROOT / dep for dep in sorted(deps)), *sorted((ROOT / "data").rglob("*.dvc")))


def still_valid(group: Group, results: Mapping) -> tuple[dict[str, dict], dict[str, dict]]:
    """By name, those rows and tests of `results` whose inputs are those of today."""
    keys = {e.name: e.key for e in group.experiments}
    rows = {row["name"]: row for row in results["experiments"] if keys.get(row["name"]) == row["key"]}
    tests = results["tests"].items()
    return rows, {name: test for name, test in tests if test["keys"] == [keys[group.control], keys.get(name)]}


def needed(group: Group, results: Mapping) -> list[Experiment]:
    """The experiments of which more is needed than `results` hold: an outcome for the inputs of today, or the answers
    for a test against the control."""
    rows, tests = still_valid(group, results)
    names = {e.name for e in group.experiments}
    untested = names - tests.keys() - {group.control}
    wanted = (names - rows.keys()) | untested | ({group.control} if untested else set())
    return [e for e in group.experiments if e.name in wanted]


def find_revision(run_name: str) -> str | None:
    """The commit in which DVC keeps a finished experiment."""
    command = ["git", "for-each-ref", "--format=%(objectname)", f"refs/exps/*/*/{run_name}"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return found[0] if found else None


def run_experiment(experiment: Experiment) -> bool:
    """Run it in a temporary copy of the repository; its output is shown as it comes. Returns whether it succeeded."""
    overrides = [f"--set-param={override}" for override in experiment.overrides]
    command = [sys.executable, "-m", "dvc", "exp", "run", "--temp", "--name", experiment.run_name, *overrides, STAGE]
    # stages call `python`: let that be this one, whether or not its environment is activated
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PATH": path}).returncode == 0


def fetch(revision: str, path: str, folder: Path) -> Path:
    """Copy a file or folder of a finished experiment to `folder`, from git or from DVC's cache."""
    from dvc.api import DVCFileSystem

    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    DVCFileSystem(str(ROOT), rev=revision).get(path, str(target), recursive=True)
    return target


def outcome_of(experiment: Experiment, revision: str) -> dict:
    """The row of a finished experiment: what it was, and what its `experiment` stage measured."""
    with tempfile.TemporaryDirectory() as folder:
        outcome = json.loads(fetch(revision, OUTCOME, Path(folder)).read_text())
    named = {"name": experiment.name, "asks": experiment.asks, "overrides": list(experiment.overrides)}
    return {**named, "key": experiment.key, **outcome}


def compare(control: Experiment, other: Experiment) -> dict:
    """`paired_test` of the last iterations' policies on the same test rows; `base` in it is the control."""
    from rlaifv.evaluation.hallucination import load_split, paired_test

    if control.params.prepare.test != other.params.prepare.test:
        raise ValueError(f"{other.name} and {control.name} have other test sets: they cannot be compared row by row")
    answers = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for experiment in (control, other):
            last = f"data/results/{max(experiment.params.iterations, key=int)}/{FILES['answers']}"
            answers.append(read_jsonl(fetch(find_revision(experiment.run_name), last, folder / experiment.name)))
        prepared = fetch(find_revision(control.run_name), "data/prepared", folder)
        test = load_split("test", prepared, folder)
    return {"keys": [control.key, other.key], "rates": paired_test(*answers, test)}


def collect(group: Group, results: Mapping) -> dict:
    """Results as far as they go: old rows whose inputs are those of today, and all finished experiments."""
    rows, tests = still_valid(group, results)
    revisions = {e.name: find_revision(e.run_name) for e in needed(group, results)}
    finished = {e.name: e for e in group.experiments if revisions.get(e.name)}
    for name in finished.keys() - rows.keys():
        rows[name] = outcome_of(finished[name], revisions[name])
    if control := finished.pop(group.control, None):
        tests |= {name: compare(control, other) for name, other in finished.items()}
    names = [e.name for e in group.experiments if e.name in rows]
    return {"experiments": [rows[n] for n in names], "tests": {n: tests[n] for n in names if n in tests}}


def write_results(group: Group, results: Mapping, base: Params, failed: Sequence[str]) -> dict:
    """Write metrics/GROUP.json and, of what there is, plots/GROUP.csv and plots/GROUP.png."""
    import pandas as pd

    from rlaifv.evaluation.outcome import describe_inputs, flat_rows
    from rlaifv.report import plots
    from rlaifv.steps.models import describe_models

    inputs = describe_inputs(base, describe_models(base, base.server))
    whole = {"group": group.name, "control": group.control, **inputs, **results, "failed": list(failed)}
    write_atomic(ROOT / "metrics" / f"{group.name}.json", to_json(whole, indent=2) + "\n")
    if whole["experiments"]:
        table = pd.DataFrame(flat_rows(whole["experiments"])).to_csv(index=False, lineterminator="\n")
        write_atomic(ROOT / "plots" / f"{group.name}.csv", table)
        plots.save(plots.EXPERIMENTS[group.name](whole), ROOT / "plots" / f"{group.name}.png")
    return whole


def run_group(group: Group) -> list[str]:
    """Run what is needed, write results after each; returns the names of those that failed."""
    from rlaifv.evaluation.outcome import read_results

    path, failed = ROOT / "metrics" / f"{group.name}.json", []
    results, base = read_results(path), load_params()
    todo = [e for e in needed(group, results) if not find_revision(e.run_name)]
    for experiment in group.experiments:
        if experiment not in todo:
            print(f"{experiment.name}: done for these inputs", flush=True)
    for number, experiment in enumerate(todo, start=1):
        print(f"{experiment.name} ({number} of {len(todo)}): {experiment.asks}", flush=True)
        if not run_experiment(experiment):
            failed.append(experiment.name)
            print(f"{experiment.name}: failed, the reason is above; going on", file=sys.stderr, flush=True)
        results = write_results(group, collect(group, results), base, failed)
    if not todo:
        write_results(group, collect(group, results), base, failed)
    return failed


def main(arguments: list[str] | None = None) -> None:
    """The command; a wrong list and a failed experiment end it with one line and exit code 1."""
    parser = argparse.ArgumentParser(
        prog="python -m rlaifv.profiles.experiments", description="Run a group of experiments"
    )
    parser.add_argument("group", help="a group of experiments/experiments.yaml")
    options = parser.parse_args(arguments)
    try:
        groups = load_groups()
        if load_params().prepare.test.instances is None:
            raise ParamsError("experiments are compared by annotations: prepare.test.instances is null in params.yaml")
        if options.group not in groups:
            raise ParamsError(f"no group {options.group!r} in {LIST.name}; there are: {', '.join(groups)}")
        failed = run_group(groups[options.group])
    except (OSError, ValueError) as error:
        sys.exit(f"experiments: {error}")
    print(f"numbers: metrics/{options.group}.json, figure: plots/{options.group}.png; in the report after `make repro`")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the same command runs them again")


if __name__ == "__main__":
    main()
