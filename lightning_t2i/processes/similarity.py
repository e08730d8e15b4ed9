"""Similarity of pictures and texts token by token (FILIP, arXiv 2111.07783), and the losses of contrast over it.

    sI_ij = sum_k u_i[k] max_r <zI_i[k], zT_j[r]>             picture i -> text j, the max over valid r
    sT_ij = sum_r w_i[r] max_k <zT_i[r], zI_j[k]>             text i -> picture j; not the transpose of sI

    zI [B, n1, D], zT [B, n2, D]  unit tokens;  u, w  means over the valid tokens of a row: 1 / n where the mask is True

Of all cosines, b x n1 x B x n2 of them, no more than a tile is ever held: forward keeps the places of the maxima, one
byte each, and backward puts the gradients at these places of the tile again, so that two matrix products give those of
the tokens. Equal cosines: the first place takes the gradient (`amax` would divide it). One pass gives both directions.

pad "exact" leaves pad tokens out of the max. "zero_floor" is what the published Wukong weights were trained with: pad
tokens are zero vectors that take part, so that a maximum over a caption with pads is never below 0.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, logsigmoid

Pad = Literal["exact", "zero_floor"]
TILE = {"cpu": 2**20, "cuda": 2**26}  # cosines held at a time: what stays in a cache, and what fills a GPU


def row_means(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights of a mean over the valid tokens of each row: bool [B, n] with one True at least -> [B, n]."""
    return mask.to(dtype) / mask.sum(1, keepdim=True)


def _places(count: int) -> torch.dtype:
    return torch.uint8 if count <= 2**8 else torch.int16 if count <= 2**15 else torch.int32


