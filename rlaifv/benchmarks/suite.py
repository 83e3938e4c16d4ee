"""The published benchmarks of a parameter file: let a model answer them, score the answers, keep what a report needs.

Notebook 84 calls `check_files` first, then `answer`, which loads the policy, and `score` after it is gone, so that a
judge in the same process finds the memory free. Both go on where a stopped run
was: answers through the scratch store, a judge's replies through its cache.
"""

import base64
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image

from rlaifv import ROOT
from rlaifv.benchmarks import published
from rlaifv.benchmarks.judge import Judge, judge_server, load_judge, open_judge, served_judge
from rlaifv.evaluation.answers import (
    ID_FIELDS,
    IMAGE_FIELDS,
    QUESTION_FIELDS,
    coco_number,
    lookup,
    read_json_objects,
)
from rlaifv.evaluation.bootstrap import intervals
from rlaifv.evaluation.scores import Scores
from rlaifv.fingerprint import digest, digest_files
from rlaifv.inference.decoding import fit_answers
from rlaifv.inference.engine import start_engine
from rlaifv.inference.roles import Model, look
from rlaifv.inference.sampling import Prompt
from rlaifv.inference.served import Served, encoded_url
from rlaifv.params import BenchmarkParams, EvaluateParams, JudgeParams, Params, ServerParams
from rlaifv.records import IMAGE_PLACES, Reject, batched, read_jsonl, write_jsonl
from rlaifv.results import write_result
from rlaifv.store import Store
from rlaifv.vlm.chat_format import UnfitText
from rlaifv.vlm.checkpoint import fingerprint_checkpoint, resolve_checkpoint
from rlaifv.vlm.images import decode_image
from rlaifv.vlm.loading import free_memory, loaded, on_gpu

log = logging.getLogger(__name__)

NONE = "no benchmarks configured"
MAX_WITHOUT_REPLY = 0.05
"""Share of rows that a judge may leave without any reply; with more of them the stage stops, to go on later."""

_INLINE = re.compile(r"[A-Za-z0-9+/=\s]{200,}")  # an image in base64, as Object HalBench's question file has it


@dataclass(frozen=True)
class BenchmarkQuestion:
    """One question of a benchmark about the image called `name`: a file, the image itself in base64, or none."""

    id: str
    text: str
    name: str
    image: Path | str | None


def check_files(benchmarks: Mapping[str, BenchmarkParams]) -> None:
    """FileNotFoundError names the first path of the parameter file that does not exist, before any model is loaded."""
    for line in missing_files(benchmarks):
        raise FileNotFoundError(line)


def missing_files(benchmarks: Mapping[str, BenchmarkParams]) -> Iterator[str]:
    """A line for every path of the benchmarks that does not exist, with the way out."""
    for name, item in benchmarks.items():
        files = {"questions": item.questions, "truth": item.truth, "answers": (item.answers,)}
        files |= {"vocabulary": (item.vocabulary,), "images": (None if item.answers else item.images,)}
        files["judge.prompts"] = item.judge.prompts if item.judge else ()
        for key, paths in files.items():
            if absent := [path for path in paths if path and not (ROOT / path).exists()]:
                yield (
                    f"benchmarks.{name}.{key}: no {absent[0]}; `python -m rlaifv.benchmarks.fetch` gets questions and "
                    "truths, docs/benchmarks.md says where images come from"
                )


def check_inputs(params: Params) -> list[str]:
    """What the benchmarks will lack at the end of a run, found at its start: files, images, judges; a line each with
    the way out. Nothing is loaded and no question asked."""
    found = list(missing_files(params.benchmarks))
    for name, item in params.benchmarks.items():
        folder = ROOT / item.images if item.images and not item.answers else None
        if folder and folder.is_dir() and not any(folder.iterdir()):
            found.append(f"benchmarks.{name}.images: {item.images} is empty; docs/benchmarks.md says where images are")
    judges = {(item.judge.name, item.judge.base_url): name for name, item in params.benchmarks.items() if item.judge}
    for (model, address), name in judges.items():
        if address and (problem := judge_server(model, address, params.server).problem()):
            found.append(f"benchmarks.{name}.judge: {problem}")
        elif address is None and not (ROOT / model).is_dir() and model.count("/") != 1:
            found.append(f"benchmarks.{name}.judge.name: {model} is neither a folder nor a hub id; or give a base_url")
    return found


