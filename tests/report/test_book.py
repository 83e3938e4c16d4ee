"""The site shows the last run as it is: every executed notebook, the docs and the report, without a warning."""

import nbformat
import pytest

from rlaifv import ROOT
from rlaifv.report import book


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A checkout in which a few stages have run."""
    root = tmp_path / "repository"
    root.mkdir()
    for name in ("docs", "plots", "README.md", *book.PAGES, "CITATION.cff", "LICENSE", "notebooks"):
        (root / name).symlink_to(ROOT / name)
    for place in ("10_prepare", "2/20_generate", "10/20_generate", "rloo-anchored/87_rloo"):
        path = root / "runs" / f"{place}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        cell = nbformat.v4.new_code_cell("1 + 1", outputs=[nbformat.v4.new_output("stream", text=f"said by {place}")])
        heading = nbformat.v4.new_markdown_cell(f"# {path.stem}")
        of_python = {"language_info": {"name": "python"}}
        nbformat.write(nbformat.v4.new_notebook(cells=[heading, cell], metadata=of_python), path)
    monkeypatch.setattr(book, "ROOT", root)
    monkeypatch.setattr(book, "SCRATCH", root / "scratch")
    return root


def test_the_site_has_every_executed_notebook_the_docs_and_the_report_and_gives_no_warning(repository, capfd):
    assert book.main() == 0, capfd.readouterr().err
    html = repository / "scratch" / "book" / "html"
    for place in ("10_prepare", "2/20_generate", "10/20_generate", "rloo-anchored/87_rloo"):
        assert f"said by {place}" in (html / "runs" / f"{place}.html").read_text()
    for name in ("docs/results", "CHANGELOG", "explore/00_walkthrough", "search", "report"):
        assert (html / f"{name}.html").is_file(), name
    first = (html / "index.html").read_text()
    assert 'href="report.html"' in first
    captions = [first.index(f">{text}<") for text in ("The run", "Iteration 2", "Iteration 10", "rloo-anchored")]
    assert captions == sorted(captions)


def test_a_page_that_gives_a_warning_fails_the_build(repository, capfd):
    (repository / "runs" / "20_broken.ipynb").write_text("no notebook")
    assert book.main() != 0


def test_without_a_run_one_line_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(book, "ROOT", tmp_path)
    assert book.main() == 1
    assert capsys.readouterr().err == "book: no executed notebook in runs/: run the pipeline first (make repro)\n"


def test_what_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.setattr(book, "NEEDED", ("no_such_module",))
    assert book.main() == 1 and "no_such_module not installed" in capsys.readouterr().err
