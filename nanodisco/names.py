"""Names: what each of our tensors is called in the official files. Tables, read in both directions.

The official names are those of a DisCo checkpoint's `module` dict; every other format differs from
them by a prefix or a spelling (below). A name of ours is cut into network, place and leaf, and each
piece is looked up, so that

    unet.encoder.down.0.attn.1.block.cross_attn.kv.weight
    unet.        down_blocks.0.attentions.1.  transformer_blocks.0.attn2.{to_k,to_v}.weight

One tensor of ours may be several of theirs side by side (packed q, k, v), transposed, or a linear
layer that they store as a 1x1 convolution.
"""
import functools
import re
from dataclasses import dataclass

# ---- Ours and DisCo's ------------------------------------------------------------------------------
# {} is an index and stays what it is. The first line that fits the front of the name is taken.

NETWORKS = [
    ("vae.encoder.", "vae.encoder."),
    ("vae.decoder.", "vae.decoder."),
    ("vae.", "vae."),
    ("pose.encoder.", "controlnet.nets.0."),
    ("pose.", "controlnet.nets.0."),
    ("background.encoder.", "controlnet.nets.1."),
    ("background.", "controlnet.nets.1."),
    ("unet.encoder.", "unet."),
    ("unet.", "unet."),
    ("clip.vision.", "clip_image_encoder."),
    ("clip.proj.", "refer_clip_proj."),
]

