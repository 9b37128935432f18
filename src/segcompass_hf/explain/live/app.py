# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The live page: a picture and an instruction to reasoning, masks and concepts that one can turn up and down."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr
from PIL import Image, ImageOps

from ...files import temporary_folder
from .events import (
    MAX_INSTRUCTION,
    NUM_SLIDERS,
    Session,
    answering,
    answering_example,
    answering_scene,
    drawable,
    following,
    hint,
    properties_of,
    resetting,
)
from .model import LiveModel
from .uploads import bound_uploads

MAX_UPLOAD = "20mb"
MAX_SESSIONS = 16  # answers kept, the oldest are dropped first
MAX_AGE = 3600  # seconds that an answer is kept
FILE_AGES = (300, MAX_AGE - 300)  # seconds: how often old files are looked for, and from which age they are removed
MAX_WAITING = 32  # questions in the queue, beyond which the page says that it is full
_FONTS = ("Inter", "system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
# On a phone, where the answer lies below what is asked.
_SHOW_ANSWER = """(...asked) => {
  if (innerWidth < 640) document.getElementById("answer").scrollIntoView({behavior: "smooth"});
  return asked;
}"""
_CSS = (Path(__file__).parents[1] / "templates" / "app.css").read_text("utf-8")


def build_app(
    live: LiveModel, scenes: bool = False, note: str = "", examples: Sequence[tuple[Image.Image, str]] = ()
) -> gr.Blocks:
    """Build the page. The first example is answered now, and is what every visitor finds there.

    Args:
        live ([`LiveModel`]): The model; shared by all visitors, each of whom sees only their own answer.
        scenes (`bool`, *optional*, defaults to `False`): Offer pictures and instructions of the Scenes data set.
        note (`str`, *optional*): What visitors should know of the model, as plain text.
        examples (`Sequence[tuple[PIL.Image.Image, str]]`, *optional*): Pictures and instructions to click, such as
            [`card_examples`]; without any the page opens without an answer.

    Returns:
        `gradio.Blocks`: launch it with `app.launch(**launch_options())`.
    """
    opening = Session(list(live.answer(*examples[0]))[-1]) if examples else None
    first = {} if opening is None else properties_of(opening)
    folder = temporary_folder("examples")
    with gr.Blocks(title="SegCompass", analytics_enabled=False, fill_width=True, delete_cache=FILE_AGES) as app:
        session = gr.State(None, time_to_live=MAX_AGE)
        is_opening = gr.Checkbox(opening is not None, visible=False)  # whether what is shown is the first example
        gr.HTML(_header(live.name, note), elem_id="header")
        with gr.Row(visible=bool(examples), elem_id="examples"):
            clicked = [
                gr.Button(text, icon=_thumbnail(image, folder.name, index), elem_id=f"example-{index}", min_width=200)
                for index, (image, text) in enumerate(examples)
            ]
        with gr.Row(elem_id="work"):
            with gr.Column(scale=5, min_width=300):
                picture = gr.ImageEditor(
                    drawable(examples[0][0]) if examples else None,
                    label="Picture",
                    type="pil",
                    image_mode="RGB",
                    sources=("upload", "clipboard"),
                    transforms=(),
                    layers=False,
                    brush=gr.Brush(default_size=12, colors=list(_PALETTE), default_color=next(iter(_PALETTE))),
                    canvas_size=(448, 448),
                    height=340,
                    placeholder="Upload, paste or draw a picture",
                    elem_id="picture",
                )
                bound_uploads(picture)
                instruction = gr.Textbox(
                    examples[0][1] if examples else None,
                    label="What to find",
                    placeholder="the mug that is easiest to reach",
                    max_length=MAX_INSTRUCTION,
                    elem_id="instruction",
                )
                with gr.Row(elem_id="actions"):
                    find = gr.Button("Find it", variant="primary", elem_id="find", min_width=120)
                    another = gr.Button("Another scene", visible=scenes, elem_id="another", min_width=120)
                thinking = gr.Radio(
                    [("At length", "full"), ("Briefly", "short"), ("Not at all", "none")],
                    value="full",
                    label="Think",
                    elem_id="thinking",
                )
            with gr.Column(scale=6, min_width=300, elem_id="answer"):
                reasoning = gr.Textbox(
                    label="Reasoning",
                    lines=2,
                    max_lines=10,
                    interactive=False,
                    elem_id="reasoning",
                    buttons=["copy"],
                    **first.get("reasoning", {}),
                )
                result = gr.Image(
                    label="Masks",
                    interactive=False,
                    format="png",
                    elem_id="result",
                    buttons=["download", "fullscreen"],
                    **first.get("result", {}),
                )
                summary = gr.HTML(
                    elem_id="summary",
                    **first.get("summary", {"value": hint("Masks and the concepts behind them appear here.")}),
                )
                with gr.Column(elem_id="concepts", **first.get("concepts", {"visible": False})) as concepts:
                    switches = gr.CheckboxGroup(
                        label="Concepts behind the masks: switch one off, and the masks follow",
                        elem_id="switches",
                        **first.get("switches", {}),
                    )
                    reset = gr.Button("All as they were", elem_id="reset", min_width=120)
                    with gr.Accordion("Turn concepts up or down", open=False, elem_id="sliders"):
                        sliders = [
                            gr.Slider(
                                0,
                                2,
                                step=0.1,
                                elem_id=f"concept-{index}",
                                min_width=240,
                                **first.get(f"slider_{index}", {"visible": False, "value": 1}),
                            )
                            for index in range(NUM_SLIDERS)
                        ]
        with gr.Column(elem_id="after", **first.get("concepts", {"visible": False})) as after:
            with gr.Accordion("The whole explanation", open=False, elem_id="whole"):
                report = gr.HTML(elem_id="report", **first.get("report", {}))
            download = gr.DownloadButton(
                "Download the explanation (HTML)", elem_id="download", min_width=120, **first.get("download", {})
            )

        steered = [switches, *sliders]
        shown = [session, is_opening, reasoning, result, summary, concepts, after, *steered, download, report]
        private = {"api_visibility": "private"}
        one_at_a_time = {"concurrency_limit": 1, "concurrency_id": "model", **private}
        asked = dict(fn=answering(live), inputs=[picture, instruction, thinking], outputs=shown, **one_at_a_time)
        find.click(**asked, trigger_mode="once", js=_SHOW_ANSWER)
        instruction.submit(**asked, trigger_mode="once", js=_SHOW_ANSWER)
        given = {
            "outputs": [picture, instruction, *shown],
            "trigger_mode": "once",
            "js": _SHOW_ANSWER,
            **one_at_a_time,
        }
        for button, example in zip(clicked, examples, strict=True):
            button.click(answering_example(live, *example), [thinking], **given)
        if scenes:
            another.click(answering_scene(live), [thinking], **given)
        of_answer = [session, is_opening]
        follow = dict(fn=following(opening), inputs=[*of_answer, *steered], outputs=[result, summary], **one_at_a_time)
        for control in steered:
            control.input(**follow, trigger_mode="always_last", show_progress="hidden")
        reset.click(resetting(opening), of_answer, [*steered, result, summary], **private)
    app.thumbnails = folder  # goes when the page does
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


def _header(name: str, note: str) -> str:
    shown = f"<p>{escape(note)}</p>" if note else ""
    kept = f"Pictures and answers are forgotten after {MAX_AGE // 60} minutes."
    about = f"Finds what words ask for, and shows why. {kept} Model: {escape(name)}"
    return f"<h1>SegCompass</h1><p>{about}</p>{shown}"


def _thumbnail(image: Image.Image, folder: str, index: int) -> str:
    """A small square of a picture, as a file."""
    path = Path(folder) / f"example_{index}.png"
    ImageOps.fit(image, (96, 96)).save(path)
    return str(path)
