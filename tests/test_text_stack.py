# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Where the text decoder is in a VLM, and what is captured of layers that keep several streams or share keys."""

import odd_vlms
import pytest
import tiny
import torch
import transformers
from breadth import steps
from breadth.families import FAMILIES
from breadth.trial import Trial

from segcompass_hf import SegCompassForReasoningSegmentation
from segcompass_hf.generation_segcompass import generate_and_feed_last
from segcompass_hf.text_stack_segcompass import (
    HiddenStateCapture,
    ParallelStreams,
    check_decoder_only,
    decoder_layers,
    final_norm,
    text_stack,
)
from segcompass_hf.vlm_inputs_segcompass import every_state, sequence_inputs

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
PER_LAYER = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2}
KINDS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 64}


def gemma3n():
    """AltUp: four streams, `(4, batch, tokens, hidden)`."""
    config = transformers.Gemma3nTextConfig(
        **SMALL, **PER_LAYER, **KINDS, laurel_rank=4, activation_sparsity_pattern=[0.0] * 4
    )
    return seeded(transformers.Gemma3nForCausalLM, config)


def gemma4():
    """The upper two layers use the keys and values of the lower two."""
    config = transformers.Gemma4TextConfig(**SMALL, **PER_LAYER, **KINDS, global_head_dim=16)
    return seeded(transformers.Gemma4ForCausalLM, config)


