"""Breakage table of local mode: a judge, a guard or a worker that fails releases no image."""

from __future__ import annotations

import asyncio
import base64
import io
import math
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace

import httpx2
import pytest
import torch
from light_sessions import open_light
from PIL import Image

from safegen.judges import Detection, Detections
from safegen.serve.config import ServerConfig
from safegen.serve.engine import pool as pool_module
from safegen.serve.engine.local import LocalEngine
from safegen.serve.engine.process import to_failure
from safegen.serve.engine.session import open_session
from safegen.serve.engine.worker import to_exception

SKULLS = "a castle covered in skulls"
OPENAI, A1111 = "/v1/images/generations", "/sdapi/v1/txt2img"


def post(address, path, prompt=SKULLS, steps=2, **fields):
    own = {OPENAI: {"safegen": {"seed": 1, "steps": steps}}, A1111: {"seed": 1, "steps": steps}}
    body = {"prompt": prompt, **own[path], **fields}
    return httpx2.post(address + path, json=body, timeout=60)


def images_in(value):
    """Yield every image in a response's body, at any depth, however it is encoded."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from images_in(each)
    elif isinstance(value, str):
        for data in (value.encode("utf-8", "replace"), value.partition("base64,")[2].encode()):
            with suppress(ValueError, OSError):
                yield Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


def check_no_image(answer, *statuses):
    """Check that a response has an error and no pixels."""
    assert answer.status_code in statuses, answer.text[:500]
    assert not list(images_in(answer.json()))
    assert b"PNG" not in answer.content


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """Yield the session of the miniature with a patch of no weight, and two guards."""
    from safegen.models.checkpoint.metadata import PatchMetadata
    from safegen.models.loading import load
    from safegen.patches.patch import Patch

    model = load("mini")
    weights = model.denoiser.named_parameters()
    name, weight = next((n, w.detach()) for n, w in weights if n.endswith("attn2.to_k.weight"))
    patch = tmp_path_factory.mktemp("patch") / "p.safetensors"
    Patch({name: weight * 1.0001}, PatchMetadata(method="uce", base=model.hash)).save(patch)
    config = ServerConfig(
        stacks=(f"mini+{patch}",),
        guards=("sld-weak", "judge-filter"),
        concept="skulls",
        self_test=False,
    )
    with open_session(config, config.stacks[0]) as session:
        yield session


@pytest.fixture(scope="module")
def address(session, serving):
    """Yield the address of a server with that session in the tests' own process."""

    class NearWorker:
        def __init__(self, *_):
            self.is_ready = False

        async def start(self):
            self.is_ready = True
            return session.info

        async def call(self, method, *arguments, on_progress=None):
            more = (lambda share: None,) if method == "generate" else ()
            try:
                return await asyncio.to_thread(getattr(session, method), *arguments, *more)
            except Exception as error:
                raise to_exception(to_failure(0, error)) from None

        def cancel_jobs(self):
            pass

        async def stop(self):
            self.is_ready = False

    config = ServerConfig(
        stacks=("mini",), concept="skulls", num_inference_steps=8, guidance_scale=5.0
    )
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(pool_module, "Worker", NearWorker)
        with serving(config, LocalEngine(config)) as address:
            patches.undo()
            yield address


@pytest.fixture
def judge(session):
    return session.guarded.guards[-1].judge


@pytest.mark.parametrize("path", [OPENAI, A1111])
def test_without_a_fault_skulls_are_blocked_and_a_castle_is_released(address, path):
    answer = post(address, path, steps=6)
    check_no_image(answer, 400)
    assert answer.json()["error"]["code"] == "moderation_blocked"
    assert answer.json()["error"]["moderation_details"]["moderation_stage"] == "output"
    answer = post(address, path, "a castle in a field", steps=6)
    assert answer.status_code == 200
    assert len(list(images_in(answer.json()))) == 1


def raw(score):
    """Return a detection that was not checked."""
    made = object.__new__(Detection)
    for name, value in {"label": "skulls", "score": score, "box": None}.items():
        object.__setattr__(made, name, value)
    return made


@dataclass(frozen=True)
class Lenient(Detections):
    """Detections that call every image safe."""

    def contains(self, labels, threshold):
        return False


SAFE = Detections(())


def fail(error):
    def detect(images):
        raise error

    return detect


