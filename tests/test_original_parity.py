# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Golden tensors of the original SegCompass code, reproduced through our public classes.

One class per fixture file. `SEGCOMPASS_PARITY_DIR` names another folder of fixtures than the one beside the tests.
Names of the original's weights occur here and in the key maps only.
"""

import pytest
import torch
from parity import TOLERANCE, CoreParity, golden, under

from segcompass_hf.configuration_segcompass import SegCompassConfig, SegCompassSaeConfig
from segcompass_hf.hub.conversion.keys import (
    convert_original_heatmap_head_state_dict,
    convert_original_query_book_state_dict,
    convert_original_state_dict,
    revert_to_original_state_dict,
)
from segcompass_hf.losses_segcompass import SegmentationLossOutput, match_slots, pairwise_soft_iou, segmentation_loss
from segcompass_hf.modeling_concepts import ConceptCodebook, sparsify_concepts
from segcompass_hf.modeling_heatmaps import SlotMapper
from segcompass_hf.modeling_masks import valid_area
from segcompass_hf.modeling_sae import SegCompassSae
from segcompass_hf.modeling_slots import SlotEncoder
from segcompass_hf.original_inputs_segcompass import duplicate_completion, limit_image_tokens


class TestSae:
    VARIANTS = (
        "standard",
        "standard_bdec",
        "standard_layernorm",
        "standard_rescale",
        "standard_tanhrelu",
        "standard_topk",
        "gated",
        "gated_bdec",
        "jumprelu",
    )

    @staticmethod
    def build(cfg: dict, state: dict[str, torch.Tensor]) -> SegCompassSae:
        config = SegCompassSaeConfig(
            d_in=cfg["d_in"],
            d_sae=cfg["d_sae"],
            architecture=cfg["architecture"],
            activation=cfg["activation_fn_str"],
            k=cfg["activation_fn_kwargs"].get("k"),
            normalize_activations=cfg["normalize_activations"],
            apply_b_dec_to_input=cfg["apply_b_dec_to_input"],
            finetuning_scaling_factor=cfg["finetuning_scaling_factor"],
        )
        sae = SegCompassSae(config).eval()
        sae.load_state_dict(state)  # strict: the parameter names are the original's own
        return sae

    def test_every_variant_is_covered(self):
        assert set(golden("sae")[1]["variants"]) == set(self.VARIANTS)

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_encode_and_decode(self, variant):
        tensors, description = golden("sae")
        sae = self.build(description["variants"][variant]["cfg"], under(tensors, f"{variant}.state."))
        hidden_states = tensors[f"{variant}.x"]
        feature_acts = sae.encode(hidden_states)
        torch.testing.assert_close(feature_acts, tensors[f"{variant}.feature_acts"], **TOLERANCE)
        _, normalization = sae.normalize(hidden_states)
        torch.testing.assert_close(sae.decode(feature_acts, normalization), tensors[f"{variant}.recon"], **TOLERANCE)
        torch.testing.assert_close(sae(hidden_states).reconstruction, tensors[f"{variant}.recon"], **TOLERANCE)

    def test_per_token_is_constant_norm_rescale(self):
        tensors, description = golden("sae")
        cfg = description["variants"]["standard_rescale"]["cfg"] | {"normalize_activations": "per_token"}
        sae = self.build(cfg, under(tensors, "standard_rescale.state."))
        torch.testing.assert_close(
            sae.encode(tensors["standard_rescale.x"]), tensors["standard_rescale.feature_acts"], **TOLERANCE
        )

    def test_training_loss_and_gradients(self):
        tensors, description = golden("sae")
        state = under(tensors, "train.state.")
        d_in, d_sae = state["W_enc"].shape
        sae = SegCompassSae(
            SegCompassSaeConfig(d_in=d_in, d_sae=d_sae, l1_coefficient=description["train"]["l1_coef"])
        ).train()
        sae.load_state_dict(state)
        output = sae(tensors["train.x"], attention_mask=tensors["train.attention_mask"])
        torch.testing.assert_close(output.mse_loss, tensors["train.mse_loss"], **TOLERANCE)
        torch.testing.assert_close(output.sparsity_loss, tensors["train.l1_loss"], **TOLERANCE)
        torch.testing.assert_close(output.loss, tensors["train.loss"], **TOLERANCE)
        output.loss.backward()
        gradients = under(tensors, "train.grad.")
        assert set(gradients) == {"W_enc", "b_enc", "W_dec", "b_dec"}
        for name, gradient in gradients.items():
            torch.testing.assert_close(getattr(sae, name).grad, gradient, **TOLERANCE)


class TestCodebook:
    """The first half of the original's query book; slots and their gradients are in `TestSlotEncoder`."""

    THRESHOLDS = {"thr2": 2.0, "thr0": 0.0}

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("case", THRESHOLDS)
    def test_sparse_embeddings_equal_the_original_dense_ones(self, case, side):
        tensors, _ = golden("query_book")
        weight, feature_acts = tensors[f"{case}.state.codebook.weight"], tensors[f"{case}.sae_embeds"]
        mask = tensors[f"{case}.{side}.attention_mask"].bool()
        codebook = ConceptCodebook(weight.shape[1], weight.shape[0])
        codebook.load_state_dict({"weight": weight.T})
        concepts = sparsify_concepts(feature_acts, self.THRESHOLDS[case], mask)
        # The original's own formulation: zero what is below the threshold, then a bias-free linear layer.
        kept = feature_acts.masked_fill(feature_acts.abs() < self.THRESHOLDS[case], 0.0)
        expected = torch.nn.functional.linear(kept, weight)
        assert expected[mask].abs().max() > 0.1
        embeddings = codebook(concepts)
        torch.testing.assert_close(embeddings[mask], expected[mask], **TOLERANCE)
        assert (embeddings[~mask] == 0).all()

    def test_values_at_the_threshold(self):
        tensors, _ = golden("query_book")
        feature_acts = tensors["thr2.sae_embeds"]
        edge = torch.tensor([-2.5, -1.5, 2.0, 1.9999, 2.0001, -2.0])
        places = (feature_acts.unfold(-1, 6, 1) == edge).all(-1).nonzero()
        assert len(places) == 1
        row, position, first = places[0].tolist()
        concepts = sparsify_concepts(feature_acts, 2.0)
        kept = concepts.dense(256)[row, position, first : first + 6]
        # Kept at and above 2 in magnitude, negatives included.
        torch.testing.assert_close(kept, torch.tensor([-2.5, 0.0, 2.0, 0.0, 2.0001, -2.0]), atol=0, rtol=0)


