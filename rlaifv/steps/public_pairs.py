"""The public RLAIF-V dataset, or any parquet in its columns: its rows, and its pairs in place of a run of feedback."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError

from rlaifv.fingerprint import LARGE, digest_files
from rlaifv.records import json_object

PAIR = ("question", "chosen", "rejected")


def fetch_pairs(source: str | Path) -> Path:
    """The file or folder of pairs that `source` means: one that is there, or the parquet files of a dataset of the hub,
    fetched once. Raises FileNotFoundError, in one line, where it is neither."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if str(source).count("/") != 1 or str(source).startswith((".", "/")):
        raise FileNotFoundError(
            f"no pairs at {source}: give a parquet file, a folder of them, or owner/name of the hub"
        )
    try:
        folder = Path(snapshot_download(str(source), repo_type="dataset", allow_patterns="*.parquet"))
    except (OSError, ValueError, HTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(f"cannot fetch the dataset {source}: {reason}") from None
    return folder if any(folder.glob("*.parquet")) else folder / "data"


def parquet_files(path: Path) -> list[Path]:
    """The file of pairs itself, or a folder's parquet files in order of name. Raises FileNotFoundError where there is
    none, ValueError naming a column that one of them lacks."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise FileNotFoundError(f"no parquet file of preference pairs at {path}")
    for file in files:
        check_columns(file, ("image", *PAIR))
    return files


def check_columns(file: Path, columns: Sequence[str]) -> set[str]:
    """The columns of a file; ValueError where one of `columns` is neither among them nor in the JSON of `text`, where
    older releases keep question, chosen and rejected, and where `image` holds something else than image files."""
    names = set(pq.read_schema(file).names)
    needed = [name for name in columns if name == "image" or (name in PAIR and "text" not in names)]
    if missing := [name for name in needed if name not in names]:
        raise ValueError(f"{file} has no column {', '.join(missing)}; its columns are {', '.join(sorted(names))}")
    if "image" in columns:
        check_images(file)
    return names


def check_images(file: Path) -> None:
    """ValueError unless the column `image` holds the bytes of image files, plain or beside their paths, in some row."""
    kind, metadata = pq.read_schema(file).field("image").type, pq.read_metadata(file)
    plain = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    if not plain and not (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0):
        problem = f"is {kind}"
    else:
        place = "image" if plain else "image.bytes"
        groups = [metadata.row_group(k) for k in range(metadata.num_row_groups)]
        cells = [group.column(k) for group in groups for k in range(group.num_columns)]
        filled = [
            cell.statistics is None or cell.statistics.num_values for cell in cells if cell.path_in_schema == place
        ]
        if any(filled) or not filled:
            return
        problem = "holds no bytes, only paths"
    raise ValueError(f"{file}: its column image {problem}: write the bytes of the image files into it")


def public_rows(files: Sequence[Path], columns: Sequence[str]) -> Iterator[dict]:
    """These columns of the dataset's rows, a few rows at a time, those that a file lacks from the JSON of `text`; None
    where a value is not there. Raises what `check_columns` does."""
    for file in files:
        names = check_columns(file, columns)
        wanted = [name for name in (*columns, "text") if name in names]
        for batch in pq.ParquetFile(file, memory_map=True).iter_batches(batch_size=64, columns=wanted):
            for row in batch.to_pylist():
                text = json_object(row.pop("text", None))
                if isinstance(row.get("image"), bytes):  # a plain column
                    row["image"] = {"bytes": row["image"], "path": None}
                yield {name: row[name] if row.get(name) is not None else text.get(name) for name in columns}


def problem(row: dict) -> str:
    """Why nothing can be learned from a row's texts; "" where something can."""
    empty = next((name for name in PAIR if not str(row[name] or "").strip()), None)
    if empty:
        return f"{empty} is empty"
    return "chosen and rejected are the same answer" if row["chosen"] == row["rejected"] else ""


def first_pair(files: Sequence[Path]) -> dict:
    """The first row with two answers and an image; StopIteration where there is none."""
    rows = public_rows(files, ("image", *PAIR))
    return next(row for row in rows if not problem(row) and (row["image"] or {}).get("bytes"))


def count_pairs(files: Sequence[Path]) -> dict[str, object]:
    """What `pairs.statistics` says, of pairs that somebody else has made; the images, 14 GB of them, are not read.

    `rejects` counts the rows that training will leave out for their texts, `made_by` what `origin_split` says in JSON
    (the models that answered and judged, the kind of question). The fingerprint changes with any of the files.
    Raises what `public_rows` does, and ValueError where no pair is left.
    """
    rejects, made_by, prompts = Counter(), Counter(), set()
    pairs = chosen = rejected = 0
    for row in public_rows(files, (*PAIR, "image_path", "origin_split")):
        if reason := problem(row):
            rejects[reason] += 1
            continue
        pairs += 1
        chosen += len(row["chosen"].split())
        rejected += len(row["rejected"].split())
        prompts.add((row["image_path"], row["question"]))
        origin = json_object(row["origin_split"])
        named = {key: value for key, value in origin.items() if isinstance(value, str | int) and key != "instruction"}
        made_by.update(f"{key}: {value}" for key, value in named.items())
    if not pairs:
        raise ValueError(f"no pair to learn from in {', '.join(map(str, files))}: {dict(rejects)}")
    return {
        "pairs": pairs,
        "pairs_before_balance": pairs,
        "instructions_with_pairs": len(prompts),
        "length_threshold_r": 1.0,
        "mean_words_chosen": chosen / pairs,
        "mean_words_rejected": rejected / pairs,
        "score_gaps": {},
        "rejects": dict(rejects.most_common()),
        "made_by": dict(made_by.most_common(12)),
        "fingerprint": digest_files(*files, by_stat_from=LARGE),
    }
