"""The one schema of a run. Defaults live here and nowhere else."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PrivateAttr, field_validator, model_validator

from pipeline.config.reading import NOT_TEXT
from pipeline.config.section import Section, aside, content, refuse_infinite

# Bounds beyond which a value can only be a slip: refused before any work, not by a machine that ran out of memory.
MAX_BATCH = 4096  # images at once: 3 GB as bytes at 512 x 512
MAX_SIDE = 2048  # pixels of a view, four times the paper's: attention over its 16,384 tokens is 1 GB a head
MAX_THREADS = 1024  # more than a machine has cores; OpenMP's pool dies of 100,000
MAX_PROCESSES = 256  # on one machine, GPUs or loaders, 0.45 GB each
MAX_ITERATIONS = 10**8  # 1,000 times the paper's longest schedule
MAX_BANK = 10_000  # 400 times the paper's: 0.3 GB of CLS tokens at a batch of 16
MAX_NEGATIVES = 1_000_000  # 2 GB of CLS tokens, four views of all COCO images are 473,148
MAX_PICTURES = 10_000  # in one HTML page
MAX_LISTED = 1000  # numbers in a list of a setting
MAX_NAME = 200  # bytes: file systems take 255, and variants, stages and partial files add to a run's name
SECOND_MODEL = "timm:vit_base_patch14_dinov2"
MIN_STRIDE = 0.01  # of a window: 10,000 overlapping views of every pixel


@dataclass(frozen=True)
class Option:
    """An option of a data set, the same word meaning the same in all of them, and what a change of it bears on.

    `all` that is made of the data set; its `labels`; its `test` part; which `samples` there are, not what any of them
    is; or only its `place`, of which a cache needs nothing: ids and stamps say what it holds.
    """

    meaning: str
    bears_on: Literal["all", "labels", "test", "samples", "place"] = "all"


OPTIONS = {
    "root": Option("its folder", "place"),
    "limit": Option("only the first so many samples of each part, for tries", "samples"),
    "unseen": Option("names of the classes without a label in training; instead of a split", "labels"),
    "split": Option("a named split into seen and unseen; the first one if left out", "labels"),
    "background": Option("what is no object is a class of its own"),
    "num_classes": Option(
        "of context 59, or all 459 (`prepare context459`); of ade20k 150, or 847 of the full release (`prepare ade847`)"
    ),
    "tags": Option("where image-level labels come from: xml or masks of voc, masks or json of coco14", "labels"),
    "train_list": Option(
        "the training samples: of voc a list, or several joined by +; of coco14 a file below root", "samples"
    ),
    "test_list": Option("the list of test samples", "test"),
    "seed": Option("of the training scenes"),
    "test_seed": Option("of the test scenes", "test"),
    "train": Option("how many training scenes", "samples"),
    "test": Option("how many test scenes", "test"),
    "size": Option("their side in pixels"),
    "radius": Option("of the things, in sides"),
    "things": Option("how many things a scene has, from and to"),
    "classes": Option("what the classes are called, and which of the world's things each is"),
}


def _folder(path: str) -> str:
    """A path that folders can have, ~ being the home folder. Raises: ValueError."""
    if not path.strip() or path != path.strip():
        raise ValueError(f"{path!r} is no folder's name: it is empty, or blanks are around it")
    if NOT_TEXT.search(path) or "\n" in path or "\r" in path:
        raise ValueError(f"{path!r} holds a control character")
    if any(len(os.fsencode(part)) > MAX_NAME for part in Path(path).parts):
        raise ValueError(f"a folder's name of more than {MAX_NAME} bytes")
    return os.path.expanduser(path)


class Data(Section):
    """Which data set; the options beside `kind` are the data set's own (see pipeline/data)."""

    model_config = ConfigDict(extra="allow", frozen=True)
    kind: str = content(
        "demo",
        description="the data set; its own options are below. Or module:Class of your own, its options in data.options",
    )

    @model_validator(mode="before")
    @classmethod
    def _finite(cls, values: Any) -> Any:
        for name, value in values.items() if isinstance(values, Mapping) else ():
            try:
                refuse_infinite(value)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return values

    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class TeacherSection(Section):
    """The frozen CLIP (docs/teachers.md). `local-dir:` and `hf-hub:` models bring their weights."""

    model: str = content("ViT-B-16-quickgelu", description="an open_clip model, local-dir:folder or hf-hub:repo")
    pretrained: str | None = content("openai", description="an open_clip tag, a checkpoint file or its folder")
    quick_gelu: bool | None = content(None, description="must be stated for a checkpoint file, which can't tell")
    image_size: int = content(512, ge=16, le=MAX_SIDE, description="side of a view in pixels (paper: 512)")
    dense: Literal["paper", "value", "qq", "naclip"] = content(
        "paper", description="what dense tokens are: the last block as it is, or recomputed (open_clip's own ViTs)"
    )
    output_stride: int | None = content(
        None, ge=4, le=32, description="pixels of a token of timm's CNNs, dilated; null: their own, mostly 32"
    )
    precision: Literal["fp32", "bf16", "fp16"] = content("fp32", description="of the whole model")
    batch: int = content(
        8, ge=1, le=MAX_BATCH, description="views per forward, padded to this size so that rows don't depend on it"
    )
    device: str = aside("auto", description="auto, cpu, cuda, cuda:1, ...")
    # Where relative paths of it are looked for first: the folder that a run was made in. No key, and in no fingerprint.
    _near: Path | None = PrivateAttr(default=None)

    @property
    def near(self) -> Path | None:
        return self._near


