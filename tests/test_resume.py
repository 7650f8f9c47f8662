"""A run that was stopped, killed or damaged goes on, and ends where one that was never disturbed ends."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from PIL import Image
from toys import forge

from saccade import distributed
from saccade.errors import SaccadeError
from saccade.run import _HELD, Run, holding, verify, write_json


@pytest.fixture(scope="module")
def undisturbed(workshop: forge.Forge, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of twelve steps, saved every third, whose pictures grow after the sixth."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    told = workshop.session(out, data)
    assert told["codes"] == [0] and "Warning" not in told["said"], told["said"]
    losses = [entry["loss"] for entry in Run(out).metrics()]
    held = tensors(out / "checkpoints" / "12")
    assert losses[6] < 0.8 * losses[0] and held["optimizer/head.weight/step"] == 12, "a stage began anew"
    assert held["optimizer/places/step"] == 6 and held["method/places"].shape == (9, 3), "this one is the stage's own"
    return out


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds."""
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in distributed.metadata(checkpoint).state_dict_metadata.items()
    }
    distributed.load_tensors(found, checkpoint, distributed.Ranks(0, 1, torch.device("cpu")))
    return found


def outcome(out: Path) -> dict[str, Any]:
    """All that must be the same, to the bit, in two runs that were asked for the same."""
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    held = {
        f"{path.name}/{name}": blake3(tensor.numpy().tobytes()).hexdigest()
        for path in Run(out).steps()
        for name, tensor in tensors(path).items()
    }
    assert any(name.endswith("exp_avg_sq") for name in held) and any("teacher" in name for name in held)
    return {
        "tensors": held,
        "backbone": blake3((out / "backbone" / "model.safetensors").read_bytes()).hexdigest(),
        "metrics": [(entry["step"], entry["loss"], entry["guess"], entry["gradient_norm"]) for entry in logged],
        "files": sorted(path.name for path in (*out.iterdir(), *(out / "checkpoints").iterdir())),
    }


def killed_again_and_again(workshop: forge.Forge, data: Path, place: Path, undisturbed: Path, kills: int) -> None:
    """Runs, each killed until it has ended in spite of that, `kills` times together; every second one inside a save."""
    dice, expected, done, saving, number = random.Random(kills), outcome(undisturbed), 0, 0, 0
    while done < kills:
        out, number, ended = place / str(number), number + 1, False
        while not ended:
            stop: dict[str, Any] | None = {"delay": dice.uniform(0.05, 1.2)}
            if done % 2:
                stop = {"saving": dice.choice([0, dice.uniform(0, 0.004), dice.uniform(0, 0.03)])}
            told = workshop.session(out, data, stop=stop if done < kills else None)
            assert told["codes"][0] in (0, -9), told["said"]
            assert "Traceback" not in told["said"] and "damaged" not in told["said"], told["said"]
            ended = told["codes"] == [0]
            done, saving = done + (not ended), saving + told["half"]
        assert [entry[0] for entry in outcome(out)["metrics"]] == list(range(1, 13))
        assert outcome(out) == expected, f"run {number}"
    assert saving >= kills // 4, "too few kills fell into a save"


