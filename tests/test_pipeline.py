"""`pipeline("reasoning-segmentation")`: the direct answer, batches, inputs of every form, saving as remote code."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from transformers import pipeline

from segcompass_hf import ReasoningSegmentationPipeline

OPTIONS = {"reasoning": "short", "slot_logit_threshold": -1e9}  # random weights: keep every slot


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny-llava")
    tiny.tiny_model("llava").save_pretrained(path)
    tiny.tiny_processor("llava").save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def pipe(checkpoint):
    return pipeline("reasoning-segmentation", model=checkpoint, device="cpu")


def _arrays(answer: dict) -> list[np.ndarray]:
    return [np.asarray(segment["mask"]) for segment in answer["segments"]]


def test_the_task_name_gives_our_pipeline_with_the_processor(pipe):
    assert isinstance(pipe, ReasoningSegmentationPipeline)
    assert type(pipe.processor).__name__ == "SegCompassProcessor"


def test_it_can_be_printed(pipe):
    assert repr(pipe).startswith("ReasoningSegmentationPipeline: {'model': 'SegCompassForReasoningSegmentation'")


def test_it_answers_as_segment_and_post_processing_do(pipe):
    image = tiny.tiny_image(0, (40, 30))
    answer = pipe(image, instruction="the red circle", **OPTIONS)
    inputs = pipe.processor(images=image, instruction="the red circle", return_tensors="pt")
    with torch.no_grad():
        seg = pipe.model.segment(**inputs, reasoning="short")
    expected = pipe.processor.post_process_segmentation(
        seg, inputs["original_sizes"], inputs["reshaped_input_sizes"], slot_logit_threshold=-1e9
    )[0]
    assert answer["reasoning"] == expected["reasoning"]
    assert len(answer["segments"]) == tiny.NUM_SLOTS
    for k, segment in enumerate(answer["segments"]):
        assert set(segment) == {"score", "label", "mask", "slot"}
        assert segment["mask"].mode == "L" and segment["mask"].size == (40, 30)
        assert np.array_equal(np.asarray(segment["mask"]), expected["masks"][k].numpy() * 255)
        assert segment["score"] == pytest.approx(expected["scores"][k].item())
        assert segment["label"] == "the red circle" and segment["slot"] == k


def test_thresholds_are_the_models_own_unless_given(pipe, monkeypatch):
    image, options = tiny.tiny_image(0), {"instruction": "the red circle", "reasoning": "none"}
    every = pipe(image, slot_logit_threshold=-1e9, **options)["segments"]
    logits = sorted(torch.logit(torch.tensor([segment["score"] for segment in every])).tolist())
    assert logits[1] - logits[0] > 1e-3
    own = (logits[0] + logits[1]) / 2
    monkeypatch.setattr(pipe.model.config, "slot_logit_threshold", own)
    kept = pipe(image, **options)["segments"]
    assert len(kept) == len(every) - 1
    assert all(torch.logit(torch.tensor(segment["score"])) > own for segment in kept)
    assert not all((mask == 0).all() for mask in _arrays({"segments": kept}))
    monkeypatch.setattr(pipe.model.config, "mask_logit_threshold", 1e9)
    assert all((mask == 0).all() for mask in _arrays(pipe(image, **options)))
    assert pipe(image, instruction="x", reasoning="none", slot_logit_threshold=1e9)["segments"] == []
    full = pipe(image, instruction="x", reasoning="none", slot_logit_threshold=-1e9, mask_logit_threshold=-1e9)
    assert all((mask == 255).all() for mask in _arrays(full))


def test_several_answers_per_image_are_refused(pipe):
    samples = [{"image": tiny.tiny_image(number), "instruction": "the ring"} for number in range(2)]
    for batch_size in (1, 2):
        with pytest.raises(ValueError, match="num_return_sequences gives .* one each; call model.segment"):
            pipe(samples, batch_size=batch_size, generate_kwargs={"do_sample": True, "num_return_sequences": 2})


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_batch_equals_its_samples_one_by_one(family):
    """Images of different sizes and instructions of different lengths; Qwen's patches are flattened over the batch."""
    pipe = ReasoningSegmentationPipeline(
        tiny.tiny_model(family), processor=tiny.tiny_processor(family), task="reasoning-segmentation", device="cpu"
    )
    samples = [
        {"image": tiny.tiny_image(0, (40, 30)), "instruction": "the red circle"},
        {"image": tiny.tiny_image(1, (30, 64)), "instruction": "all the blue squares left of the small green ring"},
        {"image": tiny.tiny_image(2, (33, 33)), "instruction": "the ring"},
    ]
    batched = pipe(samples, batch_size=2, **OPTIONS)  # a full batch and a rest
    for sample, answer in zip(samples, batched, strict=True):
        alone = pipe(sample, **OPTIONS)
        assert answer["reasoning"] == alone["reasoning"]
        assert [s["label"] for s in answer["segments"]] == [sample["instruction"]] * tiny.NUM_SLOTS
        for one, other in zip(answer["segments"], alone["segments"], strict=True):
            assert one["mask"].size == sample["image"].size
            assert one["score"] == pytest.approx(other["score"], abs=1e-4)
        for one, other in zip(_arrays(answer), _arrays(alone), strict=True):
            assert (one != other).mean() < 0.01  # rounding may move a pixel that lies on the threshold


