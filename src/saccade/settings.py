"""What can be set: the settings of every verb and those that all recipes share. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from saccade.errors import SaccadeError, nearest


class Settings(BaseModel):
    """Frozen, and a name it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Training(Settings):
    """What the one loop reads. A recipe's `Config` extends it with the paper's values and its own knobs."""

    arch: str = Field(
        "vit-b/16", description="backbone: size and patch or stride, e.g. vit-s/16, resnet-18/8, convnext-t/32"
    )
    image_size: int = Field(224, ge=1, description="side of the (largest) training crop in pixels")
    channels: int = Field(3, ge=1, description="channels of a picture; 3 turns grey and palette pictures into RGB")
    steps: int | None = Field(None, ge=1, description="length in optimizer steps")
    epochs: float | None = Field(None, gt=0, description="length in passes over the data")
    minutes: float | None = Field(
        None, gt=0, description="length in minutes: some steps of each stage are timed, then steps are fixed"
    )
    batch: int = Field(256, ge=1, description="samples an optimizer step, over all ranks and accumulation together")
    accumulate: int = Field(1, ge=1, description="micro-batches an optimizer step")
    lr: float = Field(1.5e-4, gt=0, description="learning rate at batch 256; scaled linearly with the batch")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end; not scaled")
    warmup: float = Field(0.05, ge=0, le=1, description="part of training in which the learning rate rises from 0")
    weight_decay: float = Field(0.05, ge=0, description="AdamW's decay, on matrices only")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first decay rate")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's second decay rate")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="learning rate falls by this factor a layer, from the last to the first"
    )
    clip: float | None = Field(None, gt=0, description="largest gradient norm of a clip group")
    seed: int = Field(0, ge=0, description="every random number follows from it")

    def fitted(self, samples: int) -> Training:
        """The settings for so many samples to learn from, where some follow from that."""
        return self

    def peak(self) -> float:
        """The highest learning rate."""
        return self.lr * self.batch / 256

    def rate(self, t: float) -> float:
        """The learning rate at `t`, as a part of the highest: up in a line, then down to `min_lr` along a cosine."""
        if t < self.warmup:
            return t / self.warmup
        low = self.min_lr / self.peak()
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * (t - self.warmup) / max(1 - self.warmup, 1e-12)))

    def sides(self) -> dict[str, int]:
        """The sides of what the backbone sees in training, by the setting that says them."""
        return {"image_size": self.image_size}

    def texts(self) -> bool:
        """Whether samples are read with their texts; one that has none then counts as unreadable."""
        return False

    def pieces(self) -> int | None:
        """How long a sample is, in bytes, where samples are pieces of text files; None: they are pictures."""
        return None

    def read_as(self) -> dict[str, Any]:
        """What `open_source` is told of the samples."""
        return {"channels": self.channels, "texts": self.texts(), "pieces": self.pieces()}

    def keeps_start(self) -> bool:
        """Whether the backbone stays what it begins with: then one must be given, which says architecture and sizes."""
        return False

    def canvas(self) -> int | None:
        """Short side in pixels to which a picture may be shrunk at decoding; None keeps every pixel."""
        return None

    def backbone(self) -> dict[str, Any]:
        """Switches of the ViT that this recipe wants different from the default."""
        return {}

    def teachers(self) -> dict[str, str | None]:
        """Trained backbones that this recipe learns from and never moves, by the setting that names each."""
        return {}


class Worded(Training):
    """What methods share that read the words of pictures."""

    tokenizer: str | None = Field(
        None, description="folder or file of the words' tokenizer; none: one is trained on the texts"
    )
    vocabulary: int = Field(8192, ge=516, description="words of a tokenizer that is trained; a given one has its own")
    length: int = Field(64, ge=3, description="tokens of a text: longer ones are cut, shorter ones filled up")
    text_width: int = Field(512, ge=1, description="width of a text's token")
    text_depth: int = Field(12, ge=1, description="blocks of the text tower")
    text_heads: int = Field(8, ge=1, description="attention heads of the text tower")
    special: tuple[int, int, int] = Field((1, 2, 0), description="tokens of begin, end and padding; the tokenizer's")
    mask: int = Field(3, description="token of what is hidden; the tokenizer's, -1 where it has none")

    def texts(self) -> bool:
        """They do."""
        return True


