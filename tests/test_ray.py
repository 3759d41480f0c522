"""``--engine ray`` and the callable class: results equal those of one process, for any partition and any killed worker."""

import contextlib
import csv
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

ray = pytest.importorskip("ray")
pytest.importorskip("pyarrow")

import pyarrow as pa  # noqa: E402  # after what skips
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402

from oag_transform import OnlineAlternateGenerator  # noqa: E402
from oag_transform.apps import cluster, cluster_purify, dataset, shards, sources, worker  # noqa: E402
from oag_transform.apps.cli import main  # noqa: E402
from oag_transform.apps.cluster_store import ClusterStore, connected  # noqa: E402
from oag_transform.evaluation import result as results  # noqa: E402
from oag_transform.streams import index_of  # noqa: E402
from tests.test_purify import FAST, POSIX, odd_exif, purify, read, save, tree  # noqa: E402
from tests.tiny import write_images  # noqa: E402

pytestmark = [pytest.mark.ray, POSIX, pytest.mark.usefixtures("choice_of_processes")]
SEED = ["--seed", "1"]
RAY = ["--engine", "ray", "--jobs", "2"]
SIZES = [(33, 28), (20, 40), (33, 28)]


@pytest.fixture(scope="module", autouse=True)
def two_workers() -> Iterator[None]:
    """One cluster on this machine for all tests: with threads as this process has, so that results are the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as a worker of two, on however many processors
    with cluster.connected(None, 2):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine images of two sizes in two folders, one of them grey, and a file that is none."""
    root: Path = tmp_path_factory.mktemp("ray") / "in"
    for i in range(9):
        save(root / ("ab"[i % 2]) / f"{i}.{'jpg' if i == 4 else 'png'}", "L" if i == 3 else "RGB", SIZES[i % 3], seed=i)
    (root / "bad.png").write_text("no image")
    return root


@pytest.fixture(scope="module")
def expected(folder: Path, choice_of_processes: None) -> dict[str, bytes]:
    """What ``purify --jobs 1`` makes of it."""
    assert purify(folder, "--out", folder.parent / "expected", *SEED, "--jobs", "1") == 1
    found = tree(folder.parent / "expected")
    assert len(found) == 9
    return found


@pytest.fixture(scope="module")
def parquet(folder: Path) -> Path:
    """The same images in two parquet files, with labels, one of which is missing."""
    out = folder.parent / "parquet"
    out.mkdir()
    rows = [
        {"name": name, "image": content, "label": None if i == 2 else i, "facts": {"even": i % 2 == 0, "words": ["x"] * i}}
        for i, (name, content) in enumerate(sorted(tree(folder).items()))
    ]
    for number, part in enumerate((rows[:6], rows[6:])):
        pq.write_table(pa.Table.from_pylist(part), out / f"{number}.parquet")
    return out


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as shard:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    return path


