"""photos-small: instructions and reasoning derived by hand from made-up annotations; parts with random weights."""

import json
import random
import shutil
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from places import ROOT
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

pytest.importorskip("trl")
pytest.importorskip("transformers.models.fast_vlm")

EXAMPLE = ROOT / "examples" / "photos_small"
with pytest.MonkeyPatch.context() as patch:  # scenes_tiny has a module `parts` too
    patch.syspath_prepend(str(ROOT / "benchmarks" / "real_parts"))
    patch.syspath_prepend(str(EXAMPLE))
    theirs = sys.modules.pop("parts", None)
    import cut_tokenizer
    import efficientnet_lite2
    import guesses
    import parts
    import questions
    import rows
    import see as seeing
    import seen
    import views
    import words

    sys.modules.pop("parts")
    if theirs is not None:
        sys.modules["parts"] = theirs

from segcompass_hf import SegCompassProcessor  # noqa: E402
from segcompass_hf.data.schema import decode_mask, decode_masks, encode_mask  # noqa: E402
from segcompass_hf.training import WarmupConfig, WarmupTrainer, read_recipe  # noqa: E402

SIDE = 60  # pixels of the made-up pictures: ten to a cell of the grid of places
COLORS = {"cup": (200, 30, 30), "person": (30, 30, 200), "dog": (120, 80, 40), "car": (240, 240, 240)}


def thing(category, cell, size=10, is_crowd=False):
    """A square of `size` pixels in the middle of a cell such as `b3`."""
    x, y = (10 * (ord(cell[0]) - ord("a")) + 5, 10 * (int(cell[1]) - 1) + 5)
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    half = size // 2
    mask[max(0, y - half) : y + size - half, max(0, x - half) : x + size - half] = True
    return seen.Thing(category, encode_mask(mask), mask, is_crowd)


def see(*things):
    return seen.Seen([one for one in things if not one.is_crowd], [one for one in things if one.is_crowd])


def picture_of(things):
    pixels = np.full((SIDE, SIDE, 3), 128, dtype=np.uint8)
    for one in things:
        pixels[one.mask] = COLORS.get(one.category, (30, 200, 30))
    return Image.fromarray(pixels)


def asked(found, kind, text=None):
    return [question for question in found if question.kind == kind and (text is None or text in question.instruction)]


def test_listing_in_the_order_of_coco_and_from_left_to_right():
    shown = see(
        thing("cup", "e5"), thing("dog", "d2"), thing("cup", "a5"), thing("cup", "c1", 1), thing("tie", "f6", 1)
    )
    assert shown.listing() == "dog d2, cup a5 e5 +1"
    assert [one.category for one in shown.things] == ["dog", "cup", "cup", "cup", "tie"]
    assert shown.told_apart("dog") and not shown.told_apart("cup"), "one of the cups is too small to be compared"
    crowd = see(thing("person", "b2"), thing("person", "e2", 18, is_crowd=True))
    assert crowd.listing() == "person b2 many" and not crowd.told_apart("person")
    assert see().listing() == "nothing"


def test_a_full_picture_has_a_short_list():
    many = [
        thing(name, f"{column}{row}", 8)
        for name in ("person", "cup", "book", "chair", "bowl")
        for column in "abcdef"
        for row in (1, 2)
    ]
    listing = see(*many).listing()
    assert listing.split(", ")[0].endswith("+9"), "3 of 12: 16 places are divided among five categories"
    assert listing.count("+9") == 5


def test_places_sizes_and_counts():
    shown = see(thing("dog", "e4", 6), thing("dog", "a4", 10), thing("dog", "c3", 20), thing("cup", "f4"))
    found = [
        question
        for kind in (questions.sides, questions.sizes, questions.nearest)
        for question in kind(shown, random.Random(0))
    ]
    of = {question.instruction: [one.place for one in question.targets] for question in found}
    assert of["the leftmost dog"] == ["a4"] and of["the rightmost dog"] == ["e4"]
    assert of["the second dog from the left"] == ["c3"]
    assert of["the smallest dog"] == ["e4"] and (of.get("the largest dog") or of["the biggest dog"]) == ["c3"]
    assert of["the dog nearest to the cup"] == ["e4"]
    said = questions.reasoning(shown, asked(found, "place", "second")[0])
    assert said == "dog a4 c3 e4, cup f4. from the left a4 c3 e4, second from the left c3. answer dog c3."


