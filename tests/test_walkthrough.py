"""docs/walkthrough.md says what the code does: its numbers, its shapes, its links, and the answers to its exercises."""
import ast
import re
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from formula import build, given, model, recorded
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from kernels import cross_attention, group_norm_silu
from nanodisco import (dancers, diffusion, guidance, optim, pose, sampling, shapes, temporal, transformer, transforms,
                       unet, vae)
from nanodisco.config import ModelConfig, load
from nanodisco.controlnet import ControlNet
from nanodisco.disco import Conditions, DisCo
from nanodisco.guidance import windowed, windows
from nanodisco.layers import ResBlock, time_features
from nanodisco.memo import Memo
from nanodisco.temporal import TemporalAttention, fold, unfold
from nanodisco.transformer import Context, CrossAttention, SelfAttention, SpatialTransformer
from nanodisco.unet import UNet

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
CHAPTERS = {name: " ".join(text.split()) for name, text in           # line breaks mean nothing
            re.findall(r"^## \d+\. (\w+)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)}
ROWS = [line for line in TEXT.splitlines() if line.startswith("|")]
OFFICIAL = ROOT / "config" / "model" / "sd-image-variations.yaml"


def says(chapter: str, *statements: str) -> None:
    for statement in statements:
        assert statement in CHAPTERS[chapter]


def answers(chapter: str) -> list[str]:
    """The numbers in bold in a chapter's answer."""
    (text,) = re.findall(r"<details>.*?</details>", CHAPTERS[chapter])
    return re.findall(r"\*\*([\d.,]+)\*\*", text)


def row(start: str) -> str:
    (found,) = [line for line in ROWS if line.startswith(f"| {start}")]
    return found


@cache
def full_size(*arguments: str) -> ModelConfig:
    return load(OFFICIAL, list(arguments))


@cache
def on_meta(kind: str, *arguments: str):
    """A network at its true size without memory for its values.   kind: unet | pose | background | all"""
    config = full_size(*arguments)
    with torch.device("meta"):
        if kind == "all":
            return DisCo(config)
        return UNet(config.unet) if kind == "unet" else ControlNet(getattr(config, kind), config.unet)


def size(*nets) -> int:
    return sum(p.numel() for net in nets for p in net.parameters())


def bars():
    return diffusion.alpha_bars(full_size().diffusion)


def zero_convolutions(net: ControlNet) -> list:
    """Those behind the encoder."""
    return [*net.zero_skips, net.zero_mid]


def fresh_pose_net() -> ControlNet:
    """Tiny; the networks of formula.py have no zeros, so they are put back."""
    net = build("image").pose
    for zero in (*zero_convolutions(net), net.hint.conv_out):
        zero.reset_parameters()
    return net


# ---- The exercises -------------------------------------------------------------------------------

def test_exercise_diffusion_a_small_step_forgives_what_a_jump_would_not():
    (first, second), wrong = sampling.timesteps("ddim", 50, 1000)[:2], 0.1
    a, a_next = bars()[[first, second]].tolist()
    z, eps = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
    right, other = (diffusion.split(out, z, a, "epsilon") for out in (eps, eps + wrong))
    says("Diffusion", f"first of 50 DDIM steps goes from $t = {first}$ to {second}", f"{a:.5g} and {a_next:.5g}",
         f"is wrong by {wrong}.", f"by ${wrong} \\sqrt{{(1 - a)/a}}$ = {(right[0] - other[0]).abs().mean():.3g},")
    assert set(re.findall(r"[za]_\{(\d+)\}", CHAPTERS["Diffusion"])) == {str(second)}
    right, other = (diffusion.ddim_step(*both, a, a_next) for both in (right, other))
    assert [f"{(right - other).abs().mean():.3g}"] == answers("Diffusion")


def test_exercise_layers_only_a_pooled_norm_keeps_the_difference_between_frames():
    clip = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])     # (F, C, H, W)
    one, zero = torch.ones(1), torch.zeros(1)
    assert not group_norm_silu(clip, one, zero, 1, 1e-5, frames=1).any()
    pooled = group_norm_silu(clip, one, zero, 1, 1e-5, frames=2)
    assert [f"{pooled[1].mean():.3f}"] == answers("Layers")


