"""What a training would need, without its weights, data and devices: `python train.py check` (docs/preflight.md)."""
