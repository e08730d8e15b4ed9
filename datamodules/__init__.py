"""Data sets: embedded worlds, shards and their index, and the streams that train on them."""
