"""Stage two: any segmenter, trained from the shards alone.

    python cli.py train --config config/demo.yaml           one process
    accelerate launch cli.py train --config ...             several

The teacher isn't here: CLS tokens, pseudo labels and view boxes come from the cache, images and
seen labels from the data set. The student is handed T_seen alone; the text table of all classes
only travels into the checkpoint, for `eval` and `predict`.

Axes: B images, C channels, H x W loss grid, S seen classes, P potential objects, K = S + P.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn.functional import interpolate

from cache.ledger import write_manifest
from pipeline.batches import CachedViews, data_of, training_batches
from pipeline.checkpoint import Checkpoint, latest_checkpoint, load_state, save_checkpoint, save_student
from pipeline.config import Config, Train, UserError, config_fingerprint, fingerprint
from pipeline.models.glm import ClsBank, pooled
from pipeline.models.student import build_student, parameter_groups
from pipeline.models.vla import VisualLanguageAdapter
from pipeline.ops import losses
from pipeline.tracking import found_manifest, manifest_path, progress, required_manifest, save_config, say


class TrainError(UserError):
    """Training can't go on; the message says where it stopped and why."""


@dataclass
class Learner:
    """The parts that learn or remember, and what the losses are handed: T_seen, never the rest."""

    student: Any  # DenseStudent, or accelerate's wrapper of it
    vla: nn.Module
    bank: ClsBank
    text_seen: Tensor  # (S, C), unit norm
    seen_ids: Tensor  # (S,)


def train(config: Config) -> dict[str, Any]:
    """Trains to the configured iteration, resuming from the last checkpoint; returns the manifest.

    Raises: MissingCache, StaleCache, CorruptShard, DataError, StudentError, TrainError (a loss that isn't finite).
    """
    above = required_manifest(config, "cluster")
    data, section = data_of(config), config.train
    identity = fingerprint(config, "train", above["fingerprint"], {})
    manifest = found_manifest(config, "train")
    if manifest is not None and manifest.get("fingerprint") == identity:
        say(f"train: nothing to do, {manifest['iterations']} iterations are in {config.run_path / 'train'}")
        return manifest
    if section.threads:
        torch.set_num_threads(section.threads)
    accelerator = Accelerator(
        mixed_precision=mixed_precision(section.precision),
        log_with="tensorboard",
        project_dir=config.run_path / "train",
    )
    if section.batch % accelerator.num_processes:
        raise TrainError(
            f"train.batch {section.batch} does not divide among {accelerator.num_processes} processes."
        )
    save_config(config)
    set_seed(section.seed)
    views = CachedViews(config, data)
    learner = _build(config, views)
    groups = parameter_groups(
        learner.student,
        learner.vla,
        lr=section.lr,
        head_lr_factor=section.head_lr_factor,
        decay=section.weight_decay,
    )
    optimiser = torch.optim.AdamW(groups)
    text = torch.from_numpy(views.store.read_whole("text"))
    checkpoint = Checkpoint(
        config=config, identity=identity, classes=data.classes, unseen=data.unseen, text=text
    )
    start = 0
    found = latest_checkpoint(config.run_path / "train", identity)
    if found:
        start = load_state(found, learner.student, learner.vla, learner.bank, optimiser)
        say(f"train: resuming at iteration {start} from {found}")
    learner.student, learner.vla, optimiser = accelerator.prepare(learner.student, learner.vla, optimiser)
    learner.text_seen, learner.seen_ids = (
        x.to(accelerator.device) for x in (learner.text_seen, learner.seen_ids)
    )
    learner.bank.to(accelerator.device)
    accelerator.init_trackers("losses")

    _loop(config, accelerator, learner, optimiser, views, checkpoint, start)

    accelerator.wait_for_everyone()
    manifest = {
        "stage": "train",
        "fingerprint": identity,
        "config": config_fingerprint(config, "train"),
        "upstream": above["fingerprint"],
        "iterations": section.iterations,
        "student": "student.safetensors",
    }
    if accelerator.is_main_process:
        save_student(
            config.run_path / "train" / "student.safetensors",
            accelerator.unwrap_model(learner.student),
            checkpoint,
        )
        write_manifest(manifest_path(config, "train"), manifest)
    accelerator.end_training()
    return manifest


