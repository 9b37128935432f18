"""The live page in a real browser: reasoning streams, masks follow concepts, visitors do not see each other."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from browser import console_messages, open_browser, requested_addresses, save_screenshot, set_screen
from explanations import made_explanation
from PIL import Image

pytestmark = pytest.mark.slow
pytest.importorskip("gradio", reason="needs gradio: pip install 'segcompass_hf[explain]'")

INJECTED = "<img src=x onerror=\"document.title='taken'\">"
PATIENCE = 300  # seconds; a page of gradio takes its time on a busy machine
GO_ON = threading.Event()  # whether the model writes on
GO_ON.set()


class Live:
    """Stands for a model: writes slowly, and answers with an explanation made by hand."""

    name = "made-by-hand <b>"

    def answer(self, image, instruction, reasoning):
        from segcompass_hf.explain.live.model import LiveAnswer

        class Answer(LiveAnswer):
            def change(self, scales):
                assert set(scales) <= {concept.feature for concept, _ in self.shown}
                return self.explanation.masks[0].concepts[0].ablation

        if instruction == "refused":
            raise ValueError(f"the model refuses {INJECTED}")
        explanation = made_explanation(instruction=instruction, labels=(INJECTED,))
        explanation.image = image.resize(explanation.image.size)
        words = explanation.reasoning.split()
        for count in (1, len(words) // 2, len(words)):
            yield " ".join(words[:count])
            GO_ON.wait(PATIENCE)
        yield Answer(None, explanation, threading.Lock())


@pytest.fixture(scope="module")
def address():
    from segcompass_hf.explain.live.app import build_app, launch_options

    app = build_app(Live(), scenes=True, note=f"a note {INJECTED}")
    _, local, _ = app.launch(prevent_thread_lock=True, **launch_options())
    yield local
    app.close()


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def _until(window, condition):
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    # Gradio puts new elements in the place of old ones while the page is looked at.
    waiting = WebDriverWait(window, PATIENCE, ignored_exceptions=[StaleElementReferenceException])
    return waiting.until(lambda _: condition())


def _seen(window, selector):
    """The first element a visitor sees, waited for."""

    def visible():
        found = [one for one in window.find_elements("css selector", selector) if one.is_displayed()]
        return found[0] if found else None

    return _until(window, visible)


def _click(window, selector):
    """Click what a visitor sees, once nothing lies over it."""
    from selenium.common.exceptions import ElementClickInterceptedException

    def clicked():
        try:
            _seen(window, selector).click()
        except ElementClickInterceptedException:
            return False
        return True

    _until(window, clicked)


def _value(window, selector):
    return window.execute_script(f"return document.querySelector({selector!r})?.value ?? ''")


def _picture_address(window):
    found = window.find_elements("css selector", "#result img")
    return found[0].get_attribute("src") if found else None


def test_a_visit(window, address, tmp_path):
    set_screen(window, 1200, 900)
    window.get(address)
    _click(window, "#find")
    _until(window, lambda: "Upload, paste or draw a picture first." in window.page_source)

    _click(window, "#another")
    _until(window, lambda: _value(window, "#instruction textarea"))
    GO_ON.clear()
    _click(window, "#find")
    _until(window, lambda: _value(window, "#reasoning textarea") == "candidates:")  # as it is written
    GO_ON.set()
    first = _seen(window, "#concept-0")
    assert f"{INJECTED} (#0): +68 % of mask 1" in first.text
    assert len([one for one in window.find_elements("css selector", "#sliders input[type=range]")]) == 6
    assert _value(window, "#reasoning textarea").endswith("the other is not.")
    assert "Mask 1 confidence 0.95" in _seen(window, "#summary").text
    before = _until(window, lambda: _picture_address(window))
    if folder := os.environ.get("SCREENSHOTS"):
        save_screenshot(window, Path(folder) / "live_page.png", whole=True)

    handle = first.find_element("css selector", "input[type=range]")
    handle.send_keys("\ue010\ue012")  # End, then one step to the left
    _until(window, lambda: "0.95 → 0.70" in window.find_element("id", "summary").text)
    assert _until(window, lambda: _picture_address(window) != before)
    _click(window, "#reset")
    _until(window, lambda: "Mask 1 confidence 0.95" in window.find_element("id", "summary").text)
    assert float(handle.get_attribute("value")) == 1.0

    options = {"behavior": "allow", "downloadPath": str(tmp_path)}
    window.execute_cdp_cmd("Browser.setDownloadBehavior", options)
    _click(window, "#download")
    file = _until(window, lambda: next(tmp_path.glob("*.html"), None))
    assert file.read_text("utf-8").startswith("<!DOCTYPE html>") and file.stem.startswith("segcompass-report")

    # Another visitor, in another tab, starts with nothing and asks for something else.
    mine = window.current_window_handle
    window.switch_to.new_window("tab")
    window.get(address)
    _seen(window, "#find")
    assert not [one for one in window.find_elements("css selector", "#concepts") if one.is_displayed()]
    window.close()
    window.switch_to.window(mine)

    assert window.title == "SegCompass"  # nothing that was injected ran
    assert window.find_elements("css selector", "img[src=x]") == []
    assert [one for one in requested_addresses(window) if not one.startswith(address)] == []
    assert [one for one in console_messages(window) if "SEVERE" in one or "Uncaught" in one] == []


def test_bad_input_and_phone(window, address, tmp_path):
    set_screen(window, 360, 740)
    window.get(address)
    _click(window, "#another")
    _until(window, lambda: _value(window, "#instruction textarea"))
    box = _seen(window, "#instruction textarea")
    box.clear()
    box.send_keys("refused")
    _click(window, "#find")
    _until(window, lambda: f"the model refuses {INJECTED}" in window.find_element("css selector", "body").text)
    assert window.title == "SegCompass"
    assert window.execute_script("return document.documentElement.scrollWidth") <= 360
    if folder := os.environ.get("SCREENSHOTS"):
        save_screenshot(window, Path(folder) / "live_page_phone.png")


def test_strips_and_blank_drawings_get_a_clear_message():
    import gradio as gr

    from segcompass_hf.explain.live import app

    blank = Image.new("RGB", (8, 8), "white")
    for editor in (None, {"background": None, "layers": [blank], "composite": blank}):
        with pytest.raises(gr.Error, match="Upload, paste or draw a picture first"):
            app._image(editor)
    stroke = Image.fromarray(np.eye(8, dtype=np.uint8) * 255)
    assert app._image({"background": None, "layers": [stroke], "composite": stroke}).size == (8, 8)
    strip = Image.new("RGB", (2000, 2))
    with pytest.raises(gr.Error, match="sides may differ"):
        app._image({"background": strip, "layers": [], "composite": strip})


def test_two_visitors_get_their_own_answers():
    from segcompass_hf.explain.live import app

    def visit(seed: int):
        image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (72, 96, 3), dtype=np.uint8))
        answering = app._answering(Live())
        last = list(answering({"background": image, "layers": [], "composite": image}, f"visit {seed}", "full"))[-1]
        return image, last[0]

    with ThreadPoolExecutor(2) as pool:
        visits = list(pool.map(visit, (1, 2)))
    for seed, (image, session) in zip((1, 2), visits, strict=True):
        assert (np.asarray(session.answer.explanation.image) == np.asarray(image)).all()
        assert f"visit {seed}" in session.page.read_text("utf-8")
    assert visits[0][1].page != visits[1][1].page
