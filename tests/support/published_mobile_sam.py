"""A random MobileSAM in the layout of its published file, and what its image encoder computes, spelled out.

`published_embeddings` is written from the paper's description of TinyViT and the published names alone: windows are
cut one by one, and batch norms are not folded.
"""

import math

import torch
import torch.nn.functional as F
from tiny import tiny_sam_config
from transformers import SamModel

from segcompass_hf.hub.conversion.keys import revert_to_original_state_dict

DIMS, DEPTHS, HEADS, WINDOWS = (8, 16, 16, 32), (1, 1, 2, 1), (2, 2, 4, 4), (7, 3, 2, 3)
STRIDES = (2, 2, 1)
CANVAS = 64  # pixels: maps of 16, 8, 4 and 4 cells, in windows of 3, 2 and 3
EXPAND, MLP_RATIO, OUT = 2, 3, 32
CLASSES = 10
MOBILE_SAM_FIELDS = {  # what the weights do not show
    "vision_config": {"image_size": CANVAS},
    "mask_decoder_config": {"num_attention_heads": 2},
}


def _shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of `image_encoder.*`."""
    shapes: dict[str, tuple[int, ...]] = {}

    def convolution(name, out, into, side=1):
        shapes[f"{name}.c.weight"] = (out, into, side, side)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{part}"] = (out,)
        shapes[f"{name}.bn.num_batches_tracked"] = ()

    def linear(name, out, into):
        shapes.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    def norm(name, dim):
        shapes.update({f"{name}.weight": (dim,), f"{name}.bias": (dim,)})

    convolution("patch_embed.seq.0", DIMS[0] // 2, 3, 3)
    convolution("patch_embed.seq.2", DIMS[0], DIMS[0] // 2, 3)
    for stage, (dim, depth, heads, window) in enumerate(zip(DIMS, DEPTHS, HEADS, WINDOWS, strict=True)):
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            if stage == 0:
                convolution(f"{name}.conv1", EXPAND * dim, dim)
                convolution(f"{name}.conv2", EXPAND * dim, 1, 3)
                convolution(f"{name}.conv3", dim, EXPAND * dim)
                continue
            shapes[f"{name}.attn.attention_biases"] = (heads, window**2)
            norm(f"{name}.attn.norm", dim)
            linear(f"{name}.attn.qkv", 3 * dim, dim)
            linear(f"{name}.attn.proj", dim, dim)
            norm(f"{name}.mlp.norm", dim)
            linear(f"{name}.mlp.fc1", MLP_RATIO * dim, dim)
            linear(f"{name}.mlp.fc2", dim, MLP_RATIO * dim)
            convolution(f"{name}.local_conv", dim, 1, 3)
        if stage < 3:
            name, following = f"layers.{stage}.downsample", DIMS[stage + 1]
            convolution(f"{name}.conv1", following, dim)
            convolution(f"{name}.conv2", following, 1, 3)
            convolution(f"{name}.conv3", following, following)
    norm("norm_head", DIMS[3])
    linear("head", CLASSES, DIMS[3])
    shapes["neck.0.weight"], shapes["neck.2.weight"] = (OUT, DIMS[3], 1, 1), (OUT, OUT, 3, 3)
    norm("neck.1", OUT)
    norm("neck.3", OUT)
    return shapes


def published_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict as in `mobile_sam.pt`, of a tiny model whose weights keep the scale of what they are given."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sam = SamModel(tiny_sam_config(CANVAS, 16, OUT))
    state = {}
    for name, shape in _shapes().items():
        drawn = torch.randn(shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            drawn = torch.tensor(1000)
        elif name.endswith("running_var"):
            drawn = 0.5 + drawn.abs()
        elif len(shape) > 1 and "attention_biases" not in name:
            drawn = drawn / math.sqrt(math.prod(shape[1:]))
        elif name.endswith("weight"):  # of norms
            drawn = 1 + 0.2 * drawn
        state[f"image_encoder.{name}"] = drawn
    rest = {f"sam.{name}": weight for name, weight in sam.state_dict().items() if not name.startswith("vision_enc")}
    for name, weight in revert_to_original_state_dict(rest).items():
        state[name] = 0.2 * torch.randn(weight.shape, generator=generator)
    return state


def published_embeddings(state: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """What the published image encoder makes of `(batch_size, 3, canvas, canvas)`."""
    weights = {name.removeprefix("image_encoder."): weight for name, weight in state.items()}

    def convolution(x, name, stride=1):
        kernel = weights[f"{name}.c.weight"]
        groups = 1 if kernel.shape[1] == x.shape[1] else x.shape[1]
        x = F.conv2d(x, kernel, None, stride, kernel.shape[-1] // 2, 1, groups)
        mean, var, gain, bias = (weights[f"{name}.bn.{p}"] for p in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, gain, bias, training=False, eps=1e-5)

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name, eps=1e-5):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    def attention(x, name, heads, window):  # (cells, dim), row by row
        per_head = linear(norm(x, f"{name}.norm"), f"{name}.qkv").chunk(heads, -1)
        places = [(cell // window, cell % window) for cell in range(window**2)]
        outputs = []
        for head, states in enumerate(per_head):
            query, key, value = states.chunk(3, -1)
            scores = query @ key.T / math.sqrt(query.shape[-1])
            table = weights[f"{name}.attention_biases"][head]
            for i, (row, column) in enumerate(places):
                for j, (other_row, other_column) in enumerate(places):
                    scores[i, j] += table[abs(row - other_row) * window + abs(column - other_column)]
            outputs.append(scores.softmax(-1) @ value)
        return linear(torch.cat(outputs, -1), f"{name}.proj")

    def attended(x, name, heads, window):  # (dim, h, w)
        dim, height, width = x.shape
        large = torch.zeros(dim, -(-height // window) * window, -(-width // window) * window)
        large[:, :height, :width] = x
        for top in range(0, large.shape[1], window):
            for left in range(0, large.shape[2], window):
                part = large[:, top : top + window, left : left + window]
                cells = attention(part.flatten(1).T, name, heads, window)
                large[:, top : top + window, left : left + window] = cells.T.reshape(part.shape)
        return large[:, :height, :width]

    x = F.gelu(convolution(pixels, "patch_embed.seq.0", 2))
    x = convolution(x, "patch_embed.seq.2", 2)
    for stage, depth in enumerate(DEPTHS):
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            if stage == 0:
                inner = F.gelu(convolution(x, f"{name}.conv1"))
                inner = F.gelu(convolution(inner, f"{name}.conv2"))
                x = F.gelu(x + convolution(inner, f"{name}.conv3"))
                continue
            x = x + torch.stack([attended(one, f"{name}.attn", HEADS[stage], WINDOWS[stage]) for one in x])
            x = convolution(x, f"{name}.local_conv")
            cells = x.permute(0, 2, 3, 1)
            inner = F.gelu(linear(norm(cells, f"{name}.mlp.norm"), f"{name}.mlp.fc1"))
            x = x + linear(inner, f"{name}.mlp.fc2").permute(0, 3, 1, 2)
        if stage < 3:
            name = f"layers.{stage}.downsample"
            x = F.gelu(convolution(x, f"{name}.conv1"))
            x = F.gelu(convolution(x, f"{name}.conv2", STRIDES[stage]))
            x = convolution(x, f"{name}.conv3")
    for number in (0, 2):
        kernel = weights[f"neck.{number}.weight"]
        x = F.conv2d(x, kernel, padding=kernel.shape[-1] // 2)
        x = norm(x.permute(0, 2, 3, 1), f"neck.{number + 1}", 1e-6).permute(0, 3, 1, 2)
    return x
