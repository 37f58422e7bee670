"""Crafted patches and LoRAs: one line that names the file, and no wrong success."""

from __future__ import annotations

import json
import os
import struct
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from safegen.core.errors import SafegenError
from safegen.models.checkpoint.metadata import PATCH_FORMAT, PatchMetadata
from safegen.patches.active_lora import active_loras
from safegen.patches.arithmetic import compare
from safegen.patches.lora import extract_lora, save_lora
from safegen.patches.lora_reader import load_lora, read_lora
from safegen.patches.patch import LargeChangeWarning, Patch
from safegen.workflows.export import save_patch

HEADER = {"format": PATCH_FORMAT, "metadata": "{}"}


@pytest.fixture(scope="module")
def patch(tiny_model):
    own = dict(tiny_model.denoiser.named_parameters())
    names = [name for name in own if ".attn1.to_q.weight" in name][:2]
    generator = torch.Generator().manual_seed(0)
    tensors = {n: own[n] + 0.01 * torch.randn(own[n].shape, generator=generator) for n in names}
    return Patch(tensors, PatchMetadata(method="uce", base=tiny_model.hash))


@pytest.fixture(scope="module")
def patch_file(patch, tmp_path_factory):
    path = tmp_path_factory.mktemp("patch") / "p.safetensors"
    patch.save(path)
    return path


