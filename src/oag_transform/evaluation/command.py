"""What the commands ``evaluate``, ``fit-target`` and ``fit-pixelcnn`` do with their arguments."""

import argparse
import logging
import os
import sys
from pathlib import Path

import torch

from . import data, results
from .attacks import Attack, cw, fgsm, igsm, mifgsm
from .defenses import OURS, Defense, defenses
from .experiments import EXPERIMENTS, Plan, common_facts
from .measure import choose_subject
from .pixeldefend import bits_per_dim, fit_pixelcnn, load_pixelcnn, save_pixelcnn
from .report import write_report
from .store import Store
from .targets import fit_target, load_target, save_target

logger = logging.getLogger(__name__)


def evaluate(options: argparse.Namespace) -> int:
    """Run the experiments one after another, writing each when it is done, and the report over all that are there."""
    unknown = sorted(set(options.experiments) - {*EXPERIMENTS, "report", "all"})
    if unknown:
        raise ValueError(f"no experiment {unknown[0]!r}; expected some of {', '.join([*EXPERIMENTS, 'report', 'all'])}")
    wanted = [name for name in EXPERIMENTS if name in options.experiments or _in_all(name, options)]
    failed = []
    if wanted:
        _check(options)
        plan = _plan(options)
        for name in wanted:
            try:
                result = EXPERIMENTS[name](plan)
            except Exception as error:  # the other experiments go on
                logger.error(
                    "%s failed: %s: %s", name, type(error).__name__, error, exc_info=logger.isEnabledFor(logging.DEBUG)
                )
                failed.append(name)
                continue
            results.write(result, options.out)
            print(results.to_markdown(result), flush=True)
    if len(failed) < len(wanted) or not wanted:
        print(f"wrote {write_report(options.out)}")
    return 1 if failed else 0


def fit_target_command(options: argparse.Namespace) -> int:
    """Fit a classifier to a folder and write it."""
    if options.out.suffix not in (".pt", ".pth"):
        raise ValueError(f"--out must end in .pt, as --model knows such a file by it, got {options.out}")
    _check_output(options.out)
    listing = _listing(options)
    model, preprocessing = fit_target(
        listing,
        options.backbone,
        options.weights,
        epochs=options.epochs,
        lr=options.lr,
        batch_size=options.batch_size,
        seed=options.seed,
        device=_device(options.device),
        progress=sys.stderr.isatty(),
    )
    save_target(options.out, model.cpu(), preprocessing, backbone=options.backbone, classes=listing.classes)
    print(f"wrote {options.out}: {options.backbone} with {len(listing.classes)} classes, fitted to {len(listing.paths)} images")
    return 0


