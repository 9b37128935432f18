# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""States out of the files that vLLM writes are those of transformers; files that hold something else are refused.

With a stand-in engine that writes as vLLM 0.31 does; what was run with vLLM itself is in `docs/how-to/vllm.md`.
"""

import fcntl
import sys

import pytest
import stand_in_vllm
import tiny
import torch
import vlm_families
from sae import harvester, rows, seeded, settings
from safetensors.torch import save_file
from tiny import tiny_model, tiny_processor

from segcompass_hf.data.sequence_states import TransformersStates, states_for_masks
from segcompass_hf.data.vllm_states import (
    VllmStates,
    check_layers,
    extraction_settings,
    read_states_file,
    unexpand_image_tokens,
)
from segcompass_hf.training.sae.activations import HarvestedTokens
from segcompass_hf.training.sae.cache import ActivationCache
from segcompass_hf.training.sae.cache_filling import cache_key
from segcompass_hf.training.sae.rows import RowEncoder, RowStream
from segcompass_hf.training.vllm_folder import export_for_vllm

LAYERS = (2, 4)  # the SAE's, and all


@pytest.fixture
def vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", stand_in_vllm)


def opened(family, tmp_path, layers=LAYERS, model=None):
    """Model, processor, and the states of an engine that runs its VLM."""
    model, processor = tiny_model(family) if model is None else model, tiny_processor(family)
    export_for_vllm(model, processor, tmp_path / "vlm")
    return model, processor, VllmStates.open(tmp_path / "vlm", processor, layers, tmp_path / "states")


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_states_are_those_of_transformers(family, tmp_path, vllm):
    model, processor, source = opened(family, tmp_path)
    batch = [*enumerate(rows(3)), (3, {"images": [None], "texts": ["the red circle"]})]
    inputs, images = RowEncoder(processor).with_images(batch)
    mask = inputs["attention_mask"].bool()
    assert not mask.all() and [len(pictures) for pictures in images] == [1, 1, 1, 0]
    found = source.states_of_layers([4, 2], inputs, images)
    expected = TransformersStates(model.vlm).states_of_layers([4, 2], inputs, images)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours[mask], theirs[mask], atol=1e-4, rtol=1e-4)
        assert ours.shape == theirs.shape and not ours[~mask].any()
    assert not torch.allclose(found[0], found[1])
    assert not list((tmp_path / "states").iterdir())  # files and locks are gone
    image = processor.image_token_id
    assert [sent["prompt_token_ids"].count(image) for sent in source.engine.prompts] == [1, 1, 1, 0]


def test_engine_is_opened_for_prompts_that_pass_whole(tmp_path, vllm):
    _, _, source = opened("llava", tmp_path, layers=(4, 2))
    assert source.layers == (2, 4) and source.dtype == torch.float32 and source.origin == "vLLM 0.0-stand-in"
    given = source.engine.settings
    assert {name: given[name] for name in extraction_settings((2, 4), tmp_path / "states")} == extraction_settings(
        (2, 4), tmp_path / "states"
    )
    assert given["dtype"] == "float32" and not given["enable_chunked_prefill"] and not given["enable_prefix_caching"]


class TestHarvest:
    def test_tokens_and_codes_are_those_of_transformers(self, tmp_path, vllm):
        model, processor, source = opened("llava", tmp_path, layers=[2])
        batch = list(enumerate(rows(4)))
        plain, through = harvester(model, processor), harvester(model, processor, state_source=source)
        expected, found = plain(batch), through(batch)
        torch.testing.assert_close(found.states, expected.states, atol=1e-4, rtol=1e-4)
        assert torch.equal(found.modality_ids, expected.modality_ids)
        sae = seeded(d_in=32, d_sae=64)
        codes, wanted = (sae(states.states).feature_acts for states in (found, expected))
        assert (wanted > 0).any() and not (wanted > 0).all()
        torch.testing.assert_close(codes, wanted, atol=1e-3, rtol=1e-3)

    def test_a_cache_names_what_computed_its_states(self, tmp_path, vllm):
        model, processor, source = opened("llava", tmp_path, layers=[2])
        stream = RowStream(rows(5), seed=0)
        plain = HarvestedTokens(harvester(model, processor), stream, 2)
        through = HarvestedTokens(harvester(model, processor, state_source=source), stream, 2)
        assert "state_source" not in cache_key(plain)
        caches = []
        for name, tokens in (("plain", plain), ("through", through)):
            caches.append(ActivationCache(tmp_path / name, cache_key(tokens), "float32"))
            caches[-1].fill(tokens, d_in=32)
        expected, found = (next(cache.batches((0, 0)))[1] for cache in caches)
        torch.testing.assert_close(found.states, expected.states, atol=1e-4, rtol=1e-4)
        with pytest.raises(ValueError, match="state_source"):
            ActivationCache(tmp_path / "through", cache_key(plain), "float32")

    def test_trainer_trains_the_same_sae(self, tmp_path, vllm):
        from segcompass_hf.training import SaeTrainer

        model, processor, source = opened("llava", tmp_path, layers=[2])
        trained = []
        for name, states in (("plain", None), ("through", source)):
            args = settings(tmp_path / name, max_steps=4, validation_share=0)
            trainer = SaeTrainer(model, args, rows(8), processing_class=processor, state_source=states)
            trainer.train()
            trained.append(trainer.model)
        assert source.engine.prompts
        torch.testing.assert_close(trained[1].W_dec, trained[0].W_dec, atol=1e-3, rtol=1e-3)


class TestMasks:
    def sequences(self, processor, reasoning="two candidates, a red circle"):
        batch = rows(2)
        images = [[row["image"]] for row in batch]
        inputs = processor(
            images=[row["image"] for row in batch],
            instruction=[row["instruction"] for row in batch],
            reasoning=[reasoning, "a ring"],
            return_tensors="pt",
        )
        return dict(inputs), images

    @pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
    def test_masks_are_those_of_the_model(self, family, tmp_path, vllm):
        model, processor, source = opened(family, tmp_path)
        inputs, images = self.sequences(processor)
        inputs.pop("labels")
        with torch.no_grad():
            expected = model(**inputs)
        completion, sizes = inputs["completion_mask"], inputs["reshaped_input_sizes"]
        states = states_for_masks(source, model, inputs, images, completion)
        found = model.read_finite_masks(states, model.encode_image(inputs["sam_pixel_values"]), sizes)
        assert expected.reference_states.any()  # there are <REF_POS>
        for name in ("reference_states", "slots", "slot_logits", "heatmap_logits", "pred_masks"):
            torch.testing.assert_close(found[name], expected[name], atol=1e-3, rtol=1e-3)

    def test_of_rollouts(self, tmp_path, vllm):
        from grpo import tiny_rows

        from segcompass_hf.training.grpo.rollouts import masks_of_rollouts
        from segcompass_hf.training.grpo.targets import segmentation_targets

        model, processor, source = opened("llava", tmp_path, model=tiny_model("llava").eval())
        batch = list(tiny_rows())
        prompts = [processor.build_messages(row["instruction"], row["image"]) for row in batch]
        texts = [processor.build_completion(words) for words in ("a box", "it rains", "two cups, a plate", "none")]
        completions = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        assert len(set(map(len, completions))) > 1
        targets = segmentation_targets(batch, processor, model, torch.device("cpu"))
        arguments = (model, processor, prompts, completions, targets, 3)
        expected, found = masks_of_rollouts(*arguments), masks_of_rollouts(*arguments, state_source=source)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-3, rtol=1e-3)

    def test_a_second_pass_is_no_source_s(self, tmp_path, vllm):
        model, processor, source = opened("llava", tmp_path)
        model.config.concept_input = "duplicated"
        inputs, images = self.sequences(processor)
        with pytest.raises(ValueError, match="second pass"):
            states_for_masks(source, model, inputs, images, inputs["completion_mask"])


class TestChecks:
    def asked(self, source, processor, layers=(2,)):
        inputs, images = RowEncoder(processor).with_images([(0, rows()[0])])
        return source.states_of_layers(layers, inputs, images)

    def test_a_layer_that_is_not_kept(self, tmp_path, vllm):
        _, processor, source = opened("llava", tmp_path)
        with pytest.raises(ValueError, match=r"layers \[3\] are asked for.*keeps those of \[2, 4\]"):
            self.asked(source, processor, [2, 3])

    def test_layers_of_a_vlm(self):
        config = tiny_model("qwen3_vl").vlm.config
        assert check_layers([4, 2, 2, 0], config) == (0, 2, 4)
        for wrong in ([5], [-1], []):
            with pytest.raises(ValueError, match="expected some of 0 to 4"):
                check_layers(wrong, config)
        with pytest.raises(ValueError, match=r"first 1 layers .* layers \[1\] have them in"):
            check_layers([1, 4], config)

    def test_other_tokens(self, tmp_path, vllm):
        _, processor, source = opened("llava", tmp_path)
        number = len(RowEncoder(processor)([(0, rows()[0])])["input_ids"][0])
        generate = source.engine.generate

        def other(prompts, *args, **kwargs):
            changed = [{**prompt, "prompt_token_ids": [*prompt["prompt_token_ids"][:-1], 7]} for prompt in prompts]
            return generate(changed, *args, **kwargs)

        source.engine.generate = other
        with pytest.raises(ValueError, match=f"{number} tokens.*first that differs is number {number - 1}"):
            self.asked(source, processor)
        assert not list((tmp_path / "states").iterdir())

    @pytest.mark.parametrize(
        ("change", "message"),
        [({"layers": (2,)}, r"\(\d+, 2, 32\) of torch.float32"), ({"dtype": torch.bfloat16}, "of torch.bfloat16")],
    )
    def test_other_shape_or_dtype(self, change, message, tmp_path, vllm):
        _, processor, source = opened("llava", tmp_path)
        vars(source).update(change)
        with pytest.raises(ValueError, match=f"{message}.*another model, layers or dtype"):
            self.asked(source, processor)

    def test_an_engine_that_writes_no_file(self, tmp_path, vllm):
        _, processor, source = opened("llava", tmp_path)
        source.engine.layers = []
        with pytest.raises(ValueError, match="without a file of hidden states"):
            self.asked(source, processor)

    def test_files(self, tmp_path):
        path = tmp_path / "0.safetensors"
        with pytest.raises(ValueError, match="no file of hidden states"):
            read_states_file(path)
        path.write_bytes(b"half")
        with pytest.raises(ValueError, match="no file of hidden states"):
            read_states_file(path)
        save_file({"states": torch.zeros(1)}, path)
        with pytest.raises(ValueError, match="no file of hidden states"):
            read_states_file(path)
        save_file({"hidden_states": torch.ones(2, 1, 3), "token_ids": torch.tensor([5, 6])}, path)
        ids, states = read_states_file(path)  # without a lock, as older versions leave it
        assert ids == [5, 6] and states.shape == (2, 1, 3)
        with open(f"{path}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(TimeoutError, match="0.safetensors within 0 s"):
                read_states_file(path, timeout=0.02)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_one_placeholder_per_image(family):
    processor = tiny.tiny_processor(family)
    prompt = processor.build_prompt("the red square")
    short = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    expanded = processor(images=[tiny.tiny_image()], text=[prompt], add_special_tokens=False)["input_ids"][0]
    assert len(expanded) > len(short)
    assert unexpand_image_tokens(expanded, processor) == short
    with pytest.raises(ValueError, match="2 images go with it"):
        unexpand_image_tokens(expanded, processor, num_images=2)


def test_families_whose_text_and_ids_name_an_image_differently_are_refused():
    processor = vlm_families.processor_of("Ovis2Processor")  # `<image>` in the text, `<IMG_ATOM>` in the ids
    prompt = processor.build_prompt("the red square")
    ids = processor(images=[[tiny.tiny_image()]], text=[prompt], return_tensors="pt")["input_ids"][0].tolist()
    with pytest.raises(ValueError, match=r"Ovis2Processor writes other tokens .*'<image>'\); use use_vllm=False"):
        unexpand_image_tokens(ids, processor)
