"""What a profile names beside the pipeline is rehearsed: data of its formats, small models, their real prompts."""

import pytest
from lookalikes import write_repository
from PIL import Image

from rlaifv import ROOT
from rlaifv.params import check_params, read_content
from rlaifv.profiles.rehearsal_beside import (
    check_scorer,
    named_beside,
    prompts_beside,
    shorten_beside,
    shrink_beside,
    write_beside_data,
)
from rlaifv.profiles.rehearsal_data import write_data
from rlaifv.steps.facts import read_facts
from rlaifv.steps.preferences import hold_out, read_preferences
from rlaifv.steps.sft_rows import mixture, read_parts
from rlaifv.vlm.reward_format import FORMAT, load_reward_model

NAME = "llava-rlhf-7b"


def content_of(name: str) -> dict:
    return read_content(ROOT / "params" / f"{name}.yaml")


def test_a_profile_is_rehearsed_with_what_it_names_and_no_more():
    found = {name: named_beside(name, content_of(name)) for name in ("default", "llava15-7b", "rloo-claims-7b", NAME)}
    assert {name: beside.names for name, beside in found.items()} == {
        "default": (),
        "llava15-7b": (),
        "rloo-claims-7b": ("rloo",),
        NAME: ("sft", "reward_model", "rloo"),
    }
    assert found["rloo-claims-7b"].models(content_of("rloo-claims-7b")) == {}
    assert found["rloo-claims-7b"].rloo_run == "anchored" and found[NAME].rloo_run == "fact_rlhf"
    assert found[NAME].models(content_of(NAME)) == {
        "sft.base": "data/checkpoints/llava-sft-7b",
        "reward_model.base": "data/checkpoints/llava-sft-13b",
        "scored_by": "data/checkpoints/llava-rm-13b",
    }


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """Content, folder and what was drawn of a rehearsal of LLaVA-RLHF, as it is before any stage runs."""
    folder, content = tmp_path_factory.mktemp("rehearsal"), content_of(NAME)
    beside = named_beside(NAME, content)
    paths = {**beside.models(content), "policy": content["policy"]["path"]}
    sources = {key: write_repository(folder / "published", path) for key, path in paths.items()}
    check_scorer(paths["scored_by"], sources["scored_by"])
    policy = sources.pop("policy")
    shorten_beside(content, tokens=8)
    shrink_beside(sources, content, folder, beside)
    drawn = write_data(content, folder) + write_beside_data(content, folder, beside, ROOT / "data" / "images")
    return content, folder, drawn, beside, policy, sources


def test_its_data_are_in_the_formats_that_its_stages_read(rehearsed):
    content, folder, drawn, *_ = rehearsed
    params = check_params(content, "rehearsal")
    assert {f"sft_parts.{name}" for name in ("llava", "vqa", "aokvqa", "flickr")} <= set(drawn)
    assert {"preferences", "reward_model.prompt", "reward_model.facts_prompt"} <= set(drawn)
    parts, rejects = read_parts(params.sft_parts, folder)
    rows = mixture(parts, {name: part.weight for name, part in params.sft_parts.items()}, params.sft.rows, params.seed)
    images = folder / params.prepare.image_root
    assert len(rows) == params.sft.rows and not rejects and all(row.image(images).is_file() for row in rows)
    preferences, rejects = read_preferences(folder / params.reward_model.preferences, images)
    facts = read_facts(folder / params.rloo.captions)
    assert len(preferences) == 8 and not rejects and all(facts[p.image_path] for p in preferences)
    assert all(len(part) > 1 for part in hold_out(preferences, params.reward_model.held_out, params.seed))


def test_its_prompts_are_those_of_the_published_models_with_the_image_folded(rehearsed):
    content, _, _, beside, policy, _ = rehearsed
    said = "\n".join(prompts_beside(check_params(content, "it"), str(policy), beside, Image.new("RGB", (640, 480))))
    assert "sft: 256 tokens an image" in said and "<image>×256" in said
    assert "learned of it: There is a dog.</s>No.</s>" in said
    assert "reward_model: 576 tokens an image" in said and "by these captions of the image:⏎  - There is a dog." in said
    scored = said.partition("rloo is scored by: 576")[2]
    assert "curious user" in scored and "There is a dog.</s>" in scored and scored.endswith("ASSISTANT: It is")


def test_a_released_reward_model_in_small_is_one_and_a_wrong_prompt_is_refused(rehearsed):
    content, _, _, _, _, sources = rehearsed
    model = load_reward_model(content["rloo_runs"]["fact_rlhf"]["scored_by"], device="cpu")
    assert model.format.facts and model.vlm.model.num_parameters() < 20e6
    file = sources["scored_by"] / FORMAT
    text = file.read_text()
    file.write_text(text.replace("Is it good", "Is it fine"))
    with pytest.raises(ValueError, match="its reward prompt is not the one it was trained with"):
        check_scorer("a folder", sources["scored_by"])
    file.write_text(text)
