# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of the original code: to ours, the same numbers; and back, the same bits."""

import argparse
import json
import os
import shutil
import weakref

import pytest
import torch
from original_checkpoint import SAM_FIXTURE, SAM_HEADS, sam_pixels, write_original
from parity import CoreParity, golden, under
from safetensors.torch import load_file, save_file
from tiny import tiny_image, tiny_model, tiny_parts, tiny_processor
from transformers import AutoModel, AutoProcessor

from segcompass_hf.commands import convert
from segcompass_hf.commands.common import UserError
from segcompass_hf.files import check_disk_space, staged_folder
from segcompass_hf.hub.conversion.files import StoredTensor, open_weights, write_shards
from segcompass_hf.hub.conversion.from_original import convert_original_checkpoint, load_original_sae
from segcompass_hf.hub.conversion.segmenters import load_original_sam
from segcompass_hf.hub.conversion.to_original import convert_to_original_checkpoint
from segcompass_hf.modeling_segcompass import SegCompassForReasoningSegmentation

TOLD = {"sae_layer": 2, "ref_token_id": 91, "sam_config": SAM_HEADS}  # what the fixture's files do not say
TINY_SAM = {"mask_decoder_config": {"num_attention_heads": 2}}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The fixture's checkpoint in the original's files, the language model in three shards."""
    return write_original(tmp_path_factory.mktemp("runs") / "step_400", *golden("core"), shards=3)


@pytest.fixture(scope="module")
def converted(original, tmp_path_factory):
    output = tmp_path_factory.mktemp("converted") / "ours"
    return convert_original_checkpoint(original, output, max_shard_size=400_000, **TOLD)


@pytest.fixture
def copied(original, tmp_path):
    """A copy of the original's files to do harm to."""
    return shutil.copytree(original, tmp_path / "step")


def edit_side_file(folder, edit) -> None:
    side = torch.load(folder / "refseg_modules.pt")
    edit(side)
    torch.save(side, folder / "refseg_modules.pt")


class TestNumbers(CoreParity):
    """Every case of the `core` fixture through the converted checkpoint, loaded from its folder."""

    @pytest.fixture(scope="class")
    def vlm_folder(self, converted):
        return converted

    def build(self, vlm_folder, concept_input):
        model = AutoModel.from_pretrained(vlm_folder)
        assert model.config.concept_input == "duplicated"
        model.config.concept_input = concept_input
        return model


