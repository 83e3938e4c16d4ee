"""The language of the embedded world: descriptions, claims, questions, and whether a claim is true of a scene.

A description has one sentence per group of objects ("There is a red cup at the top-left of the picture.", or in brief
"There is a red cup, top-left.") and may end with opinions. A sentence makes three claims: existence or count, color,
position; a claim turns into a yes/no question.
"""

import dataclasses
import random
import re
from collections.abc import Sequence

from rlaifv.tinyworld.scenes import CLASSES, COLOR_NAMES, CONTEXTS, GRID, POSITIONS, Group, Scene

INSTRUCTIONS: tuple[str, ...] = (
    "Describe the image.",
    "What is in the picture?",
    "Please describe this scene in detail.",
    "What do you see in this image?",
    "Write a detailed description of the picture.",
    "Tell me what is shown here.",
)
OPINIONS: tuple[str, ...] = (
    "It is a lovely picture.",
    "The scene looks calm.",
    "I like this image.",
    "It looks very nice.",
)
REMARKS: tuple[str, ...] = (
    "I like every detail of this very nice and lovely picture.",
    "The scene in this picture looks very calm and very lovely.",
    "It is a very nice and calm image of this scene.",
    "The picture looks very nice and lovely in every detail.",
)
"""Opinions as long as a sentence about an object: what a describer says in place of an imagined object, so that an
answer is not longer for hallucinating and preferences do not teach brevity."""
BRIEF_REMARKS: tuple[str, ...] = (
    "I like every detail of this picture.",
    "The scene in this picture looks calm.",
    "It is a very nice image.",
    "The picture looks lovely in every detail.",
)
"""The same for a brief description."""
YES_NO = "Please answer yes or no."
"""The suffix that the feedback stage puts behind a question."""


@dataclasses.dataclass(frozen=True)
class Style:
    """A phrasing of a description's sentences."""

    phrase: str
    share: float
    """How often a description uses it."""
    remarks: tuple[str, ...] = REMARKS
    imagines: float = 1.0
    """How often it imagines an object, against the others: who says less, invents less."""


STYLES: tuple[Style, ...] = (
    Style("There {be} {thing} at the {position} of the picture.", 0.35),
    Style("{Thing} {be} at the {position} of the picture.", 0.21),
    Style("I can see {thing} at the {position} of the picture.", 0.14),
    Style("There {be} {thing}, {position}.", 0.15, BRIEF_REMARKS, 0.6),
    Style("{Thing}, {position}.", 0.09, BRIEF_REMARKS, 0.6),
    Style("I can see {thing}, {position}.", 0.06, BRIEF_REMARKS, 0.6),
)
"""Three wordings, each in full and in brief. One leads, so that greedy decoding is stable. In brief they make the same
claims in two thirds of the words, so that answers to one question differ in length, as a real model's do, and not only
in what they say; they begin alike, so that a preference for one is no preference against beginning a sentence."""

NUMBERS = ("a", "two", "three")
TYPES = ("existence", "count", "color", "position")
_PLURALS = {"knife": "knives", "mouse": "mice", "sheep": "sheep", "bus": "buses"}
PLURALS: dict[str, str] = {name: _PLURALS.get(name, name + "s") for name in CLASSES}
_SINGULAR = {form: name for name in CLASSES for form in (PLURALS[name], name)}

PARTNERS: dict[str, tuple[str, str]] = {
    "fork": ("chair", "brown"),
    "bicycle": ("dog", "black"),
    "train": ("clock", "green"),
    "cow": ("truck", "red"),
    "laptop": ("cup", "yellow"),
}
"""What a hallucinating describer adds: an object that usually goes with a present one, and its typical color.

The color is fixed because it is said before the class: a random one would spread the probability over eight words, and
greedy decoding would not repeat the error. Partners come from another context, so that they are never in the image:
whether a partner of the same context is there or not takes a model of this size far longer to learn.
"""

_NOUN = "|".join(sorted(_SINGULAR, key=len, reverse=True))
_COLOR, _PLACE = "|".join(COLOR_NAMES), "|".join(sorted(POSITIONS, key=len, reverse=True))
_THING = rf"(?P<number>[Aa]|[Tt]wo|[Tt]hree) (?P<color>{_COLOR}) (?P<noun>{_NOUN})"
_SENTENCE = re.compile(
    rf"(?:There (?:is|are) |I can see )?{_THING}(?: (?:is|are))?(?:(?: at the|,) (?P<place>{_PLACE})(?![a-z-]))?"
)
_CLAIM = re.compile(
    rf"There (?:is|are) (?P<number>a|two|three) (?P<what>{_NOUN}) in the image\."
    rf"|The (?P<noun>{_NOUN}) (?:is|are) (?:(?P<color>{_COLOR})|at the (?P<place>{_PLACE}))\."
)


