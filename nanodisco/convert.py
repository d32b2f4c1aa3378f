"""python -m nanodisco.convert {inspect,import,export}: official weights in, ours out, and back.

    python -m nanodisco.convert inspect mp_rank_00_model_states.pt
    python -m nanodisco.convert import sd-image-variations-diffusers mp_rank_00_model_states.pt --out weights/disco
    python -m nanodisco.convert export weights/disco --to disco --out disco.safetensors
"""
import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path

from nanodisco.errors import InputError, run
from nanodisco.files import refuse_existing

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
NETWORKS = {"vae.": ("VAE", "vae"), "unet.": ("UNet", "unet"),           # where its sizes stand in a ModelConfig
            "controlnet.nets.0.": ("pose ControlNet", "pose"),
            "controlnet.nets.1.": ("background ControlNet", "background"),
            "clip_image_encoder.": ("CLIP image encoder", "clip"), "refer_clip_proj.": ("token projection", "")}
WHAT = {"base": "Stable Diffusion, no ControlNets", "stage1": "attribute pre-training (stage 1)",
        "image": "picture model", "temporal": "video model (temporal layers)"}
BASE = ("vae.", "unet.", "clip_image_encoder.")
USES = {"attribute pre-training": BASE,
        "fine-tuning": (*BASE, "controlnet.nets.1."),
        "sampling pictures": (*BASE, "controlnet.nets.0.", "controlnet.nets.1."),
        "sampling video": (*BASE, "controlnet.nets.0.", "controlnet.nets.1.", ".tem_conv.")}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m nanodisco.convert",
                                  description="Stable Diffusion and DisCo weights, in and out.")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="{inspect,import,export}")
    inspect = verbs.add_parser("inspect", help="say what a file or folder is and which model it fits")
    inspect.add_argument("path", metavar="FILE|DIR")
    bring = verbs.add_parser("import", help="make a nanodisco folder of official files; later files win",
                             epilog="Any field of the configuration: --unet.heads=8 --uncond=clip-zero …")
    bring.add_argument("paths", metavar="FILE|DIR", nargs="+")
    bring.add_argument("--out", metavar="DIR", required=True, help="the new folder")
    bring.add_argument("--as", dest="variant", choices=("stage1", "image", "temporal"),
                       help="make this model (stage 1 into an image model, an image model into video); "
                            "default: what the files hold")
    bring.add_argument("--config", metavar="YAML", help="model configuration for what the files do not say")
    bring.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as in the files")
    bring.add_argument("--at-most", type=int, default=0, metavar="MB", help="cut the weights into files of at most "
                       "so many megabytes (default: one file)")
    bring.add_argument("--seed", type=int, default=0, help="for parts that no file holds (default 0)")
    send = verbs.add_parser("export", help="write a nanodisco folder under the official names")
    send.add_argument("path", metavar="DIR", help="nanodisco folder (or any file that import takes)")
    send.add_argument("--to", choices=("diffusers", "disco"), required=True)
    send.add_argument("--out", metavar="PATH", required=True, help="a folder (diffusers), .safetensors or .pt (disco)")
    send.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as they are")
    send.add_argument("--old-names", action="store_true", help="diffusers: VAE attention names of 2022, position_ids")
    return top


def main(argv: list[str] | None = None) -> None:
    arguments, rest = parser().parse_known_args(argv)
    overrides = [text for text in rest if arguments.verb == "import" and "=" in text and text.startswith("--")]
    if unknown := [text for text in rest if text not in overrides]:
        parser().error(f"unrecognized arguments: {' '.join(unknown)}")
    if arguments.verb == "inspect":
        inspect(arguments.path)
    elif arguments.verb == "import":
        bring(arguments, overrides)
    else:
        send(arguments)


