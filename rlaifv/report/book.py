"""The run as a site: README, docs, the executed notebooks of the last run and the report, with search and contents.

    python -m rlaifv.report.book            # or: make book

Nothing is executed and nothing fetched: what `runs/` and `plots/` hold is shown. The site is in scratch/book/html.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from rlaifv import ROOT
from rlaifv.store import SCRATCH

NEEDED = ("sphinx", "myst_nb", "furo")
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")

CONFIGURATION = """\
project = "RLAIF-V"
extensions = ["myst_nb"]
html_theme = "furo"
html_title = "RLAIF-V"
html_extra_path = ["extra"]
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
math_number_all = False
# README and docs are written for GitHub, where a page may have several titles; what papermill adds has no view
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type", "misc.highlighting_failure"]
"""


def write_source(root: Path, source: Path) -> None:
    """Put together what Sphinx reads, in an empty folder; FileNotFoundError where no stage has run yet."""
    notebooks = sorted((root / "runs").rglob("*.ipynb"))
    if not notebooks:
        raise FileNotFoundError("no executed notebook in runs/: run the pipeline first (make repro)")
    shutil.rmtree(source, ignore_errors=True)
    (source / "extra").mkdir(parents=True)
    shutil.copytree(root / "docs", source / "docs")
    shutil.copytree(root / "plots", source / "plots", ignore=shutil.ignore_patterns("*.html", "*.csv"))
    for name in (*PAGES, "CITATION.cff", "LICENSE"):
        shutil.copyfile(root / name, source / name)
    for notebook in notebooks:
        copy = source / notebook.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(notebook, copy)
    for notebook in (root / "notebooks" / "explore").glob("*.ipynb"):
        (source / "explore").mkdir(exist_ok=True)
        shutil.copyfile(notebook, source / "explore" / notebook.name)
    report = root / "plots" / "report.html"
    if report.is_file():
        shutil.copyfile(report, source / "extra" / "report.html")
    (source / "conf.py").write_text(CONFIGURATION)
    (source / "index.md").write_text("\n".join(index(root, report.is_file())) + "\n")


def index(root: Path, report: bool) -> Iterator[str]:
    """The lines of the first page: the README, a link to the report, and the contents."""
    yield (root / "README.md").read_text()
    if report:
        yield '## The last run\n\n<p><a href="report.html">Its report</a>; at the side, every stage as it ran.</p>\n'
    yield from contents("Reading", [f"docs/{path.stem}" for path in sorted((root / "docs").glob("*.md"))])
    runs = root / "runs"
    yield from contents("The run", stages(runs))
    for folder in sorted((path for path in runs.iterdir() if any(path.glob("*.ipynb"))), key=in_order):
        name = folder.name
        yield from contents(f"Iteration {name}" if name.isdecimal() else name, stages(folder, f"{name}/"))
    explore = sorted((root / "notebooks" / "explore").glob("*.ipynb"))
    yield from contents("To explore, not executed", [f"explore/{path.stem}" for path in explore])
    yield from contents("The project", [Path(name).stem for name in PAGES])


def in_order(folder: Path) -> tuple[bool, int, str]:
    """Iterations by number first, then experiments by name."""
    return not folder.name.isdecimal(), int(folder.name) if folder.name.isdecimal() else 0, folder.name


def stages(folder: Path, below: str = "") -> list[str]:
    """The entries of a folder's notebooks, named after their stages."""
    paths = sorted(folder.glob("*.ipynb"))
    return [f"{re.sub(r'^[0-9]+_', '', path.stem).replace('_', ' ')} <runs/{below}{path.stem}>" for path in paths]


def contents(caption: str, entries: list[str]) -> Iterator[str]:
    """A table of contents, which stands at the side of every page."""
    if entries:
        yield "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *entries, "```", ""])


def main() -> int:
    """The command; returns its exit code, which is not 0 for a single warning."""
    if missing := [name for name in NEEDED if not find_spec(name)]:
        print(f"book: {', '.join(missing)} not installed: pip install -e '.[dev]' (make env)", file=sys.stderr)
        return 1
    folder = SCRATCH / "book"
    try:
        write_source(ROOT, folder / "source")
    except OSError as error:
        print(f"book: {error}", file=sys.stderr)
        return 1
    shutil.rmtree(folder / "html", ignore_errors=True)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    done = subprocess.run([*command, str(folder / "source"), str(folder / "html")]).returncode
    if not done:
        print(f"book: {(folder / 'html' / 'index.html').relative_to(ROOT)}")
    return done


if __name__ == "__main__":
    sys.exit(main())
