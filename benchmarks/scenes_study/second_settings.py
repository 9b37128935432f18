"""Every number of the study's second part; what each run is for, and how it is judged: PROTOCOL_SECOND.md."""

from dataclasses import dataclass
from pathlib import Path

from settings import OTHERS, RUNS, TAUGHT

PROMPTS_PER_STEP, GROUP = 16, 8


@dataclass(frozen=True)
class Size:
    """How much of everything there is.

    Args:
        folder (`Path`): Of the runs.
        prompts (`int`): Of a run, those that are trained on.
        starts (`tuple[str, ...]`): The first of them in which at least `kinds_needed` of the kinds not taught can be
            learned is the start of all arms.
        kinds_needed (`int`): See `starts`.
        evaluated (`int`): Scenes of each split that a run is evaluated on.
        predicted (`int`): Scenes of `val`, which no run trains on, whose answers are sampled before and after.
        ks (`tuple[int, ...]`): Of pass@k before training, which takes as many samples as the largest.
    """

    folder: Path
    prompts: int
    starts: tuple[str, ...]
    kinds_needed: int
    evaluated: int
    predicted: int
    ks: tuple[int, ...]

    @property
    def steps(self) -> int:
        """Optimizer steps of a run."""
        return self.prompts // PROMPTS_PER_STEP


# PROTOCOL_SECOND.md says why not 50,000 prompts.
COUNTED = Size(RUNS / "second", 16_000, ("strict", "cold", "practised"), 3, 200, 400, (1, 4, 8, 16, 64))
# Two steps from the bundled checkpoint, to see that everything runs; no figure of it counts.
SMOKE = Size(RUNS / "second-smoke", 2 * PROMPTS_PER_STEP, ("bundled",), 0, 8, 8, (1, 8, 16))

SEEDS = {
    "rl_only": (0, 1, 2),
    "seg_only": (0, 1, 2),
    "both": (0, 1, 2),
    "both_guided": (0,),
    "expert": (0,),
    "reference": (0,),
}
REFERENCE_EVERY = 8  # of the prompts of "both_guided", every so manieth has reference reasoning
BUDGET_CPU_HOURS = 30.0

LEARNABLE_PASS, LEARNABLE_MIXED = 0.2, 0.1  # pass@16 and mixed@8 of a kind that can be learned, at least
PREDICTION_SEED = 61  # of the scenes of `val` whose answers are sampled
SAMPLES_AFTER = 4  # of each of them after training; pass@1 is their mean

GRPO = {
    "per_device_train_batch_size": 64,
    "gradient_accumulation_steps": PROMPTS_PER_STEP * GROUP // 64,
    "num_generations": GROUP,
    "max_completion_length": 120,
    "temperature": 1.0,
    "bf16": False,
    "gradient_checkpointing": False,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 10,
    "scale_rewards": "none",
    "epsilon_high": 0.28,
    "top_entropy_quantile": 0.5,
    "beta": 0.0,
    "mask_reward": "objects",
    "codebook_lr_factor": 1.0,
    "slot_mapper_lr_factor": 1.0,
    "prompt_encoder_lr_factor": 1.0,
    "mask_decoder_lr_factor": 1.0,
    "conf_loss_weight": 0.2,
    "heatmap_bce_weight": 1.0,
    "heatmap_dice_weight": 0.6,
    "mask_dice_weight": 0.6,
    "mask_focal_weight": 0.0,
}
# What chooses prompts and groups; not for "seg_only", whose prompts are taken as they come.
CHOOSING = {"max_resamplings": 2, "stratify_by": "kind"}
ARMS = {
    "rl_only": {"train_heads": False, "seg_loss_weight": 0.0, "conf_loss_weight": 0.0, **CHOOSING},
    "seg_only": {"policy_loss_weight": 0.0, "stratify_by": "kind"},
    "both": CHOOSING,
    "both_guided": {"guidance": "rollout", "guidance_share": 0.5, **CHOOSING},
}
EXPERT = {"rounds": 3, "samples": 16}  # of so many rounds each samples half as many prompts twice as often
KINDS = {"taught": TAUGHT, "others": OTHERS}
