# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The reward functions: forms of answers, and masks whose scores are worked out by hand."""

import doctest
import math

import original_rewards
import pytest
import torch
from original_rewards import original_format_reward, original_mask_reward

from segcompass_hf.training.rewards import mask_scores, rewards
from segcompass_hf.training.rewards.rewards import format_problem, format_reward, is_well_formed, mask_reward

REF2 = "<REF_POS><REF_POS>"
SURE = 100.0  # a logit whose sigmoid is 1 in float32; its negative gives 0


@pytest.mark.parametrize("module", [rewards, original_rewards])
def test_docstring_examples(module):
    results = doctest.testmod(module)
    assert results.attempted > 0 and results.failed == 0


class TestFormatReward:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            (f"<think>a cup</think>{REF2}", 1.0),
            ("  <think>\na cup\n</think>\n<REF_POS> <REF_POS>\n", 1.0),  # white space is free
            (f"<think>a cup</think>{REF2}<|im_end|>\n", 1.0),  # what ends a turn is free
            (f"<think>a cup</think>{REF2}</s><pad><pad>", 1.0),
            ("<think>a cup</think> it is <REF_POS><REF_POS>", 0.9),
            (f"<think>a cup</think>{REF2} done", 0.9),
            ("<think>a cup</think>" + " w" * 5 + "<REF_POS>" + " w" * 3 + "<REF_POS>" + " w" * 2, 0.9),  # 10 words
            ("<think>a cup</think>" + " w" * 5 + "<REF_POS>" + " w" * 3 + "<REF_POS>" + " w" * 3, 0.0),  # 11 words
            ("<think>" + "a" * 2048 + f"</think>{REF2}", 1.0),
            ("<think>" + "a" * 2049 + f"</think>{REF2}", 0.9),
            ("<think>" + "a" * 2049 + f"</think>{REF2} done", 0.9),  # two flaws cost what one costs
            (f"Well: <think>a cup</think>{REF2}", 0.0),
            (f"<|im_end|><think>a cup</think>{REF2}", 0.0),  # the turn ends at the end only
            (f"<think></think>{REF2}", 0.0),
            (f"<think> \n\u00a0</think>{REF2}", 0.0),
            (f"<think><think>a cup</think>{REF2}", 0.0),
            (f"<think>a <think>b</think> c</think>{REF2}", 0.0),
            (f"<think>a cup</think></think>{REF2}", 0.0),
            (f"<think>a</think><think>b</think>{REF2}", 0.0),
            (f"<think>a cup</think>{REF2}<think>", 0.0),
            ("<think>a <REF_POS> cup</think><REF_POS><REF_POS>", 0.0),
            ("<think>a <REF_POS> cup</think><REF_POS>", 0.0),
            ("<think>a cup</think><REF_POS>", 0.0),
            ("<think>a cup</think><REF_POS><REF_POS><REF_POS>", 0.0),
            ("<think>a cup</think>", 0.0),
            (f"<think>a cup{REF2}", 0.0),
            (f"a cup</think>{REF2}", 0.0),
            (f"<Think>a cup</Think>{REF2}", 0.0),
            ("", 0.0),
        ],
    )
    def test_forms(self, text, expected):
        assert format_reward([text], num_slots=2) == [expected]
        assert is_well_formed(text, num_slots=2) == (expected > 0)
        assert (format_problem(text, num_slots=2) is None) == (expected == 1)

    def test_conversations_as_trl_passes_them(self):
        text = f"<think>a cup</think>{REF2}"
        plain = [{"role": "assistant", "content": text}]
        parts = [
            {"role": "assistant", "content": [{"type": "text", "text": text[:9]}, {"type": "text", "text": text[9:]}]}
        ]
        columns = {"prompts": ["p"] * 3, "completion_ids": [[1]] * 3, "trainer_state": None}
        assert format_reward(completions=[plain, parts, []], num_slots=[2, 2, 2], **columns) == [1.0, 1.0, 0.0]

    def test_slots_of_each_completion(self):
        completions = [f"<think>a</think>{'<REF_POS>' * count}" for count in (1, 2, 3)]
        assert format_reward(completions, num_slots=[1, 2, 4]) == [1.0, 1.0, 0.0]
        assert format_reward(completions, num_slots=torch.tensor([1, 1, 3])) == [1.0, 0.0, 1.0]
        with pytest.raises(ValueError, match="2 values of num_slots for 3 completions"):
            format_reward(completions, num_slots=[1, 2])

    def test_refuses_what_is_no_text(self):
        with pytest.raises(ValueError, match="holds a int; expected a string or a list of messages"):
            format_reward([[{"role": "assistant", "content": 3}]])

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("hello", "no <think>"),
            ("hello <think>", "text before <think>"),
            ("<think>a", "no </think>"),
            ("<think>a</think><REF_POS>", "1 <REF_POS> instead of 2"),
            (f"<think>a</think>{REF2} one", "1 word after the reasoning"),
            (f"<think>a</think>{REF2}" + " w" * 11, "11 words after the reasoning, more than 10"),
            ("<think>" + "a" * 3000 + f"</think>{REF2}", "3000 characters of reasoning, more than 2048"),
        ],
    )
    def test_problems_are_named(self, text, problem):
        assert format_problem(text, num_slots=2) == problem


