import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.config import PartitionConfig
from fedlora.data.partition import Partition, Split, partition
from fedlora.data.partitioners import PARTITIONERS
from fedlora.errors import DataError

NAMES = tuple("abcde")
SIZES = np.array([120, 90, 60, 40, 30])
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(5), SIZES))
TEST_LABELS = np.repeat(np.arange(5), [30, 25, 15, 10, 8])
OWNERS = [f"owner {i % 17}" for i in range(len(LABELS))]
TEST_OWNERS = [f"owner {i % 20}" for i in range(len(TEST_LABELS))]


def deal(name="dirichlet", clients=6, seed=0, labels=LABELS, test=TEST_LABELS, digest="d", **options) -> Partition:
    config = PartitionConfig(name=name, **{"min_size": 2, **options})
    owners = [f"owner {i % 17}" for i in range(len(labels))]
    return partition(config, clients, seed, Split(labels, owners), Split(test, TEST_OWNERS), NAMES, digest)


def test_every_partitioner_of_the_configuration_exists():
    assert set(PARTITIONERS) == set(PartitionConfig.model_fields["name"].annotation.__args__)


@pytest.mark.parametrize("name", PARTITIONERS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), clients=st.integers(1, 20), alpha=st.floats(0.02, 100), data=st.data())
def test_every_example_goes_to_one_client_or_the_reason_is_said(name, seed, clients, alpha, data):
    labels = np.array(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=150)))
    test = np.array(data.draw(st.lists(st.integers(0, 4), max_size=80)), dtype=int)
    options = {"alpha": alpha, "labels_per_client": data.draw(st.integers(1, 5)), "min_size": 3}
    try:
        found = deal(name, clients, seed, labels, test, **options)
    except DataError as error:
        possible = name in ("iid", "quantity") and len(labels) >= 3 * clients
        if possible or "\n" in str(error):
            raise
        return
    assert found.clients == clients
    assert min(found.sizes) >= 3
    assert np.array_equal(np.sort(np.concatenate(found.train)), np.arange(len(labels)))
    assert all((np.diff(rows) > 0).all() for rows in (*found.train, *found.test))
    for rows, counts in zip(found.train, found.label_counts, strict=True):
        assert np.array_equal(np.bincount(labels[rows], minlength=5), counts)
    if name != "natural-id":
        assert_test_follows_training(found, test)


def assert_test_follows_training(found: Partition, test_labels) -> None:
    dealt = np.concatenate(found.test)
    assert np.array_equal(np.sort(dealt), np.flatnonzero(found.label_counts.sum(0)[test_labels]))
    counts = np.stack([np.bincount(test_labels[rows], minlength=5) for rows in found.test])
    shares = found.label_counts / np.maximum(found.label_counts.sum(0), 1)
    assert (abs(counts - shares * np.bincount(test_labels, minlength=5)) < 1).all()
    assert not counts[found.label_counts == 0].any()


@pytest.mark.parametrize("name", sorted(PARTITIONERS.keys() - {"natural-id"}))
def test_the_draw_follows_the_seed(name):
    one, again, other = deal(name, seed=4), deal(name, seed=4), deal(name, seed=5)
    assert one.summary() == again.summary()
    assert one.hash != other.hash
    assert any(not np.array_equal(a, b) for a, b in zip(one.train, other.train, strict=True))


def test_the_hash_names_the_data_and_the_rows():
    assert len(deal().hash) == 16
    assert deal().hash != deal(digest="other").hash
    assert deal().hash != deal(alpha=0.4).hash


def test_small_clients_are_all_tested_when_there_is_enough_for_all():
    labels = np.repeat(np.arange(5), 200)
    found = deal("iid", clients=100, labels=labels, test=np.repeat(np.arange(5), 50))
    assert (min(found.test_sizes), max(found.test_sizes)) == (2, 3)


def test_iid_is_even():
    assert set(deal("iid", clients=7).sizes) == {48, 49}


def test_small_alpha_is_skewed_and_large_alpha_is_not():
    def largest_share(alpha):
        return np.mean([deal(alpha=alpha, seed=s).label_counts.max(0) / SIZES for s in range(20)])

    assert largest_share(0.1) > 0.6
    assert largest_share(1000) < 0.25


