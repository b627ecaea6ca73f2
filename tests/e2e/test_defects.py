"""A defect of the model is said as what it is: to the client, at once, and in the worker's log."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from cluster import cluster
from safetensors.torch import load_file, save_file
from tiny_llama import SHAPES, make_llama

from legato.errors import InternalError


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_llama(tmp_path_factory.mktemp("llama") / "model", SHAPES[0])
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"].fill_(float("nan"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("prefill", [0, 1])
async def test_logits_that_are_not_finite(
    broken: Path, redis_url: str, caplog: pytest.LogCaptureFixture, prefill: int
) -> None:
    async with cluster(broken, redis_url, prefill=prefill) as running:
        logging.getLogger("legato").addHandler(caplog.handler)  # the root's have been replaced by the processes' own
        try:
            with pytest.raises(InternalError, match="not finite"):
                await running.client.generate([5, 6, 7], max_tokens=8)
        finally:
            logging.getLogger("legato").removeHandler(caplog.handler)
        assert caplog.text.count("failed: the model's logits were not finite") == 1, "the worker says it, once"
        assert "attempt 1" not in caplog.text
        await running.assert_as_at_start()