class Text(Section):
    """Class text features: from the teacher with these templates, or from a file of features."""

    templates: str | list[str] = content("single", description="a named set of pipeline/data/prompts.py or a list")
    features: str | None = content(None, description=".npy of shape (K, C), classes in the data set's order")
    synonyms: str | dict[str, list[str]] = content(
        default_factory=dict,
        description="names that stand for a class in its prompts: averaged for training, the best of them counts on "
        "another data set; what a background is, say; or a named set: maskclip (airplane, dining table, brick wall)",
    )


class Views(Section):
    num: int = content(
        4, ge=1, le=255, description="cached views per image, 4 by evidence/fidelity.md; view 0 is the whole image"
    )


class CacheSection(Section):
    path: str | None = aside(None, description="a folder or an fsspec URL; default runs/<name>/cache")
    tokens: Literal["float16", "int8", "stream", "pooled"] = content(
        "float16",
        description="how dense tokens are kept; stream: clustered in memory, never kept; pooled: their mean alone, "
        "which is all that clip_es needs",
    )
    max_bad: int = aside(10, ge=0, description="more quarantined images than this stop extract")

    @field_validator("path")
    @classmethod
    def _folder(cls, value: str | None) -> str | None:
        return value if value is None or "://" in value else _folder(value)


class Cluster(Section):
    """Pseudo labels: multi-scale K-means and mask fusion (eq. 4-5, Algorithm 1)."""

    sizes: tuple[Annotated[int, Field(ge=1, le=MAX_SIDE)], ...] = content(
        (3, 7), min_length=1, max_length=MAX_LISTED, description="windows per side at each scale (section 3.3)"
    )
    window: Literal["grid", "tokens"] = content("grid", description="the two readings of eq. 4-5")
    iterations: int = content(20, ge=1, le=MAX_ITERATIONS, description="at most this many of Lloyd's (settled)")
    threshold: float = content(0.8, gt=0, lt=1, description="lambda of Algorithm 1 (section 4.2)")
    backend: Literal["faiss", "torch"] = content("faiss", description="torch: a whole shard at once, for GPUs")
    device: str = aside("auto", description="auto takes a GPU when there is one")
    teacher: str | None = content(
        None,
        description="a second model whose tokens are clustered in place of the teacher's: timm:<name>, a model of timm "
        "such as DINOv2; null: the teacher's own",
    )
    teacher_weights: str | None = content(
        None, description="its checkpoint, a file or its folder; null: timm downloads what it has under the name"
    )
    named_above: float | None = content(
        None,
        ge=0,
        le=1,
        description="name potential objects after the unseen classes that an image is tagged with, where the mean of "
        "the tag's refined CAM is at least this (0.3; weakly supervised); null is zero-shot",
    )
    distance: Literal["euclidean"] | None = content(
        None, description="null: cosine, spherical K-means (settled); euclidean: plain means, in torch"
    )
    debug: bool = content(False, description="keep centroids and the map before fusion too")

    # As the teacher's, of teacher_weights.
    _near: Path | None = PrivateAttr(default=None)

    @property
    def near(self) -> Path | None:
        return self._near

    @model_validator(mode="after")
    def _second_model(self) -> Cluster:
        if self.teacher is not None and not re.fullmatch(r"timm:\S+", self.teacher):
            raise ValueError(f"teacher {self.teacher!r}: want timm:<name>, a model of timm such as {SECOND_MODEL}")
        if self.teacher is None and self.teacher_weights is not None:
            raise ValueError(f"teacher_weights are those of cluster.teacher, which is null: name it, {SECOND_MODEL}")
        return self


