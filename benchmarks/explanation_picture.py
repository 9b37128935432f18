"""The README's picture of an explanation's page: the first concept of the first mask chosen, in headless Chromium.

    python benchmarks/explanation_picture.py --output docs/images/explanation.png

Needs chromium, chromium-driver and selenium. The scene is one of `val`, chosen because its first concept shows well
what taking one away does; `--sample` picks another.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from browser import open_browser, save_screenshot, set_screen

from segcompass_hf.commands.common import load_checkpoint
from segcompass_hf.data import scenes
from segcompass_hf.explain import explain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/images/explanation.png"))
    parser.add_argument("--model", help="checkpoint (the bundled one)")
    parser.add_argument("--sample", type=int, default=5, help="scene of val (%(default)s)")
    args = parser.parse_args()
    model, processor, name = load_checkpoint(args.model)
    scene = scenes.sample("val", args.sample)
    explanation = explain(model, processor, Image.fromarray(scene.image), scene.instruction.text)
    explanation.model_name = name
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        explanation.to_html(page)
        with open_browser(Path(folder) / "profile") as window:
            set_screen(window, 1280, 1010)
            window.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
            window.get(page.as_uri())
            window.find_element("css selector", "#list button").click()
            save_screenshot(window, args.output)
    picture = Image.open(args.output).convert("RGB")
    picture.quantize(200, dither=Image.Dither.NONE).save(args.output, optimize=True)
    print(f"{scene.instruction.text}: {args.output}, {args.output.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
