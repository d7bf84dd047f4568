"""Data sets: files in CIFAR's format and folders made here go through the real loaders; damage is named, not loaded."""

import hashlib
import io
import sys
import tarfile
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from attnzoo.data import DATASETS, cifar, load_images
from attnzoo.data.images import held_out, resized
from attnzoo.errors import DataError

PER_FILE = 20


def records(label_bytes: int, classes: int, seed: int, n: int = PER_FILE) -> bytes:
    """A file in CIFAR's binary format; the image's first byte repeats the label."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 256, (n, label_bytes + 3072), dtype=np.uint8)
    rows[:, 0] = 0
    rows[:, label_bytes - 1] = np.arange(n) % classes
    rows[:, label_bytes] = rows[:, label_bytes - 1]
    return rows.tobytes()


def files_of(which: str) -> dict[str, bytes]:
    """What the archive holds."""
    if which == "cifar10":
        parts = {f"data_batch_{i}.bin": records(1, 10, i) for i in range(1, 6)}
        names = "\n".join(f"class{i}" for i in range(10)) + "\n\n"
        return {**parts, "test_batch.bin": records(1, 10, 6), "batches.meta.txt": names.encode()}
    names = "\n".join(f"class{i}" for i in range(100)) + "\n"
    return {
        "train.bin": records(2, 100, 1),
        "test.bin": records(2, 100, 2),
        "fine_label_names.txt": names.encode(),
    }


def write_archive(root: Path, monkeypatch, which: str = "cifar10", files=None, special=None) -> None:
    """Put an archive of small files into `root` and pin the loader to its checksum."""
    spec = {"cifar10": cifar.CIFAR10, "cifar100": cifar.CIFAR100}[which]
    root.mkdir(exist_ok=True)
    path = root / spec.archive.file
    with tarfile.open(path, "w:gz") as tar:
        for name, content in (files or files_of(which)).items():
            info = tarfile.TarInfo(f"{spec.archive.folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in special or []:
            tar.addfile(info, io.BytesIO(b"x" * info.size))
    pin(monkeypatch, which, path)


def pin(monkeypatch, which: str, path: Path) -> None:
    spec = {"cifar10": cifar.CIFAR10, "cifar100": cifar.CIFAR100}[which]
    archive = replace(spec.archive, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    small = replace(spec, archive=archive, records=(PER_FILE, PER_FILE))
    monkeypatch.setattr(f"attnzoo.data.load.{which.upper()}", small)


def code_of(call, *args, **kwargs) -> tuple[str, str]:
    with pytest.raises(DataError) as error:
        call(*args, **kwargs)
    return error.value.code, str(error.value)


# CIFAR


@pytest.mark.parametrize("which,classes,train", [("cifar10", 10, 100), ("cifar100", 100, 20)])
def test_cifar_is_read_from_its_archive(which, classes, train, tmp_path, monkeypatch):
    write_archive(tmp_path, monkeypatch, which)
    data = load_images(which, root=tmp_path, download=False)
    assert (data.name, data.image, len(data.train), len(data.test)) == (which, (3, 32, 32), train, PER_FILE)
    assert data.classes == tuple(f"class{i}" for i in range(classes))
    images, labels = data.train.batch(torch.tensor([3, 0, train - 1]))
    assert images.shape == (3, 3, 32, 32) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert torch.equal(images[:, 0, 0, 0].long(), labels)
    first = files_of(which)["test_batch.bin" if which == "cifar10" else "test.bin"]
    skip = 1 if which == "cifar10" else 2
    image = data.test.batch(torch.tensor([0]))[0][0]
    assert image.flatten().tolist() == list(first[skip : skip + 3072])  # planes of rows, red first
    assert not list(tmp_path.glob(".*"))  # no scratch folder is left


def test_cifar_needs_its_archive_only_once(tmp_path, monkeypatch):
    write_archive(tmp_path, monkeypatch)
    load_images("cifar10", root=tmp_path, download=False)
    (tmp_path / "cifar-10-binary.tar.gz").unlink()
    monkeypatch.setenv("ATTNZOO_DATA", str(tmp_path))
    assert len(load_images("cifar10", download=False).train) == 100


def test_a_batch_is_a_copy(tmp_path, monkeypatch):
    write_archive(tmp_path, monkeypatch)
    data = load_images("cifar10", root=tmp_path, download=False)
    images, labels = data.train.batch(torch.arange(2))
    images.zero_(), labels.fill_(7)
    assert data.train.batch(torch.arange(2))[0].any() and data.train.labels[:2].tolist() == [0, 1]


def test_cifar_in_another_size(tmp_path, monkeypatch):
    write_archive(tmp_path, monkeypatch)
    data = load_images("cifar10", root=tmp_path, download=False, size=16)
    assert data.image == (3, 16, 16) and data.train.batch(torch.arange(2))[0].shape == (2, 3, 16, 16)


def test_the_published_checksums_are_pinned():
    """As TensorFlow Datasets records them."""
    assert cifar.CIFAR10.archive.sha256 == "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
    assert cifar.CIFAR100.archive.sha256 == "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"
    assert cifar.CIFAR10.records == (10_000, 10_000) and cifar.CIFAR100.records == (50_000, 10_000)


def test_a_wrong_checksum_stops_before_unpacking(tmp_path, monkeypatch):
    write_archive(tmp_path, monkeypatch)
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    monkeypatch.setattr(tarfile, "open", lambda *a, **k: pytest.fail("it was opened"))
    code, text = code_of(load_images, "cifar10", root=tmp_path, download=False)
    assert code == "AZ703" and "checksum" in text and not (tmp_path / "cifar-10-batches-bin").exists()


def test_an_archive_that_ends_too_soon(tmp_path, monkeypatch):
    write_archive(tmp_path, monkeypatch)
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(path.read_bytes()[:100_000])
    pin(monkeypatch, "cifar10", path)
    code, text = code_of(load_images, "cifar10", root=tmp_path, download=False)
    assert (
        code == "AZ703"
        and "cannot unpack" in text
        and sorted(p.name for p in tmp_path.iterdir()) == [path.name]
    )


def test_a_truncated_file_is_named(tmp_path, monkeypatch):
    write_archive(
        tmp_path, monkeypatch, files={**files_of("cifar10"), "data_batch_3.bin": records(1, 10, 3)[:-5]}
    )
    code, text = code_of(load_images, "cifar10", root=tmp_path, download=False)
    assert code == "AZ703" and "data_batch_3.bin" in text and "61455 bytes, not 61460" in text


def test_a_label_out_of_range_is_named(tmp_path, monkeypatch):
    write_archive(tmp_path, monkeypatch, files={**files_of("cifar10"), "test_batch.bin": records(1, 11, 6)})
    code, text = code_of(load_images, "cifar10", root=tmp_path, download=False)
    assert code == "AZ703" and "label 10" in text and "test_batch.bin" in text


def test_class_names_that_are_too_few(tmp_path, monkeypatch):
    write_archive(tmp_path, monkeypatch, files={**files_of("cifar10"), "batches.meta.txt": b"cat\ndog\n"})
    code, text = code_of(load_images, "cifar10", root=tmp_path, download=False)
    assert code == "AZ703" and "names 2 classes, not 10" in text


def test_a_missing_member_is_named(tmp_path, monkeypatch):
    files = files_of("cifar10")
    del files["data_batch_2.bin"]
    write_archive(tmp_path, monkeypatch, files=files)
    code, text = code_of(load_images, "cifar10", root=tmp_path, download=False)
    assert code == "AZ703" and "data_batch_2.bin" in text


def test_members_that_leave_the_folder_stay_packed(tmp_path, monkeypatch):
    root = tmp_path / "root"
    special = []
    for name in ("../escaped", "cifar-10-batches-bin/../../escaped", str(tmp_path / "escaped")):
        info = tarfile.TarInfo(name)
        info.size = 4
        special.append(info)
    write_archive(root, monkeypatch, special=special)
    assert len(load_images("cifar10", root=root, download=False).train) == 100
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_members_that_are_no_files_are_refused(kind, tmp_path, monkeypatch):
    files = files_of("cifar10")
    del files["test_batch.bin"]
    info = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
    info.type, info.linkname = kind, "/etc/passwd"
    write_archive(tmp_path, monkeypatch, files=files, special=[info])
    code, text = code_of(load_images, "cifar10", root=tmp_path, download=False)
    assert (
        code == "AZ703" and "not a regular file" in text and not (tmp_path / "cifar-10-batches-bin").exists()
    )


def test_a_symlink_as_the_folder_does_not_lead_out(tmp_path, monkeypatch):
    """`cifar-10-batches-bin` as a link, then a file through it."""
    root, info = tmp_path / "root", tarfile.TarInfo("cifar-10-batches-bin")
    info.type, info.linkname = tarfile.SYMTYPE, str(tmp_path)
    write_archive(root, monkeypatch, special=[info])
    load_images("cifar10", root=root, download=False)
    assert not (tmp_path / "test_batch.bin").exists() and not (root / "cifar-10-batches-bin").is_symlink()


def test_without_network_it_says_where_to_put_the_file(tmp_path, monkeypatch):
    def urlopen(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    code, text = code_of(load_images, "cifar10", root=tmp_path / "new")
    assert (
        code == "AZ702"
        and f"put cifar-10-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz into {tmp_path / 'new'}"
        in text
    )
    assert not list((tmp_path / "new").iterdir())
    code, text = code_of(load_images, "cifar100", root=tmp_path, download=False)
    assert code == "AZ702" and "not asked for" in text


def test_a_download_is_checked_before_it_counts(tmp_path, monkeypatch):
    write_archive(tmp_path / "there", monkeypatch)
    source = tmp_path / "there" / "cifar-10-binary.tar.gz"
    content, asked = source.read_bytes(), []

    def download_url(url, root, filename):
        asked.append(url)
        Path(root, filename).write_bytes(content)

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download_url)
    root = tmp_path / "here"
    assert len(load_images("cifar10", root=root).train) == 100
    assert asked == [cifar.CIFAR10.archive.url]
    content = content[:-1] + b"!"
    code, _ = code_of(load_images, "cifar10", root=tmp_path / "bad")
    assert code == "AZ703" and not list((tmp_path / "bad").iterdir())


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no route"), OSError(28, "No space left"), RuntimeError("x")]
)
def test_a_download_that_fails_leaves_nothing(error, tmp_path, monkeypatch):
    def download_url(url, root, filename):
        Path(root, filename).write_bytes(b"half")
        raise error

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download_url)
    assert code_of(load_images, "cifar10", root=tmp_path)[0] == "AZ702" and not list(tmp_path.iterdir())


# Folders


def paint(path: Path, level: int, size=(20, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, 0, 255 - level)).save(path)


def make_folder(root: Path, sides=("train", "test"), per_class=3) -> Path:
    for side in sides:
        for label, name in enumerate(("ant", "bee")):
            for i in range(per_class):
                paint(root / side / name / f"{i}.png", 100 * label + i)
    return root


@pytest.mark.parametrize("side", ["test", "val"])
def test_a_folder_with_sides(side, tmp_path):
    make_folder(tmp_path, ("train", side))
    (tmp_path / "train" / "ant" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".hidden").mkdir()
    data = load_images(f"folder:{tmp_path}")
    assert data.classes == ("ant", "bee") and data.image == (3, 16, 16) and not data.notes
    assert (len(data.train), len(data.test)) == (6, 6)
    images, labels = data.train.batch(torch.tensor([4, 0]))
    assert labels.tolist() == [1, 0] and images.dtype == torch.uint8 and images.shape == (2, 3, 16, 16)
    assert images[:, 0, 0, 0].tolist() == [101, 0] and images[:, 2, 5, 5].tolist() == [154, 255]
    mean = torch.tensor([0, 1, 2, 100, 101, 102]).double().mean().item() / 255
    assert data.mean == pytest.approx((mean, 0, 1 - mean)) and data.std[1] == 1e-3


def test_a_folder_without_sides_is_split_by_the_seed(tmp_path):
    for name in ("ant", "bee"):
        for i in range(10):
            paint(tmp_path / name / f"{i}.png", i)
    one, two, other = (load_images(f"folder:{tmp_path}", seed=seed, size=8) for seed in (0, 0, 1))
    assert one.test.paths == two.test.paths != other.test.paths
    assert sorted(one.test.labels.tolist()) == [0, 0, 1, 1] and len(one.train) == 16
    assert not set(one.train.paths) & set(one.test.paths) and "seed 0" in one.notes[0]
    for split in (one.train, one.test):
        assert [one.classes[label] for label in split.labels] == [path.parent.name for path in split.paths]


def test_images_of_other_shapes_and_modes_become_one_shape(tmp_path):
    make_folder(tmp_path)
    Image.new("L", (50, 30), 77).save(tmp_path / "train" / "ant" / "3.jpg")
    Image.new("RGBA", (5, 9), (1, 2, 3, 255)).save(tmp_path / "train" / "ant" / "4.png")
    data = load_images(f"folder:{tmp_path}", size=24)
    assert data.train.batch(torch.arange(8))[0].shape == (8, 3, 24, 24)
    assert data.train.batch(torch.tensor([4]))[0][0, :, 3, 3].tolist() == [1, 2, 3]


def test_a_image_keeps_its_proportions(tmp_path):
    """A square in the middle of a wide image stays a square: the middle is kept."""
    make_folder(tmp_path)
    wide = Image.new("RGB", (60, 20))
    wide.paste((255, 255, 255), (25, 5, 35, 15))
    wide.save(tmp_path / "train" / "ant" / "0.png")
    image = load_images(f"folder:{tmp_path}", size=20).train.batch(torch.tensor([0]))[0][0, 0]
    assert (
        torch.equal(image[5:15, 5:15], torch.full((10, 10), 255, dtype=torch.uint8))
        and int((image > 0).sum()) == 100
    )


def test_an_unreadable_image_is_named(tmp_path):
    make_folder(tmp_path, per_class=600)
    bad = tmp_path / "train" / "bee" / "1.png"  # statistics skip it
    for content in (b"no image", (tmp_path / "train" / "bee" / "0.png").read_bytes()[:40]):
        bad.write_bytes(content)
        data = load_images(f"folder:{tmp_path}")
        place = data.train.paths.index(bad)
        code, text = code_of(data.train.batch, torch.tensor([0, place]))
        assert code == "AZ704" and str(bad) in text


def test_what_is_wrong_with_a_folder(tmp_path):
    assert code_of(load_images, f"folder:{tmp_path / 'no'}") == (
        "AZ704",
        f"error[AZ704]: there is no folder `{tmp_path / 'no'}`",
    )
    assert "has no folders" in code_of(load_images, f"folder:{tmp_path}")[1]
    make_folder(tmp_path, ("train",))
    assert "neither test nor val" in code_of(load_images, f"folder:{tmp_path}")[1]
    make_folder(tmp_path, ("test",))
    paint(tmp_path / "test" / "cow" / "0.png", 3)
    code, text = code_of(load_images, f"folder:{tmp_path}")
    assert code == "AZ704" and "other classes in test than in train: cow" in text
    (tmp_path / "train" / "cow").mkdir()
    code, text = code_of(load_images, f"folder:{tmp_path}")
    assert code == "AZ704" and "cow" in text and "0 images" in text


def test_a_class_of_one_image_cannot_be_split(tmp_path):
    paint(tmp_path / "ant" / "0.png", 0)
    assert "1 images; it needs 2" in code_of(load_images, f"folder:{tmp_path}")[1]


# Digits and shapes


def test_digits():
    data = load_images("digits")
    assert data.classes == tuple("0123456789") and data.image == (3, 32, 32)
    assert len(data.train) + len(data.test) == 1797 and len(data.test) == sum(int(n) // 5 for n in counts())
    images, labels = data.train.batch(torch.arange(5))
    assert (
        images.dtype == torch.uint8
        and images.shape == (5, 3, 32, 32)
        and torch.equal(images[:, 0], images[:, 2])
    )
    again = load_images("digits", seed=5)
    assert torch.equal(again.test.labels, data.test.labels)
    assert data.mean[0] == pytest.approx(0.3064324, abs=1e-6)  # the split is always the same
    pixels = data.train.batch(torch.arange(len(data.train)))[0][:, 0].double() / 255
    assert data.mean == pytest.approx((float(pixels.mean()),) * 3) and data.std[0] == pytest.approx(
        float(pixels.std()), 1e-4
    )


def counts():
    from sklearn.datasets import load_digits

    return np.bincount(load_digits().target)


def test_digits_in_their_own_size_are_scikit_learns():
    from sklearn.datasets import load_digits

    data = load_images("digits", size=8)
    both = torch.cat([split.batch(torch.arange(len(split)))[0][:, 0] for split in (data.train, data.test)])
    theirs = torch.from_numpy(load_digits().images * 255 / 16).round().byte()
    assert sorted(map(bytes, both.flatten(1).numpy())) == sorted(map(bytes, theirs.flatten(1).numpy()))


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    code, text = code_of(load_images, "digits")
    assert code == "AZ708" and "pip install scikit-learn" in text


def test_shapes_are_the_same_everywhere():
    data = load_images("synthetic")
    assert (len(data.train), len(data.test), data.image, len(data.classes)) == (5000, 1000, (3, 32, 32), 10)
    digest = hashlib.sha256(
        data.train.images.numpy().tobytes() + data.test.images.numpy().tobytes()
    ).hexdigest()
    assert digest == "8bd6e54739a27803286f1c7724635b79cf7da4f5fa614f7ceedbeeed56e1505c"
    other = load_images("synthetic", seed=1)
    assert not torch.equal(other.train.images, data.train.images)
    assert torch.equal(other.train.labels.bincount(), torch.full((10,), 500))
    assert not torch.equal(data.train.images[:1000], data.test.images)


def test_shapes_of_other_sizes():
    data = load_images("synthetic", size=20)
    assert data.image == (3, 20, 20) and data.train.batch(torch.arange(3))[0].shape == (3, 3, 20, 20)


def test_shapes_can_be_told_apart():
    """By which pixels differ from the corner's colour: nearest mean silhouette, far above the tenth of guessing."""
    data = load_images("synthetic")

    def silhouettes(split, n):
        images = split.batch(torch.arange(n))[0].float()
        ground = images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].median(dim=2).values
        inside = ((images - ground[:, :, None, None]).abs() > 52).any(dim=1)
        found = []
        for each in inside:
            y, x = each.nonzero(as_tuple=True)
            box = each[y.min() : y.max() + 1, x.min() : x.max() + 1].float()[None, None]
            found.append(torch.nn.functional.interpolate(box, (12, 12), mode="area").flatten())
        return torch.stack(found)

    train, test = silhouettes(data.train, 1000), silhouettes(data.test, 300)
    means = torch.stack([train[data.train.labels[:1000] == label].mean(0) for label in range(10)])
    right = torch.cdist(test, means).argmin(1) == data.test.labels[:300]
    assert right.float().mean() > 0.7