def rows_in(out: Path) -> dict[str, dict[str, Any]]:
    """The rows of every parquet file there, by their names, each of which is there once."""
    rows = [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert len({row["name"] for row in rows}) == len(rows)
    return {row["name"]: row for row in rows}


def images_in(out: Path) -> dict[str, bytes]:
    return {name: row["image"] for name, row in rows_in(out).items()}


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Of what was printed: Ray may have lines of its own before it, about its workers."""
    return capsys.readouterr().out.splitlines()[-1]


def failures(out: Path) -> list[list[str]]:
    return list(csv.reader(io.StringIO((out / "_failures.csv").read_text())))


def results_of(out: Path) -> dict[str, bytes]:
    found = tree(out)
    found.pop("_failures.csv", None)
    return found


# the same results


def test_files_are_those_of_purify_however_they_are_cut(
    folder: Path, expected: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert purify(folder, "--out", tmp_path / "o", *SEED, *RAY, "--rows", "3", "--batch-size", "2") == 1
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == "9 purified, 0 there already, 1 failed"
    line = f"{folder}/bad.png is not an image that can be read: its format is none that Pillow knows"
    assert f"{line}\n" in said.err
    assert failures(tmp_path / "o") == [["file", "error"], [f"{folder}/bad.png", line]]
    assert results_of(tmp_path / "o") == expected


def test_parquet_keeps_labels_and_resumes_with_missing_images(
    parquet: Path, expected: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, more = tmp_path / "o", ["--format", "parquet", "--rows", "2", *SEED, *RAY]
    assert purify(parquet / "1.parquet", "--out", out, *more) == 1
    assert last_line(capsys) == "3 purified, 0 there already, 1 failed"
    before = tree(out)
    assert purify(parquet, "--out", out, "--skip-existing", *more) == 1
    assert last_line(capsys) == "6 purified, 3 there already, 1 failed"
    assert before.items() <= tree(out).items()
    assert images_in(out) == expected
    sources = rows_in(parquet)
    for name, row in rows_in(out).items():
        assert row == sources[name] | {"image": row["image"]}
    assert failures(out)[1][0] == "bad.png"


def test_parquet_of_hugging_face_to_files_and_names_that_cannot_be(
    expected: dict[str, bytes], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (folder / "a" / "0.png").read_bytes()
    bad = ["../out.png", "/out.png", "a/../../out.png", "", None]
    names = [*expected, *bad, next(iter(expected))]
    rows = [{"image": {"bytes": (folder / name).read_bytes() if name in expected else content, "path": name}} for name in names]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert purify(tmp_path / "a.parquet", "--out", tmp_path / "sub" / "o", *SEED, *RAY) == 1
    assert results_of(tmp_path / "sub" / "o") == expected
    assert set(tree(tmp_path)) == {"a.parquet", "sub/o/_failures.csv", *(f"sub/o/{name}" for name in expected)}
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == "9 purified, 0 there already, 6 failed"
    assert f"the name {names[0]!r} is there more than once" in said.err
    assert said.err.count("is not a path within a folder") == 3


def test_webdataset_keeps_labels_and_gives_the_same_images(expected: dict[str, bytes], folder: Path, tmp_path: Path) -> None:
    for number in range(2):
        members: dict[str, bytes] = {}
        for label, name in list(enumerate(sorted(expected)))[number::2]:
            key = name.rpartition(".")[0]
            members |= {name: (folder / name).read_bytes(), f"{key}.cls": b"%d" % label, f"{key}.txt": b"flower"}
        write_tar(tmp_path / f"{number}.tar", members)
    shards = sorted(tmp_path.glob("*.tar"))
    assert purify(*shards, "--out", tmp_path / "o", "--format", "parquet", "--rows", "3", *SEED, *RAY) == 0
    found = rows_in(tmp_path / "o")
    assert {name: row["image"] for name, row in found.items()} == expected
    assert {name: (row["cls"], row["txt"]) for name, row in found.items()} == {
        name: (label, "flower") for label, name in enumerate(sorted(expected))
    }


# records and files that are bad


def test_a_bad_record_of_parquet_is_a_failure_and_the_others_are_made(
    folder: Path, expected: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = sorted(expected)[:3]
    good = [(folder / name).read_bytes() for name in names]
    turned = PIL.Image.new("RGB", (24, 20))
    turned.save(tmp_path / "turned.jpg", exif=odd_exif())
    rows = {
        "name": [*names, "null.png", None, "turned.jpg"],
        "image": pa.array([*good, None, good[0], (tmp_path / "turned.jpg").read_bytes()], pa.binary()),
        "error": [f"of one's own {i}" for i in range(6)],
    }
    source = tmp_path / "in"
    source.mkdir()
    pq.write_table(pa.table(rows), source / "0.parquet")
    (source / "1.parquet").write_bytes(b"PAR1 and no more")
    assert purify(source, "--out", tmp_path / "o", "--format", "parquet", *SEED, *RAY) == 1
    assert last_line(capsys) == "4 purified, 0 there already, 3 failed"
    found = rows_in(tmp_path / "o")
    assert {name: found[name]["image"] for name in names} == {name: expected[name] for name in names}
    assert {name: row["error"] for name, row in found.items()} == {
        **{name: f"of one's own {i}" for i, name in enumerate(names)},
        "turned.jpg": "of one's own 5",
    }
    assert PIL.Image.open(io.BytesIO(found["turned.jpg"]["image"])).size == (20, 24)
    lines = failures(tmp_path / "o")[1:]
    assert lines[0][0] == f"{source}/1.parquet"
    assert sorted(line[1].partition(": ")[2] for line in lines[1:]) == ["it has no image", "it has no name"]


@pytest.mark.parametrize("name_column", ["name", "image.path"])
def test_a_damaged_page_of_parquet_is_a_failure_and_the_others_are_made(
    name_column: str, expected: dict[str, bytes], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = sorted(expected)
    files = [(folder / name).read_bytes() for name in names]
    structures = [{"bytes": content, "path": name} for content, name in zip(files, names, strict=True)]
    table = pa.table({"name": names, "image": files} if name_column == "name" else {"image": structures})
    path = tmp_path / "label=3" / "a.parquet"  # a column of its own, as Ray and pyarrow read it
    path.parent.mkdir()
    pq.write_table(table, path, row_group_size=2)
    page = pq.read_metadata(path).row_group(1).column(table.num_columns - 1).data_page_offset
    content = bytearray(path.read_bytes())
    content[page : page + 40] = b"\xff" * 40
    path.write_bytes(content)
    assert purify(path, "--out", tmp_path / "o", "--format", "parquet", *SEED, *RAY) == 1
    assert last_line(capsys) == "7 purified, 0 there already, 1 failed"
    rows = [row for part in sorted((tmp_path / "o").glob("*.parquet")) for row in pq.read_table(part).to_pylist()]
    assert {row["label"] for row in rows} == {"3"}
    made = [row["image"] if name_column == "name" else row["image"]["bytes"] for row in rows]
    assert sorted(made) == sorted(expected[name] for name in names if name not in names[2:4])
    ((failed, line),) = failures(tmp_path / "o")[1:]
    assert failed == str(path)
    assert line.startswith(f"{path}: 2 rows of row group 1 can't be read: ")


def test_a_bad_sample_or_shard_of_webdataset_is_a_failure_and_the_others_are_made(
    folder: Path, expected: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = {name: (folder / name).read_bytes() for name in expected}
    jpeg = next(name for name in expected if name.endswith(".jpg"))
    png = [name for name in expected if name.endswith(".png")][:4]
    write_tar(
        tmp_path / "0.tar",
        {
            "UP.JPG": contents[jpeg],
            "UP.CLS": b"1",
            "none.txt": b"only text",
            "cat.png": contents[png[0]],
            "cat.cls": b"cat",
            png[1]: contents[png[1]],
            png[1].replace(".png", ".cls"): b"2",
        },
    )
    whole = write_tar(tmp_path / "1.tar", {name: contents[name] for name in png[2:]}).read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[: 512 + -(-len(contents[png[2]]) // 512) * 512 + 600])  # in the second file
    assert purify(tmp_path / "0.tar", tmp_path / "1.tar", "--out", tmp_path / "o", *SEED, *RAY) == 1
    assert last_line(capsys) == "3 purified, 0 there already, 3 failed"
    found = results_of(tmp_path / "o")
    assert sorted(found) == sorted(["UP.JPG", png[1], png[2]])
    assert {name: found[name] for name in png[1:3]} == {name: expected[name] for name in png[1:3]}
    reasons = dict(failures(tmp_path / "o")[1:])
    assert reasons["none"] == "none: it has no image, only txt"
    assert reasons["cat.png"] == "cat.png: its cls is not an integer of 64 bits: b'cat'"
    assert reasons["1.tar"].startswith("1.tar: it can't be read to its end, and the rest is missing: ")


def test_the_parts_of_samples(tmp_path: Path) -> None:
    members = {"d.1/a.b.JPG": b"i", "d.1/a.json": b"{}", "d.1/a.bin": b"\xff", "b.txt": b"\xff", "b.png": b"p", "b.PNG": b"q"}
    with (write_tar(tmp_path / "0.tar", {"_": b"no suffix", **members})).open("rb") as stream:
        (table,) = shards.WebDatasetSource([str(tmp_path / "0.tar")])._read_stream(stream, "x/0.tar")
    assert table.to_pylist() == [
        {"name": "d.1/a", "image": None, "read_error": "it has no image, only b.JPG, json, bin"}
        | {"b.jpg": b"i", "json": "{}", "bin": b"\xff", "txt": None, "png": None},
        {"name": "b.png", "image": b"p", "read_error": "its txt is not UTF-8: b'\\xff'"}
        | {"b.jpg": None, "json": None, "bin": None, "txt": None, "png": b"q"},
    ]


# killed


def written(out: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each result: one that is written again has others."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.glob("[0-9p]*.p*") if path.is_file()}


class KilledOnce(cluster_purify.PartWorker):
    """Is killed at one of the images, the first time, and leaves a list of what is there by then."""

    def make(self, batch: Sequence[sources.Job]) -> list[worker.PurifyOutcome]:
        mark = self.plan.out.parent / "killed"
        if any(job.name == "04.png" for job in batch) and not mark.exists():
            mark.write_text(json.dumps(written(self.plan.out)))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().make(batch)


@pytest.mark.parametrize("rows", [3, 1])
def test_a_killed_worker_is_restarted_without_loss_or_duplicates(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(9):
        save(tmp_path / "in" / f"{i:02d}.png", seed=i)
    assert purify(tmp_path / "in", "--out", tmp_path / "expected", *SEED) == 0
    monkeypatch.setattr(cluster_purify, "PartWorker", KilledOnce)
    assert purify(tmp_path / "in", "--out", tmp_path / "o", "--rows", str(rows), *SEED, *RAY) == 0
    assert last_line(capsys) == "9 purified, 0 there already, 0 failed"
    assert tree(tmp_path / "o") == tree(tmp_path / "expected")  # nothing half written is left either
    early = {name: tuple(mark) for name, mark in json.loads((tmp_path / "killed").read_text()).items()}
    assert "03.png" in early or rows == 1  # of the same part
    assert early.items() <= written(tmp_path / "o").items()


KILLED_DRIVER = """
import os, signal, sys
from oag_transform.apps import cli, cluster_purify
run = cluster_purify.run

def killed(*given):
    for number, outcomes in enumerate(run(*given)):
        yield outcomes
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)

