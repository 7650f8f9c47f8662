"""What training DINOv3 takes on each of several ranks, on paper: counted on the meta device, so the 7B fits anywhere.

    python benchmarks/scale.py > table.md

Fully sharded (`--sharding fsdp`), weights in float32, products in bfloat16. Exact: the parameters of the method as it
is built, and from them the gigabytes of a rank: weights (student, teacher, anchor), gradients, AdamW's two moments,
and `in use`, which lies unsharded beside them: everything that is no block, such as the heads, all through a step, a
block with its gradients, and the next one on its way. Estimated: activations of one picture (two large crops, eight
small ones) that the student keeps for its gradients, of the branches that stochastic depth does not leave out.
"""

from __future__ import annotations

import torch
from torch import nn

from saccade import backbone, recipe, vit
from saccade.recipes import dinov3

CASES = {"S": ("dinov3", "vit-s/16"), "L": ("dinov3", "vit-l/16"), "7B": ("dinov3:giant", "vit-7b/16")}
RANKS = (1, 8, 32, 256)


def count(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


def built(name: str, arch: str) -> tuple[dinov3.Config, dinov3.Method]:
    """The method of a later stage, whose anchor is there too."""
    page, config = recipe.configure(name, {"arch": arch})
    config = config.fitted(100_000_000).model_copy(update={"stage": "held"})
    with torch.device("meta"):
        network = backbone.build(config.arch, image_size=config.image_size, **config.backbone())
        return config, page.method(config, network, {})


def activations(config: dinov3.Config, network: vit.ViT) -> float:
    """Bytes that a picture's crops leave behind for the gradients.

    A block keeps of each token: what its two norms read (4 bytes each), what they give, queries, keys, values, the
    answer of attention and what layer scale reads twice (2 bytes), and of its MLP two or, gated, four wide rows. Heads
    keep logits and their exponentials.
    """
    shape, patch = network.config, network.config.patch
    tokens = sum(n * (network.prefix + (side // patch) ** 2)
                 for n, side in ((2, config.image_size), (config.local_crops, config.local_size)))  # fmt: skip
    block = 24 * shape.width + (8 if shape.activation == "swiglu" else 4) * shape.hidden
    hidden = 2 * (config.image_size // patch) ** 2 * config.masked * sum(config.mask_ratio) / 2
    rows = (2 + config.local_crops) * config.prototypes + hidden * (config.patch_prototypes or config.prototypes)
    return tokens * block * shape.depth * (1 - config.drop_path) + 2 * 4 * rows


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f}" if count < 100e9 else f"{count / 1e9:,.0f}"


def main() -> None:
    print("| size | parameters (backbone + heads) | ranks | weights | gradients | moments | in use | together |")
    print("|---|---|---|---|---|---|---|---|")
    left = []
    for size, (name, arch) in CASES.items():
        config, method = built(name, arch)
        network, student = method.student["backbone"], count(method.student)
        everything = student + count(method.teacher) + count(method.anchor)
        blocks = {part: count(part) for part in method.modules() if isinstance(part, backbone.UNITS)}
        apart = everything - sum(blocks.values()) + student - sum(count(block) for block in network.blocks)
        heads = student - count(network)
        for ranks in RANKS:
            weights, gradients, moments = (4 * n / ranks for n in (everything, student, 2 * student))
            used = 0 if ranks == 1 else 4 * (apart + 3 * count(network.blocks[0]))
            together = gigabytes(weights + gradients + moments + used)
            said = f"{count(network) / 1e6:,.0f} M + {heads / 1e6:,.0f} M" if ranks == RANKS[0] else ""
            parts = " | ".join(gigabytes(part) for part in (weights, gradients, moments, used))
            print(f"| {size if said else ''} | {said} | {ranks} | {parts} | {together} |")
        left.append(f"{size} {activations(config, network) / 1e9:.2f}")
    print(f"\nActivations, GB a picture: {', '.join(left)}.")


if __name__ == "__main__":
    main()