def test_shards_are_equal_and_few_labels_each():
    found = deal("shard", clients=10, labels_per_client=2)
    assert set(found.sizes) == {34}
    assert (found.label_counts > 0).sum(1).max() <= 4


@pytest.mark.parametrize(("clients", "each"), [(3, 2), (6, 2), (20, 1), (4, 5)])
def test_pathological_clients_hold_exactly_that_many_labels(clients, each):
    found = deal("pathological", clients=clients, labels_per_client=each)
    assert set((found.label_counts > 0).sum(1)) == {each}
    holders = (found.label_counts > 0).sum(0)
    assert holders.max() - holders.min() <= 1


def test_one_label_each_with_more_clients_for_frequent_labels():
    found = deal("one-label", clients=17)
    assert set((found.label_counts > 0).sum(1)) == {1}
    assert (found.label_counts > 0).sum(0).tolist() == [6, 4, 3, 2, 2]


def test_quantity_skews_sizes_and_not_labels():
    found = deal("quantity", clients=4, alpha=0.3, min_size=20, seed=1)
    assert min(found.sizes) >= 20
    assert max(found.sizes) > 2.5 * min(found.sizes)
    large = found.label_counts[np.argmax(found.sizes)]
    assert abs(large / large.sum() - SIZES / SIZES.sum()).max() < 0.08


def test_natural_owners_stay_whole_and_are_packed_evenly():
    found = deal("natural-id", clients=5)
    of_client = [{OWNERS[row] for row in rows} for rows in found.train]
    assert sum(map(len, of_client)) == len(set(OWNERS)) == 17
    assert max(found.sizes) - min(found.sizes) <= 20
    for owners, rows in zip(of_client, found.test, strict=True):
        assert rows.tolist() == [i for i, owner in enumerate(TEST_OWNERS) if owner in owners]
    assert sum(found.test_sizes) == sum(owner in set(OWNERS) for owner in TEST_OWNERS) < len(TEST_OWNERS)


def test_as_many_owners_as_clients_gives_each_its_own():
    found = deal("natural-id", clients=17)
    assert all(len({OWNERS[row] for row in rows}) == 1 for rows in found.train)


def test_natural_owners_without_owners_in_the_test_split_are_tested_by_label():
    found = partition(PartitionConfig(name="natural-id"), 5, 0, Split(LABELS, OWNERS), Split(TEST_LABELS), NAMES, "d")
    assert_test_follows_training(found, TEST_LABELS)


@pytest.mark.parametrize(("fraction", "balanced"), [(0.1, 1), (0.25, 3), (0.99, 10)])
def test_mixed_quality_has_balanced_clients_and_skewed_ones(fraction, balanced):
    found = deal("mixed-quality", clients=10, balanced_fraction=fraction, alpha=0.1, min_size=1)
    distance = abs(found.label_counts / found.label_counts.sum(1, keepdims=True) - SIZES / SIZES.sum()).sum(1)
    assert math.ceil(fraction * 10) == balanced
    assert (distance < 0.1).sum() == balanced
    assert sorted(distance)[balanced:] == [] or min(sorted(distance)[balanced:]) > 0.2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"clients": 40, "min_size": 10},
            "340 training examples cannot give 40 clients partition.min_size=10 each (400 needed)",
        ),
        ({"alpha": 0.01, "min_size": 50}, r"alpha=0.01 leaves a client with"),
        (
            {"alpha": 0.01, "min_size": 50},
            "in the best of 100 draws, below partition.min_size=50; raise partition.alpha",
        ),
        ({"name": "one-label", "clients": 4}, "set clients to at least 5"),
        ({"name": "one-label", "min_size": 56}, "partition.name=one-label leaves a client with 30 training examples"),
        (
            {"name": "pathological", "clients": 2},
            "labels_per_client=2 for 2 clients and 5 labels: expected from 3 to 5; raise it",
        ),
        ({"name": "pathological", "labels_per_client": 6}, "expected from 1 to 5; lower it"),
        ({"name": "pathological", "clients": 40, "labels_per_client": 5}, "label 'e' has 30 examples for 40 clients"),
        (
            {"name": "natural-id", "clients": 18},
            "has 17 owners (3 more have test rows only) for 18 clients; set clients to",
        ),
        (
            {"name": "natural-id", "clients": 16, "min_size": 21},
            "below partition.min_size=21; lower partition.min_size",
        ),
    ],
)
def test_what_cannot_be_dealt_is_refused_with_the_reason(options, expected):
    with pytest.raises(DataError) as caught:
        deal(**options)
    assert expected in str(caught.value)


