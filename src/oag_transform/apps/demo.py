"""``oag-transform demo``: attacks on a real classifier, defenses against them, one table and one picture."""

from dataclasses import dataclass
from pathlib import Path

EXTRA = "demo"


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Attack a real ImageNet classifier behind each of five defenses: four gray-box attacks and one adaptive attack."""

    out: Path = Path("oag-demo")
    """Folder for the picture."""

    def run(self) -> int:
        """Print the table and write the picture."""
        from . import demonstration  # imports torch, and the extra

        self.out.mkdir(parents=True, exist_ok=True)
        outcome = demonstration.measure()
        print(demonstration.table(outcome))
        path = self.out / "demo.png"
        demonstration.picture(outcome, path)
        print(f"wrote {path}")
        return 0


COMMAND = Demo
