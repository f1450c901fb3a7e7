"""CAM + CAA of images with several classes, batched, against one class at a time as CLIP-ES's published code does it.

    python bench/cams.py                         ViT-B/16, random weights, 512 x 512, three classes an image
    python bench/cams.py --precision bf16        ours in bfloat16; the other side as it is

The other side, written here: blocks 1 to 11 once an image without gradients, attention kept of every block; then for
each class the last block forward and backward, the mean of the last eight blocks' attention and the affinity
anew, the boxes, the product. Both sides on the same images, in turns; the bare forward beside them. On what the
arithmetic allows, see the floor that is printed.
"""

from __future__ import annotations

import argparse

import open_clip
import torch
from interleaved import heading, medians, verdict
from torch.nn.functional import normalize

from pipeline.config import Cams
from pipeline.models.clip import describe
from pipeline.models.explain import _embedded, _finished, attended
from pipeline.models.teacher import Teacher
from pipeline.models.towers import tower_of
from pipeline.ops.cam import box_masks, min_max
from pipeline.teaching.maps import explained_maps

SIDE, TOKENS, WIDTH, LAYERS = 512, 1025, 768, 12
BACKGROUND_NAMES = 25  # VOC's


def block_flops() -> float:
    return 2 * (12 * WIDTH**2 * TOKENS + 2 * TOKENS**2 * WIDTH)


def teacher_of(precision: str) -> Teacher:
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-16-quickgelu", load_weights=False).eval().requires_grad_(False)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    preprocess = open_clip.get_model_preprocess_cfg(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device=device, dtype=dtype)
    return Teacher(
        model=model,
        description=describe("ViT-B-16-quickgelu", None, None),
        tower=tower_of(model.visual),
        image_size=224,
        channels=512,
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
        device=torch.device(device),
        dtype=dtype,
        provenance={},
    )


def one_at_a_time(teacher: Teacher, section: Cams, image: torch.Tensor, features: torch.Tensor, num: int) -> list:
    """The published order of things for one image: features (num + N, C), the first `num` are its classes."""
    visual, kept, maps = teacher.model.visual, [], []
    with torch.no_grad():
        tokens = _embedded(teacher, image[None])
        for block in visual.transformer.resblocks[:-1]:
            mixed, weights = attended(block.attn, block.ln_1(tokens))
            kept.append(weights)
            tokens = _finished(block, tokens, mixed)
    last = visual.transformer.resblocks[-1]
    for k in range(num):
        entering = last.ln_1(tokens).detach().requires_grad_(True)
        with torch.enable_grad():
            mixed, weights = attended(last.attn, entering)
            leaving = visual.ln_post(_finished(last, tokens, mixed))
            pooled = normalize((leaving[:, 1:].mean(1) @ visual.proj).float(), dim=-1)
            score = (teacher.model.logit_scale.exp().float() * pooled @ features.T).softmax(1)[0, k]
            (gradient,) = torch.autograd.grad(score, entering)
        cam = min_max((entering[0, 1:].detach().float() @ gradient[0, 1:].float().mean(0)).relu())
        attention = torch.stack([*kept[-(section.blocks - 1) :], weights]).mean(0)[0]
        for _ in range(section.sinkhorn):
            attention = attention / attention.sum(0, keepdim=True)
            attention = attention / attention.sum(1, keepdim=True)
        attention = (attention + attention.T) / 2
        attention = attention @ attention
        side = image.shape[1] // teacher.patch
        boxes = box_masks(cam.view(1, side, -1), section.box_threshold).flatten()
        maps.append(min_max((attention * boxes) @ cam))
    return maps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--images", type=int, default=4, help="in a batch of ours")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    heading(f"CAM + CAA, ViT-B/16 at {SIDE} x {SIDE}, {chosen.classes} classes an image, ours in {chosen.precision}")
    section = Cams()
    plain, ours = teacher_of("fp32"), teacher_of(chosen.precision)
    images = torch.randint(0, 256, (chosen.images, 3, SIDE, SIDE), dtype=torch.uint8)
    foreground = normalize(torch.randn(chosen.classes, 512), dim=1).to(plain.device)
    background = normalize(torch.randn(BACKGROUND_NAMES, 512), dim=1).to(plain.device)
    tags = [tuple(range(chosen.classes))] * chosen.images
    features = torch.cat([foreground, background])

    def batched() -> torch.Tensor:
        return explained_maps(ours, section, images, tags, foreground, background)[0]

    def singly() -> list:
        return [one_at_a_time(plain, section, image, features, chosen.classes) for image in images]

    def bare() -> None:
        with torch.inference_mode():
            tokens = _embedded(plain, images)
            plain.model.visual.transformer(tokens)

    theirs = torch.stack([torch.stack(maps) for maps in singly()]).view(chosen.images, chosen.classes, 32, 32)
    print(f"  largest difference of a map between the two: {float((theirs.cpu() - batched()).abs().max()):.1e}")
    took = medians({"ours": batched, "one class at a time": singly, "bare forward": bare}, chosen.rounds)
    for name, seconds in took.items():
        print(f"  {name}: {1000 * seconds / chosen.images:.0f} ms an image")
    print(f"  ours is {took['ours'] / took['bare forward']:.2f} of the bare float32 forward's time")
    each = block_flops()
    # A backward to the entrance of the block, without gradients of weights, costs as much as its forward.
    least = LAYERS * each + chosen.classes * each
    other = (LAYERS - 1) * each + chosen.classes * 2 * each + chosen.classes * 2 * 1024**3
    print(
        f"  floor in GFLOP an image: ours {least / 1e9:.0f}, one class at a time {other / 1e9:.0f}: {other / least:.2f}"
    )
    verdict(
        "times as fast",
        took["one class at a time"] / took["ours"],
        10 if torch.cuda.is_available() else 3,
        at_most=False,
    )


if __name__ == "__main__":
    main()
