# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Processors of VLM families of every shape: parts by keyword, absent parts, arguments, image tokens, backends."""

import copy
import json
import logging
import pickle
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
import vlm_families
from breadth.families import FAMILIES as BREADTH
from breadth.trial import Trial
from transformers import AutoConfig
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import is_torchvision_available

from segcompass_hf import SegCompassConfig, SegCompassForReasoningSegmentation, SegCompassProcessor
from segcompass_hf.vlm_processors_segcompass import (
    AbsentPart,
    _image_token_id,
    build_vlm_processor,
    own_arguments,
    processor_class,
)

EVERY_CLASS = pytest.mark.parametrize("name", sorted(vlm_families.FAMILIES))
IMAGES = [tiny.tiny_image(0), tiny.tiny_image(1, (90, 30))]
INSTRUCTIONS = ["the red one", "all the blue squares but not the small ring"]


def inputs_of(processor) -> dict:
    return dict(processor(images=IMAGES, instruction=INSTRUCTIONS))


def assert_same(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=0, atol=0, msg=name)


def config_for(class_name: str):
    """A default configuration of the first model type that a processor class goes with."""
    types = [model_type for model_type, name in PROCESSOR_MAPPING_NAMES.items() if name == class_name]
    return AutoConfig.for_model(types[0])


class TestFamilies:
    @EVERY_CLASS
    def test_images_and_text_are_prepared(self, name):
        processor = vlm_families.processor_of(name)
        inputs = inputs_of(processor)
        assert type(processor.vlm_processor).__name__ == name and "labels" not in inputs
        patch = vlm_families.FAMILIES[name].patch_token
        assert processor.image_token_id == processor.tokenizer.convert_tokens_to_ids(patch)
        counts = (inputs["input_ids"] == processor.image_token_id).sum(1)
        assert bool((counts > 0).all())
        # one by one the same ids: images go to their own texts
        for row, (image, words) in enumerate(zip(IMAGES, INSTRUCTIONS, strict=True)):
            alone = processor(images=image, instruction=words)
            kept = inputs["attention_mask"][row].bool()
            assert inputs["input_ids"][row][kept].tolist() == alone["input_ids"][0].tolist()

    @pytest.mark.parametrize(
        ("name", "tokens_per_tile"),
        # (14 x 14 patches of 28 pixels) 2 x 2; InternVL and Ovis by their argument
        [("AyaVisionProcessor", 4), ("InternVLProcessor", 4), ("Ovis2Processor", 4)],
    )
    def test_as_many_image_tokens_as_the_tiles_have(self, name, tokens_per_tile):
        processor = vlm_families.processor_of(name)
        inputs = inputs_of(processor)
        counts = (inputs["input_ids"] == processor.image_token_id).sum()
        assert int(counts) == tokens_per_tile * len(inputs["pixel_values"])

    @EVERY_CLASS
    def test_round_trips(self, name, tmp_path):
        processor = vlm_families.processor_of(name)
        expected = inputs_of(processor)
        processor.save_pretrained(tmp_path / "ours")
        loaded = SegCompassProcessor.from_pretrained(tmp_path / "ours")
        assert loaded.vlm_processor_kwargs == vlm_families.FAMILIES[name].arguments
        for same in (loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
            assert_same(inputs_of(same), expected)
        fields = json.loads((tmp_path / "ours" / "processor_config.json").read_text())
        assert not any(key.startswith("_") for key in fields)

    @EVERY_CLASS
    def test_from_a_folder_of_the_vlm(self, name, tmp_path):
        """Every saved argument reaches the family's processor, also where its class takes a video processor."""
        expected = inputs_of(vlm_families.processor_of(name))
        vlm_families.save_vlm(name, tmp_path, config_for(name))
        loaded = SegCompassProcessor.from_parts(str(tmp_path), tiny.tiny_sam_image_processor())
        assert loaded.vlm_processor_class == name
        arguments = vlm_families.FAMILIES[name].arguments
        assert {key: loaded.vlm_processor_kwargs[key] for key in arguments} == arguments
        assert_same(inputs_of(loaded), expected)

    @EVERY_CLASS
    def test_the_family_s_processor_can_be_taken_and_saved(self, name, tmp_path):
        processor = vlm_families.processor_of(name)
        rebuilt = SegCompassProcessor.from_parts(processor.vlm_processor, tiny.tiny_sam_image_processor())
        assert_same(inputs_of(rebuilt), inputs_of(processor))
        processor.vlm_processor.save_pretrained(tmp_path)  # without its absent parts, which are nowhere to be read
        fields = json.loads((tmp_path / "processor_config.json").read_text())
        assert fields["processor_class"] == name
        assert not {"video_processor", "feature_extractor"} & fields.keys()


class TestArguments:
    def test_signature_of_the_family_s_class(self):
        vlm_families.need("InternVLProcessor")
        assert list(own_arguments(processor_class("InternVLProcessor"))) == ["image_seq_length"]
        assert list(own_arguments(type(vlm_families.processor_of("InternVLProcessor").vlm_processor))) == [
            "image_seq_length"
        ]
        assert list(own_arguments(processor_class("Qwen2VLProcessor"))) == []

    def test_what_a_repository_leaves_to_the_model(self, tmp_path):
        """VipLLaVA's configuration has no vision_feature_select_strategy; its model drops the class token."""
        config = transformers.VipLlavaConfig(vision_config=transformers.CLIPVisionConfig(patch_size=14))
        parts = tiny.tiny_parts("llava")
        config.save_pretrained(tmp_path)
        parts["tokenizer"].save_pretrained(tmp_path)
        parts["image_processor"].save_pretrained(tmp_path)
        (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "LlavaProcessor"}))
        loaded = SegCompassProcessor.from_parts(str(tmp_path), tiny.tiny_sam_image_processor())
        assert loaded.vlm_processor_kwargs == {
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        }
        # 28 pixels are 2 x 2 patches of 14; the class token is added and dropped
        ids = loaded(images=IMAGES[0], instruction="it")["input_ids"]
        assert int((ids == loaded.image_token_id).sum()) == 4
        fields = {"processor_class": "LlavaProcessor", "patch_size": 7, "vision_feature_select_strategy": "full"}
        (tmp_path / "processor_config.json").write_text(json.dumps(fields))
        loaded = SegCompassProcessor.from_parts(str(tmp_path), tiny.tiny_sam_image_processor())
        assert loaded.vlm_processor_kwargs["patch_size"] == 7
        assert loaded.vlm_processor_kwargs["vision_feature_select_strategy"] == "full"