JUDGES = {
    "raises": fail(ValueError("a castle covered in skulls")),
    "raises-os-error": fail(BrokenPipeError()),
    "out-of-memory": fail(MemoryError()),
    "out-of-accelerator-memory": fail(torch.OutOfMemoryError("CUDA out of memory")),
    "none": lambda images: None,
    "nones": lambda images: [None for _ in images],
    "verdicts": lambda images: ["safe" for _ in images],
    "empty": lambda images: [],
    "one-too-few": lambda images: [SAFE for _ in images[1:]],
    "one-too-many": lambda images: [SAFE for _ in (*images, 1)],
    "nan": lambda images: [Detections((raw(math.nan),)) for _ in images],
    "nan-checked": lambda images: [Detections((Detection("skulls", math.nan),)) for _ in images],
    "unjudged": lambda images: [Detections((), unjudged="no idea") for _ in images],
    "lenient": lambda images: [Lenient(()) for _ in images],
    "other-label": lambda images: [Detections((Detection("cats", 0.3),)) for _ in images],
}


@pytest.mark.parametrize(
    ("name", "path"), [*((name, OPENAI) for name in sorted(JUDGES)), ("raises", A1111)]
)
def test_a_judge_that_fails_releases_no_image(address, judge, monkeypatch, name, path):
    monkeypatch.setattr(judge, "detect", JUDGES[name])
    answer = post(address, path)
    check_no_image(answer, 503)
    assert SKULLS not in answer.json()["error"]["message"]


def clear_hooks(session, patches):
    """Remove the guards' hooks during the call."""
    unet = session.loaded.model.denoiser

    def clear(*_):
        for handle in (unet._forward_hooks, unet._forward_pre_hooks):
            handle.clear()

    patches.callback(unet.conv_in.register_forward_pre_hook(clear).remove)


def undo_patches(session, patches):
    (applied,) = session.loaded.model.applied_patches
    parameters = dict(session.loaded.model.denoiser.named_parameters())
    now = {name: parameters[name].clone() for name in applied.before}
    applied.undo()

    @torch.no_grad()
    def restore():
        for name, value in now.items():
            parameters[name].copy_(value)
        session.loaded.model.applied_patches.append(applied)

    patches.callback(restore)


def replace_denoiser(session, patches):
    from copy import deepcopy

    pipeline = session.loaded.model.pipeline
    patches.setattr(pipeline, "unet", deepcopy(pipeline.unet))


def no_guards(session, patches):
    patches.setattr(session, "guarded", None)
    before = session.loaded.guarded
    object.__setattr__(session.loaded, "guarded", None)
    patches.callback(lambda: object.__setattr__(session.loaded, "guarded", before))


def other_judge(session, patches):
    judge = SimpleNamespace(id="yes", label_space=("skulls",), labels=("skulls",), threshold=1.0)
    judge.detect = lambda images: [SAFE for _ in images]
    patches.setattr(session.guarded.guards[-1], "judge", judge)


def other_guard(session, patches):
    guards = session.guarded.guards
    other = guards[-1].config.build(session.guarded.adapter)
    other.judge.detect = lambda images: [SAFE for _ in images]
    patches.setattr(session.guarded, "guards", [guards[0], other])


def set_on(target, name, value):
    return lambda session, patches: patches.setattr(target(session), name, value)


def last(session):
    return session.guarded.guards[-1]


CHANGES = {
    "guard-popped": lambda s, p: p.setattr(s.guarded, "guards", s.guarded.guards[:1]),
    "guards-cleared": set_on(lambda s: s.guarded, "guards", []),
    "guards-turned-around": lambda s, p: p.setattr(s.guarded, "guards", s.guarded.guards[::-1]),
    "no-guarded-pipeline": no_guards,
    "no-hook-points": set_on(last, "hook_points", frozenset()),
    "guard-without-results": set_on(last, "check_images", lambda images, prompts: []),
    "guard-raises": set_on(last, "check_images", lambda images, prompts: 1 / 0),
    "hooks-removed": clear_hooks,
    "patches-undone": undo_patches,
    "denoiser-replaced": replace_denoiser,
    "other-judge": other_judge,
    "other-guard": other_guard,
    "other-threshold": lambda s, p: p.setattr(last(s).judge, "threshold", 1.0),
    "no-labels": lambda s, p: p.setattr(last(s).judge, "labels", ()),
}
SESSION_ONLY = {
    "patches-undone",
    "denoiser-replaced",
    "other-judge",
    "other-guard",
    "other-threshold",
}
"""Changes that only the worker's session can notice; the release check notices the others too."""


class Patches(pytest.MonkeyPatch):
    """Monkey patches, and functions to call at the end."""

    def __init__(self):
        super().__init__()
        self.callbacks = []

    def callback(self, function):
        self.callbacks.append(function)

    def undo(self):
        super().undo()
        while self.callbacks:
            self.callbacks.pop()()


@pytest.fixture
def patches():
    patches = Patches()
    yield patches
    patches.undo()


