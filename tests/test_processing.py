# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The processor: inputs of every family, reference answers, targets, post-processing, saving."""

import copy
import functools
import json
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoProcessor, LlavaProcessor, SamConfig, SamProcessor

from segcompass_hf.images_segcompass import fit_objects_to_slots, resized_size, restore_map, soft_mask_targets
from segcompass_hf.processing_segcompass import SegCompassProcessor

EVERY_FAMILY = pytest.mark.parametrize("family", tiny.FAMILIES)
IMAGES = [tiny.tiny_image(0, (40, 30)), tiny.tiny_image(1, (90, 40))]
INSTRUCTIONS = ["the red circle", "all the squares left of the ring"]
SAM_KEYS = {"sam_pixel_values", "original_sizes", "reshaped_input_sizes"}
VLM_KEYS = {
    "llava": {"input_ids", "attention_mask", "pixel_values"},
    "qwen2_5_vl": {"input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids"},
    "qwen3_vl": {"input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids"},
    "gemma3": {"input_ids", "attention_mask", "pixel_values", "token_type_ids"},
}
END_OF_TURN = {"llava": "</s>", "qwen2_5_vl": "<|im_end|>", "qwen3_vl": "<|im_end|>", "gemma3": "<end_of_turn>"}


@functools.lru_cache
def processor_of(family: str) -> SegCompassProcessor:
    return tiny.tiny_processor(family)


def assert_same(left: dict, right: dict) -> None:
    assert set(left) == set(right)
    for name in left:
        assert torch.equal(left[name], right[name]), name


@EVERY_FAMILY
class TestInputs:
    def test_keys_and_shapes(self, family):
        inputs = processor_of(family)(images=IMAGES, instruction=INSTRUCTIONS, return_tensors="pt")
        assert set(inputs) == VLM_KEYS[family] | SAM_KEYS
        assert inputs["input_ids"].shape == inputs["attention_mask"].shape
        assert inputs["sam_pixel_values"].shape == (2, 3, 64, 64)
        assert inputs["original_sizes"].tolist() == [[30, 40], [40, 90]]
        # 64 / 40 = 1.6 -> 48 x 64; 64 / 90 = 0.711 -> 28.4 x 64
        assert inputs["reshaped_input_sizes"].tolist() == [[48, 64], [28, 64]]

    def test_batch_is_its_samples_padded_on_the_left(self, family):
        processor = processor_of(family)
        batch = processor(images=IMAGES, instruction=INSTRUCTIONS)
        lengths = set()
        for row in range(2):
            single = processor(images=IMAGES[row], instruction=INSTRUCTIONS[row])
            length = single["input_ids"].shape[1]
            lengths.add(length)
            assert batch["input_ids"][row, -length:].tolist() == single["input_ids"][0].tolist()
            mask = batch["attention_mask"][row]
            assert mask[-length:].all() and mask.sum() == length
            assert torch.equal(batch["sam_pixel_values"][row], single["sam_pixel_values"][0])
        assert len(lengths) == 2  # else nothing was padded

    def test_the_family_s_own_processor_gives_the_same(self, family):
        processor = processor_of(family)
        prompt = processor.build_prompt(INSTRUCTIONS[0])
        own = processor.vlm_processor
        bos = processor.tokenizer.bos_token
        expected = own(
            images=[[IMAGES[0]]],
            text=[prompt],
            add_special_tokens=not (bos and prompt.startswith(bos)),
            return_tensors="pt",
        )
        inputs = processor(images=IMAGES[0], instruction=INSTRUCTIONS[0])
        assert set(expected) == VLM_KEYS[family]
        for name in expected:
            assert torch.equal(inputs[name], torch.as_tensor(expected[name])), name

    def test_one_beginning_and_as_many_image_tokens_as_the_model_has_features(self, family):
        processor = processor_of(family)
        inputs = processor(images=IMAGES[0], instruction=INSTRUCTIONS[0])
        ids = inputs["input_ids"][0].tolist()
        features = 4  # llava: (28 / 14)^2; gemma: pooled to 4
        if "image_grid_thw" in inputs:
            features = inputs["image_grid_thw"].prod().item() // 4  # 2 x 2 patches merge
        assert ids.count(processor.image_token_id) == features
        if processor.tokenizer.bos_token_id is not None:
            assert ids.count(processor.tokenizer.bos_token_id) == 1
            assert ids[0] == processor.tokenizer.bos_token_id

    def test_sam_sees_the_image_resized_normalised_and_padded(self, family):
        white = np.full((30, 40, 3), 255, np.uint8)
        pixels = processor_of(family)(images=white, instruction="it")["sam_pixel_values"][0]
        assert pixels[:, 48:].count_nonzero() == 0  # padding
        expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
        torch.testing.assert_close(pixels[:, :48].amin((1, 2)), expected)
        torch.testing.assert_close(pixels[:, :48].amax((1, 2)), expected)


