"""What an experiment found, as typed data with one JSON form: right and wrong image by image, figures' data, and facts.

Tables of gray-box attacks, adaptive attacks, convergence and certificates all are a :class:`Result`. msgspec reads and writes
its JSON, and checks every field.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import PIL.Image
from msgspec import Struct
from msgspec.structs import replace

from .. import atomic

Pixels = npt.NDArray[np.uint8]
Z = NormalDist().inv_cdf(0.975)  # of a 95% interval


class _Data(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Plain data of a result; msgspec's settings are inherited."""


class AttackRecord(_Data, frozen=True):
    """What one of several attacks on a row did.

    Attributes:
        name: key of the attack.
        images: positions of the images that it attacked.
        counts: of how many fresh draws each of these is right afterwards.
        draws: number of these draws.
        right: majority vote of the draws, ``"1"`` or ``"0"`` for each of these images.
        seconds: CPU time an image.
        gradients: number of gradients of a single draw that it took for an image; None where a library doesn't say.
        losses: of each step, averaged over the images; the attack raises it.
    """

    name: str
    images: tuple[int, ...]
    counts: tuple[int, ...]
    draws: int
    right: str
    seconds: float
    gradients: int | None = None
    losses: tuple[float, ...] = ()


class Cell(_Data, frozen=True):
    """Which images were classified correctly.

    Attributes:
        right: ``"1"`` or ``"0"`` for each image, in the order of the images, by majority vote where there are several draws;
            all of them again for each further column where ``columns`` is more than 1.
        columns: number of columns that are pooled here.
        draws: how often a randomised defense was asked.
        counts: of how many draws each image is right; empty where there is one draw.
        attacks: the adaptive attacks that led here, one after another.
        diagnostics: what speaks against trusting these attacks.
    """

    right: str
    columns: int = 1
    draws: int = 1
    counts: tuple[int, ...] = ()
    attacks: tuple[AttackRecord, ...] = ()
    diagnostics: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        """Number of images."""
        return len(self.right) // self.columns

    @property
    def correct(self) -> int:
        """Number of images that were classified correctly, counted once for each column."""
        return self.right.count("1")

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy in [0, 1]."""
        return self.correct / len(self.right)

    @property
    def single_draw(self) -> float:
        """Accuracy of one draw, in [0, 1]."""
        return sum(self.counts) / self.draws / self.n if self.counts else self.accuracy

    @property
    def every_draw(self) -> float:
        """Share of the images that are right in each draw: what is left if an attacker may ask ``draws`` times."""
        return sum(count == self.draws for count in self.counts) / self.n if self.counts else self.accuracy

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson score interval of the accuracy, for n images: pooling columns of the same images doesn't narrow it."""
        n, p = self.n, self.accuracy
        middle = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
        half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
        return max(0.0, middle - half), min(1.0, middle + half)


class DrawCounts(_Data, frozen=True):
    """The classes that noisy draws of one image were given: the evidence of a certificate.

    Attributes:
        name: ``CLASS/FILE``.
        truth: its class.
        selection: class -> number of the draws that choose the certified class.
        counted: class -> number of the other draws, which are counted for it.
        seconds: that all of them took.
    """

    name: str
    truth: int
    selection: dict[int, int]
    counted: dict[int, int]
    seconds: float


class RowResult(_Data, frozen=True):
    """One line of a table.

    Attributes:
        name: a defense and its setting, or a target.
        cells: one for each column; None where nothing was measured.
        seconds: seconds an image and draw; of the defense alone but where a caption says otherwise. None: not timed.
        error: why the defense could not be measured; empty where it could.
        defense: key of the defense in :data:`oag_transform.baselines.catalogue.DEFENSES`; empty for none of them.
        setting: of that defense.
        code: Python that makes the model that was measured, such as ``"DefendedModel(target, JPEG(25))"``.
        notes: heading -> text of further columns.
        certificates: of each image, in the results of ``certify``.
    """

    name: str
    cells: tuple[Cell | None, ...]
    seconds: float | None = None
    error: str = ""
    defense: str = ""
    setting: float | None = None
    code: str = ""
    notes: dict[str, str] = {}
    certificates: tuple[DrawCounts, ...] = ()


class _Figure(_Data, frozen=True, tag_field="kind", tag=str.lower):
    file: str
    caption: str


class Lines(_Figure, frozen=True):
    """Accuracy along a number, a line for each of some rows (Fig. 3, Fig. 4).

    Attributes:
        x: a number for each cell of a row; with ``column``, one for each row.
        xlabel: what the number is.
        rows: positions in the result's rows.
        mark: where to draw a vertical line, such as the chosen T_N.
        mark_label: text beside that line.
        column: None; or the position of the cells that make a single line along ``rows``.
    """

    x: tuple[float, ...]
    xlabel: str
    rows: tuple[int, ...]
    mark: float | None = None
    mark_label: str = ""
    column: int | None = None


