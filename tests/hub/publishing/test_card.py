"""Model cards: what they state and where it comes from, the committed ones, and that their examples run."""

import ast
import json

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard, model_info
from loopback_hub import hub  # noqa: F401
from PIL import Image
from places import ROOT
from safetensors.numpy import save_file
from transformers import pipeline

import segcompass_hf
from segcompass_hf.hub import recipe_names, render_model_card, write_model_card
from segcompass_hf.hub.publishing.card import PIPELINE_TAG, UNKNOWN_ID, load_recipe

QWEN3 = ("qwen3-vl-4b-sam2", "qwen3-vl-8b-sam2", "qwen3-vl-8b-sam3")
BACKBONES = ("llava-1.5-13b", "llava-1.5-7b", "qwen2.5-vl-7b", *QWEN3)
OF_OTHERS = "68.4 66.5 64.2 63.6 64.8".split()  # ReasonSeg test: GenSeg-R1-4B, RSAgent, the paper's, VisionReasoner-7B
# The paper's tables (arXiv 2605.22658); of LLaVA-1.5-7B they have no row, of Qwen3-VL neither.
QUOTED = {
    "llava-1.5-13b": "86.3 87.3 84.1 80.5 84.6 76.9 84.0 81.3 76.8 72.2 67.4 67.2 64.2 66.5".split(),
    "llava-1.5-7b": [],
    "qwen2.5-vl-7b": "85.3 78.3 82.8 76.1 72.2 66.6 66.3 64.8".split(),
    **dict.fromkeys(QWEN3, OF_OTHERS),
}


def run_of(split: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / "evaluation" / f"scenes-{split}.json").read_text())


@pytest.fixture
def checkpoint(tmp_path):
    """As far as a card looks at it: by hand 2 x 3 + 4 = 10 numbers of 4 bytes."""
    vlm = {"model_type": "llava", "text_config": {"num_hidden_layers": 7, "hidden_size": 1024}}
    sae = {"d_sae": 4096, "architecture": "topk"}
    config = {"vlm_config": vlm, "sae_config": sae, "sam_config": {"vision_config": {"num_hidden_layers": 12}}}
    config |= {"num_slots": 3, "sae_layer": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float32)}
    save_file(weights, tmp_path / "model.safetensors")
    save_file({"c": np.zeros(9, np.float32)}, tmp_path / "concepts.safetensors")
    return tmp_path


def test_the_bundled_checkpoints_card_states_what_was_measured(hub):  # noqa: F811
    folder = segcompass_hf.bundled_checkpoint()
    card = ModelCard.load(folder / "README.md")
    card.validate()  # by the hub's endpoint
    assert card.data.license == "apache-2.0" and card.data.library_name == "transformers"
    assert card.data.pipeline_tag == PIPELINE_TAG == "image-text-to-text"
    assert {"reasoning-segmentation", "image-segmentation"} <= set(card.data.tags)
    stated = {(result.dataset_split, result.metric_type): result.metric_value for result in card.data.eval_results}
    splits = ("val", "test_combinations", "test_pairs", "test_compositions", "test_crowded")
    expected = {
        (split, name.lower().replace("@", "-at-")): round(figure["value"], 4)
        for split in splits
        for name, figure in run_of(split)["metrics"].items()
    }
    assert stated == expected and len(stated) == 35
    giou = "{value:.3f} [{low:.3f}, {high:.3f}]".format(**run_of("val")["metrics"]["gIoU"])
    assert f"| scenes val | 500 | {giou} |" in card.text
    assert card.text.replace("](examples/", "](../src/segcompass_hf/checkpoints/scenes-tiny/examples/") == (
        ModelCard.load(ROOT / "model_cards" / "scenes-tiny.md").text
    )
    assert (folder / "examples" / "answers.jpg").is_file() and "](examples/answers.jpg)" in card.text


def test_the_examples_of_the_bundled_card_run():
    folder = segcompass_hf.bundled_checkpoint()
    examples = ModelCard.load(folder / "README.md").data.widget
    pipe = pipeline("reasoning-segmentation", model=str(folder), device="cpu")
    answers = [pipe(str(folder / example["src"]), instruction=example["text"]) for example in examples]
    assert len(examples) == 3 and all(answer["reasoning"] for answer in answers)
    found = [len(answer["segments"]) for answer in answers]
    assert found[0] == 1 and found[2] == 0  # a superlative names one object; the last asks for nothing that is there


