"""``--engine ray`` and the callable class: whatever is killed and however data is cut, results are those of one process."""

import csv
import io
import itertools
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ray = pytest.importorskip("ray")
pytest.importorskip("pyarrow")

import pyarrow as pa  # noqa: E402  # after what skips
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402

from oag_transform import OnlineAlternateGenerator  # noqa: E402
from oag_transform.apps import cluster, cluster_purify, dataset  # noqa: E402
from oag_transform.apps.cli import main  # noqa: E402
from oag_transform.apps.cluster_store import ClusterStore  # noqa: E402
from oag_transform.evaluation import results  # noqa: E402
from oag_transform.streams import index_of  # noqa: E402
from tests.test_purify import POSIX, purify, read, save, tree  # noqa: E402
from tests.tiny import write_photographs  # noqa: E402

pytestmark = [pytest.mark.ray, POSIX]
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
def expected(folder: Path) -> dict[str, bytes]:
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


def test_parquet_keeps_labels_and_goes_on_with_what_is_not_there(
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
    assert said.err.count("is no path within a folder") == 3


def test_webdataset_keeps_labels_and_gives_the_same_images(expected: dict[str, bytes], folder: Path, tmp_path: Path) -> None:
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as shard:
            for label, name in list(enumerate(sorted(expected)))[number::2]:
                key = name.rpartition(".")[0]
                parts = {name: (folder / name).read_bytes(), f"{key}.cls": b"%d" % label, f"{key}.txt": b"flower"}
                for member, content in parts.items():
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    shard.addfile(info, io.BytesIO(content))
    shards = sorted(tmp_path.glob("*.tar"))
    assert purify(*shards, "--out", tmp_path / "o", "--format", "parquet", "--rows", "3", *SEED, *RAY) == 0
    found = rows_in(tmp_path / "o")
    assert {name: row["image"] for name, row in found.items()} == expected
    assert {name: (row["cls"], row["txt"]) for name, row in found.items()} == {
        name: (label, "flower") for label, name in enumerate(sorted(expected))
    }


# killed


def many(root: Path, count: int = 24) -> dict[str, bytes]:
    for i in range(count):
        save(root / "in" / f"{i:02d}.png", size=(160, 120), seed=i)
    assert main(["purify", str(root / "in"), "--out", str(root / "expected"), *SEED]) == 0
    return tree(root / "expected")


def written(out: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each result: one that is written again has others."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.glob("[0-9p]*.p*") if path.is_file()}


def wait_for(out: Path, count: int, process: "subprocess.Popen[bytes] | None" = None) -> None:
    end = time.monotonic() + 60
    while len(written(out)) < count:
        assert time.monotonic() < end
        assert process is None or process.poll() is None
        time.sleep(0.01)


def workers() -> list[int]:
    """Process ids of the actors that purify, by the names that Ray gives them."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            title = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::") and b"Worker" in title and b"MapWorker" in title:
            found.append(int(path.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds workers in /proc")
def test_a_worker_that_is_killed_is_started_again_and_nothing_is_lost_or_done_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = many(tmp_path)
    capsys.readouterr()
    out, killed, early = tmp_path / "o", [], {}

    def kill() -> None:
        wait_for(out, 5)
        early.update(written(out))
        killed.extend(workers()[:1])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    status = main(["purify", str(tmp_path / "in"), "--out", str(out), "--rows", "3", *SEED, *RAY])
    killer.join()
    assert killed
    assert status == 0
    assert last_line(capsys) == "24 purified, 0 there already, 0 failed"
    assert tree(out) == expected  # nothing half written is left either
    assert early.items() <= written(out).items()


def test_a_driver_that_is_killed_is_resumed_and_nothing_is_lost_or_done_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = many(tmp_path)
    capsys.readouterr()
    out = tmp_path / "o"
    arguments = ["purify", str(tmp_path / "in"), "--out", str(out), "--rows", "2", "--format", "parquet", *SEED, *RAY]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-m", "oag_transform", *arguments]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for(out, 3, process)
        process.kill()
    time.sleep(1)  # what a worker has begun it may finish
    kept = written(out)
    assert 0 < 2 * len(kept) < len(expected)
    assert main([*arguments, "--skip-existing"]) == 0
    assert last_line(capsys) == f"{24 - 2 * len(kept)} purified, {2 * len(kept)} there already, 0 failed"
    assert kept.items() <= written(out).items()
    assert images_in(out) == expected


class Deadly(cluster_purify.Worker):
    """Ends as the kernel ends one that takes too much memory, for one of the images."""

    def make(self, rows: Any, jobs: Any, contents: Any) -> Any:
        if any(jobs[row].name == "2.png" for row in rows):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().make(rows, jobs, contents)


def test_an_image_that_takes_its_worker_along_is_a_failure_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(5):
        save(tmp_path / "in" / f"{i}.png")
    monkeypatch.setattr(cluster_purify, "Worker", Deadly)
    assert purify(tmp_path / "in", "--out", tmp_path / "o", "--rows", "5", "--batch-size", "5", *RAY) == 1
    assert capsys.readouterr().err == f"{tmp_path}/in/2.png: {cluster_purify.TOOK_WORKER}\n"
    assert sorted(results_of(tmp_path / "o")) == ["0.png", "1.png", "3.png", "4.png"]


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
        (["--engine", "ray", "--rows", "0"], "rows must be an integer >= 1, got 0"),
        (["--engine", "ray", "--name-column", "x"], "are for parquet files"),
        (["--engine", "ray", "--network-steps", "0"], "network_steps must be an integer >= 1, got 0"),
    ],
)
def test_what_does_not_go_together_is_refused(
    arguments: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["purify", str(folder), "--out", str(tmp_path / "o"), *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_sources_that_do_not_say_what_is_needed(parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
        dataset.Purify, fn_constructor_kwargs={"seed": 1, "network_steps": 1}, batch_size=4, num_cpus=1, concurrency=1
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


def test_a_column_that_is_no_image_is_named() -> None:
    purifier = dataset.Purify(seed=1, network_steps=1)
    with pytest.raises(TypeError, match="whole files or arrays of uint8 in column 'image'"):
        purifier({"name": np.array(["a"]), "image": np.array(["text"], dtype=object)})


# evaluate


def test_an_evaluation_is_the_same_in_every_string(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photographs = write_photographs(tmp_path / "photographs")
    found = []
    for name, engine in (("local", []), ("ray", ["--engine", "ray"])):
        out = tmp_path / name
        arguments = ["--model", "tests.tiny:brightness", "--other", "tests.tiny:left_half", "--data", str(photographs)]
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


def test_what_a_worker_raises_arrives_as_it_was(tmp_path: Path) -> None:
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
    assert cluster_purify.names_in(tmp_path, None).tolist() == sorted(map(index_of, "ab"))
