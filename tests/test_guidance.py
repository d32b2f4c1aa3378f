"""Exact savings: the cached network is the plain one, and does less."""
import pytest
import torch
from formula import build, given, model

from nanodisco import guidance
from nanodisco.guidance import Guided, windowed, windows
from nanodisco.memo import Memo, of_each


def guided(variant="image", guidance=3.0, uncond=None, cache=True, times=None):
    """All pictures share one reference."""
    tokens, background = given("tokens")[:1], given("bg_latents")[:1]
    return Guided(model(variant), tokens, background, torch.zeros_like(tokens) if uncond is None else uncond,
                  guidance, 0.7, 1.3, cache, times)


@torch.no_grad()
def answers(net, z, pose):
    predict = net(pose)
    return torch.stack([predict(z, torch.full((len(z),), t, device=z.device)) for t in (801, 17)])


@pytest.mark.parametrize("variant", ["image", "temporal"])
@pytest.mark.parametrize("uncond", [None, "other"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_cached_network_gives_the_plain_answer(variant, uncond, guidance):
    z, pose = (given("latents"), given("pose")) if variant == "image" else (given("t_latents")[:1], given("t_pose")[:1])
    uncond = None if uncond is None else given("tokens")[1:]
    kept, plain = (answers(guided(variant, guidance, uncond, cache), z, pose) for cache in (True, False))
    assert (kept - plain).abs().max() <= 1e-5 * plain.abs().max()


def calls(path, net, steps=3):
    """How often a layer runs in so many steps, and on how many rows at most."""
    rows, layer = [], model("image").get_submodule(path)
    hook = layer.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    try:
        predict = net(given("pose"))
        with torch.no_grad():
            for t in range(steps):
                predict(given("latents"), torch.full((2,), 100 * t))
    finally:
        hook.remove()
    return len(rows), max(rows, default=0)


@pytest.mark.parametrize("uncond", [None, "other"])
def test_a_guided_step_stays_channels_last_from_end_to_end(uncond):
    """Where the halves part as well: the norms, which are everywhere, see nothing else."""
    net, seen = build("image").to(memory_format=torch.channels_last), []
    for module in net.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.register_forward_pre_hook(
                lambda module, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last)))
    tokens, background = given("tokens")[:1], given("bg_latents")[:1]
    uncond = torch.zeros_like(tokens) if uncond is None else given("tokens")[1:]
    with torch.no_grad():
        Guided(net, tokens, background, uncond, 3.0)(given("pose"))(given("latents"), torch.full((2,), 500))
    assert len(seen) > 50 and all(seen)


@pytest.mark.parametrize("path", ["pose.hint.conv_in", "background.hint", "unet.up.3.attn.0.block.cross_attn.kv",
                                  "pose.encoder.mid.attn.0.block.cross_attn.kv"])
def test_what_does_not_change_is_computed_once(path):
    assert calls(path, guided())[0] == 1 and calls(path, guided(cache=False))[0] == 3


@pytest.mark.parametrize("path, kept, plain", [
    ("unet.encoder.conv_in", 2, 4), ("unet.encoder.down.0.res.0", 2, 4),         # the halves are still the same
    ("unet.encoder.down.0.attn.0.block.self_attn", 2, 4), ("unet.encoder.down.0.res.1", 4, 4),
    ("unet.encoder.down.0.attn.0.block.cross_attn", 2, 4)])                      # zeros are not attended to
def test_rows_that_each_layer_works_on(path, kept, plain):
    assert calls(path, guided())[1] == kept and calls(path, guided(cache=False))[1] == plain


def test_time_embeddings_are_made_once_for_all_batches_of_frames():
    net = guided()
    assert calls("unet.encoder.time", net)[0] == 3 and calls("unet.encoder.time", net)[0] == 0


def test_memo_keeps_only_when_asked():
    made = []
    layer = lambda x: made.append(1) or x + 1                                    # noqa: E731
    for keep, wanted in ((False, 2), (True, 3)):
        memo = Memo(torch.ones(1), keep)
        assert memo.through(layer) == memo.through(layer) == 2 and len(made) == wanted


def test_rows_of_a_memo_are_made_all_at_once():
    made = []
    layer = lambda x: made.append(len(x)) or 2 * x                               # noqa: E731
    chained = {number: row.then(layer).through(torch.neg) for number, row in of_each([5, 1, 3]).items()}
    assert chained == {5: -10, 1: -2, 3: -6} and made == [3]


def test_steps_that_are_known_are_embedded_at_once():
    assert calls("unet.encoder.time", guided(times=of_each([0, 100, 200]))) == (1, 3)
    assert calls("unet.encoder.time", guided()) == (3, 1)


# ---- Windows ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("frames, window, overlap", [(40, 16, 4), (17, 16, 4), (16, 16, 4), (5, 16, 4), (33, 8, 0),
                                                     (9, 4, 3)])
def test_windows_cover_every_frame_with_the_overlap_or_more(frames, window, overlap):
    parts = windows(frames, window, overlap)
    assert {i for part in parts for i in part} == set(range(frames))
    assert all(len(part) == min(window, frames) for part in parts)
    assert all(one.stop - other.start >= overlap for one, other in zip(parts, parts[1:]))


@pytest.mark.parametrize("kept, times", [(2**28, 1), (0, 3)], ids=["once", "at each step of a track that is too long"])
def test_the_poses_of_a_window_are_looked_at(kept, times, monkeypatch):
    monkeypatch.setattr(guidance, "KEPT", kept)
    rows, layer = [], model("temporal").pose.hint.conv_in
    hook = layer.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    try:
        pose, z = given("t_pose")[:1, :, :3], given("t_latents")[:1, :, :3]
        predict = windowed(guided("temporal"), lambda part: pose[:, :, part.start:part.stop], windows(3, 2, 1))
        with torch.no_grad():
            for t in (801, 401, 17):
                predict(z, torch.full((1,), t))
    finally:
        hook.remove()
    assert rows == [2, 2] * times                                        # two windows of two frames


@pytest.mark.parametrize("kept", [0, 2**28])
def test_windows_that_agree_are_joined_without_a_trace(kept, monkeypatch):
    monkeypatch.setattr(guidance, "KEPT", kept)

    def same(pose):
        return lambda z, t: 2 * z
    z = torch.randn(1, 4, 9, 2, 2, generator=torch.Generator().manual_seed(0))
    joined = windowed(same, lambda part: torch.zeros(len(part)), windows(9, 4, 2))(z, torch.zeros(1))
    torch.testing.assert_close(joined, 2 * z)