def fit_pixelcnn_command(options: argparse.Namespace) -> int:
    """Train PixelDefend's PixelCNN on a folder and write it."""
    _check_output(options.out)
    _check_sides(options)
    listing = _listing(options)
    count = min(options.count, len(listing.paths))
    if count < 2:
        raise ValueError(f"two images at least are needed, one to train on and one to hold out, got {count}")
    preprocessing = data.Preprocessing(options.resize, options.crop)
    order = data.shuffled(listing, options.seed)[:count]
    images = data.read_images(listing, order, preprocessing)
    held_out = max(1, count // 20)
    model = fit_pixelcnn(images[held_out:], seed=options.seed, progress=sys.stderr.isatty())
    save_pixelcnn(model, options.out)
    bits = bits_per_dim(model, images[:held_out])
    print(f"wrote {options.out}: {bits:.2f} bits a dimension on {held_out} images that were held out")
    return 0


def _in_all(name: str, options: argparse.Namespace) -> bool:
    """``all`` leaves out what needs other arguments: the tuning, its own images; Tables II and III, a second target."""
    return "all" in options.experiments and name != "tune" and (bool(options.other) or name not in ("table2", "table3"))


def _plan(options: argparse.Namespace) -> Plan:
    # all that can be wrong with the arguments comes before any work
    sys.path.insert(0, os.getcwd())  # a target that is given as module:function may lie in the current folder
    device = _device(options.device)
    listing = _listing(options)
    attacks = _attacks(options)
    dtype = None if options.compute_dtype is None else getattr(torch, options.compute_dtype)
    families, network_steps = _families(options, dtype)
    sides = {"resize": options.resize, "crop": options.crop}
    targets = [
        load_target(name, weights, classes=listing.classes, device=device, **sides)
        for name, weights in [(options.model, options.weights), *(_other(name) for name in options.other)]
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    store = Store(options.out / "cache", chunk=options.batch_size, progress=sys.stderr.isatty() or options.progress)
    subjects = [choose_subject(target, listing, options.count, store, options.seed, device) for target in targets]
    subject = subjects[0]
    if len(subject.images) < options.count:
        print(f"only {len(subject.images)} images that {subject.target.name} gets right", file=sys.stderr)
    return Plan(
        subject=subject,
        others=tuple(subjects[1:]),
        families=families,
        attacks=attacks,
        slow_count=options.slow_count,
        noise_std=options.noise_std,
        network_steps=network_steps,
        compute_dtype=dtype,
        folder=options.out,
        facts=common_facts(subject, options.data.resolve().name) | {"compute_dtype": options.compute_dtype or "float32"},
    )


def _attacks(options: argparse.Namespace) -> tuple[Attack, ...]:
    goal = {} if options.goal == "paper" else {"targeted": options.goal == "targeted"}  # the attacks' defaults are the paper's
    made = {
        "fgsm": lambda: fgsm(options.eps, **goal),
        "igsm": lambda: igsm(options.eps, **goal),
        "mifgsm": lambda: mifgsm(options.mifgsm_eps, **goal),
        "cw": lambda: cw(**goal),
    }
    return tuple(made[name]() for name in options.attacks)


def _families(options: argparse.Namespace, dtype: torch.dtype | None) -> tuple[tuple[Defense, ...], int]:
    """The defenses that are asked for, tuned, and the tuned T_N of ours."""
    families = defenses(None if options.pixelcnn is None else load_pixelcnn(options.pixelcnn), dtype)
    if options.tuned is not None:
        chosen = results.read(options.tuned).facts.get("chosen")
        if not isinstance(chosen, dict):
            raise ValueError(f"{options.tuned} is not the tune.json of an evaluation")
        families = tuple(family._replace(tuned=chosen.get(family.name, family.tuned)) for family in families)
    network_steps = next(int(family.tuned) for family in families if family.name == OURS)
    if not options.defenses:
        return families, network_steps
    slugs = {_slug(family.name): family for family in families}
    unknown = [name for name in options.defenses if _slug(name) not in slugs]
    if unknown:
        raise ValueError(f"no defense {unknown[0]!r}; expected some of {', '.join(slugs)}")
    return tuple(slugs[_slug(name)] for name in options.defenses), network_steps


def _listing(options: argparse.Namespace) -> data.Listing:
    if options.layout == "flower17":
        return data.flower17(options.data, options.split)
    if options.layout == "ilsvrc2012":
        if options.devkit is None:
            raise ValueError("--layout ilsvrc2012 needs --devkit, the folder ILSVRC2012_devkit_t12")
        return data.ilsvrc2012(options.data, options.devkit)
    return data.image_folder(options.data)


def _check(options: argparse.Namespace) -> None:
    if options.model is None or options.data is None:
        raise ValueError("--model and --data are needed")
    if "table2" in options.experiments and not options.other:
        raise ValueError("table2 needs a second target: --other MODEL[=WEIGHTS]")
    for name in ("count", "slow_count", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed must be from 0 to 2^63 - 1, got {options.seed}")
    if not options.noise_std > 0:
        raise ValueError(f"--noise-std must be above 0, got {options.noise_std}")
    _check_sides(options)


def _check_sides(options: argparse.Namespace) -> None:
    for name in ("resize", "crop"):
        side = getattr(options, name)
        if side is not None and side < 1:
            raise ValueError(f"--{name} must be at least 1, got {side}")
    if options.resize is not None and options.crop is not None and options.resize < options.crop:
        raise ValueError(f"--resize must be at least --crop, got {options.resize} and {options.crop}")


def _check_output(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"--out must be a file, got the folder {path}")
    path.parent.mkdir(parents=True, exist_ok=True)


def _device(name: str) -> torch.device:
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise ValueError(f"--device {name} can't be used: {str(error).splitlines()[0]}") from error


def _other(name: str) -> tuple[str, str | None]:
    model, _, weights = name.partition("=")
    return model, weights or None


def _slug(name: str) -> str:
    return name.lower().replace(" ", "-").replace("paper()", "paper").replace(",", "")