class TestAbsentParts:
    def test_answers_as_the_image_processor(self):
        image_processor = tiny.tiny_image_processor("qwen3_vl")
        part = AbsentPart("video_processor", image_processor)
        assert part.merge_size == 2 and part.model_input_names == []
        assert copy.deepcopy(part).merge_size == 2
        with pytest.raises(AttributeError, match="asks its video_processor for 'nothing_like_it'"):
            part.nothing_like_it  # noqa: B018
        with pytest.raises(ValueError, match="holds no video_processor"):
            part(["a film"])

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("InstructBlipProcessor", "needs a qformer_tokenizer besides"),
            ("EvollaProcessor", "takes no image_processor"),
        ],
    )
    def test_what_is_missing_is_named(self, name, message):
        if getattr(transformers, name, None) is None:
            pytest.skip(f"transformers {transformers.__version__} has no {name}")
        with pytest.raises(ValueError, match=message):
            build_vlm_processor(name, tiny.tiny_image_processor(), tiny.tiny_tokenizer(), None, {})

    @pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
    def test_torchvision_is_named(self, tmp_path):
        with pytest.raises(ImportError, match="PixtralProcessor needs torchvision"):
            processor_class("PixtralProcessor")
        config_for("Cohere2VisionProcessor").save_pretrained(tmp_path)
        tiny.tiny_tokenizer().save_pretrained(tmp_path)
        (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "Cohere2VisionProcessor"}))
        fields = {"image_processor_type": "Cohere2VisionImageProcessor"}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
        with pytest.raises(ImportError, match="exists only for torchvision, which is not installed"):
            SegCompassProcessor.from_parts(str(tmp_path))


