"""The trace is equal in Python, in each PNG, and in the JSONL file."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from safegen.guards.core.result import ACTIONS
from safegen.stack_loader import LoadedStack

GUARDS = """
[[guards]]
name = "prompt-filter"
words = ["blue ball"]
[[guards]]
name = "safree"
phrases = ["a red cube", "red"]
[[guards]]
name = "sld"
preset = "max"
text = "a green cone"
[[guards]]
name = "crops"
judge = "mini"
threshold = 1.0
probes = 2
steps = 1
[[guards]]
name = "judge-filter"
judge = "mini"
threshold = 1.0
"""


def test_python_png_and_jsonl_hold_the_same_trace(tiny_folder, tmp_path, monkeypatch):
    from safegen.cli import main

    outputs = []
    generate = LoadedStack.generate

    def record(self, samples, generation_config, **options):
        batch = generate(self, samples, generation_config, **options)
        outputs.extend(batch)
        return batch

    monkeypatch.setattr(LoadedStack, "generate", record)
    (tmp_path / "safe.toml").write_text(f'model = "{tiny_folder}"\n{GUARDS}')
    prompts = [
        "a red cube on a white table",
        "a blue ball in the grass",
        "a green cone under a tree",
    ]
    options = [word for prompt in prompts for word in ("--prompt", prompt)]
    out = tmp_path / "out"
    stack = str(tmp_path / "safe.toml")
    monkeypatch.setattr(
        "sys.argv",
        [
            "safegen",
            "generate",
            "--stack",
            stack,
            *options,
            "--steps",
            "2",
            "--batch",
            "2",
            "--out",
            str(out),
        ],
    )
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    lines = [json.loads(line) for line in (out / "trace.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in line.items() if k not in ("index", "seed")} for line in lines] == [
        o.trace.to_json() for o in outputs
    ]
    shown = sorted(out.glob("0*.png"))
    assert [int(path.stem) for path in shown] == [0, 2]  # the filter blocked the other
    for path in shown:
        with Image.open(path) as image:
            assert (
                json.loads(image.text["safegen"])["guards"]
                == outputs[int(path.stem)].trace.to_json()
            )
    for output in outputs:
        records = {record["guard"]: record for record in output.trace.to_json()["guards"]}
        assert list(records) == ["prompt-filter", "safree", "sld", "crops", "judge-filter"]
        withheld = output.image is None
        assert all(
            set(record)
            == {"guard", "action", "reason", "scores", "thresholds", "calls", "rows", "ms"}
            for record in records.values()
        )
        assert (
            all(
                record["action"] in ACTIONS and record["calls"] >= 1 and record["ms"] > 0
                for record in records.values()
            )
            or withheld
        )
        assert (records["prompt-filter"]["action"], records["prompt-filter"]["reason"]) == (
            ("block", "word") if withheld else ("none", "")
        )
        assert withheld or {"triggers", "distance", "steps"} <= set(records["safree"]["scores"])
        assert withheld or (records["crops"]["scores"], records["crops"]["thresholds"]) == (
            {"share": 0.0},
            {"share": 0.5, "score": 1.0},
        )
