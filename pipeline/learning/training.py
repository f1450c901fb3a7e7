"""The parts of a training run: built from the config, taken back to a checkpoint, handed to accelerate."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import set_seed

from pipeline.config import Config, Train, UserError
from pipeline.data.base import data_of
from pipeline.learning.batches import CachedViews, training_batches
from pipeline.learning.checkpoint import BEST, Checkpoint, latest_checkpoint, load_checkpoint
from pipeline.learning.objective import Learner
from pipeline.learning.validation import Best
from pipeline.models.glm import CachedNegatives, ClsBank
from pipeline.models.student import build_student, check_batch, parameter_groups
from pipeline.models.vla import VisualLanguageAdapter
from pipeline.running.console import mention, say
from pipeline.running.processes import is_launched
from pipeline.running.provenance import revision


class TrainError(UserError):
    """Training can't go on; the message says where it stopped and why."""


@dataclass
class Run:
    """What the loop works with."""

    config: Config
    accelerator: Accelerator
    views: CachedViews
    learner: Learner
    optimiser: Any
    checkpoint: Checkpoint
    start: int = 0
    best: Best = field(default_factory=Best)

    @property
    def folder(self) -> Path:
        return self.config.run_path / "train"

    @property
    def student(self) -> Any:
        """The student without accelerate's wrapper."""
        return self.accelerator.unwrap_model(self.learner.student)


def open_accelerator(config: Config, *, tracks: bool = True) -> Accelerator:
    section = config.train
    if not is_launched():  # an earlier training of this Python session may have had another precision
        AcceleratorState._reset_state(reset_partial_state=True)
    if section.threads:
        torch.set_num_threads(section.threads)
    installed = [str(tracker) for tracker in get_available_trackers()]
    if section.tracker not in ("none", *installed):
        known = ", ".join(["none", *map(str, LOGGER_TYPE_TO_CLASS)])
        raise TrainError(f"train.tracker {section.tracker!r}: want one of {known}; installed: {', '.join(installed)}.")
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else several processes without a GPU don't find each other
        mixed_precision=mixed_precision(section.precision),
        log_with=section.tracker if tracks and section.tracker != "none" else None,
        project_dir=config.run_path / "train",
        # The same parameters take part in every step, whatever a process's images hold.
        kwargs_handlers=[DistributedDataParallelKwargs(static_graph=True, gradient_as_bucket_view=True)],
    )
    num = accelerator.num_processes
    if is_launched() and section.processes not in (None, num):
        raise TrainError(
            f"train.processes is {section.processes}, and {num} were started. Leave it out under a launcher."
        )
    if section.batch % num:
        raise TrainError(
            f"train.batch {section.batch} does not divide among {num} processes. The nearest that does is "
            f"{max(round(section.batch / num), 1) * num}."
        )
    return accelerator