class TestToOurs:
    def test_configuration_does_what_the_original_does(self, converted):
        config = AutoModel.from_pretrained(converted).config
        assert (config.concept_input, config.concept_threshold) == ("duplicated", 2.0)
        assert (config.reference_search, config.reference_order) == ("sequence", "latest_first")
        assert (config.slot_logit_threshold, config.match_confidence_weight) == (0.5, 0.0)
        assert (config.empty_samples, config.valid_area_only) == ("zero", False)
        assert (config.seg_loss_weight, config.conf_loss_weight) == (0.3, 0.2)
        # read off the weights: query_book.slot_queries is (1, 4, 64), W_enc (48, 256), the fuser 3x3 over 4 heads
        assert (config.num_slots, config.d_slot, config.slot_encoder_layers, config.heatmap_heads) == (4, 64, 2, 4)
        assert (config.sae_config.d_in, config.sae_config.d_sae, config.sae_config.layer) == (48, 256, 2)
        vision = config.sam_config.vision_config
        # 16 x 16 positions of patches of 16; relative positions of 11 = 2 * 6 - 1 and 31 = 2 * 16 - 1
        assert (vision.image_size, vision.patch_size, vision.num_hidden_layers) == (256, 16, 2)
        assert (vision.window_size, vision.global_attn_indexes, vision.num_attention_heads) == (6, [1], 2)

    def test_image_encoder_computes_what_segment_anything_does(self, converted, original):
        expected = load_file(SAM_FIXTURE)["out.image_embeddings"]
        with torch.no_grad():
            found = AutoModel.from_pretrained(converted).encode_image(sam_pixels())
            alone = load_original_sam(original / "sam_vit.pth", SAM_HEADS).get_image_embeddings(sam_pixels())
        assert expected.std() > 0.5
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(alone, expected, atol=1e-5, rtol=0)

    def test_shards_keep_to_their_size(self, converted):
        shards = list(converted.glob("*.safetensors"))
        index = json.loads((converted / "model.safetensors.index.json").read_text())
        assert len(shards) > 3 and set(index["weight_map"].values()) == {shard.name for shard in shards}
        largest = max(weight.num_bytes for weight in open_weights(converted).values())
        assert all(shard.stat().st_size < max(400_000, largest) + 20_000 for shard in shards)  # + the header

    def test_sae_of_its_own_file(self, copied, tmp_path):
        side = torch.load(copied / "refseg_modules.pt")
        sae = under(side, "sae.")
        for epoch, change in ((2, 1.0), (10, 0.0)):
            state = {"sae": {name: w + change for name, w in sae.items()}, "optimizer": None, "epoch": epoch}
            torch.save(state, copied / f"ep_{epoch}.pt")
        edit_side_file(copied, lambda side: [side.pop(f"sae.{name}") for name in sae])
        with pytest.raises(FileNotFoundError, match="holds no SAE; pass the ep_N.pt"):
            convert_original_checkpoint(copied, tmp_path / "out", **TOLD)
        found = open_weights(convert_original_checkpoint(copied, tmp_path / "out", sae=copied, **TOLD))
        assert all(torch.equal(found[f"sae.{name}"].read(), weight) for name, weight in sae.items())  # of epoch 10
        alone = load_original_sae(copied, layer=2)
        assert alone.config.layer == 2 and torch.equal(alone.W_enc, sae["W_enc"])

    def test_another_dtype_leaves_positions_exact(self, original, tmp_path):
        folder = convert_original_checkpoint(original, tmp_path / "half", dtype="bfloat16", **TOLD)
        weights = open_weights(folder)
        wide = {name for name, weight in weights.items() if weight.dtype == torch.float32}
        assert wide == {name for name in weights if "positional_embedding" in name} and len(wide) == 1
        model = AutoModel.from_pretrained(folder)
        assert model.dtype == model.sae.dtype == torch.bfloat16
        assert model.sam.shared_image_embedding.positional_embedding.dtype == torch.float32


class TestRoundTrip:
    def test_to_ours_and_back(self, converted, original, tmp_path):
        back = convert_to_original_checkpoint(converted, tmp_path / "back", max_shard_size=100_000)
        first, second = (torch.load(folder / "refseg_modules.pt") for folder in (original, back))
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
        first, second = (open_weights(folder / "llm_hf") for folder in (original, back))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name].read(), second[name].read()) for name in first)
        first, second = (torch.load(folder / "sam_vit.pth") for folder in (original, back))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[n], second[n]) for n in first if n.startswith("image_encoder."))
        assert torch.load(back / "ep_0.pt")["sae"]["W_enc"].shape == (48, 256)
        again = convert_original_checkpoint(back, tmp_path / "again", **TOLD)
        assert (again / "config.json").read_text() == (converted / "config.json").read_text()

    @pytest.mark.parametrize("family,tie", [("llava", False), ("qwen2_5_vl", True)])
    def test_from_ours_and_back(self, family, tie, tmp_path, caplog):
        """A model of ours, with what makes it answer as it does told again; tied rows are stored once."""
        model = tiny_model(family, tie=tie).to(torch.bfloat16)
        model.config.mask_logit_threshold = 0.25
        model.save_pretrained(tmp_path / "ours")
        tiny_processor(family).save_pretrained(tmp_path / "ours")
        back = convert_to_original_checkpoint(tmp_path / "ours", tmp_path / "back")
        assert "slot_logit_threshold=0.0 (original: 0.5)" in caplog.text
        assert "mask_logit_threshold=0.25 (original: 0.0)" in caplog.text
        published = {"llava": "language_model.model.layers.0", "qwen2_5_vl": "model.layers.0"}[family]
        stored = open_weights(back / "llm_hf")
        assert any(name.startswith(published) for name in stored)
        assert ("lm_head.weight" in stored) == (family == "qwen2_5_vl" and not tie)
        told = {name: getattr(model.config, name) for name in ("concept_input", "concept_threshold")}
        told |= {"slot_encoder_heads": 4, "sam_config": TINY_SAM, "reference_search": "completion"}
        again = convert_original_checkpoint(
            back, tmp_path / "again", sae_layer=2, reference_order="earliest_first", **told
        )
        first, second = open_weights(tmp_path / "ours"), open_weights(again)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name].read(), second[name].read()) for name in first)
        loaded = AutoModel.from_pretrained(again)
        inputs = tiny_processor(family)(images=tiny_image(), instruction="red", reasoning="a", return_tensors="pt")
        inputs = {name: v.to(torch.bfloat16) if v.is_floating_point() else v for name, v in inputs.items()}
        with torch.no_grad():
            outputs = [m.eval()(**inputs) for m in (model, loaded)]
        assert outputs[0].pred_masks.float().std() > 0
        torch.testing.assert_close(outputs[1].pred_masks, outputs[0].pred_masks, atol=0, rtol=0)

    def test_what_the_original_has_no_place_for(self, tmp_path):
        tiny_model("llava", sae_config={"d_in": 32, "d_sae": 64, "architecture": "batchtopk", "k": 4}).save_pretrained(
            tmp_path / "ours"
        )
        with pytest.raises(ValueError, match="the SAE is 'batchtopk'"):
            convert_to_original_checkpoint(tmp_path / "ours", tmp_path / "back")
        tiny_model("llava", heatmap_concepts=True).save_pretrained(tmp_path / "seeing")
        with pytest.raises(ValueError, match="has heatmap_concepts"):
            convert_to_original_checkpoint(tmp_path / "seeing", tmp_path / "back")
        assert not (tmp_path / "back").exists()
        with pytest.raises(FileNotFoundError, match="no config.json"):
            convert_to_original_checkpoint(tmp_path, tmp_path / "back")