def test_a_run_killed_at_random_moments_ends_with_the_weights_of_one_never_killed(
    workshop: forge.Forge, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    killed_again_and_again(workshop, data, tmp_path, undisturbed, 6)


@pytest.mark.slow  # about a minute
def test_and_so_it_does_after_twenty_kills(
    workshop: forge.Forge, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    killed_again_and_again(workshop, data, tmp_path, undisturbed, 20)


@pytest.mark.parametrize("step", [3, 6, 9])
def test_a_run_with_stages_goes_on_on_both_sides_of_a_boundary_and_on_it(
    workshop: forge.Forge, data: Path, undisturbed: Path, tmp_path: Path, step: int
) -> None:
    """Every `step` steps a save: killed after the first, resumed at 3 in the first stage, at 6 between, at 9 beyond."""
    told = workshop.session(tmp_path / "run", data, stop={"step": step}, save_every=str(step))
    assert told["codes"] == [-9], told["said"]
    assert [int(path.name) for path in Run(tmp_path / "run").steps()] == [step]
    told = workshop.session(tmp_path / "run", data)
    assert told["codes"] == [0] and f"going on at step {step} of 12" in told["said"], told["said"]
    assert outcome(tmp_path / "run")["backbone"] == outcome(undisturbed)["backbone"]
    assert outcome(tmp_path / "run")["metrics"] == outcome(undisturbed)["metrics"]


def test_a_stop_on_request_saves_and_the_same_command_goes_on(
    workshop: forge.Forge, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    told = workshop.session(tmp_path / "run", data, stop={"step": 3, "signal": "SIGTERM"}, save_every="3")
    assert told["codes"] == [75] and told["said"].count("saccade:") == 1, told["said"]
    saved = next(Run(tmp_path / "run").steps())
    assert f"stopped on request at step {saved.name} of 12" in told["said"] and int(saved.name) < 12
    assert workshop.session(tmp_path / "run", data)["codes"] == [0]
    assert outcome(tmp_path / "run")["backbone"] == outcome(undisturbed)["backbone"]
    assert outcome(tmp_path / "run")["metrics"] == outcome(undisturbed)["metrics"]


def test_a_kill_while_the_directory_is_being_claimed_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / ".writing-config.json").write_text('{"verb": "pre')
    run = Run.claim(tmp_path, {"verb": "pretrain"})
    (tmp_path / ".writing-record.json").write_text("{")
    (run.checkpoints / ".writing-3").mkdir(parents=True)
    run.tidy()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checkpoints", "config.json"]


class Trap:
    """A pickle that would leave a trace."""

    def __init__(self, trace: Path):
        self.trace = str(trace)

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


def resealed(checkpoint: Path) -> None:
    """A manifest that fits the files, as somebody with bad intent would write one."""
    from saccade.run import _digest, _hashed

    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest.pop("blake3")
    manifest["files"] = {name: _hashed(checkpoint / name) for name in manifest["files"]}
    write_json(checkpoint / "manifest.json", {**manifest, "blake3": _digest(manifest)})


def test_a_hostile_metadata_is_refused_and_nothing_in_it_runs(
    workshop: forge.Forge, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    trace, out = tmp_path / "trace", tmp_path / "run"
    hostile = pickle.dumps(Trap(trace))
    pickle.loads(hostile)
    assert trace.exists(), "the trap does not work"
    trace.unlink()
    shutil.copytree(undisturbed, out)
    (out / "checkpoints" / "12" / ".metadata").write_bytes(hostile)
    with pytest.raises(SaccadeError, match="12 is refused, nothing in it was run"):
        distributed.metadata(out / "checkpoints" / "12")
    resealed(out / "checkpoints" / "12")
    told = workshop.session(out, data)
    assert told["codes"] == [2] and told["said"].count("\n") == 1, told["said"]
    assert "12 is refused, nothing in it was run" in told["said"] and "posix.system" in told["said"]
    assert not trace.exists()


def test_an_unpickler_lets_in_no_attribute_of_what_it_knows() -> None:
    metadata = "torch.distributed.checkpoint.metadata"
    for module, name in [(metadata, "os.system"), ("torch", "load"), ("torch", "hub.load"), ("builtins", "eval")]:
        stream = b"\x80\x04\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(name)]) + name.encode()
        with pytest.raises(pickle.UnpicklingError, match="it names"):
            distributed._Careful(io.BytesIO(stream + b"\x93.")).load()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped tensors": lambda checkpoint: flip(checkpoint / "__0_0.distcp"),
    "flipped metadata": lambda checkpoint: flip(checkpoint / ".metadata"),
    "cut": lambda checkpoint: os.truncate(checkpoint / "__0_0.distcp", 1000),
    "no tensors": lambda checkpoint: (checkpoint / "__0_0.distcp").unlink(),
    "no manifest": lambda checkpoint: (checkpoint / "manifest.json").unlink(),
    "empty manifest": lambda checkpoint: (checkpoint / "manifest.json").write_text(""),
    "another step's": lambda checkpoint: (checkpoint / "manifest.json").write_text(
        (checkpoint / "manifest.json").read_text().replace('"step": 12', '"step": 11')
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found(undisturbed: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    run, said = Run(tmp_path / "run"), []
    assert run.newest(said.append)[0].name == "12" and not said
    DAMAGE[damage](run.checkpoints / "12")
    found, manifest = run.newest(said.append)
    assert found.name == "9" and manifest["step"] == 9
    assert len(said) == 1 and str(run.checkpoints / "12") in said[0] and "\n" not in said[0]


def test_a_damaged_checkpoint_is_named_and_the_older_one_used(
    workshop: forge.Forge, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    flip(out / "checkpoints" / "12" / "__0_0.distcp")
    told = workshop.session(out, data)
    assert told["codes"] == [0], told["said"]
    assert "passed over a damaged checkpoint" in told["said"] and "going on at step 9 of 12" in told["said"]
    assert outcome(out) == outcome(undisturbed)


def test_a_damaged_checkpoint_ahead_takes_no_good_ones_place(tmp_path: Path) -> None:
    run, ranks = Run(tmp_path), distributed.Ranks(0, 1, torch.device("cpu"))
    (run.checkpoints / "9").mkdir(parents=True)
    for step in (3, 6, 7, 8):
        run.save(step, {}, lambda path: distributed.save_tensors({"a": torch.ones(2)}, path, ranks), ranks)
    assert [path.name for path in run.steps()] == ["9", "8", "7"]
    assert verify(run.checkpoints / "8")["step"] == 8


def test_the_best_checkpoint_outlives_the_others(tmp_path: Path) -> None:
    run, ranks = Run(tmp_path), distributed.Ranks(0, 1, torch.device("cpu"))
    for step, best in [(3, 3), (6, 3), (7, 3), (8, 3), (9, 9), (10, 9), (11, 9)]:
        run.save(step, {}, lambda path: distributed.save_tensors({"a": torch.ones(2)}, path, ranks), ranks, best=best)
        assert (run.checkpoints / str(best)).exists()
    assert [path.name for path in run.steps()] == ["11", "10", "9"]


def test_two_processes_do_not_share_a_directory(
    workshop: forge.Forge, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    with holding():
        Run.claim(undisturbed, Run(undisturbed).config)
        told = workshop.session(undisturbed, data)
        assert told["codes"] == [2] and told["said"].count("\n") == 1, told["said"]
        assert f"another process is training in {undisturbed}" in told["said"]
        with pytest.raises(SaccadeError, match="another process is training"):
            Run.claim(undisturbed, Run(undisturbed).config)
        handle, child = _HELD[undisturbed.resolve()], os.fork()
        if not child:  # a worker, which may outlive a parent that was killed
            os._exit(os.path.exists(f"/dev/fd/{handle}"))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "it would keep the parent's lock"
        assert os.path.exists(f"/dev/fd/{handle}")
    assert workshop.session(undisturbed, data)["codes"] == [0], "and then it is free"


def test_another_request_in_the_same_directory_is_refused_and_named(
    workshop: forge.Forge, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    told = workshop.session(undisturbed, data, lr=0.5)
    assert told["codes"] == [2] and told["said"].count("\n") == 1
    assert "holds another run" in told["said"] and "lr was 0.02, and is 0.5 now" in told["said"], told["said"]
    (tmp_path / "mine.txt").write_text("not yours")
    told = workshop.session(tmp_path, data)
    assert told["codes"] == [2] and "is not a run directory" in told["said"] and told["said"].count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt"]
    with pytest.raises(SaccadeError, match="is not a run directory"):
        Run.open(tmp_path)


def test_changed_data_are_refused_on_resume(
    workshop: forge.Forge, undisturbed: Path, data: Path, tmp_path: Path
) -> None:
    out, mine = tmp_path / "run", tmp_path / "pictures"
    shutil.copytree(data, mine)
    assert workshop.session(out, mine, steps=2)["codes"] == [0]
    Image.new("RGB", (40, 34), "red").save(mine / "0.png")
    told = workshop.session(out, mine, steps=2)
    assert told["codes"] == [2] and "the data changed" in told["said"] and "other contents" in told["said"]
    (mine / "0.png").unlink()
    told = workshop.session(out, mine, steps=2)
    assert told["codes"] == [2] and "30 samples then, 29 now" in told["said"] and told["said"].count("\n") == 1


def test_a_checkpoint_of_another_architecture_is_refused(undisturbed: Path) -> None:
    found = tensors(undisturbed / "checkpoints" / "12")
    ranks = distributed.Ranks(0, 1, torch.device("cpu"))
    name = next(iter(found))
    wrong = {**found, name: torch.empty(7, 7), "method/more": torch.empty(1)}
    wrong.pop(list(found)[1])
    with pytest.raises(SaccadeError, match=r"architecture: 1 missing .*1 unexpected .*1 of another shape") as error:
        distributed.load_tensors(wrong, undisturbed / "checkpoints" / "12", ranks)
    assert "\n" not in str(error.value)


def test_a_mistake_before_the_first_step_leaves_the_directory_free(tmp_path: Path) -> None:
    def claim(arch: str) -> Run:
        with holding():
            return Run.claim(tmp_path / "run", {"verb": "pretrain", "settings": {"arch": arch}})

    claim("resnet18").note(data={"samples": 3})
    run = claim("resnet-18/8")
    assert run.config["settings"] == {"arch": "resnet-18/8"} and run.record == {}
    run.log({"step": 1, "loss": 1.0, "seconds": 1.0})
    with pytest.raises(SaccadeError, match="arch was resnet-18/8, and is vit-s/16 now"):
        claim("vit-s/16")
