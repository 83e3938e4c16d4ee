"""Guards that can be taken out, to see that the attack notices: nothing in rlaifv/ knows of it.

A guard is taken out as soon as its module has been imported, in this process and, by `faults/sitecustomize.py`, in
every process that a case starts. This file imports nothing heavy: every Python process under attack reads it.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace


def after_import(name: str, change: Callable[[ModuleType], None]) -> None:
    """Change a module when it has been imported, before anyone else can take a name from it."""

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, wanted, path, target=None):
            if wanted != name:
                return None
            sys.meta_path.remove(self)
            spec = importlib.machinery.PathFinder.find_spec(wanted, path, target)
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                change(module)

            spec.loader.exec_module = exec_module
            return spec

    if name in sys.modules:
        change(sys.modules[name])
    else:
        sys.meta_path.insert(0, Finder())


@dataclass(frozen=True)
class Guard:
    """What it keeps, how each module is changed to be without it, and which cases must notice (as in `--only`)."""

    keeps: str
    changes: dict[str, Callable[[ModuleType], None]]
    noticed_by: str

    def take_out(self) -> None:
        for module, change in self.changes.items():
            after_import(module, change)


def put(**values) -> Callable[[ModuleType], None]:
    """Other values for a module's names."""
    return lambda module: module.__dict__.update(values)


def html_as_it_is(module: ModuleType) -> None:
    module.ENVIRONMENT.autoescape, module.ENVIRONMENT.finalize = False, None


def nan_is_a_number(module: ModuleType) -> None:
    written = module.to_json
    module.to_json = lambda row, indent=None: written(without_nan(row), indent)


def without_nan(row):
    """A record with 1.0 for every number that is none."""
    import dataclasses
    import math

    content = dataclasses.asdict(row) if dataclasses.is_dataclass(row) else row
    if isinstance(content, dict):
        return {
            key: 1.0 if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in content.items()
        }
    return content


def dead_kernels_are_unknown(_: ModuleType) -> None:
    sys.modules["nbclient.exceptions"].DeadKernelError = type("Never", (Exception,), {})


GUARDS = {
    "checksums": Guard(
        "a chunk of scratch that was changed is made again",
        {"rlaifv.store": put(_checksum=lambda body: "unchecked")},
        "tests/test_store.py",
    ),
    "image_root": Guard(
        "no image outside prepare.image_root is read",
        {"rlaifv.steps.prepare": put(inside=lambda folder, name: folder / name)},
        "tests/steps/test_prepare.py",
    ),
    "finite": Guard(
        "what is computed from NaN is no judgement",
        {
            "rlaifv.records": nan_is_a_number,
            "rlaifv.steps.feedback": put(math=SimpleNamespace(isfinite=lambda number: True)),
        },
        "tests/steps/test_feedback.py",
    ),
    "dead_kernel": Guard(
        "a kernel that was killed is one line",
        {"papermill": dead_kernels_are_unknown},
        "tests/test_run.py",
    ),
    "escape": Guard(
        "texts are escaped in pages",
        {"rlaifv.report.render": html_as_it_is},
        "tests/report",
    ),
    "whole_parts": Guard(
        "what a training run left is checked before it is published or gone on from",
        {"rlaifv.training.run_folder": put(broken=lambda run, parts: None)},
        "corrupt training state",
    ),
}
