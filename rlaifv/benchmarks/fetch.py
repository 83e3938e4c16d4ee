"""Get the benchmarks' files: pinned revisions, checked by their hashes.

    python -m rlaifv.benchmarks.fetch NAME [--to data/benchmarks]      NAME: amber, coco, mmhal, …; `list` names all

Files lie in a folder of the benchmark's name. What is there with the right hash is not fetched again; a file with
another hash is refused and not kept.
"""

import argparse
import hashlib
import os
import shutil
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlaifv import ROOT

_GITHUB = "https://raw.githubusercontent.com"
_AMBER = f"{_GITHUB}/junyangwang0410/AMBER/534babf6bbfcce2e735c26289dedfb21cef3c939/data"
_POPE = f"{_GITHUB}/AoiDragon/POPE/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/coco"
_RLHFV = f"{_GITHUB}/RLHF-V/RLHF-V/3d35a91568b237fcc9d884463d9279fd7ae10350/eval"
_RLAIFV = f"{_GITHUB}/RLHF-V/RLAIF-V/59e9254d4b7fe68bdc87923279f8773ed0b5a49c/eval"
_OPERA = f"{_GITHUB}/shikiw/OPERA/61426efe4e2e53207f32d9112a86ba5f8364d1d9/log/chair_eval_results/llava-1.5"
_LESS_IS_MORE = f"{_GITHUB}/yuezih/less-is-more/f26e187aadacc49a7cfc30443f0e9bae865b8e2e/CHAIR-eval/data/Table1-results"
_CCA = f"{_GITHUB}/xing0047/cca-llava/8b5bb61d2cf6957ae428e52c4286fe8951f87bb2/outputs/chair"
_ANSWERED = f"{_GITHUB}/Haoming2000/VLM-Benchmarks/6d394c981c5f7300c12905b2d5bbb14898399730"
_MMHAL_JUDGING = f"{_GITHUB}/RLHF-V/RLAIF-V/67c98cda39d13c92c415123ab54a368797a93023/eval"
_OBJECT_JUDGING = f"{_GITHUB}/RLHF-V/RLAIF-V/1a9538316c2c38160c15b512635ca0c4a7221210/eval"
_REFOMB_JUDGING = f"{_GITHUB}/RLHF-V/RLAIF-V/3473ab15101d3ab726bf1845d1028821a54e9b37/eval"


@dataclass(frozen=True)
class File:
    """One file: where it is, "sha256:…" or "md5:…" of its bytes ("" where only the revision is pinned), and its path in
    the benchmark's folder where that is not its name alone."""

    url: str
    digest: str = ""
    place: str = ""

    @property
    def name(self) -> str:
        """The file's path in the benchmark's folder."""
        return self.place or self.url.rsplit("/", 1)[1]


@dataclass(frozen=True)
class Benchmark:
    """The files of a benchmark and what else a user has to do."""

    files: tuple[File, ...]
    note: str = ""