def test_a_wrong_number_has_no_target():
    shown = see(thing("cup", "a1"), thing("cup", "c1"))
    found = [question for seed in range(20) for question in questions.counts(shown, random.Random(seed))]
    right = [question for question in found if question.instruction.endswith("exactly two")]
    wrong = [question for question in found if not question.instruction.endswith("exactly two")]
    assert right and wrong
    assert all(len(question.targets) == 2 for question in right) and not any(q.targets for q in wrong)


def test_objects_side_by_side_are_not_ordered():
    shown = see(thing("dog", "b2"), thing("dog", "b5"))
    assert not list(questions.sides(shown, random.Random(0))), "neither is left of the other"
    assert not list(questions.sizes(shown, random.Random(0)))


def test_uses_know_what_is_there_and_what_is_doubtful():
    shown = see(thing("cup", "a1"), thing("bottle", "b1"), thing("dog", "d4", 20))
    found = [question for question in questions.uses(shown, random.Random(1)) if question]
    (drink,) = asked(found, "use", "something to drink from")
    assert {one.category for one in drink.targets} == {"cup", "bottle"}
    assert questions.reasoning(shown, drink).startswith(
        "dog d4, bottle b1, cup a1. something to drink from is bottle cup, not dog."
    )
    doubtful = see(*shown.things, thing("bowl", "f6"))
    assert not asked([q for q in questions.uses(doubtful, random.Random(1)) if q], "use", "drink"), "from a bowl?"
    small = see(thing("cup", "a1"), thing("bottle", "b1", 1))
    assert not asked([q for q in questions.uses(small, random.Random(1)) if q], "use", "drink"), "a bottle not listed"


def test_colours_inside_masks():
    things = [thing("cup", "a1"), thing("cup", "d4"), thing("car", "f6")]
    picture = np.array(picture_of(things))
    picture[things[1].mask] = (30, 60, 220)
    found = [
        q for seed in range(8) for q in questions.colors(see(*things), random.Random(seed), Image.fromarray(picture))
    ]
    of = {question.instruction: [one.place for one in question.targets] for question in found}
    assert of == {"the red cup": ["a1"], "the blue cup": ["d4"], "the white car": ["f6"]}
    half = np.array(picture)
    half[:5][things[0].mask[:5]] = (30, 200, 30)
    assert seen.color_of(Image.fromarray(half), things[0]) in ("red", "green")
    stripes = np.array(picture)
    for row, color in enumerate(((200, 30, 30), (30, 200, 30), (30, 60, 220)) * 4):
        stripes[row][things[0].mask[row]] = color
    assert seen.color_of(Image.fromarray(stripes), things[0]) is None


def test_absent_categories_are_absent_however_small():
    shown = see(thing("cup", "a1"), thing("fork", "b1", 1))
    for seed in range(60):
        for question in questions.absent(shown, random.Random(seed)):
            assert not question.targets and questions.reasoning(shown, question).endswith("answer none.")
            assert "fork" not in question.instruction and "cup" not in question.instruction.split()


def test_of_persons_only_persons_are_listed():
    shown = see(thing("person", "b3"), thing("cup", "a5"))
    found = list(questions.all_of(shown, random.Random(0)))
    assert [questions.reasoning(shown, question) for question in found] == [
        "person b3, cup a5. person wanted, not cup. answer person b3.",
        "person b3, cup a5. cup wanted, not person. answer cup a5.",
    ]


