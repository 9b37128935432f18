# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Golden tensors of the original SegCompass code, and the whole forward compared with them.

`SEGCOMPASS_PARITY_DIR` names another folder of fixtures than the one beside the tests.
"""

import json
import os
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from places import FIXTURES
from safetensors.torch import load_file, save_file
from transformers import LlavaConfig, LlavaForConditionalGeneration, SamConfig, SamModel

from segcompass_hf.hub.conversion.keys import convert_original_state_dict
from segcompass_hf.modeling_segcompass import SegCompassForReasoningSegmentation

PARITY_DIR = Path(os.environ.get("SEGCOMPASS_PARITY_DIR") or FIXTURES / "parity")
TOLERANCE = {"atol": 1e-4, "rtol": 0.0}


@lru_cache
def golden(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and description of fixture file `name`; skips the test where the folder lacks it."""
    if not (PARITY_DIR / f"{name}.safetensors").is_file():
        pytest.skip(f"no {name}.safetensors in {PARITY_DIR}; set SEGCOMPASS_PARITY_DIR to the folder of fixtures")
    return load_file(PARITY_DIR / f"{name}.safetensors"), json.loads((PARITY_DIR / f"{name}.json").read_text())


def under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Tensors whose name starts with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class CoreParity:
    """The whole forward. `dup` is the original as it is, `same` the original with prompt + completion as SAE input."""

    DUP_CASES = ("exact", "fewer", "more", "prompt_ref")

    @pytest.fixture(scope="class")
    def vlm_folder(self, tmp_path_factory):
        """The LLaVA under its original checkpoint names, for transformers' own loading to rename."""
        tensors, description = golden("core")
        folder = tmp_path_factory.mktemp("llava")
        LlavaConfig(**description["config"]["llava"]).save_pretrained(folder)
        state = {name: tensor.contiguous() for name, tensor in under(tensors, "llm.").items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def build(self, vlm_folder, concept_input: str) -> SegCompassForReasoningSegmentation:
        tensors, description = golden("core")
        cfg = description["config"]
        dim, side, heads = cfg["sam"]["dim"], cfg["sam"]["image"], cfg["sam"]["heads"]
        sam_config = SamConfig(
            vision_config={
                "hidden_size": 32,
                "output_channels": dim,
                "num_pos_feats": dim // 2,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": side,
                "patch_size": side // cfg["sam"]["embedding"],
                "initializer_range": 0.02,
            },
            prompt_encoder_config={
                "hidden_size": dim,
                "image_size": side,
                "patch_size": side // cfg["sam"]["embedding"],
                "mask_input_channels": cfg["sam"]["mask_in_chans"],
            },
            mask_decoder_config={
                "hidden_size": dim,
                "mlp_dim": cfg["sam"]["mlp_dim"],
                "num_hidden_layers": cfg["sam"]["depth"],
                "num_attention_heads": heads,
                "iou_head_hidden_dim": cfg["sam"]["iou_hidden"],
                "layer_norm_eps": 1e-5,
            },
        )
        model = SegCompassForReasoningSegmentation.from_pretrained_parts(
            LlavaForConditionalGeneration.from_pretrained(vlm_folder),
            SamModel(sam_config),
            sae_config={"d_in": cfg["sae"]["d_in"], "d_sae": cfg["sae"]["d_sae"], "layer": cfg["sae"]["hook_layer"]},
            num_slots=cfg["k_slots"],
            concept_threshold=cfg["threshold"],
            d_slot=cfg["heatmap"]["querybook_dim"],
            heatmap_heads=cfg["heatmap"]["num_heads"],
            ref_token_id=cfg["ref_pos_id"],
            reference_search="sequence",
            reference_order="latest_first",
            concept_input=concept_input,
        )
        state = convert_original_state_dict(under(tensors, "refseg."))
        loaded = model.load_state_dict(state, strict=False)
        assert not loaded.unexpected_keys
        assert all(name.startswith(("vlm.", "sam.vision_encoder.")) for name in loaded.missing_keys)
        return model

    def run(self, model, case: str, **kwargs):
        tensors, description = golden("core")
        inputs = under(tensors, f"{case}.in.")
        completion_mask = torch.zeros_like(inputs["attention_mask"])
        start = description["config"]["P"]
        completion_mask[:, start:] = inputs["attention_mask"][:, start:]
        return model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            position_ids=inputs["position_ids"],
            pixel_values=inputs["pixel_values"],
            image_embeddings=inputs["image_embed"],
            reshaped_input_sizes=inputs["unpadded_hw"],
            completion_mask=completion_mask,
            **kwargs,
        )

    def compare(self, output, expected: dict[str, torch.Tensor]):
        names = {
            "heatmap_logits": "ref_logits_256",
            "slot_logits": "conf_logits",
            "pred_masks": "mask_logits",
            "reference_states": "ref_vec",
            "slots": "querybook_slots",
        }
        for ours, original in names.items():
            assert expected[original].std() > 1e-3
            torch.testing.assert_close(
                output[ours], expected[original], msg=lambda m, n=ours: f"{n}: {m}", **TOLERANCE
            )

    @pytest.mark.parametrize("case", DUP_CASES)
    def test_original_input(self, vlm_folder, case):
        model = self.build(vlm_folder, "duplicated")
        with torch.no_grad():
            output = self.run(model, case)
        self.compare(output, under(golden("core")[0], f"{case}.out.dup."))

    def test_prompt_and_completion_once(self, vlm_folder):
        model = self.build(vlm_folder, "once")
        with torch.no_grad():
            output = self.run(model, "exact")
        self.compare(output, under(golden("core")[0], "exact.out.same."))

    @pytest.mark.parametrize("concept_input", ["once", "duplicated"])
    def test_what_the_sae_reads(self, vlm_folder, concept_input):
        tensors, description = golden("core")
        model = self.build(vlm_folder, concept_input)
        inputs, read = under(tensors, "exact.in."), []
        encode = model.encode_concepts
        model.encode_concepts = lambda states, mask, *rest: read.append((states, mask)) or encode(states, mask, *rest)
        with torch.no_grad():
            output = self.run(model, "exact", output_concepts=True)
        states, mask = read[0]
        case = {"once": "same", "duplicated": "dup"}[concept_input]
        expected_mask = inputs["attention_mask" if concept_input == "once" else "sae_attention_mask"]
        assert torch.equal(mask, expected_mask)
        assert mask.sum(1).tolist() == description["cases"][f"exact.{case}"]["n_valid_sae"]
        expected = tensors[f"exact.out.{case}.sae_in"]
        torch.testing.assert_close(states[mask.bool()], expected[mask.bool()], **TOLERANCE)
        if concept_input == "duplicated":
            acts = tensors["exact.out.dup.sae_feature_acts"]
            kept = acts.masked_fill(acts.abs() < description["config"]["threshold"], 0.0)[mask.bool()]
            assert (kept != 0).float().mean() > 0.1
            torch.testing.assert_close(output.concepts.dense(acts.shape[-1])[mask.bool()], kept, **TOLERANCE)

    def test_language_logits_and_mask_prompts(self, vlm_folder):
        tensors, _ = golden("core")
        model = self.build(vlm_folder, "duplicated")
        prompts = []
        model.sam.prompt_encoder.mask_embed.register_forward_pre_hook(lambda module, args: prompts.append(args[0]))
        with torch.no_grad():
            output = self.run(model, "exact")
            positions = model.sam.get_image_wide_positional_embeddings()
        present = tensors["exact.in.attention_mask"].bool()
        torch.testing.assert_close(output.logits[present], tensors["exact.out.dup.lm_logits"][present], **TOLERANCE)
        torch.testing.assert_close(prompts[0], tensors["exact.out.dup.sam_mask_prompt"], **TOLERANCE)
        torch.testing.assert_close(positions, tensors["exact.out.dup.dense_pe"], **TOLERANCE)

    def test_gradients(self, vlm_folder):
        tensors, description = golden("core")
        model = self.build(vlm_folder, "duplicated").freeze_for_training("none").train()
        output = self.run(model, "exact")
        loss = output.heatmap_logits.square().mean() + output.pred_masks.square().mean() + output.slot_logits.sum()
        torch.testing.assert_close(loss.detach(), tensors["exact.grad.loss"], **TOLERANCE)
        loss.backward()
        expected = under(tensors, "exact.grad.")
        llm_name = "llm.language_model.model.layers.3.self_attn.o_proj.weight"
        gradients = {
            "vlm.model.language_model.layers.3.self_attn.o_proj.weight": expected.pop(llm_name),
            **convert_original_state_dict({n: g for n, g in expected.items() if n != "loss"}),
        }
        parameters = dict(model.named_parameters())
        assert len(gradients) == 6
        for name, gradient in gradients.items():
            assert gradient.abs().max() > 1e-4
            torch.testing.assert_close(parameters[name].grad, gradient, msg=lambda m, n=name: f"{n}: {m}", **TOLERANCE)
        unused = description["grad"]["params_without_grad"]
        frozen = convert_original_state_dict({n: tensors[f"refseg.{n}"] for n in unused})
        assert len(frozen) == 12
        assert not any(parameters[name].requires_grad for name in frozen)