class TestSlotEncoder:
    """The second half of the original's query book, fed by the codebook: slots, and gradients of both."""

    @staticmethod
    def build(tensors: dict[str, torch.Tensor], cfg: dict) -> tuple[ConceptCodebook, SlotEncoder]:
        state = convert_original_query_book_state_dict(tensors)
        config = SegCompassConfig(
            num_slots=cfg["k_slots"],
            d_slot=cfg["querybook_dim"],
            slot_encoder_layers=cfg["num_layers"],
            slot_encoder_heads=cfg["nhead"],
            slot_encoder_ff_mult=cfg["ff_mult"],
        )
        codebook, encoder = ConceptCodebook(cfg["sae_dim"], cfg["querybook_dim"]), SlotEncoder(config)
        codebook.load_state_dict(under(state, "codebook."))
        encoder.load_state_dict(under(state, "slot_encoder."))
        return codebook, encoder

    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("case", TestCodebook.THRESHOLDS)
    def test_slots(self, case, side, training):
        tensors, description = golden("query_book")
        codebook, encoder = self.build(under(tensors, f"{case}.state."), description["config"])
        encoder.train(training)  # no dropout: both modes agree, as in the original
        mask = tensors[f"{case}.{side}.attention_mask"]
        concepts = sparsify_concepts(tensors[f"{case}.sae_embeds"], TestCodebook.THRESHOLDS[case], mask)
        slots = encoder(codebook(concepts), mask).slots
        torch.testing.assert_close(slots, tensors[f"{case}.{side}.slots"], **TOLERANCE)

    @pytest.mark.parametrize("case", TestCodebook.THRESHOLDS)
    def test_gradients(self, case):
        tensors, description = golden("query_book")
        codebook, encoder = self.build(under(tensors, f"{case}.state."), description["config"])
        mask = tensors[f"{case}.left.attention_mask"]
        concepts = sparsify_concepts(tensors[f"{case}.sae_embeds"], TestCodebook.THRESHOLDS[case], mask)
        (encoder(codebook(concepts), mask).slots * tensors[f"{case}.grad.w"]).sum().backward()
        expected = convert_original_query_book_state_dict(
            {name: tensors[f"{case}.grad.{name}"] for name in ("codebook.weight", "slot_queries")}
        )
        torch.testing.assert_close(codebook.weight.grad, expected["codebook.weight"], **TOLERANCE)
        torch.testing.assert_close(
            encoder.slot_queries.weight.grad, expected["slot_encoder.slot_queries.weight"], **TOLERANCE
        )


