"""``oag-transform evaluate``: which defense keeps most of my images under gray-box attacks? The paper's section IV."""

import argparse
import contextlib
import dataclasses
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..baselines.catalogue import DEFENSES, OAG_KEY, Defense, Needs, chosen
from ..evaluation.catalogue import ATTACKS, EXPERIMENTS, Experiment, attack, experiment
from . import photographs, process

if TYPE_CHECKING:  # torch comes when a command runs, not when its arguments are parsed
    from ..evaluation.attacks import Attack
    from ..evaluation.experiments.plan import Plan
    from ..evaluation.store import Store

HELP = "which defense keeps most under gray-box attacks, of my classifier on my images?"
EXTRA: str | None = "eval"

GOALS = ("paper", "targeted", "untargeted")
SETTINGS = ("default", "paper")
ENGINES = ("local", "ray")
REPORT, ALL = "report", "all"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluateOptions:
    """What ``oag-transform evaluate`` is asked for; :func:`add_arguments` says what each means.

    Attributes:
        experiments: those that are to be run, in the order of :data:`~oag_transform.evaluation.catalogue.EXPERIMENTS`; none for
            a report alone.
        photographs: None for a report alone, as ``model`` is.
        others: further targets, each a model and its weights.
        defenses: None for every one.
    """

    experiments: tuple[Experiment, ...]
    out: Path
    model: str | None
    weights: str | None
    others: tuple[tuple[str, str | None], ...]
    photographs: photographs.Photographs | None
    resize: int | None
    crop: int | None
    count: int
    slow_count: int
    attacks: tuple[str, ...]
    goal: str
    setting: str
    eps: int
    mifgsm_eps: int
    defenses: tuple[Defense, ...] | None
    tuned: Path | None
    pixelcnn: Path | None
    noise_std: float
    compute_dtype: str | None
    progress: bool
    device: str
    batch_size: int
    engine: str
    address: str | None

    def __post_init__(self) -> None:
        if not self.experiments:
            return
        from .. import _checks  # with torch

        if self.model is None or self.photographs is None:
            raise ValueError("--model and --data are needed")
        for name in ("count", "slow_count", "batch_size"):
            _checks.integer(f"--{name.replace('_', '-')}", getattr(self, name), at_least=1)
        _checks.number("--noise-std", self.noise_std, above=0)
        photographs.check_sides(self.resize, self.crop)
        _checks.choice("--goal", self.goal, GOALS)
        if _checks.choice("--engine", self.engine, ENGINES) != "ray" and self.address is not None:
            raise ValueError("--address needs --engine ray")
        _checks.choice("--setting", self.setting, SETTINGS)

    @classmethod
    def of(cls, options: argparse.Namespace) -> "EvaluateOptions":
        """Those of a command line.

        Raises:
            ValueError: one is wrong or missing; the message names it.
        """
        names = dict.fromkeys(options.experiments)
        asked = [experiment(name) for name in names if name not in (REPORT, ALL)]
        others = tuple((model, weights or None) for model, _, weights in (other.partition("=") for other in options.other))
        for one in asked:
            if one.needs_other and not others:
                raise ValueError(f"{one.key} needs a second target: --other MODEL[=WEIGHTS]")
        every = [one for one in EXPERIMENTS if ALL in names and one.in_all and (others or not one.needs_other)]
        own = {field.name for field in dataclasses.fields(cls)} - {
            "experiments",
            "others",
            "photographs",
            "defenses",
            "attacks",
        }
        return cls(
            experiments=tuple(one for one in EXPERIMENTS if one in asked or one in every),
            others=others,
            photographs=None if options.data is None else photographs.Photographs.of(options),
            defenses=None if options.defenses is None else chosen(options.defenses),
            attacks=tuple(dict.fromkeys(options.attacks)),
            **{name: getattr(options, name) for name in own},
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments; experiments, attacks and defenses are those of the two catalogues."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Measure defenses as the paper does. What is computed is kept in OUT/cache: an interrupted run\n"
        "goes on from there. Each experiment writes OUT/NAME.json, .csv and .md, and OUT/report.html shows\n"
        "all of them. Exit status: 0, 1 if an experiment or a row of one failed, 2 if nothing could be run."
    )
    lists = {
        "experiments": [(entry.key, entry.title) for entry in EXPERIMENTS]
        + [(REPORT, "draw every figure in OUT again, and the report, from the JSON that is there"), (ALL, _all())],
        "attacks": [(entry.key, f"{entry.label}, {'targeted' if entry.targeted else 'untargeted'}") for entry in ATTACKS],
        "defenses": [(defense.key, defense.label) for defense in DEFENSES],
    }
    width = max(len(key) for entries in lists.values() for key, _ in entries)
    parser.epilog = "\n\n".join(
        "\n".join([f"{kind}:", *(f"  {key:<{width}}  {title}" for key, title in entries)]) for kind, entries in lists.items()
    )
    parser.add_argument("experiments", nargs="+", metavar="EXPERIMENT", help="some of the list below")
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument(
        "--model", help="efficientnet-lite0|1|2, a torchvision model, module:function, or FILE.pt of fit-target"
    )
    parser.add_argument("--weights", help="of a torchvision model: DEFAULT, a name, or a file with a state dict")
    parser.add_argument(
        "--other",
        action="append",
        default=[],
        metavar="MODEL[=WEIGHTS]",
        help="a further target, for tables 2 and 3; repeatable",
    )
    photographs.add_arguments(parser, required=False, split="tst1")  # a report needs none
    parser.add_argument("--resize", type=int, help="short side in pixels (default: the target's own; 256 for a callable)")
    parser.add_argument("--crop", type=int, help="centre crop in pixels (default: the target's own; 224 for a callable)")
    parser.add_argument("--count", type=int, default=150, help="images, which the target gets right (default: %(default)s)")
    parser.add_argument("--slow-count", type=int, default=20, help="images for slow defenses (default: %(default)s)")
    keys = [entry.key for entry in ATTACKS]
    parser.add_argument("--attacks", nargs="+", choices=keys, default=keys, help="of table1 and others (default: all)")
    parser.add_argument(
        "--goal",
        choices=GOALS,
        default=GOALS[0],
        help="paper: FGSM and IGSM towards a random class, MI-FGSM and C&W away from the right one",
    )
    parser.add_argument(
        "--setting",
        choices=SETTINGS,
        default=SETTINGS[0],
        help="of our transform: paper is its own, T_N 300, with closed-form Langevin steps, and writes OUT/NAME-paper.json",
    )
    parser.add_argument("--eps", type=int, default=6, help="of FGSM and IGSM, in grey levels (default: %(default)s)")
    parser.add_argument(
        "--mifgsm-eps", type=int, default=4, help="the paper: 4 on Flower-17, 2 on ImageNet (default: %(default)s)"
    )
    parser.add_argument("--defenses", nargs="+", metavar="NAME", help="some of the list below only")
    parser.add_argument("--tuned", type=Path, metavar="TUNE.JSON", help="settings that the experiment tune has chosen")
    parser.add_argument("--pixelcnn", type=Path, metavar="FILE", help="of fit-pixelcnn, for pixeldefend")
    parser.add_argument(
        "--noise-std", type=float, default=0.1, help="of Gaussian noise, on the [0, 1] scale (default: %(default)s)"
    )
    parser.add_argument(
        "--compute-dtype",
        choices=["float32", "bfloat16"],
        help="operands of our convolutions (default: bfloat16 on a CPU that multiplies it faster, else float32)",
    )
    parser.add_argument("--progress", action="store_true", help="progress bars, also where the output is no terminal")
    photographs.add_device(parser, 8)
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default=ENGINES[0],
        help="ray (extra 'ray'): batches of images as tasks for a cluster, or for the processors of this machine",
    )
    parser.add_argument("--address", help="of a Ray cluster (default: RAY_ADDRESS, or one on this machine for this run)")


