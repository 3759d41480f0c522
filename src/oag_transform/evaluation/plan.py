"""What is measured, and on what: the one argument of every experiment, and how it makes rows, columns and results."""

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from msgspec.structs import replace
from torch import nn

from ..baselines.catalogue import NONE, OAG_KEY, VIEWS, Family, Needs, by_key, has_oag
from ..generator.settings import PAPER_CLOSED_FORM
from ..transform import OnlineAlternateGenerator
from .adversarial import Transfer
from .attacks.gray_box import Attack, make
from .columns import CLEAN, Column, Images, gray_box_column
from .data import Listing
from .options import AdaptiveOptions, CertifyOptions, ConvergenceOptions, experiment
from .provenance import in_code, provenance
from .result import Figure, Pair, Result, RowResult
from .statistics import paired, pooled
from .subject import Row, Subject

logger = logging.getLogger(__name__)

PAPER_STEPS = (300, 240, 180, 120, 60, 30)  # T_N of the trade-off at the paper's setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured, and on what.

    Attributes:
        subject: the target, and images that it gets right.
        families: the defenses.
        attacks: those of Table I.
        facts: that go with every result.
        slow_count: images for slow defenses.
        noise_std: standard deviation of the Gaussian noise of ``tune`` and Fig. 4, on the [0, 1] scale.
        network_steps: T_N of OAG, tuned.
        others: further targets and their images, for Tables II and III.
        attacks_by_key: gray-box attacks by their keys, for the other tables and figures; the paper's where it has none.
        transfer: images attacked by another tool, for ``transfer``.
        unfiltered: the target and images that are right or wrong, for ``certify``.
        apart: images apart from these, for ``certify`` with batch normalization adapted.
        shift: of the views in pixels; None: by the size of the image.
        needs: what some defenses are made with.
        paper: OAG has the paper's setting with closed-form Langevin steps, in place of the default; results then have files of
            their own.
        adaptive, convergence, certify: settings of these experiments.
    """

    subject: Subject
    families: tuple[Family, ...]
    attacks: tuple[Attack, ...]
    facts: dict[str, Any]
    slow_count: int
    noise_std: float
    network_steps: int
    others: tuple[Subject, ...] = ()
    attacks_by_key: Mapping[str, Attack] = dataclasses.field(default_factory=dict)
    transfer: Transfer | None = None
    unfiltered: Subject | None = None
    apart: Listing | None = None
    shift: int | None = None
    needs: Needs = Needs()
    paper: bool = False
    adaptive: AdaptiveOptions = AdaptiveOptions()
    convergence: ConvergenceOptions = ConvergenceOptions()
    certify: CertifyOptions = CertifyOptions()

    def __post_init__(self) -> None:
        for options in (self.adaptive, self.convergence, self.certify):
            options.check()

    @property
    def setting(self) -> dict[str, Any]:
        """OAG's arguments that differ from its default, T_N and what it computes in aside."""
        return PAPER_CLOSED_FORM if self.paper else {}

    @property
    def setting_name(self) -> str:
        """What :attr:`setting` is called in captions."""
        return "the paper's setting, with closed-form Langevin steps" if self.paper else "the default"

    @property
    def fast(self) -> "Plan":
        """The same without slow defenses."""
        return dataclasses.replace(self, families=tuple(family for family in self.families if not family.slow))

    def file(self, name: str) -> str:
        """Name of a file or key of a result, such as ``"fig3.svg"``: one of its own for the paper's setting.

        A key may hold what no file name may: the setting of a defense, after a colon, or a module's name.
        """
        stem, dot, suffix = name.rpartition(".") if name.endswith((".svg", ".png", ".jpg")) else (name, "", "")
        return f"{re.sub(r'[^A-Za-z0-9_.+-]', '-', stem)}{'-paper' * self.paper}{dot}{suffix}"

    def oag(self, label: str, **settings: Any) -> Row:
        """OAG, tuned and in one view, with some settings of its own."""
        own = {"network_steps": self.network_steps, "compute_dtype": self.needs.compute_dtype}
        chosen = self.setting | own | settings

        def make(seed: int) -> nn.Module:
            return OnlineAlternateGenerator(**chosen, seed=seed)

        return Row(label, make, defense=OAG_KEY, setting=chosen["network_steps"])

    def row(self, family: Family, setting: float) -> Row:
        """A defense at one setting."""

        def make(seed: int) -> nn.Module:
            return family.make(setting, seed, self.needs)

        count = self.slow_count if family.slow else None
        return Row(family.describe(setting), make, family.in_views, self.shift, count, family.key, setting)

    def rows(self, *, published: bool = True) -> list[Row]:
        """No defense, and each family at its published and at its tuned setting."""
        found = [Row(NONE), Row(f"{NONE}, {VIEWS}", in_views=True, shift=self.shift)]
        for family in self.families:
            settings = dict.fromkeys([*([family.published] if published else []), family.tuned])
            found += [self.row(family, setting) for setting in settings]
        return found

    def measured(self, columns: Sequence[Column], *, subject: Subject | None = None, published: bool = True) -> list[RowResult]:
        """Every row, measured."""
        return [measure(self.subject if subject is None else subject, row, columns) for row in self.rows(published=published)]

    def columns(self, attacks: Sequence[Attack]) -> list[Images]:
        """Clean images, and those of each gray-box attack."""
        return [CLEAN, *map(gray_box_column, attacks)]

    def attack(self, key: str) -> Attack:
        """A gray-box attack."""
        return self.attacks_by_key[key] if key in self.attacks_by_key else make(key)

    def result(
        self,
        key: str,
        caption: str,
        first: str = "",
        columns: Sequence[str] = (),
        rows: Sequence[RowResult] = (),
        *,
        stem: str = "",
        title: str = "",
        attacks: Sequence[Attack] = (),
        count: int | None = None,
        facts: Mapping[str, Any] | None = None,
        figures: Sequence[Figure] = (),
        pairs: Sequence[Pair] = (),
        images: Mapping[str, Any] | None = None,
    ) -> Result:
        """A result with this plan's facts, the attacks that it made, and the number of images: the subject's, or ``count``.

        ``key`` is the experiment's; ``stem`` tells several results of one apart, and ``title`` goes after its own.
        """
        own = {
            "n": len(self.subject.images) if count is None else count,
            "attacks": ", ".join(f"{attack} ({goal(attack)})" for attack in attacks) or "none",
            "setting of OAG": f"{self.setting_name}, T_N = {self.network_steps}",
        }
        return Result(
            self.file(stem or key),
            experiment(key).title + title + (", at the paper's setting" if self.paper else ""),
            caption,
            first,
            tuple(columns),
            tuple(rows),
            own | self.facts | dict(facts or {}),
            tuple(figures),
            tuple(pairs),
            dict(images or {}),
        )


