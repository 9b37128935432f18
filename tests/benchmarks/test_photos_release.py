"""photos-small from a trained folder to what is committed, with tiny random weights; and its card."""

import json
import shutil
import sys

import pytest
import tiny
import torch
from PIL import Image
from places import ROOT
from safetensors.torch import load_file
from scripts import module

from segcompass_hf.checkpoint import load_checkpoint
from segcompass_hf.hub.publishing.checks import check_card

pytest.importorskip("trl")
card = module("benchmarks/photos_small/card.py")
with pytest.MonkeyPatch.context() as patch:  # the script looks beside itself and among the examples
    patch.setattr(sys, "path", list(sys.path))
    releasing = module("benchmarks/photos_small/release.py")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """As a stage leaves it."""
    folder = tmp_path_factory.mktemp("stage")
    tiny.tiny_model("qwen2_5_vl").save_pretrained(folder)
    tiny.tiny_processor("qwen2_5_vl").save_pretrained(folder)
    for name in ("training_args.bin", "stage_done.json", "optimizer.pt"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture(scope="module")
def released(trained, tmp_path_factory):
    target = tmp_path_factory.mktemp("clone") / "checkpoints" / "photos-small"
    size = releasing.release(trained, ["the cat", "something to drink from"], target)
    assert size == sum(path.stat().st_size for path in target.iterdir())
    return target


def test_in_bfloat16_and_without_code_or_leftovers(trained, released):
    before, after = (load_file(folder / "model.safetensors") for folder in (trained, released))
    wide = [name for name, tensor in after.items() if tensor.dtype != torch.bfloat16]
    assert wide == ["sam.shared_image_embedding.positional_embedding"], "of SAM, which keeps it so"
    torch.testing.assert_close({name: value.float() for name, value in after.items()}, before, rtol=2**-8, atol=1e-6)
    names = {path.name for path in released.iterdir()}
    assert {"config.json", "processor_config.json", "tokenizer.json", "generation_config.json"} <= names
    assert not [name for name in names if name.endswith((".py", ".bin", ".pt")) or name.startswith("stage")]
    assert [path.name for path in released.parent.iterdir() if not path.name.startswith(".")] == ["photos-small"]


def test_it_loads_in_float32_and_knows_its_words(released):
    model, processor, _ = load_checkpoint(str(released))
    assert model.dtype == torch.float32
    assert processor.unknown_words("The cat drinks") == ["drinks"], "capitals make no difference"


def test_large_weights_come_in_several_files(trained, released, tmp_path, monkeypatch):
    monkeypatch.setattr(releasing, "SHARD_BYTES", (released / "model.safetensors").stat().st_size // 2)
    releasing.release(trained, ["a dog"], tmp_path / "sharded")
    files = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(files) >= 2 and max(file.stat().st_size for file in files) <= releasing.SHARD_BYTES + 20_000
    whole, shards = (load_checkpoint(str(folder))[0].state_dict() for folder in (released, tmp_path / "sharded"))
    torch.testing.assert_close(shards, whole, rtol=0, atol=0)


def test_it_takes_the_place_of_an_earlier_one_but_of_nothing_else(trained, released, tmp_path):
    target = tmp_path / "photos-small"
    shutil.copytree(released, target)
    (target / "old.txt").write_text("")
    with pytest.raises(ValueError, match="but at most 1.0 kB fit"):
        releasing.release(trained, ["a dog"], target, most_bytes=1000)
    assert (target / "old.txt").exists(), "nothing is changed"
    releasing.release(trained, ["a dog"], target)
    assert not (target / "old.txt").exists()
    assert json.loads((target / "processor_config.json").read_text())["trained_words"] == ["a", "dog"]
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="holds no config.json; move what it holds elsewhere"):
        releasing.release(trained, ["a dog"], tmp_path / "mine")


def test_the_card_states_what_was_measured_and_what_was_not(released, tmp_path):
    results, cards, demo = (tmp_path / name for name in ("results", "cards", "demo"))
    for folder in (results, cards, demo):
        folder.mkdir()
    shutil.copy(ROOT / "benchmarks/results/evaluation/scenes-val.json", results / "evaluation.json")
    (results / "goals.md").write_text("# x on y\n\n`python a.py /home/me/out`\n\n## By kind\n\n| a |\n")
    figures = {"photographs": 7, "f1": {"value": 0.5, "low": 0.4, "high": 0.6}, "precision": 0.25, "recall": 0.125}
    for number, best in ((2, "cat"), (10, "dog")):
        of_category = {"cat": 0.0, "dog": 0.0} | {best: 1.0}
        (results / f"listed_{number}.json").write_text(json.dumps(figures | {"f1_of_category": of_category}))
    for number, height in ((0, 100), (1, 60)):
        Image.new("RGB", (1600, height), (200, number, 0)).save(demo / f"photograph_{number:02d}_x.png")
    card.write_card(released, results, cards, demo)
    text = (released / "README.md").read_text()
    examples, line = check_card(released)
    assert len(examples) == card.NUM_EXAMPLES and line == "card: licence apache-2.0, 7 results"
    assert "### Goals\n\n`python a.py out`\n\n#### By kind" in text
    assert "micro-F1 of 0.500 [0.400, 0.600] (precision 0.250, recall 0.125" in text
    assert "Never right here: cat." in text, "the last try counts, 10 and not 2"
    for title in ("Slots of another sample", "Concepts", "Time and memory"):
        assert f"### {title}\n\nNot measured." in text
    with Image.open(released / "examples" / "answers.jpg") as picture:
        assert picture.size == (800, 80)
    there = (cards / "photos-small.md").read_text()
    assert "](../checkpoints/photos-small/examples/answers.jpg)" in there
    assert there.replace("../checkpoints/photos-small/examples", "examples") == text


def test_without_results_the_card_says_so(released, tmp_path):
    card.write_card(released, tmp_path, tmp_path)
    text = (released / "README.md").read_text()
    assert text.count("Not measured.") == len(card.SECTIONS) and "Nothing yet." in text
    with pytest.raises(SystemExit, match="holds no photograph_"):
        card.answers(tmp_path)
