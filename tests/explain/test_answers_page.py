"""Several answers on one page: what it shows, and that words stay words."""

import re

from explanations import made_explanation

from segcompass_hf.explain.answers_page import NUM_CONCEPTS, ShownAnswer, answers_page

INJECTED = "<script>document.title='taken'</script>"


def test_pictures_reasoning_and_the_largest_concepts_of_every_mask():
    """Shares are 0.68, 0.34, -0.17, ... of each mask."""
    explanation = made_explanation(num_masks=2, num_concepts=12, labels=("red",))
    page = answers_page(
        "Answers", [("About them.", [ShownAnswer(explanation, notes=["A note."], address="why.html")])]
    )
    assert page.count("data:image/jpeg;base64,") == 2 and "<figcaption>2 masks</figcaption>" in page
    assert explanation.reasoning in page and "About them." in page and "A note." in page
    assert 'href="why.html"' in page and page.count("<h3>") == 2 and page.count("<tr>") == 2 * NUM_CONCEPTS
    rows = re.findall(r'<tr><th>(.*?)</th>.*?class="(.*?)">.*?width="(\d+)".*?<td>(.*?)</td></tr>', page)
    assert rows[0] == ("red", "for", "100", "+68 %")
    assert rows[1][1:] == ("for", "50", "+34 %") and rows[2][1:] == ("against", "25", "-17 %")


def test_cells_of_the_grid_are_named_along_the_picture_alone():
    page = answers_page("A", [("", [ShownAnswer(made_explanation(), grid=3)])])
    assert re.findall(r"<text [^>]*>(.)</text>", page) == ["a", "1", "b", "2", "c", "3"]


def test_words_of_users_and_models_stay_words():
    explanation = made_explanation(instruction=INJECTED, labels=(INJECTED,))
    explanation.reasoning = INJECTED
    page = answers_page(INJECTED, [(INJECTED, [ShownAnswer(explanation, notes=[INJECTED])])])
    assert "<script" not in page and page.count("&lt;script&gt;") == 8
    assert "default-src &#x27;none&#x27;" in page