def test_inputs_of_every_form_give_the_same_answer(pipe, tmp_path):
    image = tiny.tiny_image(3)
    image.save(tmp_path / "image.png")
    options = {"reasoning": "none", "slot_logit_threshold": -1e9}
    expected = _arrays(pipe(image, instruction="the ring", **options))
    forms = [
        pipe(str(tmp_path / "image.png"), instruction="the ring", **options),
        pipe(np.asarray(image), instruction="the ring", **options),
        pipe({"image": image, "instruction": "the ring"}, **options),
        pipe({"image": image}, instruction="the ring", **options),
        *pipe([image], instruction="the ring", **options),
        *pipe([image], instruction=["the ring"], **options),
        *pipe(({"image": image, "instruction": "the ring"} for _ in range(1)), **options),
    ]
    assert len(forms) == 7
    for form in forms:
        assert all(np.array_equal(one, other) for one, other in zip(_arrays(form), expected, strict=True))
    assert pipe([]) == []


def test_dataset_in_the_row_schema(pipe):
    scenes = pytest.importorskip("segcompass_hf.data.scenes")
    pytest.importorskip("datasets")
    rows = scenes.build("val", 3, seed=0)
    options = {**OPTIONS, "reasoning": "none"}
    answers = list(pipe(rows, batch_size=2, **options))
    assert [a["reasoning"] for a in answers] == [pipe(dict(row), **options)["reasoning"] for row in rows]


def test_bad_inputs_say_what_is_expected(pipe):
    image = tiny.tiny_image()
    with pytest.raises(ValueError, match="non-empty string; got None"):
        pipe(image)
    with pytest.raises(ValueError, match="non-empty string; got '  '"):
        pipe(image, instruction="  ")
    with pytest.raises(ValueError, match=r"got None of an input with the keys \['image', 'text'\]"):
        pipe({"image": image, "text": "the ring"})
    with pytest.raises(ValueError, match=r"got \['a', 'b'\] of an input with .* for each image"):
        pipe({"image": [image, image], "instruction": ["a", "b"]})
    with pytest.raises(ValueError, match='needs the key "image"'):
        pipe({"instruction": "the ring"})
    with pytest.raises(ValueError, match="2 images and 1 instructions"):
        pipe([image, image], instruction=["the ring"])
    with pytest.raises(TypeError, match="does not take 'colour'"):
        pipe(image, instruction="the ring", colour="red")
    with pytest.raises(FileNotFoundError):
        pipe("missing.png", instruction="the ring")


