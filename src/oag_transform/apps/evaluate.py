"""``oag-transform evaluate``: which defense keeps most of my images under attack, and at what cost?"""

import contextlib
import dataclasses
import inspect
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from .. import files
from ..baselines.catalogue import DEFENSES, IN_VIEWS, OAG_KEY, Family, Needs, chosen, has_oag
from ..baselines.smoothing import DENOISERS
from ..evaluation.options import (
    ADAPTIVE_ATTACKS,
    EPS,
    EXPERIMENTS,
    GRAY_BOX,
    MIFGSM_EPS,
    AdaptiveOptions,
    CertifyOptions,
    ConvergenceOptions,
    Experiment,
    adaptive_entry,
    experiment,
    not_empty,
)
from . import process
from .options import ClassifierOptions, DeviceOptions, ImageOptions, check_input, default, dtype_of

if TYPE_CHECKING:  # torch comes when a command runs, not when its arguments are parsed
    import torch

    from ..evaluation.attacks.gray_box import Attack
    from ..evaluation.data import Listing
    from ..evaluation.plan import Plan
    from ..evaluation.result import Result
    from ..evaluation.store import Store
    from ..evaluation.targets import Target

EXTRA = "eval"
REPORT, ALL, TRANSFER = "report", "all", "transfer"
PAPER_KEYS = (OAG_KEY, "oag-paper")  # what OAG is with --setting paper

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Evaluate(DeviceOptions, ClassifierOptions, ImageOptions):
    """Measure defenses as the paper does, and under adaptive attacks.

    What is computed is kept in OUT/cache: an interrupted run goes on from there. Each experiment writes OUT/NAME.json, .csv and
    .md, and OUT/report.html shows all of them. Exit status: 0; 1 if an experiment or a row of one failed; 2 if nothing could
    be run.
    """

    experiments: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Experiments of the list above."""
    out: Path
    """Folder of the results."""
    data: Annotated[str, default("none, for a report")] = ""
    model: Annotated[str, default("none, for a report")] = ""
    other: Annotated[tuple[str, ...], tyro.conf.arg(metavar="MODEL[=WEIGHTS]")] = ()
    """Further targets, for tables 2 and 3."""
    adversarial: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FOLDER")] = ()
    """Folders of images attacked by another tool, named as those of --data, for transfer; a column each."""
    count: int = 150
    """Number of images that the target classifies correctly; for certify, of all images."""
    slow_count: int = 20
    """Number of images for slow defenses."""
    shift: Annotated[int | None, default("by the size of the images: 1 at 32 pixels, 5 at 224")] = None
    """Pixels by which the four views are shifted."""
    attacks: tuple[str, ...] = tuple(attack.key for attack in GRAY_BOX)
    """Gray-box attacks of table1 and others."""
    goal: Literal["paper", "targeted", "untargeted"] = "paper"
    """paper: FGSM and IGSM towards a random class, MI-FGSM and C&W away from the right one."""
    setting: Literal["default", "paper"] = "default"
    """Setting of OAG: paper has T_N 300 and closed-form Langevin steps, and writes OUT/NAME-paper.json."""
    eps: int = EPS
    """Bound of FGSM and IGSM in grey levels."""
    mifgsm_eps: int = MIFGSM_EPS
    """Bound of MI-FGSM in grey levels; the paper has 4 on Flower-17 and 2 on ImageNet."""
    defenses: Annotated[tuple[str, ...] | None, default("all that can be made here")] = None
    """Only these defenses of the list above, or your own."""
    tuned: Annotated[Path | None, default("those of the list")] = None
    """File tune.json with the settings that the experiment tune has chosen."""
    pixelcnn: Annotated[Path | None, default("none")] = None
    """File of fit-pixelcnn, for pixeldefend."""
    noise_std: float = 0.1
    """Gaussian noise of tune and fig4, on the [0, 1] scale."""
    compute_dtype: Annotated[Literal["float32", "bfloat16"] | None, default("the faster one on this machine")] = None
    """Operands of OAG's convolutions."""
    progress: bool = False
    """Show progress bars even if the output is not a terminal."""
    verbose: bool = False
    """Show the traceback of what fails."""
    engine: Literal["local", "ray"] = "local"
    """ray (extra 'ray'): batches of images as tasks for a cluster, or for the processors of this machine."""
    address: Annotated[str | None, default("RAY_ADDRESS, or one on this machine for this run")] = None
    """Address of a Ray cluster."""
    adaptive: AdaptiveOptions = AdaptiveOptions()
    """Options of the experiment adaptive."""
    convergence: ConvergenceOptions = ConvergenceOptions()
    """Options of the experiment convergence."""
    certify: CertifyOptions = CertifyOptions()
    """Options of the experiment certify."""

    def __post_init__(self) -> None:
        if not self.experiments:
            raise ValueError("name an experiment; --help lists them")
        if not self.asked:
            return
        from .. import _checks  # imports torch

        if not self.model or not self.data:
            raise ValueError("--model and --data are needed")
        for parent in (ImageOptions, ClassifierOptions, DeviceOptions):
            parent.__post_init__(self)
        for name in ("count", "slow_count"):
            _checks.integer(f"--{name.replace('_', '-')}", getattr(self, name), at_least=1)
        if self.shift is not None:
            _checks.integer("--shift", self.shift, at_least=1)
        _checks.number("--noise-std", self.noise_std, above=0)
        if self.engine != "ray" and self.address is not None:
            raise ValueError("--address needs --engine ray")
        for one in self.asked:
            if one.needs_other and not self.other:
                raise ValueError(f"{one.key} needs a second target: --other MODEL[=WEIGHTS]")
        if any(one.key == TRANSFER for one in self.asked) != bool(self.adversarial):
            raise ValueError("transfer and --adversarial FOLDER need each other")
        if self.adaptive.seed_known and any(one.key == "convergence" for one in self.asked):
            raise ValueError("--adaptive.seed-known doesn't go with convergence, whose attackers don't know the seed")
        not_empty("--attacks", self.attacks)
        if self.defenses is not None:
            not_empty("--defenses", self.defenses)
            if not any(one.of_defenses for one in self.asked):
                named = " and ".join(one.key for one in self.asked)
                raise ValueError(f"--defenses has no effect on {named}; the denoisers of certify are --certify.denoisers")
        families = chosen(self.defenses or ())
        if self.setting == "paper":
            if any(one.key == "certify" for one in self.asked):
                raise ValueError("--setting paper doesn't go with certify, whose OAG has settings for the noise")
            if others := [family.key for family in families if has_oag(family.key) and family.key not in PAPER_KEYS]:
                raise ValueError(f"--setting paper has OAG as {' or '.join(PAPER_KEYS)}, got --defenses {others[0]}")
        for option, path in (("--tuned", self.tuned), ("--pixelcnn", self.pixelcnn)):
            check_input(option, path)
        for options in (self.adaptive, self.convergence, self.certify):
            options.check()

    @property
    def asked(self) -> tuple[Experiment, ...]:
        """The experiments to be run, in the order of their list; none for a report alone."""
        named = [experiment(name) for name in self.experiments if name not in (REPORT, ALL)]
        if ALL in self.experiments:
            named += [one for one in EXPERIMENTS if one.in_all and (self.other or not one.needs_other)]
        return tuple(one for one in EXPERIMENTS if one in named)

    def run(self) -> int:
        """Run the experiments one after another, writing each when it is done, and the report over all that are there.

        Returns 1 if an experiment failed or has a row that did, else 0.

        Raises:
            ValueError: an argument is wrong; nothing was run.
        """
        process.log_to_stderr(verbose=self.verbose)
        # what draws, for a command that runs
        from ..evaluation import experiments
        from ..evaluation.render import render
        from ..evaluation.render.report import find_results, write_report
        from ..evaluation.result import Result

        if not self.asked:
            for found in find_results(self.out):
                render(found, self.out)
            print(f"wrote {write_report(self.out)}")
            return 0
        plan, done, failed = self._plan(), list[Result](), False
        with self._engine():
            for one in self.asked:
                try:
                    for result in experiments.run(one, plan):
                        self._write(result)
                        done.append(result)
                except Exception as error:  # the other experiments go on
                    debugged = logger.isEnabledFor(logging.DEBUG)
                    logger.error("%s failed: %s: %s", one.key, type(error).__name__, error, exc_info=debugged)
                    failed = True
        if done:
            print(f"wrote {write_report(self.out)}")
        for result in done:
            if "recommendation" in result.facts:
                print(result.facts["recommendation"])
        return 1 if failed or any(row.error for result in done for row in result.rows) else 0

    def _write(self, result: "Result") -> None:
        """Write and draw a result, and print its table."""
        from ..evaluation.render import render, tables
        from ..evaluation.result import write

        write(result, self.out)
        render(result, self.out)
        with process.reader_may_end(sys.stdout):
            print(tables.to_markdown(result), flush=True)
        if failed := [row.name for row in result.rows if row.error]:
            logger.error("%s: %d of %d rows failed: %s", result.key, len(failed), len(result.rows), "; ".join(failed))

    def _plan(self) -> "Plan":
        """The plan of the run; it raises for every bad argument, before any work."""
        import torch

        from ..evaluation.adversarial import choose_transfer, common, match
        from ..evaluation.data import kind_of
        from ..evaluation.experiments import certify
        from ..evaluation.plan import Plan, common_facts
        from ..evaluation.subject import choose_subject
        from ..generator.run import operands
        from ..generator.settings import Settings

        process.look_for_modules_here()
        device, listing = self.find_device(), self.listing()
        matches = [match(folder, listing) for folder in self.adversarial]
        if matches:
            common(matches, listing)
        apart = self._apart(listing)
        keys, attacks = {one.key for one in self.asked}, self._attacks()
        for attack in self.adaptive.attacks if "adaptive" in keys else ():
            if len(listing.classes) < (least := adaptive_entry(attack).classes):
                raise ValueError(f"{attack} needs {least} classes or more, got {len(listing.classes)}")
        dtype = dtype_of(self.compute_dtype)
        needs = Needs(pixelcnn=self._pixelcnn(), compute_dtype=dtype)
        every, targets = self._every(), self._targets(listing, device)
        if not self.other:  # a defense that uses the gradient of one target is none of another's
            needs = dataclasses.replace(needs, target=targets[0].model)
        families = self._families(every, needs)
        if os.path.lexists(self.out) and not self.out.is_dir():
            raise ValueError(f"--out must be a folder, got {self.out}")
        self.out.mkdir(parents=True, exist_ok=True)  # before any work
        show = sys.stderr.isatty() or self.progress
        store = self._store()(self.out / "cache", chunk=self.batch_size, progress=show)
        subjects, unfiltered, transfer = [], None, None
        if TRANSFER in keys:
            transfer = choose_transfer(matches, targets[0], listing, self.count, store, self.seed, device)
        if keys - {"certify", TRANSFER}:
            subjects = [choose_subject(target, listing, self.count, store, self.seed, device) for target in targets]
        if "certify" in keys:
            unfiltered = choose_subject(targets[0], listing, self.count, store, self.seed, device, right_only=False)
        possible = (*subjects, transfer.subject if transfer else None, unfiltered)
        subject = next(each for each in possible if each is not None)  # there is an experiment
        if len(subject.images) < self.count:
            which = "" if subject is unfiltered else f" that {subject.target.name} classifies correctly"
            logger.info("only %d images%s", len(subject.images), which)
        plan = Plan(
            subject=subject,
            families=families,
            attacks=tuple(attacks[key] for key in dict.fromkeys(self.attacks)),
            attacks_by_key=attacks,
            facts=common_facts(subject, Path(kind_of(self.data)[1]).resolve().name)
            | {"compute_dtype": str(operands(Settings(compute_dtype=dtype), device, torch.float32))}
            | ({} if self.shift is None else {"shift of the views": self.shift}),
            others=tuple(subjects[1:]),
            transfer=transfer,
            unfiltered=unfiltered,
            apart=apart,
            slow_count=self.slow_count,
            shift=self.shift,
            noise_std=self.noise_std,
            network_steps=next(int(family.tuned) for family in every if family.key == OAG_KEY),
            needs=needs,
            paper=self.setting == "paper",
            adaptive=self.adaptive,
            convergence=self.convergence,
            certify=self.certify,
        )
        if unfiltered is not None:
            certify.check(plan)
        return plan

    def _targets(self, listing: "Listing", device: "torch.device") -> "list[Target]":
        """The classifiers of ``--model`` and ``--other``."""
        from ..evaluation.data import first_size  # with torch

        others = [name.partition("=") for name in self.other]
        named = [self, *(dataclasses.replace(self, model=model, weights=weights or None) for model, _, weights in others)]
        first = first_size(listing)
        targets = [each.load(listing.classes, device, listing.side, first) for each in named]
        least = min(target.preprocessing.crop for target in targets)
        if self.shift is not None and self.shift >= least:
            raise ValueError(f"--shift must be less than the images' {least} pixels, got {self.shift}")
        return targets

    def _store(self) -> "type[Store]":
        from ..evaluation.store import Store  # with torch

        if self.engine != "ray":
            return Store
        try:
            from .cluster_store import ClusterStore
        except ModuleNotFoundError as error:
            raise ValueError(f"--engine ray needs {error.name}: pip install 'oag-transform[ray]'") from error
        return ClusterStore

    def _engine(self) -> contextlib.AbstractContextManager[object]:
        """The Ray cluster of ``--engine ray``. Workers look for modules where this process does when it connects."""
        if self.engine != "ray":
            return contextlib.nullcontext()
        from .cluster_store import connected

        return connected(self.address)

    def _attacks(self) -> "dict[str, Attack]":
        """Every gray-box attack, as the options say; an unknown name in --attacks is an error."""
        from ..evaluation.attacks import gray_box  # with torch

        targeted = None if self.goal == "paper" else self.goal == "targeted"
        budgets = {"fgsm": self.eps, "igsm": self.eps, "mifgsm": self.mifgsm_eps}
        keys = (*self.attacks, *(entry.key for entry in GRAY_BOX))
        return {key: gray_box.make(key, budgets.get(key), targeted) for key in dict.fromkeys(keys)}

    def _apart(self, listing: "Listing") -> "Listing | None":
        """The images that batch normalization is adapted on: other ones than those that are certified."""
        from ..evaluation.data import open_images, same_images

        spec = self.certify.batch_norm
        if spec is None:
            return None
        apart = open_images(spec, devkit=self.devkit, training=True)
        if same_images(spec, apart, self.data, listing):
            raise ValueError(f"--certify.batch-norm needs other images than those that are certified, got {spec} for both")
        return apart

    def _pixelcnn(self) -> object:
        from ..baselines.pixeldefend import load_pixelcnn  # with torch

        try:
            return None if self.pixelcnn is None else load_pixelcnn(self.pixelcnn)
        except Exception as error:  # a damaged file
            raise ValueError(f"--pixelcnn {self.pixelcnn}: {files.reason(error)}") from error

    def _every(self) -> tuple[Family, ...]:
        """The defenses of the list: OAG as ``--setting`` says, all tuned as the experiment tune has found."""
        from ..evaluation import result as results  # with torch
        from ..evaluation.plan import as_published

        every = {family.key: family for family in DEFENSES}
        if self.setting == "paper":
            every = {key: as_published(each) for key, each in every.items() if key == OAG_KEY or not has_oag(key)}
        if self.tuned is None:
            return tuple(every.values())
        tuned = results.read(self.tuned)
        found = tuned.facts.get("chosen")
        if not isinstance(found, dict) or not all(isinstance(setting, (int, float)) for setting in found.values()):
            raise ValueError(f"{self.tuned} is not the tune.json of an evaluation")
        if tuned.key.endswith("-paper") != (self.setting == "paper"):
            raise ValueError(f"{self.tuned} has OAG at another setting; run tune with --setting {self.setting}")
        try:
            every |= {family.key: family for family in chosen(found) if family.key not in every}
        except ValueError as error:
            raise ValueError(f"{self.tuned}: {error}; run tune again") from error
        return tuple(dataclasses.replace(family, tuned=found.get(key, family.tuned)) for key, family in every.items())

    def _families(self, every: tuple[Family, ...], needs: Needs) -> tuple[Family, ...]:
        """The defenses that are asked for; where none is, those that can be made here."""
        if self.defenses is not None:
            by_key = {family.key: family for family in every}
            named = tuple(by_key.get(defense.key, defense) for defense in chosen(self.defenses))  # some keys are in no list
            for family in named:
                self._check_made(family, {family.published, family.tuned}, needs)
            return named
        found = []
        for family in every:
            try:
                family.make(family.published, 0, needs)
            except (ValueError, ModuleNotFoundError) as error:
                if getattr(error, "name", None) is not None:  # a package of the extra 'eval'; BM3D says in words what it needs
                    raise
                logger.info("%s is left out: %s", family.label, error)
            else:
                self._check_made(family, {family.tuned} - {family.published}, needs)
                found.append(family)
        return tuple(found)

    def _check_made(self, family: Family, settings: set[float], needs: Needs) -> None:
        """Make a defense at these settings, so that errors come before any work."""
        for setting in sorted(settings):
            try:
                family.make(setting, self.seed, needs)
            except Exception as error:  # somebody's own code
                if isinstance(error, ModuleNotFoundError) and error.name is not None:  # of the extra, which the caller names
                    raise
                option = "--defenses" if self.tuned is None or setting == family.published else f"--tuned {self.tuned}:"
                raise ValueError(f"{option} {family.key}: {files.reason(error)}") from error