PLACES = [
    ("down.{}.res.{}.", "down_blocks.{}.resnets.{}."),
    ("down.{}.attn.{}.", "down_blocks.{}.attentions.{}."),
    ("down.{}.down.", "down_blocks.{}.downsamplers.0."),
    ("down.{}.resize.", "down_blocks.{}.downsamplers.0."),
    ("mid.res.{}.", "mid_block.resnets.{}."),
    ("mid.attn.norm.", "mid_block.attentions.0.group_norm."),            # VAE
    ("mid.attn.attn.", "mid_block.attentions.0."),                       # VAE
    ("mid.attn.{}.", "mid_block.attentions.{}."),
    ("up.{}.res.{}.", "up_blocks.{}.resnets.{}."),
    ("up.{}.attn.{}.", "up_blocks.{}.attentions.{}."),
    ("up.{}.up.", "up_blocks.{}.upsamplers.0."),
    ("up.{}.resize.", "up_blocks.{}.upsamplers.0."),
    ("time.linear1.", "time_embedding.linear_1."),
    ("time.linear2.", "time_embedding.linear_2."),
    ("norm_out.", "conv_norm_out."),
    ("hint.", "controlnet_cond_embedding."),
    ("zero_skips.", "controlnet_down_blocks."),
    ("zero_mid.", "controlnet_mid_block."),
    ("to_moments.", "quant_conv."),
    ("from_latent.", "post_quant_conv."),
    ("transformer.resblocks.{}.", "vision_model.encoder.layers.{}."),
    ("ln_pre.", "vision_model.pre_layrnorm."),                           # official: their spelling
    ("ln_post.", "vision_model.post_layernorm."),
    ("conv1.", "vision_model.embeddings.patch_embedding."),
    ("class_embedding", "vision_model.embeddings.class_embedding"),
    ("positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("proj", "visual_projection.weight"),
]

LEAVES = [
    # ResBlock
    ("time.", "time_emb_proj."),
    ("skip.", "conv_shortcut."),
    ("temporal.norm.", "tem_norm."),
    ("temporal.conv.", "tem_conv."),
    # SpatialTransformer
    ("block.self_attn.qkv.", "transformer_blocks.0.attn1.(to_q|to_k|to_v)."),
    ("block.self_attn.out.", "transformer_blocks.0.attn1.to_out.0."),
    ("block.temporal.qkv.", "transformer_blocks.0.tem_attn.(to_q|to_k|to_v)."),
    ("block.temporal.out.", "transformer_blocks.0.tem_attn.to_out.0."),
    ("block.cross_attn.q.", "transformer_blocks.0.attn2.to_q."),
    ("block.cross_attn.kv.", "transformer_blocks.0.attn2.(to_k|to_v)."),
    ("block.cross_attn.out.", "transformer_blocks.0.attn2.to_out.0."),
    ("block.ff.up.", "transformer_blocks.0.ff.net.0.proj."),
    ("block.ff.down.", "transformer_blocks.0.ff.net.2."),
    ("block.unused_norm.", "transformer_blocks.0.tem_norm."),
    ("block.", "transformer_blocks.0."),
    # VAE attention
    ("qkv.", "(query|key|value)."),
    ("out.", "proj_attn."),
    # CLIP
    ("attn.in_proj_", "self_attn.(q_proj|k_proj|v_proj)."),
    ("attn.out_proj.", "self_attn.out_proj."),
    ("ln_1.", "layer_norm1."),
    ("ln_2.", "layer_norm2."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
]

POSITION_IDS = "clip_image_encoder.vision_model.embeddings.position_ids"   # 0, 1, …: in older files, and of no use


@dataclass(frozen=True)
class Name:
    """The official side of one of our tensors."""
    theirs: tuple[str, ...]            # several: side by side along the first axis of ours
    transposed: bool = False           # theirs is (out, in), ours (in, out)
    conv1x1: bool = False              # theirs has two more axes of length one


@functools.cache
def official(ours: str, stage1: bool = False) -> Name:
    """The official name of our tensor `ours`. In a stage-1 file the only net has no number."""
    name = _look_up(ours, [NETWORKS, PLACES, LEAVES])
    if stage1:
        name = name.replace("controlnet.nets.1.", "controlnet.", 1)
    parts = re.search(r"\((.*)\)", name)
    theirs = tuple(name.replace(parts[0], part) for part in parts[1].split("|")) if parts else (name,)
    transformer_proj = re.search(r"\.attentions\.\d+\.proj_(in|out)\.weight$", name)
    return Name(theirs, transposed=ours == "clip.vision.proj", conv1x1=bool(transformer_proj))


def _look_up(name: str, tables) -> str:
    """Cut `name` from the front, a piece a table, and put together what stands for the pieces."""
    done = ""
    for table in tables:
        for ours, theirs in table:
            if match := _pattern(ours).match(name):
                done, name = done + theirs.format(*match.groups()), name[match.end():]
                break
    return done + name


@functools.cache
def _pattern(piece: str) -> re.Pattern:
    return re.compile(re.escape(piece).replace(r"\{\}", r"(\d+)"))


# ---- Spellings of the same names ---------------------------------------------------------------------

DIFFUSERS_FOLDERS = {"unet": "unet.", "vae": "vae.", "image_encoder": "clip_image_encoder."}   # folder -> prefix

TELLING = {"time_embedding.linear_1.weight": "unet.", "quant_conv.weight": "vae.",            # a name -> whose it is
           "vision_model.embeddings.class_embedding": "clip_image_encoder."}

VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}   # until 2023 -> since


def vae_spelling(name: str, new: bool) -> str:
    """A VAE attention's name in the old spelling (DisCo's own) or in the new one; other names unchanged."""
    head, at, leaf = name.partition(".mid_block.attentions.0.")
    if not at or not name.startswith("vae."):
        return name
    for old_word, new_word in VAE_ATTENTION.items():
        before, after = (old_word, new_word) if new else (new_word, old_word)
        if leaf.startswith(before + "."):
            return head + at + after + leaf[len(before):]
    return name


# CompVis (the `.ckpt` files of Stable Diffusion): blocks are numbered through instead of by level.

COMPVIS_DROPPED = re.compile(                        # known and of no use here: text encoder, EMA twin, tables
    r"^(cond_stage_model\.|model_ema\.|betas$|alphas_cumprod|sqrt_|log_one_minus_|posterior_|logvar$"
    r"|lvlb_weights$|scale_factor$|first_stage_model\.loss\.)")

COMPVIS_RES = [("in_layers.0.", "norm1."), ("in_layers.2.", "conv1."), ("emb_layers.1.", "time_emb_proj."),
               ("out_layers.0.", "norm2."), ("out_layers.3.", "conv2."), ("skip_connection.", "conv_shortcut.")]

COMPVIS_UNET = [("time_embed.0.", "time_embedding.linear_1."), ("time_embed.2.", "time_embedding.linear_2."),
                ("input_blocks.0.0.", "conv_in."), ("middle_block.0.", "mid_block.resnets.0."),
                ("middle_block.1.", "mid_block.attentions.0."), ("middle_block.2.", "mid_block.resnets.1."),
                ("out.0.", "conv_norm_out."), ("out.2.", "conv_out.")]

COMPVIS_VAE = [("encoder.down.{}.block.{}.", "encoder.down_blocks.{}.resnets.{}."),
               ("encoder.down.{}.downsample.", "encoder.down_blocks.{}.downsamplers.0."),
               ("encoder.mid.block_1.", "encoder.mid_block.resnets.0."),
               ("encoder.mid.block_2.", "encoder.mid_block.resnets.1."),
               ("encoder.mid.attn_1.", "encoder.mid_block.attentions.0."),
               ("decoder.mid.block_1.", "decoder.mid_block.resnets.0."),
               ("decoder.mid.block_2.", "decoder.mid_block.resnets.1."),
               ("decoder.mid.attn_1.", "decoder.mid_block.attentions.0."),
               ("encoder.norm_out.", "encoder.conv_norm_out."), ("decoder.norm_out.", "decoder.conv_norm_out.")]

COMPVIS_VAE_LEAVES = [("nin_shortcut.", "conv_shortcut."), ("norm.", "group_norm."), ("q.", "query."),
                      ("k.", "key."), ("v.", "value."), ("proj_out.", "proj_attn.")]


def compvis_names(keys) -> dict[str, str]:
    """CompVis name -> official name, for every key of `keys` that belongs to the UNet or the VAE."""
    prefix = "model.diffusion_model."
    unet = COMPVIS_UNET + _compvis_blocks([key.removeprefix(prefix) for key in keys if key.startswith(prefix)])
    ups = {int(match[1]) for key in keys if (match := re.match(r"first_stage_model\.decoder\.up\.(\d+)\.", key))}
    vae = COMPVIS_VAE + [line for i in ups for line in (             # finest first there, coarsest first here
        (f"decoder.up.{i}.block.{{}}.", f"decoder.up_blocks.{max(ups) - i}.resnets.{{}}."),
        (f"decoder.up.{i}.upsample.", f"decoder.up_blocks.{max(ups) - i}.upsamplers.0."))]
    names = {}
    for key in keys:
        if key.startswith(prefix):
            names[key] = "unet." + _look_up(key.removeprefix(prefix), [unet, COMPVIS_RES])
        elif key.startswith("first_stage_model.") and not COMPVIS_DROPPED.match(key):
            names[key] = "vae." + _look_up(key.removeprefix("first_stage_model."), [vae, COMPVIS_VAE_LEAVES])
    return names


def _compvis_blocks(keys: list[str]) -> list[tuple[str, str]]:
    """input_blocks.k and output_blocks.k as levels: a level ends with its down- or upsampler."""
    parts: dict[tuple[str, int], set[tuple[int, str]]] = {}             # block -> its (position, first word)s
    for key in keys:
        match = re.match(r"(input|output)_blocks\.(\d+)\.(\d+)\.([a-z_]+)", key)
        if match:
            parts.setdefault((match[1], int(match[2])), set()).add((int(match[3]), match[4]))
    lines = []
    for way, side, sampler in (("input", "down_blocks", "downsamplers"), ("output", "up_blocks", "upsamplers")):
        level = layer = 0
        for number in sorted(k for w, k in parts if w == way):
            if (way, number) == ("input", 0):
                continue                                                 # conv_in
            here, ended = f"{way}_blocks.{number}", False
            for position, word in sorted(parts[way, number]):
                if word in ("op", "conv"):
                    lines.append((f"{here}.{position}.{word}.", f"{side}.{level}.{sampler}.0.conv."))
                    ended = True
                elif word == "in_layers":
                    lines.append((f"{here}.{position}.", f"{side}.{level}.resnets.{layer}."))
                elif word == "norm":
                    lines.append((f"{here}.{position}.", f"{side}.{level}.attentions.{layer}."))
            level, layer = (level + 1, 0) if ended else (level, layer + 1)
    return lines