# Names


@pytest.mark.parametrize(
    "name,hint",
    [
        ("cifar", "did you mean `cifar10`?"),
        ("syntetic", "did you mean `synthetic`?"),
        ("folders:x", "did you mean `folder`?"),
        ("folder", "folder"),
        ("folder:", "folder"),
        ("zzz", "the data sets are"),
    ],
)
def test_an_unknown_name(name, hint):
    code, text = code_of(load_images, name)
    assert code == "AZ701" and hint in text and f"`{name}`" in text


def test_every_name_of_the_list_is_known(tmp_path, monkeypatch):
    write_archive(tmp_path, monkeypatch)
    write_archive(tmp_path, monkeypatch, "cifar100")
    make_folder(tmp_path / "images")
    for name in DATASETS:
        data = load_images(
            name.replace("PATH", str(tmp_path / "images")), root=tmp_path, download=False, size=16
        )
        images, labels = data.test.batch(torch.arange(2))
        assert images.shape == (2, *data.image) == (2, 3, 16, 16) and labels.max() < len(data.classes)
        assert len(data.mean) == len(data.std) == 3 and min(data.std) > 0


def test_held_out_is_a_fifth_of_every_class():
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 12)
    chosen = held_out(labels, 0)
    assert [int(chosen[labels == label].sum()) for label in range(3)] == [10, 1, 2]
    assert torch.equal(chosen, held_out(labels, 0)) and not torch.equal(chosen, held_out(labels, 1))


def test_resizing_rounds():
    flat = torch.full((1, 3, 8, 8), 201, dtype=torch.uint8)
    assert (
        torch.equal(resized(flat, 32), torch.full((1, 3, 32, 32), 201, dtype=torch.uint8))
        and resized(flat, 8) is flat
    )
