"""The concept dictionary: labels and scores by hand, streaming in bounded memory, files that are refused, the page."""

import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from browser import console_messages, open_browser, requested_addresses
from loopback_hub import hub  # noqa: F401
from PIL import Image
from places import ROOT
from supervised import tiny_row
from tiny import FAMILIES, tiny_image, tiny_model, tiny_processor
from vlm_families import tiled_model_and_processor

from segcompass_hf import SegCompassSaeConfig
from segcompass_hf.cli import main
from segcompass_hf.concept_names_segcompass import NamedConcept, read_names
from segcompass_hf.data import scenes
from segcompass_hf.data.scenes.names import scenes_objects
from segcompass_hf.explain import explain
from segcompass_hf.explain.dictionary import store
from segcompass_hf.explain.dictionary.counts import DictionaryCounts, PairCounts, TopExamples, bin_of, half_of
from segcompass_hf.explain.dictionary.dictionary import ConceptDictionary
from segcompass_hf.explain.dictionary.entries import ExampleStore, columns_of
from segcompass_hf.explain.dictionary.labels import cofiring, derive_labels
from segcompass_hf.explain.dictionary.objects import normalize_word, target_objects
from segcompass_hf.explain.dictionary.page import page
from segcompass_hf.explain.dictionary.properties import Property
from segcompass_hf.explain.dictionary.reading import Active, ConceptReader, RowReading, ShownObject
from segcompass_hf.modeling_sae import SegCompassSae

sys.path.insert(0, str(ROOT / "benchmarks"))
import scenes_dictionary  # noqa: E402

D_SAE = 6
IMAGES = [[f"image-{i}" for i in range(100) if half_of(f"image-{i}") == half] for half in (0, 1)]
WORDS = ["find", "red", "squares", ",", "blue"]
# Four patches: two of the red square, one of the blue object, one of the background.
RED, BLUE = np.array([1, 1, 0, 0], bool), np.array([0, 0, 1, 0], bool)


def active(*triples):
    """(unit, feature, value) triples, as the reader sorts them."""
    units, features, values = (np.array(column) for column in zip(*sorted(triples), strict=True))
    return Active(units, features, values.astype(np.float32))


def reading(index, image_id, on_words=(), on_patches=(), words=WORDS, objects=None):
    empty = Active(np.zeros(0, int), np.zeros(0, int), np.zeros(0, np.float32))
    boxes = [(0, 0, 2, 2), (2, 0, 4, 2), (0, 2, 2, 4), None]
    named = [ShownObject(*pair) for pair in objects or [(("red", "square"), RED), (("blue",), BLUE)]]
    concepts = [active(*triples) if triples else empty for triples in (on_words, on_patches)]
    return RowReading(index, f"row-{index}", image_id, list(words), boxes, *concepts, named, Image.new("RGB", (4, 4)))


def constructed(all_objects_named=True, **settings):
    """Ten rows of each half.

    Feature 0: every "red" and every red patch, the last row of each half also "find". Feature 1: every word, "blue"
    strongly. Feature 2: patches 2 and 3. Feature 3: never. Feature 4: "," in every second row of each half. Feature 5:
    "find" and "squares".
    """
    counts = DictionaryCounts(D_SAE, top_k=3, all_objects_named=all_objects_named, **settings)
    examples = ExampleStore(counts.top_words, counts.top_patches)
    for half in (0, 1):
        for i in range(10):
            words = [(1, 0, 2.0), *((unit, 1, 0.5) for unit in range(4)), (4, 1, 8.0), (0, 5, 1.0), (2, 5, 1.0)]
            words += [(0, 0, 3.0)] if i == 9 else []
            words += [(3, 4, 1.0 + i)] if i % 2 else []
            patches = [(0, 0, 4.0), (1, 0, 4.0), (2, 2, 1.0), (3, 2, 1.0)]
            row = reading(10 * half + i, IMAGES[half][i], words, patches)
            counts.add(row)
            examples.add(row)
    return counts, examples


def tiny_sae(seed=0, **config):
    torch.manual_seed(seed)
    return SegCompassSae(SegCompassSaeConfig(d_in=8, d_sae=D_SAE, **config))