@pytest.fixture(scope="module")
def lora_file(patch, tiny_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "l.safetensors"
    save_lora(extract_lora(patch, tiny_model, 2), tiny_model, path, dtype=torch.float32)
    return path


def split(path):
    """Return the header of a safetensors file as a dictionary, and its data."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header, data, length=None):
    """Return the bytes of a safetensors file."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def refusal(call, path):
    """Return the message of the error that a call raises; it is one line and names the file."""
    with pytest.raises(SafegenError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    assert len(message) < 1500
    assert path.name in message
    return message


# ------------------------------------------------------------ bytes

LENGTHS = [0, 1, 10**8, 2**31, 2**63, 2**64 - 1]


@pytest.mark.parametrize("length", LENGTHS)
def test_a_header_longer_than_the_file_is_refused(patch_file, tmp_path, length):
    path = tmp_path / "x.safetensors"
    path.write_bytes(join(*split(patch_file), length=length))
    refusal(lambda: Patch.load(path), path)


ENTRIES = {
    "a trillion numbers": {"shape": [10**6, 10**6]},
    "an overflowing size": {"shape": [2**32] * 3},
    "a negative size": {"shape": [-1, 4]},
    "a size that is text": {"shape": "x"},
    "no values": {"shape": [0, 16]},
    "reversed offsets": {"data_offsets": [100, 0]},
    "offsets beyond the file": {"data_offsets": [0, 2**62]},
    "an unknown type": {"dtype": "F7"},
    "no type": {"dtype": None},
}


@pytest.mark.parametrize("entry", sorted(ENTRIES))
def test_a_header_that_contradicts_the_data_is_refused(patch_file, tmp_path, entry):
    header, data = split(patch_file)
    next(value for name, value in header.items() if name != "__metadata__").update(ENTRIES[entry])
    path = tmp_path / "x.safetensors"
    path.write_bytes(join(header, data))
    refusal(lambda: Patch.load(path), path)


TEXTS = [b"[]", b"{", b"\xff" * 9, b'{"a":' * 10**5, b"[" * 10**5 + b"]" * 10**5, b"null"]
TEXTS += [
    b"1" + b"0" * 400,
    b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,1' + b"0" * 400 + b"]}}",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_header_of_another_kind_is_refused(tmp_path, text):
    path = tmp_path / "x.safetensors"
    path.write_bytes(join(text, b""))
    refusal(lambda: Patch.load(path), path)


@pytest.mark.parametrize("name", ["\x1b[31m", "a\nb", "", "n" * 501])
def test_a_name_that_cannot_be_printed_is_refused(patch_file, tmp_path, name):
    header, data = split(patch_file)
    first = next(key for key in header if key != "__metadata__")
    header[name] = header.pop(first)
    path = tmp_path / "x.safetensors"
    path.write_bytes(join(header, data))
    assert "printable characters" in refusal(lambda: Patch.load(path), path)


def test_a_name_that_stands_twice_is_refused(patch_file, tmp_path):
    header, data = split(patch_file)
    first = next(key for key in header if key != "__metadata__")
    text = json.dumps(header)[:-1] + f", {json.dumps(first)}: {json.dumps(header[first])}}}"
    path = tmp_path / "x.safetensors"
    path.write_bytes(join(text.encode(), data))
    assert "more than once" in refusal(lambda: Patch.load(path), path)


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "device", "missing"])
def test_what_is_no_regular_file_is_refused(tiny_model, tmp_path, kind):
    path = tmp_path / "x.safetensors"
    make = {
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "loop": lambda: path.symlink_to(path.name),
        "device": lambda: path.symlink_to("/dev/zero"),
        "missing": lambda: None,
    }
    make[kind]()
    refusal(lambda: Patch.load(path), path)
    refusal(lambda: load_lora(path, tiny_model), path)


# ------------------------------------------------------------ values

DTYPES = ["int8", "uint8", "int32", "int64", "bool", "float64", "complex64"]
DTYPES += ["float8_e4m3fn", "float8_e5m2"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_other_types_are_refused(patch_file, lora_file, tiny_model, tmp_path, dtype):
    path = tmp_path / "x.safetensors"
    for file, header, read in (
        (patch_file, HEADER, Patch.load),
        (lora_file, None, lambda path: read_lora(path, tiny_model)),
    ):
        tensors = load_file(file)
        tensors |= {k: (v * 100).to(getattr(torch, dtype)) for k, v in tensors.items() if v.ndim}
        save_file(tensors, path, metadata=header)
        if (dtype, file) == ("float64", lora_file):  # its product is computed in fp64
            assert read(path).factors
            continue
        message = refusal(lambda read=read: read(path), path)
        assert f"fp32, fp16 or bf16, got {dtype} in" in message


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_weights_of_three_types_are_read(patch_file, lora_file, tiny_model, tmp_path, dtype):
    for file, header, read in (
        (patch_file, HEADER, Patch.load),
        (lora_file, None, lambda path: load_lora(path, tiny_model)),
    ):
        tensors = {k: v.to(getattr(torch, dtype)) for k, v in load_file(file).items()}
        save_file(tensors, tmp_path / "x.safetensors", metadata=header)
        assert read(tmp_path / "x.safetensors").tensors


@pytest.mark.parametrize("factor", [12.0, 1e6, 1e38])
def test_a_change_beyond_the_size_of_the_weights_is_warned_about(make_model, patch, factor):
    model = make_model()
    own = dict(model.denoiser.named_parameters())
    wild = Patch({n: (own[n] * factor).clamp(-3e38, 3e38) for n in patch.names})
    with (
        pytest.warns(LargeChangeWarning, match="at most 10 times the size of the weights, got "),
        wild.apply(model),
    ):
        pass
    calm = Patch({n: own[n] * 10.5 for n in patch.names})  # the change is 9.5 times the weights
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with calm.apply(model):
            pass


def test_a_wild_lora_is_warned_about_as_patch_and_beside_the_weights(
    lora_file, tiny_model, tmp_path
):
    with pytest.warns(LargeChangeWarning, match="change by the LoRA should be at most 10 times"):
        load_lora(lora_file, tiny_model, scale=1000)
    with (
        pytest.warns(LargeChangeWarning, match="LoRA"),
        active_loras(tiny_model, [(read_lora(lora_file, tiny_model), 1000.0)]),
    ):
        pass


ALPHAS = [float("nan"), float("inf"), -1e38, 1e38, 2001.0, 0.0]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_an_alpha_out_of_bounds_is_refused(lora_file, tiny_model, tmp_path, alpha):
    path = tmp_path / "x.safetensors"
    tensors = load_file(lora_file)
    save_file(
        {k: torch.tensor(alpha) if k.endswith(".alpha") else v for k, v in tensors.items()}, path
    )
    message = refusal(lambda: load_lora(path, tiny_model), path)
    wanted = f"must be from -1000 to 1000, got {alpha / 2:g}" if alpha else "must not be 0 in every"
    assert wanted in message


def test_factors_and_alphas_of_fp64_change_as_those_of_fp32(lora_file, tiny_model, tmp_path):
    tensors = load_file(lora_file)
    save_file({k: v.double() for k, v in tensors.items()}, tmp_path / "x.safetensors")
    found = load_lora(tmp_path / "x.safetensors", tiny_model).tensors
    for name, value in load_lora(lora_file, tiny_model).tensors.items():
        assert torch.equal(found[name], value)


def test_a_module_of_alpha_0_is_left_out(lora_file, tiny_model, tmp_path):
    tensors, wanted = load_file(lora_file), load_lora(lora_file, tiny_model).tensors
    first = next(k for k in tensors if k.endswith(".alpha"))
    save_file(tensors | {first: torch.tensor(0.0)}, tmp_path / "x.safetensors")
    found = load_lora(tmp_path / "x.safetensors", tiny_model).tensors
    assert len(found) == len(wanted) - 1
    assert all(torch.equal(found[name], wanted[name]) for name in found)


@pytest.mark.parametrize(
    ("alpha", "words"),
    [
        (torch.tensor(True), "alpha must be a number"),
        (torch.tensor(1j), "alpha must be a number"),
        (torch.ones(2), "the weight is"),
        (torch.ones(0), "the weight is"),
    ],
)
def test_an_alpha_of_another_kind_is_refused(lora_file, tiny_model, tmp_path, alpha, words):
    path = tmp_path / "l.safetensors"
    tensors = load_file(lora_file)
    save_file({k: alpha.clone() if k.endswith(".alpha") else v for k, v in tensors.items()}, path)
    with pytest.raises(SafegenError, match=words):
        load_lora(path, tiny_model)


@pytest.mark.parametrize("text", ["1e999", "1" * 400, "true", "[1]", "1e38", "NaN"])
def test_an_alpha_in_the_header_is_a_bounded_number(lora_file, tiny_model, tmp_path, text):
    path = tmp_path / "l.safetensors"
    tensors = {k: v for k, v in load_file(lora_file).items() if not k.endswith(".alpha")}
    header = {"lora_adapter_metadata": f'{{"unet.lora_alpha": {text}}}'}
    save_file(tensors, path, metadata=header)
    refusal(lambda: load_lora(path, tiny_model), path)


def test_a_weight_with_factors_under_two_names_is_refused(patch, lora_file, tiny_model, tmp_path):
    other, path = tmp_path / "diffusers.safetensors", tmp_path / "l.safetensors"
    save_lora(extract_lora(patch, tiny_model, 2), tiny_model, other, keys="diffusers")
    save_file(load_file(lora_file) | load_file(other), path)
    assert "under two names" in refusal(lambda: load_lora(path, tiny_model), path)


@pytest.mark.parametrize("change", ["transposed", "flat", "one number"])
def test_a_patch_of_other_shapes_is_refused_by_all_that_compare_it(
    make_model, patch, tmp_path, change
):
    shape = {
        "transposed": lambda value: value[:, :-1],
        "flat": torch.Tensor.flatten,
        "one number": lambda value: value[0, 0],
    }
    strange, model = Patch({n: shape[change](v) for n, v in patch.tensors.items()}), make_model()
    for call in (strange.describe_change, strange.apply, strange.check_compatible):
        with pytest.raises(SafegenError, match="does not fit the model 'tiny'"):
            call(model)
    assert compare(strange, patch)["shapes"]


# ------------------------------------------------------------ metadata


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("method", "\x1b[31m"),
        ("family", "a\nb"),
        ("method", "x" * 501),
        ("updates", -1),
        ("seconds", -0.5),
        ("settings", [1]),
        ("settings", {"erase": 3}),
        ("settings", {"erase": [None]}),
        ("settings", {"erase": ["x"], "debias": {"a": "b"}}),
        ("parts", [{"hash": "x"}]),
        ("metrics", [3]),
    ],
)
def test_metadata_that_break_their_schema_are_refused(
    patch_file, lora_file, tiny_model, tmp_path, key, value
):
    path = tmp_path / "x.safetensors"
    text = json.dumps({key: value})
    save_file(load_file(patch_file), path, metadata=HEADER | {"metadata": text})
    assert key in refusal(lambda: Patch.load(path), path)
    save_file(load_file(lora_file), path, metadata={"safegen": text})
    assert key in refusal(lambda: load_lora(path, tiny_model), path)


