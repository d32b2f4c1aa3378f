"""Training, every stage: what is trained on what, and how, is in a YAML file (nanodisco/recipe.py).

    python train.py config/nano/vae.yaml
    torchrun --nproc-per-node=8 train.py config/finetune.yaml --train.lr=1e-4
    python train.py config/nano/vae.yaml --resume=auto           # after whatever stopped it
"""
import argparse
import os
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from nanodisco import recipe as recipes
from nanodisco.errors import InputError, run


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, recipes.Recipe]:
    top = argparse.ArgumentParser(prog="train.py", description="Train one stage.",
                                  epilog="Any field of the YAML file can be set: --train.lr=1e-4 --data.clips=500 "
                                         "(all of them, and what they mean: nanodisco/recipe.py)")
    top.add_argument("recipe", metavar="YAML", help="config/*.yaml, config/nano/*.yaml")
    top.add_argument("--resume", choices=("auto", "force"), help="go on from the newest whole checkpoint in the run's "
                     "folder, if there is one; force: although the recipe has changed")
    top.add_argument("--device", default="auto", help="auto, cpu, cuda (default auto)")
    given, more = top.parse_known_args(argv)
    return given, recipes.load(given.recipe, more)


def main(argv: list[str] | None = None) -> None:
    given, recipe = parse(argv)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")                # DDP warns of what is meant so, see below
    import torch                                                         # slow, so only when the recipe is sound

    from kernels import cpu
    from nanodisco import checkpoint, data, optim, start, validation
    from nanodisco.distributed import World

    world, t, folder = World.join(given.device), recipe.train, Path(recipe.out)
    say = partial(print, flush=True) if world.rank == 0 else lambda text: None
    if world.device == "cpu":
        cpu.suit_small_tensors()
    if t.batch % (world.size * t.accumulate):
        raise InputError(f"train.batch {t.batch} cannot be dealt to {world.size} processes x {t.accumulate} parts "
                         "(train.accumulate); expected a multiple")
    if checkpoint.found(folder) and not given.resume:
        raise InputError(f"{folder} holds a run already; --resume=auto goes on with it, another --out= begins anew")
    model = start.model(recipe, say).to(world.device)
    if world.device != "cpu":
        model = model.to(memory_format=torch.channels_last)
    parameters = start.trainable(model, recipe)
    with_pose = recipe.stage == "diffusion" and model.pose is not None
    dataset = data.Training(recipe.data, model.config.clip, with_pose, t.seed)
    steps = t.steps or t.epochs * max(len(dataset) // t.batch, 1)
    world.wait()
    if world.rank == 0:
        claim = checkpoint.lock(folder)                                  # noqa: F841  held until this process ends
        checkpoint.tidy(folder)
    world.wait()

    about = {"recipe": recipes.lasting(recipe), "data": dataset.source.fingerprint(), "processes": world.size}
    resumed = checkpoint.newest(folder, say) if given.resume else None
    if resumed:
        checkpoint.refuse_changes({key: resumed[1][key] for key in about}, about, resumed[0], given.resume == "force",
                                  say)
    if not resumed and recipe.stage == "vae" and model.config.vae.linear and not recipe.start:
        start.principal_components(model, dataset)
    optimizer = optim.optimizer(model, t.optimizer, world.each, lr=t.lr, betas=t.betas,
                                weight_decay=t.weight_decay)
    average = optim.Average(model.named_parameters()) if t.ema and world.rank == 0 else None
    scaler = torch.amp.GradScaler(world.device.split(":")[0]) if t.precision == "fp16" else None
    state = checkpoint.State(model, optimizer, average, scaler)
    if resumed:
        checkpoint.restore(*resumed, state)
    if world.sum(torch.tensor(state.step, device=world.device)).item() != world.size * state.step:
        raise InputError(f"{folder} is not the same folder for all processes; expected one that all machines see")
    if world.rank == 0:
        checkpoint.cut_log(folder / "log.jsonl", state.step)
        if resumed:
            checkpoint.point(folder, resumed[0])                         # a run may die before it does, or be damaged
    say(f"{sum(p.numel() for p in parameters):,} of {sum(p.numel() for p in model.parameters()):,} values train; "
        f"step {state.step} of {steps}; {folder}")
    if t.checkpointing:
        optim.checkpoint_activations(model)

    batches = data.loader(dataset, t.batch, state.step, steps, world.rank, world.size, recipe.data.workers)
    network = start.Loss(model, t) if recipe.stage == "diffusion" else start.VAELoss(model, t)
    if world.size > 1:
        # unused parameters are looked for so that DDP keeps its first buckets: new ones add in another order, and a
        # run that goes on would differ in its last bits
        network = torch.nn.parallel.DistributedDataParallel(network, find_unused_parameters=True)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(t.precision)
    autocast = partial(torch.autocast, world.device.split(":")[0], dtype, enabled=dtype is not None)
    began, first = time.perf_counter(), state.step
    log = validation.Log(folder, recipe, state.step) if world.rank == 0 else None

    from tqdm import tqdm
    bar = tqdm(total=steps, initial=state.step, unit="step", disable=None if world.rank == 0 else True)
    while state.step < steps:
        rate = optim.learning_rate(state.step, steps, t.lr, t.warmup, t.constant_lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        samples = {name: tensor.to(world.device) for name, tensor in next(batches).items()}
        whole = len(data.indices(len(dataset), t.batch, t.seed, state.step))
        share = data.shares(whole, world.size)[world.rank]
        draws = start.draws(model, samples["target"].shape, whole, t, state.step)
        loss = torch.zeros((), device=world.device)
        for k, part in enumerate(data.shares(len(share), t.accumulate)):
            last = k == t.accumulate - 1
            part, weight = part or range(1), len(part) / whole           # an empty part counts nothing, but takes part
            rows = slice(part.start, part.stop)
            own = start.rows(draws, (share.start + part.start) % whole, len(part))
            with nullcontext() if last or world.size == 1 else network.no_sync():
                with autocast():
                    error = network({name: x[rows] for name, x in samples.items()}, own) * weight
                scaled = error * world.size                              # several processes: the gradients are averaged
                (scaler.scale(scaled) if scaler else scaled).backward()
            loss += error.detach()
        loss = world.sum(loss).item()
        strict = not scaler or scaler.get_scale() <= 1                   # float16 may overflow, until the scale is low
        if not loss < float("inf") and strict:
            raise InputError(f"the loss of step {state.step + 1} is {loss}; " +
                             checkpoint.way_back(folder, "another learning rate: --train.lr=…"))
        if scaler:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, t.clip_norm or float("inf")).item()
        if not norm < float("inf") and strict:
            raise InputError(f"the gradient of step {state.step + 1} is not finite; " +
                             checkpoint.way_back(folder, "--train.clip_norm=1 or another --train.lr"))
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if average and norm < float("inf"):                              # a step that overflowed has changed nothing
            average.update(model, optim.decay(state.step, t.ema))
        state.step += 1
        bar.update()
        bar.set_postfix(loss=f"{loss:.4f}", lr=f"{rate:.1e}")
        if world.rank == 0 and (state.step % t.log_every == 0 or state.step == steps):
            speed = (state.step - first) / (time.perf_counter() - began)
            log.write({"step": state.step, **{name: value if value < float("inf") else None
                                              for name, value in (("loss", loss), ("norm", norm))},
                       "lr": rate, "steps_per_second": round(speed, 3)})
        stopped = time.perf_counter()
        if t.validate_every and (state.step % t.validate_every == 0 or state.step == steps):
            if world.rank == 0:
                with average.shown(model) if average else nullcontext(), autocast():
                    scores = validation.validate(model, recipe, folder / f"validation/step-{state.step:07}.png")
                log.write({"step": state.step} | scores)
            world.wait()
        if state.step % t.save_every == 0 or state.step == steps:
            if world.rank == 0:
                if not all(p.isfinite().all() for p in parameters):
                    raise InputError(f"weights of step {state.step} are not finite; " +
                                     checkpoint.way_back(folder, "another learning rate: --train.lr=…"))
                checkpoint.save(folder, state, model.config, about, t.keep)
            world.wait()
        began += time.perf_counter() - stopped                           # speed is that of steps alone
    bar.close()
    if world.rank == 0:
        validation.curve(folder / "log.jsonl", folder / "loss.png")
    say(f"{steps} steps: {folder}/last")
    world.leave()


if __name__ == "__main__":
    run(main)
