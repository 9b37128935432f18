"""Every number of the study on Scenes. What each run is for, and how it is judged, stands in PROTOCOL.md."""

from pathlib import Path

from segcompass_hf.training.scenes_recipe import STAGES, Stage

RUNS = Path("runs/scenes-study")
RESULTS = Path("benchmarks/results/scenes_study")

# Kinds of instruction with reference reasoning in the ablation; reinforcement has to find the rest.
TAUGHT = ("attribute", "superlative", "set")

# Two starts. Of the kinds that are not taught, "strict" has seen nothing; "cold" has seen every 50th scene of its
# warm-up with reference reasoning of any kind (PROTOCOL.md says why there is a second start).
_WORDS = {"concept_weight": 0.3, "concept_scale": 8.0}
STARTS = {
    "strict": {
        "vision": STAGES["vision"],
        "masks": STAGES["masks"],
        "warmup": Stage(steps=2000, batch_size=32, learning_rate=3e-3, seed=12, kinds=TAUGHT),
        "sae": Stage(steps=1500, batch_size=2048, learning_rate=2e-3, seed=13, kinds=TAUGHT),
        "slots": Stage(steps=400, batch_size=32, learning_rate=6e-3, seed=15, kinds=TAUGHT),
        "joint": Stage(steps=250, batch_size=32, learning_rate=4e-3, seed=14, kinds=TAUGHT),
    },
    "cold": {
        "vision": STAGES["vision"],
        "masks": STAGES["masks"],
        "warmup": Stage(2000, 32, 3e-3, seed=22, kinds=TAUGHT, any_kind_every=50, options=_WORDS),
        "sae": Stage(steps=1500, batch_size=2048, learning_rate=2e-3, seed=23, kinds=TAUGHT),
        "slots": Stage(steps=400, batch_size=32, learning_rate=6e-3, seed=25, kinds=TAUGHT),
        "joint": Stage(steps=250, batch_size=32, learning_rate=4e-3, seed=24, kinds=TAUGHT),
    },
}

# The ablation's arms: what of `policy_loss_weight * L_grpo + L_seg + L_conf` trains what.
ARMS = {
    "rl_only": {"train_heads": False, "seg_loss_weight": 0.0, "conf_loss_weight": 0.0},
    "seg_only": {"policy_loss_weight": 0.0, "beta": 0.0},
    "both": {},
    "latent": {},  # as "both", concept path replaced
}
SEEDS = {
    "strict": {"rl_only": (0,), "seg_only": (0,), "both": (0,)},
    "cold": {"rl_only": (0,), "seg_only": (0, 1, 2), "both": (0, 1, 2), "latent": (0, 1, 2)},
}
ARM_STEPS = 150
GRPO = {
    "per_device_train_batch_size": 32,
    "gradient_accumulation_steps": 2,  # 8 prompts of 8 completions
    "num_generations": 8,
    "max_completion_length": 120,
    "bf16": False,
    "temperature": 1.0,
    "beta": 0.04,
    "learning_rate": 2e-4,
    "codebook_lr_factor": 1.0,
    "slot_mapper_lr_factor": 1.0,
    "prompt_encoder_lr_factor": 1.0,
    "mask_decoder_lr_factor": 1.0,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 10,
}
SPLITS = ("val", "test_combinations", "test_pairs", "test_compositions", "test_crowded")
EVALUATION_SEED, EVALUATION_SAMPLES = 7, 200