class TestTextParts:
    def write_text_parts(self, folder):
        """As the original registers its token: special, and nothing else."""
        parts = tiny_parts("qwen2_5_vl")
        parts["tokenizer"].add_tokens(["<REF_POS>"], special_tokens=True)
        parts["tokenizer"].save_pretrained(folder)
        parts["image_processor"].save_pretrained(folder)

    def test_processor_spells_the_think_tags_and_answers_freely(self, tmp_path):
        tiny_model("qwen2_5_vl").save_pretrained(tmp_path / "ours")
        back = convert_to_original_checkpoint(tmp_path / "ours", tmp_path / "back")
        told = {"sae_layer": 2, "slot_encoder_heads": 4, "sam_config": TINY_SAM}
        with pytest.raises(ValueError, match="no tokenizer; pass ref_token_id="):
            convert_original_checkpoint(back, tmp_path / "again", **told)
        self.write_text_parts(back / "llm_hf")
        with pytest.raises(ValueError, match=r"ref_token_id=7, but <REF_POS> is \d+"):
            convert_original_checkpoint(back, tmp_path / "again", ref_token_id=7, **told)
        folder = convert_original_checkpoint(back, tmp_path / "again", **told)
        processor, model = AutoProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder)
        assert "<think>" not in processor.tokenizer.get_vocab()
        assert model.config.ref_token_id == processor.ref_token_id
        assert model.config.think_start_token_id is None
        # Qwen's configuration names no padding, which the original takes from the tokenizer
        assert model.config.get_text_config().pad_token_id == processor.tokenizer.pad_token_id
        inputs = processor(images=tiny_image(), instruction="red", return_tensors="pt")
        sizes = {name: inputs[name] for name in ("original_sizes", "reshaped_input_sizes")}
        answer = model.segment(**inputs, max_new_tokens=3)
        result = processor.post_process_slots(answer, **sizes)[0]
        assert result["masks"].shape == (4, 30, 40)


def no_weights(folder):
    for path in (folder / "llm_hf").glob("model*"):
        path.unlink()


def sharded_only(folder):
    no_weights(folder)
    (folder / "model_world_size_8_rank_0.pt").touch()


def text_model(folder):
    (folder / "llm_hf" / "config.json").write_text(json.dumps({"model_type": "llama"}))


def truncated(folder):
    path = folder / "refseg_modules.pt"
    path.write_bytes(path.read_bytes()[:5000])


def harmful(folder):
    torch.save({"query_book.x": os.system}, folder / "refseg_modules.pt")


def nested(folder):
    torch.save({"model": {"a": torch.zeros(1)}}, folder / "refseg_modules.pt")


def odd_slots(side):
    side["query_book.slot_queries"] = torch.zeros(1, 4, 60)


