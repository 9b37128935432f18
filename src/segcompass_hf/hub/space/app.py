"""SegCompass, live: the page that `segcompass serve` shows, as a Space."""

import os

from segcompass_hf.checkpoint import BUNDLED, SCENES, load_checkpoint
from segcompass_hf.explain.live.app import build_app, launch_options
from segcompass_hf.explain.live.examples import card_examples
from segcompass_hf.explain.live.model import LiveModel

model_id = os.environ.get("SEGCOMPASS_MODEL") or "{{MODEL_ID}}" or None
model, processor, name = load_checkpoint(model_id)
live, note = LiveModel(model, processor, name), BUNDLED.get(name, "")
app = build_app(live, scenes=name == SCENES, note=note, examples=card_examples(name))

if __name__ == "__main__":
    app.launch(**launch_options())
