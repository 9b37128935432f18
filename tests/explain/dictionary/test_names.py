"""Names of concepts: properties read off a row, names chosen and measured by hand, families, files of old."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from supervised import tiny_row
from tiny import tiny_model, tiny_processor

from segcompass_hf import SegCompassSaeConfig, bundled_checkpoint
from segcompass_hf.data import scenes
from segcompass_hf.data.scenes.names import scenes_objects
from segcompass_hf.explain.dictionary import store
from segcompass_hf.explain.dictionary.counts import DictionaryCounts, half_of
from segcompass_hf.explain.dictionary.dictionary import ConceptDictionary
from segcompass_hf.explain.dictionary.entries import ConceptEntry, ExampleStore, columns_of
from segcompass_hf.explain.dictionary.families import ConceptFamily, families_of, group_concepts
from segcompass_hf.explain.dictionary.labels import derive_labels
from segcompass_hf.explain.dictionary.names import ConceptName, best_name, derive_names
from segcompass_hf.explain.dictionary.properties import Property, patch_properties, word_properties
from segcompass_hf.explain.dictionary.reading import Active, ConceptReader, RowReading, ShownObject
from segcompass_hf.modeling_sae import SegCompassSae

# A question of two words, a reasoning that lists two objects and answers with one, four patches of a 2 x 2 grid.
WORDS = [
    "find",
    "circles",
    "<think>",
    "a",
    "red",
    "circle",
    ",",
    "b",
    "blue",
    "ring",
    ".",
    "answer",
    "a",
    ".",
    "<REF_POS>",
]
PARTS = [*["question"] * 2, "special", *["reasoning"] * 11, "reference"]
BOXES = [(0, 0, 8, 8), (8, 0, 16, 8), (0, 8, 8, 16), (8, 8, 16, 16)]
OBJECTS = [
    ShownObject(("a", "red", "circle"), np.array([1, 0, 0, 0], bool), ("answer",), (0.25, 0.25)),
    ShownObject(("b", "blue", "ring"), np.array([0, 0, 0, 1], bool), ("ruled out",), (0.75, 0.75)),
]
COVERED = np.array([0.9, 0.0, 0.3, 0.9])
EMPTY = Active(np.zeros(0, int), np.zeros(0, int), np.zeros(0, np.float32))
IMAGES = [[f"image-{i}" for i in range(100) if half_of(f"image-{i}") == half] for half in (0, 1)]


def reading(index=0, image_id="image", on_words=(), on_patches=(), **changes):
    def active(triples):
        if not triples:
            return EMPTY
        units, features, values = (np.array(column) for column in zip(*sorted(triples), strict=True))
        return Active(units, features, values.astype(np.float32))

    row = RowReading(
        *(index, f"row-{index}", image_id, list(WORDS), list(BOXES), active(on_words), active(on_patches)),
        *(list(OBJECTS), Image.new("RGB", (16, 16)), list(PARTS), COVERED, "attribute"),
    )
    return replace(row, **changes)


def properties(found):
    return {property_: set(units.tolist()) for property_, units in found}


def test_properties_of_words():
    found = properties(word_properties(reading()))
    assert found[Property("word", "circle")] == {1, 5} and found[Property("pair", "red circle")] == {5}
    assert Property("pair", "circle ,") not in found  # a mark is no part of a pair
    assert found[Property("after", "after “answer”")] == {12} == found[Property("role", "answer 1")]
    assert found[Property("after", "after “, b”")] == {8}
    # Words that name one object: what it is, and where; "circle" names the first alone, too.
    assert found[Property("role", "answer")] == {1, 3, 4, 5, 12} and found[Property("role", "ruled out")] == {7, 8, 9}
    assert found[Property("place", "place c3")] == {1, 3, 4, 5, 12} and found[Property("place", "right half")] == {
        7,
        8,
        9,
    }
    assert found[Property("position", "in the question")] == {0, 1}
    assert found[Property("position", "word 1 of the reasoning")] == {3}
    assert found[Property("position", "word 1 from the end of the reasoning")] == {13}
    assert (
        found[Property("position", "in the last sentence")]
        == {11, 12, 13}
        == found[Property("position", "in sentence 2")]
    )
    assert found[Property("position", "in part 2 of sentence 1")] == {7, 8, 9, 10}
    assert found[Property("position", "word 1 of a part of sentence 1")] == {3, 7}
    assert found[Property("position", "word 1 of the position tokens")] == {14}
    assert found[Property("instruction", "asked with “circle”")] == set(range(len(WORDS)))
    assert found[Property("instruction", "kind attribute")] == set(range(len(WORDS)))


def test_words_that_name_two_objects_say_nothing_of_either():
    both = [shown._replace(words=(*shown.words, "large")) for shown in OBJECTS]
    words = [*WORDS, "large"]
    found = properties(word_properties(reading(words=words, parts=[*PARTS, "special"], objects=both)))
    assert len(words) - 1 not in found[Property("role", "answer")] | found[Property("role", "ruled out")]


def test_properties_of_patches():
    found = properties(patch_properties(reading()))
    assert (
        found[Property("word", "red")]
        == {0}
        == found[Property("pair", "red circle")]
        == found[Property("role", "answer 1")]
    )
    assert found[Property("role", "ruled out")] == {3}
    # Patches of a quarter of the image each; their middles lie in cells c3, g3, c7 and g7 of 8 x 8.
    assert found[Property("place", "place g3")] == {1} and found[Property("place", "column c")] == {0, 2}
    assert found[Property("place", "lower half")] == {2, 3} and found[Property("place", "rows 7–8")] == {2, 3}
    assert found[Property("place", "place f6–h8")] == {3} and found[Property("place", "left border")] == {0, 2}
    assert found[Property("place", "border of the image")] == {0, 1, 2, 3}
    assert found[Property("surface", "background")] == {1} and found[Property("surface", "inside of an object")] == {
        0,
        3,
    }
    assert found[Property("surface", "edge of an object")] == {2}
    assert found[Property("instruction", "kind attribute")] == {0, 1, 2, 3}


def test_a_row_without_places_objects_and_parts_has_words_alone():
    bare = reading(patches=[None] * 4, objects=[], parts=[], covered=None, kind=None)
    assert properties(patch_properties(bare)) == {}
    assert {property_.family for property_, _ in word_properties(bare)} == {"word", "after", "pair"}


def counted(on_words, on_patches=lambda i: (), rows=10, **changes):
    """Counts of so many equal rows of each half; features fire as the functions of the row's number say."""
    counts = DictionaryCounts(6, all_objects_named=True)
    for half in (0, 1):
        for i in range(rows):
            counts.add(reading(10 * half + i, IMAGES[half][i], on_words(i), on_patches(i), **changes))
    return counts


