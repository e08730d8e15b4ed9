"""What a trained dual encoder knows of the worlds: retrieval, zero-shot classes, binding of colours, places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from datamodules.retrieval import RetrievalPairs
from datamodules.worlds.shapes_captions import ZH_COLOUR, ZH_SHAPE, short_chinese
from datamodules.worlds.shapes_scenes import HELD_OUT, PAIRS
from lightning_modules.wukong import Wukong
from lightning_t2i.metrics.retrieval import RetrievalRecall
from lightning_t2i.metrics.zero_shot import BARE, TEMPLATES, class_scores, top_accuracy
from lightning_t2i.processes.similarity import contrastive_loss, token_similarity

Complete = Any  # Records that have pictures, captions and, in the shapes world, scenes
SHARED: dict[str, dict[str, Any]] = {"shapes": {"source": "shapes", "short": True}, "openmoji": {"source": "openmoji"}}


def records_of(world: str, split: str, n: int) -> list[Complete]:
    """The first n pictures of a split, in batches of 100."""
    stream = RetrievalPairs(**SHARED[world], split=split, batch_size=100, languages=["zh"], limit=n, in_memory=True)
    stream.prepare()
    stream.setup()
    stream.begin(0, split, shuffle=False)
    count = len(stream)
    return [stream.load(range(i, min(i + 100, count)), i // 100) for i in range(0, count, 100)]


def retrieval(method: Wukong, batches: Sequence[Complete]) -> dict[str, float]:
    """Recalls over all captions, both ways, with chance: r1, r10, mean, chance."""
    recall, pictures, texts = RetrievalRecall(), 0, 0
    for records in batches:
        own = records.captions
        owners = torch.cat([records.id[i].repeat(len(found)) for i, found in enumerate(own)])
        words = method.encode_text([text for found in own for text in found])
        recall.add(method.encode_image(records.image), records.id, words, owners)
        pictures, texts = pictures + len(records), texts + len(words)
    found = recall.compute(method.pipeline.similarity)
    by_chance = sum(min(k / pictures, 1.0) for k in (1, 5, 10)) / 3
    both = {f"r{k}": (found[f"i2t/r{k}"] + found[f"t2i/r{k}"]) / 2 for k in (1, 10)}
    return {"mr": found["mean"], **both, "chance": by_chance, "pictures": float(pictures)}


def zero_shot(method: Wukong, batches: Sequence[Complete]) -> dict[str, float]:
    """Accuracy among the trained pairs of shape and colour, on pictures of one object: bare names and prompts."""
    known = [pair for pair in PAIRS if pair not in HELD_OUT]
    names = [f"{ZH_COLOUR[colour]}{ZH_SHAPE[shape]}" for shape, colour in known]
    images, labels = [], []
    for records in batches:
        for row, scene in enumerate(records.scene):
            pair = (scene["objects"][0]["shape"], scene["objects"][0]["colour"])
            if len(scene["objects"]) == 1 and pair in known:
                images.append(records.image[row])
                labels.append(known.index(pair))
    features = method.encode_image(torch.stack(images))
    arms = {"bare": BARE, "prompts": TEMPLATES}
    scores = {name: class_scores(method.pipeline, features, names, templates) for name, templates in arms.items()}
    found = {name: top_accuracy(s, torch.tensor(labels))["top1"] for name, s in scores.items()}
    return {**found, "gain": found["prompts"] - found["bare"]}


def swapped(scene: dict[str, Any]) -> dict[str, Any]:
    """The scene with the colours of its two objects exchanged."""
    a, b = scene["objects"]
    return {**scene, "objects": [{**a, "colour": b["colour"]}, {**b, "colour": a["colour"]}]}


def binding(method: Wukong, batches: Sequence[Complete]) -> dict[str, float]:
    """How often a picture of two objects is nearer to its caption than to that with exchanged colours."""
    right = total = 0
    for records in batches:
        rows = [i for i, scene in enumerate(records.scene) if len(scene["objects"]) == len(scene["ask"]) == 2]
        scenes = [records.scene[i] for i in rows]
        images = method.encode_image(records.image[rows])
        good, bad = (
            method.pipeline.similarity(images, method.encode_text([short_chinese(s)[0] for s in found]))[0].diagonal()
            for found in (scenes, [swapped(s) for s in scenes])
        )
        right, total = right + int((good > bad).sum()), total + len(rows)
    return {"binding": right / total}


def location(method: Wukong, batches: Sequence[Complete]) -> dict[str, float]:
    """How often the best patch of a word's characters lies on the object that it names, and these objects' share."""
    if method.style != "f":
        return {}
    hits, areas = [], []
    for records in batches:
        for row, scene in enumerate(records.scene):
            if len(scene["objects"]) == len(scene["ask"]) == 2:
                text = short_chinese(scene)[0]
                tokens = method.encode_text([text])[0]
                patches = method.encode_image(records.image[row : row + 1])[0]
                best = (tokens @ patches.T).argmax(1).tolist()
                for found in scene["objects"]:
                    on = on_object(found["box"], round(len(patches) ** 0.5), records.image.shape[-1])
                    word = ZH_COLOUR[found["colour"]] + ZH_SHAPE[found["shape"]]
                    place = text.index(word) + 1  # behind [CLS]; every character is a token
                    hits += [float(on[best[place + i]]) for i in range(len(word))]
                    areas.append(sum(on) / len(on))
    return {"located": sum(hits) / len(hits), "area": sum(areas) / len(areas)}


def on_object(box: Sequence[int], side: int, size: int) -> list[bool]:
    """Which of side x side patches a box of pixels touches by a quarter of a patch at least."""
    step = size // side
    found = []
    for row in range(side):
        for column in range(side):
            width = min(box[2], (column + 1) * step) - max(box[0], column * step)
            height = min(box[3], (row + 1) * step) - max(box[1], row * step)
            found.append(width > 0 and height > 0 and 4 * width * height >= step * step)
    return found


def full_loss(method: Wukong, batches: Sequence[Complete]) -> dict[str, float]:
    """The loss of all tokens over batches of 100, whatever shares were trained on."""
    total = 0.0
    for records in batches:
        vectors, ids = method.pipeline.image(records.image), method.tokenize(records.caption, full=True)
        images, texts, mask, scale, _ = method.generator_of("towers")(vectors, ids)
        there, back = token_similarity(images, texts, None, mask, method.pad, back=True)
        assert back is not None
        total += float(contrastive_loss(there, back, scale))
    return {"loss": total / len(batches)}