class Captioned(Worded):
    """What methods share that learn which words belong to which picture."""

    min_scale: float = Field(1.0, gt=0, le=1, description="smallest crop, as a part of the picture's area; 1: no crop")
    flip: float = Field(0.0, ge=0, le=1, description="how often a picture is mirrored; texts say left and right")

    def canvas(self) -> int:
        """The smallest crop of a square picture still has a pixel for each of its own."""
        return math.ceil(self.image_size / math.sqrt(self.min_scale))


class SigmoidPaired(Captioned):
    """What SigLIP and SigLIP 2 share: training from scratch on 40 billion pairs (arXiv 2303.15343, section 4.2)."""

    batch: int = Field(32768, ge=2, description="samples an optimizer step, over all ranks and accumulation together")
    steps: int | None = Field(1_220_000, ge=1, description="length in optimizer steps: 40 billion pairs")
    lr: float = Field(
        1e-3 * 256 / 32768, gt=0, description="learning rate at batch 256; scaled linearly with the batch"
    )
    warmup: float = Field(0.016, ge=0, le=1, description="part of training in which the learning rate rises from 0")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW's decay, on matrices only")
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm")
    vocabulary: int = Field(32000, ge=516, description="words of a tokenizer that is trained; a given one has its own")
    text_width: int = Field(768, ge=1, description="width of a text's token")
    text_heads: int = Field(12, ge=1, description="attention heads of the text tower")
    scale: float = Field(10.0, gt=0, description="factor of cosines at the start; it is learned")
    bias: float = Field(-10.0, description="added to every logit at the start; it is learned")


class MultiCrop(Training):
    """What methods share that look at large and small crops (arXiv 2006.09882); `augment.multi_crop` makes them."""

    global_scale: tuple[float, float] = Field((0.4, 1.0), description="area of a large crop, as parts of the picture")
    local_scale: tuple[float, float] = Field((0.05, 0.4), description="area of a small crop")
    local_crops: int = Field(8, ge=0, description="small crops, which only the student sees")
    local_size: int = Field(96, ge=1, description="side of a small crop in pixels")
    flip: float = Field(0.5, ge=0, le=1, description="how often a view is mirrored; 0 where that is another thing")
    colour: float = Field(1.0, ge=0, description="strength of the colour jitter")
    grey: float = Field(0.2, ge=0, le=1, description="how often a view loses its colour")
    blur: float = Field(1.0, ge=0, le=1, description="how often views are blurred, as a part of the method's rates")
    solarise: float = Field(0.2, ge=0, le=1, description="how often the second large crop is solarised")

    def sides(self) -> dict[str, int]:
        """The sides of large and of small crops."""
        return {"image_size": self.image_size} | ({"local_size": self.local_size} if self.local_crops else {})

    def canvas(self) -> int:
        """The smallest crop of a square picture still has a pixel for each of its own."""
        small = self.local_size / math.sqrt(self.local_scale[0]) if self.local_crops else 0
        return math.ceil(max(self.image_size / math.sqrt(self.global_scale[0]), small))


class Prototyped(MultiCrop):
    """What methods share that tell by prototypes what crops have in common."""

    prototypes: int | None = Field(
        None,
        ge=2,
        description="width of a head's output; if not given, what the pictures are enough for (the paper's at most)",
    )
    hidden: int = Field(2048, ge=1, description="width inside a head")
    head_norm: bool = Field(False, description="batch norm inside a head: for short runs")
    student_temperature: float = Field(0.1, gt=0, description="of the student's softmax")
    teacher_temperature: float = Field(0.07, gt=0, description="of the teacher's softmax; lower is sharper")
    momentum: float = Field(0.996, ge=0, le=1, description="what the teacher keeps a step at the start; 1 at the end")
    centre_momentum: float = Field(0.9, ge=0, lt=1, description="what the centre of the teacher's logits keeps a step")

    most_prototypes: ClassVar[int] = 65536

    def fitted(self, samples: int) -> Prototyped:
        """Without a number of prototypes: the power of two next to an eighth of the samples, from 256 to the paper's.

        On ImageNet, a million pictures, that is DINO's own number; a thousand pictures cannot tell 65,536 apart.
        """
        if self.prototypes is not None:
            return self
        power = 2 ** round(math.log2(max(samples, 1) / 8))
        return self.model_copy(update={"prototypes": min(self.most_prototypes, max(256, power))})


