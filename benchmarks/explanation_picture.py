"""The README's pictures of an explanation's page and of the live page, in headless Chromium.

    python benchmarks/explanation_picture.py --page docs/images/explanation.png --live docs/images/live_page.png

Needs chromium, chromium-driver and selenium. On the explanation's page the first concept of the first mask is chosen;
the scene is one of `val`, picked because that concept shows well what taking one away does (`--sample`). On the live
page, which opens with its first example answered, the first concepts are switched off.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from browser import open_browser, save_screenshot, set_screen
from selenium.webdriver.support.ui import WebDriverWait

from segcompass_hf.commands.common import load_checkpoint
from segcompass_hf.data import scenes
from segcompass_hf.explain import explain

PATIENCE = 180  # seconds
NUM_OFF = 2  # concepts switched off on the live page


def explanation_page(window, folder: Path, model, processor, name: str, sample: int, output: Path) -> None:
    """The page of `Explanation.to_html`, with a concept chosen."""
    scene = scenes.sample("val", sample)
    explanation = explain(model, processor, Image.fromarray(scene.image), scene.instruction.text)
    explanation.model_name = name
    explanation.to_html(folder / "page.html")
    set_screen(window, 1280, 1010)
    window.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
    window.get((folder / "page.html").as_uri())
    window.find_element("css selector", "#list button").click()
    _save(window, output)


def live_page(window, model, processor, name: str, output: Path) -> None:
    """The page of `segcompass serve` as it opens, the first concepts switched off."""
    from segcompass_hf.explain.live.app import build_app, launch_options
    from segcompass_hf.explain.live.examples import card_examples
    from segcompass_hf.explain.live.model import LiveModel

    app = build_app(LiveModel(model, processor, name), scenes=True, examples=card_examples(name))
    _, address, _ = app.launch(prevent_thread_lock=True, **launch_options())

    def switches():
        return [one for one in window.find_elements("css selector", "#switches label") if one.is_displayed()]

    def until(condition):
        return WebDriverWait(window, PATIENCE).until(lambda _: condition())

    set_screen(window, 1280, 1320)
    window.get(address)
    until(switches)
    for index in range(NUM_OFF):
        before = window.find_element("id", "summary").text
        switches()[index].click()
        until(lambda before=before: window.find_element("id", "summary").text != before)
    window.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
    _save(window, output)
    app.close()


def _save(window, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    save_screenshot(window, output)
    picture = Image.open(output).convert("RGB")
    picture.quantize(200, dither=Image.Dither.NONE).save(output, optimize=True)
    print(f"{output}, {output.stat().st_size // 1000} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, help="picture of the explanation's page to write")
    parser.add_argument("--live", type=Path, help="picture of the live page to write")
    parser.add_argument("--model", help="checkpoint (the bundled one)")
    parser.add_argument("--sample", type=int, default=7, help="scene of val for the page (%(default)s)")
    args = parser.parse_args()
    if not args.page and not args.live:
        parser.error("nothing to draw: give --page, --live or both")
    model, processor, name = load_checkpoint(args.model)
    with tempfile.TemporaryDirectory() as folder, open_browser(Path(folder) / "profile") as window:
        if args.page:
            explanation_page(window, Path(folder), model, processor, name, args.sample, args.page)
        if args.live:
            live_page(window, model, processor, name, args.live)


if __name__ == "__main__":
    main()