@pytest.mark.parametrize(
    ("name", "checked"),
    [
        *((n, True) for n in sorted(CHANGES)),
        *((n, False) for n in sorted({*CHANGES} - SESSION_ONLY)),
    ],
)
def test_guards_and_patches_that_change_at_run_time_release_no_image(
    address, session, patches, name, checked
):
    if not checked:
        patches.setattr(session, "check_guards", lambda: None)
    CHANGES[name](session, patches)
    statuses = (503,) if checked else (503, 400)
    check_no_image(post(address, OPENAI), *statuses)
    patches.undo()
    session.check_guards()


SWITCHES = [
    {"guardrails": False},
    {"use_guardrails": False},
    {"extra_params": {"guardrails": False}},
    {"extra_params": {"use_guardrails": False}},
    {"extra_body": {"guardrails": False}},
    {"extra_args": {"guardrails": False}},
    {"diffusers_kwargs": {"safety_checker": None}},
    {"moderation": "low"},
    {"safety_checker": False},
    {"enable_safety_checker": False},
    {"disable_safety_checker": True},
    {"safegen": {"steps": 6, "seed": 1, "guards": []}},
    {"safegen": {"stack": "base"}},
    {"safegen": {"steps": 6, "seed": 1, "self_test": False}},
    {"model": "base"},
    {"stack": "base"},
    {"lora": {"name": "x", "scale": 0}},
    {"override_settings": {"filter_nsfw": False}},
    {"override_settings": {"sd_model_checkpoint": "base"}},
    {"alwayson_scripts": {"NSFW checker": {"args": [False]}}},
    {"script_name": "nsfw", "script_args": [False]},
]


@pytest.mark.parametrize("path", [OPENAI, A1111])
@pytest.mark.parametrize("fields", SWITCHES, ids=str)
def test_no_field_of_a_request_turns_a_guard_off(address, path, fields):
    check_no_image(post(address, path, steps=6, **fields), 400, 404)


@pytest.fixture(scope="module")
def light_address(serving):
    """Yield the address of a server with a worker process that loads no model."""
    config = ServerConfig(stacks=("s",), worker_timeout=1)
    with serving(config, LocalEngine(config, open_session=open_light)) as address:
        yield address


@pytest.mark.parametrize("word", ["hang", "kill", "exit", "memory", "poison", "function"])
def test_a_worker_that_fails_answers_503_and_works_again(light_address, word):
    check_no_image(post(light_address, OPENAI, word), 503)
    answer = post(light_address, OPENAI, "a castle")
    assert answer.status_code == 200
    assert len(list(images_in(answer.json()))) == 1


@pytest.mark.parametrize("word", ["hang", "kill", "memory"])
@pytest.mark.slow
def test_a_judge_that_hangs_or_kills_its_process_releases_no_image(serving, word):
    from faulty_sessions import open_faulty

    config = ServerConfig(
        stacks=("mini",),
        guards=("judge-filter",),
        concept="skulls",
        num_inference_steps=8,
        worker_timeout=10,
        threads=1,
    )
    with serving(config, LocalEngine(config, open_session=open_faulty)) as address:
        check_no_image(post(address, OPENAI, f"{SKULLS} {word}", 6), 503)
        check_no_image(post(address, OPENAI, steps=6), 400)
        assert post(address, OPENAI, "a castle in a field").status_code == 200


def safegen(*arguments, before="", timeout=120):
    """Run the command in a process of its own; `before` runs first."""
    code = f"{before}\nimport sys\nfrom safegen.cli import main\nsys.exit(main())"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def test_without_the_extra_the_command_names_it():
    before = "import sys; sys.modules['fastapi'] = None"
    done = safegen("serve", "--stack", "mini", before=before)
    assert done.returncode == 2
    assert done.stdout == ""
    assert 'pip install "safegen[serve]"' in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_judge_whose_extra_is_missing_is_named_at_the_start(monkeypatch):
    from safegen.core.errors import MissingExtraError

    monkeypatch.setitem(sys.modules, "nudenet", None)
    config = ServerConfig(stacks=("mini",), guards=("judge-filter",), concept="nudity")
    with pytest.raises(MissingExtraError, match=r"safegen\[nudenet\]"):
        with open_session(config, "mini"):
            pass


@pytest.mark.parametrize("what", ["patch", "model"])
def test_missing_weights_end_the_command_with_one_line(tmp_path, what):
    stack = "mini+missing.safetensors" if what == "patch" else str(tmp_path / "missing-model")
    done = safegen("serve", "--stack", stack, "--guard", "judge-filter", "--concept", "skulls")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "missing" in line