class SelfDistillation(Prototyped):
    """What methods share whose student learns the prototypes that its own slow average sees (DINO and after)."""

    min_lr: float = Field(1e-6, ge=0, description="learning rate at the end; not scaled")
    weight_decay: float = Field(0.04, ge=0, description="AdamW's decay at the start, on matrices only")
    weight_decay_end: float = Field(0.4, ge=0, description="AdamW's decay at the end")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second decay rate")
    clip: float | None = Field(3.0, gt=0, description="largest gradient norm of a clip group")
    drop_path: float = Field(0.1, ge=0, lt=1, description="how often a residual branch of the student is left out")
    first_temperature: float = Field(0.04, gt=0, description="of the teacher's softmax at the start")
    temperature_warmup: float = Field(0.3, gt=0, le=1, description="part of training between these two")
    freeze: float = Field(0.01, ge=0, le=1, description="part of training in which the prototypes stand still")


class MaskedDistillation(SelfDistillation):
    """What they share that hide patches of the large crops from the student (iBOT and after)."""

    masked: float = Field(0.5, ge=0, le=1, description="part of the large crops of which patches are hidden")
    mask_ratio: tuple[float, float] = Field((0.1, 0.5), description="least and most that is hidden of such a crop")
    patch_weight: float = Field(1.0, ge=0, description="weight of the patches' loss beside the class token's")


class SpreadDistillation(MaskedDistillation):
    """What DINOv2 and DINOv3 share: heads for class token and patches, and embeddings that keep apart."""

    global_scale: tuple[float, float] = Field((0.32, 1.0), description="area of a large crop, as parts of the picture")
    local_scale: tuple[float, float] = Field((0.05, 0.32), description="area of a small crop")
    drop_path: float = Field(0.3, ge=0, lt=1, description="how often each of the student's blocks is left out")
    patch_embed_rate: float = Field(0.2, ge=0, le=1, description="the patch embedding's learning rate, as a part")
    layer_scale: float = Field(1e-5, gt=0, description="factor of the residual branches at the start")
    registers: int = Field(0, ge=0, description="register tokens; 4 in the models that have them")
    patch_prototypes: int | None = Field(None, ge=2, description="width of the patches' own head; prototypes if unset")
    bottleneck: int = Field(256, ge=1, description="width that is compared with prototypes")
    patch_hidden: int | None = Field(None, ge=1, description="width inside the patches' own head; hidden if unset")
    patch_bottleneck: int | None = Field(None, ge=1, description="its bottleneck; bottleneck if unset")
    queue: int = Field(0, ge=0, description="former large crops beside a step's in Sinkhorn-Knopp, of whole steps")
    koleo_weight: float = Field(0.1, ge=0, description="weight of the loss that spreads embeddings apart")
    koleo_group: int = Field(
        16, ge=2, description="samples among which it looks for the nearest; divides a micro-batch"
    )


_WORD = "stands without a flag"
Word = Annotated[str, _WORD]
WordList = Annotated[tuple[str, ...], _WORD]
"""Arguments that stand without a flag on the command line."""

LENGTHS = ("steps", "epochs", "minutes")
"""The settings that say how long a run is; exactly one counts."""


BACKBONE = "run, folder, file (.safetensors, .pth, .npz, .onnx) or published name (name@revision pins it)"


