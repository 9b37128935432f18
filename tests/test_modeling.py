# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The composition: reference states, losses, freezing and gradients, interventions, ablation hooks, parts."""

import copy

import pytest
import tiny
import torch
from model_inputs import inputs_of
from transformers import AutoModelForImageTextToText, SamModel

from segcompass_hf.interventions_segcompass import ConceptIntervention
from segcompass_hf.modeling_sae import SegCompassSae
from segcompass_hf.modeling_segcompass import SegCompassForReasoningSegmentation
from segcompass_hf.reading_segcompass import MaskTargets, gather_reference_states
from segcompass_hf.text_stack_segcompass import decoder_layers


class TestReferenceStates:
    # Row 0: references at 1, 3, 4; row 1: at 2; row 2: none. States hold their own position.
    IS_REFERENCE = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    STATES = torch.arange(5.0).view(1, 5, 1).expand(3, 5, 1)

    @pytest.mark.parametrize(
        "order, num_slots, expected",
        [
            ("earliest_first", 3, [[1, 3, 4], [2, 0, 0], [0, 0, 0]]),
            ("latest_first", 3, [[4, 3, 1], [2, 0, 0], [0, 0, 0]]),
            ("earliest_first", 2, [[3, 4], [2, 0], [0, 0]]),  # the last two
            ("latest_first", 2, [[4, 3], [2, 0], [0, 0]]),
            ("earliest_first", 4, [[1, 3, 4, 0], [2, 0, 0, 0], [0, 0, 0, 0]]),
        ],
    )
    def test_order_and_missing(self, order, num_slots, expected):
        states = gather_reference_states(self.STATES, self.IS_REFERENCE, num_slots, order)
        assert states.shape == (3, num_slots, 1)
        assert states.squeeze(-1).tolist() == expected

    def test_gradient(self):
        last_states = self.STATES.clone().requires_grad_()
        gather_reference_states(last_states, self.IS_REFERENCE, 2).sum().backward()
        assert last_states.grad.squeeze(-1).tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 0, 0], [0] * 5]

    def test_the_prompts_tokens_do_not_count(self):
        model = tiny.tiny_model()
        inputs = inputs_of()
        assert (inputs["input_ids"] == model.config.ref_token_id).any()  # the instruction template names it
        assert (model(**inputs).reference_states == 0).all()
        sequence_wide = tiny.tiny_model(reference_search="sequence")
        assert (sequence_wide(**inputs).reference_states != 0).any()

    def test_the_completions_tokens_do(self):
        model = tiny.tiny_model()
        inputs = inputs_of(training=True)
        output = model(**inputs)
        with torch.no_grad():
            last = model.base_model(
                **{k: inputs[k] for k in ("input_ids", "attention_mask", "pixel_values")},
                position_ids=(inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0),
            ).last_hidden_state
        for row in range(2):
            where = (inputs["input_ids"][row] == model.config.ref_token_id) & inputs["completion_mask"][row].bool()
            assert where.sum() == 4
            torch.testing.assert_close(output.reference_states[row], last[row, where])


