"""open_clip's losses and models against ours, on the same weights and inputs: how far apart are they at most?

    pip install open_clip_torch                                  # where torchvision imports; saccade on PYTHONPATH
    python benchmarks/parity_open_clip.py [--models ViT-B-32-quickgelu ViT-B-16-SigLIP] [--pairs 4]

`losses`: ClipLoss and SigLipLoss of drawn embeddings in float64, with the gradients of embeddings, factor and bias.
`models`: open_clip builds its model of that name, every tensor is drawn anew, it is saved as open_clip names things,
and `saccade.load` reads that. In float64: logits, the loss of its own loss class, and the gradient of every tensor that
both have, each as the largest difference over the largest value. In float32: the vectors of pictures and texts, over
their spread. open_clip runs SigLIP (1) with the exact GELU in both towers, and the image tower of SigLIP 2 too, which
were trained with GELU by tanh: here it is told tanh, and `untold` says how far its logits are without. Ends with 1
where a difference in float64 is above 1e-8, or one in float32 above 1e-5.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import zlib
from pathlib import Path
from typing import Any

import open_clip
import open_clip.loss
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import saccade
from saccade import pair_losses, published
from saccade.published.texts import TOWERS

EXACT, SINGLE = 1e-8, 1e-5
Found = dict[str, float]


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the largest value."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


def losses(kind: str, pairs: int = 96, width: int = 48) -> Found:
    """`ClipLoss` or `SigLipLoss` of drawn embeddings, as they leave a model: of length 1."""
    draw = torch.Generator().manual_seed(pairs)
    leaves = [torch.randn(pairs, 2, width, generator=draw, dtype=torch.float64)]
    leaves += [torch.tensor([value], dtype=torch.float64) for value in (2.4, -4.0)[: 1 if kind == "ClipLoss" else 2]]
    theirs, ours = ([leaf.clone().requires_grad_() for leaf in leaves] for _ in range(2))
    image, text = nn.functional.normalize(theirs[0], dim=2).unbind(1)
    wanted = getattr(open_clip.loss, kind)()(image, text, theirs[1].exp(), *theirs[2:])
    other = torch.arange(pairs)[:, None]
    loss_of = pair_losses.contrast if kind == "ClipLoss" else pair_losses.sigmoid
    found, _ = loss_of(ours[0], ours[1].exp(), *ours[2:], other)
    gradients = zip(torch.autograd.grad(found, ours), torch.autograd.grad(wanted, theirs), strict=True)
    named = zip(("of pairs", "of scale", "of bias"), gradients, strict=False)
    return {"loss": apart(found, wanted), **{name: apart(*both) for name, both in named}}


@torch.no_grad()
def redraw(model: nn.Module) -> nn.Module:
    """No tensor is constant, and none stays as it was made."""
    for name, tensor in model.named_parameters():
        draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if tensor.ndim == 0:
            tensor.fill_(1.7 if "scale" in name else -2.3)
        elif tensor.ndim == 1:
            tensor.normal_(generator=draw).mul_(0.2).add_(float(name.endswith("weight")))
        else:
            tensor.normal_(generator=draw).mul_(tensor[0].numel() ** -0.5)
    return model.eval()


def as_trained(model: nn.Module) -> None:
    """GELU by tanh, as SigLIP's authors run it."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GELU):
                setattr(module, name, nn.GELU("tanh"))


def their_gradients(encoder: saccade.Encoder, model: nn.Module) -> dict[str, Tensor]:
    """By our names: what maps tensors maps their gradients too."""
    tensors = {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}
    family = published.families()[encoder.record["family"]]
    found: dict[str, Tensor] = {}
    for before, naming in (
        ("backbone.", family.namings[encoder.record["naming"]]),
        ("text.", TOWERS[family.name].namings[encoder.record["text"]["naming"]]),
    ):
        prefix = max(naming.prefixes, key=lambda prefix: published.sort(naming, tensors, prefix).matched)
        found |= {before + name: each for name, each in published.to_ours(naming, tensors, prefix).items()}
    return found


