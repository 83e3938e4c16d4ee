"""A path means a folder, a pointer or a repository of the hub, which is fetched once and then read offline.

The hub is a server on loopback that the real client talks to. The client reads its settings when it is imported, so
every look at the hub is a process of its own.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
from hub import Hub, settings_for

from rlaifv import ROOT
from rlaifv.records import ModelRecord
from rlaifv.vlm import checkpoint
from rlaifv.vlm.checkpoint import fingerprint_checkpoint, resolve_checkpoint, write_pointer

POLICY = ROOT / "models/tiny/policy"
REPO = "someone/tiny-policy"
WEIGHTS = "model.safetensors"

LOOK = """
import json, sys, traceback
from rlaifv.vlm.checkpoint import fingerprint_checkpoint, resolve_checkpoint
for wanted in json.loads(sys.argv[1]):
    try:
        print(json.dumps({"folder": str(resolve_checkpoint(*wanted)), "fingerprint": fingerprint_checkpoint(*wanted)}))
    except FileNotFoundError as error:
        print(json.dumps({"problem": str(error), "traceback": traceback.format_exc()}))
"""
LOAD = """
import json, sys
from rlaifv.vlm.loading import load_vlm
vlm = load_vlm(sys.argv[1], device="cpu")
print(json.dumps([vlm.name, vlm.model.name_or_path, vlm.fingerprint, vlm.sees_images]))
"""


class Found(NamedTuple):
    """What a path turned out to mean."""

    folder: Path
    fingerprint: str


@dataclass
class Machine:
    """A machine whose cache of the hub is empty at first; `settings` are environment variables of one process."""

    cache: Path
    endpoint: str

    def run(self, script: str, argument: str, **settings: str) -> list:
        """The lines of JSON that `script` prints."""
        environment = settings_for(self.endpoint, self.cache) | settings
        command = [sys.executable, "-c", script, argument]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def look(self, path: str, revision: str | None = None, **settings: str) -> Found:
        """Resolve a path and take its fingerprint."""
        (report,) = self.run(LOOK, json.dumps([[path, revision]]), **settings)
        assert "problem" not in report, report
        return Found(Path(report["folder"]), report["fingerprint"])

    def problems(self, *wanted: tuple[str, str | None], **settings: str) -> list[str]:
        """Why each of these paths and revisions is refused: one line that names the path, and no error behind it."""
        reports = self.run(LOOK, json.dumps(wanted), **settings)
        for (path, _), report in zip(wanted, reports, strict=True):
            assert path in report["problem"] and len(report["problem"].splitlines()) == 1, report
            assert report["traceback"].count("Traceback (most recent call last)") == 1, report
        return [report["problem"] for report in reports]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture
def machine(hub, tmp_path) -> Machine:
    return Machine(tmp_path / "cache", hub.endpoint)


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the tiny policy, to be changed."""
    return Path(shutil.copytree(POLICY, tmp_path / "copy"))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def change(file: Path) -> None:
    """Change the last byte."""
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_a_model_of_the_hub_loads_from_its_snapshot(hub, machine):
    commit = hub.push(REPO, POLICY)
    ((name, folder, fingerprint, sees_images),) = machine.run(LOAD, REPO)
    assert (name, Path(folder).name, sees_images) == (REPO, commit, True)
    assert contents(Path(folder)) == contents(POLICY)
    assert all(REPO in request.path or request.path.startswith("/lfs/") for request in hub.requests)
    assert len(fingerprint) == 16


def test_a_pinned_revision_keeps_its_bytes_when_main_moves(hub, machine, copy):
    first = hub.push(REPO, copy)
    before, old_bytes = machine.look(REPO), contents(copy)
    change(copy / WEIGHTS)
    second = hub.push(REPO, copy)
    after, pinned = machine.look(REPO), machine.look(REPO, first)
    assert (before.folder.name, after.folder.name, pinned.folder.name) == (first, second, first)
    assert contents(pinned.folder) == old_bytes and contents(after.folder) == contents(copy)
    assert pinned.fingerprint == before.fingerprint != after.fingerprint