class TestForward:
    def test_language_only_without_an_image_for_sam(self):
        model = tiny.tiny_model()
        inputs = inputs_of(training=True)
        text = {k: inputs[k] for k in ("input_ids", "attention_mask", "pixel_values", "labels")}
        output = model(**text)
        assert output.heatmap_logits is None and output.pred_masks is None and output.losses is None
        # The language loss by hand: mean cross-entropy of the next token where labels count.
        labels = inputs["labels"][:, 1:]
        logits = output.logits[:, :-1][labels != -100]
        expected = torch.nn.functional.cross_entropy(logits, labels[labels != -100])
        torch.testing.assert_close(output.loss, expected)
        with pytest.raises(ValueError, match="mask_labels need an image for SAM"):
            model(**text, mask_labels=inputs["mask_labels"])

    @pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
    def test_slots_alone(self, family):
        model, inputs = tiny.tiny_model(family), inputs_of(family, training=True)
        above = []
        decoder_layers(model.base_model)[model.config.sae_layer].register_forward_hook(lambda *_: above.append(1))
        alone = model(**inputs, slots_alone=True)
        assert not above and alone.logits is None and alone.language_loss is None
        # The same as a whole pass whose reference states are zeros.
        slots, embeddings = model(**inputs).slots, model.encode_image(inputs["sam_pixel_values"])
        targets = MaskTargets(inputs["mask_labels"], inputs["num_objects"])
        zeros = torch.zeros_like(alone.reference_states)
        whole = model.predict_masks(zeros, slots, embeddings, inputs["reshaped_input_sizes"], targets)
        for name in ("slots", "slot_logits", "heatmap_logits", "pred_masks", "segmentation_loss", "confidence_loss"):
            torch.testing.assert_close(getattr(alone, name), getattr(whole, name))
        torch.testing.assert_close(alone.loss, alone.losses.loss)
        without_image = {name: v for name, v in inputs.items() if name not in ("sam_pixel_values", "mask_labels")}
        short = model(**without_image, slots_alone=True)
        torch.testing.assert_close((short.slots, short.slot_logits), (whole.slots, whole.slot_logits))
        assert short.heatmap_logits is None and short.loss is None

    def test_loss_is_the_weighted_sum(self):
        model = tiny.tiny_model(lm_loss_weight=0.5, seg_loss_weight=2.0, conf_loss_weight=0.3)
        output = model(**inputs_of(training=True))
        losses = output.losses
        segmentation = losses.heatmap_bce + 0.6 * losses.heatmap_dice + 0.6 * losses.mask_dice
        torch.testing.assert_close(output.segmentation_loss, segmentation)
        total = 0.5 * output.language_loss + 2.0 * segmentation + 0.3 * output.confidence_loss
        torch.testing.assert_close(output.loss, total)
        assert losses.assignments.pairs_per_sample == [1, 2]

    def test_training_decodes_matched_slots_only_and_loses_nothing(self):
        model = tiny.tiny_model()
        inputs = inputs_of(training=True)
        decoded = []
        model.sam.mask_decoder.register_forward_hook(lambda module, args, output: decoded.append(output[0].shape[0]))
        in_eval, in_training = model(**inputs), model.train()(**inputs)
        assert decoded == [2 * 4, 3]  # all slots of both; one matched of the first, two of the second
        assert in_training.pred_masks is None and in_eval.pred_masks.shape == (2, 4, 32, 32)
        torch.testing.assert_close(in_training.loss, in_eval.loss)
        targets = MaskTargets(inputs["mask_labels"], inputs["num_objects"], decode="all")
        assert model(**inputs, targets=targets).pred_masks is not None

    def test_image_embeddings_in_place_of_pixels(self):
        model = tiny.tiny_model()
        inputs = inputs_of(training=True)
        expected = model(**inputs, output_image_embeddings=True)
        inputs["image_embeddings"] = model.encode_image(inputs["sam_pixel_values"])
        assert torch.equal(inputs["image_embeddings"], expected.image_embeddings)
        with pytest.raises(ValueError, match="both sam_pixel_values and image_embeddings"):
            model(**inputs)
        del inputs["sam_pixel_values"]
        assert torch.equal(model(**inputs).pred_masks, expected.pred_masks)
        inputs["image_embeddings"] = inputs["image_embeddings"][:1]
        with pytest.raises(ValueError, match="1 images for 2 sequences"):
            model(**inputs)

    def test_teacher_forcing_gives_what_segment_gave(self):
        model = tiny.tiny_model()
        inputs = inputs_of()
        output = model.segment(**inputs, max_new_tokens=16, output_concepts=True)
        inputs.update(
            input_ids=output.sequences, attention_mask=output.attention_mask, completion_mask=output.completion_mask
        )
        read = model(**inputs, output_concepts=True)
        assert output.pred_masks.std() > 0.05 and output.heatmap_logits.std() > 0.05
        for name in ("reference_states", "slots", "heatmap_logits", "slot_logits", "pred_masks"):
            torch.testing.assert_close(output[name], read[name], atol=1e-4, rtol=0)
        written = output.concepts.dense(64)
        torch.testing.assert_close(written, read.concepts.dense(64), atol=1e-4, rtol=0)
        assert (written != 0).any(-1)[output.attention_mask.bool()].float().mean() > 0.9
        assert (written[~output.attention_mask.bool()] == 0).all()

    def test_the_original_input_in_segment(self):
        model = tiny.tiny_model(concept_input="duplicated")
        inputs = inputs_of()
        output = model.segment(**inputs, max_new_tokens=12)
        inputs.update(
            input_ids=output.sequences, attention_mask=output.attention_mask, completion_mask=output.completion_mask
        )
        torch.testing.assert_close(output.pred_masks, model(**inputs).pred_masks, atol=1e-4, rtol=0)
        once = tiny.tiny_model()(**inputs)
        assert (once.slots - output.slots).abs().max() > 1e-3

    def test_slot_attentions(self):
        inputs = inputs_of(training=True)
        output = tiny.tiny_model()(**inputs, output_slot_attentions=True)
        length = inputs["input_ids"].shape[1]
        assert [tuple(weights.shape) for weights in output.slot_attentions] == [(2, 4, 4, 4 + length)] * 2
        padding = inputs["attention_mask"] == 0
        assert padding.any()
        assert (output.slot_attentions[0][:, :, :, 4:].transpose(1, 3)[padding] == 0).all()


