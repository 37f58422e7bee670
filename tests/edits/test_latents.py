"""Encoding of triplets: in batches, with progress, and kept for a resumed training."""

from __future__ import annotations

import pytest
import torch

from safegen.edits.safegen import SafeGen
from safegen.edits.training import samples
from safegen.edits.training.config import Training
from safegen.edits.training.latents import LATENTS, LatentStore, latent_storage, latents_key
from safegen.edits.training.samples import encode_triplets


@pytest.fixture
def count(tiny_model, monkeypatch):
    """Return a list that grows by the number of images of each call of the autoencoder."""
    encoded, plain = [], tiny_model.vae.encode

    def spy(pixels, *args, **kwargs):
        encoded.append(len(pixels))
        return plain(pixels, *args, **kwargs)

    monkeypatch.setattr(tiny_model.vae, "encode", spy)
    monkeypatch.setattr(samples, "TRIPLETS_PER_BATCH", 2)
    return encoded


def test_batches_have_the_latents_of_all_at_once_and_progress(tiny_model, triplets, count):
    whole = encode_triplets(tiny_model, triplets, flip=True)
    n, seen = len(triplets), []
    assert n % 2 == 0
    assert count == [2] * (3 * 2 * n // 2)
    with latent_storage(progress=lambda *call: seen.append(call)):
        again = encode_triplets(tiny_model, triplets, flip=True)
    assert torch.equal(again, whole)
    assert whole.shape[:3] == (3, 2, n)
    assert seen == [("encoding triplets", done, n) for done in (*range(0, n, 2), n)]


def test_kept_latents_are_not_encoded_again(tiny_model, triplets, count, tmp_path):
    with latent_storage(tmp_path):
        first = encode_triplets(tiny_model, triplets, flip=False)
        count.clear()
        assert torch.equal(encode_triplets(tiny_model, triplets, flip=False), first)
        assert not count
        files = sorted((tmp_path / LATENTS).iterdir())
        assert len(files) == len(triplets) // 2
        files[0].unlink()
        files[1].write_bytes(files[1].read_bytes()[:-9])  # as a full disk or a crash leaves it
        assert torch.equal(encode_triplets(tiny_model, triplets, flip=False), first)
        assert count == [2] * 6
        count.clear()
        assert encode_triplets(tiny_model, triplets, flip=True).shape[1] == 2
        assert len(count) == 6 * len(triplets) // 2
    count.clear()
    encode_triplets(tiny_model, triplets, flip=False)  # outside of the block
    assert count


def test_a_stop_while_encoding_keeps_what_is_done(tiny_model, triplets, count, tmp_path):
    def stop(description, done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), latent_storage(tmp_path, stop):
        encode_triplets(tiny_model, triplets, flip=False)
    assert count == [2] * 3
    with latent_storage(tmp_path):
        encode_triplets(tiny_model, triplets, flip=False)
    assert len(count) == 3 * len(triplets) // 2


def test_latents_are_of_one_autoencoder_and_of_the_images(make_model, triplets):
    model = make_model()
    rows = triplets.rows
    keys = {latents_key(model, rows, flip=flip) for flip in (False, True)}
    keys.add(latents_key(model, rows[1:], flip=False))
    keys.add(latents_key(model, rows[::-1], flip=False))
    model.vae.encoder.conv_in.weight.data[0, 0, 0, 0] += 1e-3
    keys.add(latents_key(model, rows, flip=False))
    model.vae.register_to_config(scaling_factor=0.5)
    keys.add(latents_key(model, rows, flip=False))
    model.denoiser.register_to_config(sample_size=16)
    keys.add(latents_key(model, rows, flip=False))
    assert len(keys) == 7


def test_one_of_several_processes_writes(tiny_model, triplets, tmp_path):
    with latent_storage(tmp_path, writes=False):
        encode_triplets(tiny_model, triplets, flip=False)
    assert not list(tmp_path.iterdir())
    store = LatentStore(tmp_path)
    assert torch.equal(store.encode("a", "k", lambda: torch.ones(2)), torch.ones(2))
    assert torch.equal(store.encode("a", "k", lambda: torch.zeros(2)), torch.ones(2))
    assert torch.equal(store.encode("a", "other", lambda: torch.zeros(2)), torch.zeros(2))


def test_a_resumed_training_reads_latents_and_ends_with_the_same_patch(
    tiny_model, triplets, count, tmp_path
):
    training = Training(updates=3, batch=2, accumulation=1, validate_every=0)
    edit = SafeGen(training=training, captions=())

    def run(folder, **options):
        return edit.apply(tiny_model, triplets, checkpoint_dir=folder, **options)

    whole = run(tmp_path / "whole")
    run(tmp_path / "part", callback=lambda done, total, row: done == 1)
    count.clear()
    assert run(tmp_path / "part", resume=True).hash == whole.hash
    assert not count
