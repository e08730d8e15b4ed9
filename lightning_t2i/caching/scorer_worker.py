"""A scorer in an interpreter of its own: python scorer_worker.py {imagereward,hpsv2,brightness}.

It needs numpy, Pillow and the scorer's package, and nothing of this repository; see `rewards.Piped` for what it reads
and writes. "brightness", the mean of all pixels in [0, 1], needs numpy alone and shows that the pipe works.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

Score = Callable[[Any, list[str]], list[float]]


def imagereward() -> Score:
    """ImageReward-v1.0 (arXiv 2304.05977), package image-reward."""
    from PIL import Image

    model = importlib.import_module("ImageReward").load("ImageReward-v1.0")
    return lambda pixels, prompts: [
        float(model.score(prompt, Image.fromarray(picture))) for picture, prompt in zip(pixels, prompts, strict=True)
    ]


def hpsv2() -> Score:
    """HPS v2.1 (arXiv 2306.09341), package hpsv2."""
    from PIL import Image

    package = importlib.import_module("hpsv2")

    def score(pixels: Any, prompts: list[str]) -> list[float]:
        found = np.empty(len(prompts))
        for prompt in dict.fromkeys(prompts):  # a call reads the weights: one for all pictures of a prompt
            places = [i for i, other in enumerate(prompts) if other == prompt]
            pictures = [Image.fromarray(pixels[i]) for i in places]
            found[places] = np.array(package.score(pictures, prompt, hps_version="v2.1"), float).ravel()
        return found.tolist()

    return score


def brightness() -> Score:
    """The mean of all pixels."""
    return lambda pixels, prompts: (pixels.reshape(len(pixels), -1).mean(1) / 255).tolist()


SCORERS = {"imagereward": imagereward, "hpsv2": hpsv2, "brightness": brightness}


def main() -> int:
    """Answers batches until its input ends."""
    score = SCORERS[sys.argv[1]]()
    answers, sys.stdout = sys.stdout, sys.stderr  # packages print
    source = sys.stdin.buffer
    while head := source.readline():
        facts = json.loads(head)
        pixels = np.frombuffer(source.read(int(np.prod(facts["shape"]))), np.uint8).reshape(facts["shape"])
        try:
            answer: dict[str, Any] = {"scores": score(pixels, facts["prompts"])}
        except Exception as error:  # whatever the package raises is for the other side to tell
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
