# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What the concepts of image tokens say of every place of a segmenter's image embedding."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from .configuration_segcompass import SegCompassConfig
from .image_features_segcompass import ImageFeatures
from .modeling_masks import MaskStage
from .token_grids_segcompass import EDGE_UNITS, TokenGrid


@dataclass
class ConceptGrid:
    """Concept embeddings of the image tokens of a batch, and how much of each lies in every cell of an embedding.

    The value of a cell is `sum_rc R_ir C_jc e_rc`: tokens are interpolated bilinearly, over as many tokens as a cell
    is wide where they are finer than the cells. It is linear in the embeddings, and these are linear in the concepts'
    activations: the share of every concept in every cell can be told exactly.

    Args:
        embeddings (`torch.Tensor` of shape `(batch_size, rows, columns, d_slot)`): Zero where an image has fewer.
        row_weights (`torch.Tensor` of shape `(batch_size, height, rows)`): R. They sum to 1, or to 0 for cells that
            show padding or what the VLM does not see of the image.
        column_weights (`torch.Tensor` of shape `(batch_size, width, columns)`): C, likewise.
    """

    embeddings: torch.Tensor
    row_weights: torch.Tensor
    column_weights: torch.Tensor

    @classmethod
    def of_tokens(
        cls,
        embeddings: torch.Tensor,
        is_image: torch.Tensor,
        grids: torch.Tensor,
        size: tuple[int, int],
        image_shares: torch.Tensor,
    ) -> "ConceptGrid":
        """Lay image tokens on their grids.

        Args:
            embeddings (`torch.Tensor` of shape `(batch_size, sequence_length, d_slot)`): Of all tokens.
            is_image (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): Which are image tokens.
            grids (`torch.LongTensor` of shape `(batch_size, 6)`): The images' [`TokenGrid`]s, as rows.
            size (`tuple[int, int]`): (height, width) of the image embedding, in cells.
            image_shares (`torch.Tensor` of shape `(batch_size, 2)`): What images take of the canvas's height and
                width, in (0, 1]; the rest is padding at the bottom and right.

        Raises:
            ValueError: The grids are of other images: they have other numbers of tokens.
        """
        expected = len(embeddings), len(TokenGrid._fields)
        if tuple(grids.shape) != expected:
            raise ValueError(
                f"image_token_grids have shape {tuple(grids.shape)}, expected {expected}: one row per sequence, as "
                "the processor makes them."
            )
        is_image, image_shares = (given.to(embeddings.device) for given in (is_image, image_shares))
        sides, edges = grids.to(embeddings.device).split([2, 4], dim=1)
        edges = edges.float() / EDGE_UNITS
        counted, places = is_image.sum(1), sides.prod(1)
        if not torch.equal(counted, places):
            raise ValueError(
                f"sequences hold {counted.tolist()} image tokens, but their image_token_grids have {places.tolist()} "
                "places; both must come from one call of the processor, with one image per sequence."
            )
        row, position = is_image.nonzero(as_tuple=True)  # in the order of the tokens
        order = (is_image.long().cumsum(1) - 1)[row, position]
        num_rows, num_columns = sides.amax(0).tolist()
        laid = embeddings.new_zeros(len(embeddings), num_rows, num_columns, embeddings.shape[-1])
        columns = sides[row, 1]
        laid = laid.index_put((row, order // columns, order % columns), embeddings[row, position])
        weights = (
            cell_weights(edges[:, 2 * axis : 2 * axis + 2], sides[:, axis], image_shares[:, axis], size[axis])
            for axis in (0, 1)
        )
        return cls(laid, *weights)

    def to(self, *args, **kwargs) -> "ConceptGrid":
        return ConceptGrid(*(part.to(*args, **kwargs) for part in vars(self).values()))

    def place(self, values: torch.Tensor) -> torch.Tensor:
        """Values `(batch_size, rows, columns, channels)` of tokens in the cells: `(batch_size, channels, h, w)`."""
        along = torch.einsum("bir,brcs->bics", self.row_weights.to(values.dtype), values)
        return torch.einsum("bjc,bics->bsij", self.column_weights.to(values.dtype), along)


def cell_weights(
    edges: torch.Tensor, num_tokens: torch.Tensor, image_share: torch.Tensor, num_cells: int
) -> torch.Tensor:
    """How much of each token lies in every cell along one side.

    Args:
        edges (`torch.Tensor` of shape `(batch_size, 2)`): First and last edge of the tokens, as shares of the image's
            side.
        num_tokens (`torch.LongTensor` of shape `(batch_size,)`): Along the side.
        image_share (`torch.Tensor` of shape `(batch_size,)`): What the image takes of the canvas's side, from its
            beginning.
        num_cells (`int`): Of the image embedding along the side.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_cells, max(num_tokens))`.
    """
    start, share = torch.arange(num_cells, device=edges.device) / num_cells, image_share[:, None]
    cell = 1 / num_cells / share  # of the image's side
    middle = (start + 0.5 / num_cells) / share  # (batch_size, num_cells)
    first, last = edges[:, :1], edges[:, 1:]
    shown = (start < share) & (middle > first - cell / 2) & (middle < last + cell / 2)
    token = (last - first) / num_tokens[:, None]
    numbers = torch.arange(int(num_tokens.max()), device=edges.device)
    distance = ((middle - first) / token - 0.5)[..., None] - numbers  # in tokens
    reach = (cell / token).clamp(min=1)[..., None]  # of a token's influence
    weights = (1 - distance.abs() / reach).clamp(min=0) * (numbers < num_tokens[:, None, None])
    sums = weights.sum(-1, keepdim=True)
    return torch.where(shown[..., None], weights / sums.clamp(min=1e-6), 0.0)


class ConceptGridsMixin:
    """Concept grids for the slot mapper, of whole sequences or of what was read of them before.

    Its heir has the configuration and the segmenter.
    """

    config: SegCompassConfig
    sam: PreTrainedModel

    @property
    def mask_stage(self) -> MaskStage:
        """The mask decoder's interface: image -> features; features and heatmaps -> masks."""
        return MaskStage(self.sam)

    def concept_grid(
        self,
        embeddings: torch.Tensor,
        is_image: torch.Tensor,
        image_token_grids: torch.Tensor | None,
        image_embeddings: torch.Tensor | ImageFeatures | None,
        reshaped_input_sizes: torch.Tensor | None = None,
    ) -> ConceptGrid | None:
        """The concepts of image tokens where they lie in the segmenter's image embeddings.

        Args:
            embeddings (`torch.Tensor` of shape `(batch_size, sequence_length, d_slot)`): Of the codebook.
            is_image (`torch.Tensor` of shape `(batch_size, sequence_length)`): 1 or true on image tokens.
            image_token_grids (`torch.LongTensor` of shape `(batch_size, 6)`): Of the processor, see
                [`SequenceStates`].
            image_embeddings, reshaped_input_sizes: As in `predict_masks`.

        Returns:
            [`ConceptGrid`]; `None` without image embeddings, and without `heatmap_concepts`.

        Raises:
            ValueError: The grids are missing, or of other images.
        """
        if image_embeddings is None or not self.config.heatmap_concepts:
            return None
        _check_given(image_token_grids)
        shares = embeddings.new_ones(len(embeddings), 2, dtype=torch.float32)
        if reshaped_input_sizes is not None:
            shares = reshaped_input_sizes.to(shares) / self.mask_stage.canvas
        size = tuple(image_embeddings.shape[-2:])
        return ConceptGrid.of_tokens(embeddings, is_image.bool(), image_token_grids, size, shares)

    def grid_of_image_concepts(
        self,
        embeddings: torch.Tensor | None,
        image_token_grids: torch.Tensor | None,
        image_embeddings: torch.Tensor | ImageFeatures | None,
        reshaped_input_sizes: torch.Tensor | None = None,
    ) -> ConceptGrid | None:
        """As `concept_grid`, of embeddings `(batch_size, num_patches, d_slot)` of image tokens alone, padding last."""
        if image_embeddings is None or not self.config.heatmap_concepts:
            return None
        if embeddings is None:
            raise ValueError(
                "this model has heatmap_concepts: beside slots and reference_states it needs the "
                "image_concept_embeddings that were read with them."
            )
        _check_given(image_token_grids)
        counts = image_token_grids[:, :2].prod(1, keepdim=True).to(embeddings.device)
        is_image = torch.arange(embeddings.shape[1], device=embeddings.device) < counts
        return self.concept_grid(embeddings, is_image, image_token_grids, image_embeddings, reshaped_input_sizes)


def _check_given(image_token_grids: torch.Tensor | None) -> None:
    if image_token_grids is None:
        raise ValueError(
            "this model has heatmap_concepts: its slots look at the concepts of image tokens where these lie in the "
            "image, but there are no image_token_grids. The model's processor makes them; set "
            "`processor.image_token_grids = True` on another, and pass on all that it returns."
        )


__all__ = ["ConceptGrid", "ConceptGridsMixin", "cell_weights"]