@pytest.mark.parametrize("name", BACKBONES)
def test_cards_of_the_papers_backbones_quote_and_do_not_claim(name):
    card = render_model_card(name)
    assert str(card) == (ROOT / "model_cards" / f"{name}.md").read_text()
    source = "others" if name in QWEN3 else "the paper"
    measured, _, quoted = card.text.partition(f"### Quoted from {source}, not measured by us")
    assert "### Measured by us\n\nNothing yet." in measured
    assert all(figure in quoted and figure not in measured for figure in QUOTED[name])
    assert len(QUOTED[name]) == sum(str(line[2]).count("/") + 1 for line in load_recipe(name)["quoted"])
    assert card.data.eval_results is None and "model-index" not in str(card)  # quoted is not ours to index
    assert len(card.data.base_model) == 2 and f"--recipe {name}" in card.text and UNKNOWN_ID in card.text
    assert (ROOT / load_recipe(name)["config"]).is_file() and "{" not in card.text.split("```bibtex")[0]


def test_examples_are_upright_and_of_8_bits(checkpoint):
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
    orientation = Image.Exif()
    orientation[0x0112] = 6  # stored on its side; to be turned clockwise
    side = Image.fromarray(grey).transpose(Image.Transpose.ROTATE_90)
    side.save(checkpoint / "side.png", exif=orientation)
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    write_model_card(checkpoint, license="mit", examples=[(checkpoint / "side.png", "a"), (sixteen, "b")])
    for number in range(2):
        saved = Image.open(checkpoint / "examples" / f"example_{number}.png")
        assert saved.mode == "RGB" and not saved.getexif()
        np.testing.assert_array_equal(np.asarray(saved), np.repeat(grey[..., None], 3, axis=2))


def test_a_card_of_ones_own(checkpoint):
    image = Image.new("RGB", (8, 6), "red")
    card = write_model_card(
        checkpoint, repo_id="me/mine", license="mit", base_model="a/vlm", datasets=["a/set"], space="me/space",
        evaluations=[run_of("val") | {"command": "segcompass evaluate ..."}], training="For *long*.",
        examples=[(image, "the ring")],
    )  # fmt: skip
    assert str(ModelCard.load(checkpoint / "README.md")) == str(card)
    assert card.data.to_dict()["datasets"] == ["a/set"] and card.data.base_model == "a/vlm"
    assert card.data.widget == [{"src": "examples/example_0.png", "text": "the ring", "example_title": "the ring"}]
    assert Image.open(checkpoint / "examples" / "example_0.png").size == (8, 6)
    text = card.text
    assert "# mine\n" in text and "https://huggingface.co/spaces/me/space" in text and "For *long*." in text
    assert "https://huggingface.co/me/mine/resolve/main/examples/example_0.png" in text
    assert "| SAE | 4,096 features (topk) on `hidden_states[4]`, frozen |" in text
    assert "| VLM | llava, 7 layers of width 1,024 |" in text and "| slots | 3 |" in text
    assert "| weights | 0.0 million, " in text  # 10 numbers; those of the dictionary are not among them
    assert "concept dictionary" in text and "segcompass evaluate ..." in text
    assert "Quoted" not in text and "A template" not in text and "Nothing yet" not in text

    again = write_model_card(checkpoint)  # what the header said stays where nothing else is said
    assert again.data.license == "mit" and again.data.base_model == "a/vlm" and again.data.widget == card.data.widget
    assert again.data.eval_results is None and UNKNOWN_ID in again.text