def multiply_adds(module, *inputs) -> dict[str, int]:
    """Of each matrix product: `bmm` are those of the attention itself, the others those of linear layers."""
    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    return {str(op): flops // 2 for op, flops in counter.get_flop_counts()["Global"].items()}


def test_exercise_transformer_self_attention_grows_nearly_as_the_square_of_the_pixels():
    with torch.device("meta"):
        own, cross, tokens = SelfAttention(320, 8), CrossAttention(320, 8, 768), torch.empty(1, 257, 768)
        small, large = torch.empty(1, 32 * 32, 320), torch.empty(1, 64 * 64, 320)
    before, after = multiply_adds(own, small), multiply_adds(own, large)
    grown = sum(after.values()) / sum(before.values())
    assert [f"{grown:.3g}"] == answers("Transformer")
    scores = before["aten.bmm"]
    length, width = small.shape[1:]
    assert sum(before.values()) - scores == 4 * length * width ** 2 and scores == 2 * length ** 2 * width
    says("Transformer", "cost $4 L D^2$", "mean $2 L^2 D$", "from 256 × 256 to 512 × 512",
         f"From L = {length} to {large.shape[1]}", f"it meets {tokens.shape[1]} tokens")
    says("Transformer", f"{(sum(before.values()) - scores) / 1e9:.3f} billion, grows by 4",
         f"{scores / 1e9:.3f} billion, by 16",
         f"{sum(before.values()) / 1e9:.3f} to {sum(after.values()) / 1e9:.3f} billion")
    assert after["aten.bmm"] == 16 * scores
    grown = sum(multiply_adds(cross, large, tokens).values()) / sum(multiply_adds(cross, small, tokens).values())
    says("Transformer", f"Cross-attention grows by {grown:.3g} only")


def test_exercise_unet_channels_that_the_first_resblock_of_the_finest_level_reads():
    widths = [res.conv1.in_channels for res in on_meta("unet").up[-1].res]
    assert [str(widths[0])] == answers("UNet")
    below = on_meta("unet").up[-2].up.conv.out_channels
    says("UNet", "read {}, {} and {}".format(*widths),
         f"hands up {below}, the newest skip of the finest level has {widths[0] - below}: ")


def test_exercise_controlnet_what_learns_in_which_step():
    def learning():
        sum((r - 1).square().mean()
            for r in net(given("latents"), given("timesteps"), given("tokens"), given("pose"))).backward()
        return {name for name, p in net.named_parameters() if p.grad.any()}

    net = fresh_pose_net()
    optimizer, steps = torch.optim.SGD(net.parameters(), lr=0.01), []
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        steps.append(learning())
        optimizer.step()
    everything = {name for name, _ in net.named_parameters()}
    assert steps[0] == {name for name in everything if name.startswith("zero_")}
    assert steps[1] == {name for name in everything if not name.startswith(("hint.conv_in", "hint.blocks"))}
    assert steps[2] == everything
    counted = size(*zero_convolutions(on_meta("pose")))
    assert [f"{counted:,}", str(len(steps))] == answers("ControlNet")
    says("ControlNet", f"about {100 * counted / size(on_meta('pose')):.1f} %", f"its {size(on_meta('pose')):,} values",
         f"the {len(zero_convolutions(on_meta('pose')))} zero convolutions",
         "four skips of 320 channels, three of 640, five of 1280, and the middle's 1280",
         "open in step 1, the one at the end of the hint in step 2, and in step **3**")
    widths = [zero.out_channels for zero in zero_convolutions(on_meta("pose"))]
    assert [widths[:-1].count(w) for w in (320, 640, 1280)] == [4, 3, 5] and widths[-1] == 1280


def test_exercise_conditions_pixels_of_a_large_photo_that_clip_sees():
    photo = torch.zeros(1, 1, 2160, 2160, requires_grad=True)
    size = full_size().clip.image_size
    torch.nn.functional.interpolate(photo, (size, size), mode="bicubic", align_corners=False).sum().backward()
    assert [f"{100 * (photo.grad != 0).float().mean():.3g}"] == answers("Conditions")
    says("Conditions", f"2160 × 2160 pixels is shrunk to {size} × {size}",
         f"2160/{size} = {2160 / size:.2f} pixels apart", f"4 · {size} = {4 * size} columns", f"({4 * size}/2160)^2")


def test_exercise_sampling_the_share_of_a_window():
    parts = windows(40, 16, 4)
    says("Sampling", "A clip of 40 frames is made in windows of 16 that share 4. At frame 13,",
         "frames {} to {}, {} to {} and {} to {}.".format(*(end for part in parts for end in (part[0], part[-1]))))
    ask = windowed(lambda pose: lambda z, t: torch.full_like(z, float(pose[0] == 0)),         # only the first says 1
                   lambda part: torch.tensor(part), parts)
    share = ask(torch.zeros(1, 1, 40, 1, 1), torch.zeros(1)).flatten()
    assert [f"{share[13]:.1f}"] == answers("Sampling")
    torch.testing.assert_close(share[14], 1 - share[13])
    says("Sampling", "the third from the end of the first and the second of the next: weights 3 and 2")


def test_exercise_dancers_a_small_disc_covers_a_little_more_than_its_area():
    canvas = shapes.Canvas(np.zeros((8, 8, 3), np.float32))
    canvas.paint(shapes.ellipse((0.5, 0.5), 2 / 8, 2 / 8), np.ones(3, np.float32))
    covered = canvas.pixels[..., 0]
    assert [f"{covered.sum():.3g}"] == answers("Dancers")
    quarter = sorted(covered[:4, :4][covered[:4, :4] > 0])[::-1]
    says("Dancers", f"covered by 1, {quarter[1]:.3f} and {quarter[3]:.3f}", f"$4 \\pi$ = {4 * np.pi:.2f}",
         f"{100 * (covered.sum() / (4 * np.pi) - 1):.0f} % too much")
    assert len(quarter) == 4 and quarter[0] == 1 and quarter[1] == quarter[2]


# ---- The other numbers -----------------------------------------------------------------------------

@pytest.mark.parametrize("start, values", [("$\\sqrt{a_t}$, what is left of the signal", lambda a: a.sqrt()),
                                           ("signal-to-noise ratio", lambda a: a / (1 - a))])
def test_the_table_of_the_schedule_is_right(start, values):
    written = [cell.strip() for cell in row(start).split("|")[2:-1]]
    digits = [len(cell.replace(".", "").lstrip("0")) for cell in written]
    steps = [int(cell) for cell in row("t |").split("|")[2:-1]]
    exact = values(bars().double())[steps].tolist()
    assert written == [f"{x:#.{n}g}".rstrip(".") for x, n in zip(exact, digits)]


def test_the_ends_of_the_schedule_are_as_written():
    last, first = bars()[-1].sqrt(), bars()[0]
    says("Diffusion", f"at $t = {len(bars()) - 1}$ the clean latent is still there with a factor of {last:.4f}",
         f"$a_0$ = {first:.5f}, not at 1.", f"{(1 - first).sqrt():.4f} of its amplitude")


@pytest.mark.parametrize("scheduler, ending", [("ddim", " of 50"), ("ddpm", ".")])
def test_the_steps_of_the_samplers_are_as_written(scheduler, ending):
    first, second, *_, last = sampling.timesteps(scheduler, 50, 1000)
    says("Diffusion", f"{first}, {second}, …, {last}{ending}")
    assert set(sampling.timesteps("pndm", 50, 1000)) == set(sampling.timesteps("ddim", 50, 1000))


def test_a_squared_error_of_the_noise_is_that_of_the_latent_times_the_signal_to_noise_ratio():
    z, right, wrong = torch.randn(3, 1000, dtype=torch.float64)
    a = 0.3
    errors = [(one - other).square() for one, other in zip(*(diffusion.split(x, z, a, "epsilon")
                                                             for x in (right, wrong)))]
    torch.testing.assert_close(errors[1], errors[0] * a / (1 - a))


def test_the_latent_is_as_much_smaller_than_the_picture_as_written():
    config = full_size()
    pixels, latent = 256, 256 // config.vae.factor
    says("Diffusion", f"{config.vae.channels} × {latent} × {latent} = {config.vae.channels * latent ** 2:,}",
         f"{vae.COLOURS} × {pixels} × {pixels} = {vae.COLOURS * pixels ** 2:,}")


def test_the_clocks_of_the_time_turn_as_fast_as_written():
    hands = full_size().unet.widths[0] // 2
    says("Layers", f"\\cos(t f_{{{hands - 1}}}", f"\\sin(t f_{{{hands - 1}}}", f"10000^{{-i/{hands}}}",
         f"these {2 * hands} features")
    sines = time_features(torch.tensor([2 * torch.pi, 999.0]), 2 * hands)[:, hands:]
    assert sines[0, 0].abs() < 1e-5                                      # the first is round once
    says("Layers", f"every {2 * torch.pi:.2f} steps", f"turns by {sines[1, -1].asin():.3f} radians in all 999")


def test_a_time_that_is_the_same_for_all_channels_of_a_group_has_no_effect():
    groups, width = full_size().unet.groups, full_size().unet.widths[1]
    says("Layers", f"all {width // groups} channels of a group ({width} channels in {groups} groups)")
    res, x, emb = ResBlock(8, 16, 4, 1e-5, 32), torch.randn(2, 8, 6, 6), Memo(torch.randn(2, 32))
    before = res(x, emb)
    with torch.no_grad():
        res.time.bias += torch.tensor([3.0, -2.0, 1.0, 5.0]).repeat_interleave(4)
        torch.testing.assert_close(res(x, emb), before)
        res.time.bias += torch.tensor([3.0, -2.0, 1.0, 5.0]).repeat(4)
    assert not torch.allclose(res(x, emb), before, atol=1e-2)


def test_an_odd_latent_goes_down_and_comes_back_by_the_written_sizes():
    net = on_meta("unet")
    with recorded(net, {"a": "encoder.down.0.down", "b": "encoder.down.1.down", "c": "encoder.down.2.down"}) as seen:
        out = net(torch.empty(1, 4, 9, 7, device="meta"), torch.zeros(1, device="meta"),
                  torch.empty(1, 257, 768, device="meta"))
    a, b, c, end = ("{} × {}".format(*x.shape[2:]) for x in (*seen.values(), out))
    says("Layers", f"a latent of 9 × 7 goes down to {a}, {b} and {c}, and comes back as {end}")


def test_the_eps_of_each_norm_is_as_written():
    assert (unet.EPS, vae.EPS) == (1e-5, 1e-6)
    says("Layers", "$10^{-5}$ in the UNet's ResBlocks and $10^{-6}$ in the VAE's")
    transformers = [m for m in on_meta("unet").modules() if isinstance(m, SpatialTransformer)]
    assert {m.norm.eps for m in transformers} == {1e-6}
    says("Transformer", "an eps of $10^{-6}$ instead of $10^{-5}$")


def test_attention_along_frames_does_not_know_their_order():
    layer, order = TemporalAttention(16, 2), torch.tensor([2, 0, 3, 1])
    torch.nn.init.normal_(layer.out.weight)
    clips = torch.randn(2, 16, 4, 3, 1)                                  # (B, D, F, L, 1)

    def attend(clips):
        x = fold(clips)[0].squeeze(-1).transpose(1, 2)                   # (B*F, L, D)
        return unfold(layer(x, 4).transpose(1, 2)[..., None], 4)

    torch.testing.assert_close(attend(clips[:, :, order]), attend(clips)[:, :, order])


def test_tokens_of_zero_are_looked_at_evenly_and_leave_only_the_bias():
    tokens = full_size().clip.tokens
    says("Transformer", f"pixels to the {tokens} tokens", f"{tokens} tokens that are all zero", f"weight 1/{tokens}")
    marks = torch.eye(tokens)[None, :, None]                             # values that show the weights
    weights = cross_attention(torch.randn(1, 1, 1, tokens), torch.stack([torch.zeros_like(marks), marks], 2))
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / tokens))
    cross = model("image").unet.encoder.mid.attn[0].block.cross_attn
    assert torch.equal(cross(torch.randn(1, 3, 64), torch.zeros(1, 17, 32)), cross.out.bias.expand(1, 3, 64))