def test_names_point_at_the_objects_that_the_list_counts():
    row = {
        "reasoning": "dog d2, wine glass a5 e5 +1, person many. from the left a5 e5. answer wine glass e5.",
        "instance_ids": [3],
        "masks": [None],
        "distractor_masks": [None, None, None],
    }
    # Objects by number: 3 is the target, so 3 1 2 4 are at 0 1 2 3.
    named = {name.words: name.objects for name in seen.named_words(row)}
    assert named == {"dog": (1,), "d2": (1,), "wine glass": (2, 0, 3), "a5": (2,), "e5": (0,)}
    assert seen.named_words(row | {"masks": [], "distractor_masks": None}) == []


def test_every_word_of_the_tables_is_a_category():
    listed = [part for table in (words.GROUPS, words.USES) for pair in table.values() for part in pair]
    assert {name for part in listed for name in words.members(part)} <= set(words.CATEGORIES)
    assert set(words.SYNONYMS) <= set(words.CATEGORIES) and len(set(words.CATEGORIES)) == 80
    others = [word for found in words.SYNONYMS.values() for word in found]
    assert len(others) == len(set(others)) and not set(others) & set(words.CATEGORIES)


# Guesses


class Sam:
    """In place of MobileSAM: the mask is the box."""

    def segment(self, images, prompts):
        masks = np.zeros((len(prompts[0]), *images[0].size[::-1]), dtype=bool)
        for mask, prompt in zip(masks, prompts[0], strict=True):
            x0, y0, x1, y1 = (round(corner) for corner in prompt.box)
            mask[y0:y1, x0:x1] = True
        return [(masks, [1.0] * len(masks))]


def detector(image):
    return [guesses.Detection("cup", 0.9, (40, 40, 60, 60)), guesses.Detection("person", 0.8, (0, 0, 10, 10))]


def test_guesses_are_told_from_what_is_known():
    known = encode_mask(np.ones((SIDE, SIDE)))
    annotations = [
        {"category_id": 1, "bbox": [0, 0, 60, 60], "iscrowd": 0, "segmentation": known},
        {"category_id": 1, "bbox": [5, 5, 10, 20], "iscrowd": 0, "segmentation": []},
        {"category_id": 1, "bbox": [0, 50, 60, 10], "iscrowd": 1, "segmentation": []},
    ]
    found = list(guesses.guesses_of(Image.new("RGB", (SIDE, SIDE)), annotations, detector, Sam()))
    by = {tuple(one["guessed"]): one for one in found if not one["iscrowd"]}
    assert set(by) == {(), ("mask",), ("category", "box", "mask")} and len(found) == 4, "no person but the annotated"
    assert by[()]["segmentation"] == known and by["category", "box", "mask"]["category"] == "cup"
    assert decode_mask(by[("mask",)]["segmentation"])[5:25, 5:15].all() and by[("mask",)]["area"] == 200
    (crowd,) = [one for one in found if one["iscrowd"]]
    assert decode_mask(crowd["segmentation"]).sum() == 600


def test_the_surer_one_of_two_boxes_of_an_object_counts():
    assert guesses.overlap((0, 0, 10, 10), (0, 0, 10, 5)) == pytest.approx(0.5)
    assert guesses.overlap((0, 0, 10, 10), (20, 20, 30, 30)) == 0.0
    assert guesses.CATEGORY_OF_ID[90] == "toothbrush" and guesses.CATEGORY_OF_ID[13] == "stop sign"


def test_what_a_missing_object_would_make_wrong_is_not_asked_of_guesses():
    shown = see(thing("person", "a1"), thing("person", "d4", 20), thing("cup", "a5"), thing("cup", "f5"))
    dice = random.Random(0)
    asked_of = questions.questions(shown, picture_of(shown.things), dice, guessed=True)
    kinds = {question.kind for question in asked_of}
    assert kinds & {"people", "one person"} and not kinds & set(questions.COMPARING) and asked(asked_of, "all", "cup")
    assert not asked(asked_of, "none") and not asked(asked_of, "no use") and asked(asked_of, questions.NONE_BY_FAR)


