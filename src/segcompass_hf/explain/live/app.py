# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The live page: a picture and an instruction to reasoning, masks and concepts that one can turn up and down."""

from __future__ import annotations

import os
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr
import numpy as np
from PIL import Image

from ...files import temporary_folder
from ...images_segcompass import to_rgb_image
from .model import NUM_SHOWN, LiveAnswer, LiveModel
from .uploads import bound_uploads

MAX_INSTRUCTION = 500  # characters
MAX_UPLOAD = "20mb"
MAX_SESSIONS = 16  # answers kept, the oldest are dropped first
MAX_SIDE = 1024  # pixels; larger pictures are reduced, which bounds an answer's memory and shows all that is shown
MAX_WAITING = 32  # questions in the queue, beyond which the page says that it is full
_FONTS = ("Inter", "system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
_CSS = (Path(__file__).parents[1] / "templates" / "app.css").read_text("utf-8")


class Session:
    """What one visitor has before them: the answer, and the page of it."""

    def __init__(self, answer: LiveAnswer):
        self.answer = answer
        self._folder = temporary_folder("page")  # goes when the session does
        self.page = Path(self._folder.name) / "segcompass-report.html"
        answer.explanation.to_html(self.page)


def build_app(live: LiveModel, scenes: bool = False, note: str = "") -> gr.Blocks:
    """Build the page.

    Args:
        live ([`LiveModel`]): The model; shared by all visitors, each of whom sees only their own answer.
        scenes (`bool`, *optional*, defaults to `False`): Offer pictures and instructions of the Scenes data set.
        note (`str`, *optional*): What visitors should know of the model, as plain text.

    Returns:
        `gradio.Blocks`: launch it with `app.launch(**launch_options())`.
    """
    with gr.Blocks(title="SegCompass", analytics_enabled=False, fill_width=True, delete_cache=(3600, 7200)) as app:
        session = gr.State(None, time_to_live=3600)
        gr.HTML(_header(live.name, note), elem_id="header")
        with gr.Row(elem_id="work"):
            with gr.Column(scale=5, min_width=300):
                picture = gr.ImageEditor(
                    label="Picture: upload, paste or draw",
                    type="pil",
                    image_mode="RGB",
                    sources=("upload", "clipboard"),
                    transforms=(),
                    layers=False,
                    brush=gr.Brush(default_size=12, colors=list(_PALETTE), default_color=next(iter(_PALETTE))),
                    canvas_size=(448, 448),
                    height=420,
                    elem_id="picture",
                )
                bound_uploads(picture)
                instruction = gr.Textbox(
                    label="What to find",
                    placeholder=_example(scenes),
                    max_length=MAX_INSTRUCTION,
                    elem_id="instruction",
                )
                with gr.Row(elem_id="actions"):
                    find = gr.Button("Find it", variant="primary", elem_id="find", min_width=120)
                    another = gr.Button("Another scene", visible=scenes, elem_id="another", min_width=120)
                thinking = gr.Radio(
                    [("Think", "full"), ("Think briefly", "short"), ("Do not think", "none")],
                    value="full",
                    label="Reasoning",
                    elem_id="thinking",
                )
            with gr.Column(scale=6, min_width=300):
                reasoning = gr.Textbox(
                    label="Reasoning", lines=4, max_lines=10, interactive=False, elem_id="reasoning", buttons=["copy"]
                )
                result = gr.Image(
                    label="Masks",
                    interactive=False,
                    format="png",
                    elem_id="result",
                    buttons=["download", "fullscreen"],
                )
                summary = gr.HTML(_hint("Masks and the concepts behind them appear here."), elem_id="summary")
        with gr.Column(visible=False, elem_id="concepts") as concepts:
            gr.HTML("<h2>Turn concepts down or up, and the masks follow</h2>")
            with gr.Row(elem_id="sliders"):
                sliders = [
                    gr.Slider(0, 2, 1, step=0.1, visible=False, elem_id=f"concept-{index}", min_width=320)
                    for index in range(NUM_SHOWN)
                ]
            with gr.Row(elem_id="after"):
                reset = gr.Button("All back to 1", elem_id="reset", min_width=120)
                download = gr.DownloadButton("Download the report (HTML)", elem_id="download", min_width=120)
            with gr.Accordion("The whole explanation", open=False, elem_id="whole"):
                report = gr.HTML(elem_id="report")

        shown = [session, reasoning, result, summary, concepts, *sliders, download, report]
        one_at_a_time = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
        asked = dict(fn=_answering(live), inputs=[picture, instruction, thinking], outputs=shown, **one_at_a_time)
        find.click(**asked, trigger_mode="once")
        instruction.submit(**asked, trigger_mode="once")
        follow = dict(fn=_follow, inputs=[session, *sliders], outputs=[result, summary], **one_at_a_time)
        for slider in sliders:
            slider.input(**follow, trigger_mode="always_last", show_progress="hidden")
        reset.click(_reset, [session], [*sliders, result, summary], api_visibility="private")
        if scenes:
            another.click(_another_scene, None, [picture, instruction], api_visibility="private")
    return app.queue(max_size=MAX_WAITING)


def launch_options() -> dict[str, Any]:
    """Arguments of `launch` that the page relies on: its looks, no network, bounded uploads and memory."""
    fonts = dict(font=list(_FONTS), font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"])
    return {
        "theme": gr.themes.Base(primary_hue="slate", neutral_hue="slate", **fonts),
        "css": _CSS,
        "ssr_mode": False,
        "max_file_size": MAX_UPLOAD,
        "state_session_capacity": MAX_SESSIONS,
        "footer_links": [],
        "show_error": True,
        "quiet": True,
    }


_PALETTE = {
    "#c9302c": "red",
    "#2f9e44": "green",
    "#3b6fd4": "blue",
    "#e0b000": "yellow",
    "#8e44ad": "purple",
    "#1aa5a5": "cyan",
}


def _answering(live: LiveModel) -> Any:
    def answer(editor: dict | None, instruction: str, thinking: str) -> Iterator[dict]:
        image = _image(editor)
        if not instruction.strip():
            raise gr.Error("Say in words what to find.", print_exception=False)
        yield _update(None, reasoning="", summary=_hint("Reading the picture …"))
        try:
            for made in live.answer(image, instruction[:MAX_INSTRUCTION], thinking):
                if isinstance(made, str):
                    yield _update(None, reasoning=made, summary=_hint("Thinking …"))
                else:
                    yield _shown(Session(made))
        except ValueError as error:
            raise gr.Error(escape(str(error)), print_exception=False) from error

    return answer


def _update(session: Session | None, **values: Any) -> list[Any]:
    """One value per output of an answer; what is not named stays, concepts are hidden until there is an answer."""
    sliders = [f"slider_{index}" for index in range(NUM_SHOWN)]
    names = ["session", "reasoning", "result", "summary", "concepts", *sliders, "download", "report"]
    values = {"session": session, "concepts": gr.update(visible=session is not None), **values}
    return [values.get(name, gr.skip()) for name in names]


def _shown(session: Session) -> list[Any]:
    answer = session.answer
    labels = [_label(answer, concept, number) for concept, number in answer.shown]
    sliders = {
        f"slider_{index}": gr.update(
            visible=index < len(labels), label=labels[index] if index < len(labels) else "", value=1
        )
        for index in range(NUM_SHOWN)
    }
    return _update(
        session,
        reasoning=answer.explanation.reasoning,
        result=answer.picture(),
        summary=_found(answer),
        download=str(session.page),
        report=_framed(session.page.read_text("utf-8")),
        **sliders,
    )


def _follow(session: Session | None, *scales: float) -> tuple[Any, str]:
    if session is None:
        return gr.skip(), _hint("This answer is no longer kept; ask again.")
    answer = session.answer
    changed = {concept.feature: scale for (concept, _), scale in zip(answer.shown, scales, strict=False) if scale != 1}
    if not changed:
        return answer.picture(), _found(answer)
    after = answer.change(changed)
    lines = [
        f"<b>{escape(_mask_name(answer, number))}</b> IoU with the answer {iou:.2f}, confidence "
        f"{mask.score:.2f} → {mask.score + change:.2f}"
        for number, (mask, iou, change) in enumerate(
            zip(answer.explanation.masks, after.iou, after.score_change, strict=True)
        )
    ]
    return answer.picture(after.masks), "".join(f"<p>{line}</p>" for line in lines)


def _reset(session: Session | None) -> list[Any]:
    sliders = [gr.update(value=1)] * NUM_SHOWN
    return [
        *sliders,
        *((gr.skip(), gr.skip()) if session is None else (session.answer.picture(), _found(session.answer))),
    ]


def _example(scenes: bool) -> str:
    """An instruction that shows what may be asked."""
    if not scenes:
        return "the mug that is easiest to reach"
    from ...data.scenes import sample

    return sample("val", 5).instruction.text


def _another_scene() -> tuple[dict[str, Any], str]:
    from ...data import scenes

    scene = scenes.sample("val", int(np.random.default_rng().integers(100_000)))
    return {"background": scene.image, "layers": [], "composite": scene.image}, scene.instruction.text


def _image(editor: dict | None) -> Any:
    """What was drawn or uploaded.

    Raises:
        gradio.Error: Nothing was, or it cannot be used.
    """
    picture = None if editor is None else editor.get("composite")
    if picture is None or (editor.get("background") is None and not any(_drawn(layer) for layer in editor["layers"])):
        raise gr.Error("Upload, paste or draw a picture first.", print_exception=False)
    try:
        image = to_rgb_image(picture)
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        return image
    except ValueError as error:
        raise gr.Error(escape(str(error)), print_exception=False) from error


def _drawn(layer: Any) -> bool:
    pixels = np.asarray(layer)
    return bool((pixels != pixels[:1, :1]).any())


def _mask_name(answer: LiveAnswer, number: int) -> str:
    return f"Mask {number + 1}" if answer.explanation.masks[number].kept else "Strongest slot"


def _label(answer: LiveAnswer, concept: Any, number: int) -> str:
    name = f"{concept.label} (#{concept.feature})" if concept.label else f"Concept {concept.feature}"
    mask = _mask_name(answer, number).lower()
    if answer.explanation.masks[number].in_shares:
        return f"{name}: {100 * concept.share:+.0f} % of {mask}"
    return f"{name}: {concept.contribution:+.2f} to {mask}"


def _found(answer: LiveAnswer) -> str:
    masks = [mask for mask in answer.explanation.masks if mask.kept]
    lines = [f"<b>Mask {number + 1}</b> confidence {mask.score:.2f}" for number, mask in enumerate(masks)]
    if not masks:
        best = max(answer.explanation.slot_scores, default=0.0)
        lines.append(f"<b>No object found.</b> The strongest slot's confidence is {best:.2f}.")
    lines += [] if answer.note is None else [escape(answer.note)]
    return "".join(f"<p>{line}</p>" for line in lines)


def _hint(text: str) -> str:
    return f'<p class="hint">{escape(text)}</p>'


def _header(name: str, note: str) -> str:
    shown = f"<p>{escape(note)}</p>" if note else ""
    return f"<h1>SegCompass</h1><p>Finds what words ask for, and shows why. Model: {escape(name)}</p>{shown}"


def _framed(page: str) -> str:
    """A page inside the page; it may run its own script and reach nothing else."""
    return f'<iframe title="Explanation" sandbox="allow-scripts" srcdoc="{escape(page)}"></iframe>'
