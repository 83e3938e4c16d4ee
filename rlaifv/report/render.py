"""Fill the templates beside this file: pages with every text escaped for HTML, cards with every text escaped for
Markdown."""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, pass_eval_context, select_autoescape
from jinja2.nodes import EvalContext
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from PIL import Image

from rlaifv import records
from rlaifv.records import RATES, rates_of
from rlaifv.vlm.images import FORMATS, open_image

MEANS = ("accepted_claims", "mean_words")
"""The rates of a row that are no fractions."""


def scale(rate: str) -> int:
    """By what a rate of a row is multiplied where it is shown: 100 for a fraction, in percent."""
    return 1 if rate in MEANS else 100


HEADS = {
    "response_hallucination": "response hall. ↓",
    "mention_hallucination": "mention hall. ↓",
    "recall": "recall ↑",
    "response_rejection": "answers with a rejected claim ↓",
    "claim_rejection": "rejected claims ↓",
    "accepted_claims": "accepted claims an answer ↑",
}
"""A rate → the head of its column."""

SHOWN_BY_BROWSERS = ("PNG", "JPEG", "GIF", "WEBP", "BMP")


def render(template: str, **values: object) -> Markup:
    """Fill a file of `templates/`; the result is Markup, so that another template takes it as it is.

    Raises jinja2.UndefinedError where the template names a value that is not there.
    """
    return Markup(ENVIRONMENT.get_template(template).render(**values))


def show_html(page: str) -> None:
    """Display HTML in a notebook."""
    from IPython.display import HTML, display

    display(HTML(page))


def percent(fraction: float, digits: int = 1) -> str:
    """0.123 → "12.3"."""
    return f"{100 * fraction:.{digits}f}"


def short_percent(fraction: float) -> str:
    """Two digits after the point below 1 %, one above: 0.123 → "12.3", 0.0015 → "0.15"."""
    return percent(fraction, 2 if 0 < fraction < 0.01 else 1)


def interval(bounds: Sequence[float], scale: float = 100, digits: int = 1) -> str:
    """(0.1, 0.2) → "10.0–20.0"."""
    return "–".join(f"{scale * bound:.{digits}f}" for bound in bounds)


def points(difference: float, scale: float = 100, digits: int = 1) -> str:
    """A difference of rates in percentage points: -0.123 → "-12.3"."""
    return f"{scale * difference:+.{digits}f}"


def between(bounds: Sequence[float], scale: float = 100, digits: int = 1) -> str:
    """The interval of a difference: (-0.1, 0.2) → "-10.0 to +20.0"."""
    return " to ".join(f"{bound:+.{digits}f}" for bound in sorted(scale * bound for bound in bounds))


def p_value(p: float) -> str:
    """0.0123 → "p = 0.012"."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def yes_share(claim: Mapping) -> float:
    """P(yes) among yes and no, from 0 to 1: what a claim's color says."""
    return records.yes_share(claim["p_yes"], claim["p_no"])


def data_uri(picture: Figure | Path) -> str:
    """A figure or an image file as a data URI, so that the page needs no other file.

    The type is the one that the bytes are of, whatever the file is called; what no browser shows is embedded as PNG.
    """
    stream = io.BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(stream, format="PNG", metadata={"Software": None})
    else:
        pixels = open_image(picture)
        with Image.open(picture, formats=FORMATS) as image:
            shown = image.format in SHOWN_BY_BROWSERS
        if shown:
            stream.write(picture.read_bytes())
        else:
            pixels.save(stream, "PNG")
    kind = Image.open(stream).get_format_mimetype()
    return f"data:{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def code(text: object) -> Markup:
    """A name as Markdown code, on one line, whatever characters it has."""
    line = " ".join(str(text).split())
    if not set(line) & set("`|<>&"):
        return Markup(f"`{line}`")
    return Markup(f"<code>{escape_markdown(line)}</code>")


def escape_markdown(text: object) -> str:
    """A text in which nothing is Markdown or HTML, on one line."""
    line = str(escape(" ".join(str(text).split())))
    return re.sub(r"([\\`*_\[\]|~])", lambda found: f"&#{ord(found[1])};", line)


@pass_eval_context
def _finalize(context: EvalContext, value: object) -> object:
    """Jinja escapes what it puts into HTML; this is the same for the cards, which are Markdown."""
    return value if context.autoescape or isinstance(value, Markup) else escape_markdown(value)


ENVIRONMENT = Environment(
    loader=PackageLoader("rlaifv.report"),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    finalize=_finalize,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
ENVIRONMENT.globals |= {"rates": RATES, "means": MEANS, "heads": HEADS}
ENVIRONMENT.filters |= {
    filter.__name__: filter
    for filter in (percent, short_percent, interval, points, between, p_value, yes_share, data_uri, code, rates_of)
}