# Views


def test_views_show_the_same_objects_elsewhere():
    shown = see(thing("dog", "b2", 12), thing("cup", "e5", 4))
    found = views.views(shown, (SIDE, SIDE), 6, random.Random(0))
    (view, whole), (mirrored, other), *cut = found
    assert view == ((0, 0, SIDE, SIDE), False) and whole is shown
    assert mirrored.mirrored and other.listing() == "dog e2, cup b5"
    image = picture_of(shown.things)
    assert len(cut) == 4
    for part, seen_in_part in cut:
        assert part.of_image(image).size == seen_in_part.things[0].mask.shape[::-1]
        for one in seen_in_part.things:
            original = shown.of(one.category)[0]
            assert one.mask.sum() >= views.WHOLE * original.mask.sum() and one.mask.any()
            color = COLORS.get(one.category, (30, 200, 30))
            assert (np.asarray(part.of_image(image))[one.mask] == color).all(), "the mask lies on the object"


def test_an_object_cut_in_two_spoils_a_view():
    shown = see(thing("dog", "c3", 20), thing("person", "c3", 40, is_crowd=True))
    assert views.View((0, 0, 25, 60), False).of_seen(shown) is None, "half of the dog"
    rest = views.View((40, 0, 60, 60), False).of_seen(shown)
    assert not rest.things and len(rest.crowds) == 1


# Rows


def write_photos(root, pictures, categories):
    """A folder in COCO's format; `pictures`: file name -> (image, things or boxes)."""
    (root / "images").mkdir(parents=True)
    content = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 1 + i, "name": n} for i, n in enumerate(categories)],
    }
    for number, (name, (image, things)) in enumerate(pictures.items(), start=1):
        image.save(root / "images" / name, quality=95)
        content["images"].append({"id": number, "file_name": name, "width": image.width, "height": image.height})
        for one in things:
            rle = {"size": one.rle["size"], "counts": one.rle["counts"]} if one.rle else []
            content["annotations"].append({
                "id": len(content["annotations"]) + 1, "image_id": number, "iscrowd": int(one.is_crowd),
                "category_id": 1 + categories.index(one.category), "segmentation": rle, "area": 1,
                "bbox": [0, 0, 1, 1],
            })  # fmt: skip
    (root / "instances.json").write_text(json.dumps(content))


def noisy_picture(seed, things):
    """Pictures that do not look alike: large cells of random brightness behind the things."""
    cells = np.random.RandomState(seed).randint(0, 255, (6, 6, 3)).astype(np.uint8)
    picture = np.array(Image.fromarray(cells).resize((SIDE, SIDE), Image.Resampling.NEAREST))
    for one in things:
        picture[one.mask] = COLORS.get(one.category, (30, 200, 30))
    return Image.fromarray(picture)


@pytest.fixture
def photos(tmp_path):
    scenes = [[thing("cup", "a1"), thing("dog", "d4", 18)] for _ in range(6)]
    pictures = {f"{n}.png": (noisy_picture(n, things), things) for n, things in enumerate(scenes)}
    (held_out,) = rows.held_out_names(list(pictures), 1)
    image, things = pictures[held_out]
    pictures["again.jpg"] = (image, things)  # saved anew, with other bytes
    write_photos(tmp_path / "things", pictures, ["dog", "cup"])
    person = [thing("person", "c3", 20)]
    boxed = [seen.Thing("person", None, person[0].mask)]
    people = {
        "alone.png": (noisy_picture(50, person), person),
        "boxes.png": (noisy_picture(51, person), boxed),
        "known.png": (image, person),
    }
    write_photos(tmp_path / "people", people, ["person"])
    return tmp_path, held_out


