# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Configuration: nested configs, defaults of the SAE layer, validation, round trip."""

import json

import pytest
from transformers import LlavaConfig, Qwen2_5_VLConfig, Qwen3VLConfig, SamConfig

from segcompass_hf.configuration_segcompass import SegCompassConfig, SegCompassSaeConfig


def llava(depth: int = 32, width: int = 64) -> LlavaConfig:
    return LlavaConfig(text_config={"model_type": "llama", "num_hidden_layers": depth, "hidden_size": width})


class TestNestedConfigs:
    def test_defaults(self):
        config = SegCompassConfig()
        assert config.vlm_config.model_type == "llava"
        assert config.sam_config.model_type == "sam"
        assert config.sae_config.d_in == config.vlm_config.text_config.hidden_size == 4096
        assert config.sae_config.d_sae == 65536

    def test_objects_dicts_and_none_are_the_same(self):
        sam = SamConfig(vision_config={"image_size": 64, "patch_size": 8})
        from_objects = SegCompassConfig(vlm_config=llava(), sam_config=sam, sae_config=SegCompassSaeConfig(d_in=64))
        from_dicts = SegCompassConfig(
            vlm_config=llava().to_dict(), sam_config=sam.to_dict(), sae_config={"d_sae": 65536}
        )
        assert from_objects.to_dict() == from_dicts.to_dict()
        assert from_dicts.sae_config.d_in == 64  # the VLM's width

    def test_a_loaded_models_config_is_left_alone(self):
        vlm_config = llava()
        vlm_config._attn_implementation = "eager"
        config = SegCompassConfig(vlm_config=vlm_config)
        assert vlm_config._attn_implementation == vlm_config.text_config._attn_implementation == "eager"
        assert config.vlm_config is not vlm_config
        assert config.vlm_config.text_config._attn_implementation == "eager"

    def test_attention_implementation_reaches_every_part(self):
        config = SegCompassConfig(vlm_config=llava(), attn_implementation="eager")
        parts = (config.vlm_config, config.vlm_config.text_config, config.sam_config)
        assert [part._attn_implementation for part in parts] == ["eager"] * 3

    def test_text_config_and_image_token_are_the_vlms(self):
        config = SegCompassConfig(vlm_config=Qwen2_5_VLConfig(image_token_id=77))
        assert config.get_text_config() is config.vlm_config.text_config
        assert config.get_text_config(decoder=True) is config.vlm_config.text_config
        assert (config.image_token_id, config.video_token_id) == (77, config.vlm_config.video_token_id)
        assert config.hidden_size == config.vlm_config.text_config.hidden_size
        llava_config = SegCompassConfig(vlm_config={"model_type": "llava", "image_token_index": 5})
        assert (llava_config.image_token_id, llava_config.video_token_id) == (5, None)


class TestSaeLayer:
    @pytest.mark.parametrize(
        "vlm_config, expected",
        [
            (llava(32), 16),  # LLaVA-1.5-7B
            (llava(40), 16),  # 13B: the paper's layer, not half the depth
            (llava(4), 2),  # too shallow for 16
            (Qwen2_5_VLConfig(text_config={"num_hidden_layers": 28}), 13),
            (Qwen3VLConfig(text_config={"num_hidden_layers": 36}), 18),
        ],
    )
    def test_default(self, vlm_config, expected):
        assert SegCompassConfig(vlm_config=vlm_config).sae_layer == expected

    def test_the_saes_own_layer_comes_before_the_default(self):
        assert SegCompassConfig(vlm_config=llava(), sae_config={"layer": 9}).sae_layer == 9

    def test_a_given_layer_comes_first(self):
        assert SegCompassConfig(vlm_config=llava(), sae_layer=3, sae_config={"layer": 9}).sae_layer == 3


class TestValidation:
    @pytest.mark.parametrize(
        "field, message",
        [
            ({"num_slots": "four"}, "num_slots.*expected int, got str"),
            ({"num_slots": 0}, "num_slots must be at least 1, got 0"),
            ({"sae_layer": 32}, r"0 \(embeddings\) to 31 for a VLM of 32 layers, got 32"),
            ({"sae_layer": -1}, "got -1"),
            ({"sae_config": {"d_in": 3}}, r"width 3 \(d_in\), the VLM's are 64 wide"),
            ({"concept_input": "twice"}, "expected one of"),
            ({"d_slot": 100}, "d_slot=100 must be a multiple of slot_encoder_heads=8"),
            ({"concept_threshold": -0.5}, "cannot be negative, got -0.5"),
        ],
    )
    def test_bad_fields(self, field, message):
        with pytest.raises(Exception, match=f"(?s){message}"):
            SegCompassConfig(vlm_config=llava(), **field)

    @pytest.mark.parametrize(
        "fields, message",
        [
            ({"architecture": "topk"}, "needs 1 <= k <= d_sae=65536, got k=None"),
            ({"architecture": "batchtopk", "k": 0}, "got k=0"),
            ({"activation": "topk"}, "got k=None"),
            ({"architecture": "relu"}, "expected one of"),
            ({"d_sae": 0}, "must be positive"),
        ],
    )
    def test_bad_sae_fields(self, fields, message):
        with pytest.raises(Exception, match=message):
            SegCompassSaeConfig(**fields)

    def test_top_k_with_k(self):
        assert SegCompassSaeConfig(architecture="topk", k=32).k == 32


class TestRoundTrip:
    def test_save_and_load(self, tmp_path):
        config = SegCompassConfig(
            vlm_config=Qwen3VLConfig(text_config={"num_hidden_layers": 6, "hidden_size": 32}),
            sam_config={"vision_config": {"image_size": 64, "patch_size": 8}},
            sae_config={"d_sae": 128, "architecture": "topk", "k": 8, "layer": 2},
            num_slots=6,
            concept_threshold=0.25,
            train_token_rows="both",
            ref_token_id=11,
        )
        config.save_pretrained(tmp_path)
        loaded = SegCompassConfig.from_pretrained(tmp_path)
        assert loaded.to_dict() == config.to_dict()
        assert type(loaded.vlm_config) is Qwen3VLConfig
        assert type(loaded.sam_config) is SamConfig
        assert type(loaded.sae_config) is SegCompassSaeConfig
        assert (loaded.sae_config.k, loaded.sam_config.vision_config.image_size, loaded.sae_layer) == (8, 64, 2)

    def test_json_holds_the_nested_model_types(self, tmp_path):
        SegCompassConfig(vlm_config=llava()).save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        assert saved["model_type"] == "segcompass"
        assert [saved[f"{part}_config"]["model_type"] for part in ("vlm", "sam", "sae")] == [
            "llava",
            "sam",
            "segcompass_sae",
        ]
