"""An OpenAI-compatible server of a checkpoint, as vLLM is one: it answers from the weights, and can die.

    python engine_server.py PATH PORT NAME [--log FILE] [--dies AFTER TIMES]

Answers are those of our own code in this process, so that a client's can be compared with the plain ones to the last
token. Every question that came goes to FILE, a line each. After AFTER chat completions it leaves without a word, in its
first TIMES lives (counted in FILE.lives). A question that contains "too long" is refused alone, as vLLM does with one
that its context does not hold.
"""

import argparse
import base64
import io
import os
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch
from openai_server import Handler
from PIL import Image

from rlaifv.inference.logprobs import next_token_logprobs
from rlaifv.inference.sampling import Decoding, Prompt, generate_batch
from rlaifv.vlm.chat_format import encode_questions
from rlaifv.vlm.loading import load_vlm

parser = argparse.ArgumentParser()
parser.add_argument("path")
parser.add_argument("port", type=int)
parser.add_argument("name")
parser.add_argument("--log", type=Path, default=Path(os.devnull))
parser.add_argument("--dies", type=int, nargs=2, default=(0, 0))
OPTIONS = parser.parse_args()

torch.set_num_threads(1)
MODEL = load_vlm(OPTIONS.path, device="cpu")
LOCK = threading.Lock()
COUNT = iter(range(1, 10**9))


def lives() -> int:
    """How often it was started, this time included."""
    file = OPTIONS.log.with_suffix(".lives")
    file.write_text(str(int(file.read_text()) + 1 if file.is_file() else 1))
    return int(file.read_text())


MORTAL = OPTIONS.dies[0] and lives() <= OPTIONS.dies[1]


class Chat(Handler):
    def do_GET(self):
        self.reply(200, {"object": "list", "data": [{"id": OPTIONS.name, "object": "model"}]})

    def do_POST(self):
        body = self.body()
        content = body["messages"][0]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = next(part["text"] for part in parts if part["type"] == "text")
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        image = Image.open(io.BytesIO(base64.b64decode(urls[0].split(",")[1]))).convert("RGB") if urls else None
        if "too long" in text:
            return self.reply(400, {"error": {"message": "This model's maximum context length is 512 tokens."}})
        with LOCK:
            if MORTAL and next(COUNT) > OPTIONS.dies[0]:
                print("RuntimeError: CUDA error: an illegal memory access was encountered", file=sys.stderr, flush=True)
                os._exit(9)
            if OPTIONS.log != Path(os.devnull):
                with OPTIONS.log.open("a") as file:
                    file.write(f"{body.get('seed', '')} {text}\n")
            return self.answer(body, text, image)

    def answer(self, body: dict, text: str, image: Image.Image | None):
        if body.get("logprobs"):
            (table,) = next_token_logprobs(MODEL, [encode_questions(MODEL, image, [text])])
            values, ids = table[0].topk(body["top_logprobs"])
            top = [
                {
                    "token": MODEL.tokenizer.convert_ids_to_tokens(i).replace("Ġ", " "),
                    "logprob": min(v, 0),
                    "bytes": None,
                }
                for v, i in zip(values.tolist(), ids.tolist(), strict=True)
            ]
            logprobs = {"content": [{**top[0], "top_logprobs": top}]}
            return self.say("?", body["model"], finish_reason="length", logprobs=logprobs)
        steps = body["max_tokens"]
        decoding = Decoding(body["temperature"], body.get("top_k", 0), body.get("top_p", 1.0), steps)
        stream = np.random.default_rng(body.get("seed", 0)).random((1, steps))
        ((generation,),) = generate_batch(MODEL, [Prompt(image, text)], [stream], decoding)
        ended = generation.finish_reason == "stop"
        tokens = len(generation.token_ids) + ended  # servers count the end token
        return self.say(generation.text, body["model"], tokens=tokens, finish_reason=generation.finish_reason)


if __name__ == "__main__":
    ThreadingHTTPServer.request_queue_size = 128
    ThreadingHTTPServer(("127.0.0.1", OPTIONS.port), Chat).serve_forever()