def test_rows_of_made_up_photographs(photos, tmp_path):
    root, held_out = photos
    (tmp_path / "out").mkdir()
    shutil.copyfile(root / "people" / "instances.json", tmp_path / "out" / "people.json")
    figures = rows.build(root, tmp_path / "out", count=1)
    found = datasets.load_from_disk(str(tmp_path / "out" / "rows"))
    assert set(found["held_out"]["image_id"]) == {held_out}
    trained = set(found["train"]["image_id"])
    things = [name for name in (f"{n}.png" for n in range(6)) if name != held_out]
    assert {name for name in trained if "-" not in name} == {*things, "alone.png"}, "boxes alone give no masks"
    assert {f"{name[0]}-1.png" for name in things} < trained, "mirrored"
    assert set(found["choosing"]["image_id"]) == set(things), "whole photographs with all objects annotated"
    assert set(found["choosing"]["sample_id"]) < set(found["train"]["sample_id"])
    assert figures["left out"] == 2, "the held-out picture saved anew, and the one among the people"
    row = next(
        r for r in found["train"] if r["kind"] == "all" and r["image_id"] in things and "cup" in r["instruction"]
    )
    assert row["reasoning"] == "dog d4, cup a1. cup wanted, not dog. answer cup a1."
    masks = decode_masks(row["masks"], (SIDE, SIDE))
    assert masks.sum() == 100 and masks[0, :10, :10].all() and row["instance_ids"] == [2]
    assert len(row["distractor_masks"]) == 1
    assert {name.words: name.objects for name in seen.named_words(row)}["cup"] == (0,)
    alone = rows.build(root, tmp_path / "alone", count=1)
    assert alone["left out"] == 1 and alone["held_out"] == figures["held_out"], "without guesses, no people"


def test_pictures_that_are_missing_or_damaged_are_left_out_and_named(photos):
    from segcompass_hf.data import BuildReport

    images, report = photos[0] / "things" / "images", BuildReport()
    (images / "0.png").unlink()
    (images / "1.png").write_bytes(b"no picture")
    whole = Image.open(images / "2.png").convert("L")
    whole.save(images / "2.png")
    folder = rows.Folder(photos[0] / "things", report)
    assert {"2.png", "3.png", "4.png", "5.png"} <= set(folder.files.values())
    assert not {"0.png", "1.png"} & set(folder.files.values())
    assert report.counts == {"missing_image": 1, "unreadable_image": 1}
    number = {name: image_id for image_id, name in folder.files.items()}
    assert folder.open(number["2.png"]).mode == "RGB"


def test_a_picture_in_both_splits_is_refused(photos):
    root, held_out = photos
    from segcompass_hf.data import BuildReport

    folder = rows.Folder(root / "things", BuildReport())
    number = {name: image_id for image_id, name in folder.files.items()}
    with pytest.raises(ValueError, match="1 photographs are in both splits, again.jpg"):
        rows.check_apart([(folder, number["again.jpg"])], [(folder, number[held_out])])


# Parts


@pytest.fixture(scope="module")
def full_tokenizer():
    bpe = ByteLevelBPETokenizer()
    text = [*words.texts(), "some other words entirely, such as photograph and telescope"] * 3
    bpe.train_from_iterator(text, vocab_size=1500, special_tokens=[*cut_tokenizer.SPECIAL, "<repo_name>"])
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer)


def test_a_cut_tokenizer_says_the_same(full_tokenizer):
    said = ["person b3 d2, cup a5. answer cup a5.", "the second dog from the left"]
    cut, kept = cut_tokenizer.cut_tokenizer(full_tokenizer, said, num_common=0)
    assert len(cut) < len(full_tokenizer) and len(kept) == len(cut) - 4, "image, think tags and <REF_POS> are added"
    for text in said:
        ids = cut(text, add_special_tokens=False)["input_ids"]
        assert [kept[number] for number in ids] == full_tokenizer(text, add_special_tokens=False)["input_ids"]
    other = "telescope <repo_name> \u00e4 \u2603"
    assert cut.decode(cut(other, add_special_tokens=False)["input_ids"]) == other
    assert cut.convert_tokens_to_ids(list(cut_tokenizer.SPECIAL)) == [0, 1, 2]
    big, small = (cut(text)["input_ids"] for text in ("The second DOG<REF_POS>", "the second dog<REF_POS>"))
    assert big == small and small[-1] == cut.convert_tokens_to_ids("<REF_POS>"), "capitals make no difference"