class TestAblations:
    def test_given_slots_and_reference_states_replace_the_computed(self):
        model = tiny.tiny_model()
        inputs = inputs_of(training=True)
        plain = model(**inputs)
        embeddings = model.encode_image(inputs["sam_pixel_values"])
        sizes = inputs["reshaped_input_sizes"]
        same = model.predict_masks(plain.reference_states, plain.slots, embeddings, sizes)
        assert torch.equal(same.pred_masks, plain.pred_masks) and torch.equal(same.slot_logits, plain.slot_logits)
        assert torch.equal(same.heatmap_logits, plain.heatmap_logits)
        zeroed = torch.zeros_like(plain.reference_states)
        shuffled = model.predict_masks(zeroed, plain.slots.flip(0), embeddings, sizes)
        assert torch.equal(shuffled.slots, plain.slots.flip(0)) and torch.equal(shuffled.reference_states, zeroed)
        assert (shuffled.heatmap_logits - plain.heatmap_logits).abs().max() > 1e-2


class TestInterventions:
    def strongest(self, model, inputs) -> int:
        concepts = model(**inputs, output_concepts=True).concepts
        return int(torch.bincount(concepts.features, concepts.values).argmax())

    def test_ablation_in_forward_and_segment(self):
        model = tiny.tiny_model()
        inputs = inputs_of()
        feature = self.strongest(model, inputs)
        plain = model.segment(**inputs, max_new_tokens=12, output_concepts=True)
        ablated = model.segment(**inputs, max_new_tokens=12, output_concepts=True, interventions={feature: 0.0})
        assert (plain.concepts.features == feature).any() and not (ablated.concepts.features == feature).any()
        assert torch.equal(plain.sequences, ablated.sequences)  # concepts come after the reasoning
        assert (plain.heatmap_logits - ablated.heatmap_logits).abs().max() > 1e-3
        kept = plain.concepts.features != feature
        assert torch.equal(plain.concepts.values[kept], ablated.concepts.values)
        read = model(**inputs, output_concepts=True, interventions={feature: 0.0})
        assert not (read.concepts.features == feature).any()

    def test_adding_on_image_tokens_only(self):
        model = tiny.tiny_model(concept_threshold=0.05)
        inputs = inputs_of()
        before = model(**inputs, output_concepts=True).concepts.dense(64)
        change = ConceptIntervention(feature=7, add=3.0, tokens="image")
        after = model(**inputs, output_concepts=True, interventions=[change]).concepts.dense(64)
        expected = before.clone()
        expected[..., 7] += 3.0 * (inputs["input_ids"] == model.config.image_token_id)
        torch.testing.assert_close(after, expected)

    def test_residual_interventions_change_the_reasoning(self):
        model = tiny.tiny_model()
        inputs = inputs_of()
        change = [ConceptIntervention(feature=5, add=200.0, where="residual")]
        plain = model.segment(**inputs, max_new_tokens=16)
        steered = model.segment(**inputs, max_new_tokens=16, interventions=change, output_concepts=True)
        assert not torch.equal(plain.sequences, steered.sequences)
        # The same steering in one teacher-forced pass gives the same states: prompt and written tokens alike.
        inputs.update(
            input_ids=steered.sequences, attention_mask=steered.attention_mask, completion_mask=steered.completion_mask
        )
        read = model(**inputs, interventions=change, output_concepts=True)
        torch.testing.assert_close(read.slots, steered.slots, atol=1e-4, rtol=0)
        torch.testing.assert_close(read.reference_states, steered.reference_states, atol=1e-4, rtol=0)
        assert (model(**inputs).slots - steered.slots).abs().max() > 1e-3

    def test_residual_change_by_hand(self):
        model = tiny.tiny_model()
        inputs = inputs_of()
        text = {k: inputs[k] for k in ("input_ids", "attention_mask", "pixel_values")}
        states = []
        model.base_model.language_model.layers[2].register_forward_pre_hook(lambda m, args: states.append(args[0]))
        with torch.no_grad():
            model(**text)
            model(**text, interventions=[ConceptIntervention(feature=5, add=2.0, where="residual", tokens="text")])
        is_text = (inputs["input_ids"] != model.config.image_token_id) & inputs["attention_mask"].bool()
        # No input normalisation in the tiny SAE: every text token moves by 2 W_dec[5].
        expected = states[0] + 2.0 * is_text[..., None] * model.sae.W_dec[5]
        torch.testing.assert_close(states[1], expected)

    def test_residual_interventions_with_several_sequences_per_prompt(self):
        model = tiny.tiny_model()
        change = [ConceptIntervention(feature=5, add=5.0, where="residual", tokens="image")]
        output = model.segment(
            **inputs_of(), max_new_tokens=12, do_sample=True, num_return_sequences=2, interventions=change
        )
        assert output.pred_masks.shape[0] == 4

    def test_unknown_feature(self):
        model = tiny.tiny_model()
        for call in (model, model.segment):
            with pytest.raises(ValueError, match="feature 64.*d_sae=64"):
                call(**inputs_of(), interventions={64: 0.0})