class RunArguments(Settings):
    """What every run can be told, whichever recipe it follows."""

    data: WordList = Field(min_length=1, description="folders, list files, tar shards or Parquet; several are mixed")
    out: str = Field(description="run directory; the same command on it goes on where it stopped")
    weights: tuple[float, ...] | None = Field(
        None, description="share of each DATA in the mix, e.g. 3,1; by size if not given"
    )
    eval: str | None = Field(
        None, description="labelled folder: ten times a part held out of its train side, and its test side at the end"
    )
    group_by: str | None = Field(None, description="pattern over keys, or a column: what it finds is never split")
    workers: int | None = Field(
        None, ge=0, description="processes that read and decode; chosen from the cores if not given"
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads of a training process; torch's choice if not given"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 or fp16 on a GPU, fp32 on a CPU"
    )
    compile: bool = Field(False, description="compile the method's forward")
    sharding: Literal["ddp", "fsdp"] = Field("ddp", description="how several ranks share the model: copied or sharded")
    max_unreadable: float = Field(0.1, ge=0, le=1, description="share of unreadable samples above which the run ends")
    save_every: str = Field(
        "10m",
        pattern=r"^\d+(\.\d+)?m$|^[1-9]\d*$",
        coerce_numbers_to_str=True,
        description="between checkpoints: minutes (10m) or steps (500)",
    )
    log_every: int = Field(10, ge=1, description="steps between two lines of metrics.jsonl")


class PretrainArguments(RunArguments):
    """Learn a representation from unlabelled pictures."""

    recipe: str = Field(description="the method, and its variant if wanted: NAME or NAME:VARIANT")
    init: str | None = Field(None, description=f"backbone to start from: {BACKBONE}")


class AdaptArguments(RunArguments):
    """Go on from a backbone on your own pictures, and keep the result only where a test says that it is better."""

    start: str = Field(description=f"backbone to go on from: {BACKBONE}")
    recipe: str | None = Field(
        None, description="the method; the one nearest to how the backbone was made if not given"
    )
    eval: str | None = Field(
        None, description="labelled folder; of its train side a part chooses the checkpoint and another one judges it"
    )
    warm: float = Field(
        0.3, ge=0, lt=1, description="part of the steps, at most, in which fresh heads learn on a still backbone"
    )
    backbone_rate: float = Field(0.4, gt=0, le=1, description="the backbone's learning rate, as a part of the heads'")
    anchor_patches: float = Field(
        1.0, ge=0, description="weight of the distance from the start in how alike the patches of a picture are"
    )
    anchor_token: float = Field(1.0, ge=0, description="weight of the distance from the start in the pooled vector")
    anchor_text: float = Field(
        1.0, ge=0, description="weight of the distance from the start in how well words fit a picture (CLIP, SigLIP)"
    )
    freeze_blocks: int = Field(0, ge=0, description="blocks, and all before them, that never move")
    lora: int | None = Field(
        None, ge=1, description="learn only what is added to each matrix of the backbone, of this rank (LoRA)"
    )
    looks: int = Field(15, ge=1, description="how often it is evaluated on the way")
    roll_back: bool = Field(
        True,
        description="when the score falls, go back to the best checkpoint at half the rate; end when none gets better",
    )


_SIZE = "side in pixels; the family's own if not given"


class EvaluateArguments(Settings):
    """Measure a backbone, or several beside each other, on labelled pictures, beside raw pixels and untrained."""

    backbone: WordList = Field(min_length=1, description=f"{BACKBONE}; several stand in one table")
    labelled: Word = Field(
        description="folder with train/CLASS/... and test/CLASS/..., or one level that is then split 80/20; for "
        "segmentation train/images/X.jpg, train/masks/X.png, the same in test/ (or val/), and classes.txt; for "
        "retrieval pictures with captions: test.jsonl, test/ with texts beside pictures, a list, or tar shards"
    )
    tasks: tuple[str, ...] = Field(
        ("knn", "linear", "few-label"), description="any of these and zero-shot, or segmentation or retrieval alone"
    )
    labels: tuple[int, ...] = Field((1, 5, 10, 100), description="few-label: how many labels a class")
    templates: str | None = Field(None, description="zero-shot: file of prompts, one a line, {} stands for the class")
    group_by: str | None = Field(None, description="pattern over keys, or a column: what it finds is never split")
    image_size: int | None = Field(None, ge=1, description=_SIZE)
    channels: int | None = Field(None, ge=1, description="channels of the pictures; the backbone's own if not given")
    patch: int | None = Field(None, ge=1, description="side of a patch in pixels; the backbone's own if not given")
    seed: int = Field(0, ge=0, description="of the few-label draws and of the untrained network")
    workers: int = Field(0, ge=0, description="processes that read and decode")
    baselines: bool = Field(True, description="measure raw pixels and the untrained network too")
    scratch: float | None = Field(
        None, gt=0, description="minutes in which the first backbone's network learns from these labels alone"
    )
    out: str | None = Field(None, description="JSON file to write the result to")