class Cams(Section):
    """CLIP-ES: refined class activation maps of image-level labels (method section 11)."""

    template: str = content("a clean origami {}.", description="of foreground and background (CLIP-ES)")
    synonyms: str | dict[str, str] = content(
        default_factory=dict, description="what a class is called in the sentence; or a named set"
    )
    background: str | list[str] = content(
        "voc", description="names that the background may be, each its own class in the softmax; or a named set"
    )
    blocks: int = content(8, ge=1, description="last blocks whose attention is averaged (CLIP-ES)")
    sinkhorn: int = content(3, ge=0, le=1000, description="rounds of columns, then rows (CLIP-ES)")
    box_threshold: float = content(
        0.4, gt=0, lt=1, description="share of a CAM's maximum that its boxes hold: 0.4 VOC, 0.7 COCO"
    )
    refine: Literal["none", "pamr", "crf"] = content("none", description="of the masks, at pixels")
    power: float = content(1.0, gt=0, description="of the background score (1 - max)^power")
    max_side: int = content(1024, ge=16, le=4 * MAX_SIDE, description="longer images are made smaller, in pixels")
    batch: int = content(4, ge=1, le=MAX_BATCH, description="images of one size in a forward")
    precision: Literal["fp32", "bf16"] = content("fp32", description="of forward and backward")
    device: str = aside("auto", description="auto, cpu, cuda, ...")
    debug: bool = content(False, description="keep the maps before their refinement too")


class Student(Section):
    """The segmenter that is taught: any net that gives C dense channels; those of smp over any encoder of timm."""

    arch: str = content(
        "Segformer",
        description="a decoder of segmentation_models_pytorch, SegNeXt or DeepLabV2; `torchvision:<name>`; "
        "`hf:<folder or name>`; or a net of your own, `<module>:<Class>` (docs/extending.md)",
    )
    encoder: str = content(
        "tu-pvt_v2_b0",
        first="mit_b0",
        description="of decoders: an encoder of segmentation_models_pytorch; `tu-<name>` is timm's",
    )
    encoder_weights: str | None = content(
        "imagenet", description="null trains from scratch; otherwise the published ones of the encoder, or of hf:'s net"
    )
    weights: str | None = content(None, description="a local file of weights instead, as they are published")
    options: dict[str, Any] = content(
        default_factory=dict,
        description="more arguments of the decoder, or of the net; of hf:, keys of its config.json",
    )
    encoder_parts: tuple[str, ...] | None = content(
        None,
        description="the net's parts (dotted names of modules) that learn at train.lr, without train.head_lr_factor; "
        "null: its encoder or backbone",
    )
    mean: tuple[float, float, float] = content((0.485, 0.456, 0.406), description="ImageNet, timm's default")
    std: tuple[float, float, float] = content((0.229, 0.224, 0.225), description="ImageNet, timm's default")
    classifier: Literal["text", "learned"] = content(
        "text", description="what dense features are multiplied with: text features, or weights (closed set)"
    )

    @property
    def title(self) -> str:
        """What it is called in a sentence: a decoder on its encoder, or the net."""
        return self.arch if ":" in self.arch else f"{self.arch} on {self.encoder}"


class LossWeights(Section):
    """Eq. 11-12; focal's 100 and dice's 1 are ZegCLIP's (method section 7)."""

    glm: float = content(1.0, ge=0, alias="global", description="of L_global (eq. 3)")
    generate: float = content(1.0, ge=0, description="of L_generate (eq. 8)")
    ce: float = content(1.0, ge=0, description="of cross-entropy (eq. 10)")
    focal: float = content(100.0, ge=0, description="of the focal loss (ZegCLIP)")
    dice: float = content(1.0, ge=0, description="of the dice loss (ZegCLIP)")


class Validate(Section):
    """Held-out training images, scored on seen classes alone: unseen labels never choose a model."""

    fraction: float = content(0.0, ge=0, lt=1, description="share of the training images held out; 0 is off")
    every: int = content(500, ge=1, description="iterations between two validations")
    patience: int = content(
        0, ge=0, description="validations in a row without a better score that end training; 0: none do"
    )
    use: Literal["best", "last"] = content("best", description="the student that eval takes")


# The words of ops/losses.POOLINGS and models/vla.VARIANTS: this file loads no torch, so a test holds them together.
Pooling = Literal["attention", "max", "mean"]
Adapter = Literal["transformer", "mlp", "original"]


