"""What a training step costs beside the same student's plain supervised step.

    python bench/step.py                          SegFormer-B0, 512 x 512, batch 2, float32
    python bench/step.py --case demo              the demo's student, 128 x 128, batch 8
    python bench/step.py --case b0 --device cuda --batch 16
    python bench/step.py --losses plain           with autograd's gradients

Interleaved in one run, medians of the time passed and of the processor's own (which other programs on the
machine disturb less): the full step; the step without focal, dice and potential objects; the
floor, which is the same student, memory format, batch and optimiser with F.conv2d and F.cross_entropy on
the seen labels. Then each term's forward and backward alone, beside the time in which this machine moves
its bytes or does its multiplications, both measured here. Memory: each in a fresh process.

Images are noise, labels blocks of 8 x 8 stride-4 positions; a quarter of the image is ignored area with
15 potential objects an image (COCO-Stuff's seen classes, and about what clustering finds there).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import Student, Train
from pipeline.learning.journal import peak_memory_bytes
from pipeline.learning.objective import LOSSES, Learner, loss_terms
from pipeline.models.glm import ClsBank
from pipeline.models.student import build_student, parameter_groups
from pipeline.models.vla import VisualLanguageAdapter
from pipeline.ops import losses as plain
from pipeline.ops.labels import IGNORE

OBJECTS, IGNORED = 15, 0.25  # potential objects an image, share of the ignored area
CASES = {
    "b0": {"side": 512, "batch": 2, "channels": 512, "seen": 156, "student": {"encoder": "mit_b0"}},
    "demo": {
        "side": 128,
        "batch": 8,
        "channels": 128,
        "seen": 15,
        "student": {"encoder": "tu-edgenext_xx_small", "options": {"decoder_segmentation_channels": 64}},
    },
}
FULL = Train()
VARIANTS = {"full": FULL, "without": FULL.model_copy(update={"nel": "off", "potential": False})}


class Bench:
    """Student, learner and one batch on a device."""

    def __init__(self, case: str, batch: int | None, device: str, precision: str, losses: str) -> None:
        self.case, self.device, self.precision = CASES[case], torch.device(device), precision
        self.losses = losses
        torch.manual_seed(0)
        side, channels, seen = self.case["side"], self.case["channels"], self.case["seen"]
        self.batch_size = batch or self.case["batch"]
        student = build_student(Student(encoder_weights=None, **self.case["student"]), channels)
        self.learner = Learner(
            student=student.to(self.device, memory_format=torch.channels_last).train(),
            vla=VisualLanguageAdapter(channels).to(self.device),
            bank=ClsBank(24, self.batch_size, channels).to(self.device),
            text_seen=F.normalize(torch.randn(seen, channels), dim=1).to(self.device),
            seen_ids=torch.arange(seen, device=self.device),
        )
        rates = {"lr": 1e-6, "head_lr_factor": 10.0, "decay": 0.01}
        groups = parameter_groups(student, self.learner.vla, **rates)
        self.optimiser = torch.optim.AdamW(groups, fused=True)
        floor_groups = parameter_groups(student, torch.nn.Identity(), **rates)
        self.floor_optimiser = torch.optim.AdamW(floor_groups, fused=True)
        self.batch = {k: v.to(self.device) for k, v in self._batch(side, channels, seen).items()}

    def _batch(self, side: int, channels: int, seen: int) -> dict[str, Tensor]:
        n, blocks = self.batch_size, side // 32
        labels = torch.randint(0, seen, (n, blocks, blocks))
        pseudo = torch.randint(1, OBJECTS + 1, (n, blocks, blocks))
        ignored = torch.rand(n, blocks, blocks) < IGNORED
        labels, pseudo = labels.masked_fill(ignored, IGNORE), pseudo.masked_fill(~ignored, 0)
        images = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8).float()
        return {
            "image": images.contiguous(memory_format=torch.channels_last),
            "labels": labels.repeat_interleave(32, 1).repeat_interleave(32, 2).to(torch.int16),
            "pseudo": pseudo.repeat_interleave(2, 1).repeat_interleave(2, 2).to(torch.uint8),
            "cls": torch.randn(n, channels),
            "sample": torch.arange(n),
        }

    def dense(self) -> Tensor:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            return self.learner.student(self.batch["image"])

    def ours(self, section: Train) -> None:
        section = section.model_copy(update={"losses": self.losses})
        terms, _ = loss_terms(section, self.learner, self.dense(), self.batch)
        self.optimiser.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        self.optimiser.step()

    def floor(self) -> None:
        dense = self.dense()
        size = dense.shape[2:]
        labels = F.interpolate(self.batch["labels"][:, None].float(), size, mode="nearest-exact")[:, 0].long()
        weight = self.learner.text_seen.to(dense.dtype)[:, :, None, None]
        loss = F.cross_entropy(F.conv2d(dense, weight).float(), labels, ignore_index=IGNORE)
        self.floor_optimiser.zero_grad()
        loss.backward()
        self.floor_optimiser.step()

    def steps(self) -> dict[str, Callable[[], None]]:
        ours = {name: lambda section=section: self.ours(section) for name, section in VARIANTS.items()}
        return {"floor": self.floor, **ours}

    def seconds(self, call: Callable[[], object]) -> float:
        self.wait()
        began = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - began

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def interleaved(bench: Bench, rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each step, and of the processor's time in it, one of each in turn; the first round warms up."""
    taken: dict[str, list[float]] = {name: [] for name in bench.steps()}
    computed: dict[str, list[float]] = {name: [] for name in taken}
    for turn in range(rounds + 1):
        for name, step in bench.steps().items():
            began = time.process_time()
            seconds = bench.seconds(step)
            if turn:
                taken[name].append(seconds)
                computed[name].append(time.process_time() - began)
    return taken, computed


