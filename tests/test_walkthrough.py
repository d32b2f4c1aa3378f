"""docs/walkthrough.md says what the code does: its numbers, its shapes, its links, and the answers to its exercises."""
import ast
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from formula import build, given, recorded
from torch.nn.functional import silu

from kernels import attention, group_norm_silu
from nanodisco import diffusion
from nanodisco.config import ModelConfig, load
from nanodisco.controlnet import ControlNet
from nanodisco.layers import ResBlock
from nanodisco.unet import UNet

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
CHAPTERS = dict(re.findall(r"^## \d+\. (\w+)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S))
OFFICIAL = ROOT / "config" / "model" / "sd-image-variations.yaml"


def answer(chapter: str) -> str:
    """The number in bold in a chapter's answer."""
    (found,) = re.findall(r"Answer</summary>.*?\*\*([\d.,]+)\*\*", CHAPTERS[chapter], re.S)
    return found


@cache
def full_size(*arguments: str) -> ModelConfig:
    return load(OFFICIAL, ModelConfig, list(arguments))


@cache
def on_meta(kind: str):
    """A network at its true size without memory for its values."""
    config = full_size()
    with torch.device("meta"):
        if kind == "video":
            return UNet(full_size("--unet.temporal=true").unet)
        return UNet(config.unet) if kind == "unet" else ControlNet(getattr(config, kind), config.unet)


def size(net) -> int:
    return sum(p.numel() for p in net.parameters())


def bars():
    return diffusion.alpha_bars(full_size().diffusion)


# ---- The exercises -------------------------------------------------------------------------------

def test_exercise_diffusion_what_is_left_of_the_signal_at_the_last_step():
    assert f"{bars()[-1].sqrt():.4f}" == answer("Diffusion")


def test_exercise_layers_only_a_pooled_norm_keeps_the_difference_between_frames():
    clip = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])     # (F, C, H, W)
    one, zero = torch.ones(1), torch.zeros(1)
    assert not group_norm_silu(clip, one, zero, 1, 1e-5, frames=1).any()
    pooled = group_norm_silu(clip, one, zero, 1, 1e-5, frames=2)
    assert f"{pooled[1].mean():.3f}" == answer("Layers")


def test_exercise_transformer_zero_tokens_are_looked_at_evenly_and_leave_only_the_bias():
    tokens = full_size().clip.tokens
    marks = torch.eye(tokens)[None, :, None]                             # values that show the weights
    weights = attention(torch.randn(1, 1, 1, tokens), torch.zeros(1, tokens, 1, tokens), marks)
    assert {f"{w:.5f}" for w in weights.flatten()} == {answer("Transformer")}
    cross = build("image").unet.encoder.mid.attn[0].block.cross_attn
    with torch.no_grad():
        out = cross(torch.randn(1, 3, 64), torch.zeros(1, 17, 32))
    assert torch.equal(out, cross.out.bias.expand(1, 3, 64))


def test_exercise_unet_channels_that_the_first_resblock_of_the_finest_level_reads():
    widths = [res.conv1.in_channels for res in on_meta("unet").up[-1].res]
    assert str(widths[0]) == answer("UNet")
    assert "read {}, {} and {}".format(*widths) in " ".join(CHAPTERS["UNet"].split())


