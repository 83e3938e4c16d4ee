"""Rehearse every shipped profile against a hub on loopback, from an empty cache and then offline: a table of minutes.

python tests/rehearse_all.py [PROFILE ...]     # or: make rehearsals
"""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from hub import Hub, settings_for
from lookalikes import push_models, write_converted

from rlaifv import ROOT

PROFILES = sorted(path.stem for path in (ROOT / "params").glob("*.yaml"))


def rehearse(name: str, environment: dict[str, str]) -> tuple[int, float, float]:
    """Exit code, minutes of the clock and minutes of the processors."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    code = subprocess.run(
        [sys.executable, "-m", "rlaifv.profiles.rehearsal", name], cwd=ROOT, env=environment
    ).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return code, (time.monotonic() - started) / 60, busy / 60


def main(names: list[str]) -> int:
    rows = []
    with tempfile.TemporaryDirectory() as folder, Hub() as hub:
        for name in names:
            push_models(hub, name, Path(folder) / "repositories")
            written = write_converted(name, ROOT)
            online = settings_for(hub.endpoint, Path(folder) / "cache") | {"PYTHONPATH": os.pathsep.join([str(ROOT)])}
            for how, environment in (("empty cache", online), ("offline", online | {"HF_HUB_OFFLINE": "1"})):
                rows.append((name, how, *rehearse(name, environment)))
            for path in written:
                shutil.rmtree(path)
    print(f"\n{'profile':22} {'hub':12} {'ended':>6} {'minutes':>8} {'CPU minutes':>12}")
    for name, how, code, minutes, busy in rows:
        print(f"{name:22} {how:12} {'no' if code else 'yes':>6} {minutes:8.1f} {busy:12.1f}")
    return int(any(row[2] for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or PROFILES))
