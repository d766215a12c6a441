import pytest

from fedlora.config import configfile
from fedlora.config.addresses import holds_secret
from fedlora.errors import ConfigError, TrackingError
from mlflow_tracking import store

SECRETS = [
    "http://ann:S3CRET@host:5000",
    "http://S3CRET@host",
    "https://ann:S3/CRET@host",
    "postgresql://ann:S3CRET@host/mlflow",
    "postgresql+psycopg2://ann@host/mlflow?password=S3CRET",
    "mysql://ann:S3CRET@host/mlflow",
]
HARMLESS = [
    "http://127.0.0.1:5000",
    "https://host/path@1",
    "postgresql://ann@host/mlflow",
    "sqlite:////a:b@c/mlflow.db",
]


@pytest.mark.parametrize("address", SECRETS)
def test_a_password_in_the_tracking_address_is_refused_and_not_repeated(monkeypatch, address):
    assert holds_secret(address)
    with pytest.raises(ConfigError, match=r"tracking\.uri holds a password; leave ") as refused:
        configfile.build({"tracking.uri": address})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(TrackingError, match=r"MLFLOW_TRACKING_URI holds a password, .*; leave ") as also_refused:
        store.resolve_uri(None)
    assert "S3" not in f"{refused.value} {also_refused.value}"


@pytest.mark.parametrize("address", HARMLESS)
def test_other_addresses_are_taken(address):
    assert not holds_secret(address)
    assert store.resolve_uri(configfile.build({"tracking.uri": address}).tracking.uri) == address
