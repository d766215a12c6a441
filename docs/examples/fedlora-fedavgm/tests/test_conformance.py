"""What fedlora expects of every strategy."""

from fedlora.testing import check_strategy


def test_conforms():
    check_strategy("fedavgm")