@pytest.fixture(scope="module")
def made():
    return ConceptDictionary.from_counts(*constructed(), tiny_sae())


def test_labels_by_hand(made):
    assert [made.label(feature) for feature in range(D_SAE)] == ["red", "blue", "blue", None, ",", "find"]
    red, blue = made[0], made[1]
    # Words: 10 of 10 "red", and one "find" of which the threshold cannot be rid: 2 * 10 / (11 + 10).
    assert red.f1_words == pytest.approx(20 / 21) and red.f1_patches == 1.0 == red.threshold_patches / 4
    assert red.purity == pytest.approx(30 / 31) and red.cross_modal == pytest.approx(20 / 21)
    assert red.label_place == "words and patches"
    # From activation 8 on it fires on "blue" alone; whatever the activation on 50 words, 10 of them "blue".
    assert blue.f1_words == 1.0 and blue.threshold_words == 8.0 and blue.label_place == "words"
    assert blue.f1_patches == 0.0 and blue.purity == 1.0  # never on a blue patch, though there are some
    assert made.scores["any_f1_words"][1] == pytest.approx(2 * 10 / (50 + 10))
    # Feature 2 fires on 20 patches of which 10 are blue, and on no word.
    assert made[2].f1_patches == pytest.approx(2 * 10 / (20 + 10)) and made[2].purity == 0.5
    assert made[2].label_place == "patches" and made[2].f1_words == 0.0
    # 5 of 10 commas, nothing else; no object is called ",".
    assert made[4].f1_words == pytest.approx(2 * 5 / (5 + 10)) and made[4].f1_patches is None
    assert made[4].purity == 1.0 and made[4].cross_modal is None
    assert made.purity(3) is None and made[3].words == [] == made[3].top_patches


def test_measures_and_examples_by_hand(made):
    # Feature 0: 22 words of 100 and 40 patches of 80.
    red = made[0]
    assert red.density_words == pytest.approx(0.22) and red.density_patches == pytest.approx(0.5)
    assert red.density == pytest.approx(62 / 180) and red.max_activation == 4.0
    assert red.mean_activation == pytest.approx((20 * 2 + 2 * 3 + 40 * 4) / 62)
    assert red.words == [("red", pytest.approx(20 / 22)), ("find", pytest.approx(2 / 22))]
    # One example of a row, the strongest: "find" at 3 in the last row of each half, then "red" of the first row.
    assert [(w.word, w.sample_id, w.activation) for w in red.top_words] == [
        ("find", "row-9", 3.0),
        ("find", "row-19", 3.0),
        ("red", "row-0", 2.0),
    ]
    assert (red.top_words[2].before, red.top_words[2].after) == ("find", "squares , blue")
    assert [(p.sample_id, p.box) for p in red.top_patches] == [(f"row-{i}", (0, 0, 2, 2)) for i in range(3)]
    assert made[4].top_words[0].activation == 10.0 and made[3].max_activation == 0.0
    # Features 0 and 1 share "red" of every row and "find" of two; 0 fires on 62 units, 1 on 100.
    first = red.cofiring[0]
    assert (first.feature, first.label) == (1, "blue") and first.jaccard == pytest.approx(22 / (62 + 100 - 22))
    assert first.information == pytest.approx(np.log2(22 / 180 / (62 / 180 * 100 / 180)))
    assert [other.feature for other in made[3].cofiring] == []