def test_a_caller_may_say_which_rows_are_held_out():
    counts = DictionaryCounts(6, all_objects_named=True)
    for half, image in ((0, IMAGES[1][0]), (1, IMAGES[1][0]), (1, IMAGES[0][0]), (None, IMAGES[1][0])):
        counts.add(reading(0, image, [(0, 0, 1.0)]), half)
    assert counts.rows == [1, 3]


def test_names_by_hand():
    # 0: the answer's place. 1: any word of the question, twice as strongly as words of the reasoning. 2: never.
    # 3: patches of the background. 4: the answer, and "find" in every second row. 5: words and patches of "red".
    def on_words(i):
        fired = [(12, 0, 2.0), (0, 1, 4.0), (1, 1, 4.0), (3, 1, 1.0), (12, 4, 1.0), (4, 5, 1.0)]
        return fired + ([(0, 4, 1.0)] if i % 2 else [])

    names = derive_names(counted(on_words, lambda i: [(1, 3, 1.0), (0, 5, 1.0)]))
    texts = [[name.text for name in own] for own in names]
    assert texts[0][0] == "answer 1" and texts[2] == [] and texts[5][0] == "red"
    (answer, *_), (question, *_) = names[:2]
    # Of 15 words and 4 patches in a row one word and one patch are "answer 1": chance 2 / 19.
    assert (answer.scope, answer.f1, answer.purity) == ("words", 1.0, 1.0) and answer.holds
    assert answer.chance == pytest.approx(2 / 19) and answer.family == "role"
    # From its threshold on it fires on the two words of the question alone.
    assert question.text == "in the question" and question.f1 == 1.0 and question.threshold_words == 4.0
    # On background and nowhere else; chance 1 / 19. A place tells the same here, at the same handicap.
    assert "background" in texts[3] and names[3][0].scope in ("patches", "words and patches")
    # 4: ten "answer 1" and five "find" of one half: F1 2 * 10 / (15 + 10), purity 10 / 15.
    mixed = names[4][0]
    assert mixed.text == "answer 1" and mixed.f1 == pytest.approx(20 / 25) and mixed.purity == pytest.approx(10 / 15)
    assert names[5][0].scope == "words and patches" and names[5][0].f1 == 1.0