class Train(Section):
    iterations: int = content(
        20_000, ge=1, le=MAX_ITERATIONS, description="20k VOC, 40k Context, 80k COCO-Stuff (section 4.1)"
    )
    batch: int = content(16, ge=1, le=MAX_BATCH, description="per run, all processes together (section 4.1)")
    lr: float = content(6e-5, gt=0, description="mmseg's SegFormer schedule, as the three below")
    weight_decay: float = content(0.01, ge=0, description="of AdamW; 0 on norms, biases and positions")
    head_lr_factor: float = content(10.0, gt=0, description="decoder, head and VLA learn so much faster")
    warmup: int = content(1500, ge=0, description="linear, iterations")
    power: float = content(1.0, gt=0, description="of the poly decay")
    seed: int = content(0, ge=0, lt=2**32, description="of first weights, order, flips and colours")
    confidence: float = content(
        0.95, ge=0, le=1, description="pixels of clip_es below it don't count (0.95 after the CRF)"
    )
    views: int | None = content(None, ge=1, description="use only the first so many cached views; null: all")
    glm: Literal[Pooling, "off"] = content(
        "attention", description="how dense features become a predicted CLS token (eq. 1-2; Table 4)"
    )
    glm_length: float | None = content(
        None, gt=0, description="length of the CLS tokens in eq. 1, whose softmax it sharpens; null: the teacher's own"
    )
    tau: float = content(0.07, gt=0, description="InfoNCE's temperature (settled: CLIP's initial one)")
    bank: int = content(24, ge=0, le=MAX_BANK, description="n, iterations of CLS tokens kept (section 4.2)")
    negatives: int | None = content(
        None,
        ge=1,
        le=MAX_NEGATIVES,
        description="so many drawn anew each iteration from all cached CLS tokens; null: the bank",
    )
    vla: Adapter = content(
        "transformer", description="what makes classifiers of potential objects (section 3.3; Table 5)"
    )
    potential: bool = content(True, description="off: the ignored area stays ignored, seen labels only")
    potentials: Literal["batch", "image"] = content("batch", description="batch is eq. 9 as printed")
    nel: Literal["all", "seen", "off"] = content("all", description="what focal and dice cover")
    potential_ce: bool = content(True, description="cross-entropy on potential objects too")
    generate: bool = content(True, description="L_generate, eq. 8")
    loss_grid: Literal["stride4", "full"] = content(
        "stride4", description="full: logits enlarged to the image, as ZegCLIP's losses have it"
    )
    weights: LossWeights = Field(default_factory=LossWeights)
    flip: float = content(0.5, ge=0, le=1, description="probability of a horizontal flip (mmseg)")
    photometric: bool = content(True, description="mmseg's PhotoMetricDistortion, student side only")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = content(
        "fp32", description="of autocast, the losses stay float32; auto is bf16 where the machine computes in it"
    )
    channels_last: bool = content(True, description="memory layout of the student")
    processes: int | None = content(
        None,
        ge=1,
        le=MAX_PROCESSES,
        description="started by `cli.py train`; null: one, or as many as a launcher has started",
    )
    compile: bool = aside(False, description="torch.compile of the student")
    losses: Literal["fused", "plain"] = aside("fused", description="plain: autograd's gradients, slower")
    validation: Validate = Field(default_factory=Validate, alias="validate")
    tracker: str = aside("tensorboard", description="any of accelerate's, or none")
    pictures_every: int = aside(0, ge=0, description="iterations between pictures in the tracker; 0: none")
    workers: int | None = aside(
        None,
        ge=0,
        le=MAX_PROCESSES,
        description="loader processes; 0: a thread instead; null: 0, or up to 8 beside a GPU",
    )
    views_in_memory_gb: float = aside(
        1.0, ge=0, description="replayed views kept for the next epochs, a training process; 0.0013 a 512 x 512 view"
    )
    threads: int | None = aside(None, ge=1, le=MAX_THREADS, description="torch threads; null leaves torch's own choice")
    log_every: int = aside(50, ge=1, description="iterations between two lines of the log")
    checkpoint_every: int = content(2000, ge=1, description="iterations between two checkpoints")
    keep: int = aside(2, ge=1, description="checkpoints kept")

    @field_validator("glm", "nel", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML 1.1 reads a bare off as false

    @model_validator(mode="after")
    def _even_shares(self) -> Train:
        if self.batch % (self.processes or 1):
            raise ValueError(f"a batch of {self.batch} images does not divide among {self.processes} processes")
        return self


class Eval(Section):
    gamma: float = content(1.5, description="added to unseen logits (section 4.2)")
    gamma_sweep: tuple[float, ...] = content(
        (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0),
        max_length=MAX_LISTED,
        description="reported beside gamma, in the same pass",
    )
    mode: Literal["whole", "slide"] = content("whole", description="whole: squashed to a view; slide: windows")
    stride: float = content(
        2 / 3,
        ge=MIN_STRIDE,
        le=1,
        description="step of sliding windows, in windows (mmseg: 341/512, or 0.8321: 426/512)",
    )
    flip: bool = content(False, description="average with the mirrored image (mmseg's test-time augmentation)")
    scales: tuple[Annotated[float, Field(gt=0, le=16)], ...] = content(
        (),
        max_length=MAX_LISTED,
        description="average over the student's input at these sizes, [0.75, 1, 1.25]; empty: 1 alone",
    )
    batch: int = aside(8, ge=1, le=MAX_BATCH, description="images of a forward")
    pictures: int = aside(
        6, ge=0, le=MAX_PICTURES, description="worst and best test images that are drawn, so many of each"
    )

    @property
    def is_averaged(self) -> bool:
        return self.flip or self.scales not in ((), (1.0,))


class Report(Section):
    images: int = content(24, ge=1, le=MAX_PICTURES, description="training images and test images in the gallery, each")


class Config(Section):
    name: str = aside(
        "demo",
        pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9_-])?$",
        max_length=MAX_NAME,
        description="of the run, and of its folder",
    )
    runs: str = aside("runs", description="the folder that holds the folders of runs")
    recipe: Literal["clip_teacher", "clip_es"] = content(
        "clip_teacher", description="where labels come from: pixels of seen classes and clusters, or image tags"
    )
    data: Data = Field(default_factory=Data)
    teacher: TeacherSection = Field(default_factory=TeacherSection)
    text: Text = Field(default_factory=Text)
    views: Views = Field(default_factory=Views)
    cache: CacheSection = Field(default_factory=CacheSection)
    cluster: Cluster = Field(default_factory=Cluster)
    cams: Cams = Field(default_factory=Cams)
    student: Student = Field(default_factory=Student)
    train: Train = Field(default_factory=Train)
    eval: Eval = Field(default_factory=Eval)
    report: Report = Field(default_factory=Report)

    @field_validator("runs")
    @classmethod
    def _folder(cls, value: str) -> str:
        if "://" in value:
            raise ValueError(f"{value!r} is a URL; runs lie on a disk, and only cache.path may be one")
        return _folder(value)

    @model_validator(mode="after")
    def _text_source(self) -> Config:
        if self.teacher.pretrained and self.teacher.model.startswith(("local-dir:", "hf-hub:")):
            raise ValueError("teacher.pretrained must be null beside a local-dir: or hf-hub: model, which has its own")
        return self

    @model_validator(mode="after")
    def _recipe(self) -> Config:
        if self.student.classifier == "learned" and self.recipe == "clip_teacher":
            raise ValueError(
                "student.classifier learned knows its classes alone, and clip_teacher trains for unseen ones: use text"
            )
        if self.cache.tokens == "pooled" and self.recipe == "clip_teacher":
            raise ValueError(
                "cache.tokens pooled keeps no dense tokens to cluster: set it to float16, int8 or stream, or train "
                "with recipe clip_es, which needs none"
            )
        if self.cache.tokens == "stream" and self.cluster.named_above is not None:
            raise ValueError(
                "cluster.named_above asks for a stage of its own: set cache.tokens to float16 or int8, or leave it out"
            )
        return self

    def made_in(self, folder: Path | None) -> Config:
        """The same config, its teachers' relative paths looked for in this folder first."""
        teacher, cluster = self.teacher.model_copy(), self.cluster.model_copy()
        teacher._near = cluster._near = folder
        return self.model_copy(update={"teacher": teacher, "cluster": cluster})

    @property
    def run_path(self) -> Path:
        return Path(self.runs) / self.name

    @property
    def cache_path(self) -> Path | str:
        """A folder, or the URL of an object store as text."""
        if self.cache.path is None:
            return self.run_path / "cache"
        return self.cache.path if "://" in self.cache.path else Path(self.cache.path)

    @property
    def reads_tags(self) -> bool:
        """Whether training's labels come from image-level ones."""
        return self.recipe == "clip_es" or self.cluster.named_above is not None

    @property
    def manifest_folder(self) -> Path:
        """Where Snakemake looks: the cache itself, or, when that is a URL, copies in the run folder."""
        where = self.cache_path
        return where if isinstance(where, Path) else self.run_path / "cache"
