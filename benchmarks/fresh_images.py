"""A folder of the images that a run of ``oag-transform evaluate`` has not looked at, to repeat a result on fresh images.

    python -m benchmarks.fresh_images cifar10/val cifar10-fresh --looked-at 111

``--looked-at`` and ``--seed`` are facts of the run's result ("111 looked at"). The new folder has links in folders of classes.
"""

import argparse
from pathlib import Path

from oag_transform.evaluation.data import open_images, shuffled


def main(data: Path, out: Path, looked_at: int, seed: int) -> int:
    """Make the folder; return the number of its images."""
    listing = open_images(str(data))
    fresh = shuffled(listing, seed)[looked_at:]
    for name in listing.classes:
        (out / name).mkdir(parents=True)
    for position in fresh:
        path = Path(listing.names[position])
        (out / path).symlink_to((data / path).resolve())
    return len(fresh)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of folders of images")
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--looked-at", type=int, required=True, help="number of images that the run looked at")
    parser.add_argument("--seed", type=int, default=0, help="seed of the run")
    arguments = parser.parse_args()
    print(main(arguments.data, arguments.out, arguments.looked_at, arguments.seed), "images")
