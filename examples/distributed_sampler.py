"""Purify a folder of image files with PyTorch's launcher: each process purifies its share.

torchrun --nproc-per-node 2 examples/distributed_sampler.py IMAGES OUT
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DistributedSampler

from oag_transform import OnlineAlternateGenerator, files
from oag_transform.streams import index_of


def main(source: str, out: str, seed: int = 0) -> int:
    """Returns the number of images that this process purified. Random streams follow the files' names."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    paths = sorted(path for path in Path(source).iterdir() if path.is_file())
    # drop_last=False, the default, would purify some images twice if the shares were unequal
    sampler: DistributedSampler[int] = DistributedSampler(range(len(paths)), shuffle=False, drop_last=True)  # type: ignore[arg-type]
    rest = paths[len(sampler) * dist.get_world_size() :][dist.get_rank() :: dist.get_world_size()]
    purify = OnlineAlternateGenerator(seed=seed)
    Path(out).mkdir(parents=True, exist_ok=True)
    share = [*(paths[i] for i in sampler), *rest]
    for path in share:
        purify(files.read_rgb(path), index=index_of(path.name)).save(Path(out, f"{path.stem}.png"))
    dist.barrier()
    dist.destroy_process_group()
    return len(share)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: torchrun --nproc-per-node 2 examples/distributed_sampler.py IMAGES OUT")
    main(sys.argv[1], sys.argv[2])
