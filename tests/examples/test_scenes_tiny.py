"""The recipe of scenes-tiny: labels derived by hand, stages that stand for downloads, and the recipe behind them."""

import json
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from places import ROOT
from safetensors.torch import load_file

pytest.importorskip("trl")

sys.path.insert(0, str(ROOT / "examples" / "scenes_tiny"))
import pretrain  # noqa: E402
import trainers  # noqa: E402
from labels import MAX_OBJECTS, collate, patch_labels  # noqa: E402

from segcompass_hf.data import scenes  # noqa: E402
from segcompass_hf.data.scenes.drawing import CELL, GRID, IMAGE_SIZE  # noqa: E402
from segcompass_hf.training import read_recipe, run_recipe  # noqa: E402
from segcompass_hf.training.loop.checkpoints import find_last_whole  # noqa: E402
from segcompass_hf.training.recipe.check import check_recipe  # noqa: E402

RECIPE = ROOT / "examples" / "scenes_tiny" / "recipe.yaml"


def test_patch_labels_by_hand():
    """One object fills cell b1 and a third of c1; its centre is in b1. Everything else is background."""
    ids = torch.zeros(1, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    ids[0, :CELL, CELL : 2 * CELL + CELL // 3] = 1
    objects = torch.full((1, MAX_OBJECTS, 4), -100)
    objects[0, 0] = torch.tensor([2, 1, 0, 1])  # color 2, shape 1, size 0, cell 1 = b1
    labels = patch_labels(ids, objects)
    assert labels["color"][0, 1] == 2 and labels["shape"][0, 1] == 1 and labels["size"][0, 1] == 0
    assert labels["centre"][0].nonzero().tolist() == [[1]]
    assert labels["color"][0, 2] == -100, "less than 40 % of the patch shows the object"
    assert not labels["background"][0, 2], "but it is no background either"
    assert labels["background"].sum() == GRID * GRID - 2


@pytest.mark.slow
def test_a_stage_killed_while_it_saves_goes_on_from_the_checkpoint_before(tmp_path, monkeypatch):
    monkeypatch.setitem(pretrain.STAGES, "vision", (4, 2))  # a checkpoint after every step

    def killed_at(step):
        def save(trainer, output_dir):  # after the weights
            if trainer.state.global_step == step:
                raise KeyboardInterrupt
            return untouched(trainer, output_dir)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(trainers.VisionTrainer, "_save_optimizer_and_scheduler", save)
            pretrain.run("vision", tmp_path / "killed")

    untouched = trainers.VisionTrainer._save_optimizer_and_scheduler
    killed_at(1)
    assert find_last_whole(tmp_path / "killed") is None  # it starts anew
    killed_at(2)
    assert find_last_whole(tmp_path / "killed").name == "checkpoint-1"
    for folder in ("killed", "whole"):
        pretrain.run("vision", tmp_path / folder)
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in ("killed", "whole"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A VLM and a SAM after four steps each."""
    folder = tmp_path_factory.mktemp("parts")
    for stage, (_, batch_size) in pretrain.STAGES.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(pretrain.STAGES, stage, (4, min(2, batch_size)))
            pretrain.run(stage, folder / stage)
    return folder


def test_masks_trains_a_sam2_and_init_takes_it(tmp_path, monkeypatch):
    from transformers import Sam2Model

    from segcompass_hf import SegCompassForReasoningSegmentation, SegCompassProcessor, bundled_checkpoint
    from segcompass_hf.hub import swap_segmenter

    monkeypatch.setitem(pretrain.STAGES, "masks", (4, 2))
    pretrain.run("masks", tmp_path / "masks", segmenter="sam2")
    sam = Sam2Model.from_pretrained(tmp_path / "masks")
    assert sum(weight.numel() for weight in sam.parameters()) < 1e6 and not hasattr(sam, "auxiliary_head")
    swap_segmenter(bundled_checkpoint(), tmp_path / "masks", tmp_path / "swapped")
    model = SegCompassForReasoningSegmentation.from_pretrained(tmp_path / "swapped")
    processor = SegCompassProcessor.from_pretrained(tmp_path / "swapped")
    assert isinstance(model.sam, Sam2Model) and model.mask_stage.map_size == IMAGE_SIZE // 2
    assert torch.equal(model.sam.no_memory_embedding, sam.no_memory_embedding)
    # trained on pixels as the processor makes them
    sample = scenes.sample("train", 0, seed=1)
    pixels = collate(
        [{"image": sample.image, "ids": sample.ids, "objects": np.zeros((MAX_OBJECTS, 4))}],
        processor.sam_image_processor,
    )
    row = scenes.SceneRows("val", 1)[0] | {"image": Image.fromarray(sample.image)}
    inputs = processor(images=row["image"], instruction=row["instruction"])
    torch.testing.assert_close(pixels["pixel_values"], inputs["sam_pixel_values"])


def changes_of(parts, output):
    cache = f"sae.cache_dir={output / 'activations'}"
    return [f"output_dir={output}", f"vlm={parts / 'vision'}", f"sam={parts / 'masks'}", cache]


def test_parts_are_what_a_download_would_be(parts):
    from transformers import AutoModelForImageTextToText, AutoProcessor, SamModel

    vlm, processor = (kind.from_pretrained(parts / "vision") for kind in (AutoModelForImageTextToText, AutoProcessor))
    sam = SamModel.from_pretrained(parts / "masks")
    assert type(processor).__name__ == "LlavaProcessor" and not hasattr(sam, "auxiliary_head")
    assert len(processor.tokenizer) == vlm.get_input_embeddings().weight.shape[0]
    done = (parts / "masks" / "model.safetensors").stat().st_mtime_ns
    pretrain.run("masks", parts / "masks")
    assert (parts / "masks" / "model.safetensors").stat().st_mtime_ns == done


def test_the_recipe_can_be_run_and_reads_what_the_bundled_checkpoint_reads(parts, tmp_path):
    from segcompass_hf import SegCompassProcessor, bundled_checkpoint
    from segcompass_hf.training.recipe.parts import PartLoader, Parts

    recipe = read_recipe(RECIPE, changes_of(parts, tmp_path / "out"))
    plans = check_recipe(recipe, num_processes=recipe.settings.processes)
    assert [plan.name for plan in plans] == ["warmup", "sae", "segmentation"]
    loader, start = PartLoader(recipe.settings), Parts.of(recipe.settings)
    bundled = SegCompassProcessor.from_pretrained(bundled_checkpoint())
    row = scenes.SceneRows("val", 1)[0]
    one, other = (
        processor(images=[row["image"]], instruction=[row["instruction"]], reasoning=[row["reasoning"]])
        for processor in (loader.processor(start), bundled)
    )
    assert set(one) == set(other)
    for name in one:
        assert torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])), name


def test_every_row_is_drawn_by_a_stream_of_its_own_and_no_stage_reads_labels():
    recipe = yaml.safe_load(RECIPE.read_text())
    streams = [recipe[stage]["dataset"] for stage in ("warmup", "sae", "segmentation")]
    assert len(set(streams)) == 3 and all(name.startswith("scenes:train:") for name in streams)
    assert not {"scenes:train:0", "scenes:train:1"} & set(streams), "those of the two stages before"


@pytest.mark.slow
def test_the_recipe_makes_a_checkpoint(parts, tmp_path):
    from transformers import AutoModel, AutoProcessor

    changes = changes_of(parts, tmp_path / "out") + ["processes=1", "sae.num_samples=16", "sae.d_sae=96"]
    for stage, batch_size in (("warmup", 4), ("sae", 256), ("segmentation", 4)):
        changes += [f"{stage}.max_steps=4", f"{stage}.batch_size={batch_size}", f"{stage}.lr_scheduler_type=constant"]
        changes += [f"{stage}.lr_scheduler_kwargs=null", f"{stage}.warmup_steps=0"]
    folder = run_recipe(read_recipe(RECIPE, changes))
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 12e6
    stored = load_file(folder / "model.safetensors")
    assert {t.dtype for t in stored.values() if t.is_floating_point()} <= {torch.float16, torch.float32}
    config = json.loads((folder / "config.json").read_text())
    assert str(tmp_path) not in json.dumps(config), "no path of this machine"
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert model.dtype == torch.float32
    sample = scenes.SceneRows("val", 1)[0]
    inputs = processor(images=sample["image"], instruction=sample["instruction"], return_tensors="pt")
    seg = model.segment(**inputs, max_new_tokens=24)
    assert seg.pred_masks.shape == (1, 4, IMAGE_SIZE // 2, IMAGE_SIZE // 2)
    assert (model.config.sae_layer, model.config.sae_config.d_sae) == (2, 96)
    assert (model.config.concept_threshold, processor.num_slots) == (0.25, 4)