def trained_step(model, inputs):
    """One Adam step, which moves whatever has a gradient; returns the names of parameters that changed."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.train()(**inputs).loss.backward()
    torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1, eps=1e-30).step()
    return {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}


class TestFreezing:
    EXPECTED = (
        "vlm.model.language_model.layers.2.",
        "vlm.model.language_model.layers.3.",
        "vlm.lm_head.",
        "codebook.",
        "slot_encoder.",
        "slot_mapper.",
        "sam.prompt_encoder.mask_embed.",
        "sam.mask_decoder.transformer.",
        "sam.mask_decoder.iou_token.",
        "sam.mask_decoder.mask_tokens.",
        "sam.mask_decoder.upscale_",
        "sam.mask_decoder.output_hypernetworks_mlps.0.",
    )

    def test_gradients_reach_what_trains_and_nothing_else(self):
        model = tiny.tiny_model().freeze_for_training()
        model.train()(**inputs_of(training=True)).loss.backward()
        trains = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trains == {name for name, _ in model.named_parameters() if name.startswith(self.EXPECTED)}
        for name, parameter in model.named_parameters():
            if name in trains:
                assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
            else:
                assert parameter.grad is None, name

    @pytest.mark.parametrize("layer", [1, 3])
    def test_layers_by_index(self, layer):
        model = tiny.tiny_model(sae_layer=layer).freeze_for_training()
        layers = model.base_model.language_model.layers
        assert [all(p.requires_grad for p in each.parameters()) for each in layers] == [i >= layer for i in range(4)]
        assert [any(p.requires_grad for p in each.parameters()) for each in layers] == [i >= layer for i in range(4)]

    def test_a_step_moves_what_trains_and_nothing_else(self):
        model = tiny.tiny_model().freeze_for_training()
        moved = trained_step(model, inputs_of(training=True))
        assert moved == {name for name, p in model.named_parameters() if p.requires_grad}

    @pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
    @pytest.mark.parametrize("rows", ["head", "none", "both"])
    def test_rows_of_added_tokens(self, rows, tie):
        model = tiny.tiny_model(tie=tie).freeze_for_training(rows)
        head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        assert (head is embeddings) == tie
        before = head.detach().clone(), embeddings.detach().clone()
        trained_step(model, inputs_of(training=True))
        config = model.config
        added = sorted([config.ref_token_id, config.think_start_token_id, config.think_end_token_id])

        def moved(old, new):
            return (old != new).any(1).nonzero().flatten().tolist()

        assert moved(before[0], head) == ([] if rows == "none" else added)
        assert moved(before[1], embeddings) == (added if rows == "both" or (tie and rows == "head") else [])

    @pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
    @pytest.mark.parametrize("change", ["copied", "resized"])
    def test_rows_stay_the_only_ones_where_tensors_are_replaced(self, change, tie):
        model = tiny.tiny_model(tie=tie).freeze_for_training()
        if change == "copied":
            model = copy.deepcopy(model)
        else:
            model.resize_token_embeddings(model.get_input_embeddings().weight.shape[0] + 5)
        model.train()(**inputs_of(training=True)).loss.backward()
        config, gradient = model.config, model.get_output_embeddings().weight.grad
        added = sorted([config.ref_token_id, config.think_start_token_id, config.think_end_token_id])
        assert gradient.any(1).nonzero().flatten().tolist() == added
        model.freeze_for_training("none")
        assert not model.get_input_embeddings()._forward_hooks

    def test_tied_rows_learn_from_the_output_side_only(self):
        model = tiny.tiny_model(tie=True).freeze_for_training("head")
        inputs = inputs_of(training=True)
        model.train()(**inputs).loss.backward()
        gradient = model.get_output_embeddings().weight.grad.clone()
        # The same model untied, with the same weights: its head's gradient has no share of the input side.
        untied = tiny.tiny_model(tie=False)
        untied.load_state_dict({**model.state_dict(), "vlm.lm_head.weight": model.get_input_embeddings().weight})
        untied.freeze_for_training("head").train()(**inputs).loss.backward()
        torch.testing.assert_close(gradient, untied.get_output_embeddings().weight.grad)
        assert gradient.abs().sum() > 0

    def test_freezing_again_undoes_the_last_choice(self):
        model = tiny.tiny_model(tie=True)
        model.freeze_for_training("head").freeze_for_training("none")
        assert not model.get_output_embeddings().weight.requires_grad
        assert not model.get_input_embeddings()._forward_hooks
        model.requires_grad_(True)
        model.train()(**inputs_of(training=True)).loss.backward()
        assert (model.get_input_embeddings().weight.grad.abs().sum(1) > 0).sum() > 10

    def test_no_graph_through_frozen_layers(self):
        model = tiny.tiny_model().freeze_for_training()
        seen = []
        for layer in model.base_model.language_model.layers:
            layer.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
        model.train()(**inputs_of(training=True))
        assert seen == [False, False, True, True]

    def test_gradient_checkpointing_changes_nothing(self):
        inputs = inputs_of(training=True)
        gradients = []
        for checkpointing in (False, True):
            model = tiny.tiny_model().freeze_for_training()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            output = model.train()(**inputs)
            output.loss.backward()
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, gradients[1][name], msg=lambda m, n=name: f"{n}: {m}")
        written = model.segment(**inputs_of(), max_new_tokens=12)  # in training mode, checkpointing on
        assert torch.equal(written.pred_masks, tiny.tiny_model().segment(**inputs_of(), max_new_tokens=12).pred_masks)
        assert model.training

    def test_parameter_groups(self):
        model = tiny.tiny_model().freeze_for_training()
        groups = model.parameter_groups(
            1e-3, weight_decay=0.01, factors={"codebook": 25, "sam": 10, "sam.mask_decoder": 5}
        )
        where = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
        assert len(where) == sum(p.requires_grad for p in model.parameters()) == sum(len(g["params"]) for g in groups)
        parameters = dict(model.named_parameters())

        def of(name):
            return where[id(parameters[name])]

        assert of("codebook.weight") == (pytest.approx(25e-3), 0.01)
        assert of("sam.prompt_encoder.mask_embed.conv1.weight") == (pytest.approx(10e-3), 0.01)
        assert of("sam.mask_decoder.iou_token.weight") == (pytest.approx(5e-3), 0.01)  # the longer prefix
        assert of("slot_encoder.final_norm.weight") == (1e-3, 0.0)  # a vector
        assert of("vlm.lm_head.weight") == (1e-3, 0.0)  # decay would shrink its frozen rows
        with pytest.raises(ValueError, match="no parameter starts with .'heatmap'"):
            model.parameter_groups(1e-3, factors={"heatmap": 2})


class TestParts:
    def parts(self):
        config = tiny.tiny_config()
        vlm = AutoModelForImageTextToText.from_config(config.vlm_config).eval()
        return vlm, SamModel(config.sam_config).eval(), SegCompassSae(config.sae_config).eval()

    def build(self, vlm, sam, sae, **kwargs):
        fields = {"d_slot": 32, "slot_encoder_heads": 4, "concept_threshold": 0.01, **kwargs}
        return SegCompassForReasoningSegmentation.from_pretrained_parts(vlm, sam, sae, **fields)

    def test_loaded_modules_are_used_as_they_are(self):
        vlm, sam, sae = self.parts()
        expected = [copy.deepcopy(part.state_dict()) for part in (vlm, sam, sae)]
        inputs = {k: v for k, v in inputs_of().items() if k in ("input_ids", "attention_mask", "pixel_values")}
        with torch.no_grad():
            before = vlm(**inputs).logits
        attention = vlm.config.text_config._attn_implementation
        model = self.build(vlm, sam, sae, num_slots=3)
        for part, weights in zip((model.vlm, model.sam, model.sae), expected, strict=True):
            assert all(torch.equal(value, weights[name]) for name, value in part.state_dict().items())
        assert model.vlm is vlm and model.config.vlm_config is vlm.config
        assert model.config.num_slots == 3 and model.config.sae_layer == 2  # the SAE's own
        assert attention == vlm.config.text_config._attn_implementation == "sdpa"
        with torch.no_grad():
            assert torch.equal(vlm(**inputs).logits, before)

    def test_a_missing_folder_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="vlm names the folder"):
            SegCompassForReasoningSegmentation.from_pretrained_parts(tmp_path / "nowhere", "org/sam")

    def test_a_processor_for_other_slots_is_refused(self):
        with pytest.raises(ValueError, match="asks for 4 <REF_POS>, but num_slots=3"):
            self.build(*self.parts(), num_slots=3, processor=tiny.tiny_processor())

    def test_from_folders(self, tmp_path):
        vlm, sam, sae = self.parts()
        tokenizer = tiny.tiny_tokenizer()
        for name, part in {"vlm": vlm, "sam": sam, "sae": sae, "vlm ": tokenizer}.items():
            part.save_pretrained(tmp_path / name.strip())
        model = self.build(tmp_path / "vlm", str(tmp_path / "sam"), str(tmp_path / "sae"), dtype="float32")
        assert torch.equal(model.sae.W_enc, sae.W_enc)
        assert model.config.ref_token_id is not None  # added by the folder's own tokenizer

    def test_added_tokens_get_rows(self):
        vlm, sam, sae = self.parts()
        tokenizer = tiny.tiny_tokenizer()
        vlm.resize_token_embeddings(len(tokenizer))
        size = len(tokenizer)
        model = self.build(vlm, sam, sae, tokenizer=tokenizer)
        config = model.config
        assert [config.ref_token_id, config.think_start_token_id, config.think_end_token_id] == [
            size,
            size + 1,
            size + 2,
        ]
        text = tokenizer.decode([size, size + 1], skip_special_tokens=True)
        assert text.replace(" ", "") == "<REF_POS><think>"  # not special: rewards must see them
        assert (
            model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == size + 3
        )
        assert config.vocab_size == config.vlm_config.text_config.vocab_size == size + 3
        # Adding them again changes nothing.
        again = self.build(vlm, sam, sae, tokenizer=tokenizer)
        assert len(tokenizer) == size + 3 and again.config.ref_token_id == size

    def test_a_new_sae_when_none_is_given(self):
        vlm, sam, _ = self.parts()
        model = self.build(vlm, sam, None, sae_config={"d_sae": 96})
        assert model.sae.W_enc.shape == (32, 96) and model.codebook.weight.shape == (96, 32)
        assert model.config.sae_layer == 2  # half of four layers

    def test_sae_of_another_width(self):
        vlm, sam, _ = self.parts()
        config = tiny.tiny_config().sae_config
        config.d_in = 48
        with pytest.raises(Exception, match="width 48 .d_in., the VLM's are 32 wide"):
            self.build(vlm, sam, SegCompassSae(config))

    def test_half_precision_keeps_sams_positions_in_float32(self):
        vlm, sam, sae = (part.to(torch.bfloat16) for part in self.parts())
        positions = sam.shared_image_embedding.positional_embedding.float()
        model = self.build(vlm, sam, sae, ref_token_id=tiny.tiny_config().ref_token_id)
        assert model.slot_mapper.query_proj.weight.dtype == torch.bfloat16
        assert model(**inputs_of(training=True)).loss.isfinite()
        assert torch.equal(model.sam.shared_image_embedding.positional_embedding.float(), positions)


class TestInitialisation:
    def test_special_values(self):
        model = SegCompassForReasoningSegmentation(tiny.tiny_config(slot_init_std=0.5, heatmap_bias_init=-1.8))
        assert (model.slot_mapper.head_fuser[-1].bias == -1.8).all()
        assert 0.4 < model.slot_encoder.slot_queries.weight.std() < 0.6
        assert 0.015 < model.codebook.weight.std() < 0.025
        # Linear layers by fan-in: uniform within 1 / sqrt(32), so std 1 / sqrt(96) = 0.102.
        assert 0.09 < model.slot_mapper.slot_proj.weight.std() < 0.115

    def test_vlm_keeps_its_own_initialisation(self):
        weight = tiny.tiny_model().base_model.language_model.layers[0].mlp.up_proj.weight
        assert 0.09 < weight.std() < 0.11  # initializer_range 0.1


class TestDelegation:
    def test_generation_and_embeddings_are_the_vlms(self):
        model = tiny.tiny_model()
        assert model.base_model is model.vlm.model
        assert model.generation_config is model.vlm.generation_config
        assert model.can_generate()
        assert model.get_input_embeddings() is model.vlm.get_input_embeddings()
        assert model.get_output_embeddings() is model.vlm.lm_head
        assert model.config.get_text_config() is model.vlm.config.text_config

    def test_resizing_shows_in_the_config(self):
        model = tiny.tiny_model()
        size = model.config.vocab_size
        model.resize_token_embeddings(size + 5)
        assert model.config.vocab_size == model.get_output_embeddings().weight.shape[0] == size + 5