def published_vision():
    """Weights as EfficientNet-lite2's authors publish them, with a classifier; random."""
    own = parts.EfficientNetModel(efficientnet_lite2.efficientnet_lite2_config(64)).state_dict()
    published = {"_fc.weight": torch.randn(1000, 1280), "_fc.bias": torch.randn(1000)}
    for name, tensor in own.items():
        module, _, part = name.rpartition(".")
        if module in efficientnet_lite2.STEM_AND_HEAD:
            published[f"{efficientnet_lite2.STEM_AND_HEAD[module]}.{part}"] = tensor.clone()
        elif "squeeze_excite" not in name:
            block, _, rest = module.removeprefix("encoder.blocks.").partition(".")
            published[f"_blocks.{block}.{efficientnet_lite2.PARTS[rest]}.{part}"] = tensor.clone()
    return published


@pytest.fixture(scope="module")
def vision():
    torch.manual_seed(0)
    return efficientnet_lite2.convert(published_vision(), 64)[0]


def test_the_gates_of_a_lite_model_stay_open(vision):
    gate = vision.encoder.blocks[3].squeeze_excite
    states = torch.randn(1, gate.expand.out_channels, 4, 4)
    assert torch.equal(gate(states), states)


def test_other_weights_than_lite2s_are_refused():
    published = published_vision()
    missing = {name: tensor for name, tensor in published.items() if name != "_blocks.4._bn1.bias"}
    with pytest.raises(ValueError, match="lacks.*blocks.4"):
        efficientnet_lite2.convert(missing, 64)
    with pytest.raises(ValueError, match="has.*_blocks.99"):
        efficientnet_lite2.convert(published | {"_blocks.99._bn1.bias": torch.zeros(1)}, 64)


def test_a_language_model_keeps_layers_and_rows():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    full = LlamaForCausalLM(config).eval()
    cut = parts.cut_language_model(full, (0, 2), [0, 1, 2, 7, 9], 7).eval()
    ours, theirs = torch.tensor([[1, 3, 4]]), torch.tensor([[1, 7, 9]])
    del full.model.layers[1]
    full.model.layers[1].self_attn.layer_idx = 1
    torch.testing.assert_close(cut(ours).logits[..., 3:5], full(theirs).logits[..., [7, 9]])
    rows_of = cut.get_input_embeddings().weight
    torch.testing.assert_close(rows_of[5], full.get_input_embeddings().weight.mean(0))
    assert cut.lm_head.weight is rows_of