class _TokenSimilarity(torch.autograd.Function):
    """a [b, B] and, with `back`, c [B, b] of x [b, n, D] and y [B, m, D]; see `token_similarity`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, u: Tensor, w: Tensor, valid: Tensor | None, back: bool, tile: int
    ) -> tuple[Tensor, Tensor | None]:
        (b, n, _), (many, m, _) = x.shape, y.shape
        keeps = any(ctx.needs_input_grad[:2])
        kind = torch.promote_types(x.dtype, torch.float32)
        a = x.new_empty(b, many, dtype=kind)
        c = x.new_empty(many, b, dtype=kind) if back else None
        at = x.new_empty((b, n, many) if keeps else 0, dtype=_places(m))
        at_back = x.new_empty((b, many, m) if keeps and back else 0, dtype=_places(n))
        step = max(1, tile // (b * n * m))
        for j in range(0, many, step):
            part = slice(j, min(j + step, many))
            cosines = (x.flatten(0, 1) @ y[part].flatten(0, 1).T).view(b, n, -1, m)
            if c is not None:
                best, place = cosines.max(1)
                c[part] = torch.einsum("bjr,jr->jb", best.to(kind), w[part])
                if keeps:
                    at_back[:, part] = place
            if valid is not None:
                cosines.masked_fill_(~valid[part], -torch.inf)
            best, place = cosines.max(3)
            a[:, part] = torch.einsum("bkj,bk->bj", best.to(kind), u)
            if keeps:
                at[:, :, part] = place
        ctx.save_for_backward(x, y, u, w, at, at_back)
        ctx.step = step
        return a, c

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, da: Tensor, dc: Tensor | None = None) -> tuple[Any, ...]:
        x, y, u, w, at, at_back = ctx.saved_tensors
        (b, n, d), (many, m, _) = x.shape, y.shape
        dx, dy = torch.zeros(b * n, d, dtype=da.dtype, device=x.device), torch.empty_like(y)
        for j in range(0, many, ctx.step):
            part = slice(j, min(j + ctx.step, many))
            share = x.new_zeros(b, n, len(y[part]), m)
            own = (da[:, None, part] * u[:, :, None]).to(x)
            share.scatter_(3, at[:, :, part, None].long(), own[..., None])
            if dc is not None:
                own = (dc[part].T[:, :, None] * w[part]).to(x)
                share.scatter_add_(1, at_back[:, None, part].long(), own[:, None])
            flat = share.view(b * n, -1)
            dx += flat @ y[part].flatten(0, 1)
            dy[part] = (flat.T @ x.flatten(0, 1)).view(-1, m, d)
        return dx.view(b, n, d).to(x), dy, None, None, None, None, None


def token_similarity(
    x: Tensor,
    y: Tensor,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    pad: Pad = "exact",
    back: bool = False,
    tile: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Similarity of every row of x to every row of y, and, with `back`, of every row of y to every row of x.

    Args:
        x: unit tokens [b, n, D].
        y: unit tokens [B, m, D].
        x_mask, y_mask: True for the tokens that count, bool [b, n] and [B, m]; None for all. Every row needs one. With
            `back` all tokens of x must count.
        pad: what the other tokens of y do in the max, see above.
        tile: cosines held at a time, `TILE` by default; it changes memory and speed only.

    Returns:
        float32 (float64 of float64) [b, B], and [B, b] or None.
    """
    if back and x_mask is not None:
        raise ValueError("one pass gives both directions where all tokens of x count")
    kind = torch.promote_types(x.dtype, torch.float32)
    if x.shape[1] == y.shape[1] == 1:  # one vector each: cosines, equal both ways
        cosines = x[:, 0].to(kind) @ y[:, 0].to(kind).T
        return cosines, cosines.T if back else None
    u, w = (
        row_means(torch.ones(tokens.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask, kind)
        for tokens, mask in ((x, x_mask), (y, y_mask))
    )
    if y_mask is not None and pad == "zero_floor":
        y, y_mask = y * y_mask[..., None], None
    found: tuple[Tensor, Tensor | None] = _TokenSimilarity.apply(
        x, y, u, w, y_mask, back, tile or TILE.get(x.device.type, TILE["cpu"])
    )
    return found


class _Gather(torch.autograd.Function):
    """Rows of all processes; backward sums their gradients over processes, each getting those of its own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        found = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(found, rows.contiguous())
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        own = gradient.new_empty(len(gradient) // dist.get_world_size(), *gradient.shape[1:])
        dist.reduce_scatter_tensor(own, gradient.contiguous())
        return own


def gather_rows(rows: Tensor) -> Tensor:
    """[b, ...] of this process -> [W b, ...] of all W in the order of ranks; as it is where there is one process.

    The gradient is summed by a reduce-scatter: with a loss that is the mean over a process's own rows, and gradients of
    weights averaged over processes, these are those of one process with all rows. Every process has equally many.
    """
    alone = not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1
    return rows if alone else _Gather.apply(rows)


def strips(images: Tensor, texts: Tensor, mask: Tensor, pad: Pad = "exact") -> tuple[Tensor, Tensor]:
    """sI of this process's pictures against all texts, and sT of its texts against all pictures: [b, W b] each.

    Args:
        images: unit tokens [b, n1, D].
        texts: unit tokens [b, n2, D], n2 equal on all processes.
        mask: valid text tokens, bool [b, n2].
    """
    every_text, every_mask = gather_rows(texts), gather_rows(mask.to(torch.uint8)).bool()
    if every_text is texts:
        there, back = token_similarity(images, texts, None, mask, pad, back=True)
        assert back is not None
        return there, back
    there, _ = token_similarity(images, every_text, None, every_mask, pad)
    return there, token_similarity(texts, gather_rows(images), mask)[0]


def contrastive_loss(there: Tensor, back: Tensor, scale: Tensor, first: int = 0, smoothing: float = 0.0) -> Tensor:
    """InfoNCE, 1/2 (CE(scale sI) + CE(scale sT)), the mean over own rows: a scalar in float32.

    Args:
        there, back: sI and sT of own rows, [b, B] each.
        scale: of the logits, one element.
        first: column of the first own row.
        smoothing: share of the target that all B columns get alike.
    """
    own = torch.arange(first, first + len(there), device=there.device)
    losses = [cross_entropy(scale * s, own, label_smoothing=smoothing) for s in (there, back)]
    return (losses[0] + losses[1]) / 2


def sigmoid_loss(similarity: Tensor, scale: Tensor, bias: Tensor, first: int = 0) -> Tensor:
    """-1/b sum_ij log sigmoid(y_ij (scale s_ij + bias)), y = 1 for pairs and -1 else (SigLIP, arXiv 2303.15343).

    Args:
        similarity: s [b, B] of own rows.
        scale, bias: one element each.
        first: column of the first own row.
    """
    sign = torch.full_like(similarity, -1.0)
    rows = torch.arange(len(similarity), device=similarity.device)
    sign[rows, first + rows] = 1.0
    return -logsigmoid(sign * (scale * similarity + bias)).sum() / len(similarity)


@torch.no_grad()
def _best(x: Tensor, y: Tensor, y_mask: Tensor | None, tile: int) -> Tensor:
    """The largest cosine of each token of x [b, n, D] with any valid token of y [B, m, D]: [b, n]."""
    flat = y.flatten(0, 1) if y_mask is None else y[y_mask]
    step = max(1, tile // (x.shape[1] * len(flat)))
    return torch.cat([(part @ flat.T).amax(2) for part in x.split(step)])


def top_tokens(
    x: Tensor, x_mask: Tensor | None, y: Tensor, y_mask: Tensor | None, share: float
) -> tuple[Tensor, Tensor | None]:
    """The tokens of each row of x that resemble a token of any row of y most (FILIP, section 3.2), in their order.

    Args:
        x: unit tokens [b, n, D] with mask [b, n]; pads come last.
        y: unit tokens [B, m, D] with mask [B, m], of the same process.
        share: of the n tokens that are kept, one at least. Which ones has no gradient.

    Returns:
        Tokens [b, k, D] and their mask, None where x has none.
    """
    keep = max(1, int(x.shape[1] * share))
    scores = _best(x, y, y_mask, TILE.get(x.device.type, TILE["cpu"]))
    if x_mask is not None:
        scores = scores.masked_fill(~x_mask, -torch.inf)
    rows = scores.topk(keep, dim=1).indices.sort(1).values
    chosen = x.gather(1, rows[..., None].expand(-1, -1, x.shape[2]))
    return chosen, None if x_mask is None else x_mask.gather(1, rows)