def odd_projection(side):
    side["heatmap_head.k_proj.weight"] = torch.zeros(32, 8, 1, 1)


HARM = {
    "no side file": (lambda f: (f / "refseg_modules.pt").unlink(), FileNotFoundError, "refseg_modules.pt .the folder"),
    "no llm": (lambda f: shutil.rmtree(f / "llm_hf"), FileNotFoundError, "no folder .*llm_hf"),
    "no weights": (no_weights, FileNotFoundError, "holds no weights"),
    "sharded": (sharded_only, FileNotFoundError, "1 FSDP shards .*save_llm_hf=True"),
    "a shard": (
        lambda f: next((f / "llm_hf").glob("*2-of-*")).unlink(),
        FileNotFoundError,
        "lacks 1 of the 3 weight files .*00002-of-00003",
    ),
    "a cut shard": (
        lambda f: next((f / "llm_hf").glob("*2-of-*")).write_bytes(b"x" * 50),
        ValueError,
        "00002-of-00003.safetensors is damaged",
    ),
    "no sam": (lambda f: (f / "sam_vit.pth").unlink(), FileNotFoundError, "sam_vit_h_4b8939.pth"),
    "sam of another kind": (
        lambda f: torch.save({"a": torch.zeros(1)}, f / "sam_vit.pth"),
        ValueError,
        "no image_encoder.* .1 weights: a.",
    ),
    "a text model": (text_model, ValueError, "'llama' model, which does not read images"),
    "cut": (truncated, ValueError, "cannot be read as weights"),
    "harmful": (harmful, ValueError, "cannot be read as weights .*weights_only"),
    "nested": (nested, ValueError, r"no tensors: model \(dict\)"),
    "a missing key": (
        lambda f: edit_side_file(f, lambda side: side.pop("heatmap_head.k_proj.weight")),
        ValueError,
        "1 weights are missing .slot_mapper.key_proj.weight",
    ),
    "an extra key": (
        lambda f: edit_side_file(f, lambda side: side.update({"heatmap_head.new.weight": torch.zeros(2)})),
        ValueError,
        "1 have no place .slot_mapper.new.weight",
    ),
    "another part": (
        lambda f: edit_side_file(f, lambda side: side.update({"lora.weight": torch.zeros(2)})),
        ValueError,
        r"unknown parts \['lora'\]",
    ),
    "another shape": (
        lambda f: edit_side_file(f, odd_projection),
        ValueError,
        r"slot_mapper.key_proj.weight \(32, 8, 1, 1\) instead of \(32, 32, 1, 1\)",
    ),
    "slots that do not fit": (lambda f: edit_side_file(f, odd_slots), ValueError, "d_slot=60 must be a multiple"),
    "half an SAE": (
        lambda f: edit_side_file(f, lambda side: side.pop("sae.b_enc")),
        ValueError,
        r"the SAE holds \['W_dec', 'W_enc', 'b_dec'\]",
    ),
    "two SAEs": (
        lambda f: edit_side_file(f, lambda side: side.update({"sae.W_dec": torch.zeros(200, 48)})),
        ValueError,
        "of two different SAEs",
    ),
}


class TestRefusals:
    @pytest.mark.parametrize("harm", HARM)
    def test_says_what_is_wrong_and_leaves_nothing(self, harm, copied, tmp_path):
        do, kind, message = HARM[harm]
        do(copied)
        with pytest.raises(kind, match=message):
            convert_original_checkpoint(copied, tmp_path / "out", **TOLD)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step"]

    def test_two_sources_of_an_sae(self, original, tmp_path):
        with pytest.raises(ValueError, match="holds an SAE already"):
            convert_original_checkpoint(original, tmp_path / "out", sae=tmp_path, **TOLD)

    def test_an_sae_of_another_layer_width(self, original, tmp_path):
        with pytest.raises(ValueError, match="0 .embeddings. to 3"):
            convert_original_checkpoint(original, tmp_path / "out", **{**TOLD, "sae_layer": 9})

    def test_output_that_is_there(self, original, tmp_path):
        (tmp_path / "mine.txt").touch()
        with pytest.raises(FileExistsError, match="holds 1 files already"):
            convert_original_checkpoint(original, tmp_path, **TOLD)

    def test_files_of_the_old_torch_format(self, copied, tmp_path):
        side = torch.load(copied / "refseg_modules.pt")
        torch.save(side, copied / "refseg_modules.pt", _use_new_zipfile_serialization=False)
        found = open_weights(convert_original_checkpoint(copied, tmp_path / "out", **TOLD))
        assert torch.equal(found["sae.W_enc"].read(), side["sae.W_enc"])


