"""TSV: the official program's files of many pictures, one row a picture.

    NAME.tsv       key <TAB> base64 of a picture file <LF>
    NAME.lineidx   byte offset of each row, decimal, one a line
"""
import base64
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from nanodisco.errors import InputError


class Table:
    """The rows of one TSV file, read when they are asked for."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.offsets = self._line_index()
            self.size = self.path.stat().st_size
        except FileNotFoundError as error:
            raise InputError(f"{error.filename} is not there; expected the TSV file of a data set") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path} cannot be read: {error}") from None

    def _line_index(self) -> list[int]:
        """From the .lineidx file, or by reading through where there is none."""
        index = self.path.with_suffix(".lineidx")
        if index.exists():
            return [int(line) for line in index.read_text().split()]
        with open(self.path, "rb") as file:
            offsets = [0]
            for line in file:
                offsets.append(offsets[-1] + len(line))
            return offsets[:-1]

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, i: int) -> list[str]:
        """The fields of row i."""
        if not 0 <= i < len(self):
            raise InputError(f"{self.path} has {len(self)} rows; row {i} was asked for")
        with open(self.path, "rb") as file:
            file.seek(self.offsets[i])
            row = file.readline()
        try:
            return [field.strip() for field in row.decode("utf-8").split("\t")]
        except UnicodeDecodeError:
            raise InputError(f"{self.path}, row {i}: not text; the .lineidx may be of another file") from None

    def picture(self, i: int, column: int = -1) -> Image.Image:
        """The picture in row i, RGB."""
        fields = self[i]
        try:
            return Image.open(io.BytesIO(base64.b64decode(fields[column], validate=True))).convert("RGB")
        except (ValueError, IndexError, OSError):
            raise InputError(f"{self.path}, row {i}: no base64 of a picture, or the .lineidx is another's") from None


class CompositeTable:
    """Rows of several tables in the order of a list, used as one Table: the files of a composite set.

    order: [table, row] of each; prefixes: what a key of each table begins with, since two may have the same.
    """

    def __init__(self, tables: list[Table], order: list[tuple[int, int]], prefixes: list[str], path: Path):
        self.tables, self.order, self.prefixes, self.path = tables, order, prefixes, path
        for i, (source, row) in enumerate(order):
            if not (0 <= source < len(tables) and 0 <= row < len(tables[source])):
                rows = ", ".join(f"{table.path} {len(table)}" for table in tables)
                raise InputError(f"{path}, row {i}: file {source}, row {row}; there are, with their rows: {rows}")
        self.offsets, self.size = [order, [table.offsets for table in tables]], [table.size for table in tables]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> list[str]:
        if not 0 <= i < len(self):
            raise InputError(f"{self.path} has {len(self)} rows; row {i} was asked for")
        source, row = self.order[i]
        key, *fields = self.tables[source][row]
        return [self.prefixes[source] + key, *fields]

    def picture(self, i: int, column: int = -1) -> Image.Image:
        source, row = self.order[i]
        return self.tables[source].picture(row, column)


@contextmanager
def writer(path: str | Path) -> Iterator[Callable[..., None]]:
    """A function that appends one row, its fields, to NAME.tsv, and where it begins to NAME.lineidx."""
    path = Path(path)
    with open(path, "wb") as rows, open(path.with_suffix(".lineidx"), "w", newline="\n") as index:
        def write(*fields) -> None:
            index.write(f"{rows.tell()}\n")
            rows.write("\t".join(map(str, fields)).encode() + b"\n")
        yield write


def encoded(picture: Image.Image) -> str:
    """A picture as a field of a row.

    official: JPEG, for poses and masks too. PNG is read there as well, and loses nothing.
    """
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
