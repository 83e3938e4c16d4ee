"""Fixtures that several test files share. Nothing here or in any test needs a network."""

import os
from contextlib import ExitStack
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers that each take all cores slow one another tenfold
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
from openai_server import running

from rlaifv import ROOT

hypothesis.settings.register_profile("busy", deadline=None)  # how long an example takes is the machine's affair
hypothesis.settings.load_profile("busy")
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photographs, scored answers and benchmark files that lies beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: real photographs and published answers are not part of the repository")
    return SHARED


@pytest.fixture(scope="session")
def fetched():
    """`fetched("golden/…")`: a file that `python -m rlaifv.benchmarks.fetch golden` gets, from the folder beside the
    checkout or from where that command puts it."""

    def find(path: str) -> Path:
        places = [SHARED / path, SHARED / "benchmarks" / path, SHARED / "benchmarks" / Path(path).name]
        there = next((place for place in [*places, ROOT / "data/benchmarks" / path] if place.exists()), None)
        if there is None:
            pytest.skip(f"{path} is absent: `python -m rlaifv.benchmarks.fetch {path.split('/')[0]}` gets it")
        return there

    return find


@pytest.fixture
def start_server():
    """Start a server of the tests, `start_server("judge_server.py", HABIT, …)`; returns its address."""
    with ExitStack() as stack:
        yield lambda script, *habit: stack.enter_context(running(script, *habit))


def pytest_collection_modifyitems(items):
    """The files that take minutes come first: a worker that met one of them last would end it alone."""
    first = ("test_pipeline.py", "test_public_dataset.py", "test_sharded.py", "test_real_photographs.py")
    first += ("test_dev_scores.py", "test_job.py")
    items.sort(key=lambda item: first.index(item.path.name) if item.path.name in first else len(first))
