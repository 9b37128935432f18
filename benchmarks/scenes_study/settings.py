"""Every number of the study on Scenes. What each run is for, and how it is judged, stands in PROTOCOL.md."""

from pathlib import Path

from segcompass_hf.training.scenes_recipe import STAGES, Stage

RUNS = Path("runs/scenes-study")
RESULTS = Path("benchmarks/results/scenes_study")

# Kinds of instruction with reference reasoning in the ablation; reinforcement has to find the rest.
TAUGHT = ("attribute", "superlative", "set")

START = {
    "vision": STAGES["vision"],
    "masks": STAGES["masks"],
    "warmup": Stage(steps=2000, batch_size=32, learning_rate=3e-3, seed=12, kinds=TAUGHT),
    "sae": Stage(steps=1500, batch_size=2048, learning_rate=2e-3, seed=13, kinds=TAUGHT),
    "slots": Stage(steps=400, batch_size=32, learning_rate=6e-3, seed=15, kinds=TAUGHT),
    "joint": Stage(steps=250, batch_size=32, learning_rate=4e-3, seed=14, kinds=TAUGHT),
}