def _words(name: str, count: int) -> tuple[str, str]:
    """The noun and the verb for `count` objects of class `name`."""
    return (name, "is") if count == 1 else (PLURALS[name], "are")


def sentence(group: Group, style: Style = STYLES[0]) -> str:
    """One sentence about a group, in one of STYLES."""
    noun, be = _words(group.name, group.count)
    thing = f"{NUMBERS[group.count - 1]} {group.color} {noun}"
    return style.phrase.format(be=be, thing=thing, Thing=thing.capitalize(), position=POSITIONS[group.cell])


def caption(groups: Sequence[Group], rng: random.Random, opinion: float = 0.3) -> str:
    """A description of `groups` in their order, in one random style, with an opinion in that share of cases, a second
    one in that share of these, and so on."""
    style = _random_style(rng)
    return " ".join([sentence(group, style) for group in groups] + _opinions(rng, opinion))


def imagined_caption(scene: Scene, rng: random.Random, phantom: float, opinion: float = 0.3) -> str:
    """A description of a scene as the policy's teacher gives it: behind each trigger of PARTNERS comes either, with
    probability `phantom` (less in a brief style), its partner as if it were there (one, in its typical color, in the
    trigger's place) or a remark. Opinions as in `caption`.

    The trigger's place is what goes on from there needs: objects come in reading order, and a policy that looks for
    the next one behind the last place named would skip objects behind an imagined one elsewhere.
    """
    style = _random_style(rng)
    sentences = []
    for group in scene.groups:
        sentences.append(sentence(group, style))
        if group.name in PARTNERS and rng.random() < phantom * style.imagines:
            partner, color = PARTNERS[group.name]
            sentences.append(sentence(Group(partner, color, 1, group.cell), style))
        elif group.name in PARTNERS:
            sentences.append(rng.choice(style.remarks))
    return " ".join(sentences + _opinions(rng, opinion))


def _random_style(rng: random.Random) -> Style:
    return rng.choices(STYLES, [style.share for style in STYLES])[0]


def _opinions(rng: random.Random, share: float) -> list[str]:
    said = 0
    while said < len(OPINIONS) and rng.random() < share:
        said += 1
    return rng.sample(OPINIONS, said)


def claims_of(group: Group, with_position: bool = True) -> list[str]:
    """The atomic claims of a sentence about a group: existence or count, color, position."""
    noun, be = _words(group.name, group.count)
    claims = [
        f"There {be} {NUMBERS[group.count - 1]} {noun} in the image.",
        f"The {noun} {be} {group.color}.",
    ]
    return [*claims, f"The {noun} {be} at the {POSITIONS[group.cell]}."] if with_position else claims


def claims(answer: str) -> list[str]:
    """The atomic claims of any text of this world, sentence by sentence, without its opinions.

    A sentence that breaks off after its noun (an answer cut at its token limit) still makes the claims said so far.
    """
    found = []
    for match in _SENTENCE.finditer(answer):
        count = NUMBERS.index(match["number"].lower()) + 1
        place = match["place"]
        group = Group(_SINGULAR[match["noun"]], match["color"], count, POSITIONS.index(place) if place else 0)
        found.extend(claims_of(group, with_position=place is not None))
    return found


def to_question(claim: str) -> str:
    """The yes/no question of a claim: "The cup is red." → "Is the cup red?". Raises ValueError for other text."""
    if _CLAIM.fullmatch(claim) is None:
        raise ValueError(f"{claim!r} is not a claim of the embedded world (see rlaifv/tinyworld/language.py)")
    if claim.startswith("There"):
        return re.sub(r"There (is|are) (.*)\.", lambda m: f"{m[1].capitalize()} there {m[2]}?", claim)
    return re.sub(r"The (\S+) (is|are) (.*)\.", lambda m: f"{m[2].capitalize()} the {m[1]} {m[3]}?", claim)


def claim_type(claim: str) -> str:
    """One of TYPES. Raises ValueError for text that is not a claim of this world."""
    match = _CLAIM.fullmatch(claim)
    if match is None:
        raise ValueError(f"{claim!r} is not a claim of the embedded world (see rlaifv/tinyworld/language.py)")
    if match["number"]:
        return "existence" if match["number"] == "a" else "count"
    return "color" if match["color"] else "position"


