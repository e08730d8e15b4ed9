"""What the methods of lightning-t2i stand on: engine, networks, processes, metrics, strategies."""

__version__ = "0.1.0"
