"""Ask two models the same about one picture, in a notebook: answers side by side, claims by the model's own P(yes)."""

import io
from collections.abc import Mapping
from dataclasses import dataclass

import ipywidgets as widgets
from markupsafe import Markup, escape
from PIL import Image

from rlaifv.chat import Chat, read_image
from rlaifv.inference.yes_no import judge
from rlaifv.params import Params
from rlaifv.report.render import render
from rlaifv.steps.divide import divide_answers
from rlaifv.vlm.loading import VLM


@dataclass(frozen=True)
class SideBySide:
    """Models by name, and the divider that splits what they say into claims."""

    models: Mapping[str, VLM]
    divider: VLM
    params: Params

    def rows(self, image: Image.Image, question: str) -> dict[str, dict]:
        """Each model's greedy answer, and its claims with the P(yes) and P(no) that the model itself gives them."""
        found = {}
        for name, vlm in self.models.items():
            answer = Chat(vlm, image, max_new_tokens=self.params.evaluate.max_new_tokens).ask(question)
            division = divide_answers(self.divider, [(question, answer)], self.params.divide, self.params.seed)[0]
            asked = [f"{q} {self.params.feedback.suffix}" for q in division.questions]
            probabilities = judge(vlm, image, asked) if asked else []
            claims = [
                {"claim": claim, "p_yes": p_yes, "p_no": p_no}
                for claim, (p_yes, p_no) in zip(division.claims, probabilities, strict=True)
            ]
            found[name] = {"answer": answer, "claims": claims, "problem": division.problem}
        return found

    def page(self, image: Image.Image, question: str) -> Markup:
        """HTML of all answers; where an answer could not be split into claims, it says why."""
        return render("chat.html", question=question, rows=self.rows(image, question))

    def widget(self, image, question: str) -> widgets.Widget:
        """An upload button, a picture, a question, and the answers to it; starts with the given image."""
        upload = widgets.FileUpload(accept="image/*", multiple=False)
        asked = widgets.Text(
            value=question, description="question", continuous_update=False, layout=widgets.Layout(width="480px")
        )
        button = widgets.Button(description="ask", button_style="primary")
        picture = widgets.Image(value=png(read_image(image)), format="png", width=260)
        answers = widgets.HTML()

        def ask(_=None) -> None:
            button.disabled = True
            try:
                answers.value = self.page(read_image(bytes(picture.value)), asked.value)
            except ValueError as error:
                answers.value = f"<p>{escape(error)}</p>"
            button.disabled = False

        def replace(change) -> None:
            try:
                picture.value = png(read_image(bytes(change["new"][0]["content"])))
            except ValueError as error:
                answers.value = f"<p>{escape(error)}</p>"
            else:
                ask()

        upload.observe(replace, names="value")
        button.on_click(ask)
        asked.observe(ask, names="value")
        ask()
        return widgets.VBox([widgets.HBox([upload, asked, button]), picture, answers])


def png(image: Image.Image) -> bytes:
    """An image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
