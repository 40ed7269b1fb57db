"""Data sets by name → examples: those that are trained, and those that never are. The names are in `config.data_sets`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from nightschool.config.data_sets import DATA_SETS, DataSet, LastShare, Numbered, OwnFiles, PromptStyle
from nightschool.data.example import Example
from nightschool.data.sources.hub_files import hub_files
from nightschool.data.sources.problems import Problems
from nightschool.data.sources.row_templates import RowTemplate
from nightschool.data.sources.rows import ENDINGS, Row, read_rows
from nightschool.errors import DataError, NotFound

MOST_ROWS = 5_000_000
_TABLES = tuple(ending for ending in ENDINGS if ending != ".txt")


@dataclass(frozen=True)
class Files:
    """Where the rows of a data set lie. With files of their own for what is held out, `held_out` are these."""

    trained: list[Path] = field(default_factory=list)
    held_out: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class NamedRows:
    """The rows of a data set on their two sides, with an id each."""

    name: str
    trained: list[tuple[str, Row]]
    held_out: list[tuple[str, Row]]

    def examples(self, rows: Sequence[tuple[str, Row]], style: PromptStyle, problems: Problems) -> list[Example]:
        """Rows as question and answer; what is wrong with one goes to `problems`."""
        entry, made = DATA_SETS[self.name], []
        template = RowTemplate(entry.prompt_in(style), entry.answer)
        for own_id, row in rows:
            try:
                made.append(template.example(row, own_id))
            except DataError as error:
                problems.add(str(error))
        return made


def find_files(name: str, folders: Sequence[Path], *, trained: bool = True) -> Files:
    """The files of a data set: in the first of the folders that has them all, else in the Hub's cache or on the Hub.

    In a folder, they are `NAME.jsonl`, `NAME_train.jsonl` and `NAME_test.jsonl`, or whatever lies in a folder NAME and
    begins with `train` or `test`; JSON, Parquet and CSV are the same to it. Where rows to be trained are not wanted (`trained`), the files of
    what is held out are enough.

    Raises:
        NotFound: If it is nowhere; the message says where it was looked for and what to do.
    """
    entry = DATA_SETS[name]
    for folder in folders:
        files = _in_folder(name, entry, folder, trained=trained)
        if files is not None:
            return files
    try:
        found = hub_files(entry.hub, entry.files)
    except NotFound as error:
        looked = f"is not in {' or '.join(map(str, folders))}, and of the Hub: " if folders else "cannot be had: "
        put = f"Or put {_wanted(name, entry)} into {folders[-1]}, " if folders else "Or "
        raise NotFound(
            f"the data set {name} {looked}{error} {put}name the folder that has it (data.0.folder, --data-dir), or leave it out. "
            "Nothing else is taken in its place."
        ) from None
    if not isinstance(entry.split, OwnFiles):
        return Files(trained=found)
    sides = (entry.split.trained, entry.split.held_out)
    return Files(*([path for path in found if side and path.stem.lower().startswith(side)] for side in sides))


def find_all(names: Sequence[str], folders: Sequence[Path], *, trained: bool = True) -> dict[str, Files]:
    """As `find_files`, of several.

    Raises:
        NotFound: With every data set that is not there, and the names of those that are.
    """
    found: dict[str, Files] = {}
    missing = []
    for name in names:
        try:
            found[name] = find_files(name, folders, trained=trained)
        except NotFound as error:
            missing.append(str(error))
    if missing and len(names) > 1:
        missing.append(f"Of the {len(names)} data sets, these are there: {','.join(found) or 'none'}.")
    if missing:
        raise NotFound("\n".join(missing))
    return found


def read_data_set(
    name: str, files: Files, *, root: Path, problems: Problems, max_samples: int | None = None, trained: bool = True
) -> NamedRows:
    """Read the rows of a data set and part them.

    The split is that of the table, whatever `max_samples` is: a row that is held out of few is held out of all.

    Args:
        name: A name of the table.
        files: What `find_files` found.
        root: Messages name files below it by their relative path.
        problems: Gets malformed rows.
        max_samples: At most so many rows of each side, the first ones.
        trained: Whether rows that are trained are wanted; else they are left out.
    """
    entry = DATA_SETS[name]
    template = RowTemplate(entry.prompt + entry.headings, entry.answer)
    columns = template.fields | entry.columns

    def rows(paths: Sequence[Path]) -> Iterator[Row]:
        for path in paths:
            source = str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
            yield from read_rows(path, source=source, problems=problems, most_rows=MOST_ROWS, columns=columns)

    match entry.split:
        case OwnFiles():
            sides = [
                [(f"{name}/{side}/{number}", row) for number, row in enumerate(islice(rows(paths), max_samples))]
                for side, paths in (("train", files.trained if trained else []), ("test", files.held_out))
            ]
        case LastShare(share):
            numbered = [(f"{name}/{number}", row) for number, row in enumerate(rows(files.trained))]
            border = last_rows_begin(len(numbered), share)
            sides = [numbered[:border], numbered[border:]]
        case Numbered(column, trained_range, held_out_range):
            by_number = [(_number(row, column), row) for row in rows(files.trained)]
            sides = [
                [(f"{name}/{number}", row) for number, row in by_number if number in wanted]
                for wanted in (trained_range, held_out_range)
            ]
    return NamedRows(name, sides[0][:max_samples] if trained else [], sides[1][:max_samples])


def last_rows_begin(count: int, share: float) -> int:
    """The index at which the last share of `count` rows begins; where there are two rows, at least one is on each side."""
    if count < 2 or share <= 0:
        return count
    return min(count - 1, max(1, count - round(share * count)))


def _number(row: Row, column: str) -> int:
    number = row.fields.get(column)
    if isinstance(number, bool) or not isinstance(number, int):
        raise DataError(
            f"{row.where}: '{column}' is {number!r}, and a number is expected that says whether the row is trained."
        )
    return number


def _in_folder(name: str, entry: DataSet, folder: Path, *, trained: bool) -> Files | None:
    """The files of a data set below a folder; None if they are not all there."""
    if not folder.is_dir():
        return None
    split = entry.split
    if not isinstance(split, OwnFiles):
        found = _of_side(name, entry, folder, "")
        return Files(trained=found) if found else None
    held_out = _of_side(name, entry, folder, split.held_out)
    if split.trained is None:
        held_out = held_out or _of_side(name, entry, folder, "")
        return Files(held_out=held_out) if held_out else None
    own = _of_side(name, entry, folder, split.trained) if trained else []
    return Files(own, held_out) if held_out and (own or not trained) else None


def _of_side(name: str, entry: DataSet, folder: Path, side: str) -> list[Path]:
    """The files `NAME` or `NAME_SIDE` below a folder, or those of its folder NAME whose names begin with the side."""
    names = {f"{name}_{side}", f"{name}-{side}"} if side else {name}
    found = [path for path in _tables(folder.rglob("*")) if path.stem.lower() in names]
    if found:
        return found
    own = folder if folder.name.lower() == name else folder / name
    # As it lies on the Hub, where other files may lie beside those that are meant.
    within = _tables(path for pattern in entry.files for path in own.glob(pattern)) or _tables(own.rglob("*"))
    return [path for path in within if path.stem.lower().startswith(side)]


def _tables(paths: Iterable[Path]) -> list[Path]:
    return sorted({path for path in paths if path.suffix.lower() in _TABLES and path.is_file()})


def _wanted(name: str, entry: DataSet) -> str:
    if not isinstance(entry.split, OwnFiles):
        return f"{name}.jsonl"
    sides = [side for side in (entry.split.trained, entry.split.held_out) if side is not None]
    return " and ".join(f"{name}_{side}.jsonl" for side in sides)
