"""The page of an explanation in a real browser: it loads nothing, every control does what it says, text stays text."""

import pytest
from browser import console_messages, open_browser, requested_addresses, set_screen
from explanations import INSTRUCTION, REASONING, made_explanation

from segcompass_hf.explain.report.page import to_html

INJECTED = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"> & </textarea>"

# With every mask and its first concept chosen, of every element that shows text itself: contrast (WCAG 2) of its
# colour with what is painted behind it.
CONTRASTS = """
const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
const paint = (...colours) => {
  canvas.clearRect(0, 0, 1, 1);
  for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const light = (rgb) => rgb.map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const found = [];
for (const tab of document.querySelectorAll("[role=tab]")) {
tab.click();
document.querySelector("#list button").click();
for (const one of document.querySelectorAll("body *")) {
  const shows = [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  if (!shows || !one.checkVisibility() || one.closest("script, style, .unseen, :disabled")) continue;
  const behind = [];
  for (let up = one; up; up = up.parentElement) behind.unshift(getComputedStyle(up).backgroundColor);
  const under = paint(...behind);
  const [a, b] = [light(under), light(paint(...behind, getComputedStyle(one).color))].sort((x, y) => y - x);
  found.push([Math.round(100 * (a + 0.05) / (b + 0.05)) / 100, one.textContent.slice(0, 40)]);
}
}
return found;
"""


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def _open(window, explanation, tmp_path, width=1200, height=900, dark=False):
    path = to_html(explanation, tmp_path / "report.html")
    set_screen(window, width, height, dark)
    window.get(path.as_uri())
    assert console_messages(window) == []
    assert requested_addresses(window) == [path.as_uri()]


def _all(window, selector):
    return window.find_elements("css selector", selector)


def _texts(window, selector):
    return [one.text for one in _all(window, selector)]


def _press(window, *keys):
    for key in keys:
        window.switch_to.active_element.send_keys(key)


def _tinted(window, passage):
    return _texts(window, f".{passage} mark")


def test_where_shares_say_nothing_contributions_are_shown(window, tmp_path):
    explanation = made_explanation()
    mask = explanation.masks[0]
    mask.baseline_value, mask.quadrature_error = 2.4, 0.25  # of a value of 2.5
    for concept in mask.concepts:
        concept.share = concept.contribution / 0.1
    _open(window, explanation, tmp_path)
    # Contributions are 4 times 1, 1/2, -1/4, 1/8, ... over their sum 1.47.
    assert [text.split()[0] for text in _texts(window, "#list .share")[:3]] == ["+2.73", "+1.36", "−0.68"]
    account = window.find_element("css selector", ".account").text
    assert "contributions are in logits" in account and "25.0 % was not found by gradients" in account


def test_what_was_measured_is_told_from_what_is_shared_out(window, tmp_path):
    explanation = made_explanation()
    mask = explanation.masks[0]
    mask.quadrature_error = 0.125
    for concept in mask.concepts[:2]:
        concept.measured = True
    _open(window, explanation, tmp_path)
    account = window.find_element("css selector", ".account").text
    assert "2 listed concepts were measured alone" in account
    assert "the others were measured together and share that out by gradients, in size 12.5 % of the change" in account
    clues = _texts(window, "#list small")
    assert ["shared out" in clue for clue in clues[:4]] == [False, False, True, True]
    _all(window, "#list button")[0].click()
    assert "this concept alone came and went" in window.find_element("css selector", "#about-0").text
    _all(window, "#list button")[2].click()
    assert "measured of many concepts together" in window.find_element("css selector", "#about-2").text