def _lists() -> str:
    """What the help lists: experiments, attacks, defenses and denoisers, by what they are called on the command line."""
    left_out = ", ".join(entry.key for entry in EXPERIMENTS if not entry.in_all)
    with_other = " and ".join(entry.key for entry in EXPERIMENTS if entry.needs_other)
    every = f"all but {left_out}, which take long or need other images; {with_other} only with --other"
    lists: dict[str, list[tuple[str, Any]]] = {
        "experiments": [(entry.key, entry.title) for entry in EXPERIMENTS]
        + [(REPORT, "draw the figures and the report in OUT again, from its JSON files"), (ALL, every)],
        "gray-box attacks": [(attack.key, f"{attack.label}, {'' if attack.targeted else 'un'}targeted") for attack in GRAY_BOX],
        "adaptive attacks": [(attack.key, attack.description) for attack in ADAPTIVE_ATTACKS],
        "defenses": [(defense.key, defense.label) for defense in DEFENSES]
        + [
            (f"KEY{IN_VIEWS}", "any of them in four views"),
            ("KEY:SETTING", "at this setting only"),
            ("KEY+KEY:SETTING", "several in one model, in four views"),
            ("module:function", "your own: what the function returns, a module or callable on [0, 1] images"),
        ],
        "denoisers": [(each.key, each.label + ("" if each.by_default else ", only if asked for")) for each in DENOISERS]
        + [("module:function", "your own, as above; the function may take std, that of the noise on the [0, 1] scale")],
    }
    width = max(len(key) for entries in lists.values() for key, _ in entries)
    parts = ["\n".join([f"{kind}:", *(f"  {key:<{width}}  {title}" for key, title in each)]) for kind, each in lists.items()]
    return "\n\n".join(parts)


Evaluate.__doc__ = f"{inspect.cleandoc(Evaluate.__doc__ or '')}\n\n{_lists()}\n"
COMMAND = Evaluate