def test_natural_owners_need_a_column():
    with pytest.raises(DataError, match=r"needs data\.client"):
        partition(PartitionConfig(name="natural-id"), 5, 0, Split(LABELS), Split(TEST_LABELS), NAMES, "d")


def test_an_alpha_near_zero_gives_each_label_to_one_client():
    found = deal(clients=2, alpha=1e-300, min_size=1)
    assert ((found.label_counts > 0).sum(0) == 1).all()


def test_saved_and_loaded_it_is_the_same(tmp_path):
    found = deal()
    found.save(tmp_path / "run" / "partition.npz")
    loaded = Partition.load(tmp_path / "run" / "partition.npz")
    assert loaded.summary() == found.summary()
    for split in ("train", "test"):
        pairs = zip(getattr(loaded, split), getattr(found, split), strict=True)
        assert all(np.array_equal(a, b) and a.dtype == np.int64 for a, b in pairs)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["partition.npz"]


def test_the_summary_is_json():
    found = json.loads(json.dumps(deal().summary()))
    assert found["partitioner"] == "dirichlet"
    assert sum(found["sizes"]) == np.sum(found["label_counts"]) == len(LABELS)
    assert sum(found["test_sizes"]) == len(TEST_LABELS)


def test_a_damaged_or_changed_file_is_refused(tmp_path):
    path = tmp_path / "partition.npz"
    with pytest.raises(DataError, match="cannot read the partition"):
        Partition.load(path)
    deal().save(path)
    with np.load(path) as file:
        arrays = dict(file)
    arrays["train_rows"][[0, 1]] = arrays["train_rows"][[1, 0]]
    np.savez_compressed(path, **arrays)
    with pytest.raises(DataError, match="do not have the hash"):
        Partition.load(path)
    np.savez_compressed(path, meta=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="cannot read the partition"):
        Partition.load(path)
    path.write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(DataError, match="cannot read the partition"):
        Partition.load(path)


def test_owners_are_counted_named_and_their_merge_is_told():
    found = deal("natural-id", clients=5)
    assert sorted(owner for names in found.owners for owner in names) == sorted(set(OWNERS))
    assert all(
        {OWNERS[row] for row in rows} == set(names) for rows, names in zip(found.train, found.owners, strict=True)
    )
    without_training = sum(owner not in set(OWNERS) for owner in TEST_OWNERS)
    merged, unheld = found.notes()
    assert merged.startswith("17 owners are merged into 5 clients, 3 to 4 in each")
    assert unheld.startswith(f"{without_training} test rows are of owners without a training row")
    assert found.summary()["owners"] == [list(names) for names in found.owners]
    assert found.summary()["unheld_test_rows"] == without_training
    assert "owners" not in deal("iid", clients=5).summary()


def test_owners_survive_saving(tmp_path):
    found = deal("natural-id", clients=5)
    found.save(tmp_path / "partition.npz")
    loaded = Partition.load(tmp_path / "partition.npz")
    assert (loaded.owners, loaded.unheld, loaded.summary()) == (found.owners, found.unheld, found.summary())


def test_an_owner_of_test_rows_alone_is_counted_as_such():
    test_owners = [*TEST_OWNERS[:-1], "only tested"]
    train, test = Split(LABELS, OWNERS), Split(TEST_LABELS, test_owners)
    elsewhere = len(set(test_owners) - set(OWNERS))
    with pytest.raises(DataError, match=rf"has 17 owners \({elsewhere} more have test rows only\) for 18 clients"):
        partition(PartitionConfig(name="natural-id"), 18, 0, train, test, NAMES, "d")
