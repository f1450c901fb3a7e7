"""Visual-Language Adapter: from class means of the student's features to classifier weights.

Axes: M label ids present in the batch (seen classes and potential objects), B images, C channels.
It exists only in training: potential objects have no name, so no text feature either.
"""

from math import sqrt

import torch.nn.functional as F
from torch import Tensor, nn

NUM_LAYERS, NUM_HEADS = 2, 8  # method section 6
WIDENING = 4  # torch's default feed-forward width, 2048, over the paper's C = 512


class TransformerAdapter(nn.Module):
    """torch's TransformerDecoder: the means are queries, the batch's CLS tokens keys and values.

    How it starts matters. The library's layers are post-norm, so the output is a layer norm's and its
    length doesn't depend on the student's: good, since the student's features grow as their logits
    need, while eq. 8 asks for unit length. But with the norm's usual gain of 1 that length is
    sqrt(C): eq. 8 would start near C, and potential objects, at 22 times the text features' length for
    C = 512, would win every softmax of eq. 9. So the last norm's gain starts at 1 / sqrt(C): generated
    features start with unit length, as text features have; eq. 8 starts near 2. The gain stays trainable.

    No dropout by default: the output is the classifier of eq. 9, and noise in it is noise in the labels.

    Raises: ValueError if the heads don't divide the channels.
    """

    def __init__(
        self, channels: int, num_layers: int = NUM_LAYERS, num_heads: int = NUM_HEADS, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"{num_heads} heads don't divide {channels} channels; choose a divisor.")
        layer = nn.TransformerDecoderLayer(channels, num_heads, WIDENING * channels, dropout, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, num_layers)
        for parameter in self.decoder.parameters():
            if parameter.ndim > 1:  # TransformerDecoder deep-copies one layer: draw each layer's own weights
                nn.init.xavier_uniform_(parameter)
        last = self.decoder.layers[-1]
        assert isinstance(last, nn.TransformerDecoderLayer)
        nn.init.constant_(last.norm3.weight, 1 / sqrt(channels))

    def forward(self, means: Tensor, cls: Tensor) -> Tensor:
        """Shapes: means (M, C), cls (B, C), L2-normalised here -> (M, C)."""
        if len(means) == 0:
            # One zero query, decoded and cut off: every parameter keeps a (zero) gradient, as DDP demands.
            return self(means.new_zeros(1, means.shape[1]), cls)[:0]
        return self.decoder(means[None], F.normalize(cls, dim=1)[None])[0]


class MlpAdapter(nn.Module):
    """Linear, ReLU, linear, at the same width; the CLS tokens are not used (Table 5)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels))

    def forward(self, means: Tensor, cls: Tensor) -> Tensor:
        """Shapes: means (M, C), cls (B, C) -> (M, C)."""
        return self.layers(means)


class OriginalAdapter(nn.Module):
    """The means themselves (Table 5)."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, means: Tensor, cls: Tensor) -> Tensor:
        """Shapes: means (M, C), cls (B, C) -> (M, C)."""
        return means


VARIANTS: dict[str, type[nn.Module]] = {
    "transformer": TransformerAdapter,
    "mlp": MlpAdapter,
    "original": OriginalAdapter,
}


class VisualLanguageAdapter(nn.Module):
    """Generated features P of eq. 8 and 9, one per label id present, from the means p of eq. 7.

    `options` go to the variant (transformer: num_layers, num_heads, dropout).

    Source: CLIPTeacher section 3.3 and Table 5; method section 6.
    Raises: ValueError for an unknown variant, means and cls of different width.
    """

    def __init__(self, channels: int, variant: str = "transformer", **options: int | float) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"adapter {variant!r} is not one of {sorted(VARIANTS)}.")
        self.channels = channels
        self.adapter = VARIANTS[variant](channels, **options)

    def forward(self, means: Tensor, cls: Tensor) -> Tensor:
        """Shapes: means (M, C), M may be 0, cls (B, C) of any length -> (M, C)."""
        if means.shape[1:] != (self.channels,) or cls.shape[1:] != (self.channels,):
            raise ValueError(f"means {tuple(means.shape)}, cls {tuple(cls.shape)}; {self.channels} channels wanted.")
        return self.adapter(means, cls)