def test_numbers_of_blocks_and_values_of_the_unet_are_as_written():
    net, modules = on_meta("unet"), list(on_meta("unet").modules())
    blocks, transformers = (sum(isinstance(m, kind) for m in modules) for kind in (ResBlock, SpatialTransformer))
    says("UNet", f"{blocks} ResBlocks and {transformers} transformers", f"{size(net.up):,} to {size(net.encoder):,}",
         f"{size(net):,} values", f"video model ({size(on_meta('unet', '--unet.temporal=true')):,})")
    heads, widths = full_size().unet.heads, full_size().unet.widths
    assert heads == 8
    says("UNet", "Eight heads at every level are {}, {} and {} wide".format(*(w // heads for w in widths[:3])))


def test_values_of_the_encoders_and_of_the_tokens_matrix_are_as_written():
    net = on_meta("all")
    says("Conditions", f"section 3.1; {size(net.vae):,} values", f"arXiv:2103.00020; {size(net.clip.vision):,} values",
         f"({size(net.clip.proj):,} values)")


@pytest.mark.parametrize("column, kind", [(2, "pose"), (3, "background")])
def test_the_table_of_the_two_nets_is_right(column, kind):
    cells = {start: row(start).split("|")[column].strip() for start in ("goes", "residuals", "values")}
    net = on_meta(kind)
    convolutions = sum(isinstance(m, torch.nn.Conv2d) for m in net.hint.modules())
    assert f"{ {1: 'one', 8: 'eight'}[convolutions]} convolution" in cells["goes"]
    skips = len(net.zero_skips)
    assert cells["residuals"] in (f"{skips + 1}", f"{skips + 1}: {skips} for the skips, 1 for the middle")
    assert cells["values"] == f"{size(net):,}"


def test_the_letters_have_the_written_values():
    unet, clip, latent = full_size().unet, full_size().clip, 256 // full_size().vae.factor
    width, context = unet.widths[0], clip.tokens
    for start, written in {"C": f"{unet.channels} in a latent; {', '.join(map(str, unet.widths))} in the levels",
                           "H W, h w": f"256 × 256, {latent} × {latent}",
                           "L, M": f"{latent ** 2} at the finest level, {context}",
                           "D, N, K": f"{width}, {unet.heads}, {width // unet.heads} at",
                           "E": str(on_meta("unet").encoder.time.linear2.out_features)}.items():
        assert f"| {written}" in row(f"{start} |")


def test_a_stick_leaves_what_it_crosses_visible():
    cross = np.full((17, 3), -1.0)
    cross[[5, 6, 7, 8], :2] = (10, 10), (50, 10), (50, 50), (10, 50)     # both upper arms, crossed
    colours = {tuple(colour) for colour in pose.draw([cross], (60, 60)).reshape(-1, 3)}
    one = pose.draw([np.where(np.isin(np.arange(17), (5, 7))[:, None], cross, -1)], (60, 60))[30, 30]
    other = pose.draw([np.where(np.isin(np.arange(17), (6, 8))[:, None], cross, -1)], (60, 60))[30, 30]
    assert {tuple(one), tuple(other)} <= colours and len(pose.COLOURS) == 18 and len(pose.LIMBS) == 17
    both = pose.draw([cross], (60, 60))[30, 30]
    assert not np.array_equal(both, one) and not np.array_equal(both, other)
    says("Conditions", "18 discs and 17 sticks", "an opacity of 0.6")


def test_the_world_of_the_dancers_is_as_written():
    says("Dancers", f"repeats after {dancers.LOOP} frames", f"f / {dancers.LOOP} +", "17 joints",
         "skin, hair, shirt, legs, shoes")
    assert dancers.REGIONS[1:] == ("skin", "hair", "shirt", "legs", "shoes") and dancers.HELD_OUT == 10 ** 9
    assert dancers.sample(0, 0, 0, 0, 32).keypoints.shape == (17, 3)


def test_what_is_cut_away_is_the_mean_colour_for_clip_and_middle_grey_for_the_scene():
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    nobody, everywhere = Image.new("L", photo.size), Image.new("L", photo.size, 255)
    shown = transforms.from_clip(transforms.reference(photo, nobody, 32)[None])[0]
    torch.testing.assert_close(shown, torch.tensor(transforms.CLIP_MEAN)[:, None, None].expand_as(shown))
    assert not transforms.background(photo, everywhere, (32, 32)).any()                  # 0 in [-1, 1]


def test_multiply_adds_of_a_step_with_guidance_are_as_written():
    model, twice = on_meta("all"), lambda x: torch.cat([x, x])
    with torch.device("meta"):
        z, tokens, skeleton = torch.empty(1, 4, 32, 32), torch.empty(1, 257, 768), torch.empty(1, 3, 256, 256)
        t = torch.zeros(1, dtype=torch.long)
    plain = Conditions(twice(tokens), twice(skeleton), twice(z))
    kept = Conditions(Context(Memo(tokens, keep=True), rows=2, blind=1), Memo(skeleton, keep=True), Memo(z, keep=True))
    step = Memo(t, keep=True)
    model(z, step, kept)                                                 # all that is made once
    billions = [sum(multiply_adds(model, *arguments).values()) / 1e9
                for arguments in ((twice(z), twice(t), plain), (z, step, kept))]
    says("Sampling", f"takes {billions[0]:.1f} billion multiply-adds", f"and {billions[1]:.1f} with this")


# ---- Shapes: each one in a table is that of a tensor of a run at full size ---------------------------

B, F = 2, 7                            # 2 and 7 are no other number in any shape
HALF = 11                              # pictures of a step with guidance; 22 is no other number either


def written(shape) -> str:
    words = {B * F: "B·F", B: "B", F: "F", F * 1024: "F·1024", HALF: "B", 2 * HALF: "2·B"}
    return "(" + ", ".join(words.get(n, str(n)) for n in shape) + ")"


@cache
def traced() -> dict[str, list]:
    """Start of a table's row -> the shapes in it, in order."""
    video, shapes, calls = "--unet.temporal=true", {}, []
    net, pose, background = (on_meta(kind, video) for kind in ("unet", "pose", "background"))
    with torch.device("meta"):
        clip, tokens, t = torch.empty(B, 4, F, 32, 32), torch.empty(B, 257, 768), torch.zeros(B, dtype=torch.long)
        skeleton, latent = torch.empty(B, 3, F, 256, 256), torch.empty(B, 4, 32, 32)
    z, frames = fold(clip)
    shapes["$z_0$"], shapes["the same of"] = [latent.shape], [clip.shape]
    shapes["its $a$"] = [diffusion.at(bars(), torch.zeros(B, dtype=torch.long), torch.empty(clip.shape)).shape]

    first, block = "encoder.down.1.res.0", "encoder.down.0.attn.0"
    paths = {"conv_in": "encoder.conv_in", "after conv1": f"{first}.conv1", "the time's": f"{first}.time", "y": first,
             "as a sequence": f"{block}.proj_in", "out, added": block,
             "middle": "encoder.mid", "norm, SiLU": "conv_out", "level 3 down": "encoder.down.3.res.1",
             "h": "encoder.down.0.res.0"}
    paths |= {f"level {i} down": f"encoder.down.{i}.down" for i in (0, 1, 2)}
    paths |= {f"level {i} up": f"up.{3 - i}.up" for i in (1, 2, 3)} | {"level 0 up": "up.3.attn.2"}

    def spy(module, name):
        original = getattr(module, name)

        def noted(*given):
            calls.append([part.shape for x in given if isinstance(x, torch.Tensor)
                          for part in (x.unbind(2) if x.ndim == 5 else [x])])
            return original(*given)
        patch.setattr(module, name, noted)

    inputs = {}
    hooks = [net.get_submodule(path).register_forward_pre_hook(
        lambda module, given, start=start, i=i: inputs.update({start: Memo.of(given[i]).x.shape}))
        for start, path, i in (("x", first, 0), ("the time embedding", first, 1),
                               ("gated", f"{block}.block.ff.down", 0), ("its context", f"{block}.block.cross_attn", 1))]
    with pytest.MonkeyPatch.context() as patch, recorded(net, paths) as seen:
        spy(transformer, "self_attention")
        spy(transformer, "cross_attention")
        spy(temporal, "temporal_attention")
        gated, geglu = [], sys.modules["kernels.geglu"]
        patch.setattr(geglu, "geglu", lambda x, plain=geglu.geglu: gated.append(x.shape) or plain(x))
        net(z, t, tokens, frames=frames)
    for hook in hooks:
        hook.remove()
    res, mid = net.get_submodule(first), seen["middle"].shape
    says("Layers", f"`ResBlock`](../nanodisco/layers.py), {res.conv1.in_channels} → {res.conv1.out_channels} |")
    says("UNet", "goes down to where {} × {} places".format(*mid[2:]))
    shapes |= {start: [tensor.shape] for start, tensor in seen.items()} | {"value and gate": gated[:1]}
    shapes |= {start: [shape] for start, shape in inputs.items()} | {"latent |": [z.shape]}

    own, along, cross = calls[:3]                                        # of the first block
    assert len(set(own)) == len(set(along)) == len(set(cross[1:])) == 1
    shapes["q, k, v of [`SelfAttention`]"], shapes["q, k, v of [`TemporalAttention`]"] = [own[0]], [along[0]]
    shapes["its scores, which"] = [(own[0][0], own[0][2], own[0][1], own[0][1])]
    shapes["its scores |"] = [(along[0][0] // F, along[0][1], along[0][2], F, F)]
    shapes["q of [`CrossAttention`]"], shapes["its k and v"] = [cross[0]], [cross[1]]

    runs = [(one, one(z, t, tokens, hint, frames), hint, one.hint(hint))
            for one, hint in ((pose, fold(skeleton)[0]), (background, latent))]
    for start, pick in {"hint": lambda r: r[2], "is now": lambda r: r[3], "first residual": lambda r: r[1][0],
                        "last residual": lambda r: r[1][-1]}.items():
        shapes[start] = [pick(r).shape for r in runs]
    assert {len(r[1]) for r in runs} == {13}
    return shapes | traced_conditions() | traced_guidance()


def traced_conditions() -> dict[str, list]:
    """From a photo to what the UNet is given."""
    model, photo = on_meta("all", "--unet.temporal=true"), Image.new("RGB", (300, 400))
    mask, size = Image.new("L", photo.size), (256, 256)
    reference = torch.stack([transforms.reference(photo, mask, model.config.clip.image_size)] * B).to("meta")
    scene = torch.stack([transforms.background(photo, mask, size)] * B).to("meta")
    skeleton = unfold(torch.stack([transforms.pose(photo, size)] * (B * F)), F).to("meta")
    seen = model.conditions(reference, scene, skeleton)
    given = []
    hook = model.unet.register_forward_pre_hook(lambda module, arguments: given.extend(arguments))
    with torch.device("meta"):
        model(torch.empty(B, 4, F, 32, 32), torch.zeros(B, dtype=torch.long), seen)
    hook.remove()
    says("Conditions", f"the first of {len(given[3])}")
    return {start: [x.shape] for start, x in
            {"person, for CLIP": reference, "its tokens": seen.tokens, "scene": scene, "its latent": seen.background,
             "pose picture": fold(skeleton)[0], "summed residuals": given[3][0]}.items()}


def traced_guidance() -> dict[str, list]:
    """A step whose halves part at the first cross-attention."""
    model, block, seen, asked = on_meta("all"), "unet.encoder.down.0.attn.0.block", {}, []
    with torch.device("meta"):
        z, tokens, t = torch.empty(HALF, 4, 32, 32), Memo(torch.empty(HALF, 257, 768)), torch.zeros(1, dtype=torch.long)
        shown = Conditions(Context(tokens, rows=2 * HALF, blind=HALF), torch.empty(HALF, 3, 256, 256), z)
    hooks = [model.get_submodule(path).register_forward_hook(
        lambda module, given, out, start=start: seen.update({start: [out.shape]}))
        for start, path in (("after the first self", f"{block}.self_attn"), ("after the first cross", block),
                            ("the two answers", "unet"))]
    hooks.append(model.get_submodule(f"{block}.cross_attn").register_forward_pre_hook(lambda *call: asked.append(call)))
    looked = []

    def noted(q, kv):
        looked.extend([q.shape] if asked else [])
        return cross_attention(q, kv)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "cross_attention", noted)
        model(z, t, shown)
    for hook in hooks:
        hook.remove()
    return seen | {"latent, as": [z.shape], "q of the half": looked[:1]}


def shapes_in(line: str) -> list[str]:
    """With the number of such tensors before it, if there is one."""
    return re.findall(r"(?:\d × )?\((?:2·)?B[^()]*\)", line)


@pytest.mark.parametrize("line", list(filter(shapes_in, ROWS)), ids=lambda line: line.split("|")[1].strip())
def test_the_shapes_in_a_row_are_those_of_the_tensors(line):
    (start,) = [start for start in traced() if line.startswith(f"| {start}" if len(start) > 1 else f"| {start} |")]
    count = {"q, k, v": "3 × ", "its k a": "2 × "}.get(start[:7], "")
    assert shapes_in(line) == [count + written(shape) for shape in traced()[start]]


def test_every_shape_that_was_traced_has_its_row():
    assert len(traced()) == sum(bool(shapes_in(line)) for line in ROWS)


def test_as_many_skips_are_left_as_taken():
    left, taken = (sum(map(int, re.findall(rf"\| {word} (\d+) \|", TEXT))) for word in ("leaves", "takes"))
    assert left == taken == len(on_meta("unet").encoder.widths_of_skips)
    for i, level in enumerate(on_meta("unet").encoder.down):
        assert f"leaves {len(level.res) + (level.down is not None)}" in row(f"level {i} down")
        assert f"takes {len(on_meta('unet').up[3 - i].res)}" in row(f"level {i} up")


def test_training():
    before = np.prod([optim.decay(step, 0.998) for step in range(10**6, 10**6 + 500)])
    assert answers("Training") == [f"{100 * (1 - before):.1f}"]
    assert f"leaves {100 * before:.1f} %" in CHAPTERS["Training"]
    recipes = {name: yaml.safe_load((ROOT / "config" / "nano" / f"{name}.yaml").read_text())["train"]
               for name in ("vae", "finetune_cfg")}
    assert recipes["finetune_cfg"]["drop_reference"] == 0.1 and recipes["finetune_cfg"]["person"] == 3
    assert recipes["finetune_cfg"]["ema"] == recipes["vae"]["ema"] == 0.998
    assert round(0.998 ** 1400, 2) == 0.06                               # "six percent"


def test_kernels():
    q = torch.empty(32, 1024, 8, 40, device="meta")
    weights = torch.einsum("blnk,bmnk->bnlm", q, q)
    assert answers("Kernels") == [f"{weights.numel() / (4 * q.numel()):.1f}"]
    assert list(weights.shape) == [32, 8, 1024, 1024]                    # "32 x 8 x 1024 x 1024 numbers"


def test_folding_two_parts_is_exact_where_the_difference_of_squares_is_not():
    """The formula of the chapter, and its "costs two digits"."""
    x = 100 + 3 * torch.randn(2, 5000, generator=torch.Generator().manual_seed(0))
    (a, b), (s, t) = x.mean(1), ((x - x.mean(1, keepdim=True)) ** 2).sum(1)
    folded = (s + t + (a - b) ** 2 * 5000 * 5000 / 10000) / 10000
    wanted = x.double().var(correction=0)
    naive = (x ** 2).mean() - x.mean() ** 2
    assert abs(folded / wanted - 1) < 5e-7 < 5e-5 < abs(naive / wanted - 1)


def test_the_pictures_of_each_stage_are_those_of_its_recipe():
    made = {}
    for name in ("vae", "decoder", "pretrain", "finetune_cfg", "temporal", "human_specific"):
        recipe = yaml.safe_load((ROOT / "config" / "nano" / f"{name}.yaml").read_text())
        made[name] = recipe["train"]["steps"] * recipe["train"]["batch"] * recipe["data"].get("frames", 1)
    made["vae"] += made.pop("decoder")
    written = {int(cell.replace(",", "")) for line in ROWS if len(line.split("|")) == 12
               for cell in line.split("|")[2:3] if re.fullmatch(r"[\d,]+", cell.strip())}
    assert written == {0, *made.values()}


def test_the_memory_of_a_long_clip_is_as_written():
    says("Sampling", f"up to {guidance.KEPT // (3 * 16 * 256 ** 2)} windows of 16",
         f"(10,000 frames of 256 × 256 are {10_000 * 3 * 256 ** 2 / 1e9:.0f} GB)")


# ---- Links and form ----------------------------------------------------------------------------------

LINKS = sorted(set(re.findall(r"\[(`?[^\]]+`?)\]\(\.\./([^)]+)\)", TEXT)))


def defined_in(path: Path) -> set[str]:
    """Functions, classes, and the methods of these as Class.method."""
    top = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    return {node.name for node in top} | {
        f"{node.name}.{inner.name}" for node in top if isinstance(node, ast.ClassDef)
        for inner in node.body if isinstance(inner, ast.FunctionDef)}


@pytest.mark.parametrize("text, target", LINKS)
def test_every_link_leads_to_a_file_that_defines_the_symbol(text, target):
    assert (ROOT / target).exists()
    if text.startswith("`"):
        assert text.strip("`") in defined_in(ROOT / target)


def test_every_link_stays_inside_the_repository():
    assert len(re.findall(r"\]\(", TEXT)) == len(re.findall(r"\]\(\.\./[^)]+\)", TEXT))


def test_every_chapter_has_one_exercise_with_an_answer():
    assert list(CHAPTERS) == ["Diffusion", "Layers", "Transformer", "UNet", "ControlNet", "Conditions", "Sampling",
                              "Dancers", "Training", "Kernels"]
    assert all(text.count("**Exercise.**") == 1 and answers(name) for name, text in CHAPTERS.items())


def test_an_answer_is_not_given_away_before_it():
    for name, text in CHAPTERS.items():
        assert not re.search(rf"(?<![\d,]){re.escape(answers(name)[0])}(?!,?\d)", text.split("<details>")[0])


def test_answers_and_formulas_are_in_a_form_that_github_renders():
    """Blank lines around the answer's text, or its Markdown stays raw; no backslash that Markdown eats in math."""
    assert TEXT.count("<details><summary>Answer</summary>\n\n") == TEXT.count("\n\n</details>") == len(CHAPTERS)
    assert not re.search(r"\\[^A-Za-z]", TEXT)
    assert TEXT.count("$") % 2 == 0