def columns(size: int = 4, num_slots: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of maps `(size, size)`; slot and object k cover column k."""
    labels = torch.zeros(num_slots, size, size)
    for index in range(num_slots):
        labels[index, :, index] = 1
    return (labels * 2 - 1) * SURE, labels


class TestMaskReward:
    def test_matched_slots_of_any_order(self):
        masks, labels = columns()
        assert mask_reward(pred_masks=[masks.flip(0)], mask_labels=[labels], num_objects=[2]) == [1.0]

    def test_soft_iou_by_hand(self):
        # 2 x 2 map, object on the left half; probabilities 0.75 left, 0.25 right: overlap 1.5, union 2 + 2 - 1.5.
        labels = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
        probabilities = torch.tensor([[[0.75, 0.25], [0.75, 0.25]], [[0.0, 1.0], [0.0, 1.0]]])
        logits = torch.logit(probabilities, eps=1e-7)
        values = mask_reward(
            pred_masks=[logits] * 2,
            mask_labels=[labels] * 2,
            num_objects=[1, 1],
            slot_logits=[torch.tensor([1.0, -1.0]), torch.tensor([1.0, 1.0])],
        )
        # The second keeps the useless slot as well: max(2 kept, 1 object).
        assert values == pytest.approx([1.5 / 2.5, 1.5 / 2.5 / 2], abs=1e-5)

    def test_hungarian_beats_greedy(self):
        # Slot 0 covers both objects (IoU 1/2 with each), slot 1 object 0 alone. Greedy by slot order would give
        # slot 0 object 0; the best assignment is slot 1 to object 0 (1) and slot 0 to object 1 (1/2).
        _, labels = columns()
        masks = torch.stack([labels.sum(0), labels[0]])
        values = mask_reward(pred_masks=[(masks * 2 - 1) * SURE], mask_labels=[labels], num_objects=[2])
        assert values == pytest.approx([0.75])

    @pytest.mark.parametrize(
        ("kept", "count", "expected"),
        [
            ([1, 1], 2, 1.0),
            ([1, 0], 2, 0.5),  # one of two objects missing
            ([1, 1], 1, 0.5),  # one slot too many
            ([1, 0], 1, 1.0),
            ([0, 0], 1, 0.0),
            ([0, 0], 0, 1.0),
            ([0, 1], 0, 0.0),
        ],
    )
    def test_extra_and_missing_slots_cost(self, kept, count, expected):
        masks, labels = columns()
        slot_logits = torch.tensor(kept) * 2.0 - 1
        values = mask_reward(pred_masks=[masks], mask_labels=[labels], num_objects=[count], slot_logits=[slot_logits])
        assert values == [expected]

    def test_threshold(self):
        masks, labels = columns()
        arguments = {
            "pred_masks": [masks] * 2,
            "mask_labels": [labels] * 2,
            "num_objects": [1, 1],
            "slot_logits": [torch.tensor([0.7, 0.5])] * 2,
        }
        assert mask_reward(**arguments) == [0.5, 0.5]
        assert mask_reward(**arguments, slot_logit_threshold=0.5) == [1.0, 1.0]  # a logit at the threshold is not kept
        assert mask_reward(**arguments, slot_logit_threshold=[0.5, 0.8]) == [1.0, 0.0]

    def test_padding_does_not_count(self):
        masks, labels = columns()
        area = torch.ones(4, 4, dtype=torch.bool)
        area[:, 2:] = False
        noisy = masks.clone()
        noisy[:, :, 2:] = SURE
        arguments = {"pred_masks": [noisy], "mask_labels": [labels], "num_objects": [2]}
        assert mask_reward(**arguments, valid_area=[area]) == [1.0]
        assert mask_reward(**arguments, valid_area=[area[None]]) == [1.0]
        assert mask_reward(**arguments) == pytest.approx([1 / 3])  # 4 pixels of 12 in each union

    def test_lists_and_batches_agree(self):
        masks, slot_logits = torch.randn(6, 3, 8, 8), torch.randn(6, 3)
        labels, counts = torch.rand(6, 3, 8, 8), [0, 1, 2, 3, 1, 0]
        area = torch.rand(6, 1, 8, 8) > 0.3
        batched = mask_reward(
            pred_masks=masks,
            mask_labels=labels,
            num_objects=torch.tensor(counts),
            slot_logits=slot_logits,
            valid_area=area,
        )
        listed = mask_reward(
            completions=["text"] * 6,
            pred_masks=list(masks),
            mask_labels=[label[:count] for label, count in zip(labels, counts, strict=True)],  # objects alone
            num_objects=counts,
            slot_logits=list(slot_logits),
            valid_area=list(area[:, 0]),
            slot_logit_threshold=[0.0] * 6,
            num_slots=[3] * 6,
            prompts=["p"] * 6,
        )
        single = [
            mask_reward(
                pred_masks=masks[i : i + 1],
                mask_labels=labels[i : i + 1],
                num_objects=counts[i : i + 1],
                slot_logits=slot_logits[i : i + 1],
                valid_area=area[i : i + 1],
            )[0]
            for i in range(6)
        ]
        assert len(set(batched)) > 3
        assert all(isinstance(value, float) and 0 <= value <= 1 for value in batched)
        assert listed == pytest.approx(batched, abs=1e-6) and single == pytest.approx(batched, abs=1e-6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision_sums_in_float32(self, dtype):
        # 65,536 pixels: a sum in 16 bits would be off by far more.
        labels = torch.zeros(1, 2, 256, 256)
        labels[0, 0, :, :100] = 1
        logits = torch.full((1, 2, 256, 256), -9.0)
        logits[0, 0, :, 3:100] = 9.0
        arguments = {"mask_labels": labels, "num_objects": [1], "slot_logits": torch.tensor([[1.0, -1.0]])}
        full = mask_reward(pred_masks=logits, **arguments)
        assert full == pytest.approx([0.97], abs=1e-3)  # 97 of 100 columns
        assert mask_reward(pred_masks=logits.to(dtype), **arguments) == pytest.approx(full, abs=1e-5)

    def test_small_batches_of_a_large_rollout(self, monkeypatch):
        masks, labels, slot_logits = torch.randn(7, 2, 4, 4), torch.rand(7, 2, 4, 4), torch.randn(7, 2)
        arguments = {"pred_masks": masks, "mask_labels": labels, "num_objects": [0, 1, 2, 1, 2, 0, 1]}
        whole = mask_reward(**arguments, slot_logits=slot_logits)
        monkeypatch.setattr(mask_scores, "CPU_BATCH_VALUES", 3 * 2 * 4 * 4)  # three completions at a time
        assert mask_reward(**arguments, slot_logits=slot_logits) == pytest.approx(whole, abs=1e-6)
        slot_logits[5, 1] = math.nan
        with pytest.raises(ValueError, match="completion 5 has NaN"):
            mask_reward(**arguments, slot_logits=slot_logits)

    def test_no_completion(self):
        assert mask_reward(pred_masks=[], mask_labels=[], num_objects=[]) == []


class TestSingleObject:
    def test_formula_by_hand(self):
        # Object: left half of 2 x 2. Probabilities 0.8 0.6 / 0.4 0.0: overlap 1.2, sums 1.8 and 2.
        labels = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
        logits = torch.logit(torch.tensor([[[0.8, 0.6], [0.4, 0.0]]]), eps=1e-7)
        soft_iou, soft_dice, hard_iou = 1.2 / 2.6, 2.4 / 3.8, 1 / 3
        expected = 0.5 * soft_iou + 0.2 * soft_dice + 0.3 * hard_iou
        for slot_logits in (None, [torch.tensor([-5.0])]):  # the object's presence is not in question
            arguments = {"pred_masks": [logits], "mask_labels": [labels], "num_objects": [1]}
            assert mask_reward(**arguments, slot_logits=slot_logits) == pytest.approx([expected], abs=1e-5)

    @pytest.mark.parametrize(
        ("value", "slot_logit", "expected"),
        [(-3.0, 5.0, 1.0), (3.0, -5.0, 1.0), (3.0, 5.0, 0.0)],
        ids=["empty mask", "slot not kept", "a mask where nothing is"],
    )
    def test_nothing_to_find(self, value, slot_logit, expected):
        arguments = {
            "pred_masks": torch.full((1, 1, 4, 4), value),
            "mask_labels": torch.zeros(1, 1, 4, 4),
            "num_objects": [0],
            "slot_logits": torch.tensor([[slot_logit]]),
        }
        assert mask_reward(**arguments) == [expected]
        assert mask_reward(**arguments | {"mask_labels": torch.zeros(1, 0, 4, 4)}) == [expected]
        assert original_mask_reward(**arguments) == [0.0]

    def test_padding_does_not_count(self):
        area = torch.zeros(4, 4, dtype=torch.bool)
        area[:, :2] = True
        logits = torch.full((1, 4, 4), -SURE)
        logits[:, :, 2:] = SURE
        arguments = {"pred_masks": [logits], "mask_labels": [torch.zeros(1, 4, 4)], "num_objects": [0]}
        assert mask_reward(**arguments, valid_area=[area]) == [1.0]
        assert mask_reward(**arguments) == [0.0]


class TestErrors:
    def arguments(self, num_slots: int = 2) -> dict:
        masks, labels = columns(num_slots=num_slots)
        return {
            "pred_masks": torch.stack([masks] * 3),
            "mask_labels": torch.stack([labels] * 3),
            "num_objects": [1, 1, 1],
            "slot_logits": torch.ones(3, num_slots),
        }

    @pytest.mark.parametrize("num_slots", [1, 2])
    @pytest.mark.parametrize("name", ["pred_masks", "slot_logits", "mask_labels"])
    @pytest.mark.parametrize("function", [mask_reward, original_mask_reward])
    def test_nan_names_the_completion(self, function, name, num_slots):
        arguments = self.arguments(num_slots)
        arguments[name][1].view(-1)[0] = math.nan
        if function is original_mask_reward and num_slots == 1 and name == "slot_logits":
            assert len(function(**arguments)) == 3  # the original never looks at the logit of a single slot
            return
        with pytest.raises(ValueError, match="completion 1 has NaN"):
            function(**arguments)

    def test_nan_in_filling_is_no_matter(self):
        arguments = self.arguments()
        arguments["mask_labels"][:, 1] = math.nan  # of two masks one is an object
        assert mask_reward(**arguments) == [0.5, 0.5, 0.5]

    @pytest.mark.parametrize("num_slots", [1, 2])
    def test_more_objects_than_masks(self, num_slots):
        with pytest.raises(ValueError, match=f"completion 2 has num_objects=5, but at most {num_slots} can be scored"):
            mask_reward(**self.arguments(num_slots) | {"num_objects": [1, 0, 5]})

    def test_shapes(self):
        good = self.arguments()
        for name, value, message in (
            (
                "mask_labels",
                torch.zeros(3, 2, 5, 5),
                r"mask_labels has an entry of shape \(2, 5, 5\), expected \(2, 4, 4\)",
            ),
            ("num_objects", [1], "num_objects has 1 entries for 3 completions"),
            ("pred_masks", torch.zeros(3, 4, 4), r"shape \(4, 4\), expected \(num_slots, height, width\)"),
            ("pred_masks", [torch.zeros(n, 4, 4) for n in (2, 3, 2)], r"shape \(3, 4, 4\), expected \(2, 4, 4\)"),
            ("slot_logits", torch.zeros(3, 1), r"slot_logits has an entry of shape \(1,\), expected \(2\)"),
            ("valid_area", torch.ones(3, 5, 5), r"valid_area has an entry of shape \(1, 5, 5\), expected \(1, 4, 4\)"),
            ("slot_logit_threshold", [0.0], "slot_logit_threshold has 1 entries for 3 completions"),
        ):
            with pytest.raises(ValueError, match=message):
                mask_reward(**good | {name: value})


class TestOriginalRewards:
    """Where the original's rules are others than ours; tests/training/test_parity.py has its own figures."""

    def test_format(self):
        wordy = "Well, <think>a cup</think> it is here: <REF_POS> and so on and on and on and on and on and on and on"
        assert (format_reward([wordy], num_slots=1), original_format_reward([wordy])) == ([0.0], [0.9])
        right = f"<think>a cup</think>{REF2}"
        assert (format_reward([right], num_slots=2), original_format_reward([right])) == ([1.0], [0.0])

    def test_threshold_and_padding(self):
        masks, labels = columns()
        arguments = {"pred_masks": [masks], "mask_labels": [labels], "num_objects": [1]}
        arguments["slot_logits"] = [torch.tensor([0.5, 0.4])]
        assert original_mask_reward(**arguments) == [1.0]  # kept from 0.5 on
        assert mask_reward(**arguments) == [0.5]
        area = torch.zeros(4, 4, dtype=torch.bool)
        assert original_mask_reward(**arguments, valid_area=[area]) == [1.0]

    def test_probabilities_as_they_are(self):
        _, labels = columns()
        arguments = {"mask_labels": [labels], "num_objects": [2], "slot_logits": [torch.ones(2)]}
        values = original_mask_reward(pred_masks=[labels * 7 - 3], mask_values="probabilities", **arguments)
        assert values == [1.0]  # clamped to 0 and 1
        with pytest.raises(ValueError, match="mask_values='maps' is not known"):
            original_mask_reward(pred_masks=[labels], mask_values="maps", **arguments)
