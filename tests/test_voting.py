"""Answers that vote: by hand on strips of pixels, and on models of every kind."""

import pytest
import torch
from tiny import FAMILIES, tiny_image, tiny_model, tiny_processor
from transformers import AutoModel, AutoProcessor

import segcompass_hf
from segcompass_hf.data import scenes
from segcompass_hf.modeling_concepts import SparseConcepts
from segcompass_hf.segmenting_segcompass import SegCompassSegmentationOutput
from segcompass_hf.voting_segcompass import check_votes, concept_use, count_votes, vote

WIDTH = 8


def strip(*pixels):
    mask = torch.zeros(1, WIDTH, dtype=torch.bool)
    mask[0, list(pixels)] = True
    return mask


LEFT, RIGHT, NONE = strip(0, 1, 2, 3), strip(4, 5, 6, 7), strip()
NEARLY_LEFT = strip(1, 2, 3)  # IoU with the left one 3 / 4
# Three samplings of two slots: left and right; nearly left; right, in its second slot, and a slot of nothing.
MASKS = torch.stack([torch.stack(pair) for pair in [(LEFT, RIGHT), (NEARLY_LEFT, NONE), (NONE, RIGHT)]])
KEPT = torch.tensor([[True, True], [True, False], [True, True]])
SAME_CONCEPTS = torch.ones(3, 4)


def test_the_sampling_that_agrees_most_is_chosen():
    votes = count_votes(MASKS, KEPT, SAME_CONCEPTS)
    # The first agrees with each other one by 2 / 3 (F1), these with each other by 0.
    assert votes.chosen == 0
    assert votes.shares.tolist() == pytest.approx([2 / 3, 2 / 3])
    assert votes.voters.tolist() == [[0, 0, -1], [1, -1, 1]]
    assert votes.concept_agreement == pytest.approx(1.0)


def test_concepts_vote_too():
    """Of equal masks the answer whose concepts are those of the others."""
    masks, kept = torch.stack([LEFT[None]] * 3), torch.ones(3, 1, dtype=torch.bool)
    concepts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    votes = count_votes(masks, kept, concepts)
    assert votes.chosen == 1 and votes.concept_agreement == pytest.approx(0.5)
    assert votes.shares.tolist() == [1.0]


def test_answers_of_nothing_agree():
    masks = torch.stack([NONE[None], NONE[None], LEFT[None]])
    votes = count_votes(masks, torch.tensor([[False], [False], [True]]), SAME_CONCEPTS)
    assert votes.chosen == 0 and votes.shares.tolist() == [0.0] and votes.voters.tolist() == [[-1, -1, -1]]


def test_concepts_in_use_are_those_of_what_was_written():
    concepts = SparseConcepts(
        torch.tensor([0, 2, 2, 1]), torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 1, 2, 5]), 2, 3
    )
    completion_mask = torch.tensor([[0, 1, 1], [0, 0, 1]])
    assert concept_use(concepts, completion_mask, 3).tolist() == [[0, 0, 6.0], [0, 8.0, 0]]


def made_output():
    """Two prompts of three samplings: those above, and three times nothing."""
    logits = torch.where(MASKS, 2.0, -2.0)
    logits[1] *= 2  # another one's mask is surer
    slot_logits = torch.where(KEPT, 5.0, -5.0)
    scores = slot_logits.sigmoid()
    scores[0, 1], scores[2, 1] = 0.8, 0.4  # the samplings that have the right one
    empty = torch.full_like(slot_logits, -5.0)
    return SegCompassSegmentationOutput(
        sequences=torch.arange(6)[:, None],
        completion_mask=torch.ones(6, 1, dtype=torch.long),
        slot_logit_threshold=1.0,
        mask_logit_threshold=0.0,
        duplicate_iou_threshold=0.5,
        slot_logits=torch.cat([slot_logits, empty]),
        slot_scores=torch.cat([scores, empty.sigmoid()]),
        pred_masks=torch.cat([logits, logits]),
        concepts=SparseConcepts(torch.full((4,), 3), torch.ones(4), torch.tensor([0, 1, 4, 5]), 6, 1),
        slot_attentions=(torch.arange(6.0)[:, None],),
        guardrails=("a rule",),
    )


