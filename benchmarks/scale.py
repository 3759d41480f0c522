"""What many images cost: each stage of an image, and ``purify --jobs`` beside ``--engine ray``, in one run.

python -m benchmarks.scale --out docs/data/scale.json     (extras demo and ray; some minutes on an idle machine)

``python -m benchmarks.docs`` makes the tables of docs/scale.md from that file.
"""

import argparse
import functools
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import skimage.data
import torch
from torchvision.transforms.v2 import functional as F

from oag_transform import DefendedModel, OnlineAlternateGenerator, files
from oag_transform.apps import saving
from oag_transform.evaluation.backbones import efficientnet_lite
from oag_transform.evaluation.provenance import provenance
from oag_transform.evaluation.render import tables

from .speed import seconds

SIDE, SOURCE_SIDE = 224, 500  # of what is purified, and of the file it is made from
FEW, MANY = 40, 240  # images: the rate is that of those between, the rest is the start
ENGINES = (
    "purify --jobs 1",
    "purify --jobs 2",
    "purify --engine ray --jobs 1 --rows 16",
    "purify --engine ray --jobs 2 --rows 16",
)
REPEATS = 7  # of which the median is taken


median_seconds = functools.partial(seconds, repeats=REPEATS)


def source_image(path: Path) -> Path:
    """A JPEG file of 500 x 500 pixels, about ImageNet's size."""
    F.to_pil_image(torch.from_numpy(skimage.data.astronaut()[:SOURCE_SIDE, :SOURCE_SIDE]).movedim(2, 0)).save(path, quality=90)
    return path


def stages(folder: Path) -> dict[str, float]:
    """Seconds of one thread for an image, by what is done with it."""
    source = source_image(folder / "source.jpg")
    content = source.read_bytes()
    image = F.center_crop(F.resize(files.read_rgb(source), [SIDE]), [SIDE, SIDE])
    pixels = F.pil_to_tensor(image)[None]
    model = DefendedModel(efficientnet_lite(0), OnlineAlternateGenerator(seed=0))
    none = saving.Metadata(b"", None, None, {}, ())

    def write() -> None:
        saving.write(folder / "result.jpg", saving.encode(image, ".jpg", none)[0], "t")

    with torch.no_grad():
        return {
            f"read and decode a JPEG of {SOURCE_SIDE} x {SOURCE_SIDE}": median_seconds(lambda: files.read_rgb(source)),
            f"resize and crop to {SIDE} x {SIDE}": median_seconds(
                lambda: F.center_crop(F.resize(files.read_rgb(content), [SIDE]), [SIDE, SIDE])
            )
            - median_seconds(lambda: files.read_rgb(content)),
            "hand its pixels to another process (pickle, both ends)": median_seconds(
                lambda: pickle.loads(pickle.dumps(pixels.numpy()))
            ),
            "purify": median_seconds(lambda: model.defense(pixels)),
            "classify, four views, EfficientNet-Lite0": median_seconds(lambda: model.classify(pixels.float() / 255)),
            "encode as JPEG and write": median_seconds(write),
        }


def engines(folder: Path) -> dict[str, dict[str, float]]:
    """Of each way to purify a folder: images a second once it works, and the seconds until it does."""
    original = source_image(folder / "source.jpg")
    image = F.center_crop(F.resize(files.read_rgb(original), [SIDE]), [SIDE, SIDE])
    for count in (FEW, MANY):
        (folder / str(count)).mkdir()
        for i in range(count):
            image.save(folder / str(count) / f"{i:03d}.jpg", quality=95)
    found = {}
    for command in ENGINES:
        few, many = (_wall(folder, count, command) for count in (FEW, MANY))
        rate = (MANY - FEW) / (many - few)
        found[command] = {"images_a_second": rate, "start": max(0.0, few - FEW / rate), "seconds_of_all": many}
    return found


def _wall(folder: Path, count: int, command: str) -> float:
    with tempfile.TemporaryDirectory(dir=folder) as out:
        words = [sys.executable, "-m", "oag_transform", *command.split(), str(folder / str(count)), "--out", f"{out}/o"]
        start = time.perf_counter()
        subprocess.run(words, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return time.perf_counter() - start


def measured() -> dict[str, Any]:
    """Everything, with what is needed to repeat it."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        facts = provenance(torch.device("cpu"), ("oag-transform", "torch", "ray"))
        facts["command"] = "python -m benchmarks.scale --out docs/data/scale.json"
        facts["load"] = f"{os.getloadavg()[0]:.1f} before"
        return {"facts": facts, "images": MANY, "stages": stages(Path(one)), "engines": engines(Path(other))}


def table(kind: str, found: dict[str, Any]) -> str:
    """``"stages"``, ``"engines"`` or ``"costs"`` as a table."""
    facts = found["facts"]
    made = f"`{facts['command']}`; {facts['versions']}; {facts['hardware']}; load {facts['load']}."
    if kind == "stages":
        whole = sum(found["stages"].values())
        rows = [(name, f"{1000 * each:.1f}", f"{100 * each / whole:.0f} %") for name, each in found["stages"].items()]
        lines = tables.table(("Stage, one thread", "ms an image", "share"), rows)
        return "\n".join([*lines, "", f"Median of {REPEATS}. {made}"])
    if kind == "engines":
        base = found["engines"]["purify --jobs 1"]["images_a_second"]
        commands = []
        for name, each in found["engines"].items():
            rate = each["images_a_second"]
            commands.append((f"`{name}`", f"{rate:.2f}", f"{rate / base:.2f}", f"{each['start']:.1f}"))
        lines = tables.table(("Command, one thread each", "images/s", "ratio", "start, s"), commands)
        n = f"n = {found['images']} images of {SIDE} x {SIDE}; the rate is without the start, once each."
        return "\n".join([*lines, "", f"{n} {made}"])
    purify = found["stages"]["purify"]
    other = sum(found["stages"].values()) - purify
    lines = ["| | 1,000 | a million | a billion |", "|---|---|---|---|"]
    for name, each in (
        ("purify, CPU core hours (from the measured seconds)", purify),
        ("all other stages, CPU core hours (from the measured seconds)", other),
    ):
        lines.append(f"| {name} | {' | '.join(f'{_short(each * count / 3600)}' for count in (1e3, 1e6, 1e9))} |")
    return "\n".join(lines)


def _short(hours: float) -> str:
    """Two significant digits, in plain figures."""
    return f"{float(f'{hours:.2g}'):,.6g}"


def main() -> None:
    """Measure, write the data, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="FILE.json to write")
    options = parser.parse_args()
    found = measured()
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n\n".join(table(kind, found) for kind in ("stages", "engines", "costs")))


if __name__ == "__main__":
    main()