class Looking(Settings):
    """Random views of labelled pictures: what a head's augmented copies and a moving backbone see."""

    views: int = Field(0, ge=0, description="frozen: augmented copies of each picture that are learned from too")
    min_scale: float = Field(0.4, gt=0, le=1, description="smallest crop of a view, as a part of the picture's area")
    flip: float = Field(0.5, ge=0, le=1, description="how often a view is mirrored; 0 where that is another thing")
    colour: float = Field(0.0, ge=0, description="strength of the colour jitter")


class TuningSettings(Training):
    """How a backbone moves together with its head."""

    arch: str = Field("", description="set by the backbone")
    image_size: int = Field(224, ge=1, description="set by the backbone")
    channels: int = Field(3, ge=1, description="set by the backbone")
    epochs: float | None = Field(15, gt=0, description="length in passes over the pictures that are learned from")
    batch: int = Field(
        64, ge=1, description="samples an optimizer step, at most: of few pictures so few that an epoch has eight steps"
    )
    lr: float = Field(2e-4, gt=0, description="learning rate at batch 256; grows with the batch's square root")
    warmup: float = Field(0.1, ge=0, le=1, description="part of training in which the learning rate rises from 0")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second decay rate")
    layer_decay: float = Field(
        0.75, gt=0, le=1, description="learning rate falls by this factor a layer, from the last"
    )
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm")
    rank: int = Field(8, ge=1, description="lora: rank of what is added to each matrix")
    head_rate: float = Field(1.0, gt=0, description="the head's learning rate, as a part of the last layer's")
    head_start: bool = Field(True, description="begin with the head that was fitted to frozen features; else afresh")
    mixup: float = Field(0.0, ge=0, description="pictures are mixed in parts drawn from Beta(mixup, mixup); 0: never")
    average: float = Field(
        0.0, ge=0, lt=1, description="what a mean of the weights keeps a step; it comes out; 0: none"
    )
    patience: int = Field(5, ge=1, description="evaluations without a better one after which training ends")
    save_every: str = Field(
        "10m", pattern=r"^\d+(\.\d+)?m$|^[1-9]\d*$", coerce_numbers_to_str=True,
        description="between checkpoints: minutes (10m) or steps (500)",
    )  # fmt: skip
    log_every: int = Field(10, ge=1, description="steps between two lines of metrics.jsonl")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 or fp16 on a GPU, fp32 on a CPU"
    )

    def peak(self) -> float:
        """The highest learning rate: Adam's noise falls with the batch's square root (arXiv 2205.10287)."""
        return self.lr * math.sqrt(self.batch / 256)

    def fewer(self, samples: int) -> int:
        """The batch for so many samples: a power of two where it is less than asked for, eight at least."""
        return min(self.batch, max(8, 2 ** int(math.log2(max(samples, 1) / 8))) if samples >= 8 else 8)

    @staticmethod
    def usual(mode: str, from_scratch: bool) -> dict[str, Any]:
        """What a mode wants otherwise where nothing is said: fresh weights have further to go."""
        if from_scratch:
            return {"epochs": 60.0, "lr": 1e-3, "layer_decay": 1.0, "mixup": 0.2, "patience": 20, "head_start": False}
        return {"layer_decay": 1.0} if mode == "lora" else {}


class FinetuneArguments(Settings):
    """Learn a task from labelled pictures: a head on frozen features, or backbone and head together."""

    backbone: Word = Field(description=BACKBONE)
    data: Word = Field(description="labelled pictures: folders train/CLASS/... and test/CLASS/..., or a list")
    task: str = Field("classification", description="what is to be learned; its own settings: --task NAME --help")
    mode: Literal["frozen", "lora", "full"] = Field(
        "frozen", description="frozen: a head on features computed once; lora: and thin additions; full: all moves"
    )
    out: str = Field(description="run directory; the same command on it goes on where it stopped")
    group_by: str | None = Field(None, description="pattern over keys, or a column: what it finds is never split")
    image_size: int | None = Field(None, ge=1, description=_SIZE)
    channels: int | None = Field(None, ge=1, description="channels of the pictures; the backbone's own if not given")
    from_scratch: bool = Field(False, description="the same architecture with fresh weights, to compare with")
    cache: str | None = Field(None, description="folder in which features are kept for the next run on these pictures")
    seed: int = Field(0, ge=0, description="every random number follows from it")
    workers: int = Field(0, ge=0, description="processes that read and decode")
    threads: int | None = Field(None, ge=1, description="CPU threads; torch's choice if not given")