def test_the_agreed_answer():
    voted = vote(made_output(), 3, d_sae=4)
    assert voted.sequences.tolist() == [[0], [4]]  # of the second prompt the first whose concepts are not alone
    sure = torch.tensor(5.0).sigmoid().item()
    assert voted.slot_scores[0].tolist() == pytest.approx([2 / 3 * sure, 2 / 3 * 0.6])  # of three, two have each
    # log odds of 2 / 3 are log 2, above the model's threshold
    assert voted.slot_logits[0].tolist() == pytest.approx([1 + 0.6931, 1 + 0.6931], abs=1e-3)
    assert voted.slot_logits[1].tolist() == [-5.0, -5.0]
    # Slot 0: the mean of (2, 2, 2, 2, -2, ...) and (-4, 4, 4, 4, -4, ...); slot 1 of (-2, ..., 2) with itself.
    assert voted.pred_masks[0, 0, 0].tolist() == [-1, 3, 3, 3, -3, -3, -3, -3]
    assert voted.pred_masks[0, 1, 0].tolist() == [-2] * 4 + [2] * 4
    assert torch.equal(voted.pred_masks[1], made_output().pred_masks[4])
    assert voted.concepts.batch_size == 2 and voted.concepts.token_index.tolist() == [0, 1]
    assert voted.slot_attentions[0].tolist() == [[0.0], [4.0]] and voted.guardrails == ("a rule",)
    assert voted.concept_agreement.tolist() == pytest.approx([0.5, 0.5])


def test_a_mask_of_few_samplings_is_left_out():
    """Of four samplings two have the mask: no majority."""
    output = made_output()
    masks = torch.stack([LEFT[None], LEFT[None], NONE[None], NONE[None]])
    kept = torch.tensor([[5.0], [5.0], [-5.0], [-5.0]])
    output = SegCompassSegmentationOutput(
        **{name: value[:4] if hasattr(value, "shape") else value for name, value in output.items()}
        | {"pred_masks": torch.where(masks, 2.0, -2.0), "slot_logits": kept, "slot_scores": kept.sigmoid()}
        | {"concepts": SparseConcepts(torch.zeros(4, dtype=torch.long), torch.ones(4), torch.arange(4), 4, 1)}
    )
    voted = vote(output, 4, d_sae=4)
    assert voted.slot_logits[0, 0] == output.slot_logit_threshold  # not above it
    assert voted.slot_scores[0, 0].item() == pytest.approx(0.5 * torch.tensor(5.0).sigmoid().item())


def test_padding_does_not_vote():
    output = made_output()
    outside = torch.zeros(6, 1, 1, WIDTH, dtype=torch.bool)
    voted = vote(output, 3, d_sae=4, valid_area=outside)  # all slots are empty now
    assert torch.equal(voted.slot_logits[0], output.slot_logits[0])


@pytest.mark.parametrize(
    ("votes", "generation", "message"),
    [
        (1, {}, "expected 2 or more"),
        (True, {}, "expected 2 or more"),
        (3, {"do_sample": False}, "leave do_sample=False"),
        (3, {"num_return_sequences": 2}, "samples 3 answers"),
    ],
)
def test_votes_need_samplings(votes, generation, message):
    with pytest.raises(ValueError, match=message):
        check_votes(votes, generation)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_every_family_vote(family):
    model, processor = tiny_model(family, slot_logit_threshold=-100.0).eval(), tiny_processor(family)
    images, instructions = [tiny_image(0), tiny_image(1)], ["find it", "find the other one, please"]
    inputs = processor(images=images, instruction=instructions, return_tensors="pt")
    options = {"max_new_tokens": 14, "output_slot_attentions": True, "output_image_embeddings": True}
    output = model.segment(**inputs, votes=3, **options)
    assert len(output.sequences) == len(output.pred_masks) == len(output.concept_agreement) == 2
    assert output.concepts is None and output.image_embeddings.shape[0] == 2
    assert all(layer.shape[0] == 2 for layer in output.slot_attentions)
    assert ((output.slot_scores >= 0) & (output.slot_scores <= 1)).all()
    results = processor.post_process_segmentation(output, inputs["original_sizes"], inputs["reshaped_input_sizes"])
    assert len(results) == 2 and all(result["reasoning"] for result in results)
    rows = model.segment(**inputs, votes=2, output_concepts=True, **options).concepts
    assert rows.batch_size == 2 and len(rows.features)


def test_the_bundled_checkpoint_is_as_good_when_it_votes():
    path = segcompass_hf.bundled_checkpoint()
    model, processor = AutoModel.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)
    row = next(scenes.iterate("val", 1, seed=77))
    inputs = processor(images=row["image"], instruction=row["instruction"], return_tensors="pt")
    greedy, voted = model.segment(**inputs), model.segment(**inputs, votes=3)
    present = greedy.slot_logits > greedy.slot_logit_threshold
    assert torch.equal(voted.slot_logits > voted.slot_logit_threshold, present) and present.any()
    assert (voted.slot_scores[present] > 0.5).all() and (voted.slot_scores[present] <= 1).all()
