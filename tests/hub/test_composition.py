# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""`segcompass init`: published parts to a ready-to-train checkpoint, or one clear line."""

import argparse
import json
import shutil

import pytest
import torch
from original_checkpoint import SAM_FIXTURE, write_original
from parity import golden
from published_mobile_sam import MOBILE_SAM_FIELDS, published_state
from safetensors.torch import load_file
from tiny import tiny_image, tiny_parts, tiny_sam_config, tiny_sam_image_processor, tiny_vlm_config
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, LlamaConfig, SamModel

from segcompass_hf import MobileSamModel, SegCompassSae, SegCompassSaeConfig
from segcompass_hf.commands import init
from segcompass_hf.commands.common import UserError
from segcompass_hf.hub.composition import compose_checkpoint
from segcompass_hf.hub.conversion.segmenters import convert_original_sam
from segcompass_hf.training.sae.sae_lens import save_sae_lens

SMALL = {"d_slot": 32, "d_sae": 64}


def save_vlm(folder, family, shards=False, **overrides):
    """A random VLM in its published format: original names, its own tokenizer and image processor, no `<REF_POS>`."""
    parts = tiny_parts(family)
    config = tiny_vlm_config(family, vocab_size=len(parts["tokenizer"]), **overrides)
    vlm = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    vlm.save_pretrained(folder, save_original_format=True, **({"max_shard_size": 60_000} if shards else {}))
    parts["tokenizer"].save_pretrained(folder)
    parts["image_processor"].save_pretrained(folder)
    return vlm


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of a sharded LLaVA, a Qwen2.5-VL, a Qwen3-VL, a SAM and SAEs."""
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    save_vlm(root / "llava", "llava", shards=True)
    save_vlm(root / "qwen2_5_vl", "qwen2_5_vl", tie=True)
    save_vlm(root / "qwen3_vl", "qwen3_vl")
    SamModel(tiny_sam_config()).save_pretrained(root / "sam")
    tiny_sam_image_processor().save_pretrained(root / "sam")
    sae = SegCompassSae(SegCompassSaeConfig(d_in=32, d_sae=48, layer=1))
    sae.save_pretrained(root / "sae")
    save_sae_lens(sae, root / "sae_lens")
    SegCompassSae(SegCompassSaeConfig(d_in=24, d_sae=48, layer=1)).save_pretrained(root / "narrow_sae")
    torch.save({"sae": sae.state_dict(), "optimizer": None, "epoch": 3}, root / "ep_3.pt")
    LlamaConfig(vocab_size=99, hidden_size=32).save_pretrained(root / "text_model")
    return root


class TestComposes:
    @pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
    def test_weights_are_those_of_the_parts(self, parts, family, tmp_path):
        made = compose_checkpoint(
            parts / family, parts / "sam", tmp_path / "new", num_slots=3, concept_threshold=1e-4, **SMALL
        )
        assert (made.vlm_type, made.num_slots, made.depth) == (family, 3, 4)
        assert (made.sae_layer, made.d_sae, made.sae_is_new) == (2, 64, True)  # half of 4 layers
        assert made.added_tokens == ["<REF_POS>", "<think>", "</think>"]
        model, processor = AutoModel.from_pretrained(tmp_path / "new"), AutoProcessor.from_pretrained(tmp_path / "new")
        assert model.config.ref_token_id == processor.ref_token_id and processor.num_slots == 3
        vlm, sam = AutoModelForImageTextToText.from_pretrained(parts / family), SamModel.from_pretrained(parts / "sam")
        rows, grown = vlm.get_input_embeddings().weight, model.get_input_embeddings().weight
        assert len(grown) == len(rows) + 3 == len(processor.tokenizer) and torch.equal(grown[: len(rows)], rows)
        state = model.vlm.state_dict()
        resized = [name for name, w in vlm.state_dict().items() if not torch.equal(state[name][: len(w)], w)]
        assert resized == []
        assert all(torch.equal(model.sam.state_dict()[name], w) for name, w in sam.state_dict().items())
        text = (tmp_path / "new" / "config.json").read_text()
        assert str(parts) not in text and str(tmp_path) not in text

        masks = [torch.zeros(1, 30, 40, dtype=torch.bool).index_fill(2, torch.arange(10), True).numpy()]
        inputs = processor(images=tiny_image(), instruction="red", reasoning="a", masks=masks, return_tensors="pt")
        output = model.freeze_for_training().train()(**inputs)
        output.loss.backward()
        assert (
            model.codebook.weight.grad.abs().sum() > 0 and model.sam.mask_decoder.mask_tokens.weight.grad is not None
        )
        answer = model.eval().segment(
            **processor(images=tiny_image(), instruction="red", return_tensors="pt"), max_new_tokens=8
        )
        assert (answer.sequences == model.config.ref_token_id).sum() >= 3

    @pytest.mark.parametrize("sae", ["sae", "sae_lens", "ep_3.pt"])
    def test_every_kind_of_sae(self, parts, sae, tmp_path):
        given = {"sae_layer": 1} if sae == "ep_3.pt" else {}  # that file does not say
        made = compose_checkpoint(parts / "llava", parts / "sam", tmp_path / "a", sae=parts / sae, d_slot=32, **given)
        assert (made.sae_layer, made.d_sae, made.sae_is_new, made.notes) == (1, 48, False, [])
        found = AutoModel.from_pretrained(tmp_path / "a").sae
        assert torch.equal(found.W_enc, SegCompassSae.from_pretrained(parts / "sae").W_enc)

    def test_sae_that_does_not_say_its_layer(self, parts, tmp_path):
        sae = parts / "ep_3.pt"
        made = compose_checkpoint(parts / "llava", parts / "sam", tmp_path / "a", sae=sae, d_slot=32)
        assert made.sae_layer == 2 and "does not say which layer" in made.notes[0]

    def test_a_warmed_up_segcompass_gets_its_sae(self, parts, tmp_path):
        own = {"concept_threshold": 0.5, "d_slot": 16, "mask_dice_weight": 0.7}
        settings = SMALL | own | {"num_slots": 2, "sae_layer": 1}
        compose_checkpoint(parts / "llava", parts / "sam", tmp_path / "start", **settings)
        first = AutoModel.from_pretrained(tmp_path / "start")
        with torch.no_grad():
            first.vlm.get_output_embeddings().weight.add_(0.5)  # the warm-up
        first.save_pretrained(tmp_path / "start")
        made = compose_checkpoint(tmp_path / "start", None, tmp_path / "next", sae=parts / "sae", mask_dice_weight=0.8)
        assert (made.num_slots, made.sae_layer, made.added_tokens) == (2, 1, [])
        second = AutoModel.from_pretrained(tmp_path / "next")
        assert {name: getattr(second.config, name) for name in own} == own | {"mask_dice_weight": 0.8}
        assert second.config.ref_token_id == first.config.ref_token_id and second.config.sae_config.d_sae == 48
        for part in ("vlm", "sam"):
            state = getattr(second, part).state_dict()
            assert all(torch.equal(state[name], w) for name, w in getattr(first, part).state_dict().items())

    def test_pixels_are_the_checkpoint_s_or_the_named_sam_s_and_scores_start_anew(self, parts, tmp_path):
        from tiny import tiny_model, tiny_processor

        whole, sam = tmp_path / "whole", tmp_path / "sam"
        calibration = {"features": {"slot_logit": {"mean": 1.0, "scale": 2.0, "weight": 0.5}}, "bias": 0.25}
        tiny_model(score_calibration=calibration, mask_logit_threshold=0.5).save_pretrained(whole)
        processor, statistics = tiny_processor(), ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        processor.sam_image_processor.image_mean, processor.sam_image_processor.image_std = statistics
        processor.save_pretrained(whole)
        shutil.copytree(parts / "sam", sam)
        own = {"image_mean": (0.7, 0.8, 0.9), "image_std": (0.3, 0.2, 0.1)}
        (sam / "preprocessor_config.json").write_text(json.dumps(own))
        for source, expected in ((None, statistics), (sam, tuple(own.values()))):
            made = compose_checkpoint(whole, source, tmp_path / f"with_{source is not None}", **SMALL)
            config = json.loads((made.folder / "config.json").read_text())
            assert config.get("score_calibration") is None and config["mask_logit_threshold"] == 0.5
            pixels = AutoProcessor.from_pretrained(made.folder).geometry
            assert (pixels.image_mean, pixels.image_std) == expected

    def test_dtype_and_original_sam(self, parts, tmp_path):
        core, description = golden("core")
        sam_file = write_original(tmp_path / "original", core, description) / "sam_vit.pth"
        weights = torch.load(sam_file)
        made = compose_checkpoint(parts / "llava", sam_file, tmp_path / "new", dtype="bfloat16", **SMALL)
        model = AutoModel.from_pretrained(made.folder)
        narrow = {p.dtype for name, p in model.named_parameters() if "positional_embedding" not in name}
        assert narrow == {torch.bfloat16}
        positions = weights["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"]
        assert torch.equal(model.sam.shared_image_embedding.positional_embedding, positions)
        first = load_file(SAM_FIXTURE)["image_encoder.patch_embed.proj.weight"]
        assert torch.equal(model.sam.vision_encoder.patch_embed.projection.weight, first.to(torch.bfloat16))
        assert AutoProcessor.from_pretrained(made.folder).canvas_size == 256

    def test_mobile_sam_as_its_file_or_as_a_converted_folder(self, parts, tmp_path):
        file = tmp_path / "mobile_sam.pt"
        torch.save(published_state(), file)
        folder = convert_original_sam(file, tmp_path / "folder", **MOBILE_SAM_FIELDS)
        expected = MobileSamModel.from_pretrained(folder).state_dict()
        for sam, canvas in ((file, 1024), (folder, 64)):
            made = compose_checkpoint(parts / "llava", sam, tmp_path / f"canvas {canvas}", **SMALL)
            model = AutoModel.from_pretrained(made.folder)
            assert type(model.sam) is MobileSamModel and model.config.sam_config.model_type == "mobile_sam"
            assert model.mask_stage.canvas == AutoProcessor.from_pretrained(made.folder).canvas_size == canvas
            for name, weight in model.sam.state_dict().items():
                assert torch.equal(weight, expected[name]), name


def cut_shard(folder):
    path = sorted(folder.glob("model-*"))[0]
    path.write_bytes(path.read_bytes()[:100])


REFUSED = {
    "a text model": ({"vlm": "text_model"}, ValueError, "'llama' model, which does not read images"),
    "a SAM as VLM": ({"vlm": "sam"}, ValueError, "'sam' model, which does not read images"),
    "a VLM as SAM": ({"sam": "llava"}, ValueError, "sam: .*'llava' model; expected a SAM"),
    "a VLM as SAE": ({"sae": "llava"}, ValueError, "sae: .*'llava' model; expected an SAE"),
    "no such folder": ({"vlm": "nothing"}, FileNotFoundError, "vlm: there is no file or folder"),
    "no SAM": ({"sam": None}, ValueError, "a bare VLM needs a SAM"),
    "a narrow SAE": ({"sae": "narrow_sae"}, ValueError, "of width 24, the VLM's are 32 wide. Use an SAE trained"),
    "another layer": ({"sae": "sae", "sae_layer": 2}, ValueError, "sae_layer=2, but the SAE was trained on layer 1"),
    "no such layer": ({"sae_layer": 4}, ValueError, "layer 4 is not in the VLM's 4 decoder layers .0 to 3"),
    "another size": ({"sae": "sae", "d_sae": 99}, ValueError, "d_sae=99 was asked for, the SAE has 48"),
    "slots": ({"d_slot": 30}, ValueError, "d_slot=30 must be a multiple of slot_encoder_heads=8"),
    "a dtype": ({"dtype": "int8"}, ValueError, "dtype is 'int8'; expected one of float32"),
}


class TestRefuses:
    @pytest.mark.parametrize("case", REFUSED)
    def test_wrong_parts(self, parts, case, tmp_path):
        changes, kind, message = REFUSED[case]
        named = {"vlm": "llava", "sam": "sam", **changes}
        named = {k: parts / v if k in ("vlm", "sam", "sae") and v else v for k, v in named.items()}
        with pytest.raises(kind, match=message):
            compose_checkpoint(named.pop("vlm"), named.pop("sam"), tmp_path / "new", **named)
        assert not any(tmp_path.iterdir())

    @pytest.mark.parametrize(
        "harm,message",
        [
            (lambda f: (f / "config.json").unlink(), "vlm: .*config.json"),
            (lambda f: [p.unlink() for p in f.glob("token*")], "vlm: .*lacks its tokenizer"),
            (lambda f: (f / "preprocessor_config.json").unlink(), "vlm: .*lacks its tokenizer or image processor"),
            (lambda f: sorted(f.glob("model-*"))[0].unlink(), "model-00001"),
            (cut_shard, "a weight file of .* is damaged"),
            (lambda f: (f / "config.json").write_text("{"), "vlm: "),
        ],
    )
    def test_damaged_vlm(self, parts, harm, message, tmp_path):
        shutil.copytree(parts / "llava", tmp_path / "vlm")
        harm(tmp_path / "vlm")
        with pytest.raises((OSError, ValueError), match=message):
            compose_checkpoint(tmp_path / "vlm", parts / "sam", tmp_path / "new", **SMALL)
        assert [path.name for path in tmp_path.iterdir()] == ["vlm"]

    def test_the_same_command_makes_the_same_heads(self, parts, tmp_path):
        for number in range(2):
            torch.manual_seed(number)
            compose_checkpoint(parts / "llava", parts / "sam", tmp_path / str(number), **SMALL)
        one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("0", "1"))
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())

    def test_a_full_disk_is_one_line(self, parts, tmp_path, monkeypatch):
        from safetensors import SafetensorError

        def fails(*args, **kwargs):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fails)
        with pytest.raises(OSError, match="^the disk of .* is full"):
            compose_checkpoint(parts / "llava", parts / "sam", tmp_path / "new", **SMALL)
        assert not any(tmp_path.iterdir())

    def test_output_is_never_overwritten(self, parts, tmp_path):
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "mine").touch()
        with pytest.raises(FileExistsError, match="holds 1 files already"):
            compose_checkpoint(parts / "llava", parts / "sam", tmp_path / "new")

    def test_interrupted_write(self, parts, tmp_path, monkeypatch):
        from segcompass_hf import SegCompassProcessor

        def stop(*args, **kwargs):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(SegCompassProcessor, "save_pretrained", stop)  # after the model's weights
            with pytest.raises(KeyboardInterrupt):
                compose_checkpoint(parts / "llava", parts / "sam", tmp_path / "new", **SMALL)
        assert not any(tmp_path.iterdir())
        compose_checkpoint(parts / "llava", parts / "sam", tmp_path / "new", **SMALL)  # the same command, once more
        assert [path.name for path in tmp_path.iterdir()] == ["new"]


class TestCommand:
    def run(self, *flags):
        parser = argparse.ArgumentParser()
        init.add_parser(parser.add_subparsers())
        args = parser.parse_args(["init", *map(str, flags)])
        args.run(args)

    def test_prints_what_to_do_next(self, parts, tmp_path, capsys):
        flags = ["--vlm", parts / "llava", "--sam", parts / "sam", "--output", tmp_path / "new"]
        self.run(*flags, "--d-sae", 64, "--d-slot", 32, "--num-slots", 2)
        out = capsys.readouterr().out
        assert "llava, 2 slots" in out and "SAE: 64 features on layer 2 of 4, untrained" in out
        steps = [line.split()[:3] for line in out.split("\nnext (")[1].splitlines()[1:]]
        assert [step[0] for step in steps] == ["1.", "2.", "3.", "4.", "5."]
        assert [step[2].split("/")[-1] for step in steps] == [
            "train_warmup.py",
            "train_sae.py",
            "init",
            "train_segmentation.py",
            "train_grpo.py",
        ]
        assert json.loads((tmp_path / "new" / "config.json").read_text())["num_slots"] == 2

    def test_with_a_trained_sae_it_goes_on_to_masks(self, parts, tmp_path, capsys):
        flags = ["--vlm", parts / "llava", "--sam", parts / "sam", "--output", tmp_path / "new"]
        self.run(*flags, "--sae", parts / "sae", "--d-slot", 32)
        out = capsys.readouterr().out
        assert "as given" in out and "train_warmup" not in out
        assert f"1. python examples/train_segmentation.py --model {tmp_path / 'new'}" in out

    def test_one_line_for_what_does_not_fit(self, parts, tmp_path):
        with pytest.raises(UserError, match="width 24"):
            flags = ["--vlm", parts / "llava", "--sam", parts / "sam", "--output", tmp_path / "new"]
            self.run(*flags, "--sae", parts / "narrow_sae")
        with pytest.raises(UserError, match="cannot read 'nobody/knows-this'|nobody/knows-this"):  # offline, in tests
            self.run("--vlm", "nobody/knows-this", "--sam", parts / "sam", "--output", tmp_path / "new")
