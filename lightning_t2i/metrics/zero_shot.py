"""Zero-shot classification by Chinese prompts: how well a picture's class is told from the class names alone.

    one vector each   the mean of a class's unit prompt vectors, of unit length again; score: cosine
    mean_sim          s_c = mean_t sI(picture, prompt t of class c)
    mean_prob         s_c = mean_t softmax_c(scale sI(picture, prompt t of class c)); the published code has scale 1

Vectors of token-wise styles have no mean over prompts; both other rules serve them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

TEMPLATES = ("{}的照片。", "一张{}的照片。", "一张{}的特写。", "{}的草图。", "模糊的{}照片。", "一个{}。")
BARE = ("{}",)
Ensemble = Literal["mean_sim", "mean_prob"]


def class_scores(
    model: Any,
    images: Tensor,
    names: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
    ensemble: Ensemble = "mean_sim",
    scale: float = 1.0,
    block: int = 256,
) -> Tensor:
    """Scores [N, C] of N pictures for C classes.

    Args:
        model: has `encode_text` and `similarity`, as `DualEncoderPipeline`.
        images: features of pictures [N, D] or [N, n, D].
        names: of the classes.
        templates: each with {} in the place of the name.
        ensemble, scale: rule for token-wise features, see above.
        block: pictures at a time.
    """
    texts = [model.encode_text([template.format(name) for name in names]) for template in templates]
    if images.ndim == 2:
        classes = normalize(torch.stack(texts).mean(0), dim=-1)
        return images @ classes.T
    rule: Callable[[Tensor], Tensor] = (lambda s: s) if ensemble == "mean_sim" else lambda s: (scale * s).softmax(1)
    rows = [torch.stack([rule(model.similarity(part, t)[0]) for t in texts]).mean(0) for part in images.split(block)]
    return torch.cat(rows)


def top_accuracy(scores: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Share of the pictures whose class is among the k best, as top1 and top5; scores [N, C], labels [N]."""
    best = scores.topk(min(max(ks), scores.shape[1]), dim=1).indices
    return {f"top{k}": float((best[:, :k] == labels[:, None]).any(1).double().mean()) for k in ks}
