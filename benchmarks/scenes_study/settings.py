"""Every number of the study on Scenes. What each run is for, and how it is judged, stands in PROTOCOL.md."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segcompass_hf.training.scenes_recipe import STAGES, Stage

RUNS = Path("runs/scenes-study")
RESULTS = Path("benchmarks/results/scenes_study")

# Kinds of instruction with reference reasoning in the ablation; reinforcement has to find the rest.
TAUGHT = ("attribute", "superlative", "set")
OTHERS = ("relation", "same-as", "ordinal", "count", "no-target")


# Three starts. Of the kinds that are not taught, "strict" has seen nothing; "cold" has seen every 32nd scene of its
# warm-up with reference reasoning of any kind; "practised" goes on from the warm-up of "cold" with all kinds for a
# while (PROTOCOL.md says why there are three).
def _start(seed: int, any_kind_every: int | None) -> dict[str, Stage]:
    return {
        "vision": STAGES["vision"],
        "warmup": Stage(1500, 32, 3e-3, seed=seed + 2, kinds=TAUGHT, any_kind_every=any_kind_every),
        "sae": Stage(steps=1500, batch_size=2048, learning_rate=2e-3, seed=seed + 3, kinds=TAUGHT),
        "slots": Stage(steps=300, batch_size=32, learning_rate=6e-3, seed=seed + 5, kinds=TAUGHT),
        "joint": Stage(steps=400, batch_size=32, learning_rate=4e-3, seed=seed + 4, kinds=TAUGHT),
    }


def _practised(seed: int) -> dict[str, Stage]:
    """Stages after `vision` and `warmup` of "cold"."""
    return {
        "words": Stage(steps=400, batch_size=32, learning_rate=2e-3, seed=seed + 2),
        "sae": Stage(steps=1500, batch_size=2048, learning_rate=2e-3, seed=seed + 3),
        "slots": Stage(steps=300, batch_size=32, learning_rate=6e-3, seed=seed + 5),
        "joint": Stage(steps=400, batch_size=32, learning_rate=4e-3, seed=seed + 4),
    }


GOES_ON_FROM = {"practised": "cold"}  # start -> whose `vision` and `warmup` it uses
STARTS = {"strict": _start(10, None), "cold": _start(20, 32), "practised": _practised(30)}

# The ablation's arms: what of `policy_loss_weight * L_grpo + L_seg + L_conf` trains what.
ARMS = {
    "rl_only": {"train_heads": False, "seg_loss_weight": 0.0, "conf_loss_weight": 0.0},
    "seg_only": {"policy_loss_weight": 0.0, "beta": 0.0},
    "both": {},
    "both_better": {"segmentation_completions": "at_least_mean"},
    "latent": {},  # as "both", concept path replaced
    "reference": {},  # heads frozen; the language loss on reference reasoning of the same prompts instead of rewards
}
GRPO = {
    "per_device_train_batch_size": 32,
    "gradient_accumulation_steps": 2,  # 8 prompts of 8 completions
    "num_generations": 8,
    "max_completion_length": 120,
    "bf16": False,
    "temperature": 1.0,
    "beta": 0.04,
    "learning_rate": 5e-4,
    "codebook_lr_factor": 1.0,
    "slot_mapper_lr_factor": 1.0,
    "prompt_encoder_lr_factor": 1.0,
    "mask_decoder_lr_factor": 1.0,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 10,
    # The paper's, not those that the recipe trains the heads with: see PROTOCOL.md.
    "conf_loss_weight": 0.2,
    "heatmap_bce_weight": 1.0,
    "heatmap_dice_weight": 0.6,
    "mask_dice_weight": 0.6,
    "mask_focal_weight": 0.0,
}


@dataclass(frozen=True)
class Round:
    """Arms that are compared with each other: one start, the same prompts and steps."""

    title: str
    start: str
    seeds: dict[str, tuple[int, ...]]
    steps: int = 100
    kinds: tuple[str, ...] | None = None  # of the prompts; `None`: all
    changes: dict[str, Any] = field(default_factory=dict)  # to `GRPO`, for every arm


THREE = (0, 1, 2)
ROUNDS = {
    "cold": Round(
        title="every 32nd scene of the warm-up of any kind",
        start="cold",
        seeds={"rl_only": (0,), "seg_only": THREE, "both": THREE, "both_better": THREE, "latent": THREE},
    ),
    "practised": Round(
        title="the same, then 400 steps of warm-up with all kinds, and heads taught with all kinds",
        start="practised",
        seeds={"rl_only": (0,), "seg_only": (0,), "both": (0,)},
    ),
    "mended": Round(
        title="as before; 400 steps, prompts of the kinds not taught, rewards scaled by the batch, decaying rate",
        start="practised",
        seeds={"rl_only": (0,), "both": (0,), "reference": (0,)},
        steps=400,
        kinds=OTHERS,
        changes={"scale_rewards": "batch", "lr_scheduler_type": "linear"},
    ),
    "balanced": Round(
        title='as "mended", prompts of all kinds',
        start="practised",
        seeds={"rl_only": (0,), "seg_only": (0,), "both": (0, 1), "reference": (0,)},
        steps=400,
        changes={"scale_rewards": "batch", "lr_scheduler_type": "linear"},
    ),
    "slow": Round(
        title='as "balanced", a fifth of the learning rate',
        start="practised",
        seeds={"rl_only": (0,)},
        steps=400,
        changes={"scale_rewards": "batch", "lr_scheduler_type": "linear", "learning_rate": 1e-4},
    ),
}
SPLITS = ("val", "test_combinations", "test_pairs", "test_compositions", "test_crowded")
EVALUATION_SEED, EVALUATION_SAMPLES = 7, 200