def measure(subject: Subject, row: Row, columns: Sequence[Column]) -> RowResult:
    """A row, measured in each column. A defense that fails gives one that says why, and the run goes on."""
    found = RowResult(row.label, (None,) * len(columns), defense=row.defense, setting=row.setting)
    try:
        model = row.model(subject)
        found = replace(found, code=in_code(model))
        measured = [column.cell(subject, row, model) for column in columns]
    except (Exception, SystemExit) as error:  # whatever a defense raises is its own result
        logger.warning("%s failed: %s", row.label, error, exc_info=logger.isEnabledFor(logging.DEBUG))
        return replace(found, error=f"{type(error).__name__}: {error}")
    seconds = [seconds for _, seconds in measured if seconds is not None]
    mean = float(np.mean(seconds)) if seconds and row.make is not None else None
    return replace(found, cells=tuple(cell for cell, _ in measured), seconds=mean)


def as_published(family: Family) -> Family:
    """OAG at the paper's setting in place of the default; another defense as it is."""
    if family.key != OAG_KEY:
        return family
    return dataclasses.replace(by_key("oag-paper"), key=OAG_KEY, settings=PAPER_STEPS, slow=False)


def target_facts(subjects: Sequence[Subject]) -> dict[str, str]:
    """Facts of several targets: their names, and how many images each gets right, at which size."""
    found = [
        f"{subject.target.name}: {len(subject.images)} right of {subject.looked_at} looked at, "
        f"{subject.target.preprocessing.crop} pixels"
        for subject in subjects
    ]
    return {"target": "; ".join(subject.target.name for subject in subjects), "targets' own accuracy": "; ".join(found)}


def common_facts(subject: Subject, data: str) -> dict[str, Any]:
    """What is needed to repeat a result, beside its attacks and n: seed, data, target, versions, hardware and command."""
    packages = ("oag-transform", "torch", "torchvision", "foolbox", "scipy", "scikit-image", "PyWavelets", "numpy")
    return {
        "seed": subject.seed,
        "data": f"{data}: {len(subject.images)} images that the target classifies correctly, of {subject.looked_at} looked at",
        "target": subject.target.name,
    } | provenance(subject.device, packages)


def goal(attack: Attack) -> str:
    """``"targeted"`` or ``"untargeted"``."""
    return "targeted" if attack.targeted else "untargeted"


def with_mean(row: RowResult, of: int = 0) -> RowResult:
    """The row with a column that pools its last ``of`` cells, or all but the first."""
    return replace(row, cells=(*row.cells, pooled(row.cells[-of:] if of else row.cells[1:])))


def is_oag(row: RowResult) -> bool:
    """Whether it is a row of OAG, at whatever setting, alone or with other defenses in one model."""
    return has_oag(row.defense)


def against_peers(rows: Sequence[RowResult]) -> list[str]:
    """A sentence on each row of OAG and the peer with the best mean under attack, paired; the mean is the last column."""
    full = max((cell.n for row in rows for cell in row.cells[:1] if cell is not None), default=0)
    means = [(row, row.cells[-1]) for row in rows]
    whole = [(row, mean.accuracy) for row, mean in means if mean is not None and mean.n == full]
    peers = [(row, accuracy) for row, accuracy in whole if row.defense and not is_oag(row)]
    if not peers:
        return []
    best, _ = max(peers, key=lambda peer: peer[1])
    sentences = []
    for row, _ in whole:
        if is_oag(row):
            more, fewer, p = paired(row.cells[1:-1], best.cells[1:-1])
            sentences.append(
                f"{row.name}, against {best.name}: correct under more attacks than the other on {more} images, under fewer on "
                f"{fewer} (exact sign test, p = {p:.2g})."
            )
    return sentences