def terms(bench: Bench, rounds: int) -> list[tuple[str, float, float, float]]:
    """(term, ms forward, ms backward, ms the machine needs for its bytes or multiplications)."""
    learner, batch, losses = bench.learner, bench.batch, LOSSES[bench.losses]
    dense = bench.dense().detach().float().requires_grad_()
    size = dense.shape[2:]
    labels = F.interpolate(batch["labels"][:, None].float(), size, mode="nearest-exact")[:, 0]
    ids, _, num = plain.combined_labels(labels.to(torch.int16), batch["pseudo"], learner.seen_ids)
    width = len(learner.text_seen) + num
    means, present = losses.centroids(dense, ids, width)
    means = means.detach()[present].requires_grad_()
    generated = learner.vla(means, batch["cls"]).detach()
    potential = generated[int(present[: len(learner.text_seen)].sum()) :].requires_grad_()
    x = losses.logits(dense, learner.text_seen, potential).detach().requires_grad_()
    positions, channels = dense.numel() // dense.shape[1], dense.shape[1]
    flops, bandwidth = machine(bench)
    dense_bytes, logit_bytes = 4 * dense.numel(), 4 * x.numel()
    weights = sum(p.numel() for p in learner.vla.parameters())
    calls: list[tuple[str, Callable[[], Tensor], list[Tensor], float]] = [
        # The attention reads R for its scores and its sums and again backward, and writes a gradient.
        ("global", lambda: losses.pooled(batch["cls"], dense).sum(), [dense], 4 * dense_bytes / bandwidth),
        ("centroids", lambda: losses.centroids(dense, ids, width)[0].sum(), [dense], 2 * dense_bytes / bandwidth),
        (
            "adapter",
            lambda: learner.vla(means, batch["cls"]).sum(),
            [means, *learner.vla.parameters()],
            6 * weights * len(means) / flops,
        ),
        (
            "logits",
            lambda: losses.logits(dense, learner.text_seen, potential).sum(),
            [dense, potential],
            2 * positions * channels * (2 * width + num) / flops,
        ),
        # Both read the logits twice and write a gradient.
        ("ce", lambda: losses.cross_entropy(x, ids), [x], 3 * logit_bytes / bandwidth),
        ("focal and dice", lambda: sum(losses.focal_and_dice(x, ids)), [x], 3 * logit_bytes / bandwidth),
    ]
    rows = []
    for name, call, inputs, least in calls:
        forward, backward = [], []
        for _ in range(rounds + 1):
            held: list[Tensor] = []
            forward.append(bench.seconds(lambda call=call, held=held: held.append(call())))
            backward.append(bench.seconds(lambda held=held, inputs=inputs: torch.autograd.grad(held[0], inputs)))
        rows.append((name, 1e3 * median(forward[1:]), 1e3 * median(backward[1:]), 1e3 * least))
    return rows


def machine(bench: Bench) -> tuple[float, float]:
    """Multiply-adds count twice: float32 operations a second of a large product, bytes a second of a copy."""
    a = torch.randn(2048, 2048, device=bench.device)
    b, c = torch.randn_like(a), torch.empty_like(a)
    product = min(bench.seconds(lambda: torch.mm(a, b, out=c)) for _ in range(5))
    large = torch.randn(1 << 26, device=bench.device)
    target = torch.empty_like(large)
    copy = min(bench.seconds(lambda: target.copy_(large)) for _ in range(5))
    return 2 * 2048**3 / product, 2 * 4 * large.numel() / copy


def peak_bytes(bench: Bench, name: str) -> tuple[int, int]:
    """Peak memory of the process after three steps, and what of it the steps have added."""
    before = torch.cuda.memory_allocated() if bench.device.type == "cuda" else peak_memory_bytes()
    for _ in range(3):
        bench.steps()[name]()
    return peak_memory_bytes(), peak_memory_bytes() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", choices=CASES, default="b0")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--losses", choices=LOSSES, default="fused")
    parser.add_argument("--memory-of", help="print the peak memory of one kind of step, as JSON")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    bench = Bench(options.case, options.batch, options.device, options.precision, options.losses)
    if options.memory_of:
        print(json.dumps(peak_bytes(bench, options.memory_of)))
        return
    print(
        f"{options.case}: {bench.case['side']} x {bench.case['side']}, batch {bench.batch_size}, {options.precision}, "
        f"{options.losses} losses, "
        f"{options.device}, {torch.get_num_threads()} threads of {os.cpu_count()} processors, torch {torch.__version__}"
    )
    taken, computed = interleaved(bench, options.rounds)
    floor = median(taken["floor"])
    memory = {}
    for name in taken:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--memory-of", name], capture_output=True, check=True
        )
        memory[name] = json.loads(done.stdout)
    print(
        f"{'step':10s} {'ms':>9s} {'ratio':>6s} {'CPU ms':>9s} {'ratio':>6s} "
        f"{'peak GB':>8s} {'ratio':>6s} {'added GB':>9s}"
    )
    for name, seconds in taken.items():
        whole, added = memory[name]
        print(
            f"{name:10s} {1e3 * median(seconds):9.1f} {median(seconds) / floor:6.3f} "
            f"{1e3 * median(computed[name]):9.1f} {median(computed[name]) / median(computed['floor']):6.3f} "
            f"{whole / 1e9:8.2f} {whole / memory['floor'][0]:6.3f} {added / 1e9:9.2f}"
        )
    print(f"{'term':16s} {'forward':>9s} {'backward':>9s} {'least':>9s}  ms")
    for name, forward, backward, least in terms(bench, options.rounds):
        print(f"{name:16s} {forward:9.1f} {backward:9.1f} {least:9.1f}")


if __name__ == "__main__":
    main()