def test_patches_off_the_target_are_left_out_where_not_all_objects_are_named():
    # Six rows name the red object alone, two the blue one; what the other patches show is not known.
    counts = DictionaryCounts(D_SAE)
    for half in (0, 1):
        for i in range(8):
            objects = [(("red",), RED)] if i < 6 else [(("blue",), BLUE)]
            words, patches = [(1, 2, 1.0)], [(0, 0, 1.0), (1, 0, 1.0), (3, 0, 1.0), (2, 1, 1.0), (3, 1, 1.0)]
            patches += [(2, 0, 1.0)] if i == 7 else []
            patches += [(unit, 2, 1.0) for unit in range(3)] if i in (0, 6, 7) else []
            counts.add(reading(10 * half + i, IMAGES[half][i], words, patches, objects=objects))
    labels, red = derive_labels(counts), counts.vocabulary[Property("word", "red")]
    # Feature 0: all 12 patches of the red objects and one of the blue; firings on the background do not count.
    assert labels["label"][0] == red and labels["f1_patches"][0] == pytest.approx(2 * 12 / (13 + 12))
    # Feature 1: on patch 2 in all rows, which counts in the two that name it blue.
    assert labels["label"][1] == -1  # too few units of "blue" to say
    # Feature 2: every "red" of the text; of the red patches 2 of 12, and both blue ones: (1 + 0.5) / 2 of the firings.
    assert labels["label"][2] == red and labels["f1_patches"][2] == pytest.approx(2 * 2 / (4 + 12))
    assert labels["purity"][2] == pytest.approx((8 + 2) / (8 + 4))


def test_streaming_gives_what_one_shot_gives():
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 500, 20_000)
    once, streamed = PairCounts(), PairCounts(max_buffer=7)
    once.add(keys)
    for part in np.array_split(keys, 90):
        streamed.add(part)
    expected, expected_counts = np.unique(keys, return_counts=True)
    for table in (once, streamed):
        assert np.array_equal(table.arrays()[0], expected) and np.array_equal(table.arrays()[1], expected_counts)
    assert once.forgotten == 0


def test_tables_are_bounded_and_forget_the_rarest_pairs_first():
    table = PairCounts(max_entries=8, max_buffer=1)
    for pair in range(20):
        table.add(np.repeat([pair * 128, pair * 128 + 5], 100 - pair))  # two bins each; the first pairs are frequent
    keys, counts = table.arrays()
    assert len(keys) <= 8 and {0, 5, 128, 133} <= set(keys.tolist())
    assert table.forgotten == sum(2 * (100 - pair) for pair in range(20)) - counts.sum()
    counts, _ = constructed(max_entries=2)
    assert derive_labels(counts)["label"].shape == (D_SAE,) and counts.forgotten > 0


def test_top_examples_equal_a_sort():
    rng = np.random.default_rng(1)
    top, seen = TopExamples(4, 3), []
    for row in range(30):
        units, features = rng.integers(0, 5, 12), rng.integers(0, 3, 12)
        values = rng.integers(1, 9, 12).astype(np.float32)
        top.add(row, Active(units, features, values))
        triples = list(zip(values.tolist(), units.tolist(), features.tolist(), strict=True))
        for feature in range(3):
            best = sorted((-value, unit) for value, unit, other in triples if other == feature)[:1]
            seen += [(feature, (value, row, unit)) for value, unit in best]
    for feature in range(4):
        expected = sorted(entry for other, entry in seen if other == feature)[:3]
        found = zip(top.values[feature].tolist(), top.places[feature].tolist(), strict=True)
        assert [(-value, row, unit) for value, (row, unit) in found if value] == expected
    assert top.rows() == {entry for feature in range(3) for entry in top.places[feature, :, 0].tolist()}


def test_bins_hold_four_steps_per_doubling():
    assert bin_of(np.array([1.0, 1.18, 1.19, 2.0, 1e-9, 1e9])).tolist() == [64, 64, 65, 68, 0, 127]


def test_large_sae_needs_no_square_table():
    counts = DictionaryCounts(65_536)
    for i in range(12):
        counts.add(reading(i, IMAGES[i % 2][i], [(1, 65_535, 1.0), (1, 40_000, 2.0)], [(0, 65_535, 1.0)]))
    labels = derive_labels(counts)
    assert labels["label"][65_535] == counts.vocabulary[Property("word", "red")] and labels["f1_words"][65_535] == 1.0
    others, jaccard, _ = cofiring(counts)
    assert others[65_535, 0] == 40_000 and jaccard[65_535, 0] == 0.5  # 12 units of 24
    arrays = [counts.density, counts.words[0].fires, counts.top_words.places, others]
    assert max(array.nbytes for array in arrays) < 2**26


