"""Every number of the study's second part; what each run is for, and how it is judged: PROTOCOL_SECOND.md."""

from settings import OTHERS, TAUGHT

PROMPTS = 16_000  # of a run, those that are trained on; PROTOCOL_SECOND.md says why not 50,000
PROMPTS_PER_STEP, GROUP = 16, 8
STEPS = PROMPTS // PROMPTS_PER_STEP
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

# The start is the first of these in which at least three of the kinds not taught can be learned (PROTOCOL_SECOND.md).
STARTS = ("strict", "cold", "practised")
LEARNABLE_PASS, LEARNABLE_MIXED = 0.2, 0.1  # pass@16 and mixed@8, at least
KINDS_NEEDED = 3
PREDICTION = {"num_samples": 400, "seed": 61, "k": (1, 4, 8, 16, 64)}  # scenes of `val` that no run trains on

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
SPLITS = ("val", "test_combinations", "test_pairs", "test_compositions", "test_crowded")
EVALUATION = {"seed": 7, "num_samples": 200}  # as in the first part, of each split