def test_a_name_is_measured_on_the_other_half():
    """Feature 0 fires on the answer in the first half, and on "find" in the second."""
    counts = DictionaryCounts(6, all_objects_named=True)
    for half, word in ((0, 12), (1, 0)):
        for i in range(10):
            counts.add(reading(10 * half + i, IMAGES[half][i], [(word, 0, 1.0)]))
    name = derive_names(counts)[0][0]
    assert name.text == "answer 1" and name.f1 == 0.0 == name.purity and not name.holds
    assert best_name(derive_names(counts)[0]) is None


def test_what_nothing_tells_has_no_name():
    """A feature that fires on each word once in a while, and one that fires everywhere: chance would do as well."""
    counts = counted(lambda i: [(i, 0, 1.0), *((unit, 1, 1.0) for unit in range(15))])
    names = derive_names(counts)
    assert names[0] == [] and names[1] == []


def test_firing_on_patches_counts_against_a_name_of_words():
    """Feature 0 fires on the answer's word, and as strongly on the two patches that show nothing of it."""
    counts = counted(lambda i: [(12, 0, 1.0)], lambda i: [(1, 0, 1.0), (2, 0, 1.0)])
    (name,) = [name for name in derive_names(counts)[0] if name.text == "answer 1"] or [None]
    assert name is None  # right in one of three firings


def test_when_a_name_holds():
    name = ConceptName("red", "word", "words", 0.85, 0.6, 0.1, 1.0, 1.0)
    assert name.holds and not replace(name, purity=0.4).holds and not replace(name, f1=0.7).holds
    rare = replace(name, f1=0.1, purity=0.9)
    assert rare.holds and not replace(rare, chance=0.5).holds  # half of all units have it: purity tells little
    assert not replace(name, f1=None, purity=None).holds
    assert best_name([replace(name, f1=0.5), name]) is None and best_name([name, rare]) is name


def test_families_of_names():
    red = ConceptName("red", "word", "words", 0.85, 0.9, 0.1, 1.0, 1.0)
    names = [red, None, replace(red, text="ring"), replace(red, f1=0.95)]
    assert families_of(names) == [ConceptFamily("red", (3, 0)), ConceptFamily("ring", (2,))]


def test_concepts_of_a_mask_by_family():
    def concept(feature, label, share):
        return SimpleNamespace(feature=feature, label=label, share=share, contribution=10 * share)

    ranked = [concept(1, None, 0.3), concept(2, "red", 0.25), concept(3, "red", 0.2), concept(4, None, -0.1)]
    found = group_concepts(ranked)
    assert [(family.name, family.share) for family in found] == [
        ("red", pytest.approx(0.45)),
        (None, 0.3),
        (None, -0.1),
    ]
    assert [one.feature for one in found[0].concepts] == [2, 3] and found[0].contribution == pytest.approx(4.5)


@pytest.fixture(scope="module")
def made():
    counts = counted(lambda i: [(12, 0, 2.0), (4, 5, 1.0)], lambda i: [(0, 5, 1.0)])
    examples = ExampleStore(counts.top_words, counts.top_patches)
    for half in (0, 1):
        for i in range(10):
            examples.add(reading(10 * half + i, IMAGES[half][i]))
    return ConceptDictionary.from_counts(counts, examples, SegCompassSae(SegCompassSaeConfig(d_in=8, d_sae=6)))


