"""The live model without a page: reasoning as it is written, answers that follow concepts, one user beside another."""

import threading

import numpy as np
import pytest
from explanations import made_explanation
from PIL import Image
from tiny import follow_concepts, tiny_model, tiny_processor

from segcompass_hf.explain.causal import steer
from segcompass_hf.explain.live.model import NUM_SHOWN, LiveAnswer, LiveModel
from segcompass_hf.explain.report.picture import paint
from segcompass_hf.figure import tidy


@pytest.fixture(scope="module")
def live():
    model = follow_concepts(tiny_model("llava"))
    model.config.slot_logit_threshold = -100.0  # every slot is kept
    return LiveModel(model, tiny_processor("llava"), "tiny", num_ablations=1)


def _picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def made(live):
    return list(live.answer(_picture(0), "the red circle", "short"))


def test_reasoning_grows_into_the_answer(made):
    *texts, answer = made
    assert isinstance(answer, LiveAnswer) and answer.explanation.model_name == "tiny"
    assert len(texts) > 2 and texts[-1] == tidy(answer.explanation.reasoning)
    assert all(later.startswith(earlier[:5]) for earlier, later in zip(texts, texts[1:], strict=False))


def test_words_that_were_not_trained_are_told(live, made):
    assert made[-1].note is None
    processor = tiny_processor("llava")
    processor.add_trained_words(["the red thing"])
    with_words = LiveModel(live.model, processor, "tiny", num_ablations=0)
    *_, answer = with_words.answer(_picture(0), "the red circle", "none")
    assert '"circle"; its answer is a guess' in answer.note


def test_changes_are_those_of_steer(made):
    answer = made[-1]
    features = [concept.feature for concept, _ in answer.shown]
    assert 0 < len(features) <= NUM_SHOWN and len(set(features)) == len(features)
    sizes = [abs(concept.contribution) for concept, _ in answer.shown]
    assert sizes == sorted(sizes, reverse=True)
    after = answer.change({features[0]: 0.0, features[1]: 1.0})
    expected = steer(answer.answer, {features[0]: 0.0})
    assert after.features == (features[0],)
    assert all((one == two).all() for one, two in zip(after.masks, expected.masks, strict=True))
    assert min(answer.change(dict.fromkeys(features, 0.0)).iou) < 1  # masks follow their concepts
    assert answer.change({features[0]: 1.0}).iou == [1.0] * len(answer.explanation.masks)


def test_a_visitor_who_leaves_stops_the_model_and_frees_it(live):
    answering = live.answer(_picture(1), "the blue square")
    next(answering)
    assert live.lock.locked()
    answering.close()
    assert not live.lock.locked()
    assert not any(thread.is_alive() for thread in threading.enumerate() if thread.name == "segcompass answer")


def test_bad_input_is_raised_and_frees_the_model(live):
    with pytest.raises(ValueError, match="sides may differ"):
        list(live.answer(Image.new("RGB", (2000, 2)), "x"))
    assert not live.lock.locked()


def test_users_have_answers_of_their_own(live, made):
    results = {}

    def visit(seed: int) -> None:
        results[seed] = list(live.answer(_picture(seed), "the red circle", "short"))[-1]

    visitors = [threading.Thread(target=visit, args=(seed,)) for seed in (0, 2)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    for seed, answer in results.items():
        assert (np.asarray(answer.explanation.image) == np.asarray(_picture(seed))).all()
    first = made[-1].explanation  # the same question, asked alone
    assert results[0].explanation.slot_scores == pytest.approx(first.slot_scores, abs=1e-5)


def test_paint_enlarges_tints_and_outlines():
    mask = np.zeros((48, 64), dtype=bool)
    mask[12:36, 16:48] = True
    picture = np.asarray(paint(Image.new("RGB", (64, 48), (200, 200, 200)), [mask], ["#E8910C"]), dtype=int)
    assert picture.shape == (480, 640, 3)
    assert picture[20, 20].tolist() == [129, 129, 129]  # 0.62 * 200 + 5
    # 0.72 * 200 + 0.28 * (232, 145, 12)
    assert picture[240, 320] == pytest.approx([208, 184, 147], abs=1)
    assert picture[240, 160] == pytest.approx([232, 145, 12], abs=1)  # the border
    gone = np.asarray(paint(Image.new("RGB", (64, 48)), [mask & False], ["#E8910C"], [mask]))
    assert gone[240, 160].tolist() == [255, 255, 255] and gone[240, 320].tolist() == [5, 5, 5]
    assert paint(Image.new("RGB", (4000, 1000)), [], []).size == (1024, 256)


def test_largest_concepts_are_those_of_any_mask():
    answer = LiveAnswer(None, made_explanation(num_masks=2, num_concepts=12), threading.Lock())
    # Both masks share 0.68, 0.34, -0.17, ...; feature 100 m + c is mask m's concept c.
    assert [concept.feature for concept, _ in answer.shown] == [0, 100, 1, 101, 2, 102, 3, 103]
    assert [number for _, number in answer.shown] == [0, 1, 0, 1, 0, 1, 0, 1]
    assert answer.picture().size == (640, 480)
