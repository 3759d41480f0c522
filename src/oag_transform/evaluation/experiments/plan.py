"""What is measured, and on what: the one argument of every experiment, and how it makes rows, columns and results."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from torch import nn

from ...baselines.catalogue import NONE, OAG_KEY, VIEWS, Defense, Needs, by_key
from ...generator.settings import PAPER
from ...transform import OnlineAlternateGenerator
from .. import catalogue
from ..attacks import Attack
from ..measure import Candidate, Column, GrayBox, Subject, clean, measure, provenance
from ..results import Figure, Pair, Pixels, Result, Row, paired, pooled

PAPER_STEPS = (300, 240, 180, 120, 60, 30)  # T_N of the trade-off at the paper's setting


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured, and on what.

    Attributes:
        subject: the target and its photographs.
        others: further targets and theirs, for Tables II and III.
        families: the defenses.
        attacks: those of Table I.
        slow_count: images for slow defenses.
        noise_std: standard deviation of the Gaussian noise of ``tune`` and Fig. 4, on the [0, 1] scale.
        network_steps: T_N of our transform, tuned.
        needs: what some defenses are made with.
        facts: that go with every result.
        paper: our transform has the paper's setting with closed-form Langevin steps, in place of the default; results then have
            files of their own, such as ``table4-paper.json``.
    """

    subject: Subject
    others: tuple[Subject, ...]
    families: tuple[Defense, ...]
    attacks: tuple[Attack, ...]
    slow_count: int
    noise_std: float
    network_steps: int
    needs: Needs
    facts: dict[str, Any]
    paper: bool = False

    @property
    def setting(self) -> dict[str, Any]:
        """Our transform's arguments that differ from its default, T_N and what it computes in aside."""
        # exact Langevin steps take ten times as long, for the same images within 0.3 dB
        return PAPER | {"langevin": "closed_form"} if self.paper else {}

    @property
    def setting_name(self) -> str:
        """What :attr:`setting` is called in captions."""
        return "the paper's setting, with closed-form Langevin steps" if self.paper else "the default"

    def file(self, name: str) -> str:
        """Name of a file or key of a result, such as ``"fig3.svg"``: one of its own for the paper's setting."""
        path = PurePath(name)
        return f"{path.stem}-paper{path.suffix}" if self.paper else name

    def ours(self, label: str, **settings: Any) -> Candidate:
        """Our transform, tuned and seen as it is, with some settings of its own."""
        own = {"network_steps": self.network_steps, "compute_dtype": self.needs.compute_dtype}
        chosen = self.setting | own | settings

        def make(seed: int) -> nn.Module:
            return OnlineAlternateGenerator(**chosen, seed=seed)

        return Candidate(label, make, defense=OAG_KEY, setting=chosen["network_steps"])

    def candidate(self, family: Defense, setting: float) -> Candidate:
        """A defense at one setting."""

        def make(seed: int) -> nn.Module:
            return family.make(setting, seed, self.needs)

        count = self.slow_count if family.slow else None
        return Candidate(family.describe(setting), make, family.in_views, count, family.key, setting)

    def candidates(self, *, published: bool = True) -> list[Candidate]:
        """No defense, and each family at its published and at its tuned setting."""
        found = [Candidate(NONE), Candidate(f"{NONE}, {VIEWS}", in_views=True)]
        for family in self.families:
            settings = dict.fromkeys([*([family.published] if published else []), family.tuned])
            found += [self.candidate(family, setting) for setting in settings]
        return found

    def rows(self, columns: Sequence[Column], *, subject: Subject | None = None, published: bool = True) -> list[Row]:
        """Every candidate, measured."""
        subject = self.subject if subject is None else subject
        return [measure(subject, candidate, columns) for candidate in self.candidates(published=published)]

    def columns(self, attacks: Sequence[Attack]) -> list[Column]:
        """Clean images, and those of each attack by someone who knows no defense."""
        return [Column("Clean", clean), *(Column(str(attack), GrayBox(attack)) for attack in attacks)]

    def attack(self, key: str) -> Attack:
        """An attack as it is in Table I, or as the paper makes it where Table I has none."""
        entry = catalogue.attack(key)
        return next((attack for attack in self.attacks if attack.name == entry.label), None) or entry.make()

    def result(
        self,
        key: str,
        caption: str,
        first: str = "",
        columns: Sequence[str] = (),
        rows: Sequence[Row] = (),
        *,
        attacks: Sequence[Attack] = (),
        count: int | None = None,
        facts: Mapping[str, Any] | None = None,
        figures: Sequence[Figure] = (),
        pairs: Sequence[Pair] = (),
        photographs: Mapping[str, Pixels] | None = None,
    ) -> Result:
        """A result with this plan's facts, the attacks that it made, and the number of images: the subject's, or ``count``."""
        own = {
            "n": len(self.subject.images) if count is None else count,
            "attacks": ", ".join(f"{attack} ({goal(attack)})" for attack in attacks) or "none",
            "setting of ours": f"{self.setting_name}, T_N = {self.network_steps}",
        }
        return Result(
            self.file(key),
            catalogue.experiment(key).title + (", at the paper's setting" if self.paper else ""),
            caption,
            first,
            tuple(columns),
            tuple(rows),
            own | self.facts | dict(facts or {}),
            tuple(figures),
            tuple(pairs),
            dict(photographs or {}),
        )


