"""Every number of the study on Scenes. What each run is for, and how it is judged, stands in PROTOCOL.md."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RECIPE = Path("examples/scenes_tiny/recipe.yaml")  # whose keys the study changes
PRETRAINED = Path("runs/scenes-tiny")  # VLM and SAM, by examples/scenes_tiny/pretrain.py
RUNS = Path("runs/scenes-study")
RESULTS = Path("benchmarks/results/scenes_study")

# Kinds of instruction with reference reasoning in the ablation; reinforcement has to find the rest.
TAUGHT = ("attribute", "superlative", "set")
OTHERS = ("relation", "same-as", "ordinal", "count", "no-target")


@dataclass(frozen=True)
class Start:
    """A short run of the recipe whose rows are of some kinds; each stage draws scenes of its own, from `seed` on.

    Args:
        seed (`int`): Of the run.
        warmup_steps (`int`): The other stages have the same number in every start.
        kinds (`tuple[str, ...]`, *optional*): Of the instructions; all when left out.
        any_kind_every (`int`, *optional*): Every so manieth row of the warm-up is of any kind.
        goes_on_from (`str`, *optional*): Start whose warm-up comes before its own.
    """

    seed: int
    warmup_steps: int = 1500
    kinds: tuple[str, ...] | None = TAUGHT
    any_kind_every: int | None = None
    goes_on_from: str | None = None


# Of the kinds that are not taught, "strict" has seen nothing; "cold" has seen every 32nd scene of its warm-up with
# reference reasoning of any kind; "practised" goes on from the warm-up of "cold" with all kinds for a while
# (PROTOCOL.md says why there are three).
STARTS = {
    "strict": Start(10),
    "cold": Start(20, any_kind_every=32),
    "practised": Start(30, warmup_steps=400, kinds=None, goes_on_from="cold"),
}
START_STEPS = {"sae": 1500, "segmentation": 700}

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