def test_a_patch_made_from_many_has_a_card(patch, tmp_path):
    metadata = {}
    for _ in range(30):  # ninety levels
        metadata = {"parts": [{"hash": "0" * 64, "metadata": metadata}]}
    path = tmp_path / "x.safetensors"
    save_file(dict(patch.tensors), path, metadata=HEADER | {"metadata": json.dumps(metadata)})
    save_patch(Patch.load(path), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors.md").read_text().count("0" * 64) == 30


METADATA = [
    '{"settings": ' + '{"a":' * 10**5,
    '{"settings": ' + '{"a":' * 200 + "1" + "}" * 201,
    '{"seconds": NaN}',
    '{"settings": {"a": 1e999}}',
    '{"method": "\\ud800"}',
]


@pytest.mark.parametrize("text", METADATA)
def test_metadata_that_are_no_plain_json_are_refused(
    patch_file, lora_file, tiny_model, tmp_path, text
):
    path = tmp_path / "x.safetensors"
    save_file(load_file(patch_file), path, metadata=HEADER | {"metadata": text})
    refusal(lambda: Patch.load(path), path)
    for key in ("safegen", "lora_adapter_metadata"):
        save_file(load_file(lora_file), path, metadata={key: text})
        refusal(lambda: load_lora(path, tiny_model), path)


# ------------------------------------------------------------ anything

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
FIELDS = st.sampled_from(sorted(PatchMetadata.model_fields))
FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def survives(call):
    """Check that a call succeeds or raises one printable line."""
    message = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except SafegenError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1
    assert message.isprintable()


@FUZZ
@given(metadata=st.dictionaries(FIELDS | st.text(max_size=8), JSON, max_size=3))
def test_any_metadata_are_read_or_refused(patch_file, lora_file, tiny_model, tmp_path, metadata):
    path, text = tmp_path / "x.safetensors", json.dumps(metadata)
    save_file(load_file(patch_file), path, metadata=HEADER | {"metadata": text})
    survives(lambda: Patch.load(path).describe_change(tiny_model))
    for key in ("safegen", "lora_adapter_metadata"):
        save_file(load_file(lora_file), path, metadata={key: text})
        survives(lambda: load_lora(path, tiny_model))


@FUZZ
@given(data=st.data())
def test_any_header_is_read_or_refused(patch_file, lora_file, tiny_model, tmp_path, data):
    path = tmp_path / "x.safetensors"
    header, content = split(data.draw(st.sampled_from([patch_file, lora_file])))
    key = data.draw(st.sampled_from(sorted(header)))
    field = data.draw(st.sampled_from([*sorted(header[key]), "more"]))
    header[key][field] = data.draw(JSON)
    path.write_bytes(join(header, content))
    survives(lambda: Patch.load(path).describe_change(tiny_model))
    survives(lambda: load_lora(path, tiny_model))


@FUZZ
@given(data=st.data())
def test_any_damaged_byte_is_read_or_refused(patch_file, lora_file, tiny_model, tmp_path, data):
    path = tmp_path / "x.safetensors"
    content = bytearray(data.draw(st.sampled_from([patch_file, lora_file])).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    survives(lambda: Patch.load(path).describe_change(tiny_model))
    survives(lambda: load_lora(path, tiny_model))
