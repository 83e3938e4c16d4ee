"""What the pages state is what the code says: error messages, hours, names of parameters and files."""

import ast
import re
import tomllib
from functools import cache

import pytest

from rlaifv import ROOT
from rlaifv.params import DEFAULT, read_yaml

PAGES = [*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")]
HEADINGS = re.findall(r"^### (.*)", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
MESSAGES = [message for heading in HEADINGS for message in re.findall(r"`([^`]+)`", heading)]


@cache
def said() -> list[str]:
    """Every text of the code, what is filled in as "…"; of implicit concatenations the whole."""
    texts = []
    for path in (ROOT / "rlaifv").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
    return texts


@pytest.mark.parametrize("message", MESSAGES)
def test_an_error_that_is_explained_is_one_that_the_code_says(message):
    whole = re.compile(".*".join(map(re.escape, message.split("…"))))
    assert any(whole.search(text) for text in said()), message


def test_ten_errors_and_more_are_explained():
    assert len(MESSAGES) >= 10


def test_links_lead_to_files_that_are_there():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_parameters_that_troubleshooting_and_faq_name_exist():
    known = read_yaml(DEFAULT)
    for name in ("troubleshooting", "faq", "hardware"):
        text = (ROOT / f"docs/{name}.md").read_text()
        for section, key in re.findall(r"`([a-z_]+)\.([a-z_0-9]+)[:` =]", text):
            if section in known:
                assert key in known[section], f"{name}: {section}.{key}"


def test_the_citation_is_of_this_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = read_yaml(ROOT / "CITATION.cff")
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert citation["preferred-citation"]["url"].endswith("2405.17220")