def model_of(name: str, pairs: int) -> tuple[Found, Found]:
    """What differs in float64 and in float32, of one of open_clip's models."""
    torch.manual_seed(0)
    theirs = redraw(open_clip.create_model(name, pretrained=None))
    siglip = "SigLIP" in name
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("siglip" if siglip else "clip")
        path.mkdir()
        save_file({key: each.contiguous() for key, each in theirs.state_dict().items()}, path / "model.safetensors")
        ours = saccade.load(path)
    assert ours.text is not None, ours.record["text"]
    draw = torch.Generator().manual_seed(1)
    config = ours.text.tower.config
    images = torch.rand(pairs, 3, *theirs.visual.image_size, generator=draw)
    tokens = torch.randint(3, config.vocabulary - 2, (pairs, config.length), generator=draw)
    tokens[::2, config.length // 2 :] = config.end
    tokens[:, -1] = config.end
    with torch.no_grad():
        untold = logits_of(theirs, normalised(ours, images), tokens)
        if siglip:
            as_trained(theirs)
        single = singly(ours, theirs, images, tokens)
        told = logits_of(theirs, normalised(ours, images), tokens)
    if siglip:
        single["untold"] = apart(untold, told)
    return doubly(ours.double(), theirs.double(), images.double(), tokens, siglip), single


def normalised(encoder: saccade.Encoder, images: Tensor) -> Tensor:
    """Pictures as open_clip's models take them."""
    return (images - encoder.backbone.mean.view(3, 1, 1)) / encoder.backbone.std.view(3, 1, 1)


def logits_of(theirs: Any, images: Tensor, tokens: Tensor) -> Tensor:
    return theirs.get_logits(images, tokens)[0]


def singly(ours: Any, theirs: Any, images: Tensor, tokens: Tensor) -> Found:
    """Vectors before they get length 1, over their spread."""
    pooled = ours.backbone.pooled(images)
    pictures = pooled if ours.text.projection is None else ours.text.projection(pooled)
    sides = {
        "pictures": (pictures, theirs.encode_image(normalised(ours, images))),
        "texts": (ours.text.tower.pooled(tokens), theirs.encode_text(tokens)),
    }
    return {name: float((a - b).abs().max() / b.std()) for name, (a, b) in sides.items()}


def doubly(ours: Any, theirs: Any, images: Tensor, tokens: Tensor, siglip: bool) -> Found:
    """Logits, loss and gradients. `ours` takes the pictures as they are: its mean and spread are float32's."""
    wanted = logits_of(theirs, normalised(ours, images), tokens)
    image, text, scale, *bias = theirs(normalised(ours, images), tokens)
    their_loss = (open_clip.loss.SigLipLoss() if siglip else open_clip.loss.ClipLoss())(image, text, scale, *bias)
    their_loss.backward()
    logits, pairing = ours.logits(images, tokens), ours.text
    pairs = torch.stack([ours.pair(images), pairing(tokens)], 1)
    other = torch.arange(len(images))[:, None]
    if siglip:
        loss, _ = pair_losses.sigmoid(pairs, pairing.logit_scale.exp(), pairing.logit_bias, other)
    else:
        loss, _ = pair_losses.contrast(pairs, pairing.logit_scale.exp(), other)
    loss.backward()
    right = their_gradients(ours, theirs)
    own = {name: tensor.grad for name, tensor in ours.named_parameters()}
    assert own.keys() == right.keys(), sorted(own.keys() ^ right.keys())[:4]
    worst = {name: apart(own[name], right[name]) for name in own if right[name].abs().max() > 1e-12}
    least = max((float(own[name].abs().max()) for name in own.keys() - worst.keys()), default=0.0)
    assert least < 1e-11, least  # a key's bias: a softmax does not see it
    found = {"logits": apart(logits, wanted), "loss": apart(loss, their_loss)}
    return {**found, f"gradients of {len(own)} tensors": max(worst.values())}


def main() -> None:
    """Prints a line for each loss and model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["ViT-B-32-quickgelu", "ViT-B-16-SigLIP"])
    parser.add_argument("--pairs", type=int, default=4)
    arguments = parser.parse_args()
    print(f"open_clip {open_clip.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    double = {kind: losses(kind) for kind in ("ClipLoss", "SigLipLoss")}
    single: dict[str, Found] = {}
    for name in arguments.models:
        double[name], single[name] = model_of(name, arguments.pairs)
    for width, rows in (("float64", double), ("float32", single)):
        for name, row in rows.items():
            print(f"{width}  {name:20}  " + "  ".join(f"{part} {value:.1e}" for part, value in row.items()))
    exact = max(value for row in double.values() for value in row.values())
    near = max((value for row in single.values() for part, value in row.items() if part != "untold"), default=0.0)
    raise SystemExit(int(exact > EXACT or near > SINGLE))


if __name__ == "__main__":
    main()