BENCHMARKS: Mapping[str, Benchmark] = {
    "amber": Benchmark(
        (
            File(
                f"{_AMBER}/annotations.json", "sha256:db22a436c4836fbb295e60b4e80d519573077579fb7032f01b193c1bd022b797"
            ),
            File(f"{_AMBER}/relation.json", "sha256:c4c1491e9bbc3209abc1888c12a1bf8413bdbab8a0d8be04b990a2e7680cf23e"),
            File(f"{_AMBER}/safe_words.txt", "sha256:f92cf1123f4578a2630832fac3e6ac4de36212ea55859d3bed4fd233723f4043"),
            File(
                f"{_AMBER}/query/query_generative.json",
                "sha256:b7e4c36596126ee36d2c3922638b7fa98743c26efda78fea2315f4425258d087",
            ),
            File(
                f"{_AMBER}/query/query_discriminative.json",
                "sha256:1502887ac020f4bb7ea564af4e37bddcb030d61b78490d00f9da492a2307abb8",
            ),
        ),
        "The images are a download by hand: the link is in the README of github.com/junyangwang0410/AMBER.",
    ),
    "coco": Benchmark(
        (
            File(
                "http://images.cocodataset.org/annotations/annotations_trainval2014.zip",
                "md5:0a379cfc70b0e71301e0f377548639bd",
            ),
        ),
        "Unpacked into annotations/. Images, 6 GB: http://images.cocodataset.org/zips/val2014.zip",
    ),
    "mmhal": Benchmark(
        (
            File(
                f"{_RLHFV}/data/mmhal-bench_answer_template.json",
                "sha256:28ed24e19ffef292597c35f1dad37760b2e0a088b3b40ca3b50f105fc1b951bb",
            ),
        ),
        "The images are at each row's image_src.",
    ),
    "refomb": Benchmark(
        (
            File(
                f"{_RLAIFV}/data/RefoMB_dev.jsonl",
                "sha256:19917494814211a40d683e519ebe87ad2d3d717bc4e051127f944b98d24a2f67",
            ),
            File(
                f"{_RLAIFV}/data/gpt4v_RefoMB_dev_0521.jsonl",
                "sha256:f3efb866a4154c284446943d90b93659b936e52e49f1d39cb8ccc45b29496ac6",
            ),
        ),
        "The development split, the only one released; the images are at each row's image_url.",
    ),
    "pope": Benchmark(
        (
            File(
                f"{_POPE}/coco_pope_adversarial.json",
                "sha256:1d8f0906a9b50c05640f6f23abfac97523be2a1bed28f7eadc63b811699b2d26",
            ),
            File(
                f"{_POPE}/coco_pope_popular.json",
                "sha256:5b16653023bf4f64d57eb0d168259de6627f5cde7538b85ebed3cc33034aa6cc",
            ),
            File(
                f"{_POPE}/coco_pope_random.json",
                "sha256:c16b65d2df6d70bb0814c8a4375833d39cdb09928fd936d3fc546491efa37f35",
            ),
        ),
        "Images: COCO val2014 (see coco).",
    ),
    "object_halbench": Benchmark(
        (
            File(
                f"{_RLHFV}/data/synonyms_refine.txt",
                "sha256:681041d2958d7871ed6fa69c3108f34aa6a0a354eb53ed4c5a425e65f86bc72a",
            ),
            File(f"{_RLHFV}/data/obj_halbench_300_with_image.jsonl"),
        ),
        "The ground truth is COCO's (fetch coco); the published synonym table is for --vocabulary.",
    ),
    "golden": Benchmark(
        (
            File(
                f"{_OPERA}/ours.jsonl",
                "sha256:63742c6032d28cfd0396afc24003900cef1aaf270ffef3f5ba3e10aaa7cde318",
                "chair_opera/llava-1.5/ours.jsonl",
            ),
            File(
                f"{_LESS_IS_MORE}/r1-llava1.5-7b.jsonl",
                "sha256:f8fdd4dc8f594bd628722d8213e4248c27f6f1d3da73e8a77dbd63ae30adc275",
                "chair_lessismore/r1-llava1.5-7b.jsonl",
            ),
            File(
                f"{_LESS_IS_MORE}/r7-llava1.5-13b.jsonl",
                "sha256:ef618e6064333cac7fe88d1390c7c6bb180bc09dfb94fd33f7a2fc1793bcb988",
                "chair_lessismore/r7-llava1.5-13b.jsonl",
            ),
            File(
                f"{_CCA}/llava-v1.5-7b_coco_chair_long_ans.jsonl",
                "sha256:48373a1421637e532cb266ccfdb3a2c88af1cc06cb639d74df560e523b009def",
                "chair_cca/llava-v1.5-7b_coco_chair_long_ans.jsonl",
            ),
            File(
                f"{_CCA}/llava-v1.5-7b_coco_chair_short_ans.jsonl",
                "sha256:02dfb28f07364732227b805484392db283be6efde5725c11c984dac4ab32973a",
                "chair_cca/llava-v1.5-7b_coco_chair_short_ans.jsonl",
            ),
            File(
                f"{_ANSWERED}/AMBER-master/results/llava-v1.5-7b.jsonl",
                "sha256:dbdf5760aebe6cf3a330c9cfca6c765f79ed0e76ac8a234e8782d7ac23facdb4",
                "amber_llava15/llava-v1.5-7b.jsonl",
            ),
            File(
                f"{_ANSWERED}/playground/data/eval/pope/answers/llava-v1.5-7b.jsonl",
                "sha256:94430ed66303d980eb1d28ba92c2dfbcbac11c1c36aded10b83c3bb368f7b89f",
                "pope_llava15/answers_llava-v1.5-7b.jsonl",
            ),
            File(
                f"{_POPE}/coco_pope_adversarial.json",
                "sha256:1d8f0906a9b50c05640f6f23abfac97523be2a1bed28f7eadc63b811699b2d26",
                "pope_llava15/coco_pope_adversarial.json",
            ),
            File(
                f"{_POPE}/coco_pope_random.json",
                "sha256:c16b65d2df6d70bb0814c8a4375833d39cdb09928fd936d3fc546491efa37f35",
                "pope_llava15/coco_pope_random.json",
            ),
        ),
        "Answers that others scored, which the tests read here; the truth is that of coco and amber: fetch them too.",
    ),
    "prompts": Benchmark(
        (
            File(f"{_MMHAL_JUDGING}/eval_gpt_mmhal.py"),
            File(f"{_OBJECT_JUDGING}/eval_gpt_obj_halbench.py"),
            File(f"{_REFOMB_JUDGING}/eval_RefoMB_p0.py"),
            File(f"{_REFOMB_JUDGING}/eval_hallucination.py"),
        ),
        "For --published-prompt; the files are read, never run.",
    ),
}


