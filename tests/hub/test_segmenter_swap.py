# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""`segcompass init --from`: another segmenter in a trained checkpoint, and nothing else changed."""

import argparse
import json
import shutil

import pytest
import torch
from published_mobile_sam import published_state
from safetensors.torch import load_file
from tiny import tiny_image, tiny_model, tiny_processor, tiny_sam_config, tiny_segmenter
from transformers import AutoModel, AutoProcessor, SamModel

from segcompass_hf import SegCompassConfig
from segcompass_hf.commands import init
from segcompass_hf.commands.common import UserError
from segcompass_hf.explain.dictionary.store import NUMBERS_FILE
from segcompass_hf.hub.segmenter_swap import swap_segmenter

CALIBRATION = {"features": {"slot_logit": {"mean": 1.0, "scale": 2.0, "weight": 0.5}}, "bias": 0.25}
NEW = ("slot_mapper.query_proj.", "slot_mapper.key_proj.", "slot_mapper.head_fuser.", "sam.")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of a whole model with a calibration, a SAM of another canvas with more channels, a SAM 2 and a VLM."""
    root = tmp_path_factory.mktemp("parts")
    model = tiny_model(score_calibration=CALIBRATION)
    model.save_pretrained(root / "whole")
    tiny_processor(instruction_template="Where is {instruction}?").save_pretrained(root / "whole")
    (root / "whole" / NUMBERS_FILE).write_bytes(b"a dictionary")
    torch.manual_seed(1)
    SamModel(tiny_sam_config(canvas=96, patch_size=16, hidden_size=64)).save_pretrained(root / "sam")
    tiny_segmenter("sam2").save_pretrained(root / "sam2")
    model.vlm.save_pretrained(root / "vlm")
    return root


def read(folder):
    """Slots, reference states and confidences of a sequence, and the masks' shape."""
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    inputs = processor(images=tiny_image(), instruction="the red circle", reasoning="left", return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs)
    return model, processor, output


