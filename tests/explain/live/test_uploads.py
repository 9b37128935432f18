"""What the live page refuses before it is decoded or kept."""

import io
import subprocess

import pytest
from PIL import Image, ImageFile

gr = pytest.importorskip("gradio", reason="needs gradio: pip install 'segcompass_hf[explain]'")

from gradio.components.image_editor import EditorData  # noqa: E402
from gradio.data_classes import DataWithFiles, FileData  # noqa: E402

from segcompass_hf.explain.live import app, events, uploads  # noqa: E402


@pytest.fixture
def editor():
    made = gr.ImageEditor(type="pil", image_mode="RGB", layers=False)
    uploads.bound_uploads(made)
    return made


def sent(path, layers=()):
    file = FileData(path=str(path))
    return EditorData(background=file, layers=list(layers), composite=file)


def as_png(size=(6, 4)):
    file = io.BytesIO()
    Image.new("RGB", size, (9, 8, 7)).save(file, "PNG")
    return file.getvalue()


def blob(name, index=None, content=None, kind="composite"):
    return DataWithFiles(data={"type": kind, "index": index, "id": name}, files=[("file", content or as_png())])


def test_a_picture_is_read(editor, tmp_path):
    (tmp_path / "a.png").write_bytes(as_png())
    assert editor.preprocess(sent(tmp_path / "a.png"))["composite"].getpixel((5, 3)) == (9, 8, 7)


def test_postscript_named_as_a_picture_runs_nothing(editor, tmp_path, monkeypatch):
    (tmp_path / "dog.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop\n")
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("Ghostscript was run"))
    with pytest.raises(gr.Error, match="cannot be read as a picture. Choose"):
        editor.preprocess(sent(tmp_path / "dog.png"))


def test_more_pixels_than_allowed_are_not_decoded(editor, tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(as_png())
    monkeypatch.setenv("SEGCOMPASS_MAX_IMAGE_PIXELS", "23")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    with pytest.raises(gr.Error, match="6 x 4 = 24 pixels; at most 23 are read"):
        editor.preprocess(sent(tmp_path / "a.png"))


def test_layers_are_few(editor, tmp_path):
    (tmp_path / "a.png").write_bytes(as_png())
    with pytest.raises(gr.Error, match="cannot be read"):
        editor.preprocess(sent(tmp_path / "a.png", [FileData(path=str(tmp_path / "a.png"))] * 9))


def test_drawings_are_kept_until_they_are_read_or_many(editor):
    editor.accept_blobs(blob("first"))
    assert editor.preprocess(EditorData(background=None, layers=[], composite=None, id="first"))["composite"]
    assert not editor.blob_storage
    for number in range(uploads.MAX_DRAWINGS + 3):
        editor.accept_blobs(blob(f"id {number}"))
    assert list(editor.blob_storage) == [f"id {number}" for number in range(3, uploads.MAX_DRAWINGS + 3)]


def test_a_drawing_that_cannot_be_read_is_not_kept(editor):
    editor.accept_blobs(blob("bad", content=b"no picture"))
    with pytest.raises(gr.Error, match="cannot be read"):
        editor.preprocess(EditorData(background=None, layers=[], composite=None, id="bad"))
    assert not editor.blob_storage


@pytest.mark.parametrize("index", ["1000000000", "-1", "8", "1e9"])
def test_layers_of_a_drawing_have_small_numbers(editor, index):
    with pytest.raises(gr.Error, match="is not kept"):
        editor.accept_blobs(blob("x", index=index, kind="layer"))
    assert not editor.blob_storage


def test_pictures_are_reduced_to_what_is_shown():
    large = Image.new("RGB", (3000, 1500))
    seen = events.read_image({"composite": large, "background": large, "layers": []})
    assert seen.size == (1024, 512)


def test_sessions_and_questions_are_bounded():
    built = app.build_app(type("Live", (), {"name": "x"})())
    assert built._queue.max_size == app.MAX_WAITING
    assert app.launch_options()["state_session_capacity"] == app.MAX_SESSIONS == 16
