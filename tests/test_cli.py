"""The command line: what it writes, and what it says when it can't."""

import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from oag_transform import OnlineAlternateGenerator
from oag_transform.cli import main


def write_image(path: Path, mode: str = "RGB", size: tuple[int, int] = (33, 28)) -> Path:
    values = torch.randint(0, 256, (3, size[1], size[0]), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    to_pil_image(values).convert(mode).save(path)
    return path


def read(path: Path) -> PIL.Image.Image:
    with PIL.Image.open(path) as image:
        image.load()
        return image.copy()


def test_purify_writes_what_the_transform_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [write_image(tmp_path / "a.png"), write_image(tmp_path / "b.jpg", "L")]
    out = tmp_path / "new" / "folder"
    settings = ["--network-steps", "2", "--threshold", "3.5", "--strength", "0.6", "--seed", "4"]
    assert main(["purify", *map(str, sources), "--out", str(out), *settings]) == 0
    transform = OnlineAlternateGenerator(network_steps=2, threshold=3.5, strength=0.6, seed=4)
    for index, (source, mode) in enumerate(zip(sources, ("RGB", "L"), strict=True)):
        expected = transform(read(source), index=index)
        actual = read(out / f"{source.stem}.png")
        assert actual.mode == mode
        assert torch.equal(pil_to_tensor(actual), pil_to_tensor(expected))
    assert capsys.readouterr().out.count("wrote") == 2


def test_purify_takes_an_image_as_it_is_meant_to_be_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turned = read(write_image(tmp_path / "a.png"))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    turned.save(tmp_path / "turned.jpg", exif=exif)
    transparent = write_image(tmp_path / "transparent.png", "RGBA")
    arguments = ["purify", str(tmp_path / "turned.jpg"), str(transparent), "--out", str(tmp_path / "o"), "--network-steps", "1"]
    assert main(arguments) == 0
    assert read(tmp_path / "o" / "turned.png").size == (28, 33)
    assert read(tmp_path / "o" / "transparent.png").mode == "RGB"
    assert "transparency is dropped" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "extra", "message"),
    [
        (["missing.png"], [], "missing.png"),
        (["text.png"], [], "not an image"),
        (["small.png"], [], "5 x 7; at least 9 x 9"),
        (["a.png", "a.jpg"], [], "two images would both be written"),
        (["a.png"], ["--out", "."], "would be overwritten"),
        (["a.png"], ["--network-steps", "0"], "network_steps must be an integer >= 1, got 0"),
        (["a.png"], ["--threshold", "-1"], "threshold must be a finite number >= 0, got -1.0"),
        (["a.png"], ["--strength", "2"], "strength must be None or a number above 0 and at most 1, got 2.0"),
        (["a.png"], ["--seed", "-3"], "seed must be an integer >= 0, got -3"),
    ],
)
def test_purify_says_what_is_wrong_and_writes_nothing(
    names: list[str],
    extra: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_image(Path("a.png"))
    write_image(Path("a.jpg"))
    write_image(Path("small.png"), size=(5, 7))
    Path("text.png").write_text("no image")
    before = {path: path.read_bytes() for path in Path().iterdir()}
    assert main(["purify", *names, "--out", "o", *extra]) == 2  # argparse takes the last --out
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


def test_demo_without_its_extra_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "foolbox", None)
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "foolbox: pip install 'oag-transform[demo]'" in capsys.readouterr().err


def test_usage_errors_come_from_argparse() -> None:
    with pytest.raises(SystemExit) as error:
        main(["purify", "a.png"])
    assert error.value.code == 2


def test_importing_the_package_stays_light() -> None:
    heavy = ["foolbox", "matplotlib", "skimage", "scipy", "tqdm", "triton", "efficientnet_lite_pytorch"]
    code = (
        "import sys, torchvision; had = set(sys.modules); import oag_transform; "
        f"print([name for name in {heavy} if name in set(sys.modules) - had])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