@pytest.mark.parametrize(("kind", "map_side", "channels", "canvas"), [("sam", 24, 64, 96), ("sam2", 32, 32, 64)])
def test_everything_that_reads_the_vlm_stays(kind, map_side, channels, canvas, parts, tmp_path):
    made = swap_segmenter(parts / "whole", parts / kind, tmp_path / "new")
    assert made.new_modules == ["slot_mapper.query_proj", "slot_mapper.key_proj", "slot_mapper.head_fuser"]
    assert not made.sae_is_new and len(made.notes) == 1 and "calibration" in made.notes[0]
    old, old_processor, before = read(parts / "whole")
    new, processor, after = read(tmp_path / "new")
    for name in ("slots", "reference_states", "slot_logits"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name
    assert before.pred_masks.shape[-2:] == (32, 32)
    assert after.pred_masks.shape[-2:] == (map_side, map_side)  # 4 x 96 / 16 and 4 x 64 / 8
    state, sam = new.state_dict(), load_file(parts / kind / "model.safetensors")
    kept = {name: weight for name, weight in old.state_dict().items() if not name.startswith(NEW)}
    assert all(torch.equal(state[name], weight) for name, weight in kept.items())
    assert all(torch.equal(state[f"sam.{name}"], weight) for name, weight in sam.items())
    assert new.slot_mapper.key_proj.weight.shape[0] == channels and new.slot_mapper.query_proj.weight.std() > 0
    assert old.config.score_calibration == CALIBRATION and new.config.score_calibration is None
    assert (processor.canvas_size, processor.geometry.fit) == (canvas, {"sam": "pad", "sam2": "stretch"}[kind])
    assert processor.build_prompt("it") == old_processor.build_prompt("it")
    assert (tmp_path / "new" / NUMBERS_FILE).read_bytes() == b"a dictionary"
    assert str(parts) not in (tmp_path / "new" / "config.json").read_text()


def test_heatmap_concepts_stay_switched_on_and_their_projection_is_new(parts, tmp_path):
    tiny_model(heatmap_concepts=True).save_pretrained(tmp_path / "whole")
    tiny_processor(image_token_grids=True).save_pretrained(tmp_path / "whole")
    made = swap_segmenter(tmp_path / "whole", parts / "sam", tmp_path / "new")
    assert "slot_mapper.concept_proj" in made.new_modules
    model, processor, output = read(tmp_path / "new")
    assert processor.image_token_grids is True and model.config.heatmap_concepts is True
    assert tuple(model.slot_mapper.concept_proj.weight.shape) == (64, 32) and output.pred_masks.shape[-1] == 24
    assert not model.slot_mapper.concept_proj.weight.any()


def test_ids_and_pixels_that_only_the_checkpoint_knows_stay(parts, tmp_path):
    """The id of image patches may stand in no configuration of the VLM's; pixels are a folder's own."""
    shutil.copytree(parts / "whole", tmp_path / "whole")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    (tmp_path / "whole" / "config.json").write_text(json.dumps(config | {"image_token_id": 7}))
    shutil.copytree(parts / "sam2", tmp_path / "sam2")
    statistics = {"image_mean": (0.1, 0.2, 0.3), "image_std": (0.4, 0.5, 0.6)}
    (tmp_path / "sam2" / "preprocessor_config.json").write_text(json.dumps(statistics))
    swap_segmenter(tmp_path / "whole", tmp_path / "sam2", tmp_path / "new")
    assert SegCompassConfig.from_pretrained(tmp_path / "new").image_token_id == 7
    pixels = AutoProcessor.from_pretrained(tmp_path / "new").geometry
    assert {name: getattr(pixels, name) for name in statistics} == statistics


def test_the_same_command_makes_the_same_new_parts(parts, tmp_path):
    for number in range(2):
        torch.manual_seed(number)
        swap_segmenter(parts / "whole", parts / "sam", tmp_path / str(number))
    one, other = (AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("0", "1"))
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_a_dtype_holds_for_everything_but_positions(parts, tmp_path):
    swap_segmenter(parts / "whole", parts / "sam", tmp_path / "new", dtype="bfloat16")
    weights = AutoModel.from_pretrained(tmp_path / "new").named_parameters()
    assert {w.dtype for name, w in weights if "positional_embedding" not in name} == {torch.bfloat16}


def test_a_dtype_holds_for_a_segmenter_in_its_authors_file_too(parts, tmp_path):
    torch.save(published_state(), tmp_path / "mobile_sam.pt")
    swap_segmenter(parts / "whole", tmp_path / "mobile_sam.pt", tmp_path / "new", dtype="bfloat16")
    weights = AutoModel.from_pretrained(tmp_path / "new").sam.named_parameters()
    assert {w.dtype for name, w in weights if "positional_embedding" not in name} == {torch.bfloat16}


def test_wrong_parts_are_named(parts, tmp_path):
    with pytest.raises(ValueError, match="'llava' model; another segmenter goes into a SegCompass checkpoint"):
        swap_segmenter(parts / "vlm", parts / "sam", tmp_path / "new")
    with pytest.raises(ValueError, match="sam: .*'llava' model; expected a SAM"):
        swap_segmenter(parts / "whole", parts / "vlm", tmp_path / "new")
    SamModel(tiny_sam_config(hidden_size=20)).save_pretrained(tmp_path / "narrow")
    whole = tiny_model(heatmap_heads=8)
    whole.save_pretrained(tmp_path / "eight")
    tiny_processor().save_pretrained(tmp_path / "eight")
    with pytest.raises(ValueError, match="20 channels and heatmap_heads is 8"):
        swap_segmenter(tmp_path / "eight", tmp_path / "narrow", tmp_path / "new")
    assert not (tmp_path / "new").exists()


class TestCommand:
    def run(self, *flags):
        parser = argparse.ArgumentParser()
        init.add_parser(parser.add_subparsers())
        args = parser.parse_args(["init", *map(str, flags)])
        args.run(args)

    def test_says_what_is_new_and_what_to_do_next(self, parts, tmp_path, capsys):
        self.run("--from", parts / "whole", "--sam", parts / "sam", "--output", tmp_path / "new")
        out, notes = capsys.readouterr()
        assert "new, to be trained: slot_mapper.query_proj, slot_mapper.key_proj, slot_mapper.head_fuser\n" in out
        assert "as given" in out and "calibration" in notes
        assert f"1. python examples/train_segmentation.py --model {tmp_path / 'new'}" in out
        assert "--trainable masks" in out and "2. segcompass calibrate" in out
        assert json.loads((tmp_path / "new" / "config.json").read_text())["num_slots"] == 4

    def test_refuses_what_would_change_what_is_kept(self, parts, tmp_path):
        flags = ["--from", parts / "whole", "--output", tmp_path / "new"]
        with pytest.raises(UserError, match="leave out --num-slots, --d-sae"):
            self.run(*flags, "--sam", parts / "sam", "--d-sae", 8, "--num-slots", 2)
        with pytest.raises(UserError, match="name one with --sam"):
            self.run(*flags)