def test_saved_and_loaded_are_equal(made, tmp_path):
    made.save(tmp_path)
    loaded = ConceptDictionary.load(tmp_path)
    assert list(loaded.entries) == made.entries and loaded.info == made.info and loaded.pictures == made.pictures
    assert [loaded[i] for i in range(D_SAE)] == made.entries and loaded.label(1) == "blue" and loaded.purity(3) is None
    assert [e.feature for e in loaded.search("squares")] == [e.feature for e in made.search("squares")] == [5, 1]
    for name, scores in made.scores.items():
        np.testing.assert_array_equal(loaded.scores[name], scores)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["concepts.parquet", "concepts.safetensors"]
    assert ConceptDictionary.from_pretrained(tmp_path).label(0) == "red"
    made.save(tmp_path)  # over itself
    found = ConceptDictionary.find(tmp_path)
    assert found.label(0) == "red" and ConceptDictionary.find(tmp_path) is found  # not read twice
    assert ConceptDictionary.find(tmp_path / "no") is None


def test_dictionary_of_another_sae_is_refused(made):
    made.check(tiny_sae())
    made.check(tiny_sae().to(torch.bfloat16))  # the same weights, rounded
    with pytest.raises(ValueError, match="made with another SAE .* build one for this model"):
        made.check(tiny_sae(seed=1))
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="describes 6 features, the model's SAE has 12"):
        made.check(SegCompassSae(SegCompassSaeConfig(d_in=8, d_sae=12)))


def test_an_explanation_refuses_the_dictionary_of_another_sae(made, tmp_path, capsys):
    model = tiny_model("llava", sae_config={"d_in": 32, "d_sae": D_SAE, "layer": 2})
    own, other = (
        ConceptDictionary.from_counts(*constructed(), sae)
        for sae in (model.sae, tiny_model("llava", seed=1, sae_config=model.config.sae_config.to_dict()).sae)
    )
    asked = (model, tiny_processor("llava"), tiny_image(), "the red thing")
    options = {"max_new_tokens": 8, "num_ablations": 0}
    (first, *_) = explain(*asked, dictionary=own, **options).masks
    assert first.concepts and all(concept.label == own.said(concept.feature)[0] for concept in first.concepts)
    with pytest.raises(ValueError, match="made with another SAE"):
        explain(*asked, dictionary=other, **options)

    made.save(tmp_path)
    tiny_image().save(tmp_path / "image.png")
    command = ["explain", str(tmp_path / "image.png"), "the red circle", "--dictionary", str(tmp_path)]
    assert main([*command, "--output", str(tmp_path / "page.html")]) == 2
    assert f"error: the concept dictionary describes {D_SAE} features" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "page.html").exists()


def test_half_written_files_are_refused(made, tmp_path):
    made.save(tmp_path)
    numbers, table = tmp_path / "concepts.safetensors", tmp_path / "concepts.parquet"
    whole, whole_table = numbers.read_bytes(), table.read_bytes()
    numbers.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="concepts.safetensors is damaged"):
        ConceptDictionary.load(tmp_path)
    numbers.write_bytes(whole)
    table.write_bytes(whole_table[:-9])
    with pytest.raises(ValueError, match="is not the table that concepts.safetensors was written with"):
        ConceptDictionary.load(tmp_path)
    assert ConceptDictionary.find(tmp_path) is None
    numbers.unlink()
    with pytest.raises(FileNotFoundError, match="concepts.safetensors missing"):
        ConceptDictionary.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="concepts.safetensors and concepts.parquet missing"):
        ConceptDictionary.load(tmp_path / "nowhere")