class PredictArguments(Settings):
    """Let a model of saccade finetune answer for pictures; with labels, also score it."""

    run: Word = Field(description="run directory of saccade finetune")
    data: Word = Field(description="pictures: a folder, a list, tar shards; labelled or not")
    out: str | None = Field(None, description="new folder for predictions.jsonl and what a task makes of each picture")
    workers: int = Field(0, ge=0, description="processes that read and decode")
    threads: int | None = Field(None, ge=1, description="CPU threads; torch's choice if not given")


class DiagnoseArguments(Settings):
    """Say why a classifier of saccade finetune disappoints: labels, leaks, a shifted test set, backbone or head."""

    run: Word = Field(description="run directory of saccade finetune, task classification")
    data: str | None = Field(None, description="where the pictures are now, if not where the run found them")
    workers: int = Field(0, ge=0, description="processes that read and decode")
    threads: int | None = Field(None, ge=1, description="CPU threads; torch's choice if not given")


class EmbedArguments(Settings):
    """Turn pictures into vectors. The same command goes on where it stopped."""

    backbone: Word = Field(description=BACKBONE)
    data: WordList = Field(min_length=1, description="folders, list files, tar shards or Parquet")
    out: str = Field(description="index directory")
    tokens: tuple[str, ...] | None = Field(
        None,
        description="what is kept of a picture: cls, mean, patches, pair (in the space of texts); if not given, pair "
        "where there is a text tower, else cls, or mean",
    )
    image_size: int | None = Field(None, ge=1, description=_SIZE)
    channels: int | None = Field(None, ge=1, description="channels of the pictures; the backbone's own if not given")
    patch: int | None = Field(None, ge=1, description="side of a patch in pixels; the backbone's own if not given")
    workers: int = Field(0, ge=0, description="processes that read and decode")
    batch: int = Field(64, ge=1, description="pictures that go through the backbone together")


class SearchArguments(Settings):
    """Find the nearest neighbours of a picture, or of words, in an index."""

    index: Word = Field(description="index directory")
    image: str | None = Field(None, description="query: a picture file")
    text: str | None = Field(None, description="query: words, where the backbone has a text tower")
    key: str | None = Field(None, description="query: a key of the index")
    k: int = Field(10, ge=1, description="how many neighbours")

    @model_validator(mode="after")
    def _one_query(self) -> SearchArguments:
        if sum(query is not None for query in (self.image, self.text, self.key)) != 1:
            raise ValueError("give exactly one of --image, --text and --key")
        return self


class LabelNextArguments(Settings):
    """Propose the pictures to label next: those that stand for most others, then those a head is in doubt of."""

    backbone: Word = Field(description=BACKBONE)
    data: Word = Field(description="folder, list file or tar shards")
    n: int = Field(50, ge=1, description="how many pictures")
    labels: str | None = Field(
        None, description="what is labelled already: a list (key, label), or a folder with a folder for each class"
    )
    out: str | None = Field(None, description="list to fill in, .csv or .jsonl; a page with the pictures beside it")
    index: str | None = Field(None, description="directory that keeps the vectors for the next round")
    group_by: str | None = Field(None, description="pattern over keys, or a column: groups to spread over")
    image_size: int | None = Field(None, ge=1, description=_SIZE)
    channels: int | None = Field(None, ge=1, description="channels of the pictures; the backbone's own if not given")
    patch: int | None = Field(None, ge=1, description="side of a patch in pixels; the backbone's own if not given")
    workers: int = Field(0, ge=0, description="processes that read and decode")
    seed: int = Field(0, ge=0, description="of the choice of pictures that are looked at, where there are very many")


class ModelsArguments(Settings):
    """List the published checkpoints that are known: parameters, licence, training data, whether in the cache."""

    pattern: Word = Field("*", description="part of a name or of a family; * and ? stand for anything")