def fetch(name: str, to: str | Path, benchmarks: Mapping[str, Benchmark] = BENCHMARKS, timeout: float = 60) -> Path:
    """Download a benchmark's files that are not there yet; archives are unpacked.

    Returns:
        The folder of the benchmark.

    Raises:
        ValueError: an unknown benchmark, or a file whose hash is not the pinned one (it is not kept).
        ConnectionError: a file cannot be had; names the file and the server's reason.
    """
    if name not in benchmarks:
        raise ValueError(f"no benchmark {name!r}; there are {', '.join(benchmarks)}")
    folder = Path(to) / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in benchmarks[name].files:
        target = folder / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and (not file.digest or _digest(target, file.digest) == file.digest):
            print(f"{target}: already there")
            continue
        _download(file, target, timeout)
        if target.suffix == ".zip":
            with zipfile.ZipFile(target) as archive:
                archive.extractall(folder)
    return folder


def _download(file: File, target: Path, timeout: float) -> None:
    part = target.with_name(target.name + ".part")
    try:
        with urllib.request.urlopen(file.url, timeout=timeout) as answer, part.open("wb") as out:
            shutil.copyfileobj(answer, out, 1 << 20)
    except (urllib.error.URLError, OSError) as error:
        part.unlink(missing_ok=True)
        raise ConnectionError(f"cannot fetch {file.url}: {error}") from None
    found = _digest(part, file.digest or "sha256:")
    if file.digest and found != file.digest:
        part.unlink()
        raise ValueError(f"{file.url} has {found}, expected {file.digest}: the file changed; it was not kept")
    os.replace(part, target)
    print(f"{target}: {target.stat().st_size} bytes, {found}{'' if file.digest else ' (only its revision is pinned)'}")


def _digest(path: Path, like: str) -> str:
    """The hash of a file, by the algorithm that `like` names."""
    algorithm = like.split(":")[0]
    with path.open("rb") as stream:
        return f"{algorithm}:{hashlib.file_digest(stream, algorithm).hexdigest()}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m rlaifv.benchmarks.fetch", description=__doc__.split("\n")[0])
    parser.add_argument("name", help=f"{', '.join(BENCHMARKS)}, or list")
    parser.add_argument("--to", default=ROOT / "data/benchmarks", help="folder for all (default: data/benchmarks)")
    options = parser.parse_args(arguments)
    if options.name == "list":
        for name, benchmark in BENCHMARKS.items():
            print(name)
            for file in benchmark.files:
                print(f"  {file.url} {file.digest or '(revision pinned)'}")
            print(f"  {benchmark.note}")
        return
    try:
        folder = fetch(options.name, options.to)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        sys.exit(f"error: {error}")
    print(f"{folder}. {BENCHMARKS[options.name].note}")


if __name__ == "__main__":
    main()