def test_a_dictionary_whose_fields_are_missing_is_refused(made, tmp_path):
    """Both files are whole and belong together, and yet something is not there."""
    made.save(tmp_path)
    arrays, table, info = store.read_files(tmp_path)
    columns = columns_of(list(made.entries))

    def without(mapping, name):
        return {key: value for key, value in mapping.items() if key != name}

    def refused(match, arrays=arrays, columns=columns, info=info):
        store.write_files(tmp_path, arrays, columns, info, made.names().values())
        with pytest.raises(ValueError, match=match):
            ConceptDictionary.load(tmp_path)
        assert ConceptDictionary.find(tmp_path) is None  # explanations go on without labels

    for name in ("sae_sketch", "pictures", "picture_ends", "scores.derived_f1_words"):
        refused(f"lacks {name};", arrays=without(arrays, name))
    for name in ("label", "words", "purity", "density", "cofiring"):
        refused(f"lacks column {name};", columns=without(columns, name))
    for name in ("d_sae", "sae_sha256", "rows_derive"):
        refused(f"lacks info.{name};", info=without(info, name))
    refused("lacks info.d_sae", info=info | {"d_sae": "many"})
    refused("lacks info.d_sae, info.rows", info=["a list"])
    refused(rf"describes 9 features, but the table is of shape \({D_SAE},\)", info=info | {"d_sae": 9})
    short = arrays | {"scores.any_f1_words": arrays["scores.any_f1_words"][:-1]}
    refused(f"scores.any_f1_words is of shape .{D_SAE - 1},", arrays=short)
    refused("columns of another version: mood", columns=columns | {"mood": columns["density"]})
    refused("beyond the last", arrays=arrays | {"picture_ends": np.array([10**6])})
    refused("not in order", arrays=arrays | {"picture_ends": np.array([3, 1])})
    refused("whole numbers in a row", arrays=arrays | {"picture_ends": np.array([[0.5]])})
    store.write_files(tmp_path, arrays, columns, info, made.names().values())
    assert ConceptDictionary.load(tmp_path).label(0) == "red"


def test_search_and_ids(made):
    # The label of 0, and a fifth of what feature 1 fires on.
    assert [entry.feature for entry in made.search("Red")] == [0, 1]
    # "blue" is the label of 1 and 2, the better first; "squares" is half of what feature 5 fires on, a fifth of 1's.
    assert [entry.feature for entry in made.search("blue")] == [1, 2]
    assert [entry.feature for entry in made.search("squares", limit=2)] == [5, 1] and made.search("zebra") == []
    with pytest.raises(IndexError, match="features 0 to 5"):
        made[6]


def test_page_shows_markup_as_text(tmp_path):
    counts = DictionaryCounts(D_SAE)
    examples = ExampleStore(counts.top_words, counts.top_patches)
    bad = "</script><script>alert(1)</script>"
    for half in (0, 1):
        for i in range(6):
            row = reading(10 * half + i, IMAGES[half][i], [(1, 0, 1.0)], [(0, 0, 1.0)], words=["find", bad])
            row.sample_id = '"><img src=x onerror=alert(1)>'
            counts.add(row)
            examples.add(row)
    made = ConceptDictionary.from_counts(counts, examples, tiny_sae(), settings={"model": "<b>bold</b>"})
    made.to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf-8")
    assert made.label(0) == bad and text == page(made)
    assert text.count("<script") == 2 == text.count("</script>") and "<img" not in text and "<b>" not in text
    assert not re.search(r"https?://|//cdn|url\(", text) and "innerHTML" not in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert [entry["feature"] for entry in data["features"]] == [0] and data["features"][0]["words"][0][0] == bad


def test_page_in_a_browser(made, tmp_path):
    path = tmp_path / "page.html"
    made.to_html(path)
    with open_browser(tmp_path / "profile") as window:
        window.get(path.as_uri())
        assert console_messages(window) == [] and requested_addresses(window) == [path.as_uri()]

        def texts(selector):
            return [one.text for one in window.find_elements("css selector", selector)]

        assert len(texts("#list button")) == 5 and texts("#found") == ["5 features"]  # feature 3 never fired
        window.find_element("css selector", "#search").send_keys("BLUE")
        assert texts("#list .label") == ["blue", "blue"]
        window.find_element("css selector", "[data-feature='2']").click()
        assert texts("#entry h2") == ["2 · blue"] and "Derived label, on patches." in texts("#entry")[0]
        assert window.find_element("css selector", "[data-feature='2']").get_attribute("aria-current") == "true"
        assert "Nothing does." in texts("#entry")[0] and "Not measured." in texts("#entry")[0]
        window.find_element("css selector", "#search").clear()
        window.find_element("css selector", "#search").send_keys("red")
        window.find_element("css selector", "[data-feature='0']").click()
        # "red": from activation 4 on it fires on the 20 red patches of the other half, and on no word.
        assert texts("#entry .names li")[0] == "red on patches F1 1.00, purity 1.00, by chance 0.33"
        assert texts("mark")[0] == "find" and len(texts(".shown span")) == 3  # patches marked in their pictures
        window.find_element("css selector", "#entry .chip:not([disabled])[title]").click()
        assert texts("#entry h2") == ["1 · blue"]


