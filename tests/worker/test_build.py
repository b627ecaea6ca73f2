"""What a configuration asks of a layout that has none of it is refused before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster import KEY
from tiny_llama import SHAPES, make_llama

from service.config import EngineConfig, WorkerConfig
from spec.errors import InvalidConfiguration
from telemetry.setup import setup
from worker.build import build_core


@pytest.mark.parametrize(
    ("layout", "options", "words"),
    [
        ("tp1", {"micro_batches": 2}, "micro_batches is for layouts with pp above 1; engine.layout is tp1"),
        ("tp2", {"micro_batches": 2}, "micro_batches is for layouts with pp above 1; engine.layout is tp2"),
        ("tp2", {"expert_replicas": 1}, "expert_replicas is for layouts with ep above 1; engine.layout is tp2"),
        ("dp2", {"draft_model": "a folder"}, "draft_model is for layouts without dp; engine.layout is dp2"),
    ],
)
def test_an_option_of_other_layouts_is_refused(
    tmp_path: Path, layout: str, options: dict[str, int | str], words: str
) -> None:
    model = make_llama(tmp_path / "model", SHAPES[0])
    engine = EngineConfig.model_validate(
        {"model": str(model), "device": "cpu", "threads": 1, "layout": layout} | options
    )
    config = WorkerConfig(
        role="decode", worker_id="decode-0", redis_url="redis://127.0.0.1:1", cluster_key=KEY, engine=engine
    )
    with pytest.raises(InvalidConfiguration, match=words):
        build_core(config, setup("tests"), lambda what, fraction: None)