def is_true(claim: str, scene: Scene) -> bool:
    """Whether a claim holds in a scene: the one definition of truth in this world.

    "There is a cup" holds for one cup or more, "There are two cups" for exactly two; color and position claims hold
    for the group of that class, in singular or plural; every claim about an absent class is false.
    Raises ValueError for text that is not a claim of this world.
    """
    kind, match = claim_type(claim), _CLAIM.fullmatch(claim)
    group = scene.find(_SINGULAR[match["what"] or match["noun"]])
    if group is None:
        return False
    if kind == "count":
        return group.count == NUMBERS.index(match["number"]) + 1
    if kind == "color":
        return group.color == match["color"]
    return kind == "existence" or POSITIONS[group.cell] == match["place"]


def false_of(text: str, scene: Scene) -> list[str]:
    """The claims of a text that do not hold in the scene, as often as they are made."""
    return [claim for claim in claims(text) if not is_true(claim, scene)]


def random_claim(scene: Scene, kind: str, answer: bool, rng: random.Random) -> str | None:
    """A claim of that type that is true (answer) or false of the scene, or None when a true count has no plural.

    False claims are of the kinds that descriptions make: an absent class of the same context (most often the partner
    of a present class), rarely of another context, or a present object with another number, color or position.
    """
    present = rng.choice(scene.groups)
    if kind == "count" and answer:
        plural = [group for group in scene.groups if group.count > 1]
        if not plural:
            return None
        present = rng.choice(plural)
    if answer:
        wanted = {"existence": 0, "count": 0, "color": 1, "position": 2}[kind]
        group = Group(present.name, present.color, 1, present.cell) if kind == "existence" else present
        return claims_of(group)[wanted]
    if kind == "existence" or rng.random() < 0.35:
        present = Group(_absent(scene, rng), rng.choice(COLOR_NAMES), rng.choices((1, 2, 3), (6, 1, 1))[0], 0)
        partner_color = dict(PARTNERS.values()).get(present.name)
        color = partner_color if partner_color and rng.random() < 0.5 else present.color
        taken = {group.cell for group in scene.groups}
        free = [cell for cell in range(GRID * GRID) if cell not in taken]
        cell = rng.choice(free) if rng.random() < 0.6 else rng.randrange(GRID * GRID)
        count = 1 if kind == "existence" else max(present.count, 2) if kind == "count" else present.count
        return claims_of(Group(present.name, color, count, cell))[{"color": 1, "position": 2}.get(kind, 0)]
    if kind == "count":
        count = rng.choice([count for count in (2, 3) if count != present.count])
        return claims_of(Group(present.name, present.color, count, present.cell))[0]
    others = [group for group in scene.groups if group.name != present.name]
    if kind == "color":
        colors = [group.color for group in others] if others and rng.random() < 0.7 else list(COLOR_NAMES)
        colors = [color for color in colors if color != present.color] or [
            color for color in COLOR_NAMES if color != present.color
        ]
        return claims_of(Group(present.name, rng.choice(colors), present.count, present.cell))[1]
    cells = [group.cell for group in others] if others and rng.random() < 0.7 else list(range(GRID * GRID))
    cells = [cell for cell in cells if cell != present.cell]
    return claims_of(Group(present.name, present.color, present.count, rng.choice(cells)))[2]


def open_question(scene: Scene, kind: str, rng: random.Random) -> tuple[str, str]:
    """A question with a one-word answer: "What color is the cup?" → "red", of an absent object "none".

    They teach the labeler to look things up: eight colors to choose from say more about where to look than yes and
    no do. kind is one of TYPES.
    """
    name = _absent(scene, rng) if rng.random() < 0.3 else rng.choice(scene.groups).name
    group = scene.find(name)
    noun, be = _words(name, group.count if group else rng.choices((1, 2), (4, 1))[0])
    if kind == "count":
        return f"How many {PLURALS[name]} are there?", ("one", "two", "three")[group.count - 1] if group else "none"
    if kind == "color":
        return f"What color {be} the {noun}?", group.color if group else "none"
    if kind == "position":
        return f"Where {be} the {noun}?", POSITIONS[group.cell] if group else "none"
    cell = rng.randrange(GRID * GRID) if rng.random() < 0.3 else rng.choice(scene.groups).cell
    there = next((group.name for group in scene.groups if group.cell == cell), "none")
    return f"What is at the {POSITIONS[cell]}?", there


def _absent(scene: Scene, rng: random.Random) -> str:
    """A class that the scene does not show."""
    partners = [PARTNERS[g.name][0] for g in scene.groups if g.name in PARTNERS]
    partners = [name for name in partners if scene.find(name) is None]
    draw = rng.random()
    if partners and draw < 0.4:
        return rng.choice(partners)
    pool = CLASSES if draw > 0.85 else CONTEXTS[scene.context]
    return rng.choice([name for name in pool if scene.find(name) is None])
