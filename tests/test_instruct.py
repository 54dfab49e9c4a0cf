"""Mantis-Instruct from a hub on loopback: whole or not used, however often the download is killed; and trained on."""

import json
import os
import pickle
import shutil
import stat
import subprocess
import time
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_hub import COMMIT, FakeHub
from helpers import by_size, recipe
from instruct import COMMAND, ROWS, VAL, environment, images_of, jpeg, parquet, publish, row, zipped
from typer.testing import CliRunner

from mantis_lite.cli import app
from mantis_lite.data import hub as hub_module
from mantis_lite.data.hub import PART, fetch, find
from mantis_lite.data.media import open_image, size
from mantis_lite.data.prepare import prepare
from mantis_lite.data.repository import INSTRUCT, NAME, place_of, read_repository
from mantis_lite.data.source import open_source
from mantis_lite.errors import DataError, DiskError, SampleError
from mantis_lite.recipe import DataRecipe, PackingRecipe, SourceRecipe

SHORT = "mantis-instruct"
OFF = PackingRecipe(enabled=False)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with a small Mantis-Instruct, which this process takes for the real one."""
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    publish(tmp_path / "hub")
    with FakeHub(tmp_path / "hub") as hub:
        monkeypatch.setattr(f"{constants}.ENDPOINT", hub.url)
        monkeypatch.setattr(
            f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        yield hub


@pytest.fixture(autouse=True)
def datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf-datasets"))
    datasets.disable_progress_bars()


def published(hub) -> Path:
    return hub.folder / "datasets" / INSTRUCT


def download(*words, **settings) -> list[str]:
    return fetch(find(SHORT, *words, **settings))


def gets(hub) -> list[str]:
    """The files that were asked for, without their commit."""
    return [request.partition("/resolve/")[2].partition("/")[2] for request in hub.requests if "/resolve/" in request]


def opened(name: str, **settings):
    return open_source(SourceRecipe(path=SHORT, name=name, **settings))


def same_files(hub, folder: Path, names: list[str]) -> bool:
    return all((folder / name).read_bytes() == (published(hub) / name).read_bytes() for name in names)


# Downloading.


def test_all_of_it(hub):
    wanted = find(SHORT)
    assert list(wanted.subsets) == sorted(ROWS) and len(wanted.names) == 10
    assert wanted.size == sum((published(hub) / name).stat().st_size for name in wanted.names)
    told = []
    came = fetch(wanted, watch=told.append)
    assert sorted(came) == sorted(gets(hub)) == sorted(wanted.names) and sum(told) == wanted.size
    folder = place_of(INSTRUCT)
    assert same_files(hub, folder, wanted.names) and not list(folder.rglob(f"*{PART}"))
    held = read_repository(folder)
    assert held.revision == COMMIT and held.has("nlvr2", "train") and not held.has("nlvr2", "val")
    before = len(hub.requests)
    assert download() == [] and len(hub.requests) == before  # nothing is asked of the hub
    assert sorted(download(splits=("train", "val"), subsets=["nlvr2"])) == [
        "nlvr2/val-00000-of-00001.parquet",
        "nlvr2/val_images.zip",
    ]


def test_some_of_it_under_an_old_name(hub):
    wanted = find(SHORT, ["llava_665k_merged"])
    assert wanted.notices == [f"{INSTRUCT}: llava_665k_merged is called llava_665k_multi now"]
    assert {name.split("/")[0] for name in fetch(wanted)} == {"llava_665k_multi"}


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"subsets": ["iconqua"]}, r"no subset iconqua; did you mean iconqa\?\n  There are: iconqa, llava"),
        ({"subsets": []}, "no subset to download\n  There are: iconqa"),
        ({"subsets": ["iconqa"], "splits": ["val"]}, "iconqa has no split val\n  There are: train"),
        ({"splits": ["dev"]}, "no subset to download"),
        ({"revision": "v9"}, "has no such revision\n  Leave --revision out"),
    ],
)
def test_what_is_not_there(hub, settings, found):
    with pytest.raises(DataError, match=f"^{INSTRUCT}: {found}"):
        find(SHORT, **settings)


def test_names_and_answers(hub, monkeypatch):
    with pytest.raises(DataError, match=r"a: is no dataset's name\n  Write user/name, or mantis-instruct"):
        find("a")
    with pytest.raises(DataError, match=r"ann/none: no such dataset on the hub, or none for you\n  .*`hf auth login`"):
        find("ann/none")
    hub.failing["/tree/"] = 403
    with pytest.raises(DataError, match=r"the hub answers 403: .*\n  Log in with `hf auth login`"):
        find(SHORT)
    hub.failing = {"train_images.zip": 418}
    with pytest.raises(DataError, match=r"the hub answers 418: .*\n  Run the same command again"):
        download(["iconqa"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"the hub cannot be reached: .*\n  Run the same command again"):
        find("ann/none")


def test_any_dataset_of_the_layout(hub, tmp_path):
    shutil.copytree(published(hub), hub.folder / "datasets/ann/mine")
    (hub.folder / "datasets/ann/mine/nlvr2").rename(hub.folder / "datasets/ann/mine/pairs")
    fetch(find("ann/mine", ["pairs"]))
    rows = open_source(SourceRecipe(path="ann/mine:pairs"))
    assert rows.name == "ann/mine:pairs:train" and len(rows.sample(0).images) == 2


def test_a_folder_of_the_users_own_is_remembered(hub, tmp_path):
    folder = tmp_path / "elsewhere"
    download(["iconqa"], to=folder)
    assert place_of(INSTRUCT).resolve() == folder.resolve()
    by_name, by_path = opened("iconqa"), open_source(SourceRecipe(path=str(folder), name="iconqa"))
    assert by_name.name == by_path.name == f"{INSTRUCT}:iconqa:train"
    assert [by_name.row(i) for i in range(9)] == [by_path.row(i) for i in range(9)]
    assert download(["iconqa"]) == []  # to the same
    download(["nlvr2"], to=tmp_path / "other")  # the last is
    assert place_of(INSTRUCT).resolve() == tmp_path / "other"
    with pytest.raises(DataError, match=f"{folder}: holds {INSTRUCT}\n  Name another folder with --to"):
        find("ann/mine", to=folder)


def test_a_connection_that_breaks_off_goes_on(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.cut["iconqa/train_images.zip"] = 1000
    download(["iconqa"])
    assert same_files(hub, place_of(INSTRUCT), ["iconqa/train_images.zip"])
    assert gets(hub).count("iconqa/train_images.zip") == 2


def test_a_wrong_byte_is_found(hub):
    name = "iconqa/train_images.zip"
    hub.wrong[name] = 500
    with pytest.raises(DataError, match=f"{name} is not what the hub says it is: its bytes have another hash"):
        download(["iconqa"])
    assert not (place_of(INSTRUCT) / name).exists() and not list(place_of(INSTRUCT).rglob(f"*zip{PART}"))
    with pytest.raises(
        DataError, match=f"not all of it is in .*: iconqa\n  Download it: mantis-lite data download {SHORT}"
    ):
        opened("iconqa")
    hub.wrong.clear()
    assert name in download(["iconqa"])


def test_half_a_file_with_a_wrong_byte_is_fetched_anew(hub):
    name = "iconqa/train_images.zip"
    part = place_of(INSTRUCT) / (name + PART)
    part.parent.mkdir(parents=True)
    part.write_bytes(b"\0" * 700)
    told = []
    wanted = find(SHORT, ["iconqa"])
    fetch(wanted, watch=told.append)
    assert same_files(hub, place_of(INSTRUCT), [name]) and sum(told) == wanted.size
    assert gets(hub).count(name) == 2


def test_what_changes_here_is_found(hub):
    download(["iconqa"])
    file = place_of(INSTRUCT) / "iconqa/train_images.zip"
    whole, described = file.read_bytes(), file.stat()
    file.write_bytes(whole[:500] + b"!" + whole[501:])
    assert download(["iconqa"]) == ["iconqa/train_images.zip"] and file.read_bytes() == whole
    described = file.stat()
    file.write_bytes(whole[:500] + b"!" + whole[501:])
    os.utime(file, ns=(described.st_atime_ns, described.st_mtime_ns))  # as a disk that rots
    assert download(["iconqa"]) == []
    assert fetch(find(SHORT, ["iconqa"]), anew=True) == ["iconqa/train_images.zip"] and file.read_bytes() == whole
    os.utime(file, (1, 1))  # copied, say: it is read once, and not fetched
    assert download(["iconqa"]) == []


def test_a_commit_is_kept_to(hub, tmp_path):
    """main moves between two runs: what comes later is of the commit that the folder began with."""
    hub.frozen[COMMIT] = Path(shutil.copytree(published(hub), tmp_path / "first"))
    download(["nlvr2"])
    parquet(published(hub) / "iconqa/train-00000-of-00001.parquet", [row("iconqa", 77)])
    hub.history(published(hub)).append("f" * 40)
    download(["iconqa"])
    assert len(opened("iconqa")) == len(ROWS["iconqa"])
    with pytest.raises(DataError, match=f"holds {INSTRUCT} as of {COMMIT}, and main is ffff.*\n  Name another folder"):
        find(SHORT, revision="main")
    fetch(find(SHORT, ["iconqa"], tmp_path / "new", revision="main"))
    assert len(open_source(SourceRecipe(path=str(tmp_path / "new"), name="iconqa"))) == 1
    with pytest.raises(DataError, match=f"revision=main2 is not {'f' * 40}, of which"):
        open_source(SourceRecipe(path=str(tmp_path / "new"), name="iconqa", revision="main2"))


def test_a_full_disk(hub, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(
            DiskError, match=r"0.0 GB are yet to come, and 0.0 GB are free\n  .*--to, .*: iconqa 0.0 GB"
        ):
            download(["iconqa"])
    assert not gets(hub)

    def full(*_):
        raise OSError(28, "No space left on device", "x.zip")

    with monkeypatch.context() as patch:
        patch.setattr(hub_module, "sync", full)
        with pytest.raises(DiskError, match=r"x.zip: No space left on device\n  Free some, or name another folder"):
            download(["iconqa"])
    assert download(["iconqa"])


def test_one_at_a_time(hub):
    hub.piece, hub.pause = 500, 0.05
    words = [*COMMAND, SHORT, "--subsets", "iconqa"]
    other = subprocess.Popen(words, env=environment(hub.url, hub.folder.parent), stdout=subprocess.DEVNULL)
    cache = hub.folder.parent / "cache/datasets/TIGER-Lab--Mantis-Instruct"
    while not list(cache.rglob(f"*zip{PART}")):
        time.sleep(0.02)
    with pytest.raises(DataError, match="another process downloads to it\n  Let it finish"):
        download(["iconqa"], to=cache)
    assert other.wait() == 0


@pytest.mark.parametrize("name", ["../up.parquet", "a/../../up.zip", "/etc/x.zip", "a\\b.zip"])
def test_names_that_lead_out(hub, monkeypatch, name):
    from huggingface_hub.hf_api import RepoFile

    listed = [RepoFile(path=name, size=1, oid="0" * 40)]
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_tree", lambda *_, **__: listed)
    with pytest.raises(DataError, match="leads out of the archive\n  Ask its owner to rename it"):
        find(SHORT)


def test_what_a_folder_says_of_itself_may_be_broken(hub):
    download(["iconqa"])
    for text in ("{", "[]", '{"repo": "a/b", "revision": "c", "files": {"x": 1}}'):
        (place_of(INSTRUCT) / NAME).write_text(text)
        with pytest.raises(DataError, match=f"{NAME}: cannot be read: .*\n  Take it away, and download it again"):
            opened("iconqa")


KILLED_AFTER = [-1, 0, 1, 1, 11, 1, 0, 1, 11, 0]
"""MB that came with a run; -1: before it asks for anything. The client writes 10 MiB of a file at a time."""


@pytest.mark.slow
def test_killed_ten_times(hub, tmp_path):
    """By SIGKILL, from before the first request to the last file: each run goes on where the one before had come to."""
    random = np.random.default_rng(0)
    for name in ("iconqa/train_images", "nlvr2/train_images", "llava_665k_multi/train_images_part0"):
        with zipfile.ZipFile(published(hub) / f"{name}.zip", "a") as file:
            file.writestr("more.bin", random.bytes(50_000_000))
    names = find(SHORT).names
    total, cache = sum((published(hub) / name).stat().st_size for name in names), tmp_path / "cache"
    folder = cache / "datasets/TIGER-Lab--Mantis-Instruct"
    hub.piece, hub.pause = 500_000, 0.002
    words, own = [*COMMAND, SHORT, "--max-workers", "2"], environment(hub.url, tmp_path)
    held = [0]
    for megabytes in KILLED_AFTER:
        requests = len(hub.requests)
        process = subprocess.Popen(words, env=own, stdout=subprocess.DEVNULL)
        while megabytes >= 0 and (len(hub.requests) == requests or bytes_in(folder) - held[-1] < megabytes * 1e6):
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -9
        held.append(bytes_in(folder))
        for name in ROWS:
            with whole_or_refused(folder, name):
                open_source(SourceRecipe(path=str(folder), name=name))
    assert held == sorted(held) and len(set(held)) > 6 and held[-1] < total, held
    hub.pause, begun = 0, hub.sent
    done = subprocess.run(words, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert hub.sent - begun == total - held[-1]  # no byte twice
    assert same_files(hub, folder, names) and "10 files are here and verified" in done.stdout
    assert not list(folder.rglob(f"*{PART}"))
    requests = len(hub.requests)
    done = subprocess.run(words, env=own, capture_output=True, text=True)
    assert "10 files are here and verified, 0 of them came now\n" in done.stdout
    assert len(hub.requests) == requests


def bytes_in(folder: Path) -> int:
    """Of files that are here, or on their way."""
    size = 0
    for file in folder.glob("*/*"):
        with suppress(FileNotFoundError):  # it has got its name meanwhile
            size += file.stat().st_size
    return size


@contextmanager
def whole_or_refused(folder: Path, name: str):
    """A subset is read where all of it has come, and else refused, with the command."""
    held = read_repository(folder)
    if held is not None and held.has(name, "train"):
        yield
    else:
        with pytest.raises(DataError, match=r"Download it: mantis-lite data download|no such file or folder"):
            yield


# Reading.


def test_rows_and_pictures_are_those_that_were_published(hub):
    download(splits=("train", "val"))
    sources = {name: opened(name) for name in ROWS} | {"val": opened("nlvr2", split="val")}
    for name, rows in sources.items():
        expected = VAL if name == "val" else ROWS[name]
        assert [rows.row(i) for i in range(len(rows))] == expected
        for i, of in enumerate(expected):
            sample = rows.sample(i)
            assert [image.source.name for image in sample.images] == [image["path"] for image in of["images"] or ()]
            for image in sample.images:
                with image.source.open() as file:
                    assert file.read() == jpeg(image.source.name)
    assert sources["nlvr2"].where(4) == f"{INSTRUCT}:nlvr2:train:5"
    again = pickle.loads(pickle.dumps(sources["nlvr2"]))  # as a DataLoader's worker gets it
    assert again.sample(3) == sources["nlvr2"].sample(3)
    assert {image.source.archive.name for i in range(6) for image in sources["llava_665k_multi"].sample(i).images} == {
        f"train_images_part{at}.zip" for at in range(3)
    }


def test_sources_by_any_name(hub):
    download()
    for path in (SHORT, INSTRUCT, str(place_of(INSTRUCT))):
        found = prepare(DataRecipe(sources=[SourceRecipe(path=path)]), OFF, by_size())
        assert [rows.name for rows in found.train.rows] == [f"{INSTRUCT}:{name}:train" for name in sorted(ROWS)]
        assert len(found.train) == sum(map(len, ROWS.values())) and not found.notices
    assert opened("nlvr2").row(0) == open_source(SourceRecipe(path=f"{SHORT}:nlvr2")).row(0)
    old = DataRecipe(sources=[SourceRecipe(path=INSTRUCT, name="llava_665k_merged", revision="script")])
    assert len(prepare(old, OFF, by_size()).notices) == 2
    with pytest.raises(DataError, match="a dataset of subsets\n  Set name to one of: iconqa, llava_665k_multi, nlvr2"):
        open_source(SourceRecipe(path=SHORT))
    with pytest.raises(DataError, match="name=iconqa, split=None differ from it\n  Write each once"):
        open_source(SourceRecipe(path=f"{SHORT}:nlvr2", name="iconqa"))


def republished(hub, subset: str, rows: list[dict], names: list[str]) -> None:
    parquet(published(hub) / subset / "train-00000-of-00001.parquet", rows)
    zipped(published(hub) / subset / "train_images.zip", names)
    download([subset])


def test_a_picture_that_is_missing(hub):
    """As upstream drops without a word: here the row is named, and counted where it is skipped."""
    rows = [row("iconqa", i, f"pics/{i}.jpg") for i in range(200)]
    republished(hub, "iconqa", rows, [name for name in images_of(rows) if name != "pics/7.jpg"])
    found = rf'{INSTRUCT}:iconqa:train:8 \(id "iconqa_7"\): "images"\[0\] is not in train_images.zip .*pics/7.jpg'
    with pytest.raises(SampleError, match=found):
        opened("iconqa").sample(7)
    source = SourceRecipe(path=SHORT, name="iconqa")
    with pytest.raises(SampleError, match=found):
        prepare(DataRecipe(sources=[source]), OFF, by_size())
    skipped = prepare(DataRecipe(sources=[source], on_bad_row="skip"), OFF, by_size())
    assert len(skipped.train) == 199 and [reject.where for reject in skipped.rejects] == [f"{INSTRUCT}:iconqa:train:8"]


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("pics/0.png", r"is not in train_images.zip \('pics/0.png'\)\n  Did you mean pics/0.jpg\? Mend"),
        ("../pics/0.jpg", "is not in train_images.zip"),
        ("/etc/passwd", "is a path of this machine"),
        ("https://example.com/a.png", "is a link"),
    ],
)
def test_paths_that_are_not_in_the_zip(hub, path, found):
    republished(hub, "iconqa", [row("iconqa", 0, path)], ["pics/0.jpg"])
    with pytest.raises(SampleError, match=found):
        opened("iconqa").sample(0)


def hostile(name: str, content: bytes = b"x", mode: int = 0):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr, info.compress_type = 3, mode << 16, zipfile.ZIP_DEFLATED
    return info, content


@pytest.mark.parametrize(
    ("member", "found"),
    [
        (hostile("../up.jpg"), "leads out of the archive"),
        (hostile("/tmp/up.jpg"), "leads out of the archive"),
        (hostile("pics", b"..", stat.S_IFLNK | 0o777), "is a link or a device"),
        (hostile("bomb.jpg", b"\0" * 3_000_000), "unpacks to more than 100 times its size"),
        (hostile("a.jpg"), "are one file's name"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_hostile_zips(hub, member, found):
    file = published(hub) / "iconqa/train_images.zip"
    with zipfile.ZipFile(file, "w") as opened_zip:
        opened_zip.writestr("a.jpg", jpeg("a.jpg"))
        opened_zip.writestr(*member)
    download(["iconqa"])
    with pytest.raises(DataError, match=f"train_images.zip: .*{found}"):
        opened("iconqa")


def test_one_name_in_two_zips(hub):
    folder = published(hub) / "llava_665k_multi"
    zipped(folder / "train_images_part1.zip", ["coco/1_1.jpg"])  # the same picture twice does no harm
    download(["llava_665k_multi"])
    with pytest.raises(
        SampleError, match=r"is not in train_images_part0.zip, train_images_part1.zip, train_images_part2"
    ):
        [opened("llava_665k_multi").sample(i) for i in range(6)]
    other = hub.folder / "datasets/ann/mine/llava_665k_multi"
    shutil.copytree(folder, other)
    with zipfile.ZipFile(other / "train_images_part1.zip", "w") as file:
        file.writestr("coco/1_1.jpg", b"another")
    fetch(find("ann/mine"))
    with pytest.raises(DataError, match="a file in it has the name of another file in train_images_part"):
        open_source(SourceRecipe(path="ann/mine:llava_665k_multi"))


def test_a_zip_that_is_listed_and_not_there(hub):
    (published(hub) / "llava_665k_multi/train_images_part1.zip").unlink()
    download(["llava_665k_multi"])
    found = "train_images_zips.txt: names train_images_part1.zip, which is not in the repository"
    with pytest.raises(DataError, match=found):
        opened("llava_665k_multi")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda whole, at: b"\0" * 500 + whole, "has changed, and no file begins where pics/0.jpg did"),
        (lambda whole, at: whole[: at + 20], "train_images.zip is cut short"),
        (lambda whole, at: whole[: at + 500], "cannot be read: "),
        (lambda whole, at: None, "no such file: .*train_images.zip"),
    ],
)
def test_a_zip_that_changes_under_a_run(hub, change, found):
    download(["iconqa"])
    sample = opened("iconqa").sample(1)
    (image,) = sample.images
    assert open_image(image, sample).size == size(image, sample)
    archive, at = image.source.archive, image.source.at
    content = change(archive.read_bytes(), at)
    archive.unlink() if content is None else archive.write_bytes(content)
    with pytest.raises(SampleError, match=found):
        open_image(image, sample)


def test_a_picture_whose_bytes_rotted(hub):
    download(["iconqa"])
    source = opened("iconqa").sample(1).images[0].source
    content = bytearray(source.archive.read_bytes())
    content[source.at + 200] ^= 1
    source.archive.write_bytes(content)
    with pytest.raises(zipfile.BadZipFile, match="CRC"), source.open() as file:
        file.read()


# Selecting rows without reading them.


@pytest.mark.parametrize("settings", [{"max_num_images": 1}, {"vl_only": True}, {"max_num_images": 2, "shuffle": True}])
def test_rows_are_chosen_by_their_columns_as_by_reading_them(hub, settings, monkeypatch):
    download(["iconqa"])
    by_columns = opened("iconqa", **settings)
    monkeypatch.setattr("mantis_lite.data.source.list_counts", lambda dataset: None)
    by_row = opened("iconqa", **settings)
    monkeypatch.setattr("mantis_lite.data.source.plain_count", lambda row: None)
    by_sample = opened("iconqa", **settings)
    assert by_columns.selected.tolist() == by_row.selected.tolist() == by_sample.selected.tolist()
    assert by_columns.dropped == by_row.dropped == by_sample.dropped and by_columns.dropped


def test_choosing_makes_no_samples(hub, monkeypatch):
    download(["iconqa"])
    monkeypatch.setattr("mantis_lite.data.source.parse", None)
    assert len(opened("iconqa", vl_only=True)) == 6


# What is not here is offered at a terminal, and elsewhere named with the command.


def test_what_is_not_here_is_said_with_the_command(hub, tmp_path):
    (tmp_path / "mix.yaml").write_text(
        json.dumps(
            {"data": [{"path": INSTRUCT, "name": name, "format": "chat"} for name in ("nlvr2", "lrv", "iconqa")]}
        )
    )
    data = DataRecipe(sources=[SourceRecipe(path=str(tmp_path / "mix.yaml"))])
    command = f"mantis-lite data download {SHORT} --subsets nlvr2,lrv_multi,iconqa"
    with pytest.raises(
        DataError, match=f"^{INSTRUCT}: it is not in .*: nlvr2, lrv_multi, iconqa\n  Download it: {command}$"
    ):
        prepare(data, OFF, by_size())
    with pytest.raises(DataError, match=f"all of it\n  Download it: mantis-lite data download {SHORT}$"):
        prepare(DataRecipe(sources=[SourceRecipe(path=SHORT)]), OFF, by_size())
    folder = tmp_path / "own"
    download(["nlvr2"], to=folder)
    with pytest.raises(DataError, match=r"Download it: .* --subsets nlvr2 --split val$"):
        opened("nlvr2", split="val")
    shutil.rmtree(place_of(INSTRUCT).parent)
    with pytest.raises(DataError, match=f"Download it: .* --subsets iconqa --to {folder}$"):
        open_source(SourceRecipe(path=str(folder), name="iconqa"))


@pytest.mark.parametrize("answer", ["y", "n"])
def test_someone_at_a_terminal_is_asked(hub, monkeypatch, answer, tmp_path, llava_folder):
    class Terminal:
        isatty = staticmethod(lambda: True)

    asked = []
    monkeypatch.setattr("typer.confirm", lambda text: asked.append(text) or answer == "y")
    monkeypatch.setattr("mantis_lite.cli.sys", SimpleNamespace(stdin=Terminal(), stdout=Terminal()))
    words = ["check", "chat", f"model={llava_folder}", f"data={SHORT}:iconqa", "method=lora"]
    done = CliRunner().invoke(app, words)
    assert asked == [f"{INSTRUCT} is not here: download iconqa, 0.0 GB, to {place_of(INSTRUCT)}?"]
    assert (done.exit_code == 0) == (answer == "y"), done.output
    assert ("9 rows read" in done.output) == (answer == "y") and bool(gets(hub)) == (answer == "y")


def test_the_command_line(hub, tmp_path):
    runner = CliRunner()
    done = runner.invoke(app, ["data", "download", SHORT, "--subsets", "lrv,nlvr2"])
    assert isinstance(done.exception, DataError)
    done = runner.invoke(app, ["data", "download", SHORT, "--subsets", "llava_665k_merged", "--split", "train"])
    assert done.exit_code == 0 and "notice: " in done.output and "5 files are here and verified, 5" in done.output
    assert done.output.endswith(f"recipes read it with data={INSTRUCT}\n")
    done = runner.invoke(app, ["data", "download", SHORT, "--subsets", "iconqa", "--to", str(tmp_path / "own")])
    assert done.output.endswith(f"recipes read it with data={tmp_path / 'own'}\n")  # the cache has another


def test_what_another_process_has_fetched_meanwhile_is_not_forgotten(hub):
    early = find(SHORT, ["iconqa"])
    download(["nlvr2"])
    fetch(early)
    assert read_repository(place_of(INSTRUCT)).has("nlvr2", "train")
    early.repository.revision = "e" * 40
    with pytest.raises(DataError, match=f"another process has begun with {COMMIT}"):
        fetch(early)


# Training.


def test_a_mixture_trains_as_its_rows_do(hub, tmp_path, llava_folder):
    """Through zips and a mixture file, and as plain JSON beside unpacked pictures: the same lengths, labels, losses."""
    from mantis_lite.training.start import start

    download()
    sources = {"nlvr2": {"max_size": 4}, "iconqa": {"vl_only": True}, "llava_665k_multi": {}}
    mix = [
        {"path": INSTRUCT, "name": name, "format": "chat", "revision": "script", **of} for name, of in sources.items()
    ]
    (tmp_path / "mix.yaml").write_text(json.dumps({"data": mix}))
    plain = []
    for name in sources:
        rows = opened(name, **sources[name])
        found = [rows.row(i) for i in range(len(rows))]
        for image in images_of(found):
            (tmp_path / name / image).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / image).write_bytes(jpeg(image))
        written = [of | {"images": [image["path"] for image in of["images"] or ()]} for of in found]
        (tmp_path / name / "train.json").write_text(json.dumps(written))
        plain.append(str(tmp_path / name / "train.json"))
    steps = {"max_steps": 2, "learning_rate": 1e-3, "samples_per_step": 4, "save_strategy": "no", "logging_steps": 1}
    runs = []
    for name, data in {"zips": [str(tmp_path / "mix.yaml")], "plain": plain}.items():
        made = recipe(llava_folder, data=data, run_dir=str(tmp_path / f"run-{name}"), train=steps)
        runs.append(start(made))
    zips, files = runs
    assert len(zips.prepared.train) == 16 and zips.schedule.packs == files.schedule.packs
    assert np.array_equal(zips.prepared.train.lengths, files.prepared.train.lengths)
    assert np.array_equal(zips.prepared.train.digest, files.prepared.train.digest)
    for at in range(16):
        one, two = (run.encoder.encode(run.prepared.train[at]) for run in runs)
        assert np.array_equal(one.labels, two.labels) and np.array_equal(one.input_ids, two.input_ids)
    logged = []
    for run in runs:
        run.train()
        lines = (run.recipe.run_dir / "metrics.jsonl").read_text().splitlines()
        logged.append([json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)])
    assert logged[0] == logged[1] and len(logged[0]) == 2


def test_nothing_is_said_to_the_hub_but_what_is_asked(hub, tmp_path):
    """In a process of its own: no telemetry; and the user's token goes where it belongs, and nowhere else."""
    token = "hf_" + "DownloadsFromLoopback"
    own = environment(hub.url, tmp_path) | {"HF_TOKEN": token}
    done = subprocess.run([*COMMAND, SHORT, "--subsets", "iconqa"], env=own, capture_output=True, text=True)
    assert done.returncode == 0 and token not in done.stdout + done.stderr
    assert all(INSTRUCT in request for request in hub.requests), hub.requests
    files = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert files and not any(token.encode() in file.read_bytes() for file in files)