def test_choosing_a_concept_tints_words_lights_patches_and_takes_it_away(window, tmp_path):
    _open(window, made_explanation(), tmp_path)
    assert _texts(window, "h1") == ["the red circle left of the green square"]
    assert "2 objects found" in window.find_element("css selector", ".meta").text
    assert _all(window, "mark") == [] and _all(window, ".lit") == []
    assert _texts(window, ".reasoning p")[0].startswith("candidates: red circle at b2, red circle at g2.\nthe one")

    buttons = _all(window, "#list button")
    # Shares are 1, 1/2, -1/4, 1/8, ... over their sum 1.47.
    assert [text.split(" %")[0] for text in _texts(window, "#list .share")[:3]] == ["+68", "+34", "−17"]
    assert "shares add up to" in window.find_element("css selector", ".account").text
    whole = window.find_element("css selector", "#picture .now").get_attribute("d")
    buttons[0].click()
    # Feature 0 fires on word 1 of the instruction (activation 2) and of the reasoning (1), and on two patches.
    assert _tinted(window, "question") == ["red"] and _tinted(window, "reasoning") == ["red"]
    levels = "return [...document.querySelectorAll('mark')].map((one) => +one.style.getPropertyValue('--level'))"
    assert window.execute_script(levels) == [1.0, 0.5]
    assert [(int(r.get_attribute("x")), int(r.get_attribute("y"))) for r in _all(window, "rect.lit")] == [
        (12, 12),  # image token 9 of rows of 8
        (36, 12),  # image token 11
    ]
    without = window.find_element("css selector", "#picture .ghost").get_attribute("d")
    assert without and without != whole
    about = window.find_element("css selector", ".about:not([hidden])").text
    assert "“red” · 2 patches" in about and "0.95 → 0.70" in about and "Mask 2: IoU 1.00" in about
    assert f"IoU {made_explanation().masks[0].concepts[0].ablation.iou[0]:.2f}" in about
    assert len(_all(window, ".about:not([hidden]) .miniature")) == 2

    _all(window, "#list button")[5].click()  # one that was not taken away
    assert _all(window, "#picture .ghost") == []
    assert "Not taken away" in window.find_element("css selector", ".about:not([hidden])").text
    _all(window, "#list button")[5].click()
    assert _all(window, "mark") == []


def test_layers_and_masks(window, tmp_path):
    _open(window, made_explanation(num_masks=3), tmp_path)
    assert _all(window, "#picture img.heat") == []
    window.find_element("css selector", "[data-layer=heat]").click()
    heat = window.find_element("css selector", "#picture img.heat").get_attribute("src")
    assert window.switch_to.active_element.get_attribute("aria-pressed") == "true"
    tabs = _all(window, "[role=tab]")
    assert [tab.text.split("\n")[0] for tab in tabs] == ["Mask 1", "Mask 2", "Mask 3"]
    tabs[2].click()
    assert window.find_element("css selector", "#picture img.heat").get_attribute("src") != heat
    assert _texts(window, "#concepts h2") == ["Concepts behind mask 3"]
    assert _all(window, "#list button")[0].get_attribute("data-concept") == "200"
    window.find_element("css selector", "[data-layer=masks]").click()
    assert _all(window, "#picture .shape") == []


def test_everything_is_reached_with_the_keyboard(window, tmp_path):
    _open(window, made_explanation(), tmp_path)
    up, down, right, tab, enter, escape, end = "\ue013", "\ue015", "\ue014", "\ue004", "\ue007", "\ue00c", "\ue010"
    _press(window, tab)
    assert window.switch_to.active_element.text == "Skip to the concepts"
    seen = []
    for _ in range(12):
        _press(window, tab)
        active = window.switch_to.active_element
        outline = active.value_of_css_property("outline-style")
        seen.append((active.get_attribute("id") or active.text.split("\n")[0], outline))
        if active.get_attribute("data-concept"):
            break
    assert [name for name, _ in seen] == ["Masks", "Heatmap", "mask-0", "search", "1"]  # disabled layers are left out
    assert {style for _, style in seen} == {"solid"}  # the focus can be seen
    _press(window, enter)
    assert _tinted(window, "question") == ["red"]
    _press(window, down)
    assert _tinted(window, "question") == ["circle"]
    assert window.switch_to.active_element.get_attribute("data-concept") == "1"
    told = window.find_element("id", "status").get_attribute("textContent")
    assert told.startswith("circle fired on 2 words, 2 patches. Share +34 %. Without it: IoU 0.2")
    _press(window, up, up)  # stays at the first
    assert window.switch_to.active_element.get_attribute("aria-expanded") == "true"
    _press(window, end)
    assert window.switch_to.active_element.get_attribute("data-concept") == "11"
    _press(window, escape)
    assert _all(window, "mark") == []
    window.find_element("id", "mask-0").send_keys(right)
    assert window.switch_to.active_element.get_attribute("id") == "mask-1"
    assert _texts(window, "#concepts h2") == ["Concepts behind mask 2"]