def answer(
    load: Callable[[], Model],
    benchmarks: Mapping[str, BenchmarkParams],
    params: EvaluateParams,
    store_of: Callable[[str], Store],
    out: Path,
) -> None:
    """Let the model answer every benchmark that asks ours: `out`/benchmarks/NAME/answers.jsonl.

    A question whose image is missing or broken, or that cannot be put to the model (one of its special tokens is in it,
    or the context is too short), goes to `rejects.jsonl` beside the answers, with its reason.

    Args:
        load: gives the policy; called when a question is left to answer.
        params: batch size and longest answer.
        store_of: the store of a piece of unfinished work by its name (`Stage.store`).
        out: the iteration's results folder.

    Raises:
        ValueError: no question of a benchmark has an image that can be read.
    """
    with loaded(load) as policy:
        for name, item in benchmarks.items():
            if item.answers is not None:
                continue
            questions = read_questions(item)
            asked = digest([digest_files(*(ROOT / path for path in item.questions)), [str(q.image) for q in questions]])
            store = store_of(f"{name}-{asked}")  # the benchmark's own files are no dependency that DVC knows
            work = partial(_answer_chunk, policy, item=item, params=params)
            store.run(batched(questions, params.batch_size), work)
            folder = out / "benchmarks" / name
            count, rejected = store.publish(folder / "answers.jsonl", len(questions), max_reject_rate=1)
            if not count:
                reason = read_jsonl(folder / "rejects.jsonl")[0]["reason"]
                raise ValueError(
                    f"benchmarks.{name}: none of {len(questions)} questions can be asked; the first: {reason}"
                )
            log.info("%s: %d of %d questions answered, %d rejected", name, count, len(questions), rejected)


def _answer_chunk(
    policy: Callable[[], Model], chunk: Sequence[BenchmarkQuestion], item: BenchmarkParams, params: EvaluateParams
) -> tuple[list[dict], list[Reject]]:
    readable, prompts, rejects = [], [], []
    for question in chunk:
        try:
            image = _open(policy(), question, item)
        except (OSError, ValueError) as error:
            rejects.append(Reject(question.id, "benchmarks", str(error)))
            continue
        readable.append(question)
        prompts.append(Prompt(image, f"{question.text} {item.suffix}".strip()))
    rows, texts = [], []
    if prompts:
        texts = fit_answers(policy(), prompts, item.beams, params.max_new_tokens, params.repetition_penalty)
    for question, text in zip(readable, texts, strict=True):
        if isinstance(text, UnfitText):
            rejects.append(Reject(question.id, "benchmarks", str(text)))
        else:
            row = {"question_id": question.id, "image": question.name, "question": question.text, "answer": text}
            rows.append(row)
    return rows, rejects


def _open(model: Model, question: BenchmarkQuestion, item: BenchmarkParams) -> Image.Image | str:
    """The image of a question as the model takes it; ValueError or FileNotFoundError say what is wrong with it."""
    if question.image is None:
        raise FileNotFoundError(f"no image {question.name} below {item.images}")
    if isinstance(question.image, Path):
        return look(model, question.image)
    image = decode_image(base64.b64decode(question.image), question.name)
    return encoded_url(image, "PNG") if isinstance(model, Served) else image


def read_questions(item: BenchmarkParams) -> list[BenchmarkQuestion]:
    """The questions of a benchmark's own files, with their images.

    Images are found below `item.images` by path, file name, stem or COCO number; a row may also hold its image itself,
    in base64.

    Raises:
        ValueError: a row that does not parse or holds no question.
    """
    table = _image_table(ROOT / item.images) if item.images else {}
    questions = []
    for path in item.questions:
        records, bad = read_json_objects(ROOT / path)
        if bad:
            raise ValueError(f"{path}, {bad[0]['id']}: {bad[0]['reason']}")
        for number, record in enumerate(records):
            identity = lookup(record, [name for name in ID_FIELDS if name != "image_id"]) or str(number)
            text = lookup(record, (*QUESTION_FIELDS, "text"))
            if not text:
                raise ValueError(f"{path}: row {identity} has no question, only {', '.join(map(str, record))}")
            values = [value for name in IMAGE_FIELDS if (value := lookup(record, (name,)))]
            names = [value for value in values if not _INLINE.fullmatch(value)]
            files = [table[key] for name in names for key in _image_names(name) if table.get(key)]
            image = next((value for value in values if value not in names), files[0] if files else None)
            text = IMAGE_PLACES.sub("", text)
            questions.append(BenchmarkQuestion(identity, text, names[0] if names else identity, image))
    return questions


def _image_table(folder: Path) -> dict[str, Path | None]:
    """Every name of an image below a folder → its file; None for a name that two files have."""
    table: dict[str, Path | None] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        for key in _image_names(path.relative_to(folder).as_posix()):
            table[key] = None if key in table else path
    return table


