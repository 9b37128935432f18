"""Features of a score and the calibrated score, from small numbers worked out by hand."""

import math

import pytest
import torch

from segcompass_hf import SegCompassForReasoningSegmentation
from segcompass_hf.scoring_segcompass import TokenSurprisal, calibrated_scores, mask_certainty, score_features

from .support import tiny

CALIBRATION = {
    "features": {
        "slot_logit": {"mean": 1.0, "scale": 2.0, "weight": 1.0},
        "reasoning_surprisal": {"mean": 0.5, "scale": 0.5, "weight": -2.0},
    },
    "bias": 0.5,
}


class TestTokenSurprisal:
    def written(self, is_reasoning):
        """Two rows write the tokens 0, 1, 1 after a prompt of one token; p(0) = 1/4 and p(1) = 3/4 at every step."""
        logits, notes = torch.tensor([[0.0, math.log(3.0)]] * 2), TokenSurprisal()
        sequences = torch.tensor([[1, 0, 1, 1]] * 2)
        for length in (1, 2, 3):
            assert notes(sequences[:, :length], logits) is logits  # nothing is changed
        return notes.of_reasoning(sequences, torch.tensor(is_reasoning))

    def test_later_tokens_weigh_more(self):
        # Row 0: the first two tokens, weights 1 and 2; row 1: the last two.
        surprisal = self.written([[1, 1, 0], [0, 1, 1]])
        first, other = math.log(4.0), math.log(4.0 / 3.0)
        torch.testing.assert_close(surprisal, torch.tensor([(first + 2 * other) / 3, other]))

    def test_no_reasoning_is_not_a_number(self):
        assert self.written([[0, 0, 0], [1, 0, 0]]).isnan().tolist() == [True, False]

    def test_a_generate_that_does_not_call_it(self):
        assert TokenSurprisal().of_reasoning(torch.ones(2, 4, dtype=torch.long), torch.ones(2, 3)).isnan().all()


class TestMaskCertainty:
    mask = torch.tensor([[[0.9, 0.6], [0.2, 0.1]]]).logit()

    def test_expected_iou(self):
        # Inside 0.9 and 0.6, outside 0.2 and 0.1: 1.5 of 2 pixels expected inside, 0.3 outside.
        torch.testing.assert_close(mask_certainty(self.mask), torch.tensor([1.5 / 2.3]))

    def test_padding_does_not_count(self):
        area = torch.tensor([[True, False], [True, False]])
        torch.testing.assert_close(mask_certainty(self.mask, area), torch.tensor([0.9 / 1.2]))

    def test_threshold(self):
        above = mask_certainty(self.mask, mask_logit_threshold=1.0)  # p > 0.73: the first pixel alone
        torch.testing.assert_close(above, torch.tensor([0.9 / 1.9]))

    def test_empty(self):
        assert mask_certainty(torch.full((2, 4, 4), -1e4)).tolist() == [0.0, 0.0]


class TestCalibratedScores:
    def test_by_hand(self):
        features = score_features(torch.tensor([[3.0, 1.0]]), torch.tensor([[0.9, 0.9]]), torch.tensor([0.25]))
        assert features.shape == (1, 2, 3) and features[0, 0].tolist() == pytest.approx([3.0, 0.5, 0.9])
        # bias 0.5, slots (3 - 1) / 2 = 1 and 0, surprisal sqrt(0.25) is its mean
        expected = torch.tensor([[1.5, 0.5]]).sigmoid()
        torch.testing.assert_close(calibrated_scores(features, CALIBRATION), expected)

    def test_missing_counts_as_the_mean(self):
        for surprisal in (None, torch.tensor([torch.nan])):
            features = score_features(torch.tensor([[3.0]]), torch.tensor([[0.9]]), surprisal)
            torch.testing.assert_close(calibrated_scores(features, CALIBRATION), torch.tensor([[1.5]]).sigmoid())

    def test_kept_slots_are_calibrated_others_stay_plain(self):
        model = tiny.tiny_model()
        logits, masks = torch.tensor([[3.0, -2.0]]), torch.zeros(1, 2, 8, 8)
        torch.testing.assert_close(model.score_slots(logits, masks), logits.sigmoid())
        model.config.score_calibration = CALIBRATION
        expected = torch.tensor([[1.5, -2.0]]).sigmoid()
        torch.testing.assert_close(model.score_slots(logits, masks), expected)