class TestImageHandling:
    def test_flat_where_the_family_wants_it(self):
        processor = vlm_families.processor_of("GotOcr2Processor")
        assert not processor.image_handling.nested
        prompts = [processor.build_prompt(words) for words in INSTRUCTIONS]
        nested = processor(images=[[image] for image in IMAGES], text=prompts, return_tensors="pt", padding=True)
        own = processor.vlm_processor(images=IMAGES, text=prompts, return_tensors="pt", padding=True)
        assert_same(dict(nested), dict(own))
        assert tiny.tiny_processor("gemma3").image_handling.nested

    def test_a_user_s_mistake_keeps_the_family_s_message(self):
        processor = vlm_families.processor_of("InternVLProcessor")
        prompt = f"{processor.image_token} and {processor.image_token}"
        raised = []
        for call in (processor.vlm_processor, processor):  # one image, two places
            with pytest.raises((ValueError, StopIteration)) as error:
                call(images=[[IMAGES[0]]], text=[prompt], return_tensors="pt")
            raised.append((error.type, str(error.value)))
        assert raised[0] == raised[1]

    def test_token_types_only_where_the_models_take_them(self):
        processor = vlm_families.processor_of("Cosmos3EdgeProcessor")
        inputs = inputs_of(processor)
        is_image = inputs["input_ids"] == processor.image_token_id
        assert torch.equal(inputs["mm_token_type_ids"].bool(), is_image)
        for name in ("InternVLProcessor", "ChameleonProcessor"):  # could be asked, models without such an argument
            processor = vlm_families.processor_of(name)
            assert hasattr(processor.vlm_processor, "create_mm_token_type_ids")
            assert "mm_token_type_ids" not in inputs_of(processor)

    def test_labels_of_the_family_are_left_out(self):
        processor = vlm_families.processor_of("PaliGemmaProcessor")
        prompt = processor.build_prompt("it")
        assert "labels" in processor.vlm_processor(images=[[IMAGES[0]]], text=[prompt], return_tensors="pt")
        assert "labels" not in processor(images=[[IMAGES[0]]], text=[prompt], return_tensors="pt")
        with_answer = processor(images=IMAGES[0], instruction="it", reasoning="x")
        answer = with_answer["completion_mask"].bool()
        assert torch.equal(with_answer["labels"][answer], with_answer["input_ids"][answer])

    @pytest.mark.parametrize(
        ("named", "made", "expected"),
        [
            ([11, 12], [1, 11, 12, 12, 5, 6], 12),  # the family names a marker and patches
            ([11], [1, 11, 5, 6], 11),  # an image as a whole
            ([11], [1, 13, 13, 5, 6, 14], 13),  # neither is in the ids: what was put in and repeated
            ([11], [1, 3, 3, 20, 21, 22, 5, 6], None),  # padding, and ids that each stand for one place
            ([11], None, 11),  # the family's processor could not be tried
            ([], [1, 5, 6], None),
        ],
    )
    def test_the_id_of_a_patch_by_hand(self, named, made, expected):
        tokenizer = SimpleNamespace(pad_token_id=3, bos_token_id=1, eos_token_id=2, unk_token_id=0)
        processor = SimpleNamespace(tokenizer=tokenizer, image_token_ids=named)
        assert _image_token_id(processor, made, before=[1, 11, 5, 6]) == expected

    def test_measured_anew_for_another_tokenizer(self):
        processor = tiny.tiny_processor("gemma3")
        before = processor.image_handling
        assert processor.image_handling is before
        processor.tokenizer = copy.deepcopy(processor.tokenizer)
        assert processor.image_handling is not before and processor.image_handling == before