def test_saved_it_loads_as_remote_code_without_the_package(pipe, tmp_path):
    """In a process that cannot import segcompass_hf; there the entry `custom_pipelines` leads to our file."""
    folder = tmp_path / "published"
    pipe.save_pretrained(folder)
    image = tiny.tiny_image(0)
    image.save(tmp_path / "image.png")
    expected = pipe(image, instruction="the red circle", **OPTIONS)
    code = f"""
import sys
import numpy as np
from transformers import pipeline
try:
    import segcompass_hf
    raise SystemExit("segcompass_hf is importable, so this would test nothing")
except ImportError:
    pass
pipe = pipeline("reasoning-segmentation", model={str(folder)!r}, trust_remote_code=True, device="cpu")
answer = pipe({str(tmp_path / "image.png")!r}, instruction="the red circle", **{OPTIONS!r})
assert type(pipe).__module__.startswith("transformers_modules"), type(pipe)
np.savez({str(tmp_path / "masks.npz")!r}, *[np.asarray(s["mask"]) for s in answer["segments"]])
print(answer["reasoning"])
"""
    # An empty module path and no user site: an editable install is the one way in that is left, so block that too.
    blocker = tmp_path / "block" / "segcompass_hf.py"
    blocker.parent.mkdir()
    blocker.write_text("raise ImportError('blocked by the test')\n")
    environment = os.environ | {"PYTHONPATH": str(blocker.parent), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().splitlines()[-1:] == expected["reasoning"].strip().splitlines()[-1:]
    masks = list(np.load(tmp_path / "masks.npz").values())
    assert len(masks) == tiny.NUM_SLOTS
    for mask, other in zip(masks, _arrays(expected), strict=True):
        assert (mask != other).mean() < 0.01


def test_with_the_package_a_saved_pipeline_needs_no_trust(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = pipeline("reasoning-segmentation", model=str(tmp_path), device="cpu")
    assert type(again) is ReasoningSegmentationPipeline
    image = Image.new("RGB", (20, 20), "red")
    one, other = (p(image, instruction="the red square", **OPTIONS) for p in (pipe, again))
    assert one["reasoning"] == other["reasoning"]
    assert all(np.array_equal(a, b) for a, b in zip(_arrays(one), _arrays(other), strict=True))


class KeyColumn(torch.utils.data.Dataset):
    """A column as transformers' `KeyDataset` gives it: read by index, and no `Sequence`."""

    def __init__(self, values: list):
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int):
        return self.values[index]


WORDS = ["the red circle", "the ring", "all the blue squares"]


def images() -> list[Image.Image]:
    return [tiny.tiny_image(number, (40, 30)) for number in range(3)]


def column(name: str):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "instruction": Value("string")})
    return Dataset.from_dict({"image": images(), "instruction": WORDS}, features=features)[name]


def undecoded():
    from datasets import Image as ImageFeature

    return column("image").source.cast_column("image", ImageFeature(decode=False))["image"]


def series(values: list):
    """With labels that are no positions, as after filtering."""
    return pytest.importorskip("pandas").Series(values, index=[7, 3, 5])


IMAGE_FORMS = {
    "list": images,
    "tuple": lambda: tuple(images()),
    "array": lambda: np.stack([np.asarray(image) for image in images()]),
    "tensor": lambda: torch.stack([torch.tensor(np.asarray(image)).permute(2, 0, 1) for image in images()]),
    "column": lambda: column("image"),
    "undecoded column": undecoded,
    "streamed column": lambda: column("image").source.to_iterable_dataset()["image"],
    "torch data set": lambda: KeyColumn(images()),
    "generator": lambda: (image for image in images()),
    "iterator": lambda: map(lambda image: image, images()),
    "rows": lambda: [{"image": image} for image in images()],
    "series": lambda: series(images()),
    "view": lambda: dict(enumerate(images())).values(),
}
WORD_FORMS = {
    "list": lambda: WORDS,
    "tuple": lambda: tuple(WORDS),
    "array": lambda: np.array(WORDS),
    "column": lambda: column("instruction"),
    "generator": lambda: (words for words in WORDS),
    "series": lambda: series(WORDS),
}
BRIEF = {"reasoning": "none", "slot_logit_threshold": -1e9}


@pytest.fixture(scope="module")
def expected(pipe):
    """Masks of each image with its own words, one by one, and of each image with the first words."""
    own = [_arrays(pipe(image, instruction=words, **BRIEF)) for image, words in zip(images(), WORDS, strict=True)]
    return own, [_arrays(pipe(image, instruction=WORDS[0], **BRIEF)) for image in images()]


