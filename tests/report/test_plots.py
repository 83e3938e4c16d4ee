"""Figures draw any text that data holds: a dollar sign is a dollar sign."""

import io

import pytest
from PIL import Image

from rlaifv.report import plots

FORMULA = r"$x_{$ and $\nonsense$"
RATES = ("response_hallucination", "mention_hallucination", "recall")


def row(claim: str) -> dict:
    return {"image": "a.png", "answer": claim, "claims": [{"claim": claim, "p_yes": 0.5, "p_no": 0.5}]}


def results(control: str) -> dict:
    """A group of one experiment, which has a name that no formula has."""
    rates = dict.fromkeys(RATES, 0.5) | {f"{rate}_interval": [0.4, 0.6] for rate in RATES}
    experiments = [{"name": FORMULA, "base": rates, "rounds": {"1": rates}}]
    return {"group": "rounds", "control": control, "experiments": experiments}


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    return tmp_path


@pytest.mark.parametrize(
    "draw",
    [
        lambda folder: plots.image_grid(folder, ["a.png"], [FORMULA]),
        lambda folder: plots.gallery(folder, [row(FORMULA)], [row(FORMULA)]),
        lambda folder: plots.gallery(folder, [{**row(FORMULA), "claims": [], "problem": FORMULA}], [row("")]),
        lambda folder: plots.ablations(results(FORMULA)),
        lambda folder: plots.rounds(results(FORMULA)),
        lambda folder: plots.rounds(results("another")),
    ],
    ids=["grid", "claims", "not divided", "ablations", "control", "lines"],
)
def test_a_text_that_is_no_formula_is_drawn_as_it_is(folder, draw):
    draw(folder).savefig(io.BytesIO(), format="png")


def test_a_figure_says_iteration():
    rates = {"response_hallucination": 0.4, "mention_hallucination": 0.2, "recall": 0.9}
    rates |= {f"{rate}_interval": (value - 0.1, value + 0.1) for rate, value in rates.items()}
    axis = plots.result({"0": rates, "1": rates}).axes[0]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["base", "1"]
    assert axis.get_xlabel() == "iteration" and [text.get_text() for text in axis.texts] == ["40.0", "40.0"]
    log = {"epoch": 1.0, "loss": 0.5, "rewards_margins": 0.1, "rewards_accuracies": 1.0}
    legend = plots.training({"2": [log]}).axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["iteration 2"]
