# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""4-bit and 8-bit bases on the CPU: what is quantised, that outputs and gradients are right, and QLoRA training."""

import bitsandbytes as bnb
import pytest
import tiny
import torch
from adapters import cast_as_trl_does, largest_difference, move, outputs_of, trainable
from model_inputs import inputs_of
from peft import get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
)

import segcompass_hf  # noqa: F401  registers the Auto classes
from segcompass_hf.modeling_segcompass import SegCompassForReasoningSegmentation
from segcompass_hf.training.adapters import load_adapter, lora_config, restore_head_precision
from segcompass_hf.training.quantization import check_quantization, quantization_config, quantized_modules

CPU = {"": "cpu"}
LINEAR = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
DECODER = {f"vlm.model.language_model.layers.{layer}.{name}" for layer in range(4) for name in LINEAR}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder per family with a tiny model in full precision."""
    folders = {family: tmp_path_factory.mktemp(family) for family in tiny.FAMILIES}
    for family, folder in folders.items():
        tiny.tiny_model(family).save_pretrained(folder)
    return folders


def load(folder, bits: int = 4, **kwargs):
    config = quantization_config(tiny.tiny_config(), bits=bits)
    kwargs = {"quantization_config": config, "device_map": CPU, **kwargs}
    return SegCompassForReasoningSegmentation.from_pretrained(folder, **kwargs)


def dequantized(model, family: str = "llava"):
    """The same model in full precision, with the weights that the 4-bit one computes with."""
    plain = tiny.tiny_model(family)
    for name in DECODER:
        weight = model.get_submodule(name).weight
        plain.get_submodule(name).weight.data = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    return plain


def qlora(folder, **kwargs):
    model = load(folder, **kwargs)
    torch.manual_seed(0)  # LoRA starts at random
    return get_peft_model(model, lora_config(model, r=4, dropout=0.0)).eval()


def falling_losses(model, steps: int = 5) -> bool:
    """Whether a few steps on one batch lower the loss by a tenth."""
    optimizer = torch.optim.AdamW(model.parameter_groups(3e-3))
    losses = []
    for _ in range(steps):
        losses.append(model(**inputs_of(training=True)).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return bool(losses[-1] < 0.9 * losses[0])


class TestWhatIsQuantised:
    @pytest.mark.parametrize("family", tiny.FAMILIES)
    @pytest.mark.parametrize("bits, kind", [(4, bnb.nn.Linear4bit), (8, bnb.nn.Linear8bitLt)])
    def test_the_decoders_linear_layers_only(self, bases, family, bits, kind):
        plain = tiny.tiny_model(family)
        config = quantization_config(plain, bits=bits)
        model = SegCompassForReasoningSegmentation.from_pretrained(
            bases[family], quantization_config=config, device_map=CPU
        )
        assert set(quantized_modules(model)) == DECODER and check_quantization(model) == quantized_modules(model)
        assert all(isinstance(model.get_submodule(name), kind) for name in DECODER)
        expected = plain.state_dict()
        for name, value in model.named_parameters():
            if name.rsplit(".", 1)[0] not in DECODER:
                assert value.dtype == torch.float32 and torch.equal(value, expected[name]), name

    def test_the_skip_list_is_filled_in(self, bases):
        given = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        model = AutoModel.from_pretrained(bases["llava"], quantization_config=given, device_map=CPU)
        assert set(quantized_modules(model)) == DECODER
        assert given.llm_int8_skip_modules is None  # the caller's own is left alone

    def test_a_configuration_as_a_dict(self, bases):
        given = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32).to_dict()
        model = AutoModel.from_pretrained(bases["llava"], quantization_config=given, device_map=CPU)
        assert set(quantized_modules(model)) == DECODER

    def test_a_skip_list_of_the_users_own_is_kept(self, bases):
        given = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["sam", "lm_head"])
        model = SegCompassForReasoningSegmentation.from_pretrained(
            bases["llava"], quantization_config=given, device_map=CPU
        )
        assert "slot_mapper.fuse_proj" in quantized_modules(model)
        with pytest.raises(ValueError, match="modules beside the decoder are quantised .slot_encoder"):
            check_quantization(model)
        # Even so the dtype of the heads is not read from packed weights.
        assert model(**inputs_of(training=True)).pred_masks.isfinite().all()

    def test_a_model_in_full_precision(self):
        with pytest.raises(ValueError, match="28 modules of the decoder are not quantised"):
            check_quantization(tiny.tiny_model())
        with pytest.raises(ValueError, match="4 or 8 bits, got bits=3"):
            quantization_config(tiny.tiny_config(), bits=3)

    def test_configuration(self):
        config = quantization_config(tiny.tiny_config(), compute_dtype=torch.bfloat16, bnb_4bit_quant_type="fp4")
        assert config.bnb_4bit_compute_dtype == torch.bfloat16 and config.bnb_4bit_quant_type == "fp4"
        config = quantization_config(tiny.tiny_config())
        assert config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
        assert {"vlm.lm_head", "vlm.model.vision_tower", "sam", "sae"} <= set(config.llm_int8_skip_modules)


class TestOutputs:
    @pytest.mark.parametrize("family", tiny.FAMILIES)
    def test_equal_those_of_the_dequantised_weights(self, bases, family):
        config = quantization_config(tiny.tiny_config(family))
        model = SegCompassForReasoningSegmentation.from_pretrained(
            bases[family], quantization_config=config, device_map=CPU
        )
        expected = dequantized(model, family)
        assert largest_difference(outputs_of(model, family), outputs_of(expected, family)) < 1e-4
        assert largest_difference(outputs_of(model, family), outputs_of(tiny.tiny_model(family), family)) > 1e-2
        inputs = inputs_of(family)
        got, wanted = (x.segment(**inputs, max_new_tokens=12, output_concepts=True) for x in (model, expected))
        assert torch.equal(got.sequences, wanted.sequences)
        torch.testing.assert_close(got.pred_masks, wanted.pred_masks, atol=1e-4, rtol=0)

    def test_gradients_after_an_evaluation(self, bases):
        """bitsandbytes would repack the weights for a CPU with AVX512-BF16, and pass no gradient from then on."""
        gradients = []
        for evaluate in (False, True):
            model = move(qlora(bases["llava"]))
            if evaluate:
                model.segment(**inputs_of(), max_new_tokens=12)
            model.train()(**inputs_of(training=True)).loss.backward()
            gradients.append({name: p.grad for name, p in trainable(model).items()})
        for name, gradient in gradients[0].items():
            assert torch.equal(gradients[1][name], gradient), name

    def test_8_bit(self, bases, tmp_path):
        model = load(bases["llava"], bits=8)
        expected = outputs_of(tiny.tiny_model())
        for got, value in zip(outputs_of(model), expected, strict=True):
            assert (got - value).abs().max() < 0.1 * value.abs().max()
        model.save_pretrained(tmp_path)
        reloaded = AutoModel.from_pretrained(tmp_path)
        assert set(quantized_modules(reloaded)) == DECODER
        assert largest_difference(outputs_of(reloaded), outputs_of(model)) == 0


class TestBundledCheckpoint:
    def test_segments_as_well_in_4_bit(self):
        from segcompass_hf.data import scenes
        from segcompass_hf.data.schema import decode_masks
        from segcompass_hf.metrics import segmentation_metrics

        path = segcompass_hf.bundled_checkpoint()
        processor, rows = AutoProcessor.from_pretrained(path), list(scenes.iterate("val", 16, seed=11))
        truth = [decode_masks(row["masks"], row["image"].size[::-1]) for row in rows]
        images, instructions = [row["image"] for row in rows], [row["instruction"] for row in rows]
        inputs = processor(images=images, instruction=instructions, return_tensors="pt")
        full = AutoModel.from_pretrained(path)
        scores = []
        for model in (full, AutoModel.from_pretrained(path, quantization_config=quantization_config(full))):
            output = model.segment(**inputs)
            results = processor.post_process_segmentation(
                output, inputs["original_sizes"], inputs["reshaped_input_sizes"]
            )
            scores.append(segmentation_metrics([result["masks"] for result in results], truth)["gIoU"])
        assert scores[0] > 0.8 and abs(scores[1] - scores[0]) < 0.03


class TestSaving:
    @pytest.mark.parametrize("device_map", [CPU, None])
    def test_saved_and_reloaded(self, bases, tmp_path, device_map):
        model = load(bases["llava"])
        expected = outputs_of(model)  # an evaluation first: repacked weights would be saved with other scales
        model.save_pretrained(tmp_path)
        reloaded = AutoModel.from_pretrained(tmp_path, device_map=device_map)
        assert check_quantization(reloaded)
        assert largest_difference(outputs_of(reloaded), expected) == 0
        saved, full = ((folder / "model.safetensors").stat().st_size for folder in (tmp_path, bases["llava"]))
        assert saved < full - 28 * 32 * 32 * 3  # at least 3 bytes less for each weight of a 32x32 layer

    def test_composed_from_a_4_bit_vlm(self, tmp_path):
        plain = tiny.tiny_model()
        plain.vlm.save_pretrained(tmp_path / "vlm")
        given = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        vlm = AutoModelForImageTextToText.from_pretrained(tmp_path / "vlm", quantization_config=given, device_map=CPU)
        config = plain.config
        tokens = {
            name: getattr(config, name) for name in ("ref_token_id", "think_start_token_id", "think_end_token_id")
        }
        model = SegCompassForReasoningSegmentation.from_pretrained_parts(
            vlm, plain.sam, plain.sae, d_slot=32, slot_encoder_heads=4, **tokens
        )
        expected = outputs_of(model)
        assert model.is_loaded_in_4bit and model.is_quantized
        assert len(quantized_modules(model)) == 28 + 12 + 2  # decoder, CLIP and projector: all but the head
        model.save_pretrained(tmp_path / "whole")
        reloaded = AutoModel.from_pretrained(tmp_path / "whole")
        assert quantized_modules(reloaded) == quantized_modules(model)
        assert largest_difference(outputs_of(reloaded), expected) == 0


class TestQLora:
    def test_steps_move_the_adapter_and_the_heads_only(self, bases):
        model = qlora(bases["llava"]).train()
        before = {name: value.clone() for name, value in model.named_parameters()}
        assert falling_losses(model)
        moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
        assert moved == set(trainable(model))
        assert all("layers.2." in name or "layers.3." in name for name in moved if "lora_" in name)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing_changes_no_gradient(self, bases, reentrant):
        gradients = []
        for checkpointing in (False, True):
            model = move(qlora(bases["llava"])).train()
            if checkpointing:
                model = prepare_as_trainer_does(model, reentrant)
            model(**inputs_of(training=True)).loss.backward()
            gradients.append({name: p.grad for name, p in trainable(model).items()})
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)

    def test_kbit_preparation_of_peft(self, bases):
        model = prepare_model_for_kbit_training(load(bases["llava"]), use_gradient_checkpointing=False)
        model = get_peft_model(model, lora_config(model, r=4)).train()
        model(**inputs_of(training=True)).loss.backward()
        assert all(p.grad is not None for p in trainable(model).values())

    def test_adapter_saved_and_reloaded_on_both_bases(self, bases, tmp_path):
        model = move(qlora(bases["llava"]))
        expected = outputs_of(model)
        model.save_pretrained(tmp_path / "adapter")
        options = {"quantization_config": quantization_config(tiny.tiny_config()), "device_map": CPU}
        loaded = load_adapter(None, tmp_path / "adapter", **options)
        assert largest_difference(outputs_of(loaded), expected) == 0
        # On a base in full precision it adds the same; merged there, nothing is rounded.
        full = load_adapter(bases["llava"], tmp_path / "adapter")
        wanted = outputs_of(full)
        assert largest_difference(outputs_of(full.merge_and_unload()), wanted) < 1e-5

    def test_auto_model_loads_a_4_bit_base_with_the_adapter(self, bases, tmp_path):
        model = move(qlora(bases["llava"]))
        model.save_pretrained(tmp_path)
        given = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        loaded = AutoModel.from_pretrained(tmp_path, quantization_config=given, device_map=CPU)
        assert largest_difference(outputs_of(loaded), outputs_of(model)) < 1e-5

    def test_merged_into_4_bit_weights_the_sum_is_rounded_again(self, bases, tmp_path):
        model = move(qlora(bases["llava"]))
        expected = outputs_of(model)
        merged = model.merge_and_unload()
        assert check_quantization(merged)
        assert largest_difference(outputs_of(merged), expected) > 1e-2
        merged.save_pretrained(tmp_path)
        assert largest_difference(outputs_of(AutoModel.from_pretrained(tmp_path)), outputs_of(merged)) == 0

    def test_8_bit_base(self, bases):
        model = load(bases["llava"], bits=8)
        model = get_peft_model(model, lora_config(model, r=4)).train()
        assert falling_losses(model) and len([name for name in trainable(model) if "lora_" in name]) == 2 * 14

    def test_quantised_layers_cannot_train_without_an_adapter(self, bases):
        with pytest.raises(ValueError, match="14 weights of the decoder layers that train are quantised"):
            load(bases["llava"]).freeze_for_training()

    def test_joint_training(self, bases, tmp_path):
        """GRPO and the segmentation loss on a 4-bit base; TRL turns what trains to bf16, the heads come back."""
        from grpo import tiny_trainer

        model = load(bases["llava"])
        trainer = tiny_trainer(tmp_path, model=model, peft_config=lora_config(model, r=4, dropout=0.0), beta=0.1)
        kinds = {name: parameter.dtype for name, parameter in trainable(trainer.model).items()}
        assert {dtype for name, dtype in kinds.items() if "lora_" in name} == {torch.bfloat16}
        assert {dtype for name, dtype in kinds.items() if "lora_" not in name} == {torch.float32}
        before = {name: value.clone() for name, value in trainer.model.named_parameters()}
        trainer.train()
        moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
        assert moved <= set(kinds) and {"lora_B", "codebook", "slot_mapper", "mask_decoder", "lm_head"} <= {
            part for name in moved for part in name.split(".")
        }
        logged = [entry for entry in trainer.state.log_history if "segmentation/mask_dice" in entry]
        assert len(logged) == 2 and all(entry["segmentation/mask_dice"] > 0 for entry in logged)

    def test_heads_after_trl_cast_what_trains(self, bases):
        expected = outputs_of(qlora(bases["llava"]))
        model = cast_as_trl_does(qlora(bases["llava"]))
        for got, value in zip(outputs_of(model), expected, strict=True):
            assert (got.float() - value).abs().max() < 0.05 * value.abs().max()
        restore_head_precision(model)
        assert largest_difference(outputs_of(model), expected) == 0
        model.train()(**inputs_of(training=True)).loss.backward()
        assert all(p.grad is not None and p.grad.dtype == p.dtype for p in trainable(model).values())


def prepare_as_trainer_does(model, reentrant: bool):
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


class TestTrainer:
    def rows(self):
        inputs = inputs_of(training=True)
        return [{name: value[row] for name, value in inputs.items()} for row in (0, 1)] * 2

    def trainer(self, model, folder, steps: int) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            save_steps=2,
            logging_steps=1,
            learning_rate=2e-3,
            per_device_train_batch_size=2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        return Trainer(model, arguments, train_dataset=self.rows())

    def test_trains_saves_the_adapter_and_resumes(self, bases, tmp_path):
        model = qlora(bases["llava"])
        before = {name: value.clone() for name, value in model.named_parameters()}
        trainer = self.trainer(model, tmp_path, steps=4)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0]
        moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
        assert moved == set(trainable(model))
        checkpoint = tmp_path / "checkpoint-2"
        assert (checkpoint / "adapter_model.safetensors").is_file() and not (checkpoint / "model.safetensors").exists()
        again = qlora(bases["llava"])
        self.trainer(again, tmp_path, steps=4).train(resume_from_checkpoint=str(checkpoint))
        for name, value in trainable(model).items():
            torch.testing.assert_close(again.get_parameter(name), value, atol=1e-6, rtol=0, msg=name)
        with torch.no_grad():
            assert nn.functional.mse_loss(outputs_of(again)[1], outputs_of(model)[1]) < 1e-8
