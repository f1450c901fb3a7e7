"""torchvision's segmentation models as students, without the enlargement to the image that they end with."""

from __future__ import annotations

from typing import Any

import torchvision
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pipeline.config import Student
from pipeline.models.dense import STRIDES, DenseStudent, StudentError, parts_of, said, start_head
from pipeline.models.own_net import load_published

IMAGENET = "IMAGENET1K_V1"  # what torchvision's own training of these models starts from


def names() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models.segmentation)


class TorchvisionNet(nn.Module):
    """Backbone and classifier of a torchvision model.

    Shapes: images (B, 3, S, S) -> (B, C, S/8, S/8); deeplabv3_mobilenet_v3_large is enlarged to that from its 16.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone, self.classifier = model.backbone, model.classifier

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        dense = self.classifier(features.get("out", features))  # LRASPP's takes two of them
        size = (images.shape[2] // STRIDES[-1], images.shape[3] // STRIDES[-1])
        if dense.shape[2:] != size:
            dense = interpolate(dense, size, mode="bilinear", align_corners=False)
        return dense


def torchvision_student(section: Student, channels: int, pretrained: bool) -> DenseStudent:
    """Builds the model by name, its backbone with ImageNet's weights unless they come from student.weights.

    Raises: StudentError for a name that torchvision lacks, options (it has none), or weights that can't be had.
    """
    name = section.arch.partition(":")[2]
    if name not in names():
        wanted = ", ".join(f"torchvision:{each}" for each in names())
        raise StudentError(f"student.arch {section.arch}: torchvision has no such model; want one of {wanted}.")
    if section.options:
        raise StudentError(f"student.options {next(iter(section.options))}: {section.arch} takes none. Leave it out.")
    published = pretrained and section.weights is None and section.encoder_weights is not None
    try:
        model = torchvision.models.get_model(
            name, weights=None, weights_backbone=IMAGENET if published else None, num_classes=channels
        )
    except Exception as error:  # the hub's and torch's own
        raise StudentError(
            f"student.arch {section.arch}: its backbone's weights {IMAGENET} can't be had: {said(error)}. Offline, set "
            "student.encoder_weights to null or student.weights to a file."
        ) from None
    net = TorchvisionNet(model)
    parts = parts_of(net, section, ("backbone",))
    student = DenseStudent(net, section.mean, section.std, encoder_parts=parts, is_foreign=True)
    if pretrained and section.weights is not None:
        student.notes.append(load_published(student, section))
    for layer in net.classifier.modules():
        if isinstance(layer, nn.Conv2d) and layer.out_channels == channels and layer.bias is not None:
            start_head(layer)
    return student
