"""The model that all benchmarks measure: LLaVA-shaped, random weights, 576 image tokens, sizes by name."""

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers import PreTrainedTokenizerFast as FastTokenizer

from rlaifv.vlm.loading import VLM

IMAGE_TOKENS, VOCABULARY, IMAGE_ID = 576, 32064, 32000

SIZES = {
    # language model: layers, hidden, intermediate, heads; vision tower: layers, hidden, heads
    "nano": (2, 128, 384, 4, 1, 64, 2),
    "small": (8, 512, 1376, 8, 4, 256, 4),
    "1b": (22, 2048, 5632, 32, 24, 1024, 16),
    "7b": (32, 4096, 11008, 32, 24, 1024, 16),
}


def build_model(size: str, device: str, dtype: str) -> VLM:
    """LLaVA-1.5 of a size of `SIZES` with random weights; "small" is 8 layers of width 512."""
    layers, width, inner, heads, vision_layers, vision_width, vision_heads = SIZES[size]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision_width,
            intermediate_size=4 * vision_width,
            num_hidden_layers=vision_layers,
            num_attention_heads=vision_heads,
            image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=4096,
        ),
        image_token_index=IMAGE_ID,
        image_seq_length=IMAGE_TOKENS,
    )
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(getattr(torch, dtype))
        model = LlavaForConditionalGeneration(config)
        torch.set_default_dtype(torch.float32)
    model.eval().requires_grad_(False)
    tokenizer = FastTokenizer(
        tokenizer_object=Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0")),
        pad_token="0",
        eos_token="2",
    )
    return VLM(
        model=model,
        tokenizer=tokenizer,
        processor=None,
        name=f"llava-{size}",
        fingerprint="random",
        eos_token_ids=[2],
    )


def prompt_tokens(generator: torch.Generator, text: int) -> list[int]:
    """A begin token, the image's placeholders and `text` random words."""
    words = torch.randint(3, IMAGE_ID, (text,), generator=generator).tolist()
    return [1, *[IMAGE_ID] * IMAGE_TOKENS, *words]


def pixels(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(1, 3, 336, 336, generator=generator)}


def forward_flops(vlm: VLM, tokens: int, attended: int, projected: int, images: int) -> float:
    """Multiply-adds × 2 of a forward: `attended` is the sum over tokens of the keys that each sees."""
    text, vision = vlm.model.config.text_config, vlm.model.config.vision_config
    width, inner = text.hidden_size, text.intermediate_size
    linear = text.num_hidden_layers * (4 * width**2 + 3 * width * inner) * tokens
    attention = text.num_hidden_layers * 2 * width * attended
    patches, v = IMAGE_TOKENS + 1, vision.hidden_size
    tower = vision.num_hidden_layers * (12 * v**2 * patches + 2 * v * patches**2) + 588 * v * patches
    tower += (v * width + width**2) * IMAGE_TOKENS
    return 2 * (linear + attention + width * VOCABULARY * projected + images * tower)


def timed(call: Callable[[], object], device: str, repeats: int = 1) -> tuple[float, object]:
    """Shortest wall time in seconds of `repeats` calls (other work on the machine only adds), and the last result."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best, result


def current_memory() -> int:
    """Resident bytes of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str) -> int:
    """Most bytes since `reset_peak`: allocated on the GPU, or resident in this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo").read_text()
    name = info.split("model name\t:")[1].splitlines()[0].strip() if "model name" in info else platform.processor()
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"


def bench_parser(description: str) -> argparse.ArgumentParser:
    """What every benchmark can be told; each adds its own (`parse` fills in the dtype)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", choices=list(SIZES))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--keep", action="store_true", help="write speed/results/")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    args = parser.parse_args()
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    return args


def report(name: str, size: str, device: str, result: dict, json_line: bool, keep: bool) -> None:
    """Print the numbers, as a last JSON line on request, and keep them with hardware and date on request."""
    for key, value in result.items():
        print(f"{key:>28}  {value:,.4g}" if isinstance(value, int | float) else f"{key:>28}  {value}")
    stamped = {
        **result,
        "hardware": hardware(device),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    if keep:
        folder = Path(__file__).parent / "results"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}-{device}-{size}.json").write_text(json.dumps(stamped, indent=1) + "\n")
    if json_line:
        print(json.dumps(stamped))
