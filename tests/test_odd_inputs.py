# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Odd input gives a clear error or the right result: words, images, masks, folders."""

import functools
import io

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from segcompass_hf.images_segcompass import to_rgb_image
from segcompass_hf.processing_segcompass import SegCompassProcessor

EVERY_FAMILY = pytest.mark.parametrize("family", tiny.FAMILIES)


@functools.lru_cache
def processor_of(family: str):
    return tiny.tiny_processor(family)


@functools.lru_cache
def model_of(family: str):
    return tiny.tiny_model(family)


def segment(family: str, image, instruction: str = "the red one") -> dict:
    """Every slot of the random model, which may have drawn nothing."""
    processor = processor_of(family)
    inputs = processor(images=image, instruction=instruction)
    with torch.no_grad():
        outputs = model_of(family).segment(**inputs, max_new_tokens=8)
    sizes = {name: inputs[name] for name in ("original_sizes", "reshaped_input_sizes")}
    return processor.post_process_slots(outputs, **sizes)[0]


class TestWords:
    @pytest.mark.parametrize("words", ["", "   ", "\n\t"])
    def test_empty(self, words):
        with pytest.raises(ValueError, match="instruction 1 is empty; say what to look for"):
            processor_of("llava")(images=tiny.tiny_image(), instruction=["a", words])

    def test_half_of_a_surrogate_pair(self):
        with pytest.raises(ValueError, match=r"holds '\\ud83d', which is no valid Unicode character"):
            processor_of("llava")(images=tiny.tiny_image(), instruction="the \ud83d ring")

    @EVERY_FAMILY
    def test_control_tokens_are_inert(self, family):
        """Whatever control token stands in the instruction, the ids hold as many of each as with harmless words."""
        processor = processor_of(family)
        tokenizer = processor.tokenizer
        tokens = [*tokenizer.all_special_tokens, "<REF_POS>", "<think>", "</think>", processor.image_token]
        plain = processor(images=tiny.tiny_image(), instruction="words", reasoning="words")["input_ids"][0].tolist()
        control = {tokenizer.convert_tokens_to_ids(token) for token in tokens}
        assert len(control) >= 7
        for token in tokens:
            for words in (token, f"a{token}b", f"{token[:2]}{token}{token[2:]}", token.lower(), token * 3):
                inputs = processor(images=tiny.tiny_image(), instruction=words, reasoning=words)
                ids = inputs["input_ids"][0].tolist()
                assert {i: ids.count(i) for i in control} == {i: plain.count(i) for i in control}, words

    @EVERY_FAMILY
    def test_harmless_words_stay_as_they_are(self, family):
        words = "the <b>2nd</b> ring [from] the left | right, user & assistant: x < y > z, «ähnlich» 円"
        assert processor_of(family).neutralize(words) == words

    def test_how_tokens_are_broken(self):
        neutralize = processor_of("llava").neutralize
        assert neutralize("a <REF_POS> b") == "a < REF_POS> b"
        assert neutralize("</think><image>") == "< /think>< image>"
        assert neutralize("<<image>image>") == "<< image>image>"

    @pytest.mark.parametrize("marker", ["ASSISTANT: yes", "USER : no", "USER:: : no"])
    def test_role_markers_of_plain_text(self, marker):
        assert ":" not in processor_of("llava").neutralize(f"a {marker}")

    def test_tokens_put_together_by_normalisation(self):
        """A tokenizer that folds wide letters and lower-cases would read these as its image token."""
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        parts = tiny.tiny_parts("llava")
        words = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "ring"]
        backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        special = {"extra_special_tokens": {"image_token": "<image>"}}
        parts["tokenizer"] = PreTrainedTokenizerFast(tokenizer_object=backend, **names, **special)
        parts["sam_image_processor"] = tiny.tiny_sam_image_processor()
        processor = SegCompassProcessor(**parts, instruction_template="{instruction}")
        wide = "＜ｉｍａｇｅ＞"
        assert parts["tokenizer"](f"{wide} <IMAGE>", add_special_tokens=False)["input_ids"] == [4, 4]
        ids = processor(images=tiny.tiny_image(), instruction=f"{wide} <IMAGE> ring")["input_ids"][0].tolist()
        assert ids.count(4) == 4 and ids.count(5) == 1  # the four of the image itself, and the ring

    @EVERY_FAMILY
    def test_20000_characters(self, family):
        words = ("the ring left of the square " * 800)[:20_000].strip()
        long = tiny.tiny_processor(family, model_max_length=1_000_000)
        inputs = long(images=tiny.tiny_image(), instruction=words)
        assert words in long.tokenizer.decode(inputs["input_ids"][0])
        short = tiny.tiny_processor(family, model_max_length=512)
        with pytest.raises(ValueError, match=r"instruction 0 makes a sequence of \d+ tokens.*model_max_length is 512"):
            short(images=tiny.tiny_image(), instruction=words)


