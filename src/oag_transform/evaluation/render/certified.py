"""A certification as Markdown, and certified accuracy against radius as curves."""

from pathlib import Path

from ..certification import Certification, CertifiedRow, grey_levels
from ..results import Cell, put
from . import figures
from .tables import seconds

POINTS = 13  # of a curve
KEY = "certificates"


def render(certification: Certification, folder: Path) -> None:
    """Draw a curve for each noise and write ``certificates.md`` into a folder."""
    for noise_std in certification.noises:
        draw(certification, noise_std, folder / curve_file(noise_std))
    put(folder / f"{KEY}.md", to_markdown(certification))


def curve_file(noise_std: float) -> str:
    """Name of the curve of a noise."""
    return f"certified-{noise_std:g}.svg"


def in_words(certification: Certification) -> str:
    """What a certificate is worth, which is to be said first: the L-infinity radius that it implies."""
    _, height, width = certification.shape
    most = max(certification.attainable(noise_std) for noise_std in certification.noises)
    radii = sorted({0.5, most}) if most > 0 else [0.5]
    worth = " and ".join(f"{grey_levels(radius, certification.smaller):.2f}/255 for {radius:.2g}" for radius in radii)
    limit = f"{most:.2g} is the most that {certification.n} draws can prove. " if most > 0 else "So few draws prove nothing. "
    return (
        f"What is proven is an L2 radius, on the [0, 1] scale. At {height} x {width} pixels an L-infinity radius that it gives "
        f"is {certification.smaller:.0f} times smaller: {worth}. {limit}A wrong certificate has a probability of at most "
        f"{certification.alpha:g}."
    )


def to_markdown(certification: Certification) -> str:
    """The certification as Markdown sections: a table for each noise, ours against each control, and the facts."""
    lines = [in_words(certification), ""]
    low, high = certification.clean.interval
    lines += [
        f"{certification.clean.n} photographs, right or wrong; the bare target has {100 * certification.clean.accuracy:.1f}% "
        f"[{100 * low:.0f}, {100 * high:.0f}] of them right without noise. A draw is right, or a photograph is proven to be "
        "right within a radius, in percent, with 95% Wilson intervals.",
        "",
    ]
    for noise_std in certification.noises:
        lines += _table(certification, noise_std) + _tests(certification, noise_std)
        lines += [f"![Certified accuracy, noise of {noise_std:g}]({curve_file(noise_std)})", ""]
    plan = {"n0": certification.n0, "n": certification.n, "alpha": certification.alpha, "looks": certification.looks}
    lines += [f"- {name}: {value}" for name, value in (plan | certification.facts).items()]
    return "\n".join(lines) + "\n"


def _table(certification: Certification, noise_std: float) -> list[str]:
    radii = certification.radii(noise_std)
    columns = [
        f"L2 {radius:g} (L∞ {grey_levels(radius, certification.smaller):.2f}/255)" if radius else "L2 above 0"
        for radius in radii
    ]
    header = ["Denoiser", "one draw", *columns, "s a draw"]
    lines = [f"## Certified accuracy, noise of {noise_std:g}", "", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for row in certification.at_noise(noise_std):
        if row.error:
            cells = [f"failed: {row.error}".replace("|", "\\|").replace("\n", " ")] + [""] * (len(header) - 2)
        else:
            proven = [_cell(certification.certified(row, radius)) for radius in radii]
            cells = [f"{100 * row.one_draw:.1f}", *proven, seconds(row.seconds)]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return [*lines, ""]


def _tests(certification: Certification, noise_std: float) -> list[str]:
    ours = certification.ours(noise_std)
    others = [row for row in certification.at_noise(noise_std) if row is not ours and not row.error]
    radii = certification.radii(noise_std)
    if ours is None or not others or not radii:
        return []
    header = [f"{ours.name}, against", *(f"L2 {radius:g}" if radius else "L2 above 0" for radius in radii)]
    lines = ["Certified with ours alone and with the other alone; p of the exact sign test, two-sided:", ""]
    lines += [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for row in others:
        lines.append(f"| {row.name} | {' | '.join(_test(certification, row, radius) for radius in radii)} |")
    return [*lines, ""]


def _test(certification: Certification, row: CertifiedRow, radius: float) -> str:
    more, fewer, p = certification.against(row, radius)
    return f"{more}, {fewer} (p = {p:.2g})"


def _cell(cell: Cell) -> str:
    low, high = cell.interval
    return f"{100 * cell.accuracy:.1f} [{100 * low:.0f}, {100 * high:.0f}]"


def draw(certification: Certification, noise_std: float, path: Path) -> None:
    """Certified accuracy against radius at one noise, a line for each denoiser that could be measured."""
    most = certification.attainable(noise_std)
    radii = [most * i / (POINTS - 1) for i in range(POINTS)]
    rows = [row for row in certification.at_noise(noise_std) if not row.error]
    if not rows:
        return
    series = [figures.Series(row.name, radii, [certification.certified(row, radius) for radius in radii]) for row in rows]
    figures.lines(
        path,
        series,
        xlabel="L2 radius, on the [0, 1] scale",
        ylabel="certified accuracy (%)",
        title=f"Noise of {noise_std:g}; L-infinity: {certification.smaller:.0f} times smaller",
    )