@pytest.mark.parametrize("family", FAMILIES)
def test_builds_for_every_family(family):
    model, processor = tiny_model(family), tiny_processor(family)
    rows = [tiny_row(i, i % 3, None if i == 1 else "the red one", image_id=f"image-{i}") for i in range(5)]
    read = list(ConceptReader(model, processor, target_objects).read(list(enumerate(rows))))
    assert all("the red circle".split() == words[-3:] for words in _split(read[1].words, "circle"))
    assert [words for row in read for words in row.words].count("one") == 4  # the reasoning of four rows
    assert [len(row.objects) for row in read] == [0, 1, 1, 0, 1] and read[0].objects == []
    shown = read[1].objects[0]
    assert set(shown.words) == {"red", "circle"} and shown.patches.all()  # one stripe as wide as the image
    assert shown.roles == ("answer",) and read[1].covered.max() > 0.05 and read[0].covered.max() == 0
    assert all(box is not None for row in read for box in row.patches)
    built = ConceptDictionary.build(model, processor, iter(rows), batch_size=2)
    one_by_one = ConceptDictionary.build(model, processor, rows, batch_size=1, max_pictures=0)
    assert [entry.label for entry in built.entries] == [entry.label for entry in one_by_one.entries]
    for entry, other in zip(built.entries, one_by_one.entries, strict=True):
        assert entry.density == pytest.approx(other.density, abs=2e-3)  # padding moves activations at the threshold
        assert entry.max_activation == pytest.approx(other.max_activation, rel=1e-3, abs=1e-3)
    assert built.info["rows"] == 5 and len(built) == 64 and built.pictures and not one_by_one.pictures


def test_tiles_without_known_places_give_labels_from_words_alone(caplog):
    model, processor = tiled_model_and_processor()
    rows = [tiny_row(i, 1, "the red one", image_id=f"image-{i}") for i in range(4)]
    with caplog.at_level("WARNING", "segcompass_hf"):
        built = ConceptDictionary.build(model, processor, rows, batch_size=2, all_objects_named=True)
    assert "labels from words alone" in caplog.text and "LlavaNextProcessor makes" in caplog.text
    assert not built.info["all_objects_named"]  # no patch is known to be off the objects
    fired = [example for entry in built.entries for example in entry.top_patches]
    assert fired and all(example.box is None for example in fired)
    assert any(entry.top_words for entry in built.entries)
    assert not any(entry.f1_patches for entry in built.entries if entry.f1_patches == entry.f1_patches)


def _split(words, last):
    """Words up to and including the first `last`."""
    return [words[: words.index(last) + 1]]


def test_own_reasoning_and_a_checkpoints_folder(tmp_path):
    model, processor = tiny_model(max_reasoning_tokens=6), tiny_processor()
    rows = [tiny_row(i, image_id=f"image-{i}") for i in range(3)]
    with pytest.raises(ValueError, match="there are no rows"):
        ConceptDictionary.build(model, processor, [])
    built = ConceptDictionary.build(model, processor, rows, num_rows=2, use_reference_reasoning=False)
    assert built.info["rows"] == 2
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert ConceptDictionary.find(loaded) is None
    built.save(tmp_path)
    assert list(ConceptDictionary.find(loaded).entries) == built.entries
    with torch.no_grad():
        loaded.sae.W_enc.mul_(1.5)
    assert ConceptDictionary.find(loaded) is None
    broken = rows[0] | {"masks": [{"size": [3, 3], "counts": "09"}]}
    with pytest.raises(ValueError, match="sample 'sample-0': .* mask of \\(3, 3\\) pixels"):
        ConceptDictionary.build(model, processor, [broken])