def run(options: argparse.Namespace) -> int:
    """Run the experiments one after another, writing each when it is done, and the report over all that are there.

    Returns 1 if an experiment failed or has a row that did, else 0.

    Raises:
        ValueError: an argument is wrong; nothing was run.
    """
    asked = EvaluateOptions.of(options)
    process.log_to_stderr()
    # torch and what draws, for a command that runs
    from ..evaluation.render import render
    from ..evaluation.render.report import find_results, write_report

    if not asked.experiments:
        for found in find_results(asked.out):
            render(found, asked.out)
        print(f"wrote {write_report(asked.out)}")
        return 0
    plan = _plan(asked)
    with _engine(asked):
        return _run(asked, plan)


def _run(asked: EvaluateOptions, plan: "Plan") -> int:
    from ..evaluation import results
    from ..evaluation.render import render, tables
    from ..evaluation.render.report import write_report

    done, status, advice = 0, 0, []
    for one in asked.experiments:
        try:
            result = one.run(plan)
        except Exception as error:  # the other experiments go on
            logger.error("%s failed: %s: %s", one.key, type(error).__name__, error, exc_info=logger.isEnabledFor(logging.DEBUG))
            status = 1
            continue
        results.write(result, asked.out)
        render(result, asked.out)
        print(tables.to_markdown(result), flush=True)
        done += 1
        if "recommendation" in result.facts:
            advice.append(str(result.facts["recommendation"]))
        if failed := [row.name for row in result.rows if row.error]:
            logger.error("%s: %d of %d rows failed: %s", one.key, len(failed), len(result.rows), "; ".join(failed))
            status = 1
    if done:
        print(f"wrote {write_report(asked.out)}")
    for text in advice:
        print(text)
    return status