class TestSlotMapper:
    CASES = ("d32_refine", "d32_plain", "d256_refine")

    def test_every_case_is_covered(self):
        assert set(golden("heatmap_head")[1]["cases"]) == set(self.CASES)

    @pytest.mark.parametrize("case", CASES)
    def test_heatmaps_and_confidence(self, case):
        tensors, description = golden("heatmap_head")
        cfg, tensors = description["cases"][case], under(tensors, f"{case}.")
        config = SegCompassConfig(
            d_slot=cfg["querybook_dim"],
            heatmap_heads=cfg["num_heads"],
            heatmap_fuser="refine" if cfg["refine"] else "plain",
        )
        mapper = SlotMapper(config, hidden_size=cfg["llm_dim"], sam_dim=cfg["sam_dim"]).eval()
        state = convert_original_heatmap_head_state_dict(under(tensors, "state."))
        mapper.load_state_dict(under(state, "slot_mapper."))
        output = mapper(tensors["ref_vec"], tensors["querybook_slots"], tensors["image_embed"])
        torch.testing.assert_close(output.heatmap_logits, tensors["ref_logits_256"], **TOLERANCE)
        torch.testing.assert_close(output.slot_logits, tensors["conf_logits"], **TOLERANCE)


class TestLosses:
    CASES = ("multi", "multi_all_empty", "multi_oversize_hw", "single", "single_256")
    SETTINGS = ("default", "before", "after")

    def test_every_case_and_setting_is_covered(self):
        description = golden("losses")[1]
        assert set(description["cases"]) == set(self.CASES) and set(description["settings"]) == set(self.SETTINGS)

    @staticmethod
    def weights(setting: dict) -> dict[str, float]:
        """The original's schedule: from `adjust_loss_step` on (never when it is negative) the `_new` weights hold."""
        cfg = setting["config"]
        switched = 0 <= cfg["adjust_loss_step"] <= setting["global_steps"]
        dice, focal = (cfg[f"{term}_loss_coef{'_new' if switched else ''}"] for term in ("dice", "focal"))
        return {
            "mask_dice_weight": dice,
            "mask_focal_weight": focal,
            "heatmap_dice_weight": cfg["heatmap_dice_rate"] * dice,
            "seg_loss_weight": cfg["seg_loss_coef"],
            "conf_loss_weight": cfg["conf_loss_coef"],
        }

    def loss(self, case: str, setting: str, inputs: dict[str, torch.Tensor]) -> SegmentationLossOutput:
        side = inputs["mask_logits"].shape[-1]
        return segmentation_loss(
            inputs["ref_logits_256"],
            inputs["mask_logits"],
            inputs.get("conf_logits"),
            inputs["mask_float_256"],
            inputs.get("n_multi_objects"),
            valid_area(inputs["unpadded_hw"], map_size=side, canvas=4 * side),
            match_confidence_weight=0.0,
            match_valid_area_only=False,
            empty_samples="zero",
            pixel_reduction="batch" if case.startswith("single") else "map",
            **self.weights(golden("losses")[1]["settings"][setting]),
        )

    @pytest.mark.parametrize("setting", SETTINGS)
    @pytest.mark.parametrize("case", CASES)
    def test_every_component(self, case, setting):
        tensors, description = golden("losses")
        output = self.loss(case, setting, under(tensors, f"{case}.in."))
        components = {
            "seg_loss": output.segmentation_loss,
            "heatmap_bce": output.heatmap_bce,
            "dice_loss": output.mask_dice,
            "focal_loss": output.mask_focal,
            "conf_loss": output.confidence_loss,
        }
        expected = description["cases"][case]["out"][setting]
        assert len(expected) == (4 if case.startswith("single") else 5)
        for name, value in expected.items():
            torch.testing.assert_close(
                components[name], torch.tensor(value), msg=lambda m, n=name: f"{n}: {m}", **TOLERANCE
            )
        weights = self.weights(description["settings"][setting])
        total = weights["seg_loss_weight"] * expected["seg_loss"]
        total += weights["conf_loss_weight"] * expected.get("conf_loss", 0.0)
        torch.testing.assert_close(output.loss, torch.tensor(total), **TOLERANCE)

    @pytest.mark.parametrize("case", [case for case in CASES if case.startswith("multi")])
    def test_assignments(self, case):
        tensors, description = golden("losses")
        inputs = under(tensors, f"{case}.in.")
        assignments = match_slots(
            inputs["ref_logits_256"], inputs["mask_float_256"], inputs["n_multi_objects"], confidence_weight=0.0
        )
        found = [[slots.tolist(), objects.tolist()] for slots, objects in assignments]
        assert found == description["cases"][case]["assignment_r_c"]

    def test_soft_iou_of_the_matching(self):
        tensors, _ = golden("losses")
        compared = 0
        for case in self.CASES:
            for sample, expected in under(tensors, f"{case}.match_iou.").items():
                inputs = under(tensors, f"{case}.in.")
                iou = pairwise_soft_iou(inputs["ref_logits_256"].sigmoid(), inputs["mask_float_256"])
                torch.testing.assert_close(iou[int(sample), :, : expected.shape[1]], expected, **TOLERANCE)
                compared += 1
        assert compared == 4

    def test_gradients_after_the_switch(self):
        tensors, description = golden("losses")
        assert description["cases"]["multi"]["grad_after_of"] == "0.3*seg_loss + 0.2*conf_loss"
        inputs = under(tensors, "multi.in.")
        gradients = under(tensors, "multi.grad_after.")
        assert set(gradients) == {"ref_logits_256", "mask_logits", "conf_logits"}
        inputs |= {name: inputs[name].clone().requires_grad_() for name in gradients}
        self.loss("multi", "after", inputs).loss.backward()
        for name, expected in gradients.items():
            torch.testing.assert_close(inputs[name].grad, expected, atol=1e-7, rtol=1e-4)