def test_an_adapters_card_names_its_base(tmp_path):
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "base_model_name_or_path": "me/base"}
    config["modules_to_save"] = ["slot_mapper", "sam.mask_decoder", "sam.prompt_encoder"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    card = write_model_card(tmp_path, license="mit")
    assert card.data.base_model == "me/base" and "adapter for [me/base](https://huggingface.co/me/base)" in card.text
    assert "| adapter | LORA, rank 8, alpha 16 |" in card.text and "| trained whole | sam, slot_mapper |" in card.text
    del config["base_model_name_or_path"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "README.md").unlink()
    with pytest.raises(ValueError, match="does not say which model it was trained on"):
        write_model_card(tmp_path, license="mit")


def test_recipes(checkpoint, tmp_path):
    assert recipe_names() == ["checkpoint", *BACKBONES, "scenes-tiny"]
    with pytest.raises(FileNotFoundError, match="no recipe 'mine': neither a YAML file nor one of checkpoint, llava"):
        write_model_card(checkpoint, "mine", license="mit")
    with pytest.raises(ValueError, match="no licence is known"):
        write_model_card(checkpoint)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_model_card(tmp_path / "nowhere", license="mit")
    own = tmp_path / "own.yml"
    own.write_text(yaml.safe_dump({"extends": "paper", "title": "Ours", "summary": "S.", "license": "mit"}))
    card = write_model_card(checkpoint, own)
    assert "# Ours\n\nS." in card.text and load_recipe("paper")["limits"] in card.text and card.data.license == "mit"
    own.write_text("just words")
    with pytest.raises(ValueError, match="holds no fields"):
        load_recipe(own)


def test_results_that_no_sample_bears_on_are_left_out(checkpoint):
    run = run_of("val")
    run["metrics"]["N-acc"] |= {"num_samples": 0}
    card = write_model_card(checkpoint, license="mit", evaluations=[run])
    assert "n-acc" not in {result.metric_type for result in card.data.eval_results}
    assert "| – |" in card.text and run["commit"][:8] in card.text and run["commit"] not in card.text


def test_the_hub_reads_the_card_back(hub, checkpoint):  # noqa: F811
    from huggingface_hub import HfApi

    HfApi().create_repo("me/mine")
    write_model_card(checkpoint, license="mit", evaluations=[run_of("val")]).push_to_hub("me/mine")
    assert model_info("me/mine").sha == hub.repos["models", "me/mine"].branches["main"]
    assert len(ModelCard.load("me/mine").data.eval_results) == 7


WORDS = [
    'the "red" mug',
    "it's \\ there",
    'a\nb"); import os; ("',
    "```\n# x",
    "grün\u202etxet\x1b[2J",
    '"""',
    "{{ x }}",
]


@pytest.mark.parametrize("words", WORDS)
def test_the_cards_code_holds_the_words_of_an_example(checkpoint, words):
    """Whatever they are, the code parses and asks for just these words."""
    card = write_model_card(checkpoint, repo_id="me/mine", license="mit", examples=[(Image.new("RGB", (8, 6)), words)])
    code = card.text.split("```python\n")[1].split("\n```\n")[0]
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    call = next(call for call in calls if getattr(call.func, "id", None) == "pipe")
    assert call.args[0].value == "https://huggingface.co/me/mine/resolve/main/examples/example_0.png"
    assert call.keywords[0].value.value == words and len(calls) == 2  # `pipeline` and `pipe`
    assert ModelCard.load(checkpoint / "README.md").data.widget[0]["text"] == words


def test_evaluations_come_without_folders_and_keys(checkpoint):
    command = "segcompass evaluate --dataset coco:/home/me/a.json:/home/me/images --model /root/runs/x ```"
    run = run_of("val") | {"command": command, "predictor": "/home/me/mine"}
    card = write_model_card(checkpoint, license="mit", evaluations=[run])
    assert "````\nsegcompass evaluate --dataset coco:a.json:images --model x ```\n````\n" in card.text
    assert "/home" not in str(card) and "/root" not in str(card)
    with pytest.raises(ValueError, match=r"evaluations\[0\], command, line 1, .*a key or password"):
        write_model_card(checkpoint, license="mit", evaluations=[run | {"command": "HF_TOKEN=hf_" + "aB3" * 11}])


@pytest.mark.parametrize("given", ["training", "details"])
def test_what_is_written_for_a_card_holds_no_folder(checkpoint, given):
    with pytest.raises(ValueError, match=f"^{given}, line 2, holds .*'/home/me'"):
        write_model_card(checkpoint, license="mit", **{given: "on\n/home/me/photos"})
    with pytest.raises(ValueError, match="^the recipe, summary, line 1, .*'/home/me'"):
        write_model_card(checkpoint, {"summary": "see /home/me/x"}, license="mit")


def test_tables_keep_a_cell_in_its_line(checkpoint):
    card = write_model_card(checkpoint, license="mit", evaluations=[run_of("val") | {"dataset": "a|b\n# c\x1b[2J"}])
    assert r"| a\|b\n# c\x1b[2J | 500 |" in card.text


def test_damaged_configurations(checkpoint):
    for content, message in (("[", "config.json is damaged"), ("[]", "expected an object"), ("{}", "'vlm_config'")):
        (checkpoint / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            write_model_card(checkpoint, license="mit")