def _image_names(path: str) -> list[str]:
    """A path or address, its file name, its stem, and the number of a COCO image; the most literal first."""
    name = path.rsplit("/", 1)[-1]
    return list(dict.fromkeys(filter(None, [path, name, Path(name).stem, coco_number(name)])))


def score(
    benchmarks: Mapping[str, BenchmarkParams],
    iteration: str,
    out: Path,
    server: ServerParams,
    cache: Path | None = None,
) -> dict[str, dict]:
    """Score the answers of every benchmark; part `benchmarks` of the result in `out`, and NAME/rows.jsonl beside it.

    Someone else's answers are scored once, with the base (iteration "0").

    Args:
        out: the iteration's results folder; `answer` wrote to its `benchmarks`.
        server: how a served judge is asked.
        cache: folder of the judges' replies, default the repository's scratch folder.

    Returns:
        name → `kind`, `model`, `metrics`, `intervals` (95 %), `means` (rates that are no shares), `settings`, `missing`
        (what is not scored, and why) and `published` (`Spec.table`); {} without benchmarks.

    Raises:
        RuntimeError: a judge left more than `MAX_WITHOUT_REPLY` of the rows without a reply; all others are kept, and
            the next run asks for the missing ones alone.
    """
    if not benchmarks:
        print(NONE)
    results, silent = {}, []
    for name, item in benchmarks.items():
        if item.answers is not None and iteration != "0":
            continue
        folder = out / "benchmarks" / name
        answers = ROOT / item.answers if item.answers is not None else folder / "answers.jsonl"
        replies = (cache or ROOT / "scratch") / "judge" / f"{name}.jsonl"
        scores = score_file(item, answers, server, replies)
        without_verdict = scores.counts.get("n_without_verdict", 0)
        without_reply = without_verdict - scores.counts.get("n_unparsed", 0)
        if without_reply > MAX_WITHOUT_REPLY * (len(scores.rows) + without_verdict):
            reason = next(row["reason"] for row in scores.missing if "no reply" in row["reason"])
            silent.append(f"{without_reply:g} of {name}, {reason}")
            continue
        if not scores.rows:
            reason = scores.missing[0]["reason"] if scores.missing else "it is empty"
            raise ValueError(f"benchmarks.{name}: no answer of {answers.name} can be scored, the first: {reason}")
        model = Path(item.answers).name if item.answers is not None else _model_name(iteration)
        write_jsonl(folder / "rows.jsonl", scores.rows)
        results[name] = {
            "kind": item.kind,
            "model": model,
            "metrics": scores.metrics,
            "intervals": intervals(scores),
            "means": list(scores.means),
            "settings": dict(scores.settings),
            "missing": list(scores.missing),
            "published": published.SPECS[item.kind].table(scores, model),
        }
    if silent:
        raise RuntimeError(f"rows without a reply of the judge: {'; '.join(silent)}. Run again to ask for these alone")
    write_result(out, benchmarks=results)
    return results


def _model_name(iteration: str) -> str:
    return "base" if iteration == "0" else f"iteration {iteration}"


def score_file(item: BenchmarkParams, answers: Path, server: ServerParams, cache: Path) -> Scores:
    """One benchmark's scores of an answer file; what cannot be scored, unreadable rows included, is in `missing`."""
    spec = published.SPECS[item.kind]
    with judge_of(item.judge, server) if item.judge else nullcontext() as judge:
        scores, bad = spec.score(item, answers, judge, cache)
    if item.answers is None and spec.truth:  # a scorer that reads the questions lists those without an answer itself
        bad = [*bad, *({"id": r["id"], "reason": r["reason"]} for r in read_jsonl(answers.parent / "rejects.jsonl"))]
    return replace(scores, missing=[*scores.missing, *bad])


@contextmanager
def judge_of(params: JudgeParams, server: ServerParams) -> Iterator[Judge]:
    """The judge at a server's address, or the checkpoint that judges, here or behind a server of our own, for the time
    of a `with`."""
    if params.base_url:
        yield open_judge(params.name, params.base_url, server)
    elif params.engine == "transformers":
        yield load_judge(params.name)
        free_memory()
    else:
        dtype = "bfloat16" if on_gpu("auto") else "float32"
        engine = start_engine(resolve_checkpoint(params.name), params.name, dtype, server)
        try:
            name = f"{params.name}@{fingerprint_checkpoint(params.name)}"
            yield served_judge(name, engine.asked_by(server, give_up_after=5))
        finally:
            engine.close()
