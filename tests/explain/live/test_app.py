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

    def answer(self, image, instruction, reasoning="full"):
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

    pictures = [Image.new("RGB", (96, 72), colour) for colour in ("navy", "teal")]
    examples = list(zip(pictures, ("the first example", f"the second {INJECTED}"), strict=True))
    app = build_app(Live(), scenes=True, note=f"a note {INJECTED}", examples=examples)
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


def _summary(window):
    return window.find_element("id", "summary").text


def test_the_first_example_is_answered_when_the_page_opens(window, address):
    set_screen(window, 1200, 900)
    window.get(address)
    first = _seen(window, "#switches label")
    assert f"{INJECTED} (#0): +68 % of mask 1" in first.text
    assert "Mask 1 confidence 0.95" in _summary(window) and _picture_address(window)
    assert _value(window, "#reasoning textarea").endswith("the other is not.")
    assert _value(window, "#instruction textarea") == "the first example"

    first.click()  # off
    _until(window, lambda: "0.95 → 0.70" in _summary(window))
    _seen(window, "#switches label").click()  # and on
    _until(window, lambda: "Mask 1 confidence 0.95" in _summary(window))


def test_a_visit(window, address, tmp_path):
    set_screen(window, 1200, 900)
    window.get(address)
    _seen(window, "#switches label")
    GO_ON.clear()
    _click(window, "#example-1")
    _until(window, lambda: _value(window, "#reasoning textarea") == "candidates:")  # as it is written
    assert _value(window, "#instruction textarea") == f"the second {INJECTED}"
    assert not [one for one in window.find_elements("css selector", "#concepts") if one.is_displayed()]
    GO_ON.set()
    _seen(window, "#switches label")

    _click(window, "#another")
    _until(window, lambda: not _value(window, "#instruction textarea").startswith("the second"))
    _until(window, lambda: _value(window, "#reasoning textarea").endswith("the other is not."))
    _seen(window, "#switches label")
    box = _seen(window, "#instruction textarea")
    box.clear()
    box.send_keys("my own words")
    GO_ON.clear()
    _click(window, "#find")
    _until(window, lambda: _value(window, "#reasoning textarea") == "candidates:")
    GO_ON.set()
    _seen(window, "#switches label")
    _click(window, "#sliders button")
    first = _seen(window, "#concept-0")
    assert f"{INJECTED} (#0): +68 % of mask 1" in first.text
    assert len([one for one in window.find_elements("css selector", "#sliders input[type=range]")]) == 6
    assert "Mask 1 confidence 0.95" in _summary(window)
    before = _until(window, lambda: _picture_address(window))
    if folder := os.environ.get("SCREENSHOTS"):
        save_screenshot(window, Path(folder) / "live_page.png", whole=True)

    handle = first.find_element("css selector", "input[type=range]")
    handle.send_keys("\ue010\ue012")  # End, then one step to the left
    _until(window, lambda: "0.95 → 0.70" in _summary(window))
    assert _until(window, lambda: _picture_address(window) != before)
    _click(window, "#reset")
    _until(window, lambda: "Mask 1 confidence 0.95" in _summary(window))
    assert float(handle.get_attribute("value")) == 1.0

    options = {"behavior": "allow", "downloadPath": str(tmp_path)}
    window.execute_cdp_cmd("Browser.setDownloadBehavior", options)
    _click(window, "#download")
    file = _until(window, lambda: next(tmp_path.glob("*.html"), None))
    assert "my own words" in file.read_text("utf-8") and file.stem.startswith("segcompass-report")

    # Another visitor, in another tab, finds the first example, and nothing of the visit.
    mine = window.current_window_handle
    window.switch_to.new_window("tab")
    window.get(address)
    _seen(window, "#switches label")
    assert _value(window, "#instruction textarea") == "the first example"
    assert "my own words" not in window.page_source
    stored = "return localStorage.length + sessionStorage.length + document.cookie.length"
    assert window.execute_script(stored) == 0, "the page remembers nothing"
    window.close()
    window.switch_to.window(mine)

    assert window.title == "SegCompass"  # nothing that was injected ran
    assert window.find_elements("css selector", "img[src=x]") == []
    assert [one for one in requested_addresses(window) if not one.startswith(address)] == []
    assert [one for one in console_messages(window) if "SEVERE" in one or "Uncaught" in one] == []