def inspect(path: str) -> None:
    """Print what a file or folder is, what is in it, which model it fits and what it lacks for which use."""
    from nanodisco import sizes, weights

    found = weights.open_weights(path)
    print(f"{found.path}: {found.kind}, {WHAT[found.variant]}{f' ({found.note})' if found.note else ''}")
    shown = sizes.from_shapes({name: tuple(tensor.shape) for name, tensor in found.tensors.items()})
    for prefix, (network, group) in NETWORKS.items():
        tensors = [tensor for name, tensor in found.tensors.items() if name.startswith(prefix)]
        if tensors:
            dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
            _line(network, f"{len(tensors):4} tensors {sum(t.numel() for t in tensors):13,} values, {' '.join(dtypes)}"
                  + _sizes(shown.get(group, {}) | found.known.get(group, {})))
    other = [name for name in found.tensors if not name.startswith(tuple(NETWORKS))]
    if other:
        _line("unknown", f"{len(other):4} tensors: {', '.join(other[:10])}{', …' if len(other) > 10 else ''}")
    if found.dropped:
        kinds = Counter(name.split(".")[0 if found.kind == "CompVis" else -1] for name in found.dropped)
        _line("not used", ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common(5)))
    fits, why = _fits(found)
    _line("fits", why)
    for use, needed in USES.items():
        lacking = [NETWORKS.get(part, ("temporal layers",))[0] for part in needed
                   if not any(part in name for name in found.tensors)]
        if lacking or fits:
            _line(f"for {use}", "lacks " + ", ".join(lacking) if lacking else "complete")


def _fits(found) -> tuple[bool, str]:
    """Whether nothing keeps these tensors from one of our models; and which that is, or what does."""
    import torch

    from nanodisco import loading

    if not all(any(name.startswith(part) for name in found.tensors) for part in BASE):
        return True, "no model alone; name a folder of SD image variations before it"
    there = {name: torch.empty(tensor.shape, device="meta") for name, tensor in found.tensors.items()}
    try:
        model, _, started = loading.fit([replace(found, tensors=there)], say=lambda line: None)
    except InputError as error:
        return False, f"no model: {error}"
    fresh = "; to be started afresh: " + ", ".join(part.split(";")[0] for part in started) if started else ""
    return True, f"{WHAT['image' if found.variant == 'base' else found.variant]}, tokens {model.config.tokens}{fresh}"


def _line(label: str, text: str) -> None:
    print(f"  {label:27}{text}")


def _sizes(fields: dict) -> str:
    words = [f"{key} {' '.join(map(str, value)) if isinstance(value, list) else value}"
             for key, value in fields.items() if key not in ("attention", "temporal") and value]
    return "\n" + " " * 29 + ", ".join(words) if words else ""


def bring(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """import: official files -> a nanodisco folder."""
    import torch

    from nanodisco import loading, weights

    refuse_existing(arguments.out)
    if arguments.at_most < 0:
        raise InputError(f"--at-most {arguments.at_most}; expected 1 or more megabytes, or 0 for one file")
    dtype = getattr(torch, DTYPES[arguments.dtype]) if arguments.dtype else None
    model = loading.load(*arguments.paths, variant=arguments.variant, config=arguments.config, overrides=overrides,
                         dtype=dtype, seed=arguments.seed)
    weights.write_folder(Path(arguments.out), model.state_dict(), model.config, arguments.at_most * 10**6)
    print(f"wrote {arguments.out}: {sum(p.numel() for p in model.parameters()):,} values, "
          f"tokens {model.config.tokens}, uncond {model.config.uncond}")


def send(arguments: argparse.Namespace) -> None:
    """export: a nanodisco folder -> official names."""
    import torch

    from nanodisco import loading, weights

    out = Path(arguments.out)
    refuse_existing(out)
    if arguments.to == "disco" and out.suffix not in (".safetensors", ".pt"):
        raise InputError(f"{out}: a DisCo checkpoint is one file; expected a name ending in .safetensors or .pt")
    dtype = getattr(torch, DTYPES[arguments.dtype]) if arguments.dtype else None
    model = loading.load(arguments.path, dtype=dtype)
    if arguments.to == "disco":
        weights.write_disco(out, model.state_dict(), model.config)
        print(f"wrote {out}")
        return
    if model.config.unet.temporal:
        raise InputError(f"{arguments.path} is a video model, which diffusers has no layout for; use --to disco")
    if model.config.vae.stem > 1 or model.config.vae.linear:
        raise InputError(f"{arguments.path} has a VAE with vae.stem or vae.linear, which diffusers has no layout for; "
                         "use --to disco")
    weights.write_diffusers(out, model.state_dict(), model.config, arguments.old_names)
    print(f"wrote {out}: unet, vae, image_encoder, scheduler. Left out, as this layout has no place for them: "
          "the ControlNets and the token projection (--to disco keeps them)")


if __name__ == "__main__":
    run(main)