def new_run(config: Config, accelerator: Accelerator, identity: str, cache: str | None) -> Run:
    """The parts, new and on the CPU. Student and VLA start from train.seed, alike in all processes."""
    set_seed(config.train.seed)
    data, section = data_of(config.data), config.train
    views = CachedViews(config, data)
    channels = int(views.store.sizes["C"])
    text = torch.from_numpy(views.store.read_whole("text"))
    if config.student.classifier == "learned":  # a channel a class: its table is the identity, for eval and export too
        channels, text = len(data.classes), torch.eye(len(data.classes))
    student = build_student(config.student, channels, side=views.size)
    if accelerator.is_main_process:
        for note in student.notes:
            say(f"train: {note}")
    check_batch(student, config.student, section.batch // accelerator.num_processes, views.size)
    vla = section.vla if config.recipe == "clip_teacher" else "original"
    seen = torch.tensor(views.taught_ids)
    learner = Learner(
        student=student,
        vla=VisualLanguageAdapter(channels, vla),
        bank=negatives_of(views, channels),
        text_seen=text[seen],
        seen_ids=seen,
    )
    if section.channels_last:
        learner.student.to(memory_format=torch.channels_last)
    if section.compile:
        learner.student.compile()
    optimiser = torch.optim.AdamW(
        parameter_groups(
            learner.student,
            learner.vla,
            lr=section.lr,
            head_lr_factor=section.head_lr_factor,
            decay=section.weight_decay,
        ),
        fused=True,  # one pass over the moments; a third of the time on the CPU
    )
    checkpoint = Checkpoint(config, identity, data.classes, data.unseen, text, cache=cache, revision=revision())
    return Run(config, accelerator, views, learner, optimiser, checkpoint)


def negatives_of(views: CachedViews, channels: int) -> ClsBank | CachedNegatives:
    """Where eq. 3 takes its extra negatives from. Raises: TrainError when more are wanted than are cached."""
    config, section = views.config, views.config.train
    if config.recipe != "clip_teacher":
        return ClsBank(0, section.batch, channels)
    if section.negatives is None or section.glm == "off":
        return ClsBank(section.bank, section.batch, channels)
    tokens, rows = torch.from_numpy(views.cls_tokens()), torch.tensor(views.rows)
    if section.negatives > (num := tokens.shape[0] * tokens.shape[1]):
        raise TrainError(f"train.negatives is {section.negatives}, and {num} CLS tokens are cached. Lower it.")
    return CachedNegatives(section.negatives, tokens, rows, section.seed)


def resume(run: Run) -> None:
    """Goes back to the last whole checkpoint of this training, if there is one."""
    found = latest_checkpoint(run.folder, run.checkpoint.identity)
    if found is None:
        return
    state = load_checkpoint(found, run.learner.student)
    run.learner.vla.load_state_dict(state["vla"])
    run.learner.bank.load_state_dict(state["bank"])
    run.optimiser.load_state_dict(state["optimiser"])
    if run.accelerator.scaler is not None and state["scaler"] is not None:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.start = int(state["iteration"])
    if (run.folder / BEST).is_file():
        run.best = Best(**state["best"])  # else another training was here meanwhile: the best of what follows
    if run.accelerator.is_main_process:
        mention(f"train: resuming at iteration {run.start} from {found}")


def prepare(run: Run) -> None:
    """Everything onto the device, student and VLA into accelerate's hands."""
    learner, device = run.learner, run.accelerator.device
    for group in run.optimiser.param_groups:
        group.setdefault("initial_lr", group["lr"])
    learner.student, run.optimiser = run.accelerator.prepare(learner.student, run.optimiser)
    if any(parameter.requires_grad for parameter in learner.vla.parameters()):  # DDP wants one
        learner.vla = run.accelerator.prepare(learner.vla)
    learner.text_seen, learner.seen_ids = learner.text_seen.to(device), learner.seen_ids.to(device)
    learner.bank.to(device)
    learner.student.train()


def batches_of(run: Run, stop: int) -> Any:
    accelerator = run.accelerator
    return training_batches(
        run.views,
        start=run.start,
        stop=stop,
        process=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )


def state_of(run: Run) -> dict[str, Any]:
    """What resuming needs beside the student."""
    scaler = run.accelerator.scaler
    return {
        "vla": run.accelerator.unwrap_model(run.learner.vla).state_dict(),
        "bank": run.learner.bank.state_dict(),
        "optimiser": run.optimiser.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "best": asdict(run.best),
    }


def mixed_precision(wanted: str) -> str:
    """accelerate's word for the configured precision; `auto` looks at what the machine computes in."""
    if wanted == "auto":
        has_bf16 = (
            torch.cuda.is_bf16_supported() if torch.cuda.is_available() else torch.cpu._is_avx512_bf16_supported()
        )
        wanted = "bf16" if has_bf16 else "fp32"
    return "no" if wanted == "fp32" else wanted


def schedule(section: Train, iteration: int) -> float:
    """Factor on the learning rates: linear warm-up times poly decay (mmseg's; method section 4)."""
    warm = min((iteration + 1) / section.warmup, 1.0) if section.warmup else 1.0
    return warm * (1 - iteration / section.iterations) ** section.power