class ExportArguments(Settings):
    """Write a backbone for transformers, timm or onnxruntime, and compare what they make of it."""

    backbone: Word = Field(description=BACKBONE)
    to: Literal["hf", "timm", "onnx", "safetensors"] = Field(
        description="hf: transformers' AutoModel; timm: its create_model; onnx: onnxruntime, without Python too; "
        "safetensors: the tensors alone, by the authors' own names, or saccade's"
    )
    out: str = Field(description="new folder")
    int8: str | None = Field(
        None, description="onnx: an int8 copy too, if it finds the same neighbours among these pictures (164 or more)"
    )

    @model_validator(mode="after")
    def _int8_is_onnx(self) -> ExportArguments:
        if self.int8 is not None and self.to != "onnx":
            raise ValueError("int8 goes with --to onnx")
        return self


class TourArguments(Settings):
    """Pretrain, evaluate, embed and search on pictures that come with the package."""

    out: str = Field("saccade-tour", description="directory for the run, the index and the report")


S = TypeVar("S", bound=Settings)


_SPELLED = {"start": "from"}
"""What is a word of Python's own, and so has another name there."""


def flag(name: str) -> str:
    """A setting as it is spelled on the command line."""
    return "--" + _SPELLED.get(name, name).replace("_", "-")


def words(model: type[Settings]) -> list[str]:
    """The arguments of a verb that stand without a flag."""
    return [name for name, field in model.model_fields.items() if _WORD in field.metadata]


def spelled(model: type[Settings], name: str) -> str:
    """A setting of this model as a user writes it: `--flag`, or WORD where it stands without one."""
    return name.upper() if name in words(model) else flag(name)


def checked(model: type[S], values: Mapping[str, Any], *, owner: str, also: Iterable[str] = ()) -> S:
    """The values as a validated `model`; a mistake becomes a one-line error that names the setting.

    `owner` is the verb or recipe that the error names; `also` are more right names, for the hint: a verb's own
    arguments beside a recipe's settings. Raises `SaccadeError`.
    """
    known = {flag(name) for name in (*model.model_fields, *also)}
    for name in values:
        if name not in model.model_fields:
            raise SaccadeError(f"{owner} has no setting {flag(name)}", path=flag(name), hint=nearest(flag(name), known))
    try:
        return model.model_validate(dict(values))
    except ValidationError as mistakes:
        raise _one_line(mistakes, model, owner) from None


def _one_line(mistakes: ValidationError, model: type[Settings], owner: str) -> SaccadeError:
    """The first of pydantic's findings in our words."""
    first = mistakes.errors()[0]
    reason = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return SaccadeError(f"{owner}: {reason}")
    name = str(first["loc"][0])
    path, about = spelled(model, name), model.model_fields[name].description
    if first["type"] in ("missing", "too_short"):
        return SaccadeError(f"{owner} needs {path}", path=path, hint=about)
    return SaccadeError(f"{path} {first['input']}: {reason[:1].lower() + reason[1:]}", path=path, hint=about)


def from_file(path: str | Path) -> dict[str, Any]:
    """The settings of a YAML file; dashes and underscores are the same. Raises `SaccadeError`."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as trouble:
        raise SaccadeError(
            f"cannot read the settings: {trouble.strerror}", path=path, hint="--config names a YAML file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as trouble:
        reason = str(trouble).replace("\n", " ")
        raise SaccadeError(f"this is not YAML: {reason}", path=path, hint="one `setting: value` a line") from None
    if not isinstance(content, dict):
        raise SaccadeError("a settings file holds names and values", path=path, hint="one `setting: value` a line")
    own = {spelled: name for name, spelled in _SPELLED.items()}
    return {
        own.get(name, name): value for name, value in ((str(key).replace("-", "_"), content[key]) for key in content)
    }


def json_object(path: Path) -> dict[str, Any]:
    """What a JSON file of names and values holds. Raises `SaccadeError`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SaccadeError(f"{path} cannot be read: {error}", path=path, hint="copy it again") from None
    if not isinstance(found, dict):
        raise SaccadeError(f"{path} is no JSON object", path=path, hint="copy it again")
    return found