class TestImageToken:
    """The id is measured where a VLM is composed, and kept: the model never writes it, and reads it as image."""

    def vlm(self, **overrides):
        config = tiny.tiny_vlm_config("llava")
        for name, value in overrides.items():
            setattr(config, name, value)
        return transformers.LlavaForConditionalGeneration(config)

    def compose(self, vlm, processor, **kwargs):
        sam = transformers.SamModel(tiny.tiny_sam_config())
        sae_config = {"d_in": tiny.HIDDEN_SIZE, "d_sae": 64, "layer": 2}
        kwargs = {"sae_config": sae_config, "d_slot": 32, "slot_encoder_heads": 4} | kwargs
        return SegCompassForReasoningSegmentation.from_pretrained_parts(vlm, sam, processor=processor, **kwargs)

    def test_measured_id_is_kept(self):
        processor = tiny.tiny_processor("llava")
        image = processor.tokenizer.convert_tokens_to_ids("<image>")
        model = self.compose(self.vlm(), processor)
        assert model.config.image_token_id == image and model.vision_token_ids == [image]
        assert model.modality_ids(torch.tensor([[5, image, image, 7]])).tolist() == [[0, 1, 1, 0]]

    def test_of_a_vlm_that_names_none(self, tmp_path, caplog):
        """Chameleon's configuration has no id where no vocabulary map is given."""
        fields = {"vlm_config": {"model_type": "chameleon"}, "sae_layer": 2}
        unknown = SegCompassConfig(**fields)
        assert unknown.image_token_id is None
        SegCompassConfig(**fields, image_token_id=9).save_pretrained(tmp_path)
        assert SegCompassConfig.from_pretrained(tmp_path).image_token_id == 9
        model = tiny.tiny_model("llava")
        model.config.image_token_id = None
        logging.Logger.warning_once.cache_clear()  # another test may have heard it
        with caplog.at_level(logging.WARNING, "segcompass_hf"):
            assert model.modality_ids(torch.tensor([[5, 7]])).tolist() == [[0, 0]]
        assert "image tokens count as text" in caplog.text

    def test_disagreement_is_told(self, caplog):
        processor = tiny.tiny_processor("llava")
        with caplog.at_level(logging.WARNING, "segcompass_hf"):
            model = self.compose(self.vlm(image_token_id=3), processor)
        assert "(<image>) for image patches, but the VLM's configuration says that 3" in caplog.text
        assert model.config.image_token_id == processor.image_token_id

    def test_configurations_without_the_field_load_as_before(self):
        config = tiny.tiny_config("qwen2_5_vl")
        fields = config.to_dict()
        assert fields.pop("image_token_id") == config.vlm_config.image_token_id
        assert SegCompassConfig.from_dict(fields).image_token_id == config.vlm_config.image_token_id
        assert SegCompassConfig.from_dict(fields | {"image_token_id": 7}).image_token_id == 7


def test_pixels_are_the_same_wherever_a_processor_is_loaded(tmp_path):
    """With torchvision installed transformers would take its backend, which resizes to other pixels."""
    for family in ("llava", "qwen2_5_vl"):
        folder = tmp_path / family
        tiny.tiny_vlm_config(family).save_pretrained(folder)
        parts = tiny.tiny_parts(family)
        parts["tokenizer"].save_pretrained(folder)
        parts["image_processor"].save_pretrained(folder)
        fields = {"processor_class": parts["vlm_processor_class"], **parts["vlm_processor_kwargs"]}
        (folder / "processor_config.json").write_text(json.dumps(fields))
        first = SegCompassProcessor.from_parts(str(folder), tiny.tiny_sam_image_processor())
        first.save_pretrained(folder / "ours")
        second = SegCompassProcessor.from_pretrained(folder / "ours")
        for processor in (first, second):
            assert type(processor.image_processor) is type(parts["image_processor"])
            assert_same(inputs_of(processor), inputs_of(tiny.tiny_processor(family)))


def test_a_class_without_chat_template_gets_one():
    processor = vlm_families.processor_of("ChameleonProcessor")
    assert processor.vlm_processor.chat_template == processor.tokenizer.chat_template is not None


def test_places_of_the_image_follow_the_padding(tmp_path):
    """Kosmos-2.5's processor writes them as if every row began at the left: in padding, if it is padded."""
    trial = Trial("kosmos-2.5", BREADTH["kosmos-2.5"], tmp_path)
    processor = trial.new_processor()
    assert processor.image_handling.padding_ignored == ("image_embeds_position_mask",)
    batch, alone = trial.inputs_by(processor), trial.inputs_by(processor, (0,))
    padding = int((batch["attention_mask"][0] == 0).sum())
    assert padding > 0 and int(batch["attention_mask"][1].sum()) == batch["attention_mask"].shape[1]
    places = batch["image_embeds_position_mask"]
    assert torch.equal(places == 1, batch["input_ids"] == processor.image_token_id)
    assert torch.equal(places[0, padding:], alone["image_embeds_position_mask"][0])
    assert not places[0, :padding].any()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_families_that_heed_padding_are_left_alone(family):
    assert tiny.tiny_processor(family).image_handling.padding_ignored == ()