@EVERY_FAMILY
class TestReasoning:
    def test_completion_and_labels(self, family):
        processor = processor_of(family)
        plain = processor(images=IMAGES, instruction=INSTRUCTIONS)
        full = processor(images=IMAGES, instruction=INSTRUCTIONS, reasoning=["a red circle at b3", ""])
        prompt_length = plain["input_ids"].shape[1]
        assert torch.equal(full["input_ids"][:, :prompt_length], plain["input_ids"])
        assert full["completion_mask"][:, :prompt_length].sum() == 0
        assert torch.equal(full["completion_mask"][:, prompt_length:], full["attention_mask"][:, prompt_length:])
        expected = ["<think>a red circle at b3</think>", "<think></think>"]
        for row, thought in enumerate(expected):
            inside = full["completion_mask"][row].bool()
            text = processor.tokenizer.decode(full["input_ids"][row][inside])
            assert text == thought + "<REF_POS>" * 4 + END_OF_TURN[family]
            assert torch.equal(full["labels"][row][inside], full["input_ids"][row][inside])
            assert (full["labels"][row][~inside] == -100).all()
        # the shorter answer is padded behind its end
        assert full["attention_mask"][1, -1] == 0 and full["attention_mask"][0, -1] == 1
        for name in full:
            if name.endswith("token_type_ids"):  # of the prompt; the model lets them grow by its family's rule
                assert torch.equal(full[name], plain[name])

    def test_as_many_references_as_slots(self, family):
        processor = tiny.tiny_processor(family, num_slots=2)
        full = processor(images=IMAGES[0], instruction="it", reasoning="there")
        ids = full["input_ids"][full["completion_mask"].bool()].tolist()
        assert ids.count(processor.ref_token_id) == 2
        assert ids[0] == processor.think_start_token_id and ids[-1] == processor.end_of_turn_token_id
        prompt = processor.build_prompt("it")
        assert "write 2 position tokens" in prompt


@EVERY_FAMILY
class TestTrl:
    """What TRL calls: rendered text or conversations in, the VLM's own inputs out."""

    def test_text_gives_the_vlm_s_inputs_only(self, family):
        processor = processor_of(family)
        prompts = [processor.build_prompt(text) for text in INSTRUCTIONS]
        inputs = processor(images=[[image] for image in IMAGES], text=prompts, padding=True, return_tensors="pt")
        assert set(inputs) == VLM_KEYS[family]
        expected = processor(images=IMAGES, instruction=INSTRUCTIONS)
        for name in inputs:
            assert torch.equal(inputs[name], expected[name]), name

    def test_chat_template_tokenized_and_not(self, family):
        processor = processor_of(family)
        conversations = [processor.build_messages(*pair) for pair in zip(INSTRUCTIONS, IMAGES, strict=True)]
        tokenized = processor.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        rendered = processor.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
        assert rendered == [processor.build_prompt(text) for text in INSTRUCTIONS]
        for row in range(2):
            expected = processor(images=IMAGES[row], instruction=INSTRUCTIONS[row])["input_ids"][0].tolist()
            assert list(tokenized["input_ids"][row]) == expected  # unpadded

    def test_format_tokens_survive_decoding_without_special_tokens(self, family):
        processor = processor_of(family)
        ids = processor(images=IMAGES[0], instruction="it", reasoning="a b")["labels"][0]
        text = processor.batch_decode([ids[ids != -100]], skip_special_tokens=True)[0]
        assert text == "<think>a b</think><REF_POS><REF_POS><REF_POS><REF_POS>"

    def test_text_only(self, family):
        assert set(processor_of(family)(text=["hello"])) <= VLM_KEYS[family]