cluster_purify.run = killed
cli.main(sys.argv[1:])
"""


def test_a_killed_driver_is_resumed_without_loss_or_duplicates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = 24
    for i in range(count):
        save(tmp_path / "in" / f"{i:02d}.png", seed=i)
    assert purify(tmp_path / "in", "--out", tmp_path / "expected", *SEED) == 0
    capsys.readouterr()
    out = tmp_path / "o"
    arguments = ["purify", str(tmp_path / "in"), "--out", str(out), "--rows", "2", "--format", "parquet", *FAST, *SEED, *RAY]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    done = subprocess.run([sys.executable, "-c", KILLED_DRIVER, *arguments], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    kept = written(out)
    assert len(kept) >= 3
    assert main([*arguments, "--skip-existing"]) == 0
    # its workers may have ended what they had begun, before or after the second driver looked
    purified, there = (int(number) for number in re.findall(r"(\d+) (?:purified|there)", last_line(capsys)))
    assert there >= 2 * len(kept)
    assert purified == count - there
    assert kept.items() <= written(out).items()
    assert images_in(out) == tree(tmp_path / "expected")


class Deadly(cluster_purify.PartWorker):
    """Ends as the kernel ends one that takes too much memory, for one of the images."""

    def make(self, batch: Sequence[sources.Job]) -> list[worker.PurifyOutcome]:
        if any(job.name == "2.png" for job in batch):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().make(batch)


def test_an_image_that_takes_its_worker_along_is_a_failure_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(5):
        save(tmp_path / "in" / f"{i}.png")
    monkeypatch.setattr(cluster_purify, "PartWorker", Deadly)
    assert purify(tmp_path / "in", "--out", tmp_path / "o", "--rows", "5", "--batch-size", "5", *RAY) == 1
    assert capsys.readouterr().err == f"{tmp_path}/in/2.png: {cluster_purify.ENDED_WORKER}\n"
    assert sorted(results_of(tmp_path / "o")) == ["0.png", "1.png", "3.png", "4.png"]


def test_parquet_files_in_the_folder_of_results_are_read_only_to_go_on_with(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o"
    out.mkdir()
    pq.write_table(pa.table({"x": [1]}), out / "part-a.parquet")
    assert purify(folder, "--out", out, *SEED, *RAY) == 1  # for the broken files of the folder
    assert results_of(out)
    capsys.readouterr()
    assert purify(folder, "--out", out, "--format", "parquet", "--skip-existing", *SEED, *RAY) == 2
    assert f"{out}/part-a.parquet, which has no readable names in column 'name'" in capsys.readouterr().err


# refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "3"], "--rows needs --engine ray"),
        (["--address", "auto"], "--address needs --engine ray"),
        (["--format", "parquet"], "--format parquet needs --engine ray"),
        (["--engine", "ray", "--format", "parquet", "--overwrite"], "--overwrite doesn't go with --format parquet"),
        (["--engine", "ray", "--device", "cuda:1"], "--device must be cpu or cuda with --engine ray"),
        (["--engine", "ray", "--jobs", "1000"], "--jobs must be at most 2"),
        (["--engine", "ray", "--rows", "0"], "--rows must be at least 1, got 0"),
        (["--engine", "ray", "--name-column", "x"], "are for parquet files"),
        (["--engine", "ray", "--network-steps", "0"], "network_steps must be an integer >= 1, got 0"),
    ],
)
def test_incompatible_options_are_refused(
    arguments: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["purify", str(folder), "--out", str(tmp_path / "o"), *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_sources_without_required_columns(parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"picture": [b""], "label": [1]}), tmp_path / "a.parquet")
    for more, message in (
        ([], "has no column 'image': give --image-column, one of picture, label"),
        (["--image-column", "picture"], "has no column of names"),
    ):
        assert main(["purify", str(tmp_path / "a.parquet"), "--out", str(tmp_path / "o"), "--engine", "ray", *more]) == 2
        assert message in capsys.readouterr().err
    save(parquet.parent / "mixed" / "a.png")
    (parquet.parent / "mixed" / "a.parquet").touch()
    assert main(["purify", str(parquet.parent / "mixed"), "--out", str(tmp_path / "o"), "--engine", "ray"]) == 2
    assert "got .parquet, .png" in capsys.readouterr().err


# for one's own pipeline


def test_purify_in_a_pipeline_of_files(folder: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    purified = dataset.read_images(folder).map_batches(
        dataset.Purify,
        fn_constructor_kwargs={"seed": 1, "network_steps": 1},
        batch_size=4,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    assert dataset.write_images(purified, tmp_path / "o") == 9
    assert tree(tmp_path / "o") == expected


@pytest.mark.parametrize("sizes", [[(33, 28)], SIZES])
def test_purify_takes_arrays_of_any_sizes(sizes: list[tuple[int, int]], tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{i}.png", size=size, seed=i) for i, size in zip(range(4), itertools.cycle(sizes))]
    arrays = [np.asarray(read(path)) for path in paths]
    labels = np.arange(4)
    batch = {"image": dataset.column(arrays), "name": np.array([path.name for path in paths]), "label": labels}
    found = dataset.Purify(seed=1, network_steps=1)(batch)
    assert found["label"] is labels
    transform = OnlineAlternateGenerator(seed=1, network_steps=1)
    for path, image in zip(paths, found["image"], strict=True):
        assert np.array_equal(image, np.asarray(transform(read(path), index=index_of(path.name))))


def batch_of(names: list[Any], images: list[Any], **columns: Any) -> dict[str, Any]:
    return {"name": dataset.column(names), "image": dataset.column(images)} | columns


def test_missing_and_broken_files_have_an_error_and_the_others_are_purified(folder: Path, expected: dict[str, bytes]) -> None:
    purifier = dataset.Purify(seed=1, network_steps=1, error="why")
    good = (folder / "a/0.png").read_bytes()
    batch = batch_of(["a/0.png", "null.png", None, "bad.png", "unread.png"], [good, None, good, b"x", None])
    own = np.array(["mine"] * 5)
    reasons = dataset.column([None, None, None, None, "Permission denied"])
    found = purifier(batch | {"error": own, "read_error": reasons})
    assert sorted(found) == ["error", "image", "name", "why"]
    assert found["error"] is own
    assert list(found["image"]) == [expected["a/0.png"], b"", b"", b"", b""]
    assert list(found["why"]) == [
        "",
        "null.png: it has no image",
        "row 2 of a part: it has no name",
        "bad.png is not an image that can be read: its format is none that Pillow knows",
        "unread.png: Permission denied",
    ]
    assert list(purifier(batch_of(["a.png"], [None]))["why"]) == ["a.png: it has no image"]


def test_structures_stay_structures(folder: Path, expected: dict[str, bytes]) -> None:
    file = {"bytes": (folder / "a/0.png").read_bytes(), "path": "p"}
    found = dataset.Purify(seed=1, network_steps=1)(batch_of(["a/0.png", "b.png"], [file, None]))
    assert list(found["image"]) == [{"bytes": expected["a/0.png"], "path": "p"}, {"bytes": b""}]
    assert list(found["error"]) == ["", "b.png: it has no image"]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (batch_of(["a"], ["text"]), "expected whole files or arrays of uint8 in column 'image', got str"),
        (batch_of(["a"], [np.zeros((9, 9, 3), np.float32)]), "in column 'image', got array of float32"),
        (batch_of(["a"], [np.zeros((3, 9, 9), np.uint8)]), r"a: expected an array \(H, W\).*, got \(3, 9, 9\)"),
        (batch_of(["a"], [np.zeros((1, 9), np.uint8)]), "a: expected height and width of at least 2 pixels, got 1 x 9"),
        (batch_of([None], [np.zeros((9, 9), np.uint8)]), "an image has no name in column 'name'"),
        (batch_of(["a"], [b""], error=np.array(["mine"])), "has a column 'error' already: give error=, the name of a new one"),
        ({"image": np.array([b""])}, "there is no column 'name': give name=, one of image"),
    ],
)
def test_columns_that_cannot_be_used_are_named(batch: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        dataset.Purify(seed=1, network_steps=1)(batch)


def test_names_may_be_bytes_numbers_or_missing(folder: Path, expected: dict[str, bytes]) -> None:
    name = next(iter(expected))
    names = dataset.column([name.encode(), name, 7, float("nan")])
    image = (folder / name).read_bytes()
    made = dataset.Purify(seed=1, network_steps=1)({"image": dataset.column([image] * 4), "name": names})
    assert made["image"][0] == made["image"][1] == expected[name]
    assert list(made["error"]) == ["", "", "", "row 3 of a part: it has no name"]


def test_files_of_any_name_are_read_and_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["q?x.png", "100%.png", "p%20q.png", "h#1.png", "B.PNG", "sub dir/ü.jpeg", "linked/l.png"]
    for name in names[:-1]:
        save(tmp_path / "in" / name)
    save(tmp_path / "elsewhere" / "l.png")
    (tmp_path / "in" / "linked").symlink_to("../elsewhere")
    save(tmp_path / "in" / ".hidden.png")
    os.mkfifo(tmp_path / "in" / "pipe.png")
    images = dataset.read_images(tmp_path / "in")
    assert sorted(row["name"] for row in images.take_all()) == sorted(names)
    assert "pipe.png: it is a pipe, a socket or a device" in caplog.text
    (tmp_path / "in" / "B.PNG").unlink()  # after it was listed
    rows = [*images.take_all(), {"name": "../out.png", "image": b"x", "read_error": None}]
    assert [row["read_error"] for row in rows if row["name"] == "B.PNG"] == ["No such file or directory"]
    assert dataset.write_images(ray.data.from_arrow(pa.Table.from_pylist(rows)), tmp_path / "o") == len(names) - 1
    assert sorted(tree(tmp_path / "o")) == sorted({*names} - {"B.PNG"})
    assert "B.PNG: skipped, No such file or directory" in caplog.text
    assert "../out.png: skipped, '../out.png' is not a path within a folder" in caplog.text
    with pytest.raises(ValueError, match="no image in"):
        dataset.read_images(tmp_path / "nothing")


# evaluate


def test_an_evaluation_is_the_same_in_every_string(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_images(tmp_path / "images")
    found = []
    for name, engine in (("local", []), ("ray", ["--engine", "ray"])):
        out = tmp_path / name
        arguments = ["--model", "tests.tiny:brightness", "--other", "tests.tiny:left_half", "--data", str(images)]
        sizes = ["--resize", "40", "--crop", "40", "--count", "6", "--slow-count", "2", "--batch-size", "2"]
        chosen = ["--attacks", "fgsm", "igsm", "--defenses", "oag", "jpeg"]
        assert main(["evaluate", "table1", "table2", "table3", *arguments, *sizes, *chosen, "--out", str(out), *engine]) == 0
        found.append({path.name: results.read(path) for path in sorted(out.glob("table*.json"))})
    assert len(found[0]) == 3
    for name, one in found[0].items():
        other = found[1][name]
        assert [(row.name, row.cells, row.error, row.code) for row in one.rows] == [
            (row.name, row.cells, row.error, row.code) for row in other.rows
        ]
        assert one.caption == other.caption
        assert {**one.facts, "command": ""} == {**other.facts, "command": ""}
    stored = [{path.parent.name for path in (tmp_path / n / "cache").glob("*/key.json")} for n in ("local", "ray")]
    assert stored[0] == stored[1]
    assert len(stored[0]) > 3


def test_errors_of_workers_arrive_unchanged(tmp_path: Path) -> None:
    def compute(rows: range) -> Any:
        if rows.start == 2:
            raise ZeroDivisionError("in row 2")
        return np.array(rows)

    store = ClusterStore(tmp_path, chunk=2)
    with pytest.raises(ZeroDivisionError, match=r"^in row 2$"):
        store.rows({"a": 1}, [torch.arange(6)], compute)
    assert len(list(tmp_path.rglob("*.npz"))) == 1  # what was done before is kept
    assert store.rows({"a": 1}, [torch.arange(2)], compute).tolist() == [0, 1]


def test_parts_are_found_by_their_names_in_order(tmp_path: Path) -> None:
    pq.write_table(pa.table({"name": ["b", "a"]}), tmp_path / "part-0.parquet")
    assert shards.names_in(tmp_path, None).tolist() == sorted(map(index_of, "ab"))


def test_parts_with_the_names_of_columns_and_numbers_beyond_64_bits() -> None:
    row = shards._row("a", [("png", b"p"), ("name", b"n"), ("image", b"i"), ("cls", b"9" * 20), ("index", b"-7")])
    assert row["read_error"] == "its cls is not an integer of 64 bits: b'99999999999999999999'"
    assert {key: row[key] for key in ("name", "image", "name_", "image_", "cls", "index")} == {
        "name": "a.png", "image": b"p", "name_": b"n", "image_": b"i", "cls": None, "index": -7,
    }  # fmt: skip
    shards._table([row])


def test_two_rows_with_one_result_file_are_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = (folder / "a" / "0.png").read_bytes()
    names = ["a.gif", "a.png", "v1.0", "v1.1"]
    pq.write_table(pa.Table.from_pylist([{"image": content, "name": name} for name in names]), tmp_path / "a.parquet")
    assert purify(tmp_path / "a.parquet", "--out", tmp_path / "o", "--format", "png", "--rows", "4", *SEED, *RAY) == 1
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == "3 purified, 0 there already, 1 failed"
    assert "another image has the same result file" in said.err
    assert set(tree(tmp_path / "o")) == {"a.png", "v1.0.png", "v1.1.png", "_failures.csv"}


def test_a_blocked_result_folder_does_not_hide_the_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "in" / "1.png")
    save(tmp_path / "in" / "a" / "0.png")
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "a").touch()
    assert purify(tmp_path / "in", "--out", tmp_path / "o", *SEED, *RAY) == 1
    assert last_line(capsys) == "1 purified, 0 there already, 1 failed"
    assert [Path(name).name for name, _ in failures(tmp_path / "o")[1:]] == ["0.png"]


def test_rows_that_cannot_be_written_are_skipped_and_files_of_several_rows_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    deep = "/".join("x" * 2000) + "/0.png"  # pathlib makes parents by recursion
    names = [f"{'x' * 300}.png", deep, "a.png", "a.png", "b.png"]
    rows = pa.Table.from_pylist([{"name": name, "image": b"i"} for name in names])
    assert dataset.write_images(ray.data.from_arrow(rows), tmp_path / "o") == 2
    assert sorted(tree(tmp_path / "o")) == ["a.png", "b.png"]
    assert ".png: skipped, [Errno 36] File name too long" in caplog.text
    assert "a.png: written by 2 rows" in caplog.text


def test_a_cluster_without_room_is_refused_before_any_task(monkeypatch: pytest.MonkeyPatch) -> None:
    small = cluster.ClusterResources(cpus=0, node=1, largest=1, gpus=0)
    plan = worker.PurifyPlan(arguments=(), out=Path("o"))
    with pytest.raises(ValueError, match="the cluster has no processor for a worker"):
        next(cluster_purify.run(plan, [], small, None, None))
    monkeypatch.setattr(cluster, "connected", lambda *_: contextlib.nullcontext(small))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(ValueError, match=r"threads, 2, and the largest node .* has 1; set OMP_NUM_THREADS=1"):  # noqa: SIM117
        with connected(None):
            pass


def test_an_empty_address_is_none_and_that_of_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[dict[str, Any]]()

    def init(**arguments: Any) -> None:
        asked.append(arguments)
        if arguments["address"] != "local":
            raise ConnectionError("nobody there")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_ADDRESS", "")
    cluster._connect(None, 2)
    assert asked[0]["num_cpus"] == 3
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ConnectionError, match=r"no Ray cluster at 10\.0\.0\.1:6379: nobody there"):
        cluster._connect(None, 2)
