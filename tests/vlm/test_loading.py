"""Where a model goes on a machine with accelerators."""

import pytest
import torch

from rlaifv.vlm.loading import device_map_for


@pytest.mark.parametrize(
    ("device", "place"), [("auto", 1), ("cuda", 0), ("cuda:1", "cuda:1")], ids=["auto", "cuda", "cuda:1"]
)
def test_a_model_that_fits_one_card_stays_on_one(device, place, tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(bytes(90))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: ([60, 100, 80][index], 200))
    assert device_map_for(tmp_path, device) == place


def test_a_model_that_fits_no_card_is_spread_over_all(tmp_path, monkeypatch):
    for part in (1, 2):
        (tmp_path / f"model-{part}.safetensors").write_bytes(bytes(50))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (100, 200))
    assert device_map_for(tmp_path, "auto") == "auto"