class TestBroadcastAndErrors:
    def test_one_image_many_instructions_and_the_reverse(self):
        processor = processor_of("llava")
        assert processor(images=IMAGES[0], instruction=INSTRUCTIONS)["input_ids"].shape[0] == 2
        assert processor(images=IMAGES, instruction="it", reasoning="x")["completion_mask"].shape[0] == 2
        stack = torch.zeros(2, 3, 20, 20, dtype=torch.uint8)
        assert processor(images=stack, instruction="it")["original_sizes"].tolist() == [[20, 20], [20, 20]]

    def test_columns_of_a_dataset_are_lists_of_samples(self):
        datasets = pytest.importorskip("datasets")
        columns = {"image": IMAGES, "instruction": INSTRUCTIONS, "reasoning": ["x", "y z"]}
        rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        processor = processor_of("llava")
        inputs = processor(images=rows["image"], instruction=rows["instruction"], reasoning=rows["reasoning"])
        expected = processor(images=IMAGES, instruction=INSTRUCTIONS, reasoning=columns["reasoning"])
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"images": IMAGES[0]}, "either `instruction`"),
            ({"images": IMAGES[0], "instruction": "a", "text": "b"}, "either `instruction`"),
            ({"instruction": "a"}, "`images` is missing"),
            ({"images": IMAGES, "instruction": ["a", "b", "c"]}, "'images': 2, 'instruction': 3"),
            ({"images": [], "instruction": []}, "lengths differ or are 0"),
            ({"images": [[IMAGES[0], IMAGES[1]]], "instruction": "a"}, "one image each"),
            ({"images": IMAGES[0], "instruction": "a", "instructions": "b"}, "'instructions'"),
            ({"images": IMAGES[0], "instruction": 3}, "instruction 0 is a int"),
            ({"images": IMAGES[0], "instruction": "a", "reasoning": [None]}, "reasoning 0 is a NoneType"),
            ({"images": IMAGES[0], "text": "a", "reasoning": "b"}, "go with `instruction`"),
            ({"images": IMAGES[0], "instruction": "a", "return_tensors": "tf"}, 'expected "pt"'),
            ({"images": IMAGES[0], "instruction": "a", "masks": [[], []]}, "masks for 2 images and 1"),
        ],
    )
    def test_message(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            processor_of("llava")(**arguments)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"num_slots": 0}, "positive integer"),
            ({"instruction_template": "find it"}, "has no {instruction}"),
            ({"completion_template": "{reasoning}"}, "must hold"),
            ({"vlm_processor_class": "AutoModel"}, "no processor class"),
        ],
    )
    def test_constructor_message(self, arguments, message):
        parts = tiny.tiny_parts("llava") | {"sam_image_processor": tiny.tiny_sam_image_processor()}
        with pytest.raises(ValueError, match=message):
            SegCompassProcessor(**(parts | arguments))


class TestTemplates:
    def test_braces_in_the_instruction_stay(self):
        prompt = processor_of("llava").build_prompt("a {num_slots} {instruction} {x} % {{ y }}")
        assert "image: a {num_slots} {instruction} {x} % {{ y }}\n" in prompt

    def test_plain_tokenizer_with_the_minimal_template(self):
        parts = tiny.tiny_parts("llava")
        parts["tokenizer"].chat_template = None
        processor = SegCompassProcessor(
            **parts, sam_image_processor=tiny.tiny_sam_image_processor(), instruction_template="{instruction}"
        )
        assert processor.build_prompt("the ring") == "<s><image>the ring"
        inputs = processor(images=IMAGES[0], instruction="the ring", reasoning="b3")
        text = processor.tokenizer.decode(inputs["input_ids"][0])
        assert text == "<s>" + "<image>" * 4 + "the ring<think>b3</think>" + "<REF_POS>" * 4 + "</s>"

    def test_messages_hold_image_and_answer(self):
        messages = processor_of("llava").build_messages("the ring", IMAGES[0], reasoning="b3")
        assert [message["role"] for message in messages] == ["user", "assistant"]
        assert messages[0]["content"][0] == {"type": "image", "image": IMAGES[0]}
        assert messages[1]["content"][0]["text"] == "<think>b3</think>" + "<REF_POS>" * 4

    def test_conversation_of_the_answer_starts_with_the_prompt(self):
        processor = processor_of("qwen2_5_vl")
        whole = processor.apply_chat_template(processor.build_messages("the ring", reasoning="b3"), tokenize=False)
        assert whole.startswith(processor.build_prompt("the ring") + "<think>b3</think>")


