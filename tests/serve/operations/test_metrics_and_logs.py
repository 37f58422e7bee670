"""Metrics and logs: every request counted, no text of a prompt, no label that a client chooses."""

from __future__ import annotations

import json
import logging
import signal
import threading

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from safegen.serve.operations.audit import hash_text
from safegen.serve.operations.logs import JsonFormatter
from safegen.serve.operations.metrics import Metrics
from tests.serve.operations.processes import process

PATH = "/v1/images/generations"


def read_metrics(address):
    """Return the value of each sample by its name and labels."""
    text = httpx2.get(f"{address}/metrics").text
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(metrics, name, **labels):
    return metrics.get((name, *sorted(labels.items())), 0)


def test_requests_and_images_are_counted_by_what_became_of_them(server):
    prompts = ["a castle", "a partly castle", "skulls", "broken", "full", "dead"]
    for prompt in prompts:
        httpx2.post(server + PATH, json={"prompt": prompt, "n": 2})
    httpx2.get(f"{server}/nothing")
    httpx2.request("BREW", f"{server}/health")
    metrics = read_metrics(server)
    for status, count in (("200", 2), ("400", 1), ("503", 2), ("429", 1)):
        labels = {"route": PATH, "method": "POST", "status": status}
        assert value(metrics, "safegen_requests_total", **labels) == count, status
    labels = {"route": "other", "method": "GET", "status": "404"}
    assert value(metrics, "safegen_requests_total", **labels) == 1
    images = {"stack": "safe", "status": "released", "stage": "", "guard": ""}
    assert value(metrics, "safegen_images_total", **images) == 3
    images = {"stack": "safe", "status": "blocked", "stage": "input", "guard": "prompt-filter"}
    assert value(metrics, "safegen_images_total", **images) == 2
    images = {"stack": "safe", "status": "blocked", "stage": "output", "guard": "judge-filter"}
    assert value(metrics, "safegen_images_total", **images) == 1
    for reason, count in (("check", 2), ("queue-full", 2), ("engine", 2)):
        assert value(metrics, "safegen_faults_total", stack="safe", reason=reason) == count
    assert value(metrics, "safegen_generation_seconds_count", stack="safe") == 6
    assert value(metrics, "safegen_request_seconds_count", route=PATH) == 6
    assert value(metrics, "safegen_workers") == 1
    assert value(metrics, "safegen_ready") == 1
    assert value(metrics, "safegen_queued") == 0
    assert value(metrics, "process_resident_memory_bytes") > 0


def test_no_client_chooses_a_label(server):
    def call(numbers):
        with httpx2.Client(base_url=server) as client:
            for number in numbers:
                client.get(f"/nothing/{number}")
                client.request(f"METHOD{number}", "/health")
                client.post(PATH, json={"prompt": "a castle", "model": f"m{number}"})
        return len(read_metrics(server))

    call([0])
    assert call([1]) == call(range(2, 12))


def test_batches_are_counted_by_their_size():
    metrics = Metrics()
    for size in (1, 3, 8):
        metrics.on_batch(size, 0.2)
    registry = metrics.registry
    assert registry.get_sample_value("safegen_batch_size_count") == 3
    assert registry.get_sample_value("safegen_batch_size_sum") == 12
    assert registry.get_sample_value("safegen_batch_size_bucket", {"le": "4.0"}) == 2
    assert registry.get_sample_value("safegen_batch_seconds_sum") == pytest.approx(0.6)


@pytest.mark.parametrize("log_prompts", [False, True])
def test_the_log_is_json_lines_that_quote_a_prompt_only_if_the_operator_says_so(log_prompts):
    with process(log_prompts=log_prompts) as (server, address):
        lines = []
        reader = threading.Thread(target=lambda: lines.extend(server.stderr))
        reader.start()
        headers = {"x-request-id": "mine\x7f"}
        answer = httpx2.post(address + PATH, json={"prompt": "a secret castle"}, headers=headers)
        httpx2.post(address + PATH, json={"prompt": "secret skulls", "n": 3})
        httpx2.post(address + PATH, json={"prompt": ["secret"]})
        httpx2.post(address + PATH, content=b"secret")
        httpx2.get(f"{address}/{'x' * 5000}")
        server.send_signal(signal.SIGTERM)
        server.wait(10)
        reader.join(10)
    records = [json.loads(line) for line in lines]
    assert [r["message"] for r in records if r["message"] != "request"] == ["ready", "draining"]
    ready = next(record for record in records if record["message"] == "ready")
    assert ready["address"] == address
    requests = [record for record in records if record["message"] == "request"]
    assert [record["status"] for record in requests] == [200, 400, 400, 400, 404]
    assert len(requests[-1]["path"]) == 200
    first, blocked = requests[:2]
    assert first["request"] == answer.headers["x-request-id"]
    assert first["client_request_id"] == "mine\x7f"
    assert first["method"] == "POST"
    assert first["path"] == PATH
    assert first["response_bytes"] == len(answer.content)
    assert first["request_bytes"] > 0
    assert first["seconds"] > 0
    assert first["released"] == 1
    assert (blocked["images"], blocked["blocked"]) == (3, 3)
    if log_prompts:
        assert first["prompt"] == "a secret castle"
    else:
        assert first["prompt_sha256"] == hash_text("a secret castle")
        assert "secret" not in "".join(lines)


def test_an_exception_is_logged_by_its_places_and_not_by_its_text():
    try:
        raise ValueError("a castle of secrets")
    except ValueError as error:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "failed", None, None)
        record.exc_info = (ValueError, error, error.__traceback__)
    line = json.loads(JsonFormatter().format(record))
    assert line["error"] == "ValueError"
    assert "test_metrics_and_logs.py" in line["places"][0]
    assert "secrets" not in json.dumps(line)
    assert "secrets" in JsonFormatter(log_prompts=True).format(record)
