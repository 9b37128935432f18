"""Scenes: nothing held out leaks, and every instruction means what an independent reader takes it to mean."""

import io
import re
from collections import Counter

import numpy as np
import pytest

from segcompass_hf.data import scenes
from segcompass_hf.data.scenes.drawing import HELD_OUT_PAIRS, HELD_OUT_TRIPLES, draw
from segcompass_hf.data.scenes.instructions import HELD_OUT_FORMS, KINDS, MAX_TARGETS, words
from segcompass_hf.data.schema import decode_mask, decode_masks, row_features

COLORS = "red|green|blue|yellow|purple|white"
PHRASE = re.compile(
    rf"(?:(?P<size>small|large) )?(?:(?P<color>{COLORS}) )?"
    r"(?P<shape>circle|square|triangle|cross|ring|object)(?:s|es)?"
)
SAMPLES = {"train": 700, "val": 250, "test_combinations": 120, "test_pairs": 120, "test_compositions": 150}
SAMPLES["test_crowded"] = 60


@pytest.fixture(scope="module")
def drawn():
    return {split: [scenes.sample(split, i) for i in range(n)] for split, n in SAMPLES.items()}


def every(drawn):
    return [(split, scene) for split, split_scenes in drawn.items() for scene in split_scenes]


def wanted_by(phrase):
    """`large red circles` -> {"size": "large", "color": "red", "shape": "circle"}; `object` wants no shape."""
    match = PHRASE.fullmatch(phrase)
    assert match, phrase
    return {key: value for key, value in match.groupdict().items() if value and value != "object"}


def matching(objects, phrase):
    wanted = wanted_by(phrase)
    return [o for o in objects if all(getattr(o, key) == value for key, value in wanted.items())]


def read(text, objects):
    """Read an instruction anew, from its words alone: its form and the objects it means."""
    text = re.sub(r"^(please segment|show me|point to|find|segment|highlight) ", "", text)
    place = {
        "left": lambda o: o.column,
        "right": lambda o: -o.column,
        "top": lambda o: o.row,
        "bottom": lambda o: -o.row,
    }
    if match := re.fullmatch(r"the objects whose (color|shape) appears (two|three) times", text):
        values = Counter(getattr(o, match[1]) for o in objects)
        times = {"two": 2, "three": 3}[match[2]]
        assert sum(n == times for n in values.values()) == 1, "ambiguous count"
        found = [o for o in objects if values[getattr(o, match[1])] == times]
        return ("count", f"{match[1]} {match[2]}", ""), found
    if match := re.fullmatch(r"the (second|third) (.+) from the (\w+)", text):
        candidates = sorted(matching(objects, match[2]), key=place[match[3]])
        rank = {"second": 2, "third": 3}[match[1]]
        score = [place[match[3]](o) for o in candidates]
        assert score.count(score[rank - 1]) == 1, "ambiguous rank"
        return ("ordinal", f"{match[1]} {match[3]}", " ".join(wanted_by(match[2]))), [candidates[rank - 1]]
    if match := re.fullmatch(r"the (.+) with the same (size|color|shape) as the (.+)", text):
        (anchor,) = matching(objects, match[3])
        value = getattr(anchor, match[2])
        found = [o for o in matching(objects, match[1]) if o is not anchor and getattr(o, match[2]) == value]
        return ("same-as", match[2], " ".join(wanted_by(match[1]))), found
    if match := re.fullmatch(r"the (.+) (left of|right of|above|below) the (.+)", text):
        (anchor,) = matching(objects, match[3])
        side = place[{"left of": "left", "right of": "right", "above": "top", "below": "bottom"}[match[2]]]
        found = [o for o in matching(objects, match[1]) if side(o) < side(anchor)]
        return ("relation", match[2], " ".join(wanted_by(match[1]))), found
    if match := re.fullmatch(r"the (largest|smallest|(?:left|right|top|bottom)most) (.+)", text):
        candidates = matching(objects, match[2])
        if match[1] in ("largest", "smallest"):
            best = [o for o in candidates if o.size == {"largest": "large", "smallest": "small"}[match[1]]]
        else:
            score = place[match[1].removesuffix("most")]
            best = [o for o in candidates if score(o) == min(map(score, candidates))]
        assert len(best) == 1, "ambiguous superlative"
        return ("superlative", match[1], " ".join(wanted_by(match[2]))), best
    if match := re.fullmatch(r"(?:all the|every) (.+)", text):
        return ("set", "", " ".join(wanted_by(match[1]))), matching(objects, match[1])
    (phrase,) = re.fullmatch(r"the (.+)", text).groups()
    return ("attribute", "", " ".join(wanted_by(phrase))), matching(objects, phrase)


