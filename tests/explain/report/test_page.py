"""The page of an explanation without a browser: what it holds, how large it may be, how it is written."""

import base64
import hashlib
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from explanations import made_explanation
from PIL import Image

from segcompass_hf.explain.explanation import Token
from segcompass_hf.explain.report.page import to_html, to_page
from segcompass_hf.explain.report.payload import MaskPool, _shrink_mask, payload, spell


def _data(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_page_holds_its_data_and_a_policy_that_fits_its_own_script():
    page = to_page(made_explanation())
    assert _data(page) == json.loads(json.dumps(payload(made_explanation())))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1].replace("&#x27;", "'")
    inline = re.findall(r"<(?:style|script)>(.*?)</(?:style|script)>", page, re.S)
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inline]
    assert policy.startswith("default-src 'none'; img-src data:;") and len(inline) == 2
    assert all(f"'sha256-{one}'" in policy for one in hashes) and "unsafe" not in policy
    assert not re.search(r"(src|href)=\"(?!data:|#)", page) and "url(http" not in page


@pytest.mark.parametrize(
    "text", ["</script><b>", "<!-- <script>", "{{DATA}} \\1 & \"'", "\ud83d half \x00 \u2028 \u202e"]
)
def test_any_text_survives_without_ending_its_element(tmp_path, text):
    page = to_html(made_explanation(instruction=text, labels=(text,)), tmp_path / "a.html").read_text("utf-8")
    assert page.count("</script>") == 2 and page.count("<b>") == 0
    data = _data(page)
    assert data["masks"][0]["concepts"][0]["label"] == text
    assert "".join(gap + word for gap, _, word in data["words"]["question"]) == text


def test_sizes_are_bounded(tmp_path):
    explanation = made_explanation(num_masks=2, num_concepts=2, num_ablations=2, cells=(90, 75))  # 1080 x 900
    noise = np.random.default_rng(0).integers(0, 256, (900, 1080, 3), dtype=np.uint8)
    explanation.image = Image.fromarray(noise)
    shown = payload(explanation)
    address = shown["image"].pop("src")
    assert address.startswith("data:image/jpeg;base64,") and len(address) < 1.5e6  # noise is the worst there is
    assert shown["image"] == {"width": 1080, "height": 900}
    assert {tuple(rle["size"]) for rle in shown["pool"]} == {(427, 512)}  # 900 * 512 / 1080 = 426.7
    assert sum(len(json.dumps(rle)) for rle in shown["pool"]) < 40_000
    # Two masks; of the ablations of each one shrunk shape, and the other mask as it was.
    assert len(shown["pool"]) == 4


def test_places_that_are_not_known_are_said_so():
    explanation = made_explanation()
    assert payload(explanation)["placesNote"] is None
    explanation.tokens = [replace(token, patch=None) for token in explanation.tokens]
    shown = payload(explanation)
    assert shown["placesNote"] == "place in the picture not known for this family's tiles"
    assert shown["patches"] == {} and shown["kinds"]["image"] == len(shown["imageTokens"]) == 48


def test_tokens_beyond_the_bound_are_counted(monkeypatch):
    monkeypatch.setattr("segcompass_hf.explain.report.payload.MAX_TOKENS_PER_CONCEPT", 2)
    concept = made_explanation().masks[0].concepts[0]
    shown = payload(made_explanation())["masks"][0]["concepts"][0]
    assert shown["numTokens"] == 4
    largest = sorted(concept.tokens, key=lambda token: -abs(token.contribution))[:2]
    assert [at for at, *_ in shown["tokens"]] == [token.position for token in largest]


def test_shares_are_shown_where_they_say_something():
    """A share of 300 % means that others take most of it away; of a change downwards all shares are upside down."""
    mask = made_explanation().masks[0]
    assert mask.in_shares and payload(made_explanation())["masks"][0]["inShares"]
    mask.concepts[0].share = 3.0
    assert not mask.in_shares
    mask.concepts[0].share = 0.5
    mask.value, mask.baseline_value = mask.baseline_value, mask.value
    assert not mask.in_shares


def test_numbers_that_are_not_finite_are_null():
    explanation = made_explanation()
    explanation.masks[0].completeness_error = float("nan")
    explanation.masks[0].concepts[0].share = float("inf")
    mask = _data(to_page(explanation))["masks"][0]
    assert mask["error"] is None and mask["concepts"][0]["share"] is None


def test_small_mask_does_not_vanish_and_equal_masks_are_kept_once():
    mask = np.zeros((2048, 1024), dtype=bool)
    mask[7, 9] = True
    assert _shrink_mask(mask).sum() == 1 and _shrink_mask(mask)[7 // 4, 9 // 4]
    assert not _shrink_mask(np.zeros((600, 600), dtype=bool)).any()
    pool = MaskPool()
    assert [pool.add(mask), pool.add(~mask), pool.add(mask.copy())] == [0, 1, 0]
    assert pool.masks[1]["size"] == [512, 256]


def _lay(words: list[str], text: str) -> list[str]:
    return [gap + word for gap, _, word in spell([Token(i, word, "reasoning") for i, word in enumerate(words)], text)]


@pytest.mark.parametrize(
    ("words", "text", "laid"),
    [
        (["Red", " circle", "."], "Red circle.", ["Red", " circle", "."]),
        (["red", "circle", "."], "Red\n circle .", ["Red", "\n circle", " ."]),  # a tokenizer of small letters
        (["the", "<unk>", "one"], "the mauve one", ["the", " mauve", " one"]),
        (["\ufffd", "\ufffd", " day"], "☀ day", ["☀", "", " day"]),  # one sign, several byte tokens
        (["no", "such"], "", ["no", " such"]),
        (["", "a"], "a", ["", "a"]),
    ],
)
def test_words_lie_over_their_text(words, text, laid):
    assert _lay(words, text) == laid


def test_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("before")
    to_html(made_explanation(), path)
    assert path.read_text("utf-8").startswith("<!DOCTYPE html>")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        to_html(made_explanation(num_masks=1), path)
    assert [one.name for one in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(FileNotFoundError):
        to_html(made_explanation(), tmp_path / "no" / "folder.html")