class Cost(_Figure, frozen=True):
    """Accuracy against the seconds that a defense takes: a point for each of some rows.

    Attributes:
        rows: positions in the result's rows.
        column: position of the accuracy in their cells.
    """

    rows: tuple[int, ...]
    column: int


class Curve(_Data, frozen=True):
    """A defense in a :class:`Tradeoff`: its name, the positions of its rows in the result, and whether to draw it strongest."""

    name: str
    rows: tuple[int, ...]
    emphasis: bool = False


class Tradeoff(_Figure, frozen=True):
    """Attacked against clean accuracy: a curve for each defense along its settings.

    Attributes:
        curves: see :class:`Curve`; each point is labelled with its row's setting.
        clean, attacked: positions of the two accuracies in the cells.
    """

    curves: tuple[Curve, ...]
    clean: int
    attacked: int


class Certified(_Figure, frozen=True):
    """Certified accuracy against the L2 radius, a line for each row that could be measured.

    Attributes:
        radii: on the [0, 1] scale.
    """

    radii: tuple[float, ...]


class ImageColumn(_Data, frozen=True):
    """A column of a figure: its heading, and a file beside the JSON and a note for each image."""

    heading: str
    files: tuple[str, ...]
    notes: tuple[str, ...] = ()


class Residuals(_Figure, frozen=True):
    """Images, and below each its difference to that of the first column, magnified (Fig. 1): a .jpg file."""

    columns: tuple[ImageColumn, ...]


class Iterations(_Figure, frozen=True):
    """Images along the iterations (Fig. 5), a .jpg file: the original, the attacked one, and a column for each moment."""

    columns: tuple[ImageColumn, ...]


Figure = Lines | Cost | Tradeoff | Certified | Residuals | Iterations
"""Any figure: ``file``, which is drawn beside the JSON, an .svg one unless the class says otherwise, and its ``caption``."""


class Pair(Struct, frozen=True, forbid_unknown_fields=True):
    """An image along the way, for comparing before and after: files beside the JSON, and class and probability of each.

    Attributes:
        name: the image's true class.
        original, attacked, purified: file names of the three images.
        classes: the class that the target gives each of the three.
        probabilities: the probability that the target gives the true class in each of the three.
    """

    name: str
    original: str
    attacked: str
    purified: str
    classes: tuple[str, str, str]
    probabilities: tuple[float, float, float]


class Result(_Data, frozen=True):
    """A table, what figures are drawn from, and the facts that are needed to repeat it.

    Attributes:
        key: the experiment's name on the command line and the stem of its files, such as ``"table1"``.
        title: one line.
        caption: how to read it, one paragraph.
        first: heading of the column of names, such as ``"Defense"``.
        columns: headings of the cells.
        rows: see :class:`RowResult`.
        facts: n, seed, data, target, attacks, versions, hardware and command, each as text or a number.
        figures: see :class:`Lines` and the others.
        pairs: see :class:`Pair`.
        images: (H, W, 3) pixels of the .png files that figures and pairs name, until :func:`write` puts them beside the JSON;
            not part of it.
    """

    key: str
    title: str
    caption: str
    first: str
    columns: tuple[str, ...]
    rows: tuple[RowResult, ...]
    facts: dict[str, Any]
    figures: tuple[Figure, ...] = ()
    pairs: tuple[Pair, ...] = ()
    images: dict[str, Any] = {}


def write(result: Result, folder: Path) -> None:
    """Write ``key.json`` into ``folder``, a line for each row, and the images beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, pixels in result.images.items():
        PIL.Image.fromarray(pixels).save(folder / name)
    plain = msgspec.to_builtins(replace(result, images={}), str_keys=True)
    parts = []
    for name, value in plain.items():
        text = json.dumps(value, ensure_ascii=False)
        if name in ("rows", "figures", "pairs") and value:
            text = "[\n  " + ",\n  ".join(json.dumps(each, ensure_ascii=False) for each in value) + "\n ]"
        parts.append(f' "{name}": {text}')
    put(folder / f"{result.key}.json", "{\n" + ",\n".join(parts) + "\n}\n")


def read(path: Path) -> Result:
    """The result in a ``key.json`` file, without its images.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Result)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path} is not a result of oag-transform evaluate: {error}") from error


def bits(right: Iterable[Any]) -> str:
    """``"1"`` or ``"0"`` for each of some truths."""
    return "".join("1" if each else "0" for each in right)


def format_seconds(value: float) -> str:
    """Seconds with two digits that count."""
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def put(path: Path, text: str) -> None:
    """Write a text file atomically; bytes of file names that are not UTF-8 become U+FFFD."""
    with atomic.replaced(path) as partial:
        partial.write_bytes(text.encode("utf-8", "surrogateescape").decode("utf-8", "replace").encode())
