"""Each student's parameters, cost at 512 x 512 and speed on this CPU, beside what is published of it: docs/students.md.

    python bench/students.py                     writes docs/students.md; five minutes on a free core
    python bench/students.py --print --rounds 0  counts alone, on the terminal, seconds
    python bench/students.py --gpu               one more column, on the GPU that torch sees

Speed: one image of 512 x 512, 512 channels out, float32, one thread, the fastest of the rounds after one that doesn't
count; on the CPU in processor time, which other processes' load changes less than the clock's.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from interleaved import heading

from pipeline.config import Student
from pipeline.models.student import DenseStudent, build_student, cost_of
from pipeline.running.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
SIDE, CHANNELS, CLASSES = 512, 512, 150  # CLIP ViT-B/16's joint space; ADE20K, of which costs are published

NVIDIA = "NVIDIA, not for commercial use"
TIMM = "timm, Apache-2.0"


@dataclass(frozen=True)
class Row:
    """A student by its config words; published millions of parameters and G multiply-adds with 150 classes."""

    name: str
    arch: str
    encoder: str
    options: dict[str, object]
    weights: str
    parameters: float | None = None
    gmacs: float | None = None
    side: int = SIDE  # at which the published cost was counted
    note: str = ""  # on the published parameters


def students() -> Iterator[Row]:
    # SegFormer, Table 1 and its configs (decoder widths).
    sizes = [(3.8, 8.4), (13.7, 15.9), (27.5, 62.4), (47.3, 79.0), (64.1, 95.7), (84.7, 183.3)]
    for size, published in enumerate(sizes):
        decoder = {"decoder_segmentation_channels": 256 if size < 2 else 768}
        side = 640 if size == 5 else SIDE
        yield Row(f"SegFormer-B{size}", "Segformer", f"mit_b{size}", decoder, NVIDIA, *published, side)
    for size in range(6):
        decoder = {"decoder_segmentation_channels": 256 if size < 2 else 768}
        yield Row(f"its twin, PVTv2-B{size}", "Segformer", f"tu-pvt_v2_b{size}", decoder, TIMM)
    # Swin, Table 3, and ConvNeXt, Table 6: parameters with UPerNet's auxiliary head, which isn't built here; their
    # costs are of 512 x 2048 and more.
    wide = {"decoder_channels": 512, "img_size": SIDE, "strict_img_size": False, "drop_path_rate": 0.3}
    note = " with an auxiliary head"
    swin = "tu-swin_base_patch4_window7_224"
    yield Row("Swin-B", "UPerNet", swin, wide, "timm, MIT", 121, note=note)
    for size, parameters in (("tiny", 60), ("small", 82), ("base", 122)):
        name, options = f"ConvNeXt-{size[0].upper()}", {"decoder_channels": 512}
        yield Row(name, "UPerNet", f"tu-convnext_{size}", options, TIMM, parameters, note=note)
    # SegNeXt, its table of ADE20K.
    for size, parameters, gmacs in (("t", 4.3, 6.6), ("s", 13.9, 15.9), ("b", 27.6, 34.9), ("l", 48.9, 70.0)):
        name, where = f"SegNeXt-{size.upper()}", "mmseg's file, Apache-2.0"
        yield Row(name, "SegNeXt", f"mscan_{size}", {}, where, parameters, gmacs)
    yield Row("DeepLabV2", "DeepLabV2", "resnet101", {}, "torchvision, BSD-3")


# What is known of an encoder's licence: of its code, of its weights, and from where.
LICENCES = (
    ("encoder", "licence of its code", "licence of its weights", "known from"),
    (
        "`mit_b0` to `mit_b5`",
        "NVIDIA Source Code License: research and evaluation only",
        "the same",
        "the head of smp's mix_transformer.py; the LICENSE of NVlabs/SegFormer, section 3.3",
    ),
    ("`tu-pvt_v2_b0` to `_b5`", "Apache-2.0 (timm)", "Apache-2.0", "timm's record of each model (below)"),
    ("`tu-swin_*`", "Apache-2.0 (timm), MIT (Microsoft)", "MIT", "timm's record; the head of its file"),
    (
        "`tu-convnext_*`: `fb_*`, `in12k_*`",
        "Apache-2.0 (timm), MIT (Meta)",
        "Apache-2.0 by timm's record",
        "the same; `.dinov3_*`, `.eupe_*` and all `convnextv2_*` have other licences, some not for commercial use",
    ),
    ("`tu-edgenext_xx_small`, the demo's", "Apache-2.0 (timm)", "MIT; the demo starts from none", "timm's record"),
    (
        "`resnet18` to `resnet152` of smp",
        "MIT (smp), BSD-3-Clause (torchvision)",
        "BSD-3-Clause",
        "timm's record of torchvision's weights, `resnet101.tv_in1k`, which smp republishes",
    ),
    (
        "`mscan_t` to `mscan_l`",
        "Apache-2.0 (ours)",
        "Apache-2.0",
        "the repository of mmsegmentation, which publishes them; it says nothing of weights apart from code",
    ),
    (
        "`torchvision:*`",
        "BSD-3-Clause",
        "BSD-3-Clause; torchvision warns that terms of the training data may apply",
        "torchvision's LICENSE and README",
    ),
    (
        "`hf:*`",
        "Apache-2.0 (transformers)",
        "its model card's: `nvidia/mit-b*` and `nvidia/segformer-*` are NVIDIA's, as above",
        "the card",
    ),
)


def licences() -> str:
    """The table of them, Markdown."""
    head, *rows = ["| " + " | ".join(row) + " |" for row in LICENCES]
    return "\n".join([head, "|" + "---|" * len(LICENCES[0]), *rows])


def section_of(row: Row) -> Student:
    return Student(arch=row.arch, encoder=row.encoder, encoder_weights=None, options=row.options)


def images_per_s(student: DenseStudent, device: str, rounds: int) -> float:
    """Of one image at a time, the fastest of the rounds."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    student = student.eval().to(device)
    image = torch.randint(0, 256, (1, 3, SIDE, SIDE), dtype=torch.uint8, device=device)
    taken = []
    with torch.inference_mode():
        for _ in range(rounds + 1):
            began = clock()
            student(image)
            if device != "cpu":
                torch.cuda.synchronize()
            taken.append(clock() - began)
    return 1 / min(taken[1:])