def test_comes_from_the_hub_at_a_revision(made, hub, tmp_path):  # noqa: F811
    from huggingface_hub import HfApi

    made.save(tmp_path / "folder")
    HfApi().create_repo("me/concepts")
    empty = HfApi().model_info("me/concepts").sha
    commit = HfApi().upload_folder(repo_id="me/concepts", folder_path=tmp_path / "folder").oid
    assert list(ConceptDictionary.from_pretrained("me/concepts").entries) == made.entries
    with pytest.raises(OSError, match="concepts.safetensors"):
        ConceptDictionary.from_pretrained("me/concepts", revision=empty)

    def model(revision):  # as a model knows where it came from
        config = SimpleNamespace(_name_or_path="me/concepts", _commit_hash=revision)
        return SimpleNamespace(sae=tiny_sae(), config=config)

    assert ConceptDictionary.find(model(commit)).label(0) == "red" and ConceptDictionary.find(model(empty)) is None


def test_benchmark_lists_what_passes_and_what_fails(made):
    result = scenes_dictionary.measure(made)
    rows = {row["word"]: row for row in (*result["attributes"], *result["relations"])}
    # "red" reaches 20/21 on words and 1 on patches; the best "blue" has 1 on words and 0 on patches.
    assert rows["red"]["passes"] and rows["red"]["feature"] == 0
    assert not rows["blue"]["passes"] and rows["blue"]["feature"] == 1 and rows["blue"]["features"] == 2
    assert rows["ring"]["feature"] is None and not rows["ring"]["passes"] and not rows["above"]["passes"]
    assert result["share_of_attributes"] == pytest.approx(1 / 13) and result["share_of_relations"] == 0
    assert result["failures"] == [word for word in rows if word != "red"]
    assert result["features"] == {
        **{"all": 6, "firing": 5, "labelled": 5},
        **{"labelled on words and patches": 1, "labelled on words": 3, "labelled on patches": 1},
    }
    made_by = {"command": "python x", "model": "m", "split": "val", "reasoning": "reference", "dictionary": made.info}
    table = scenes_dictionary.markdown(made_by | result)
    assert "**8% of colours, shapes and sizes**" in table and "Failures: green, blue" in table
    assert "| colour | red | 1 | 0 | 0.95 (0.95) | 1.00 (1.00) | 0.97 | yes |" in table
    assert "| shape | ring | 0 | – | – (–) | – (–) | – | no |" in table


def test_objects_of_scenes_are_named_by_their_reasoning():
    for scene in (scenes.sample("val", index) for index in range(5)):
        row = scenes.to_row(scene, "s", "val")
        named = scenes_objects(row)
        assert len(named) == len(scene.objects)
        for words, mask, roles in named:
            drawn = scene.ids[mask]
            (number,) = set(drawn.tolist())
            o = scene.objects[number - 1]
            assert words == [o.cell, o.size, o.color, o.shape] and mask.sum() == (scene.ids == number).sum()
            verdict = re.search(rf"{o.cell} {o.size} {o.color} {o.shape} (\w+)", row["reasoning"])[1]
            assert ("answer" in roles) == (number in row["instance_ids"]) != bool({"ruled out", "anchor"} & set(roles))
            assert ("candidate" in roles) == (verdict == "yes") and ("anchor" in roles) == (verdict == "anchor")
    with pytest.raises(ValueError, match="without_reasoning"):
        scenes_objects(row | {"reasoning": None})


def test_words_are_normalized():
    words = ["Circles", "crosses", "this", "glass", "RED", "c6", "<REF_POS>", "boxes"]
    assert [normalize_word(word) for word in words] == [
        *("circle", "cross", "this", "glass", "red", "c6"),
        *("<REF_POS>", "box"),
    ]


def test_names_are_of_what_patches_show(made, tmp_path):
    """Feature 1 knows "blue" in words alone, 4 and 5 words that name no object; names travel in the file's header."""
    names = {"red": NamedConcept("red", (0,), (4.0,)), "blue": NamedConcept("blue", (2,), (1.0,))}
    assert made.names() == names
    made.save(tmp_path)
    read, sketch = read_names(tmp_path / store.NUMBERS_FILE)
    assert read == names and np.array_equal(sketch, made.sketch)