def test_weights_that_transformers_does_not_read_stay_on_the_hub(hub, machine, copy):
    copies = ["consolidated.safetensors", "consolidated-00001-of-2.safetensors", "original/params.json", "model.bin"]
    (copy / "original").mkdir()
    for name in copies:
        (copy / name).write_bytes(b"the same weights once more")
    hub.push(REPO, copy)
    assert contents(machine.look(REPO).folder) == contents(POLICY)


def test_a_filled_cache_needs_no_request_and_its_weights_are_not_read_for_the_fingerprint(hub, machine):
    hub.push(REPO, POLICY)
    filled, requests = machine.look(REPO), len(hub.requests)
    assert requests > 0
    change(filled.folder / WEIGHTS)
    assert machine.look(REPO, HF_HUB_OFFLINE="1") == filled
    assert len(hub.requests) == requests


def test_what_the_hub_refuses_is_said_in_one_line(hub, machine):
    hub.push(REPO, POLICY)
    hub.push("someone/gated", POLICY)
    hub.gate("someone/gated", "a reader's token")
    wanted = [(REPO, "v9"), (REPO, "0" * 40), ("someone/gated", None), ("someone/unknown", None), ("some one/x", None)]
    branch, commit, gated, unknown, misspelt = machine.problems(*wanted)
    assert "no revision 'v9'" in branch and f"no revision {'0' * 40!r}" in commit
    assert "its owner must let you in" in gated
    assert "no such repository" in unknown
    assert "Repo id" in misspelt


def test_a_gated_model_opens_to_a_reader_and_not_to_another_account(hub, machine):
    hub.push(REPO, POLICY)
    hub.gate(REPO, "reader")
    (problem,) = machine.problems((REPO, None), HF_TOKEN="stranger")
    assert "its owner must let you in" in problem
    assert contents(machine.look(REPO, HF_TOKEN="reader").folder) == contents(POLICY)