@pytest.mark.parametrize("form", IMAGE_FORMS)
def test_several_images_in_the_forms_that_pipelines_take(pipe, expected, form):
    own, first = expected
    for words, masks in ((WORDS, own), (WORDS[0], first)):
        answers = list(pipe(IMAGE_FORMS[form](), instruction=words, **BRIEF))
        labels = [answer["segments"][0]["label"] for answer in answers]
        assert labels == (WORDS if words is WORDS else WORDS[:1] * 3)
        for answer, arrays in zip(answers, masks, strict=True):
            assert all(np.array_equal(*pair) for pair in zip(_arrays(answer), arrays, strict=True))


@pytest.mark.parametrize("images_form", ["list", "column", "generator"])
@pytest.mark.parametrize("form", WORD_FORMS)
def test_several_instructions_in_the_forms_that_pipelines_take(pipe, images_form, form):
    answers = list(pipe(IMAGE_FORMS[images_form](), instruction=WORD_FORMS[form](), batch_size=2, **BRIEF))
    assert [answer["segments"][0]["label"] for answer in answers] == WORDS


@pytest.mark.parametrize(
    "nothing",
    [[], (), KeyColumn([]), iter([]), np.zeros((0, 4, 4, 3))],
    ids="list tuple column iterator array".split(),
)
def test_nothing_gives_no_answers(pipe, nothing):
    assert list(pipe(nothing)) == []


@pytest.mark.parametrize("form", ["tuple", "column", "torch data set", "series"])
def test_other_numbers_of_images_and_instructions_are_refused_before_the_first_answer(pipe, form):
    for words in (WORDS[:2], (text for text in WORDS[:2])):
        with pytest.raises(ValueError, match="got 3 images and 2 instructions; pass one instruction for all"):
            pipe(IMAGE_FORMS[form](), instruction=words, **BRIEF)
    with pytest.raises(ValueError, match="got 1 images and 2 or more instructions"):
        pipe(images()[0], instruction=iter(WORDS), **BRIEF)


def test_a_generator_that_ends_too_early_or_too_late_is_named(pipe):
    with pytest.raises(ValueError, match="there are 2 pairs, and then more images"):
        list(pipe((image for image in images()), instruction=WORDS[:2], **BRIEF))
    with pytest.raises(ValueError, match="there are 1 pairs, and then more instructions"):
        list(pipe((image for image in images()[:1]), instruction=WORDS, **BRIEF))


def test_what_has_no_length_is_read_as_it_is_answered(pipe):
    read = []
    answers = pipe((read.append(index) or image for index, image in enumerate(images())), instruction="x", **BRIEF)
    next(iter(answers))
    assert len(read) < 3


def test_an_instruction_of_a_row_counts_before_the_one_for_all(pipe):
    rows = [{"image": images()[0], "instruction": "the ring"}, {"image": images()[1]}]
    for words in ("x", ["x", "x"]):
        answers = pipe(rows, instruction=words, **BRIEF)
        assert [answer["segments"][0]["label"] for answer in answers] == ["the ring", "x"]


SPAWNED = """
import torch.multiprocessing
if __name__ == "__main__":
    torch.multiprocessing.set_start_method("spawn")
    import sys
    sys.path.insert(0, {support!r})
    import tiny
    import segcompass_hf
    from datasets import Dataset
    from transformers import pipeline
    pipe = pipeline("reasoning-segmentation", model={checkpoint!r}, device="cpu")
    rows = Dataset.from_list([{{"image": tiny.tiny_image(i), "instruction": "the ring"}} for i in range(3)])
    options = {{"reasoning": "none", "slot_logit_threshold": -1e9}}
    pipe(rows[0], **options)  # a model that has answered holds hooks of transformers that cannot be pickled
    for inputs in (rows, rows.to_iterable_dataset(), (row for row in rows)):
        print(len(list(pipe(inputs, num_workers=1, **options))))
    print(len(list(pipe(rows["image"], instruction=rows["instruction"], num_workers=1, batch_size=2, **options))))
"""


@pytest.mark.slow
def test_workers_that_are_spawned_read_data_sets(checkpoint, tmp_path):
    """As on macOS, on Windows, and on Linux from Python 3.14 on; a generator stays in this process."""
    pytest.importorskip("datasets")
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED.format(support=os.path.dirname(tiny.__file__), checkpoint=checkpoint))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-4:] == ["3"] * 4
    assert "an iterator cannot be sent to a worker process" in done.stderr