def test_instructions_mean_their_targets(drawn):
    for split, scene in every(drawn):
        form, found = read(scene.instruction.text, scene.objects)
        targets = [scene.objects[i] for i in scene.instruction.targets]
        assert {o.cell for o in found} == {o.cell for o in targets}, (split, scene.instruction, scene.objects)
        assert form == scene.instruction.form
        assert (form[0] == scene.instruction.kind) != (scene.instruction.kind == "no-target")
        assert (not targets) == (scene.instruction.kind == "no-target")
        assert len(targets) <= MAX_TARGETS == 4


def test_attribute_instructions_are_unambiguous(drawn):
    """`the red circle` is asked for only where there is one."""
    singular = [s for _, s in every(drawn) if s.instruction.kind == "attribute"]
    assert singular and all(len(scene.instruction.targets) == 1 for scene in singular)
    several = [s for _, s in every(drawn) if s.instruction.kind == "set"]
    assert several and all(len(scene.instruction.targets) >= 2 for scene in several)


def test_answers_name_the_cells_of_the_targets(drawn):
    for _, scene in every(drawn):
        steps = [step.strip() for step in scene.instruction.reasoning.split(".") if step.strip()]
        cells = [scene.objects[i].cell for i in scene.instruction.targets]
        answer = ", ".join(f"{n} {cell}" for n, cell in enumerate(cells, start=1)) or "none"
        assert steps[-1] == f"answer {answer}"
        # The first step lists every object of the scene where it is.
        listed = [tuple(part.split()[:4]) for part in steps[0].split(", ")]
        assert sorted(listed) == sorted((o.cell, o.size, o.color, o.shape) for o in scene.objects)
        assert len({o.cell for o in scene.objects}) == len(scene.objects)


def test_masks_are_where_the_answer_says(drawn):
    for _, scene in every(drawn):
        for index in scene.instruction.targets:
            o = scene.objects[index]
            ys, xs = np.nonzero(scene.ids == index + 1)
            assert xs.min() - 1 <= o.x <= xs.max() + 1 and ys.min() - 1 <= o.y <= ys.max() + 1, o


@pytest.mark.parametrize("split", ["train", "val", "test_compositions", "test_crowded"])
def test_held_out_objects_are_never_drawn_elsewhere(drawn, split):
    for scene in drawn[split]:
        assert not {o.triple for o in scene.objects} & HELD_OUT_TRIPLES
        assert not {o.triple[1:] for o in scene.objects} & HELD_OUT_PAIRS


@pytest.mark.parametrize("split", ["train", "val"])
def test_held_out_combinations_are_never_named(drawn, split):
    for scene in drawn[split]:
        for size, color, shape in PHRASE.findall(scene.instruction.text):
            assert (size, color, shape) not in HELD_OUT_TRIPLES, scene.instruction.text
            assert (color, shape) not in HELD_OUT_PAIRS, scene.instruction.text


@pytest.mark.parametrize("split", ["train", "val", "test_combinations", "test_pairs", "test_crowded"])
def test_held_out_forms_are_never_asked_elsewhere(drawn, split):
    assert not {read(s.instruction.text, s.objects)[0] for s in drawn[split]} & HELD_OUT_FORMS


def test_compositions_ask_only_held_out_forms_and_all_of_them(drawn):
    forms = Counter(read(s.instruction.text, s.objects)[0] for s in drawn["test_compositions"])
    assert set(forms) <= HELD_OUT_FORMS
    assert len(forms) == len(HELD_OUT_FORMS), HELD_OUT_FORMS - set(forms)


@pytest.mark.parametrize("split", ["test_combinations", "test_pairs"])
def test_held_out_objects_are_among_the_targets(drawn, split):
    for scene in drawn[split]:
        targets = [scene.objects[i].triple for i in scene.instruction.targets]
        pairs = [t[1:] in HELD_OUT_PAIRS for t in targets]
        triples = [t in HELD_OUT_TRIPLES for t in targets]
        assert not targets or any(pairs if split == "test_pairs" else triples)
        assert split == "test_pairs" or not any(pairs)


def test_held_out_sets_leave_every_value_to_be_learned():
    """A colour, shape or size that only occurs in held-out combinations could not be learned at all."""
    assert not {t[1:] for t in HELD_OUT_TRIPLES} & HELD_OUT_PAIRS
    seen = {o.triple for i in range(200) for o in scenes.sample("train", i).objects}
    for position, number in enumerate((2, 6, 5)):
        assert len({triple[position] for triple in seen}) == number


