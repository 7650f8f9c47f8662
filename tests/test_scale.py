"""The 7B's recipe where it fits: narrowed, on two real ranks that share every tensor."""

from __future__ import annotations

from pathlib import Path

import torch
from toys import forge

import saccade
from saccade import distributed
from saccade.run import Run

GIANT = {
    "recipe": "dinov3:giant", "arch": "vit-7b/8", "image_size": 32, "local_size": 16, "local_crops": 2, "batch": 8,
    "steps": 10, "lr": 1e-3, "prototypes": 64, "patch_prototypes": 32, "hidden": 48, "bottleneck": 16, "warmup": 0.1,
    "patch_hidden": 40, "patch_bottleneck": 8, "koleo_group": 4,
    "layer_scale": 0.5, "anchor": 0.2, "gram": 0.4, "refresh": 0.1, "high": 0.9,
}  # fmt: skip
"""Its stages begin after steps 2 (the anchor), 4 (Gram), 5, 6, 7 (the anchor anew) and 9 (high resolution)."""


def end(out: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses, Gram's part, gradient norms; and everything that the last checkpoint holds, gathered."""
    logged = Run.open(out).metrics()
    assert ["gram" in entry for entry in logged] == [False] * 4 + [True] * 6
    numbers = [[entry["loss"], entry.get("gram", 0.0), entry["gradient_norm"]] for entry in logged]
    place = out / "checkpoints" / "10"
    held = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in distributed.metadata(place).state_dict_metadata.items()
    }
    distributed.load_tensors(held, place, distributed.Ranks(0, 1, torch.device("cpu")))
    return torch.tensor(numbers, dtype=torch.float64), held


def test_the_giant_on_two_ranks_equals_one(workshop: forge.Forge, data: Path, tmp_path: Path) -> None:
    """Sharded, killed while patches are held to the anchor, and gone on with: the same losses, weights and backbone."""
    told = workshop.session(tmp_path / "one", data, **GIANT)
    assert told["codes"] == [0], told["said"]
    sharded = GIANT | {"sharding": "fsdp", "save_every": "5"}
    told = workshop.session(tmp_path / "two", data, world=2, stop={"step": 5}, **sharded)
    assert told["codes"] == [-9, -9], told["said"]
    told = workshop.session(tmp_path / "two", data, world=2, **sharded)
    assert told["codes"] == [0, 0] and "going on at step 5" in told["said"], told["said"]
    (one, held), (two, shared) = end(tmp_path / "one"), end(tmp_path / "two")
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)
    assert held.keys() == shared.keys() and held["method/student.local_norm.weight"].shape == (48,)
    anchor, teacher = ("method/anchor.blocks.0.mlp.w1.weight", "method/teacher.backbone.blocks.0.mlp.w1.weight")
    assert not torch.equal(shared[anchor], shared[teacher])
    for name in held:
        if not name.startswith("optimizer/"):
            torch.testing.assert_close(shared[name], held[name], rtol=1e-3, atol=1e-4, msg=name)
    images = torch.rand(2, 3, 32, 32)
    found = [saccade.load(str(tmp_path / name))(images).patches for name in ("one", "two")]
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)
    backbone = saccade.load(str(tmp_path / "two")).backbone
    for name, tensor in backbone.state_dict().items():
        if f"method/teacher.backbone.{name}" in shared:
            torch.testing.assert_close(tensor, shared[f"method/teacher.backbone.{name}"], rtol=0, atol=0)
