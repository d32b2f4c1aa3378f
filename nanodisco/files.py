"""Files appear whole or not at all: written beside their place, then renamed into it."""
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanodisco.errors import InputError


UMASK = os.umask(0)                    # it can only be asked by setting it
os.umask(UMASK)


def refuse_existing(path: str | Path) -> None:
    """InputError if something is there. To be asked before the work, not after it."""
    if Path(path).exists():
        raise InputError(f"{path} is already there; remove it or choose another name")


@contextmanager
def appearing(path: str | Path) -> Iterator[Path]:
    """A place to write the file or folder `path` to; it takes that name when the block ends well.

    The place does not exist yet: make it a file or a folder. An existing `path` is never touched.
    Whatever goes wrong, nothing is left behind; a full disk or a forbidden folder is an InputError.
    """
    path = Path(path)
    refuse_existing(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
    try:
        yield beside / path.name
        _let_all_read(beside / path.name)
        os.rename(beside / path.name, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; nothing was written") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A place to write the file `path` to; it takes that name, an existing file's too, when the block ends well."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.unlink(missing_ok=True)
            yield beside
            _let_all_read(beside)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def _let_all_read(written: Path) -> None:
    """Whom the system lets read new files: safetensors gives its files to their owner alone."""
    if written.is_symlink():                                             # to what has been written before
        return
    for path in written.rglob("*") if written.is_dir() else [written]:
        if path.is_file():
            path.chmod(0o666 & ~UMASK)


def write_text(path: Path, text: str) -> None:
    """A text file; an existing one is replaced."""
    with replacing(path) as place:
        place.write_text(text, encoding="utf-8")


def natural(name: str) -> list:
    """A sorting key by which frame2 comes before frame10."""
    return [int(part) if part.isdecimal() else part.lower() for part in re.split(r"(\d+)", name)]