def as_published(family: Defense) -> Defense:
    """Our transform at the paper's setting in place of the default; another defense as it is."""
    if family.key != OAG_KEY:
        return family
    return dataclasses.replace(by_key("oag-paper"), key=OAG_KEY, settings=PAPER_STEPS, slow=False)


def seen_by(subjects: Sequence[Subject]) -> dict[str, str]:
    """Facts of several targets: their names, and how many photographs each gets right, at which size."""
    found = [
        f"{subject.target.name}: {len(subject.images)} right of {subject.looked_at} looked at, "
        f"{subject.target.preprocessing.crop} pixels"
        for subject in subjects
    ]
    return {"target": "; ".join(subject.target.name for subject in subjects), "targets' own accuracy": "; ".join(found)}


def common_facts(subject: Subject, data: str) -> dict[str, Any]:
    """What is needed to repeat a result, beside its attacks and n: seed, data, target, versions, hardware and command."""
    packages = ("oag-transform", "torch", "torchvision", "foolbox", "scikit-image", "numpy")
    return {
        "seed": subject.seed,
        "data": f"{data}: {len(subject.images)} images that the target gets right, of {subject.looked_at} looked at",
        "target": subject.target.name,
    } | provenance(subject.device, packages)


def goal(attack: Attack) -> str:
    """``"targeted"`` or ``"untargeted"``."""
    return "targeted" if attack.targeted else "untargeted"


def with_mean(row: Row, of: int = 0) -> Row:
    """The row with a column that pools its last ``of`` cells, or all but the first."""
    return dataclasses.replace(row, cells=(*row.cells, pooled(row.cells[-of:] if of else row.cells[1:])))


def is_ours(row: Row) -> bool:
    """Whether it is a row of our transform, at whatever setting."""
    return row.defense.split("-")[0] == OAG_KEY


def against_peers(rows: Sequence[Row]) -> list[str]:
    """A sentence on each of our rows and the peer with the best mean under attack, paired; the mean is the last column."""
    full = max((cell.n for row in rows for cell in row.cells[:1] if cell is not None), default=0)
    means = [(row, row.cells[-1]) for row in rows]
    whole = [(row, mean.accuracy) for row, mean in means if mean is not None and mean.n == full]
    peers = [(row, accuracy) for row, accuracy in whole if row.defense and not is_ours(row)]
    if not peers:
        return []
    best, _ = max(peers, key=lambda peer: peer[1])
    sentences = []
    for row, _ in whole:
        if is_ours(row):
            more, fewer, p = paired(row.cells[1:-1], best.cells[1:-1])
            sentences.append(
                f"{row.name}, against {best.name}: right under more of the attacks on {more} images, under fewer on {fewer} "
                f"(exact sign test, p = {p:.2g})."
            )
    return sentences