class TestTargets:
    def test_half_covered_cells(self):
        # canvas 64, map 32: an 8 x 8 image, each pixel an 8 x 8 block of the canvas, 4 x 4 cells of the map
        mask = np.zeros((1, 8, 8), bool)
        mask[0, :, :4] = True
        targets = soft_mask_targets(torch.as_tensor(mask), canvas=64, map_size=32)
        assert targets.shape == (1, 32, 32) and targets.min() == 0 and targets.max() == 1
        assert (targets[0, :, :14] == 1).all() and (targets[0, :, 18:] == 0).all()  # two cells of blur at most
        torch.testing.assert_close(
            targets[0, 5, 15] + targets[0, 5, 16], torch.tensor(1.0)
        )  # symmetric about the edge

    def test_padding_is_zero(self):
        targets = soft_mask_targets(torch.ones(1, 20, 40, dtype=torch.bool), canvas=64, map_size=32)
        assert (targets[0, :16] == 1).all()  # 20 / 40 of the canvas
        assert targets[0, 16:].count_nonzero() == 0

    def test_batch(self):
        processor = processor_of("llava")
        inputs = processor(
            images=IMAGES, instruction=INSTRUCTIONS, masks=[tiny.tiny_mask(2, (40, 30)), np.zeros((0, 40, 90), bool)]
        )
        assert inputs["mask_labels"].shape == (2, 4, 32, 32) and inputs["num_objects"].tolist() == [2, 0]
        assert inputs["mask_labels"][0, :2].sum((1, 2)).tolist() == pytest.approx([16 * 24, 16 * 24], abs=1e-3)
        assert inputs["mask_labels"][0, 2:].count_nonzero() == inputs["mask_labels"][1].count_nonzero() == 0

    @pytest.mark.parametrize(
        "masks",
        [
            tiny.tiny_mask(1),
            tiny.tiny_mask(1)[0],
            [tiny.tiny_mask(1)],
            [[tiny.tiny_mask(1)[0]]],
            [torch.as_tensor(tiny.tiny_mask(1))],
            [tiny.tiny_mask(1).astype(np.uint8) * 255],
            [tiny.tiny_mask(1).astype(np.float32)],
            [tiny.tiny_mask(1).tolist()],
        ],
    )
    def test_layouts(self, masks):
        inputs = processor_of("llava")(images=IMAGES[0], instruction="it", masks=masks)
        assert inputs["num_objects"].tolist() == [1]
        assert (inputs["mask_labels"][0, 0, :24] == 1).all()

    @pytest.mark.parametrize("masks", [None, [], [None], [[]], np.zeros((0, 30, 40), bool)])
    def test_no_object(self, masks):
        inputs = processor_of("llava")(images=IMAGES[0], instruction="it", masks=masks)
        if masks is None:  # not given at all
            assert "mask_labels" not in inputs and "num_objects" not in inputs
        else:
            assert inputs["num_objects"].tolist() == [0] and inputs["mask_labels"].count_nonzero() == 0

    def test_overflow(self):
        areas = [3, 1, 5, 2]
        masks = torch.zeros(4, 4, 5, dtype=torch.bool)
        for row, area in enumerate(areas):
            masks[row, row, :area] = True
        with pytest.raises(
            ValueError, match='sample 0 has 4 target objects but the model has 3 slots; pass overflow="m'
        ):
            fit_objects_to_slots(masks, 3, "error", "sample 0")
        merged = fit_objects_to_slots(masks, 3, "merge", "sample 0")
        assert merged.sum((1, 2)).tolist() == [3, 5, 3]  # the two smallest are one
        assert torch.equal(merged.any(0), masks.any(0))
        assert fit_objects_to_slots(masks, 3, "drop", "sample 0").sum((1, 2)).tolist() == [3, 5, 2]
        assert fit_objects_to_slots(masks, 1, "merge", "sample 0").sum().item() == 11
        assert fit_objects_to_slots(masks, 4, "error", "sample 0") is masks
        with pytest.raises(ValueError, match="overflow='cut' is not known"):
            fit_objects_to_slots(masks, 4, "cut", "sample 0")

    @pytest.mark.parametrize(
        "size, expected", [((48, 64), (768, 1024)), ((65, 40), (1024, 630)), ((2, 8000), (1, 1024))]
    )
    def test_resized_size(self, size, expected):
        assert resized_size(size, 1024) == expected