def _all() -> str:
    left_out = [entry.key for entry in EXPERIMENTS if not entry.in_all]
    with_other = [entry.key for entry in EXPERIMENTS if entry.needs_other]
    return f"all but {' and '.join(left_out)}, which want time or images of their own; {' and '.join(with_other)} with --other"


def _plan(options: EvaluateOptions) -> "Plan":
    """Everything that can be wrong with the arguments comes before any work."""
    import torch

    from ..evaluation.experiments.plan import Plan, as_published, common_facts
    from ..evaluation.measure import choose_subject
    from ..evaluation.targets import load_target
    from ..generator.run import operands
    from ..generator.settings import Settings

    if options.photographs is None or options.model is None:
        raise ValueError("--model and --data are needed")
    process.look_for_modules_here()
    device = photographs.find_device(options.device)
    listing, seed = options.photographs.listing(), options.photographs.seed
    attacks = _attacks(options)
    dtype = None if options.compute_dtype is None else getattr(torch, options.compute_dtype)
    needs = Needs(_pixelcnn(options.pixelcnn), dtype)
    paper = options.setting == "paper"
    every = tuple(as_published(family) if paper else family for family in _tuned(options.tuned))
    network_steps = next(int(family.tuned) for family in every if family.key == OAG_KEY)
    families = _families(options, every, needs)
    targets = [
        load_target(name, weights, classes=listing.classes, device=device, resize=options.resize, crop=options.crop)
        for name, weights in [(options.model, options.weights), *options.others]
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    store = _store(options)(options.out / "cache", chunk=options.batch_size, progress=sys.stderr.isatty() or options.progress)
    subjects = [choose_subject(target, listing, options.count, store, seed, device) for target in targets]
    subject = subjects[0]
    if len(subject.images) < options.count:
        logger.info("only %d images that %s gets right", len(subject.images), subject.target.name)
    return Plan(
        subject=subject,
        others=tuple(subjects[1:]),
        families=families,
        attacks=attacks,
        slow_count=options.slow_count,
        noise_std=options.noise_std,
        network_steps=network_steps,
        needs=needs,
        facts=common_facts(subject, options.photographs.data.resolve().name)
        | {"compute_dtype": str(operands(Settings(compute_dtype=dtype), torch.device(device), torch.float32))},
        paper=paper,
    )


def _store(options: EvaluateOptions) -> "type[Store]":
    from ..evaluation.store import Store  # with torch

    if options.engine != "ray":
        return Store
    try:
        from .cluster_store import ClusterStore
    except ModuleNotFoundError as error:
        raise ValueError(f"--engine ray needs {error.name}: pip install 'oag-transform[ray]'") from error
    return ClusterStore


def _engine(options: EvaluateOptions) -> contextlib.AbstractContextManager[object]:
    """The cluster, where one is asked for: after the plan, as its workers look for modules where this process does then."""
    if options.engine != "ray":
        return contextlib.nullcontext()
    from . import cluster, worker

    return cluster.connected(options.address, worker.processors())


def _attacks(options: EvaluateOptions) -> "tuple[Attack, ...]":
    targeted = None if options.goal == "paper" else options.goal == "targeted"
    budgets = {"fgsm": options.eps, "igsm": options.eps, "mifgsm": options.mifgsm_eps}
    return tuple(attack(key).make(budgets.get(key), targeted) for key in options.attacks)


def _pixelcnn(path: Path | None) -> object:
    from ..baselines.pixeldefend import load_pixelcnn  # with torch

    return None if path is None else load_pixelcnn(path)


def _tuned(path: Path | None) -> tuple[Defense, ...]:
    """Every defense, tuned as the experiment tune has found."""
    from ..evaluation import results  # with torch

    if path is None:
        return DEFENSES
    found = results.read(path).facts.get("chosen")
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not the tune.json of an evaluation")
    if unknown := sorted(set(found) - {family.key for family in DEFENSES}):
        raise ValueError(f"{path} has a setting of {unknown[0]!r}, and there is no such defense: run tune again")
    return tuple(dataclasses.replace(family, tuned=found.get(family.key, family.tuned)) for family in DEFENSES)


def _families(options: EvaluateOptions, every: tuple[Defense, ...], needs: Needs) -> tuple[Defense, ...]:
    """The defenses that are asked for; where none is, those that can be made here."""
    if options.defenses is not None:
        by_key = {family.key: family for family in every}
        return tuple(by_key[defense.key] for defense in options.defenses)
    found = []
    for family in every:
        try:
            family.make(family.published, 0, needs)
        except (ValueError, ModuleNotFoundError) as error:
            if getattr(error, "name", None) is not None:  # a package of the extra 'eval'; BM3D says in words what it needs
                raise
            logger.info("%s is left out: %s", family.label, error)
        else:
            found.append(family)
    return tuple(found)
