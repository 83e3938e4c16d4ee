"""Profiles: write params.yaml, whole and checked, from a profile in params/ (`make profile NAME=llava15-7b`).

    python -m rlaifv.profiles.choose NAME [--force]

A profile holds only what differs from params/default.yaml; params.yaml is that default, comments and all, with the
profile's values set. A params.yaml that somebody has edited is not overwritten.
"""

import argparse
import io
import re
import sys
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.scalarstring import FoldedScalarString

from rlaifv import ROOT
from rlaifv.params import NAMED, ParamsError, load_params, read_content
from rlaifv.records import write_atomic

FIRST_LINE = "# Profile: {}. Change values below, or `make profile NAME=...` for another of params/."


class Representer(RoundTripRepresenter):
    """Writes null, which ruamel leaves out."""


Representer.add_representer(type(None), lambda self, _: self.represent_scalar("tag:yaml.org,2002:null", "null"))


def render(name: str, folder: Path = ROOT / "params") -> str:
    """The text of the whole parameter file that a profile gives; its comments are the profile's first ones, then the
    default's. Raises ParamsError for an unknown or wrong profile."""
    known = sorted(file.stem for file in folder.glob("*.yaml"))
    if name not in known:
        raise ParamsError(f"no profile {name!r}; there are: {', '.join(known)}")
    path = folder / f"{name}.yaml"
    load_params(path)
    profile, default = path.read_text(), (folder / "default.yaml").read_text()
    opening = re.compile(r"(#.*\n)*")
    body = default[opening.match(default).end() :].lstrip("\n")
    if name != "default":
        body = _with_values(body, profile)
    text = f"{FIRST_LINE.format(name)}\n{opening.match(profile).group()}\n{body}"
    if YAML(typ="safe", pure=True).load(text) != read_content(path):
        raise ParamsError(f"{path.name}: its values cannot be set in default.yaml; write it in the style of the others")
    return text


def _with_values(default: str, profile: str) -> str:
    """The default's text with a profile's values."""
    yaml = YAML()
    yaml.Representer, yaml.preserve_quotes, yaml.width = Representer, True, 118
    whole, stream = yaml.load(default), io.StringIO()
    _set(whole, yaml.load(profile) or {})
    yaml.dump(whole, stream)
    text = stream.getvalue()
    for key in NAMED:  # sections of names are replaced as text: their comments come along
        section = re.compile(rf"^{key}:.*\n(\n* .*\n)*", re.MULTILINE)
        if found := section.search(profile):
            text = section.sub(lambda _, found=found: found.group(), text)
    return text


def _set(whole: dict, overlay: dict) -> None:
    """What params.merge does, in place: the comments stay."""
    for key, value in overlay.items():
        if isinstance(value, dict) and isinstance(whole.get(key), dict) and key not in NAMED:
            _set(whole[key], value)
        elif key not in NAMED:
            whole[key] = value
            if isinstance(value, FoldedScalarString):  # nothing can stand behind a text of several lines
                whole.ca.items.pop(key, None)


def write_profile(name: str, target: Path = ROOT / "params.yaml", force: bool = False) -> None:
    """Write a profile to `target`; raises ParamsError when somebody has edited that file, unless forced."""
    text = render(name, target.parent / "params")
    if target.is_file() and not force and not is_unedited(target.read_text(), target.parent / "params"):
        raise ParamsError(
            f"{target.name} was edited, or its profile has changed since: keep the edits as a profile of your own "
            f"(params/NAME.yaml, only what differs), then overwrite it: make profile NAME={name} FORCE=1"
        )
    write_atomic(target, text)


def is_unedited(text: str, folder: Path) -> bool:
    """Whether the text of a params.yaml is what the profile that it names gives today."""
    named = re.match(FIRST_LINE.partition("{}")[0] + r"([\w-]+)\.", text)
    try:
        return named is not None and text == render(named.group(1), folder)
    except ParamsError:  # the profile is gone
        return False


def main(arguments: list[str] | None = None) -> None:
    """The command; a wrong profile and an edited params.yaml end it with one line and exit code 1."""
    parser = argparse.ArgumentParser(
        prog="python -m rlaifv.profiles.choose", description="Write params.yaml from a profile"
    )
    parser.add_argument("name", nargs="?", default="", help="a file of params/, without .yaml")
    parser.add_argument("--force", action="store_true", help="overwrite a params.yaml that was edited")
    options = parser.parse_args(arguments)
    try:
        write_profile(options.name, force=options.force)
    except (ParamsError, OSError) as error:
        sys.exit(f"profile: {error}")
    print(f"params.yaml is now the profile {options.name}; run it: make repro")


if __name__ == "__main__":
    main()
