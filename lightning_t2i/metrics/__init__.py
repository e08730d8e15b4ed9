"""Metrics: torchmetrics classes that are right on several ranks and whose names say what they measured."""