def test_bad_input_and_phone(window, address, tmp_path):
    set_screen(window, 360, 740)
    window.get(address)
    _until(window, lambda: _value(window, "#instruction textarea"))
    box = _seen(window, "#instruction textarea")
    box.clear()
    box.send_keys("refused")
    _click(window, "#find")
    _until(window, lambda: f"the model refuses {INJECTED}" in window.find_element("css selector", "body").text)
    assert window.title == "SegCompass"
    assert window.execute_script("return document.documentElement.scrollWidth") <= 360
    assert window.execute_script("return scrollY") > 0, "it goes where the answer will be"
    if folder := os.environ.get("SCREENSHOTS"):
        save_screenshot(window, Path(folder) / "live_page_phone.png")


def test_strips_and_blank_drawings_get_a_clear_message():
    import gradio as gr

    from segcompass_hf.explain.live.events import read_image

    blank = Image.new("RGB", (8, 8), "white")
    for editor in (None, {"background": None, "layers": [blank], "composite": blank}):
        with pytest.raises(gr.Error, match="Upload, paste or draw a picture first"):
            read_image(editor)
    stroke = Image.fromarray(np.eye(8, dtype=np.uint8) * 255)
    assert read_image({"background": None, "layers": [stroke], "composite": stroke}).size == (8, 8)
    strip = Image.new("RGB", (2000, 2))
    with pytest.raises(gr.Error, match="sides may differ"):
        read_image({"background": strip, "layers": [], "composite": strip})


def test_two_visitors_get_their_own_answers():
    from segcompass_hf.explain.live.events import answering

    def visit(seed: int):
        image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (72, 96, 3), dtype=np.uint8))
        answer = answering(Live())
        last = list(answer({"background": image, "layers": [], "composite": image}, f"visit {seed}", "full"))[-1]
        return image, last[0]

    with ThreadPoolExecutor(2) as pool:
        visits = list(pool.map(visit, (1, 2)))
    for seed, (image, session) in zip((1, 2), visits, strict=True):
        assert (np.asarray(session.answer.explanation.image) == np.asarray(image)).all()
        assert f"visit {seed}" in session.page.read_text("utf-8")
    assert visits[0][1].page != visits[1][1].page


def test_a_page_without_examples_opens_without_an_answer():
    from segcompass_hf.explain.live.app import build_app
    from segcompass_hf.explain.live.events import NUM_SLIDERS, following, resetting

    build_app(Live())
    switched, said = following(None)(None, False, [], *[1.0] * NUM_SLIDERS)
    assert "no longer kept" in said and len(resetting(None)(None, False)) == NUM_SLIDERS + 3


def test_what_is_switched_off_and_what_is_turned_go_together():
    from segcompass_hf.explain.live.events import NUM_SLIDERS, Session, following

    (*_, answer) = Live().answer(Image.new("RGB", (96, 72)), "x")
    asked = []
    answer.change = lambda scales: asked.append(scales) or answer.explanation.masks[0].concepts[0].ablation
    features = [concept.feature for concept, _ in answer.shown]
    follow = following(Session(answer))
    scales = [1.0] * NUM_SLIDERS
    assert "Mask 1</b> confidence 0.95" in follow(None, True, features, *scales)[1] and asked == []
    scales[0], scales[1] = 0.5, 2.0
    follow(None, True, features[1:], *scales)
    assert asked == [{features[0]: 0.0, features[1]: 2.0}], "off is off, whatever its slider says"