def test_names_are_stored(made, tmp_path):
    made.save(tmp_path)
    loaded = ConceptDictionary.load(tmp_path)
    assert list(loaded.entries) == made.entries
    assert loaded.name(0) == made.name(0) and loaded.name(0).text == "answer 1" and loaded.name(1) is None
    assert loaded.said(0) == ("answer 1", 1.0) and loaded.said(1) == (None, None)
    assert [(family.name, family.features) for family in loaded.families()] == [("answer 1", (0,)), ("red", (5,))]
    noted = loaded.updated("interpretation", {0: "the place that is answered"})
    noted.save(tmp_path)
    again = ConceptDictionary.load(tmp_path)
    assert again[0].interpretation == "the place that is answered" and again[5].interpretation is None
    assert again.name(0) == made.name(0) and list(again.pictures) == made.pictures


def test_files_of_the_first_releases_are_read(made, tmp_path):
    made.save(tmp_path)
    arrays, _, info = store.read_files(tmp_path)
    columns = columns_of(list(made.entries))
    old = {name: column for name, column in columns.items() if name not in ("names", "effect", "interpretation")}
    store.write_files(tmp_path, arrays, old, info, [])
    loaded = ConceptDictionary.load(tmp_path)
    assert loaded.name(5) is None and loaded.families() == [] and loaded[5].names == [] and loaded[5].effect is None
    assert loaded.said(5) == ("red", loaded.purity(5)) and loaded.said(5)[1] is not None  # its label stands for it
    bundled = ConceptDictionary.load(bundled_checkpoint())
    assert len(bundled) == 1024 and bundled[50].label == "red" and bundled.said(50)[0] is not None


def test_labels_are_words_alone(made):
    """Names of other kinds leave the labels as they were: the best word of a feature that answers is no role."""
    counts = counted(lambda i: [(12, 0, 2.0), (4, 5, 1.0)], lambda i: [(0, 5, 1.0)])
    labels = derive_labels(counts)
    known = list(counts.vocabulary)
    assert [known[word] for word in labels["label"][[0, 5]]] == [Property("word", "a"), Property("word", "red")]
    assert all(word in {"a", "red"} for entry in made.entries for word, _ in entry.words)


def test_reader_tells_parts_roles_and_coverage():
    model, processor = tiny_model(), tiny_processor()
    rows = [tiny_row(0, 1, "the red one", image_id="image"), tiny_row(1, 1, None, image_id="image-1")]
    first, second = ConceptReader(model, processor, lambda row: [(["red"], _mask(row), ("answer",))]).read(
        list(enumerate(rows))
    )
    for read in (first, second):
        assert len(read.parts) == len(read.words)
        asked = [word for word, part in zip(read.words, read.parts, strict=True) if part == "question"]
        assert asked == rows[read.index]["instruction"].split()
        assert [part for word, part in zip(read.words, read.parts, strict=True) if word == "<REF_POS>"][-4:] == [
            "reference"
        ] * 4
    said = [word for word, part in zip(first.words, first.parts, strict=True) if part == "reasoning"]
    assert said == ["the", "red", "one"] and "reasoning" not in second.parts
    assert first.objects[0].roles == ("answer",) and 0 < first.objects[0].middle[0] < 1
    assert ((first.covered > 0) & first.objects[0].patches).any()


def _mask(row):
    from segcompass_hf.data.schema import decode_mask

    return decode_mask(row["masks"][0])


@pytest.mark.slow
def test_names_of_the_bundled_checkpoint_tell_answers_and_places():
    from transformers import AutoModel, AutoProcessor

    path = bundled_checkpoint()
    model, processor = AutoModel.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)
    built = ConceptDictionary.build(
        *(model, processor, scenes.iterate("val", 80, seed=1)),
        named_objects=scenes_objects,
        all_objects_named=True,
        max_pictures=0,
    )
    names = [built.name(feature) for feature in range(len(built))]
    assert {name.family for name in names if name} >= {"word", "role", "place", "position"}
    assert {"answer 1", "red", "large"} <= {name.text for name in names if name}
    assert all(isinstance(entry, ConceptEntry) for entry in built.entries)