def test_exercise_controlnet_only_the_last_zero_convolutions_learn_in_the_first_step():
    def behind_the_encoder(net):
        return [*net.zero_skips, net.zero_mid]

    assert f"{sum(size(zero) for zero in behind_the_encoder(on_meta('pose'))):,}" == answer("ControlNet")
    net = build("image").pose
    for zero in (*behind_the_encoder(net), net.hint.conv_out):
        zero.reset_parameters()
    sum(r.square().mean() + r.mean() for r in net(given("latents"), given("timesteps"), given("tokens"), given("pose"))
        ).backward()
    learning = {name.split(".")[0] for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {"zero_skips", "zero_mid"}


# ---- The other numbers -----------------------------------------------------------------------------

@pytest.mark.parametrize("row, values", [("what is left of the signal", lambda a: a.sqrt()),
                                         ("signal-to-noise ratio", lambda a: a / (1 - a))])
def test_the_table_of_the_schedule_is_right(row, values):
    (line,) = [line for line in CHAPTERS["Diffusion"].splitlines() if row in line]
    written = [float(cell) for cell in line.split("|")[2:-1]]
    torch.testing.assert_close(torch.tensor(written), values(bars())[[0, 250, 500, 750, 999]], rtol=5e-4, atol=5e-5)


def test_the_last_step_of_ddim_is_at_the_written_value():
    assert f"{bars()[0]:.5f}" in CHAPTERS["Diffusion"]


@pytest.mark.parametrize("net, chapter", [("unet", "UNet"), ("video", "UNet"), ("pose", "ControlNet"),
                                          ("background", "ControlNet")])
def test_counts_of_values_are_right(net, chapter):
    assert f"{size(on_meta(net)):,}" in CHAPTERS[chapter]


def test_the_shapes_on_the_way_down_and_the_number_of_skips_are_right():
    unet = on_meta("unet")
    z, t, tokens = torch.empty(1, 4, 32, 32, device="meta"), torch.zeros(1, device="meta"), torch.empty(
        1, 257, 768, device="meta")
    paths = {"conv_in": "encoder.conv_in", "level 0": "encoder.down.0.down", "level 1": "encoder.down.1.down",
             "level 2": "encoder.down.2.down", "level 3": "encoder.down.3.res.1", "middle": "encoder.mid",
             "norm": "conv_out"}
    with recorded(unet, paths) as seen:
        unet(z, t, tokens)
    for start, tensor in seen.items():
        (line,) = [line for line in CHAPTERS["UNet"].splitlines() if line.startswith(f"| {start}")]
        assert "(B·F, {}, {}, {})".format(*tensor.shape[1:]) in line
    assert f"takes all {len(unet.encoder.widths_of_skips)}" in CHAPTERS["UNet"]


def test_the_shapes_inside_a_transformer_are_right():
    unet, text = on_meta("unet"), CHAPTERS["Transformer"]
    block = unet.encoder.down[0].attn[0].block
    heads, width = block.self_attn.heads, block.self_attn.out.in_features
    assert f"3 × (B·F, {32 * 32}, {heads}, {width // heads})" in text
    assert f"2 × (B, {full_size().clip.tokens}, {heads}, {width // heads})" in text
    assert f"(B·F, {32 * 32}, {block.ff.up.out_features}), gated to {block.ff.down.in_features}" in text
    assert f"tokens (B, {full_size().clip.tokens}, {block.cross_attn.kv.in_features})" in text


def test_the_time_is_added_as_one_number_a_channel():
    with torch.device("meta"):
        res, emb = ResBlock(320, 640, 32, 1e-5, 1280), torch.empty(1, 1280)
        assert res.time(silu(emb)).shape == (1, 640)
        assert res(torch.empty(1, 320, 16, 16), emb).shape == (1, 640, 16, 16)


# ---- Links -----------------------------------------------------------------------------------------

LINKS = sorted(set(re.findall(r"\[`?([^\]`]+)`?\]\(\.\./([^)]+)\)", TEXT)))


@pytest.mark.parametrize("symbol, target", LINKS)
def test_every_link_leads_to_a_file_that_defines_the_symbol(symbol, target):
    path = ROOT / target
    assert path.exists()
    if f"[`{symbol}`]" in TEXT:
        defined = {node.name for node in ast.walk(ast.parse(path.read_text()))
                   if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
        assert symbol in defined


def test_every_chapter_has_one_exercise_with_an_answer():
    assert list(CHAPTERS) == ["Diffusion", "Layers", "Transformer", "UNet", "ControlNet"]
    assert all(text.count("**Exercise.**") == 1 and answer(name) for name, text in CHAPTERS.items())