def seeded(model_class, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(config).eval()


def prompts():
    ids = torch.tensor([[0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


class TestWhere:
    @pytest.mark.parametrize("family", tiny.FAMILIES)
    def test_with_and_without_head_and_wrapper(self, family):
        model = tiny.tiny_model(family)
        layers = model.vlm.base_model.language_model.layers
        for part in (model, model.vlm, model.vlm.base_model):
            assert decoder_layers(part) is layers
            assert text_stack(part)[0] is model.vlm.base_model.language_model
        assert final_norm(model.vlm) is model.vlm.base_model.language_model.norm

    def test_two_levels_down(self):
        vlm = odd_vlms.odd_vlm("blip-2")
        stack, layers = text_stack(vlm)
        assert stack is vlm.language_model.model.decoder and layers is stack.layers

    def test_the_first_of_lists_of_one_length(self):
        vlm = odd_vlms.odd_vlm("idefics", cross_layer_interval=1)
        assert len(vlm.model.gated_cross_attn_layers) == len(vlm.model.layers)
        assert decoder_layers(vlm) is vlm.model.layers

    def test_an_encoder_decoder_is_refused(self):
        config = transformers.Florence2Config()
        with torch.device("meta"):
            vlm = transformers.AutoModelForImageTextToText.from_config(config)
        with pytest.raises(
            ValueError, match=r"Florence2ForConditionalGeneration .* is an encoder-decoder.*decoder-only"
        ):
            check_decoder_only(vlm)

    def test_a_vlm_without_layers_is_refused(self):
        config, vlm = tiny.tiny_config(), tiny.tiny_model().vlm
        del vlm.base_model.language_model.layers[0]
        with pytest.raises(ValueError, match="no list of 4 decoder layers in its text model .looked in LlamaModel"):
            SegCompassForReasoningSegmentation(config, vlm=vlm)


class TestParallelStreams:
    SHAPES = {"none": (2, 5, 8), "in front": (4, 2, 5, 8), "behind": (2, 5, 4, 8), "joined": (2, 5, 32)}

    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_mean_and_change(self, shape):
        states = torch.randn(shape, dtype=torch.float64)
        streams = ParallelStreams(states, (2, 5), 8)
        assert streams.mean.shape == (2, 5, 8)
        wanted = streams.mean + torch.randn(2, 5, 8, dtype=torch.float64)
        changed = streams.replace(wanted)
        assert changed.shape == states.shape
        torch.testing.assert_close(ParallelStreams(changed, (2, 5), 8).mean, wanted)
        difference = (changed - states).reshape(*shape[:2], -1) if shape == (2, 5, 32) else changed - states
        if len(shape) == 4:  # one change for every stream
            axis = 0 if shape[0] == 4 else 2
            torch.testing.assert_close(difference, difference.mean(axis, keepdim=True).expand_as(difference))

    @pytest.mark.parametrize("batch", [1, 4])
    def test_one_token_of_as_many_rows_as_streams(self, batch):
        """While writing, (4, batch, 1, 8) and (batch, 1, 4, 8) are told apart by the pass's own shape."""
        front, behind = torch.randn(4, batch, 1, 8), torch.randn(batch, 1, 4, 8)
        assert torch.equal(ParallelStreams(front, (batch, 1), 8).mean, front.mean(0))
        assert torch.equal(ParallelStreams(behind, (batch, 1), 8).mean, behind.mean(2))

    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_an_edit_without_a_graph_cuts_all_streams(self, shape):
        states = torch.randn(shape, requires_grad=True)
        streams = ParallelStreams(states, (2, 5), 8)
        cut = streams.replace(streams.mean.detach())
        assert not cut.requires_grad
        torch.testing.assert_close(cut, states.detach())


class TestStatesWithoutTokens:
    """GIT puts the picture's states in front of the text's: five here, of two by two patches and a class token."""

    @pytest.fixture(scope="class")
    def git(self, tmp_path_factory):
        trial = Trial("git", FAMILIES["git"], tmp_path_factory.mktemp("git"))
        steps.processor(trial)
        steps.compose(trial)
        return trial

    def test_every_way_to_masks_is_refused(self, git):
        inputs = git.inputs()
        length = inputs["input_ids"].shape[1]
        message = f"passes {length + 5} states for {length} tokens"
        with pytest.raises(ValueError, match=message):
            git.model.segment(**inputs, max_new_tokens=12)  # with five and more tokens written, the counts would agree
        with pytest.raises(ValueError, match=message):
            git.model(**inputs)
        with pytest.raises(ValueError, match=message):
            git.model(**inputs, slots_alone=True)


@pytest.mark.parametrize("build", [gemma3n, gemma4], ids=["altup", "shared keys"])
class TestOddLayers:
    def test_all_tokens_are_captured_while_writing(self, build):
        vlm, inputs = build(), prompts()
        keep = {"logits_to_keep": every_state(vlm, 1)}
        with torch.no_grad(), HiddenStateCapture(vlm, 3) as capture:
            sequences = generate_and_feed_last(vlm, **inputs, **keep, max_new_tokens=5, do_sample=False)
        plain = vlm.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert torch.equal(sequences, plain)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(sequences[:, 6:])], 1)
        whole = {"input_ids": sequences, "attention_mask": mask}
        with torch.no_grad(), HiddenStateCapture(vlm, 3) as reading:
            vlm(**sequence_inputs(vlm, whole))
        for wrote, read in zip(capture.states(), reading.states(), strict=True):
            assert wrote.shape == (*sequences.shape, 32)
            torch.testing.assert_close(wrote[mask.bool()], read[mask.bool()], atol=1e-5, rtol=1e-4)

    def test_the_first_pass_scores_one_token(self, build):
        vlm, shapes = build(), []
        vlm.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape[1]))
        keep = {"logits_to_keep": every_state(vlm, 1)}
        generate_and_feed_last(vlm, **prompts(), **keep, max_new_tokens=3, do_sample=False)
        assert set(shapes) == {1}

    def test_a_change_goes_on(self, build):
        vlm, inputs = build(), prompts()
        with torch.no_grad():
            plain = vlm(**sequence_inputs(vlm, inputs)).logits
            with HiddenStateCapture(vlm, 2, lambda states, _: states) as same:
                kept = vlm(**sequence_inputs(vlm, inputs)).logits
            with HiddenStateCapture(vlm, 2, lambda states, _: states + 1) as changed:
                moved = vlm(**sequence_inputs(vlm, inputs)).logits
        torch.testing.assert_close(kept, plain, atol=1e-6, rtol=1e-5)
        assert (moved - plain)[inputs["attention_mask"].bool()].abs().max() > 1e-3
        torch.testing.assert_close(changed.layer_states[0], same.layer_states[0] + 1, atol=1e-6, rtol=1e-5)
