"""Checkpoint: everything a run needs to go on as if it had never stopped, in one folder that is whole or not there.

    RUN/step-0000500/model.safetensors     the weights to use: the running average, where there is one
                     config.yaml           of the model; these two are a folder for --weights
                     training.safetensors  the weights that train (and LoRA's factors), the optimizer's moments
                     training.yaml         step, recipe, number of processes, loss scale, checksums of the others
    RUN/last -> step-0000500

What a step draws follows from (seed, step), so no state of random generators is kept.
"""
import fcntl
import json
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from nanodisco import lora, weights
from nanodisco.config import ModelConfig
from nanodisco.errors import InputError
from nanodisco.files import appearing, replacing, write_text
from nanodisco.optim import Average, remembered

CHECKED = ("model.safetensors", "config.yaml", "training.safetensors")
CHUNK = 1 << 24


@dataclass
class State:
    """What changes from step to step."""
    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: Average | None
    scaler: torch.amp.GradScaler | None = None
    step: int = 0                      # that comes next

    def named(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def save(run: Path, state: State, config: ModelConfig, about: dict, keep: int = 0) -> Path:
    """Write RUN/step-N and let `last` point there; then remove all but the `keep` newest up to it (0: none)."""
    place = run / f"step-{state.step:07}"
    if place.exists():                                                   # damaged, or it would have been gone on from
        shutil.rmtree(place)
    with appearing(place) as folder:
        shown = lora.merged(state.model.state_dict() | (state.average.tensors if state.average else {}))
        weights.write_folder(folder, shown, config)
        _write_tensors(folder / "training.safetensors", state)
        about = {"step": state.step, "scaler": state.scaler.state_dict() if state.scaler else None} | about
        about["checksums"] = {name: checksum(folder / name) for name in CHECKED}
        (folder / "training.yaml").write_text(yaml.safe_dump(about, sort_keys=False))
    point(run, place)
    for old in [old for old in found(run) if old.name <= place.name][:-keep] if keep else []:    # later ones: damaged
        shutil.rmtree(old)
    return place


def _write_tensors(path: Path, state: State) -> None:
    tensors = {}
    for name, tensor in state.model.state_dict().items():
        if lora.belongs(name) or state.average and name in state.average.tensors:
            tensors[f"weight.{name}"] = tensor.contiguous()
    for name, tensor in state.average.tensors.items() if state.average else ():
        if lora.belongs(name):
            tensors[f"average.{name}"] = tensor
    for name, parameter in state.named().items():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value.contiguous()
    try:
        save_file(tensors, path)
    except SafetensorError as error:                                     # hides the OSError of a full disk
        raise OSError(28, str(error)) from None


def way_back(run: Path, changed: str) -> str:
    """What to do when a step has gone wrong: go on before it with something changed, or begin anew."""
    if (run / "last").exists():
        return f"the last checkpoint is kept ({run}/last). Resume with --resume=force and {changed}"
    return f"there is no checkpoint yet. Start again with {changed}"


def point(run: Path, place: Path) -> None:
    """Let RUN/last be this checkpoint."""
    with replacing(run / "last") as beside:
        beside.symlink_to(place.name)


def checksum(path: Path) -> str:
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def found(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, whole or not."""
    return sorted(path for path in run.glob("step-*") if re.fullmatch(r"step-\d+", path.name))


def newest(run: Path, say: Callable[[str], None]) -> tuple[Path, dict] | None:
    """The newest whole checkpoint and what its training.yaml says; None if there is none yet.

    Damaged ones are passed over, and named. InputError if all are.
    """
    for place in reversed(found(run)):
        try:
            about = yaml.safe_load((place / "training.yaml").read_text())
            wrong = [name for name, value in about["checksums"].items() if checksum(place / name) != value]
        except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
            wrong = [f"training.yaml ({type(error).__name__})"]
        if not wrong:
            return place, about
        say(f"{place} is damaged ({', '.join(wrong)}); passed over")
    if places := found(run):
        raise InputError(f"{run}: no checkpoint of {len(places)} is whole; copy one back, or begin anew with another "
                         "--out=")
    return None


def restore(place: Path, about: dict, state: State) -> None:
    """Put a checkpoint's content into a State that was made by the same recipe.

    What another optimizer remembered is left out: this one begins anew there.
    """
    model, training = load_file(place / "model.safetensors"), load_file(place / "training.safetensors")
    held = {name.removeprefix("weight."): tensor.shape for name, tensor in (model | training).items()}
    other = [name for name, tensor in state.model.state_dict().items() if held.get(name) != tensor.shape]
    if other:
        raise InputError(f"{place} holds another network than the recipe's ({', '.join(other[:3])}, …); give it the "
                         f"one that it had, or begin anew with another --out= and --start=[{place}]")
    with torch.no_grad():
        for name, tensor in state.model.state_dict().items():
            tensor.copy_(training[f"weight.{name}"] if f"weight.{name}" in training else model[name])
        for name, tensor in state.average.tensors.items() if state.average else ():
            tensor.copy_(training[f"average.{name}"] if lora.belongs(name) else model[name])
    for name, parameter in state.named().items():
        room = remembered(state.optimizer, parameter)
        if all(f"{key}.{name}" in training for key in room):             # else they are another optimizer's
            state.optimizer.state[parameter] = {key: x.copy_(training[f"{key}.{name}"]) for key, x in room.items()}
    if state.scaler and about["scaler"]:
        state.scaler.load_state_dict(about["scaler"])
    state.step = about["step"]


def lock(run: Path) -> IO:
    """Claim a run's folder for as long as the file that is returned stays open, or this process lives."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = open(run / ".lock", "w")
    except OSError as error:
        raise InputError(f"cannot write {run}: {error.strerror}; choose another --out=") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)                 # not flock: workers would inherit that
    except (BlockingIOError, PermissionError):
        raise InputError(f"{run} is in use: another process trains there; wait for it, or stop it") from None
    return file


def tidy(run: Path) -> None:
    """Remove what a killed process has left half-written."""
    for place in run.glob(".step-*"):
        shutil.rmtree(place, ignore_errors=True)
    for path in (*run.glob(".*.part"), *run.glob("validation/.*.part")):
        path.unlink(missing_ok=True)


def cut_log(log: Path, step: int) -> None:
    """Drop the lines of steps after this one: they are made again."""
    if log.exists():
        lines = [line for line in log.read_text().splitlines(keepends=True)
                 if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_text(log, "".join(lines))


def differences(old: dict, new: dict, where: str = "") -> list[str]:
    """`key: old -> new` of what two nested dicts do not share."""
    changed = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changed += differences(a, b, f"{where}{key}.")
        elif a != b:
            changed.append(f"{where}{key}: {a} -> {b}")
    return changed


def refuse_changes(old: dict, new: dict, place: Path, force: bool, say: Callable[[str], None]) -> None:
    """InputError with all differences; by `force` they are said, and the run goes on."""
    if changed := "; ".join(differences(old, new)):
        if not force:
            raise InputError(f"{place} was made by another run ({changed}); give it what it had, or --resume=force to "
                             "go on with the new")
        say(f"{place} was made by another run; it goes on by force: {changed}")