def test_injected_markup_is_shown_as_text(window, tmp_path):
    explanation = made_explanation(instruction=INJECTED, reasoning=INJECTED, labels=(INJECTED, "\u202eevil"))
    explanation.model_name = INJECTED
    explanation.masks[0].concepts[0].ablation.reasoning = INJECTED
    _open(window, explanation, tmp_path)
    _all(window, "#list button")[0].click()
    assert window.title.startswith("Why: <script>") and len(_all(window, "script")) == 2
    assert _texts(window, "h1") == [INJECTED] and _texts(window, ".question p") == [INJECTED]
    assert _texts(window, "bdi")[0] == INJECTED
    assert INJECTED in window.find_element("css selector", ".about:not([hidden])").text
    assert _all(window, "img[src=x]") == [] and _all(window, "textarea") == []
    # A script that gets in all the same is refused by the page's own policy.
    window.execute_script(
        "const s = document.createElement('script'); s.textContent = 'document.title = 1'; document.body.append(s);"
        "const i = new Image(); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(i);"
    )
    assert window.title.startswith("Why: <script>")
    requested_addresses(window)  # the log names refused ones too
    refused = console_messages(window)
    assert len(refused) == 2 and all("Content Security Policy" in message for message in refused)


def test_phone(window, tmp_path):
    long = " ".join(f"candidate{i} at {'c' * 30}{i}," for i in range(120))
    explanation = made_explanation(num_masks=4, instruction="x" * 300, reasoning=long, labels=("y" * 200,))
    _open(window, explanation, tmp_path, width=360, height=740)
    for concept in (0, 3):
        _all(window, "#list button")[concept].click()
        assert window.execute_script("return document.documentElement.scrollWidth") == 360
    # The picture stays in sight of the concept that is chosen.
    top, bottom = window.execute_script(
        "const r = document.getElementById('picture').getBoundingClientRect(); return [r.top, r.bottom]"
    )
    assert 0 <= top < bottom <= 740 / 2
    assert window.switch_to.active_element.rect["y"] >= 0
    small = window.execute_script(
        "return [...document.querySelectorAll('button')].filter((b) => b.checkVisibility())"
        ".map((b) => b.getBoundingClientRect()).filter((r) => r.height < 24 || r.width < 24).length"
    )
    assert small == 0  # targets a finger can hit


@pytest.mark.parametrize("dark", [False, True])
def test_contrast(window, tmp_path, dark):
    explanation = made_explanation(num_masks=4)
    _open(window, explanation, tmp_path, dark=dark)
    paper = window.find_element("css selector", "body").value_of_css_property("background-color")
    assert ("20, 22, 27" in paper) == dark
    contrasts = window.execute_script(CONTRASTS)
    assert len(contrasts) > 200 and [entry for entry in contrasts if entry[0] < 4.5] == []


def test_many_concepts_are_filtered(window, tmp_path):
    _open(window, made_explanation(num_masks=1, num_concepts=60, labels=("red", None)), tmp_path)
    visible = "#list li:not([hidden]) > button"
    assert len(_all(window, visible)) == 15
    search = window.find_element("id", "search")
    search.send_keys("red")
    # Concept c fires on word c + 1 of the instruction and of the reasoning, from the start again after the last.
    question, reasoning = INSTRUCTION.split(), REASONING.split()
    fired = {c for c in range(60) if "red" in (question[(c + 1) % 8], reasoning[(c + 1) % len(reasoning)])}
    assert {int(b.get_attribute("data-concept")) for b in _all(window, visible)} == fired
    search.clear()
    search.send_keys("#59")
    assert [b.get_attribute("data-concept") for b in _all(window, visible)] == ["59"]
    search.send_keys("nothing")
    assert window.find_element("id", "empty").is_displayed()
    search.clear()
    search.send_keys("x\ue003")  # and deleted again: the first ones, as before
    window.find_element("id", "more").click()
    assert len(_all(window, visible)) == 60 and not window.find_element("id", "more").is_displayed()
    assert window.switch_to.active_element.get_attribute("data-concept") == "15"


def test_no_object(window, tmp_path):
    explanation = made_explanation(num_masks=1, kept=False)
    explanation.masks[0].target = "slot_logit"
    _open(window, explanation, tmp_path)
    assert "No object found" in window.find_element("css selector", ".meta").text
    assert _texts(window, "#concepts h2") == ["Why no object: the strongest slot"]
    assert [text.split("\n")[-1] for text in _texts(window, "#slots li")] == ["0.20", "0.16", "0.12", "0.08"]
    _all(window, "#list button")[0].click()
    assert _tinted(window, "question") == ["red"]

    _open(window, made_explanation(num_masks=0, reasoning=""), tmp_path)
    assert _texts(window, "#concepts h2") == ["No concepts to show"]
    assert _texts(window, ".reasoning p") == ["(nothing written)"]
    assert _all(window, "#layers button:enabled") == []
