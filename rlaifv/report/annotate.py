"""Ask a person about claims or pairs in a notebook, one after the other, by keyboard or mouse; each answer is saved
before the next question is shown."""

from pathlib import Path

import anywidget
import traitlets

from rlaifv.evaluation.agreement import Annotation, ClaimItem
from rlaifv.report.render import render

CLAIM_CHOICES = (("y", "yes", "it is true"), ("n", "no", "it is false"), ("u", "unsure", "cannot be told"))
PAIR_CHOICES = (
    ("1", "0", "the first is better"),
    ("2", "1", "the second is better"),
    ("e", "equal", "equally good"),
    ("u", "unsure", "cannot be told"),
)
"""Key, answer, what the button says."""

BACK = ("b", "back", "the one before once more")

SCRIPT = """
export default {
  render({ model, el }) {
    const page = document.createElement("div"), buttons = document.createElement("div");
    el.replaceChildren(page, buttons);
    el.tabIndex = 0;
    el.setAttribute("data-lm-suppress-shortcuts", "true");  // or JupyterLab takes the keys for its own
    const say = (answer) => model.send({ answer });
    const draw = () => {
      page.innerHTML = model.get("page");
      buttons.replaceChildren(...model.get("choices").map(([key, answer, text]) => {
        const button = document.createElement("button");
        button.className = "jupyter-button widget-button";
        button.style = "width: auto; margin: 4px";
        button.textContent = `${key}: ${text}`;
        button.onclick = () => { say(answer); el.focus(); };
        return button;
      }));
    };
    el.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const choice = model.get("choices").find(([key]) => key === event.key.toLowerCase());
      if (choice) { event.preventDefault(); event.stopPropagation(); say(choice[1]); }
    });
    model.on("change:page", draw);
    draw();
    setTimeout(() => el.focus(), 0);
  },
};
"""


class Questions(anywidget.AnyWidget):
    """The widget: shows what waits in an annotation, in that person's order, until nothing does."""

    _esm = SCRIPT
    page = traitlets.Unicode().tag(sync=True)
    choices = traitlets.List().tag(sync=True)

    def __init__(self, annotation: Annotation, image_root: Path) -> None:
        super().__init__()
        self.annotation, self.image_root = annotation, image_root
        self.waiting, self.asked = annotation.waiting(), []
        self.on_msg(lambda _, content, buffers: self.hear(content["answer"]))
        self.show()

    def hear(self, answer: str) -> None:
        """Save an answer to what is shown and go on; "back" shows the item before once more."""
        if answer == "back":
            if self.asked:
                self.waiting.insert(0, self.asked.pop())
        elif self.waiting:
            item = self.waiting.pop(0)
            self.annotation.save(item, answer)
            self.asked.append(item)
        self.show()

    def show(self) -> None:
        """Draw the first item that waits."""
        item, done = self.waiting[0] if self.waiting else None, len(self.annotation.items) - len(self.waiting)
        of_claims = isinstance(self.annotation.items[0], ClaimItem) if self.annotation.items else True
        choices = [*(CLAIM_CHOICES if of_claims else PAIR_CHOICES)] if item else []
        with self.hold_sync():
            self.choices = [list(choice) for choice in [*choices, *([BACK] if self.asked else [])]]
            self.page = render(
                "annotate.html",
                item=item,
                of_claims=of_claims,
                image=item and self.image_root / item.image_path,
                done=done,
                n=len(self.annotation.items),
                file=self.annotation.file,
            )