@pytest.fixture
def vlm(vision, full_tokenizer, tmp_path):
    """A tiny one of the parts, also saved in the folder `vlm`."""
    tokenizer, kept = cut_tokenizer.cut_tokenizer(full_tokenizer, words.texts())
    config = LlamaConfig(
        vocab_size=len(full_tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    language = parts.cut_language_model(LlamaForCausalLM(config), (0, 2), kept, len(tokenizer))
    vlm = parts.compose(vision, language, tokenizer)
    vlm.save_pretrained(tmp_path / "vlm")
    parts.build_processor(tokenizer, 64).save_pretrained(tmp_path / "vlm")
    return vlm


def test_the_shares_of_a_cell():
    things = [thing("cup", "a1"), thing("dog", "d2", 30)]
    objects = [(["cup", "a1"], things[0].mask, ()), (["dog", "d2"], things[1].mask, ()), ([], things[1].mask, ())]
    whole = seeing.cell_shares(objects, seeing.View((0, 0, SIDE, SIDE), False), 6).view(6, 6, 81)
    torch.testing.assert_close(whole.sum(-1), torch.ones(6, 6))
    assert whole[0, 0, seeing.NUMBERS["cup"]] == 1 and whole[5, 0, seeing.NOTHING] == 1
    dog = torch.tensor(things[1].mask).float().view(6, 10, 6, 10).mean((1, 3))
    torch.testing.assert_close(whole[..., seeing.NUMBERS["dog"]], dog)
    part = seeing.cell_shares(objects, seeing.View((0, 0, 30, 30), True), 3).view(3, 3, 81)
    assert part[0, 2, seeing.NUMBERS["cup"]] == 1, "mirrored, the first column is the last"
    torch.testing.assert_close(part[..., seeing.NUMBERS["dog"]], dog[:3, :3].flip(1))
    assert {seeing.random_view(80, 60, random.Random(n)).mirrored for n in range(9)} == {False, True}


@pytest.mark.slow
def test_the_encoder_learns_to_see(vlm, photos, tmp_path):
    """Its first blocks, the statistics of its norms and everything outside of it stay; stopped, it goes on."""
    rows.build(photos[0], tmp_path / "rows_of", count=1)
    shutil.move(tmp_path / "rows_of" / "rows", tmp_path / "rows")
    before = {name: tensor.clone() for name, tensor in vlm.state_dict().items()}
    seeing.train(tmp_path, epochs=1, batch_size=4)
    (first,) = (tmp_path / "seeing").glob("checkpoint-*")
    seeing.train(tmp_path, epochs=2, batch_size=4)
    (last,) = (tmp_path / "seeing").glob("checkpoint-*")
    log = json.loads((last / "trainer_state.json").read_text())
    assert log["global_step"] == 2 * int(first.name.split("-")[1]), "not begun again"
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "vlm_seeing").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[1] for name in changed} == {"vision_tower", "multi_modal_projector"}
    blocks = {int(name.split("blocks.")[1].split(".")[0]) for name in changed if "blocks." in name}
    assert blocks == set(range(seeing.FIRST_TRAINED, 21)) and not any("running" in name for name in changed)
    AutoProcessor.from_pretrained(tmp_path / "vlm_seeing")


def test_the_parts_train_together(vlm, photos, tmp_path):
    """One step of the public warm-up on the example's rows; the vision encoder stays as it was, statistics too."""
    processor = SegCompassProcessor.from_parts(tmp_path / "vlm", 64, num_slots=2, instruction_template="{instruction}")
    rows.build(photos[0], tmp_path / "out", count=1)
    found = datasets.load_from_disk(str(tmp_path / "out" / "rows"))["train"]
    batch = processor(images=[found[0]["image"]], instruction=["the cup"])
    assert (batch["input_ids"] == processor.image_token_id).sum() == 4, "64 pixels at a stride of 32"
    before = {name: tensor.clone() for name, tensor in vlm.state_dict().items()}
    settings = {"alignment_weight": 0.3, "alignment_pairs": "names", "alignment_layer": 1, "reading_weight": 0.1}
    arguments = WarmupConfig(
        str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=2, learning_rate=1e-3, use_cpu=True,
        report_to=[], save_strategy="no", num_eval_generations=0, **settings,
    )  # fmt: skip
    trainer = WarmupTrainer(vlm, arguments, found, None, processor, names=seen.named_words)
    trainer.train()
    after = vlm.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not [name for name in changed if "vision_tower" in name]
    assert any("multi_modal_projector" in name for name in changed)


def test_the_recipe_can_be_read(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(ROOT)
    from segcompass_hf.training.recipe.trainers import names_of

    recipe = read_recipe(EXAMPLE / "recipe.yaml")
    assert [stage.name for stage in recipe.stages] == ["warmup", "sae", "segmentation"]
    for stage in recipe.stages:
        stage.arguments(2)
    assert names_of(recipe.stages[0])["names"].__name__ == "named_words"
    assert recipe.stages[0].written["alignment_layer"] == recipe.stages[1].written["sae_layer"] < len(parts.LAYERS)
