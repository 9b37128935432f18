"""Settings of the study of one concept space: what each option changes in the shortened recipe."""

from pathlib import Path

from settings import RUNS

FOLDER = RUNS / "concepts"

# Whose warm-up an option starts from: that of a run of examples/scenes_tiny/recipe.yaml, or of one without the
# alignment of words and patches (`--set output_dir=runs/scenes-tiny-plain --set warmup.alignment_weight=0`).
WARMUPS = {"plain": Path("runs/scenes-tiny-plain"), "concept_words": Path("runs/scenes-tiny")}
# Keys of the recipe that make it short, for every option.
SHORT = ("sae.max_steps=1500", "sae.seed=43", "segmentation.max_steps=500", "segmentation.seed=44")
SHORT += ("segmentation.lr_scheduler_kwargs.num_decay_steps=300", "warmup=null")
MEASURED, EVALUATED, SEED = 400, 300, 7  # scenes of `val` for the concepts and for gIoU

# States are about 100 long and per-token normalisation makes them 11.3: without it the weight of the sparsity term and
# the threshold grow by the same factor, so that the trade-off is the same.
RAW = ("sae.normalize_activations=none", "sae.l1_coefficient=9.0", "config.concept_threshold=2.25")
NO_PAIRS = ("sae.pair_loss=none",)

# option -> warm-up, and keys of the recipe
OPTIONS = {
    "paper": ("plain", (*RAW, *NO_PAIRS)),
    "per_token": ("plain", NO_PAIRS),
    "per_modality": ("plain", ("sae.normalize_activations=per_modality", *NO_PAIRS)),
    "shared_topk": ("plain", ()),
    "concept_words": ("concept_words", NO_PAIRS),
    "concept_words+shared_topk": ("concept_words", ()),
}
BASELINE = "per_token"  # what gIoU is compared with
# Checkpoints of the whole recipe: before concept words and the shared top-k (as `per_token`), and with them.
WHOLE = ("previous", "bundled")