def test_an_empty_cache_offline_is_said_in_one_line(hub, machine):
    hub.push(REPO, POLICY)
    branch, commit = machine.problems((REPO, None), (REPO, "0" * 40), HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in branch and "HF_HUB_OFFLINE" in commit
    assert hub.requests == []


def test_a_hub_that_cannot_be_reached_is_said_in_one_line(machine):
    (problem,) = machine.problems((REPO, None), HF_ENDPOINT="http://127.0.0.1:1")
    assert "refused" in problem


def test_a_connection_that_ends_early_is_taken_up_where_it_ended(hub, machine, copy):
    chunk = 10 * 2**20  # the client keeps whole chunks of this size
    (copy / WEIGHTS).write_bytes(random.Random(0).randbytes(chunk + 2_000_000))
    hub.push(REPO, copy)
    hub.cut(WEIGHTS, after=chunk + 1_000_000)
    assert contents(machine.look(REPO).folder) == contents(copy)
    assert [request.range for request in hub.downloads(WEIGHTS)] == [None, f"bytes={chunk}-"]


def test_an_interrupted_download_is_no_checkpoint_and_the_next_call_fetches_what_is_missing(hub, machine):
    hub.push(REPO, POLICY)
    hub.cut(WEIGHTS, after=1_000_000, reset=True)
    (broken,) = machine.problems((REPO, None))
    assert "reset" in broken
    (half,) = machine.problems((REPO, None), HF_HUB_OFFLINE="1")
    assert "incomplete" in half and WEIGHTS in half
    assert contents(machine.look(REPO).folder) == contents(POLICY)
    assert {name: len(hub.downloads(name)) for name in contents(POLICY)} == {
        name: 2 if name == WEIGHTS else 1 for name in contents(POLICY)
    }


def test_a_pointer_to_the_hub_leads_to_its_revision(hub, machine, copy, tmp_path):
    first, old_bytes = hub.push(REPO, copy), contents(copy)
    change(copy / WEIGHTS)
    hub.push(REPO, copy)
    write_pointer(tmp_path / "pointer", ModelRecord(REPO, first, "float32", "cpu", "0"))
    folder = machine.look(str(tmp_path / "pointer")).folder
    assert (folder.name, contents(folder)) == (first, old_bytes)


def test_a_pointer_leads_to_another_checkpoint(tmp_path):
    write_pointer(tmp_path / "first", ModelRecord("models/tiny/policy", None, "float32", "cpu", "0"))
    write_pointer(tmp_path / "second", ModelRecord(str(tmp_path / "first"), None, "float32", "cpu", "0"))
    assert resolve_checkpoint(str(tmp_path / "second")) == POLICY
    assert fingerprint_checkpoint(str(tmp_path / "second")) == fingerprint_checkpoint("models/tiny/policy")


def test_a_folder_is_a_checkpoint_by_its_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is a folder but holds no config\.json: it is not a checkpoint$"):
        resolve_checkpoint(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    assert resolve_checkpoint(str(tmp_path)) == tmp_path
    assert resolve_checkpoint("models/tiny/policy") == POLICY


@pytest.mark.parametrize("path", ["models/absent", "/absent/folder", "./absent", "absent", "a/b/c"])
def test_a_path_to_nothing_is_not_asked_of_the_hub(path, monkeypatch):
    monkeypatch.setattr("rlaifv.vlm.checkpoint.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match=f"^no checkpoint at '{path}': give a folder or a hub id"):
        resolve_checkpoint(path)


@pytest.mark.parametrize("name", [file.name for file in sorted(POLICY.iterdir())])
def test_a_local_fingerprint_changes_with_any_byte(name, copy):
    before = fingerprint_checkpoint(str(POLICY))
    assert fingerprint_checkpoint(str(copy)) == before
    change(copy / name)
    assert fingerprint_checkpoint(str(copy)) != before


def test_a_local_fingerprint_changes_with_a_file_s_name_and_presence(copy):
    before = fingerprint_checkpoint(str(copy))
    (copy / "chat_template.jinja").rename(copy / "chat_templates.jinja")
    renamed = fingerprint_checkpoint(str(copy))
    (copy / "chat_templates.jinja").unlink()
    assert len({before, renamed, fingerprint_checkpoint(str(copy))}) == 3


@pytest.fixture
def large(copy, tmp_path, monkeypatch) -> Path:
    """A checkpoint that counts as large, written a minute ago; `checkpoint.read_files` tells how often it was read."""
    monkeypatch.setattr(checkpoint, "LARGE", 1)
    monkeypatch.setattr(checkpoint, "KNOWN", tmp_path / "known")
    for file in copy.iterdir():
        os.utime(file, ns=(time.time_ns() - 60 * 10**9,) * 2)
    return copy


def count_reads(monkeypatch) -> list:
    reads, original = [], checkpoint.read_files
    monkeypatch.setattr(checkpoint, "read_files", lambda *args: reads.append(1) or original(*args))
    return reads


def test_a_large_checkpoint_is_read_once_also_when_it_is_linked_or_moved(large, tmp_path, monkeypatch):
    reads = count_reads(monkeypatch)
    first = fingerprint_checkpoint(str(large))
    shutil.copytree(large, tmp_path / "linked", copy_function=os.link)
    large.rename(tmp_path / "moved")
    again = [fingerprint_checkpoint(str(tmp_path / name)) for name in ("moved", "linked")]
    assert again == [first, first] == [fingerprint_checkpoint(str(POLICY))] * 2 and len(reads) == 2


@pytest.mark.parametrize("change_it", ["byte", "size", "time", "name", "replaced with its times"])
def test_a_large_checkpoint_that_changed_is_read_again(large, monkeypatch, change_it):
    reads, weights = count_reads(monkeypatch), large / WEIGHTS
    first, stat = fingerprint_checkpoint(str(large)), weights.stat()
    if change_it == "byte":
        change(weights)
    elif change_it == "size":
        weights.write_bytes(weights.read_bytes() + b"x")
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change_it == "time":
        os.utime(weights)
    elif change_it == "name":
        weights.rename(large / "weights.safetensors")
    else:  # by another file of equal size and age, as an archive would unpack it
        changed = large.parent / "other"
        changed.write_bytes(weights.read_bytes()[:-1] + b"x")
        os.utime(changed, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        changed.replace(weights)
    assert (fingerprint_checkpoint(str(large)) == first) is (change_it == "time") and len(reads) == 2


def test_what_was_written_just_now_is_not_remembered(large, monkeypatch):
    reads = count_reads(monkeypatch)
    os.utime(large / WEIGHTS)
    first = fingerprint_checkpoint(str(large))
    assert fingerprint_checkpoint(str(large)) == first and len(reads) == 2