def test_objects_per_scene(drawn):
    for split, scene in every(drawn):
        low, high = (8, 10) if split == "test_crowded" else (3, 7)
        assert low <= len(scene.objects) <= high
    assert {len(s.objects) for s in drawn["train"]} == {3, 4, 5, 6, 7}


def test_at_least_60_percent_of_each_object_is_visible(drawn):
    shares = []
    for _, scene in every(drawn)[::5]:
        for index, o in enumerate(scene.objects):
            _, alone = draw(np.random.default_rng(0), [o])  # the same object with nothing in front of it
            visible = scene.ids == index + 1
            assert not (visible & (alone == 0)).any()
            shares.append(visible.sum() / alone.sum())
    assert min(shares) >= 0.6
    assert min(shares) < 0.9, "nothing is occluded, the test shows nothing"


def test_kind_shares(drawn):
    kinds = Counter(scene.instruction.kind for scene in drawn["train"])
    number = SAMPLES["train"]
    assert sum(KINDS.values()) == pytest.approx(1)
    for kind, share in KINDS.items():  # four standard errors of a share
        assert kinds[kind] / number == pytest.approx(share, abs=4 * (share * (1 - share) / number) ** 0.5), kind


def test_vocabulary_covers_every_word(drawn):
    vocabulary = set(words())
    for _, scene in every(drawn):
        text = f"{scene.instruction.text} {scene.instruction.reasoning}"
        assert set(re.findall(r"[\w-]+|[.,]", text)) <= vocabulary, text


def test_seed_and_split_determine_a_sample():
    first, again = scenes.sample("val", 7), scenes.sample("val", 7)
    assert np.array_equal(first.image, again.image) and first.instruction == again.instruction
    for other in (scenes.sample("val", 7, seed=1), scenes.sample("val", 8), scenes.sample("train", 7)):
        assert not np.array_equal(first.image, other.image) and first.objects != other.objects


def test_splits_share_no_scene(drawn):
    images = [scene.image.tobytes() for _, scene in every(drawn)]
    assert len(set(images)) == len(images)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def test_iterate_and_build_give_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    rows = list(scenes.iterate("val", 6, seed=3))
    built = scenes.build("val", 6, seed=3)
    assert built.features == row_features()
    for row, other, scene in zip(rows, built, (scenes.sample("val", i, seed=3) for i in range(6)), strict=True):
        assert np.array_equal(np.asarray(row["image"]), scene.image)
        assert png(row.pop("image")) == png(other.pop("image"))
        assert row == other
        height, width = scene.ids.shape
        masks, distractors = (decode_masks(row[key], (height, width)) for key in ("masks", "distractor_masks"))
        assert len(masks) + len(distractors) == len(scene.objects)
        assert [decode_mask(rle).tolist() for rle in row["masks"]] == [
            (scene.ids == i).tolist() for i in row["instance_ids"]
        ]
        # Objects overlap nowhere and cover all that is not background.
        assert np.array_equal(masks.sum(0) + distractors.sum(0), (scene.ids > 0).astype(int))
    assert [row["sample_id"] for row in scenes.iterate("val", 2, seed=3, start=4)] == [
        r["sample_id"] for r in rows[4:]
    ]


def test_rows_made_when_asked_for():
    rows = scenes.SceneRows("train", 10**6, seed=3, without_reasoning=("relation",))
    assert len(rows) == 10**6
    expected = list(scenes.iterate("train", 3, seed=3, start=4, without_reasoning=("relation",)))
    assert rows[4:7] == expected and rows[5 - 10**6] == expected[1]
    assert rows[999_999]["sample_id"] == "scenes-train-3-999999"
    with pytest.raises(IndexError, match="row 1000000 of 1000000"):
        rows[10**6]
    with pytest.raises(ValueError, match="riddle"):
        scenes.SceneRows("train", 1, without_reasoning=("riddle",))


def test_reference_reasoning_can_be_left_out_by_kind():
    rows = list(scenes.iterate("train", 40, without_reasoning=("relation", "count")))
    without = {row["kind"] for row in rows if row["reasoning"] is None}
    assert without == {"relation", "count"} & {row["kind"] for row in rows} != set()
    assert without.isdisjoint(row["kind"] for row in rows if row["reasoning"])


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no split 'test'.*test_crowded"):
        scenes.sample("test", 0)
    with pytest.raises(ValueError, match=r"unknown kinds \['riddle'\]"):
        next(scenes.iterate("train", 1, without_reasoning=("riddle",)))
