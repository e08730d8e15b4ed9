"""What the server of programs.py imports before it forks: all that a training imports but W&B. Nothing here computes.

W&B makes a folder for pictures when it is imported, which the first program to end would remove for all.
"""

import gc
import importlib
import pkgutil

for package in ("lightning_t2i", "callbacks", "datamodules", "lightning_modules"):
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
for name in (
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d",
    "diffusers.models.unets.unet_2d_condition",
    "pytest",
    "torch.distributed.tensor",
    "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
):
    importlib.import_module(name)
gc.freeze()
