"""Speed of preference training: python speed/train.py [--size small] [--device cpu] [--lora 0] [--json] [--keep]

Trains the same pairs about random images (576 image tokens, answers of about 100 tokens, vocabulary 32,064) with a
LLaVA-shaped random model three ways, each in a process of its own so that memory is measured apart:
`trl` is plain `trl.DPOTrainer`, `answer` is the same with the vocabulary projected at answer positions only (what TRL
does on CUDA), `ours` is `rlaifv.training.dpo.PairTrainer`. The vision tower is frozen for all three.
"""

import argparse
import copy
import io
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import trl.trainer.utils
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import DPOConfig, DPOTrainer

from rlaifv.params import TrainParams
from rlaifv.training.dpo import PairCollator, PairScorer, PairTrainer, reference_logps, training_arguments
from rlaifv.training.library_quirks import be_quiet, checkpoint_activations
from rlaifv.training.packed_pairs import choose_layout
from rlaifv.training.pair_data import PairData
from rlaifv.training.policy import add_lora, freeze, lora_config
from rlaifv.vlm.loading import VLM
from speed.model import (
    IMAGE_ID,
    VOCABULARY,
    bench_parser,
    build_model,
    current_memory,
    forward_flops,
    parse,
    peak_memory,
    report,
    reset_peak,
)

WAYS = ("trl", "answer", "ours")

PEAK_FLOPS = {"NVIDIA H200": 989e12, "NVIDIA H100": 989e12, "NVIDIA A100": 312e12}
"""Dense bfloat16 operations per second, for model-FLOPs utilization."""

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<s> {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}{% endfor %} "
    "{% else %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %} </s>{% endif %}{% endfor %}"
)


def with_processor(vlm: VLM) -> VLM:
    """A processor with one word per token id; the template writes begin and end token, as TRL wants."""
    special = {0: "<pad>", 1: "<s>", 2: "</s>", IMAGE_ID: "<image>"}
    backend = Tokenizer(models.WordLevel({special.get(i, f"w{i}"): i for i in range(VOCABULARY)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", additional_special_tokens=["<image>"]
    )
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATE,
    )
    return replace(vlm, tokenizer=tokenizer, processor=processor)


def make_rows(pairs: int, answer: int) -> list[dict]:
    """Pairs in the public dataset's columns: random images, 20-token questions, answers of about `answer` tokens."""
    rng = np.random.default_rng(0)

    def words(count: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(3, IMAGE_ID, count))

    rows = []
    for i in range(pairs):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (336, 336, 3), dtype=np.uint8)).save(buffer, "PNG")
        lengths = rng.integers(int(0.9 * answer), int(1.1 * answer) + 1, 2)
        rows.append(
            {
                "image": {"bytes": buffer.getvalue(), "path": f"{i}.png"},
                "question": words(20),
                "chosen": words(lengths[0]),
                "rejected": words(lengths[1]),
                "idx": i,
            }
        )
    return rows


def for_trl(rows: list[dict]) -> Dataset:
    """The conversational form that TRL reads."""
    return Dataset.from_list(
        [
            {
                "images": [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")],
                "prompt": [{"role": "user", "content": row["question"]}],
                "chosen": [{"role": "assistant", "content": row["chosen"]}],
                "rejected": [{"role": "assistant", "content": row["rejected"]}],
            }
            for row in rows
        ]
    )


class Clock(TrainerCallback):
    """Seconds from one optimizer step to the next: data, forward, backward and update."""

    def __init__(self):
        self.marks: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())


def trl_arguments(params: TrainParams, folder: Path, seed: int) -> DPOConfig:
    """TRL's arguments for our parameters; it computes its reference every step, as it does for images."""
    ours = training_arguments(params, folder, seed)
    same = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps")
    same += ("lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "logging_steps", "use_cpu")
    same += ("logging_nan_inf_filter", "disable_tqdm", "seed", "dataloader_pin_memory")
    args = DPOConfig(
        output_dir=str(folder),
        beta=params.beta,
        loss_type=list(params.loss_type),
        loss_weights=list(params.loss_weights) if params.loss_weights else None,
        label_smoothing=params.label_smoothing,
        bf16=params.dtype == "bfloat16",
        activation_checkpointing=params.gradient_checkpointing,  # their new name for it; TRL reads the old one from it
        max_length=None,  # never cut an answer
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        **{name: getattr(ours, name) for name in same},
    )
    args._n_gpu = min(args.n_gpu, 1)
    return args


def make_trainer(way: str, vlm: VLM, rows: list[dict], params: TrainParams, folder: Path) -> Trainer:
    """The trainer of one of `WAYS`, reference log-probs computed where they are computed once."""
    if way != "ours":
        if way == "answer":
            trl.trainer.utils._use_triton = lambda device: True  # the branch that TRL takes on CUDA
        return DPOTrainer(
            model=vlm.model,
            ref_model=None if params.lora_r else copy.deepcopy(vlm.model),
            args=trl_arguments(params, folder / "trainer", seed=0),
            train_dataset=for_trl(rows),
            processing_class=vlm.processor,
            peft_config=lora_config(vlm.model, params) if params.lora_r else None,
        )
    args = training_arguments(params, folder / "trainer", seed=0)
    args.report_to = []
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")
    data, scorer = PairData(vlm, folder / "pairs.parquet"), PairScorer(vlm.model)
    packed = choose_layout(scorer, vlm, data, params).startswith("packed")
    collate = PairCollator(data, vlm.tokenizer.pad_token_id, packed=packed)
    reference = reference_logps(scorer, collate, 4 * params.micro_batch_size, vlm.device, params.dtype)
    if params.lora_r:
        scorer = PairScorer(add_lora(vlm.model, params), scorer.images)
    if params.gradient_checkpointing:
        checkpoint_activations(scorer.policy, lora=bool(params.lora_r))
    return PairTrainer(scorer, collate, reference, params, args)


def first_step(trainer: Trainer, rows: int, keep_gradients: bool, out: Path) -> float:
    """Loss on the first pairs before any update; its gradients go to `out` and are cleared."""
    trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(rows)])
    batch = trainer._prepare_inputs(batch)
    with trainer.accelerator.autocast():  # as in a step: TRL's Trainer has not wrapped the model yet
        loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {
        name.removeprefix("policy."): weight.grad.cpu().clone()
        for name, weight in trainer.model.named_parameters()
        if weight.grad is not None
    }
    if keep_gradients:
        save_file(gradients, out)
    trainer.model.zero_grad(set_to_none=True)
    return loss.item()


