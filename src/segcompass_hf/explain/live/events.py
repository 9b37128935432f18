# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What the live page does when something is clicked: answers, shows them, and lets masks follow concepts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from ...files import temporary_folder
from ...images_segcompass import to_rgb_image
from .model import LiveAnswer, LiveModel

MAX_INSTRUCTION = 500  # characters
MAX_SIDE = 1024  # pixels; larger pictures are reduced, which bounds an answer's memory and shows all that is shown
NUM_SLIDERS = 6  # of the concepts, which can all be switched off


class Session:
    """What one visitor has before them: the answer, and the page of it."""

    def __init__(self, answer: LiveAnswer):
        self.answer = answer
        self._folder = temporary_folder("page")  # goes when the session does
        self.page = Path(self._folder.name) / "segcompass-report.html"
        answer.explanation.to_html(self.page)


def answering(live: LiveModel) -> Callable[[dict | None, str, str], Iterator[list[Any]]]:
    """The event of a question: picture, instruction and how much to think -> what `build_app` shows."""

    def answer(editor: dict | None, instruction: str, thinking: str) -> Iterator[list[Any]]:
        image = read_image(editor)
        if not instruction.strip():
            raise gr.Error("Say in words what to find.", print_exception=False)
        yield from _answers(live, image, instruction[:MAX_INSTRUCTION], thinking)

    return answer


def answering_example(live: LiveModel, image: Image.Image, instruction: str) -> Callable[[str], Iterator[list[Any]]]:
    """The event of an example of the page."""

    def answer(thinking: str) -> Iterator[list[Any]]:
        yield from _given(live, image, instruction, thinking)

    return answer


def answering_scene(live: LiveModel) -> Callable[[str], Iterator[list[Any]]]:
    """The event of a random scene."""

    from ...data import scenes

    def answer(thinking: str) -> Iterator[list[Any]]:
        scene = scenes.sample("val", int(np.random.default_rng().integers(100_000)))
        yield from _given(live, to_rgb_image(scene.image), scene.instruction.text, thinking)

    return answer


def _given(live: LiveModel, image: Image.Image, instruction: str, thinking: str) -> Iterator[list[Any]]:
    """A picture and an instruction of the page's own put in, and answered at once."""
    put_in = [drawable(image), instruction]
    for values in _answers(live, image, instruction, thinking):
        yield [*put_in, *values]
        put_in = [gr.skip(), gr.skip()]


def _answers(live: LiveModel, image: Image.Image, instruction: str, thinking: str) -> Iterator[list[Any]]:
    yield _update(None, reasoning={"value": ""}, summary={"value": hint("Reading the picture …")})
    try:
        for made in live.answer(image, instruction, thinking):
            if isinstance(made, str):
                yield _update(None, reasoning={"value": made}, summary={"value": hint("Thinking …")})
            else:
                session = Session(made)
                yield _update(session, **properties_of(session))
    except ValueError as error:
        raise gr.Error(escape(str(error)), print_exception=False) from error


def _update(session: Session | None, **properties: dict[str, Any]) -> list[Any]:
    """One value per output of an answer; what is not named stays, concepts are hidden until there is an answer."""
    sliders = [f"slider_{index}" for index in range(NUM_SLIDERS)]
    names = ["reasoning", "result", "summary", "concepts", "concepts", "switches", *sliders, "download", "report"]
    properties = {"concepts": {"visible": session is not None}, **properties}
    updates = [gr.update(**properties[name]) if name in properties else gr.skip() for name in names]
    return [session, False, *updates]


def properties_of(session: Session) -> dict[str, dict[str, Any]]:
    """What the components that show an answer are set to."""
    answer = session.answer
    labels = [_label(answer, concept, number) for concept, number in answer.shown]
    features = [concept.feature for concept, _ in answer.shown]
    sliders = {
        f"slider_{index}": {"visible": True, "label": labels[index], "value": 1}
        if index < len(labels)
        else {"visible": False, "label": "", "value": 1}
        for index in range(NUM_SLIDERS)
    }
    return {
        "reasoning": {"value": answer.explanation.reasoning},
        "result": {"value": answer.picture()},
        "summary": {"value": _found(answer)},
        "concepts": {"visible": True},
        "switches": {"choices": list(zip(labels, features, strict=True)), "value": features},
        "download": {"value": str(session.page)},
        "report": {"value": _framed(session.page.read_text("utf-8"))},
        **sliders,
    }


def following(opening: Session | None) -> Callable[..., tuple[Any, str]]:
    """The event of a switch or a slider: the masks as they become."""

    def follow(session: Session | None, is_opening: bool, on: list[int], *scales: float) -> tuple[Any, str]:
        session = opening if is_opening else session
        if session is None:
            return gr.skip(), hint("This answer is no longer kept; ask again.")
        answer = session.answer
        features = [concept.feature for concept, _ in answer.shown]
        changed = {feature: scale for feature, scale in zip(features, scales, strict=False) if scale != 1}
        changed |= dict.fromkeys(set(features) - set(on), 0.0)
        return _changed(answer, changed) if changed else (answer.picture(), _found(answer))

    return follow


def _changed(answer: LiveAnswer, scales: dict[int, float]) -> tuple[Image.Image, str]:
    after = answer.change(scales)
    lines = [
        f"<b>{escape(_mask_name(answer, number))}</b> IoU with the answer {iou:.2f}, confidence "
        f"{mask.score:.2f} → {mask.score + change:.2f}"
        for number, (mask, iou, change) in enumerate(
            zip(answer.explanation.masks, after.iou, after.score_change, strict=True)
        )
    ]
    return answer.picture(after.masks), "".join(f"<p>{line}</p>" for line in lines)


def resetting(opening: Session | None) -> Callable[[Session | None, bool], list[Any]]:
    """The event that brings all concepts back."""

    def reset(session: Session | None, is_opening: bool) -> list[Any]:
        session = opening if is_opening else session
        if session is None:
            return [gr.skip()] * (NUM_SLIDERS + 3)
        first = properties_of(session)
        sliders = [gr.update(value=1)] * NUM_SLIDERS
        return [gr.update(**first["switches"]), *sliders, first["result"]["value"], first["summary"]["value"]]

    return reset


def drawable(image: Image.Image) -> dict[str, Any]:
    """A picture as the editor takes it."""
    return {"background": image, "layers": [], "composite": image}


def read_image(editor: dict | None) -> Any:
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


def hint(text: str) -> str:
    return f'<p class="hint">{escape(text)}</p>'


def _framed(page: str) -> str:
    """A page inside the page; it may run its own script and reach nothing else."""
    return f'<iframe title="Explanation" sandbox="allow-scripts" srcdoc="{escape(page)}"></iframe>'
