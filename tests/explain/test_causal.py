"""Causal tests: replayed concepts give what `segment(interventions=...)` gives; residual ones are answered anew."""

import numpy as np
import pytest
import torch
from tiny import follow_concepts, tiny_image, tiny_model, tiny_processor

from segcompass_hf import ConceptIntervention
from segcompass_hf.explain import Answer, ablate, mask_iou, steer, steer_many

WORDS = {"max_new_tokens": 12}
INACTIVE = 5  # a feature made never to fire


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
def answer(request):
    model = follow_concepts(tiny_model(request.param))
    model.config.slot_logit_threshold = -100.0  # every slot is kept
    model.sae.b_enc.data[INACTIVE] = -1e3
    return Answer(model, tiny_processor(request.param), tiny_image(), "the red thing", **WORDS)


def test_replaying_equals_segmenting_with_interventions(answer):
    ids = answer.captured.features.tolist()
    changes = [
        {ids[0]: 0.0},
        {ids[1]: 0.0, ids[2]: 3.0},
        ConceptIntervention(ids[0], scale=0.0, tokens="image"),
        [ConceptIntervention(INACTIVE, add=2.0, tokens="text"), ConceptIntervention(ids[3], add=-1.0)],
        {i: 0.0 for i in ids},
    ]
    tested = steer_many(answer, changes)
    for change, result in zip(changes, tested, strict=True):
        output = answer.model.segment(**answer.inputs, **answer.segment_kwargs, interventions=change)
        replayed = answer.replay.run(answer.replay.embed_interventions(change), answer.slots)
        torch.testing.assert_close(replayed.slot_logits, output.slot_logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(replayed.heatmap_logits, output.heatmap_logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(replayed.pred_masks, output.pred_masks, rtol=0, atol=1e-4)
        masks = answer.full_size(output.pred_masks[0]) > 0
        ious = [mask_iou(*pair) for pair in zip(answer.masks, masks, strict=True)]
        assert result.iou == pytest.approx(ious, abs=0.02)
        assert result.score_change == pytest.approx(
            (output.slot_logits.sigmoid()[0].numpy() - answer.scores).tolist(), abs=1e-5
        )
        assert result.reasoning is None
    assert tested[-1].features == tuple(ids)
    # Masks follow concepts, and no two slots have the same: what was compared above could have differed.
    masks = answer.captured.pred_masks[0]
    assert (output.pred_masks[0] - masks).abs().amax((1, 2)).min() > 1e-2
    assert all((masks[one] - masks[two]).abs().max() > 1e-2 for one in answer.slots for two in range(one))
    assert all(iou < 1 for iou in tested[-1].iou)


def test_what_is_not_active_can_go(answer):
    result = ablate(answer, INACTIVE, true_masks=answer.masks)
    assert result.iou == result.iou_to_truth == [1.0] * len(answer.slots)
    assert result.score_change == pytest.approx([0.0] * len(answer.slots), abs=1e-6)
    assert steer_many(answer, []) == []


def test_interventions_on_the_residual_stream_are_answered_anew(answer):
    ids = answer.captured.features.tolist()
    change = [ConceptIntervention(ids[0], add=30.0, tokens="text", where="residual")]
    result = steer(answer, change)
    output = answer.model.segment(**answer.inputs, **answer.segment_kwargs, interventions=change)
    sizes = answer.captured.original_sizes, answer.captured.reshaped_input_sizes
    assert result.reasoning == answer.processor.post_process_segmentation(output, *sizes)[0]["reasoning"]
    np.testing.assert_array_equal(np.stack(result.masks), answer.full_size(output.pred_masks[0]) > 0)
    assert ablate(answer, ids[:2], where="residual").features == tuple(ids[:2])
    with pytest.raises(ValueError, match="residual stream"):
        steer_many(answer, [change])


def test_interventions_that_an_answer_was_made_with_stay_in_force(answer):
    ids = answer.captured.features.tolist()
    before = {ids[0]: 0.0, ids[1]: 3.0}
    changed = Answer(answer.model, answer.processor, answer.image, answer.instruction, interventions=before, **WORDS)
    result = ablate(changed, ids[2], where="residual")
    items = [ConceptIntervention(ids[0], scale=0.0), ConceptIntervention(ids[1], scale=3.0)]
    items.append(ConceptIntervention(ids[2], where="residual"))
    output = answer.model.segment(**answer.inputs, **answer.segment_kwargs, interventions=items)
    np.testing.assert_array_equal(np.stack(result.masks), answer.full_size(output.pred_masks[0]) > 0)
    assert result.features == (ids[2],)


def test_one_feature_may_be_an_int_of_any_library(answer):
    features = answer.captured.features
    one = ablate(answer, int(features[0]))
    for same in (features[0], np.int64(int(features[0])), features[:1], [features[0]]):
        assert ablate(answer, same).features == one.features
    assert ablate(answer, features[:2]).features == tuple(features[:2].tolist())


def test_wrong_truth_and_features(answer):
    with pytest.raises(ValueError, match=r"true_masks have shape \(1, 5, 5\)"):
        ablate(answer, 0, true_masks=np.zeros((1, 5, 5), dtype=bool))
    with pytest.raises(ValueError, match="d_sae"):
        ablate(answer, 10**6)


def test_iou_by_hand():
    first, second = np.zeros((2, 3), dtype=bool), np.zeros((2, 3), dtype=bool)
    assert mask_iou(first, second) == 1.0
    first[0], second[:, 0] = True, True  # three pixels and two, one shared, four in all
    assert mask_iou(first, second) == 0.25