class TestOriginalKeys:
    """The key map that serves conversion: the side file of an original checkpoint there and back."""

    def test_side_file_round_trip(self):
        original = {name: tensor for name, tensor in golden("core")[0].items() if name.startswith("refseg.")}
        converted = convert_original_state_dict(original)
        assert {name.split(".")[0] for name in converted} == {"sae", "codebook", "slot_encoder", "slot_mapper", "sam"}
        reverted = revert_to_original_state_dict(converted)
        assert reverted.keys() == under(original, "refseg.").keys()
        assert all(torch.equal(tensor, original[f"refseg.{name}"]) for name, tensor in reverted.items())


class TestSaeInputs:
    """How the original lays out the tokens its SAE reads (`concept_input="duplicated"`)."""

    @pytest.mark.parametrize("case", ["roomy", "trunc", "no_eos"])
    def test_layout(self, case):
        tensors, description = golden("sae_inputs")
        inputs = under(tensors, f"{case}.in.")
        ids, mask, positions = duplicate_completion(
            inputs["input_ids"], inputs["attention_mask"], inputs["responses"], description["ids"]["pad"]
        )
        assert torch.equal(ids, tensors[f"{case}.out.sae_input_ids"])
        assert torch.equal(mask, tensors[f"{case}.out.sae_attention_mask"])
        assert torch.equal(positions, tensors[f"{case}.out.sae_position_ids"])
        assert mask.sum(1).tolist() == description["cases"][case]["n_valid_sae"]

    def test_surplus_image_tokens(self):
        tensors, _ = golden("sae_inputs")
        limited = limit_image_tokens(tensors["clamp.in"], image_token_id=90, max_tokens=576, replacement_id=0)
        assert torch.equal(limited, tensors["clamp.out"])


class TestCore(CoreParity):
    """A model composed of the fixture's parts."""


class TestGtMask:
    """Soft mask targets on the official canvas: 1,024 pixels, maps of 256 cells."""

    @pytest.mark.parametrize("case", ["a", "b"])
    def test_soft_targets(self, case):
        from tiny import tiny_parts
        from transformers import SamImageProcessorPil

        from segcompass_hf.processing_segcompass import SegCompassProcessor

        tensors, description = golden("gt_mask")
        masks, expected = tensors[f"{case}.mask"].bool(), tensors[f"{case}.mask_float_256"]
        masks, expected = masks.reshape(-1, *masks.shape[-2:]), expected.reshape(-1, 256, 256)
        processor = SegCompassProcessor(**tiny_parts("llava"), sam_image_processor=SamImageProcessorPil(), num_slots=2)
        image = torch.zeros(3, *masks.shape[-2:], dtype=torch.uint8)
        inputs = processor(images=image, instruction="the object", masks=[masks])

        assert inputs["original_sizes"].tolist() == [description["cases"][case]["original_hw"]]
        assert inputs["reshaped_input_sizes"].tolist() == [description["cases"][case]["unpadded_hw"]]
        assert inputs["num_objects"].tolist() == [len(masks)]
        targets = inputs["mask_labels"][0]  # (num_slots, 256, 256)
        assert expected.float().max() == 1 and expected.float().mean() > 0.01
        torch.testing.assert_close(targets[: len(masks)].half(), expected, rtol=0, atol=0)
        assert targets[len(masks) :].count_nonzero() == 0