class TestSegment:
    def inputs(self):
        return tiny.tiny_processor()(images=tiny.tiny_image(), instruction="the red one", return_tensors="pt")

    def test_scores_follow_the_configuration_through_saving(self, tmp_path):
        model, inputs = tiny.tiny_model(slot_logit_threshold=-100.0), self.inputs()
        plain = model.segment(**inputs, max_new_tokens=16)
        torch.testing.assert_close(plain.slot_scores, plain.slot_logits.sigmoid())
        assert plain.reasoning_surprisal.isfinite().all() and (plain.reasoning_surprisal > 0).all()
        model.config.score_calibration = CALIBRATION
        model.save_pretrained(tmp_path)
        loaded = SegCompassForReasoningSegmentation.from_pretrained(tmp_path)
        output = loaded.segment(**inputs, max_new_tokens=16)
        features = loaded.score_features(
            output.slot_logits, output.pred_masks, output.reasoning_surprisal, inputs["reshaped_input_sizes"]
        )
        torch.testing.assert_close(output.slot_scores, calibrated_scores(features, CALIBRATION))
        assert not torch.allclose(output.slot_scores, plain.slot_scores)

    def test_surprisal_is_that_of_the_words_written(self):
        # Against one pass over the whole answer: log p of each reasoning token from the logits before it.
        model, inputs = tiny.tiny_model(), self.inputs()
        output = model.segment(**inputs, max_new_tokens=16)
        given = {k: v for k, v in inputs.items() if k.startswith("pixel")}
        logits = model.vlm(input_ids=output.sequences, attention_mask=output.attention_mask, **given).logits
        log_probs = logits[:, :-1].float().log_softmax(-1).gather(2, output.sequences[:, 1:, None])[0, :, 0]
        config = model.config
        tags = {config.ref_token_id, config.think_start_token_id, config.think_end_token_id}
        tags.add(tiny.tiny_processor().tokenizer.eos_token_id)
        start = inputs["input_ids"].shape[1]
        words = [i for i in range(start, output.sequences.shape[1]) if output.sequences[0, i].item() not in tags]
        surprisals = [-log_probs[i - 1].item() for i in words]
        expected = sum((n + 1) * value for n, value in enumerate(surprisals)) / sum(range(1, len(words) + 1))
        assert output.reasoning_surprisal.item() == pytest.approx(expected, abs=1e-3)

    def test_no_reasoning(self):
        model = tiny.tiny_model(slot_logit_threshold=-100.0, score_calibration=CALIBRATION)
        output = model.segment(**self.inputs(), reasoning="none")
        assert output.reasoning_surprisal.isnan().all() and output.slot_scores.isfinite().all()

    def test_training_forgets_the_calibration(self):
        model = tiny.tiny_model(score_calibration=CALIBRATION)
        model.freeze_for_training()
        assert model.config.score_calibration is None


class TestConfiguration:
    @pytest.mark.parametrize(
        "calibration",
        [
            {},
            {"features": {}},
            {"features": [], "bias": 0.0},
            {"features": {"size": {"mean": 0.0, "scale": 1.0, "weight": 1.0}}, "bias": 0.0},
            {"features": {"slot_logit": {"mean": 0.0, "weight": 1.0}}, "bias": 0.0},
            {"features": {"slot_logit": {"mean": 0.0, "scale": 1.0, "weight": math.nan}}, "bias": 0.0},
            {"features": {"slot_logit": {"mean": 0.0, "scale": 1.0, "weight": "1"}}, "bias": 0.0},
            {"features": {"slot_logit": {"mean": 0.0, "scale": 0.0, "weight": 1.0}}, "bias": 0.0},
            {"features": {}, "bias": 10**400},  # no float can hold it
        ],
    )
    def test_damaged_calibrations_are_refused(self, calibration):
        with pytest.raises(Exception, match="score_calibration"):
            tiny.tiny_config(score_calibration=calibration)

    def test_thresholds(self):
        with pytest.raises(Exception, match="duplicate_iou_threshold"):
            tiny.tiny_config(duplicate_iou_threshold=0.0)
        assert tiny.tiny_config(score_calibration={"features": {}, "bias": 2.0}).score_calibration["bias"] == 2.0