class TestPostProcessing:
    def outputs(self, **overrides):
        """Two samples, two slots; each mask covers the left half of the valid area of a 64-pixel canvas."""
        logits = torch.full((2, 2, 32, 32), -8.0)
        logits[0, :, :, :16] = 8.0  # image 30 x 40 on 48 x 64
        logits[1, :, :, :16] = 8.0  # image 40 x 90 on 28 x 64
        fields = {
            "pred_masks": logits,
            "heatmap_logits": logits / 4,
            "slot_logits": torch.tensor([[0.4, -0.4], [2.0, 1.0]]),
            "slot_logit_threshold": 0.0,
            "duplicate_iou_threshold": 2.0,  # the two masks are the same
        }
        return SimpleNamespace(**(fields | overrides))

    sizes = {"original_sizes": torch.tensor([[30, 40], [40, 90]]), "reshaped_input_sizes": [[48, 64], [28, 64]]}

    def test_masks_scores_slots_heatmaps(self):
        results = processor_of("llava").post_process_segmentation(self.outputs(), **self.sizes)
        assert [result["slots"].tolist() for result in results] == [[0], [0, 1]]
        torch.testing.assert_close(results[0]["scores"], torch.tensor([0.4]).sigmoid())
        assert results[0]["masks"].shape == (1, 30, 40) and results[1]["masks"].shape == (2, 40, 90)
        assert results[0]["masks"].dtype == torch.bool
        assert results[0]["masks"][0, :, :20].all() and not results[0]["masks"][0, :, 20:].any()
        assert results[1]["masks"][:, :, :45].all() and not results[1]["masks"][:, :, 45:].any()
        heat = results[1]["heatmaps"]
        assert heat.shape == (2, 40, 90) and 0 <= heat.min() and heat.max() <= 1
        torch.testing.assert_close(heat[0, 20, 0], torch.tensor(2.0).sigmoid())  # 8 / 4

    def test_the_padding_is_cut_off(self):
        logits = torch.full((1, 1, 32, 32), -8.0)
        logits[:, :, 24:] = 8.0  # only the padding of a 30 x 40 image
        outputs = self.outputs(pred_masks=logits, heatmap_logits=logits, slot_logits=torch.ones(1, 1))
        result = processor_of("llava").post_process_segmentation(outputs, [[30, 40]], [[48, 64]])[0]
        assert result["masks"].sum().item() <= 40  # at most the last row, by interpolation

    def test_thresholds(self):
        process = functools.partial(processor_of("llava").post_process_segmentation, **self.sizes)
        assert [len(r["slots"]) for r in process(self.outputs(slot_logit_threshold=0.5))] == [0, 2]
        assert [len(r["slots"]) for r in process(self.outputs(), slot_logit_threshold=1.5)] == [0, 1]
        assert [len(r["slots"]) for r in process(self.outputs(), slot_logit_threshold=-1.0)] == [2, 2]
        empty = process(self.outputs(), slot_logit_threshold=9.0)[0]
        assert empty["masks"].shape == (0, 30, 40) and empty["heatmaps"].shape == (0, 30, 40)
        assert not process(self.outputs(), mask_logit_threshold=8.5)[1]["masks"].any()

    def test_reasoning_and_text(self):
        processor = processor_of("llava")
        full = processor(images=IMAGES, instruction=INSTRUCTIONS, reasoning=["a red one", ""])
        outputs = self.outputs(sequences=full["input_ids"], completion_mask=full["completion_mask"])
        results = processor.post_process_segmentation(outputs, **self.sizes)
        assert [result["reasoning"] for result in results] == ["a red one", ""]
        assert results[0]["text"] == "<think>a red one</think>" + "<REF_POS>" * 4
        outputs = self.outputs(sequences=full["input_ids"])  # the prompt names the tags too
        assert processor.post_process_segmentation(outputs, **self.sizes)[0]["reasoning"] == "a red one"
        assert processor.post_process_segmentation(self.outputs(), **self.sizes)[0]["text"] == ""

    def test_malformed_answers(self):
        processor = processor_of("llava")
        answers = ["no tags <REF_POS>", "<think>never closed<REF_POS>"]
        ids = processor.tokenizer(answers, padding=True, return_tensors="pt", add_special_tokens=False)
        outputs = self.outputs(sequences=ids["input_ids"], completion_mask=ids["attention_mask"])
        results = processor.post_process_segmentation(outputs, **self.sizes)
        assert [result["reasoning"] for result in results] == ["", "never closed"]
        assert [result["text"] for result in results] == answers

    def test_errors(self):
        process = processor_of("llava").post_process_segmentation
        with pytest.raises(ValueError, match="2 samples, original_sizes 1"):
            process(self.outputs(), [[30, 40]], self.sizes["reshaped_input_sizes"])
        nan = self.outputs(slot_logits=torch.full((2, 2), torch.nan))
        with pytest.raises(ValueError, match="sample 0 hold NaN"):
            process(nan, **self.sizes)

    def test_restoring_inverts_the_targets(self):
        mask = torch.zeros(1, 60, 80, dtype=torch.bool)
        mask[0, 12:48, 8:40] = True
        target = soft_mask_targets(mask, 64, 32)[0]
        restored = restore_map(target - 0.5, 64, (48, 64), (60, 80)) > 0
        overlap = (restored & mask[0]).sum() / (restored | mask[0]).sum()
        assert overlap > 0.95


