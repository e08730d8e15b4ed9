"""Benchmarks of speed. `python -m benchmarks` runs all of them and writes docs/performance.md.

A script here is a benchmark when it has

    measure(quick: bool = False) -> {"title": text, "tables": [{"columns": columns, "rows": rows}, ...]}

Columns are pairs of a name and a format as of `format` ("" for texts); rows hold plain numbers and texts, None for an
empty cell. It runs in a process of its own with one thread. `quick` asks for the fewest repetitions that show that it
works.
"""
