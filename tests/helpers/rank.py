"""One process of the fixture `ranks`: calls a function of a test file in a gloo group.

    python tests/helpers/rank.py FILE FUNCTION FOLDER

Test files are no modules, so the file is loaded by its path. The group meets in a file of the folder, so that tests
that run side by side never share a port. Arguments are read from and the result is written to the folder.
"""

import datetime
import importlib.util
import os
import sys

import torch
import torch.distributed as dist

if __name__ == "__main__":
    source, name, folder = sys.argv[1:]
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("ranked_test_file", source)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    timeout, meeting = datetime.timedelta(seconds=120), f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=timeout)
    torch.manual_seed(rank)
    result = getattr(module, name)(rank, *torch.load(f"{folder}/arguments.pt", weights_only=True))
    torch.save(result, f"{folder}/result-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