class TestSaving:
    ARGUMENTS = {
        "images": IMAGES,
        "instruction": INSTRUCTIONS,
        "reasoning": ["a", ""],
        "masks": [tiny.tiny_mask(2), None],
    }

    @EVERY_FAMILY
    def test_round_trips(self, family, tmp_path):
        processor = tiny.tiny_processor(family, num_slots=3, instruction_template="see {instruction}")
        expected = processor(**self.ARGUMENTS)
        processor.save_pretrained(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} >= {"processing_segcompass.py", "images_segcompass.py"}
        loaded = SegCompassProcessor.from_pretrained(tmp_path)
        assert (loaded.num_slots, loaded.instruction_template) == (3, "see {instruction}")
        assert loaded.end_of_turn_token == END_OF_TURN[family]
        for same in (loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
            assert_same(same(**self.ARGUMENTS), expected)
        again = tmp_path / "again"
        loaded.save_pretrained(again)
        first, second = (json.loads((path / "processor_config.json").read_text()) for path in (tmp_path, again))
        assert first == second

    def test_from_parts(self, tmp_path):
        processor = processor_of("qwen2_5_vl")
        rebuilt = SegCompassProcessor.from_parts(processor.vlm_processor, processor.sam_image_processor)
        assert_same(rebuilt(**self.ARGUMENTS), processor(**self.ARGUMENTS))

        own = tiny.tiny_processor("llava").vlm_processor
        assert type(own) is LlavaProcessor
        rebuilt = SegCompassProcessor.from_parts(own, SamProcessor(tiny.tiny_sam_image_processor()), num_slots=2)
        assert rebuilt.vlm_processor_kwargs["num_additional_image_tokens"] == 1
        assert rebuilt.num_slots == 2 and rebuilt.canvas_size == 64

    @EVERY_FAMILY
    def test_from_a_folder_of_the_vlm(self, family, tmp_path):
        """As on the Hub: the VLM's folder names its processor class, with a video processor for the Qwens."""
        processor = tiny.tiny_processor(family)
        fresh = {**tiny.tiny_parts(family)}
        tiny.tiny_vlm_config(family).save_pretrained(tmp_path)
        fresh["tokenizer"].save_pretrained(tmp_path)
        fresh["image_processor"].save_pretrained(tmp_path)
        fields = {"processor_class": fresh["vlm_processor_class"], **fresh["vlm_processor_kwargs"]}
        (tmp_path / "processor_config.json").write_text(json.dumps(fields))
        loaded = SegCompassProcessor.from_parts(str(tmp_path), tiny.tiny_sam_config())
        assert loaded.vlm_processor_class == fresh["vlm_processor_class"]
        assert_same(loaded(**self.ARGUMENTS), processor(**self.ARGUMENTS))

    def test_sam_sizes(self):
        own = processor_of("llava").vlm_processor
        for source, canvas, side in [(256, 256, 64), (SamConfig(), 1024, 256), (tiny.tiny_sam_config(), 64, 32)]:
            processor = SegCompassProcessor.from_parts(own, source)
            assert (processor.canvas_size, processor.mask_size) == (canvas, side)
        with pytest.raises(ValueError, match="sam_processor is a list"):
            SegCompassProcessor.from_parts(own, [1])

    def test_auto_processor(self, tmp_path):
        import segcompass_hf  # noqa: F401

        processor = processor_of("llava")
        processor.save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "segcompass"}))
        loaded = AutoProcessor.from_pretrained(tmp_path)
        assert type(loaded) is SegCompassProcessor
        assert_same(loaded(**self.ARGUMENTS), processor(**self.ARGUMENTS))

    @pytest.mark.slow
    def test_remote_code_without_the_package(self, tmp_path):
        processor_of("qwen3_vl").save_pretrained(tmp_path / "model")
        script = (
            "import importlib.util, sys, numpy\n"
            "sys.modules['segcompass_hf'] = None\n"  # an import of it fails, also where it is installed
            "assert importlib.util.find_spec('segcompass_hf') is None\n"
            "from transformers import AutoProcessor\n"
            f"processor = AutoProcessor.from_pretrained({str(tmp_path / 'model')!r}, trust_remote_code=True)\n"
            "inputs = processor(images=numpy.zeros((30, 40, 3), 'uint8'), instruction='it')\n"
            "print(type(processor).__name__, tuple(inputs['sam_pixel_values'].shape))\n"
        )
        environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
        run = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert run.stdout.strip() == "SegCompassProcessor (1, 3, 64, 64)", run.stderr[-2000:]

    def test_a_replaced_tokenizer_is_used(self):
        processor = tiny.tiny_processor("llava")
        before = processor.vlm_processor
        assert processor.vlm_processor is before
        processor.tokenizer = copy.deepcopy(processor.tokenizer)
        assert processor.vlm_processor is not before and processor.vlm_processor.tokenizer is processor.tokenizer