class TestStreaming:
    def test_one_shard_in_memory(self, tmp_path):
        """Each tensor is read once, after the shard before it is gone."""
        alive: list[weakref.ref] = []
        most = []

        def tensor(value):
            def read():
                made = torch.full((100,), float(value))
                alive.append(weakref.ref(made))
                most.append(sum(reference() is not None for reference in alive))
                return made

            return StoredTensor((100,), torch.float32, read, "made")

        files = write_shards(tmp_path, {f"w{i}": tensor(i) for i in range(6)}, max_shard_size=800)  # two of 400 bytes
        assert files == [f"model-{i}-of-00003.safetensors" for i in ("00001", "00002", "00003")]
        assert len(most) == 6 and max(most) == 2
        found = open_weights(tmp_path)
        assert [found[f"w{i}"].read()[0].item() for i in range(6)] == [0, 1, 2, 3, 4, 5]

    def test_tied_weights_in_one_memory(self, tmp_path):
        both = torch.arange(6.0)
        views = {"a": both, "b": both, "c": both[3:]}
        write_shards(tmp_path, {name: StoredTensor.of(view, "f") for name, view in views.items()})
        assert load_file(tmp_path / "model.safetensors")["c"].tolist() == [3, 4, 5]

    def test_bin_files(self, tmp_path):
        torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
        assert open_weights(tmp_path)["a"].read().tolist() == [1, 1]

    def test_unknown_dtype(self, tmp_path):
        save_file({"a": torch.zeros(2, dtype=torch.uint16)}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="holds a as U16"):
            open_weights(tmp_path)


class TestStaging:
    def test_whole_or_not_at_all(self, tmp_path):
        output = tmp_path / "out"
        (tmp_path / "out.unfinished").mkdir()  # what a kill left
        (tmp_path / "out.unfinished" / "old").touch()
        with pytest.raises(RuntimeError, match="half way"), staged_folder(output) as folder:
            assert not any(folder.iterdir())
            (folder / "a").touch()
            raise RuntimeError("half way")
        assert not any(tmp_path.iterdir())
        output.mkdir()  # empty: taken over
        with staged_folder(output) as folder:
            (folder / "a").touch()
        assert [path.name for path in output.iterdir()] == ["a"]

    def test_no_room(self, tmp_path):
        with pytest.raises(OSError, match="GB free and 1000000000.0 GB"):
            check_disk_space(tmp_path, 10**18)


def test_composition_is_what_auto_model_gives(converted):
    assert isinstance(AutoModel.from_pretrained(converted), SegCompassForReasoningSegmentation)


class TestCommand:
    def run(self, *flags):
        parser = argparse.ArgumentParser()
        convert.add_parser(parser.add_subparsers())
        args = parser.parse_args(["convert", *map(str, flags)])
        args.run(args)

    def test_there_and_back(self, original, tmp_path, capsys):
        told = ["--sae-layer", 2, "--ref-token-id", 91, "--config", json.dumps({"sam_config": SAM_HEADS})]
        self.run(original, "--output", tmp_path / "ours", *told)
        self.run("--back", tmp_path / "ours", "--output", tmp_path / "back")
        out = capsys.readouterr().out
        assert f'segcompass predict IMAGE "INSTRUCTION" --model {tmp_path / "ours"}' in out
        assert (tmp_path / "back" / "refseg_modules.pt").is_file()

    def test_one_line_for_bad_input(self, original, tmp_path):
        with pytest.raises(UserError, match="takes no --sae-layer, --config"):
            self.run("--back", original, "--output", tmp_path / "x", "--sae-layer", 2, "--config", '{"a": 1}')
        with pytest.raises(UserError, match="there is no .*refseg_modules.pt"):
            self.run(tmp_path, "--output", tmp_path / "x")
        with pytest.raises(UserError, match="pass ref_token_id="):
            self.run(original, "--output", tmp_path / "x")
