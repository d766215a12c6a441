import numpy as np
import pytest
from matplotlib.image import imread

from fedlora.config import PartitionConfig
from fedlora.data.partition import Split, partition
from fedlora.data.picture import draw
from fedlora.errors import RunFolderError

pytestmark = pytest.mark.usefixtures("pictures")


def make(clients: int, labels: int, name: str = "iid"):
    rows = np.arange(clients * labels * 12) % labels
    names = [f"a label with a long name, number {i}" for i in range(labels)]
    return partition(PartitionConfig(name=name, min_size=1), clients, 0, Split(rows), Split(rows[:200]), names, "d")


def test_pictures_grow_with_what_they_show_and_stay_viewable(tmp_path):
    shapes = []
    for clients, labels in ((3, 2), (20, 20), (100, 77)):
        draw(make(clients, labels), tmp_path / "figures" / "partition.png")
        shapes.append(imread(tmp_path / "figures" / "partition.png").shape[:2])
    (low, narrow), (middle, wider), (high, wide) = shapes
    assert 400 < low < middle < high < 2000
    assert 600 < narrow < wider < wide < 2000


def test_sizes_of_very_many_clients_are_one_outline(tmp_path):
    """As large as that of a few: the grey of their bars takes as much of the picture."""
    shares, shapes = [], []
    for clients in (150, 2000):
        draw(make(clients, 4), tmp_path / "partition.png")
        image = imread(tmp_path / "partition.png")[:, :, :3]
        shapes.append(image.shape)
        shares.append((abs(image - 0.45).max(axis=2) < 0.02).mean())
    assert shapes[0] == shapes[1]
    assert shares[1] == pytest.approx(shares[0], rel=0.4)


def test_more_of_a_label_is_brighter_and_none_is_white(tmp_path):
    """One cell of three in each row has all there is: a known share of the picture has the brightest colour."""
    draw(make(3, 3, "one-label"), tmp_path / "partition.png")
    image = imread(tmp_path / "partition.png")[:, :, :3]
    yellow, purple = np.array([[0xFD, 0xE7, 0x25], [0x44, 0x01, 0x54]]) / 255
    assert 0.03 < (abs(image - yellow).max(axis=2) < 0.01).mean() < 0.2
    assert (abs(image - purple).max(axis=2) < 0.01).mean() < 0.001


def test_the_same_partition_gives_the_same_file(tmp_path):
    for name in ("a.png", "b.png"):
        draw(make(4, 3), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunFolderError, match="cannot write"):
        draw(make(3, 2), tmp_path / "file" / "partition.png")


def test_names_with_dollars_are_no_formulas(tmp_path):
    owners = [r"$\frac$", r"c$\x", r"$\foo$"] * 4
    config = PartitionConfig(name="natural-id", min_size=1)
    train, test = Split([0, 1, 1] * 4, owners), Split([0, 1], owners[:2])
    parts = partition(config, 3, 0, train, test, [r"$\bar", r"$\foo$"], "digest")
    draw(parts, tmp_path / "partition.png")
    assert imread(tmp_path / "partition.png").shape[0] > 300