def test_image_processors_are_on_the_pil_backend():
    """Where torchvision is installed, loading makes the class without `Pil` in its name: played here by a copy."""
    import transformers

    from segcompass_hf.vlm_processors_segcompass import on_pil_backend

    processor = processor_of("llava")
    assert on_pil_backend(processor.image_processor) is processor.image_processor
    pil_class = type(processor.image_processor)
    assert pil_class.__name__ == "CLIPImageProcessorPil" and pil_class is transformers.CLIPImageProcessorPil
    for name in ("CLIPImageProcessor", "CLIPImageProcessorFast"):
        other = type(name, (pil_class,), {})(**processor.image_processor.to_dict())
        pinned = on_pil_backend(other)
        assert type(pinned) is pil_class and pinned.to_dict() == processor.image_processor.to_dict()
    unknown = type("OwnImageProcessor", (pil_class,), {})()
    assert on_pil_backend(unknown) is unknown


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_slots", True),
        ("num_slots", 0),
        ("think_tags", "x"),
        ("think_tags", None),
        ("think_tags", []),
        ("instruction_template", 7),
        ("instruction_template", ["{instruction}"]),
        ("completion_template", None),
    ],
)
def test_settings_of_other_kinds_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} is .*; expected"):
        tiny.tiny_processor("llava", **{field: value})
