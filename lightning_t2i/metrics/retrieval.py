"""Recalls of retrieval between pictures and texts, from an explicit map of what belongs together.

    R@k   share of the queries with one of their own among the k most similar candidates
    mean  of R@1, R@5, R@10, both ways

Pictures have several captions, or a query several pictures: nothing is taken to be 1:1. Similarities are computed block
by block and only the best k of each query are kept, so that memory grows with pictures plus texts, not their product.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_t2i.errors import UserError

KS = (1, 5, 10)
BLOCK = 256  # rows of a block of pictures, and of texts
Similarity = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class TopK:
    """The k best candidates of each query, of candidates that come in blocks.

    Args:
        queries: their number.
        k: how many are kept.
    """

    def __init__(self, queries: int, k: int = KS[-1]):
        self.values = torch.full((queries, k), -torch.inf)
        self.indices = torch.full((queries, k), -1)

    def add(self, scores: Tensor, queries: slice, first: int) -> None:
        """Scores [q, c] of some queries for candidates first ... first + c - 1; equal scores keep the earlier one."""
        scores = scores.float().cpu()
        places = torch.arange(first, first + scores.shape[1]).expand_as(scores)
        values = torch.cat([self.values[queries], scores], 1)
        indices = torch.cat([self.indices[queries], places], 1)
        order = values.sort(dim=1, descending=True, stable=True).indices[:, : self.values.shape[1]]
        self.values[queries], self.indices[queries] = values.gather(1, order), indices.gather(1, order)


def search(
    similarity: Similarity, images: Tensor, texts: Tensor, k: int = KS[-1], block: int = BLOCK
) -> tuple[TopK, TopK]:
    """The best texts of each picture by sI, and the best pictures of each text by sT.

    Args:
        similarity: features of pictures [b, ...] and texts [c, ...] -> sI [b, c] and sT [c, b].
        images, texts: features [N, ...] and [M, ...].
    """
    to_text, to_image = TopK(len(images), k), TopK(len(texts), k)
    for i in range(0, len(images), block):
        for j in range(0, len(texts), block):
            rows, columns = slice(i, i + block), slice(j, j + block)
            there, back = similarity(images[rows], texts[columns])
            to_text.add(there, rows, j)
            to_image.add(back, columns, i)
    return to_text, to_image


def recalls(top: Tensor, pairs: Tensor, candidates: int, ks: tuple[int, ...] = KS) -> list[float]:
    """R@k of the queries that have a partner.

    Args:
        top: candidates of each query, best first, int64 [Q, K].
        pairs: (query, candidate) that belong together, int64 [P, 2].
        candidates: their number.
    """
    queries = pairs[:, 0].unique()
    own = queries[:, None] * candidates + top[queries]
    hits = torch.isin(own, pairs[:, 0] * candidates + pairs[:, 1]) & (top[queries] >= 0)
    return [float(hits[:, :k].any(1).double().mean()) for k in ks]


class RetrievalRecall:
    """Collects features of pictures and texts, on the CPU, and gives the recalls of all processes' together.

    Args:
        whole: every process is given everything, so that nothing is gathered.
    """

    def __init__(self, whole: bool = False) -> None:
        self.whole = whole
        self.reset()

    def reset(self) -> None:
        self.parts: list[tuple[Tensor, ...]] = []

    def add(
        self, images: Tensor, ids: Tensor, texts: Tensor, owners: Tensor, queries: Sequence[str] | None = None
    ) -> None:
        """Features of pictures [b, ...] with ids [b], and of texts [c, ...] with the id of the picture of each [c].

        Args:
            queries: what the texts say, where equal ones are one query that any of its pictures answers.
        """
        part = [t.cpu() for t in (images, ids, texts, owners)]
        if queries is not None:
            hashes = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in queries)
            part.append(torch.tensor([int.from_bytes(value, "big", signed=True) for value in hashes]))
        self.parts.append(tuple(part))

    def compute(self, similarity: Similarity) -> dict[str, float]:
        """i2t/r1 ... t2i/r10, i2t/mean, t2i/mean and their mean; a collective where there are several processes.

        Raises:
            UserError: nothing was collected.
        """
        parts, several = self.parts, dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if several and not self.whole:
            found: list[list[tuple[Tensor, ...]]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(found, parts)
            parts = [part for own in found for part in own]
        if not parts:
            raise UserError("No picture to search for", where="data.val")
        images, ids, texts, owners, *queries = (torch.cat(column) for column in zip(*parts, strict=True))
        rows = torch.arange(len(texts))
        if queries:
            unique, rows = queries[0].unique(return_inverse=True)
            first = torch.full((len(unique),), len(texts)).scatter_reduce(0, rows, torch.arange(len(texts)), "amin")
            texts = texts[first]
        to_text, to_image = search(similarity, images, texts)
        return summary(to_text.indices, to_image.indices, torch.stack([*belonging(ids, owners, rows)], 1))


def belonging(ids: Tensor, owners: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of pictures with ids [N], and of texts, that belong together: int64 [P] each.

    Args:
        owners: id of the picture of each text [M]; those that are not among ids have no picture.
        rows: row of each text [M].
    """
    known, order = ids.sort()
    place = torch.searchsorted(known, owners).clamp(max=len(ids) - 1)
    there = known[place] == owners
    return order[place[there]], rows[there]


def summary(to_text: Tensor, to_image: Tensor, pairs: Tensor) -> dict[str, float]:
    """Names and values that are logged, of the best candidates [N, K] and [M, K] and (picture, text) pairs [P, 2]."""
    ways = {"i2t": (to_text, pairs, len(to_image)), "t2i": (to_image, pairs.flip(1), len(to_text))}
    values: dict[str, float] = {}
    for name, arguments in ways.items():
        found = recalls(*arguments)
        values |= {f"{name}/r{k}": value for k, value in zip(KS, found, strict=True)}
        values[f"{name}/mean"] = sum(found) / len(found)
    values["mean"] = (values["i2t/mean"] + values["t2i/mean"]) / 2
    return values