def _build(config: Config, views: CachedViews) -> Learner:
    section, data = config.train, views.data
    channels = int(views.store.sizes["C"])
    seen = torch.tensor(list(data.seen_ids))
    return Learner(
        student=build_student(config.student, channels),
        vla=VisualLanguageAdapter(channels, section.vla),
        bank=ClsBank(section.bank, section.batch, channels),
        text_seen=torch.from_numpy(views.store.read_whole("text"))[seen],
        seen_ids=seen,
    )


def _loop(
    config: Config,
    accelerator: Accelerator,
    learner: Learner,
    optimiser: Any,
    views: CachedViews,
    checkpoint: Checkpoint,
    start: int,
) -> None:
    """The iterations. One story: batch, features, terms, backward, schedule, and now and then a checkpoint."""
    section, folder = config.train, config.run_path / "train"
    base_rates = [group.setdefault("initial_lr", group["lr"]) for group in optimiser.param_groups]
    batches = training_batches(
        views,
        start=start,
        stop=section.iterations,
        process=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    if section.channels_last:
        learner.student.to(memory_format=torch.channels_last)
    learner.student.train()
    clock = Clock()
    with (
        progress("train", section.iterations, done=start, unit="it") as advance,
        _curve(folder, start, accelerator.is_main_process) as curve,
    ):
        for iteration in range(start, section.iterations):
            batch = {name: value.to(accelerator.device) for name, value in next(batches).items()}
            clock.mark("data")
            images = batch["image"].float()
            if section.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with accelerator.autocast():
                dense = learner.student(images)  # (B, C, H, W)
            clock.mark("forward")
            terms, counts = loss_terms(section, learner, dense, batch, accelerator)
            total = torch.stack(list(terms.values())).sum()
            clock.mark("losses")
            _stop_if_not_finite(terms, iteration, views, batch)
            optimiser.zero_grad()
            accelerator.backward(total)
            clock.mark("backward")
            for group, rate in zip(optimiser.param_groups, base_rates, strict=True):
                group["lr"] = rate * schedule(section, iteration)
            optimiser.step()
            clock.mark("optimiser")

            done = iteration + 1
            is_last = done == section.iterations
            if done % section.log_every == 0 or is_last:
                values = {name: float(term.detach()) for name, term in terms.items()} | counts
                values |= {
                    "total": float(total.detach()),
                    "lr": optimiser.param_groups[0]["lr"],
                } | clock.shares()
                accelerator.log(values, step=done)
                curve.write(
                    json.dumps({"iteration": done, **{k: round(v, 6) for k, v in values.items()}}) + "\n"
                )
                curve.flush()
            advance(1, note=f"loss {float(total.detach()):.3f}" if done % 10 == 0 or is_last else None)
            if accelerator.is_main_process and (done % section.checkpoint_every == 0) and not is_last:
                student, vla = (
                    accelerator.unwrap_model(learner.student),
                    accelerator.unwrap_model(learner.vla),
                )
                save_checkpoint(
                    folder, done, checkpoint, student, vla, learner.bank, optimiser, keep=section.keep
                )
    say(f"train: time {clock.line()}")


def mixed_precision(wanted: str) -> str:
    """accelerate's word for the configured precision; `auto` looks at what the machine computes in."""
    if wanted == "auto":
        has_bf16 = (
            torch.cuda.is_bf16_supported()
            if torch.cuda.is_available()
            else torch.cpu._is_avx512_bf16_supported()
        )
        wanted = "bf16" if has_bf16 else "fp32"
    return "no" if wanted == "fp32" else wanted


def schedule(section: Train, iteration: int) -> float:
    """Factor on the learning rates: linear warm-up times poly decay (mmseg's; method section 4)."""
    warm = min((iteration + 1) / section.warmup, 1.0) if section.warmup else 1.0
    return warm * (1 - iteration / section.iterations) ** section.power


def loss_terms(
    section: Train,
    learner: Learner,
    dense: Tensor,
    batch: dict[str, Tensor],
    accelerator: Accelerator | None = None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Every weighted term of eq. 11-12 for one batch, and counts worth a curve. Pushes into the CLS bank.

    Shapes: dense (B, C, H, W); batch: labels (B, S, S) uint8, pseudo (B, h, w), cls (B, C), sample (B,).
    """
    weights, terms = section.weights, {}
    if section.glm != "off":
        terms["global"] = weights.glm * _global_term(section, learner, dense, batch, accelerator)
    ids, owners, num_potential = losses.combined_labels(
        _on_grid(batch["labels"], dense, section), batch["pseudo"], learner.seen_ids, section.potential
    )
    if section.loss_grid == "full":
        dense = interpolate(dense, ids.shape[1:], mode="bilinear", align_corners=False)
    num_seen = len(learner.text_seen)
    means, present = losses.centroids(dense, ids, num_seen + num_potential)
    generated = learner.vla(means[present], batch["cls"])  # (M, C), seen ones first
    if section.generate:
        terms["generate"] = weights.generate * losses.generate_loss(generated, learner.text_seen, present)
    num_seen_present = int(present[:num_seen].sum())
    logits = losses.logits(dense, learner.text_seen, generated[num_seen_present:])  # (B, K, H, W)
    planes = losses.competing(owners, len(dense), num_seen, section.potentials)
    ce_ids = ids if section.potential_ce else ids.where(ids < num_seen, losses.IGNORE)
    terms["ce"] = weights.ce * losses.cross_entropy(logits, ce_ids, planes)
    if section.nel != "off":
        nel_logits, nel_ids, nel_planes = logits, ids, planes
        if section.nel == "seen":
            (nel_logits, nel_ids), nel_planes = losses.seen_only(logits, ids, num_seen), None
        num_masks = losses.count_masks(nel_ids, nel_logits.shape[1])
        if accelerator is not None:
            num_masks = accelerator.reduce(num_masks, reduction="mean")
        terms["focal"] = weights.focal * losses.focal(nel_logits, nel_ids, num_masks, nel_planes)
        terms["dice"] = weights.dice * losses.dice(nel_logits, nel_ids, num_masks)
    return terms, {"potential": float(num_potential), "seen": float(num_seen_present)}


def _global_term(
    section: Train, learner: Learner, dense: Tensor, batch: dict[str, Tensor], accelerator: Accelerator | None
) -> Tensor:
    """Eq. 3, and then the push: the current tokens are never in the bank of their own loss."""
    cls, samples = batch["cls"], batch["sample"]
    bank, bank_samples = learner.bank.entries()
    others, other_samples, all_cls, all_samples = bank, bank_samples, cls, samples
    if accelerator is not None and accelerator.num_processes > 1:
        all_cls, all_samples = accelerator.gather(cls), accelerator.gather(samples)
        mine = torch.zeros(len(all_cls), dtype=torch.bool, device=cls.device)
        mine[accelerator.process_index * len(cls) : (accelerator.process_index + 1) * len(cls)] = True
        others = torch.cat([bank, all_cls[~mine]])
        other_samples = torch.cat([bank_samples, all_samples[~mine]])
    loss = losses.infonce(cls, pooled(cls, dense, section.glm), others, other_samples, samples, section.tau)
    learner.bank.push(all_cls, all_samples)
    return loss


def _on_grid(labels: Tensor, dense: Tensor, section: Train) -> Tensor:
    """Labels by nearest on the loss grid: (B, S, S) -> (B, H, W)."""
    if section.loss_grid == "full":
        return labels
    return interpolate(labels[:, None].float(), dense.shape[2:], mode="nearest-exact")[:, 0].to(labels.dtype)


def _stop_if_not_finite(
    terms: dict[str, Tensor], iteration: int, views: CachedViews, batch: dict[str, Tensor]
) -> None:
    bad = [name for name, term in terms.items() if not math.isfinite(float(term.detach()))]
    if bad:
        names = ", ".join(views.samples[int(row)].id for row in batch["sample"][:8])
        raise TrainError(
            f"iteration {iteration}: {', '.join(bad)} is not finite (batch: {names}, ...). The last checkpoint stands; "
            "lower train.lr, or train without mixed precision."
        )


class Clock:
    """Where a step's time goes, in seconds by phase, since the start."""

    def __init__(self) -> None:
        self.total: dict[str, float] = {}
        self.last = time.perf_counter()

    def mark(self, phase: str) -> None:
        now = time.perf_counter()
        self.total[phase] = self.total.get(phase, 0.0) + now - self.last
        self.last = now

    def shares(self) -> dict[str, float]:
        whole = sum(self.total.values()) or 1.0
        return {f"time/{phase}": seconds / whole for phase, seconds in self.total.items()}

    def line(self) -> str:
        return ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in self.total.items())


def _curve(folder: Path, start: int, is_main: bool) -> Any:
    """The file of loss values by iteration, cut back to `start` when training resumes; one process writes it."""
    if not is_main:
        return open(os.devnull, "w", encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "losses.jsonl"
    kept = []
    if start and path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["iteration"] <= start]
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    return path.open("a", encoding="utf-8")