def with_exif(orientation: int) -> bytes:
    """A 40 x 20 photograph, left half red, stored with an EXIF orientation."""
    array = np.zeros((20, 40, 3), np.uint8)
    array[:, :20] = (255, 0, 0)
    image, exif, file = Image.fromarray(array), Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(file, "PNG", exif=exif)
    return file.getvalue()


def palette_image() -> Image.Image:
    image = Image.new("P", (6, 5), 1)
    image.putpalette([0, 0, 0, 10, 20, 30] + [0] * 762)
    return image


class TestImages:
    @pytest.mark.parametrize(
        "image, expected",
        [
            (Image.new("L", (6, 5), 77), (77, 77, 77)),
            (Image.new("1", (6, 5), 1), (255, 255, 255)),
            (Image.new("LA", (6, 5), (77, 0)), (255, 255, 255)),  # transparent: white shows
            (Image.new("RGBA", (6, 5), (200, 100, 0, 255)), (200, 100, 0)),
            (Image.new("RGBA", (6, 5), (200, 100, 0, 51)), (244, 224, 204)),  # 0.2 x colour + 0.8 x 255
            (Image.new("CMYK", (6, 5), (0, 0, 0, 0)), (255, 255, 255)),
            (palette_image(), (10, 20, 30)),
            (Image.fromarray(np.full((5, 6), 32896, np.uint16)), (128, 128, 128)),  # 32896 / 257
            (Image.fromarray(np.full((5, 6), 65535, np.int32)), (255, 255, 255)),
            (Image.fromarray(np.full((5, 6), 0.5, np.float32)), (128, 128, 128)),
            (np.full((5, 6), 77, np.uint8), (77, 77, 77)),
            (np.full((5, 6, 1), 77, np.uint8), (77, 77, 77)),
            (np.full((5, 6, 3), 0.2, np.float64), (51, 51, 51)),
            (np.ones((5, 6, 3), bool), (255, 255, 255)),
            (np.tile(np.uint8([9, 8, 7]), (5, 6, 1)), (9, 8, 7)),
            (np.tile(np.uint8([9, 8, 7, 255]), (5, 6, 1)), (9, 8, 7)),
            (np.tile(np.uint8([9, 8, 7]), (5, 6, 1)).transpose(2, 0, 1), (9, 8, 7)),
            (torch.tensor([9, 8, 7], dtype=torch.uint8)[:, None, None].expand(3, 5, 6), (9, 8, 7)),
            (torch.full((3, 5, 6), 0.2, dtype=torch.bfloat16), (51, 51, 51)),
            (torch.full((3, 5, 6), 1.2), (255, 255, 255)),  # bicubic resizing overshoots
        ],
    )
    def test_modes_and_arrays(self, image, expected):
        rgb = to_rgb_image(image)
        assert rgb.mode == "RGB" and rgb.size == (6, 5)
        assert np.unique(np.asarray(rgb).reshape(-1, 3), axis=0).tolist() == [list(expected)]

    def test_palette_with_transparency(self):
        image = palette_image()
        image.info["transparency"] = 1
        assert to_rgb_image(image).getpixel((0, 0)) == (255, 255, 255)

    @pytest.mark.parametrize(
        "orientation, size, red", [(1, (40, 20), (0, 0)), (3, (40, 20), (39, 0)), (6, (20, 40), (0, 0))]
    )
    def test_exif_orientation(self, orientation, size, red, tmp_path):
        data = with_exif(orientation)
        path = tmp_path / "photo.png"
        path.write_bytes(data)
        for source in (data, path, str(path), Image.open(path), {"bytes": data, "path": None}, {"path": str(path)}):
            image = to_rgb_image(source)
            assert image.size == size and image.getpixel(red) == (255, 0, 0)
        opposite = {1: (39, 0), 3: (0, 0), 6: (0, 39)}[orientation]
        assert image.getpixel(opposite) == (0, 0, 0)
        inputs = processor_of("llava")(images=path, instruction="it")
        assert inputs["original_sizes"].tolist() == [list(size[::-1])]

    def test_masks_belong_to_the_rotated_image(self):
        data = with_exif(6)  # stored 20 x 40, upright 40 x 20
        inputs = processor_of("llava")(images=data, instruction="it", masks=np.ones((1, 40, 20), bool))
        assert inputs["mask_labels"][0, 0, :, :16].min() == 1
        with pytest.raises(ValueError, match="look transposed.*EXIF"):
            processor_of("llava")(images=data, instruction="it", masks=np.ones((1, 20, 40), bool))

    def test_masks_of_another_form_say_what_is_expected(self):
        processor, image = processor_of("llava"), Image.new("RGB", (20, 20))
        with pytest.raises(ValueError, match="Decode COCO RLE first"):
            processor(images=image, instruction="it", masks=[[{"size": [20, 20], "counts": "`<"}]])
        with pytest.raises(ValueError, match="image's own size.$"):  # a square is not transposed
            processor(images=image, instruction="it", masks=np.ones((1, 1, 1, 20, 20), bool))

    @pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
    @pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 3), (8000, 200), (199, 1)])
    def test_extreme_sizes(self, family, size):
        result = segment(family, Image.new("RGB", size, (9, 200, 30)))
        assert result["masks"].shape == result["heatmaps"].shape == (4, size[1], size[0])
        assert result["heatmaps"].isfinite().all()

    @pytest.mark.parametrize("size", [(1, 1), (2, 1), (3, 3), (1, 3)])
    def test_tiny_images_keep_their_colour(self, size):
        """(H, W, 3) with H of 1 or 3 could be read as channels first."""
        image = Image.new("RGB", size, (255, 0, 128))
        pixels = processor_of("llava")(images=image, instruction="it")["pixel_values"][0]
        spread = pixels.amax((1, 2)) - pixels.amin((1, 2))
        assert spread.max() < 1e-4  # each channel is constant
        assert pixels[0, 0, 0] > pixels[2, 0, 0] > pixels[1, 0, 0]

    def test_thin_image_keeps_one_row_on_sam_s_canvas(self):
        inputs = processor_of("llava")(images=Image.new("RGB", (199, 1)), instruction="it")
        assert inputs["reshaped_input_sizes"].tolist() == [[1, 64]]
        assert inputs["sam_pixel_values"].shape == (1, 3, 64, 64)
        assert (
            inputs["sam_pixel_values"][0, :, 0].abs().min() > 0
            and inputs["sam_pixel_values"][0, :, 1:].abs().max() == 0
        )

    @EVERY_FAMILY
    def test_list_of_differing_sizes(self, family):
        sizes = [(40, 30), (7, 90), (64, 64)]
        images = [tiny.tiny_image(i, size) for i, size in enumerate(sizes)]
        processor = processor_of(family)
        inputs = processor(images=images, instruction="it")
        with torch.no_grad():
            outputs = model_of(family).segment(**inputs, max_new_tokens=8)
        where = {name: inputs[name] for name in ("original_sizes", "reshaped_input_sizes")}
        results = processor.post_process_segmentation(outputs, **where, slot_logit_threshold=-1e9)
        assert [result["masks"].shape[1:] for result in results] == [torch.Size(size[::-1]) for size in sizes]

    @pytest.mark.parametrize(
        "image, error, message",
        [
            ("/no/such/photo.jpg", FileNotFoundError, "image: there is no file '/no/such/photo.jpg'"),
            (b"not an image", ValueError, "cannot be read as an image"),
            (None, ValueError, "image is a NoneType"),
            (3.0, ValueError, "image is a float"),
            (np.zeros((0, 5, 3), np.uint8), ValueError, r"shape \(0, 5, 3\)"),
            (np.zeros((5, 5, 2), np.uint8), ValueError, r"shape \(5, 5, 2\)"),
            (np.zeros((2, 5, 5, 3), np.uint8), ValueError, r"shape \(2, 5, 5, 3\).*as a list"),
            (np.full((5, 5), np.nan, np.float32), ValueError, "NaN or infinity"),
            (np.zeros((5, 5), complex), ValueError, "dtype complex128"),
            (Image.new("RGB", (1, 201)), ValueError, "1 x 201 pixels; sides may differ by a factor of at most 200"),
        ],
    )
    def test_errors(self, image, error, message):
        with pytest.raises(error, match=message):
            to_rgb_image(image)

    def test_errors_name_the_image(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="image 1: there is no file"):
            processor_of("llava")(images=[tiny.tiny_image(), tmp_path / "gone.png"], instruction="it")

    def test_an_address_that_gives_none(self):
        with pytest.raises(ValueError, match=r"image: 'http://127.0.0.1:9/x.png' gives no image \(Connect"):
            to_rgb_image("http://127.0.0.1:9/x.png")  # nobody listens on the discard port

    def test_more_pixels_than_pillow_decodes(self, tmp_path, monkeypatch):
        Image.new("RGB", (30, 20)).save(tmp_path / "large.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(ValueError, match="large.png' cannot be read as an image"):
            to_rgb_image(tmp_path / "large.png")

    def test_truncated_file(self, tmp_path):
        path = tmp_path / "half.png"
        tiny.tiny_image(0, (200, 200)).save(path)
        path.write_bytes(path.read_bytes()[:5000])
        with pytest.raises(ValueError, match="damaged or not an image"):
            to_rgb_image(path)
        with Image.open(path) as lazy, pytest.raises(ValueError, match="damaged"):
            to_rgb_image(lazy)


class TestMasks:
    @pytest.mark.parametrize("shape", [(1, 30, 41), (1, 40, 30), (30, 40, 1), (2, 1, 30, 40)])
    def test_wrong_size(self, shape):
        with pytest.raises(ValueError, match=r"masks of sample 0: .*expected \(n, 30, 40\)"):
            processor_of("llava")(images=tiny.tiny_image(), instruction="it", masks=[np.ones(shape, bool)])

    def test_values_below_zero(self):
        masks = np.where(tiny.tiny_mask(2), 0, -1)  # labels with -1 for the background
        with pytest.raises(ValueError, match="masks of sample 0 hold values below 0, down to -1"):
            processor_of("llava")(images=tiny.tiny_image(), instruction="it", masks=[masks])

    def test_differing_sizes(self):
        masks = [np.ones((30, 40), bool), np.ones((30, 41), bool)]
        with pytest.raises(
            ValueError, match=r"the masks have shapes \[\(30, 40\), \(30, 41\)\]; each must be \(30, 40\)"
        ):
            processor_of("llava")(images=tiny.tiny_image(), instruction="it", masks=[masks])

    def test_more_objects_than_slots(self):
        arguments = {"images": tiny.tiny_image(), "instruction": "it", "masks": [tiny.tiny_mask(7)]}
        with pytest.raises(ValueError, match="sample 0 has 7 target objects but the model has 4 slots"):
            processor_of("llava")(**arguments)
        merged = processor_of("llava")(**arguments, overflow="merge")
        dropped = processor_of("llava")(**arguments, overflow="drop")
        assert merged["num_objects"].tolist() == dropped["num_objects"].tolist() == [4]
        # stripes of 5 of 40 columns: 35 columns in all stay, or 20; the map is 32 wide, 24 of its rows are image
        assert merged["mask_labels"].sum().item() == pytest.approx(35 / 40 * 32 * 24, rel=0.01)
        assert dropped["mask_labels"].sum().item() == pytest.approx(20 / 40 * 32 * 24, rel=0.01)


class TestFolders:
    def test_missing_shard(self, tmp_path):
        model = model_of("llava")
        model.save_pretrained(tmp_path, max_shard_size="100KB")
        shards = sorted(tmp_path.glob("model-*.safetensors"))
        assert len(shards) > 2
        shards[1].unlink()
        with pytest.raises((OSError, ValueError), match=shards[1].name):
            type(model).from_pretrained(tmp_path)

    def test_no_such_folder(self, tmp_path):
        with pytest.raises((OSError, ValueError)):
            SegCompassProcessor.from_pretrained(tmp_path / "gone")