def lines(rounds: int, has_gpu: bool) -> Iterator[str]:
    """The table, row by row; a student at a time in memory."""
    names = ["student", "`student.arch`, `student.encoder`", "weights", "M parameters", "published"]
    names += ["G multiply-adds", "published", "C = 512: M", "GFLOP", "images/s, one core", "images/s, GPU"]
    yield "| " + " | ".join(names) + " |"
    yield "|" + "---|" * len(names)
    for row in students():
        section = section_of(row)
        closed, ours = cost_of(section, CLASSES, row.side), cost_of(section, CHANNELS, SIDE)
        at = f" at {row.side}" if row.side != SIDE else ""
        cells = [row.name, f"{row.arch}, {row.encoder}", row.weights, f"{closed.parameters / 1e6:.1f}"]
        cells += ["" if row.parameters is None else f"{row.parameters}{row.note}"]
        cells += [f"{closed.multiply_adds / 1e9:.1f}{at}", "" if row.gmacs is None else f"{row.gmacs}{at}"]
        cells += [f"{ours.parameters / 1e6:.1f}", f"{2 * ours.multiply_adds / 1e9:.0f}"]
        for device, is_asked in (("cpu", rounds > 0), ("cuda", rounds > 0 and has_gpu)):
            if is_asked:
                student = build_student(section, CHANNELS, pretrained=False)
                cells.append(f"{images_per_s(student, device, rounds):.3g}")
            else:
                cells.append("not run")
        yield "| " + " | ".join(cells) + " |"


HEAD = """# Students

Written by `python bench/students.py`; {made}.
Speed is of one image of 512 x 512 at a time, float32, one thread, the fastest of {rounds} in processor time (load
average {load:.1f} when it began).

**Counts** are of 512 x 512 with 150 classes, ADE20K's, as the published ones are; then with the 512 channels that CLIP
ViT-B/16 teaches. Published "FLOPs" are multiply-adds, and so are these; GFLOP is twice that. torch counts convolutions
and matrix products; SegNeXt's published costs are 2 to 7 % higher, and what its tool counted besides isn't stated.

**Weights** are the encoder's, from ImageNet, and the default (`student.encoder_weights: imagenet`) where smp or timm
have them. Offline, `student.weights` takes the file as it is published: timm's `model.safetensors` or `.pth`, the
authors' where timm converts it, torchvision's, MSCAN's ([voc_segnext_b.yaml](../config/voc_segnext_b.yaml) says where
from). What was loaded, left out and missing is one line; less than half of the encoder is an error.

Any other encoder of timm (`tu-<name>`) under any decoder of segmentation_models_pytorch is two words of a config, and
there are torchvision's models, Hugging Face's, and nets of your own: [extending.md](extending.md).

**Licences.** The default, `tu-pvt_v2_b0`, and config/vit_b16.yaml's permit commercial use; mit_b*, which the paper's
SegFormer presets need, do not, and PVTv2 of the same number is their twin. `doctor` says what is known of an encoder's.

{licences}

timm's record is `timm.get_pretrained_cfg("pvt_v2_b0").license`. Nearly all were trained on ImageNet, whose images are
for research; whether that binds a net trained on them no licence above says. This table is what we found, not advice.

**Sides and batches.** Convolutional students, mit_b*, PVTv2 and SegNeXt take any side. ViTs under DPT (patch 16) and
Swin are set up for the views' side by themselves and take others at test time; MaxViT's windows and BEiT fit some sides
only. Batch norm over 1 x 1 (DeepLabV3Plus, PAN, UPerNet) needs two images a process. `doctor` says what doesn't fit.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--print", action="store_true", dest="is_printed")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    load, made = os.getloadavg()[0], provenance()
    heading(f"students at {SIDE} x {SIDE}, load {load:.1f}")
    about = f"{made['date']}, {made['machine']}, torch {made['torch']}, revision {made['revision']}"
    text = HEAD.format(made=about, rounds=chosen.rounds, load=load, licences=licences())
    for line in lines(chosen.rounds, chosen.gpu):
        print(line, flush=True)
        text += line + "\n"
    if not chosen.is_printed:
        (ROOT / "docs" / "students.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
