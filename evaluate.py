"""Scores.

    python evaluate.py --protocol dancers --weights weights/nano --count 96 --steps 20 --cfg 1.5
"""
import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path

from nanodisco.errors import InputError, run
from nanodisco.files import appearing, refuse_existing


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="evaluate.py", description="How good a model's pictures are.")
    top.add_argument("--protocol", choices=("dancers",), default="dancers", help="dancers: held-out synthetic people, "
                     "rooms and dances, scored against the true frames (default)")
    top.add_argument("--weights", metavar="DIR", default="weights/nano", help="default weights/nano")
    top.add_argument("--count", type=int, default=96, help="pictures (default 96)")
    top.add_argument("--size", type=int, default=64, help="pixels (default 64)")
    top.add_argument("--steps", type=int, default=20, help="sampling steps (default 20)")
    top.add_argument("--cfg", type=float, default=1.5, help="guidance (default 1.5)")
    top.add_argument("--seed", type=int, default=0, help="of the held-out people and of the noise (default 0)")
    top.add_argument("--stranger", action="store_true", help="show another person than the one to draw: a model that "
                     "looks at the reference then draws the wrong clothes")
    top.add_argument("--person", type=int, metavar="N", help="all pictures are of the held-out person N in their own "
                     "room, in other dances: what config/nano/human_specific.yaml is for")
    top.add_argument("--device", default="auto", help="auto, cpu, cuda (default auto)")
    top.add_argument("--json", metavar="FILE", help="write the scores there")
    top.add_argument("--pictures", metavar="PNG", help="write reference | pose | truth | picture of the first 16 there")
    return top


def main(argv: list[str] | None = None) -> None:
    given = parser().parse_args(argv)
    for flag, low, high in (("count", 1, 10**5), ("steps", 1, 1000), ("seed", 0, 899), ("size", 8, 1024)):
        if not low <= getattr(given, flag) <= high:
            raise InputError(f"--{flag} {getattr(given, flag)}; expected {low} to {high}")
    if not 0 <= given.cfg < math.inf:
        raise InputError(f"--cfg {given.cfg}; expected 0 or more")
    if given.person is not None and (given.stranger or given.person < 0):
        raise InputError("--person: expected a number from 0, and no --stranger beside it")
    if given.stranger and given.count < 2:
        raise InputError("--stranger with --count 1; expected 2 or more: the stranger is the next of them")
    if not Path(given.weights).exists():
        raise InputError(f"{given.weights} is not there; expected a folder of weights, such as RUN/last of train.py")
    for path in filter(None, (given.json, given.pictures)):
        refuse_existing(path)
    from tqdm import tqdm

    from nanodisco import judge
    from nanodisco.distributed import device_of
    from nanodisco.loading import for_inference, load, refuse_unfinished
    refuse_unfinished(given.weights)
    say = partial(print, file=sys.stderr)
    model = for_inference(load(given.weights, say=say), device_of(given.device), say)
    factor = model.config.vae.factor
    if given.size % factor:
        raise InputError(f"--size {given.size}; expected a multiple of {factor}, the latent factor of these weights")
    same = model.pose is None                                            # pre-training: a picture from its own parts
    of = judge.pairs(given.count, given.seed, given.size, int(given.stranger), given.person, same)
    with tqdm(total=len(of), unit="picture", disable=None) as bar:
        made = judge.imagined(model, of, given.steps, given.cfg, given.seed, bar.update)
    rows = {"ours": judge.scores(made, of), "copy": judge.scores(judge.copied(of), of),
            "ceiling": judge.scores(judge.through_vae(model, of), of)}
    print(f"{'':10}" + "".join(f"{column:>11}" for column in rows["ours"]))
    for name, row in rows.items():
        print(f"{name:10}" + "".join(f"{'–':>11}" if math.isnan(value) else f"{value:11.3f}" for value in row.values()))
    if given.json:
        found = {("" if name == "ours" else f"{name}.") + column: None if math.isnan(value) else value
                 for name, row in rows.items() for column, value in row.items()}
        found |= {name: getattr(given, name) for name in ("count", "steps", "cfg", "seed", "stranger", "person")}
        with appearing(given.json) as place:
            place.write_text(json.dumps(found, indent=1))
    if given.pictures:
        judge.write_sheet(Path(given.pictures), judge.sheet(made[:16], of[:16], not same))


if __name__ == "__main__":
    run(main)
