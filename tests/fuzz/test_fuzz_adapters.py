"""The adapter readers: PEFT folders, uploads, base updates, descriptions."""

import pytest
import torch

from fedlora.adapter import Adapter
from fedlora.adapter.base_update import BaseUpdate
from fedlora.channel import uploads
from fedlora.exchange import result
from fedlora.exchange.description import description
from fedlora.exchange.peftfolder import open_peft_folder, read_peft_folder
from tests.fuzz import campaign
from tests.fuzz.folders import WEIGHTS, draft, faulty, made

pytestmark = pytest.mark.timeout(0)  # its timer is the one that watches a case
SHARE = 0.45


def like(place):
    """What the uploads are compared with, at a rank that some have and some exceed."""
    draft().write(place / "like")
    return read_peft_folder(place / "like")


def test_folders_are_read_or_refused(shard, place):
    expected = like(place)
    campaign.empty(place)

    def check(case):
        folder = place / "client ü"
        try:
            made(*case).write(folder)
            before = campaign.tree(place)
            opened = campaign.outcome(lambda: open_peft_folder(folder))
            if opened is not None:
                check_folder(opened)
            upload = campaign.outcome(lambda: uploads.inspect(folder / WEIGHTS, expected, "client 3, round 1"))
            if upload is not None:
                check_upload(upload, expected)
            campaign.outcome(lambda: read_peft_folder(folder))
            campaign.outcome(lambda: BaseUpdate.read(folder))
            campaign.outcome(lambda: description(folder))
            assert campaign.tree(place) == before
        finally:
            campaign.empty(place)

    campaign.run(shard, faulty(), check)


def check_folder(opened):
    """PEFT takes its configuration, and its tensors are what its shapes say."""
    import peft

    content = opened.peft_content()
    kind = peft.HiraConfig if opened.variant == "hira" else peft.LoraConfig
    kind(**{key: value for key, value in content.items() if key != "peft_type"})
    result._described(opened)
    adapter = Adapter.from_tensors(dict(opened.stored.items()))
    for module, (d_out, rank, d_in) in opened.shapes.items():
        assert adapter.factors[module].rank == rank > 0
        assert adapter.factors[module].shape == (d_out, d_in)


def check_upload(upload, expected):
    mine, theirs = upload.tensors(), expected.tensors()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == torch.float32
        assert torch.isfinite(tensor).all()
        assert all(0 < size <= most for size, most in zip(tensor.shape, theirs[name].shape, strict=True))
