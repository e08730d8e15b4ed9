"""How checkpoints are written and kept: forms, background, retention, copies elsewhere."""
