"""Ask two models the same about one picture, in a notebook: answers side by side, claims by the model's own P(yes)."""

import io
from collections.abc import Mapping
from dataclasses import dataclass

import ipywidgets as widgets
from markupsafe import escape
from PIL import Image

from rlaifv.chat.conversation import Chat, read_image
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
            settings = self.params.evaluate
            chat = Chat(
                vlm, image, max_new_tokens=settings.max_new_tokens, repetition_penalty=settings.repetition_penalty
            )
            answer = chat.ask(question)
            division = divide_answers(self.divider, [(question, answer)], self.params.divide, self.params.seed)[0]
            asked = [f"{q} {self.params.feedback.suffix}" for q in division.questions]
            probabilities = judge(vlm, image, asked) if asked else []
            claims = [
                {"claim": claim, "p_yes": p_yes, "p_no": p_no}
                for claim, (p_yes, p_no) in zip(division.claims, probabilities, strict=True)
            ]
            found[name] = {"answer": answer, "claims": claims, "problem": division.problem}
        return found

    def widget(self, image, question: str) -> widgets.Widget:
        """An upload button, a picture, a question, and the answers to it; where an answer could not be split into
        claims, it says why. Starts with the given image."""
        upload = widgets.FileUpload(accept="image/*", multiple=False)
        asked = widgets.Text(
            value=question, description="question", continuous_update=False, layout=widgets.Layout(width="480px")
        )
        button = widgets.Button(description="ask", button_style="primary")
        picture = widgets.Image(format="png", width=260)
        answers = widgets.HTML()

        def ask(_=None) -> None:
            button.disabled = True
            try:
                shown, buffer = read_image(bytes(upload.value[0]["content"]) if upload.value else image), io.BytesIO()
                shown.save(buffer, "PNG")
                picture.value = buffer.getvalue()
                answers.value = render("chat.html", question=asked.value, rows=self.rows(shown, asked.value))
            except ValueError as error:
                answers.value = f"<p>{escape(error)}</p>"
            button.disabled = False

        upload.observe(ask, names="value")
        asked.observe(ask, names="value")
        button.on_click(ask)
        ask()
        return widgets.VBox([widgets.HBox([upload, asked, button]), picture, answers])
