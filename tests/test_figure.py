"""The figure of an answer: what stands in it, for kept and rejected slots, long texts and odd images."""

import io

import numpy as np
import pytest
from PIL import Image

from segcompass_hf.explain import SegmentationRow, plot_segmentations
from segcompass_hf.figure import write_figure


def _row(size=(40, 30), kept=(1,), reasoning="the red one is larger .", **fields):
    width, height = size
    masks = np.zeros((len(kept), height, width), dtype=bool)
    masks[:, : height // 2] = True
    return SegmentationRow(
        image=Image.new("RGB", size, "gray"),
        instruction="the largest red circle",
        reasoning=reasoning,
        masks=masks,
        scores=np.full(len(kept), 0.9),
        slots=np.array(kept, dtype=int),
        heatmaps=np.zeros((3, height, width)),
        confidences=np.array([0.9 if slot in kept else 0.1 for slot in range(3)]),
        **fields,
    )


def _texts(figure) -> list[str]:
    axes = [one for strip in figure.subfigs for one in strip.axes]
    titles = [one.get_title(loc="left") for one in axes]
    return [text for text in titles + [text.get_text() for one in axes for text in one.texts] if text]


def test_kept_and_rejected_slots_are_told_apart():
    texts = _texts(plot_segmentations([_row(kept=(1,))]))
    slots = [text for text in texts if text.startswith("slot")]
    assert slots == ["slot 0   0.10  –", "slot 1   0.90", "slot 2   0.10  –"]
    assert {"1 mask", "the largest red circle", "the red one is larger.", "kept: slot 1 0.90"} <= set(texts)


def test_nothing_kept_and_truth_without_object():
    texts = _texts(plot_segmentations([_row(kept=(), true_masks=np.zeros((0, 30, 40), dtype=bool))]))
    assert {"no object found  (truth: none)", "kept: no slot"} <= set(texts)


def test_a_long_reasoning_is_cut_and_says_so():
    texts = _texts(plot_segmentations([_row(reasoning="word " * 2000)]))
    assert sum("word" in text for text in texts) < 40
    assert [text.endswith("…") for text in texts if "word" in text][-1]


@pytest.mark.parametrize("size", [(1, 1), (800, 20), (20, 800)])
def test_odd_images_and_texts_are_drawn(size, tmp_path):
    rows = [_row(size, reasoning="$x^2 \x0f <think>", caption="a_b", grid=8), _row(size, kept=(0, 2))]
    plot_segmentations(rows).savefig(tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as figure:
        assert np.asarray(figure.convert("RGB")).std() > 5


def test_a_figure_is_written_whole_or_not_at_all(tmp_path):
    class Half:
        def savefig(self, path, format):
            path.write_bytes(b"half")
            raise OSError("the disk is full")

    path = tmp_path / "new" / "figure.PNG"
    write_figure(plot_segmentations([_row()]), path)
    before = path.read_bytes()
    with pytest.raises(OSError):
        write_figure(Half(), path)
    assert path.read_bytes() == before and [one.name for one in path.parent.iterdir()] == ["figure.PNG"]


def test_no_rows_are_an_error():
    with pytest.raises(ValueError, match="at least one SegmentationRow"):
        plot_segmentations([])


def test_a_notebook_shows_the_figure_without_pyplot():
    figure = plot_segmentations([_row()])
    with Image.open(io.BytesIO(figure._repr_png_())) as shown:  # what IPython asks objects for
        assert shown.size == tuple(round(inches * figure.dpi) for inches in figure.get_size_inches())


def test_a_row_of_what_the_processor_returns():
    masks, heatmaps = np.ones((1, 30, 40), dtype=bool), np.zeros((3, 30, 40))
    answer = {"reasoning": "the red one", "masks": masks, "scores": [0.9], "slots": [1]}
    slots = {"heatmaps": heatmaps, "scores": [0.1, 0.9, 0.2]}
    image = Image.new("RGB", (40, 30))
    row = SegmentationRow.from_answer(image, "the circle", answer, slots, caption="IoU 0.80", grid=8)
    assert (row.image, row.instruction, row.reasoning) == (image, "the circle", "the red one")
    assert row.masks is masks and row.heatmaps is heatmaps
    assert row.scores.tolist() == [0.9] and row.slots.tolist() == [1] and row.confidences.tolist() == [0.1, 0.9, 0.2]
    assert (row.caption, row.grid, row.true_masks) == ("IoU 0.80", 8, None)