def run_way(way: str, options: argparse.Namespace, out: Path) -> dict:
    """One way in this process: seconds per step and in all, peak memory, loss of the first step."""
    be_quiet()
    set_seed(0)
    params = TrainParams(
        dtype=options.dtype,
        epochs=options.epochs,
        batch_size=options.micro,
        micro_batch_size=options.micro,
        lora_r=options.lora,
        gradient_checkpointing=options.checkpointing,
        learning_rate=1e-5,
    )
    weights = options.dtype if options.lora else "float32"
    vlm = with_processor(build_model(options.size, options.device, weights))
    freeze(vlm.model, params)
    rows = make_rows(options.pairs, options.answer)
    reset_peak(options.device)
    before = current_memory() if options.device == "cpu" else 0
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        trainer = make_trainer(way, vlm, rows, params, Path(folder))
        setup = time.perf_counter() - start
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        clock = Clock()
        trainer.add_callback(clock)
        loss = first_step(trainer, options.micro, options.size != "7b", out.with_suffix(".safetensors"))
        reset_peak(options.device)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    steps = [b - a for a, b in zip(clock.marks, clock.marks[1:], strict=False)]
    prompt, answers = 576 + 21, 2 * (options.answer + 1)
    attended = prompt**2 / 2 + answers * prompt + answers**2 / 4
    return {
        "loss": loss,
        "seconds_per_step": min(steps),  # other work on the machine only adds
        "seconds_setup": setup,
        "seconds_run": setup + seconds,
        "peak_bytes": peak_memory(options.device) - before,
        # forward and twice that for the backward; a frozen tower and LoRA's frozen weights need less
        "flops_per_step": options.micro * 3 * forward_flops(vlm, prompt + answers, attended, answers, 0),
    }


def compare(options: argparse.Namespace) -> dict:
    """Run the three ways one after another, each in its own process, and set them against each other."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for way in WAYS:
            out = Path(folder) / f"{way}.json"
            command = [sys.executable, __file__, "--only", way, "--out", str(out), *options.arguments]
            subprocess.run(command, check=True)
            found[way] = json.loads(out.read_text())
        files = [Path(folder) / f"{way}.safetensors" for way in ("trl", "ours")]
        comparable = not options.lora and all(file.is_file() for file in files)  # adapters start at random
        difference = gradient_difference(*files) if comparable else None
    plain, answer, ours = (found[way] for way in WAYS)
    result = {
        "pairs": options.pairs,
        "epochs": options.epochs,
        "micro_batch_size": options.micro,
        "answer_tokens": options.answer,
        "lora_r": options.lora,
        "dtype": options.dtype,
        **{f"seconds_per_step_{way}": found[way]["seconds_per_step"] for way in WAYS},
        **{f"seconds_run_{way}": found[way]["seconds_run"] for way in WAYS},
        "speedup_vs_trl": plain["seconds_per_step"] / ours["seconds_per_step"],
        "speedup_vs_trl_run": plain["seconds_run"] / ours["seconds_run"],
        "speedup_vs_answer_logits": answer["seconds_per_step"] / ours["seconds_per_step"],
        "loss_rel_diff": abs(plain["loss"] - ours["loss"]) / abs(plain["loss"]),
        "grad_rel_diff": difference,
        "peak_memory_ratio": ours["peak_bytes"] / plain["peak_bytes"],
        "pairs_per_second": options.micro / ours["seconds_per_step"],
    }
    if options.device == "cuda":
        name = torch.cuda.get_device_name()
        peak = next((value for key, value in PEAK_FLOPS.items() if name.startswith(key)), None)
        if peak:
            result["model_flops_utilization"] = ours["flops_per_step"] / ours["seconds_per_step"] / peak
    return result


def gradient_difference(plain: Path, ours: Path) -> float:
    """‖g_ours − g_plain‖ / ‖g_plain‖ over all trained parameters."""
    a, b = load_file(plain), load_file(ours)
    if a.keys() != b.keys():
        raise ValueError(f"other parameters learn: {sorted(a.keys() ^ b.keys())[:4]}")
    off = sum((a[key].double() - b[key].double()).square().sum() for key in a).sqrt()
    return float(off / sum(value.double().square().sum() for value in a.values()).sqrt())


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--micro", type=int, default=1, help="pairs per step")
    parser.add_argument("--answer", type=int, default=100, help="tokens of an answer, about")
    parser.add_argument("--lora", type=int, default=0, help="rank; 0 trains all weights")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, for all ways")
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parse(parser)
    options.arguments = [a for a in sys.argv[1:] if a not in ("--json", "--keep")]
    if options.only:
        options.out.write_text(json.dumps(run_way(options.only, options, options.out)))
        return
    name = f"train{'-lora' if options.lora else ''}"
    report(name, options.size, options.device, compare(options), options.json, options.keep)


if __name__ == "__main__":
    main()
