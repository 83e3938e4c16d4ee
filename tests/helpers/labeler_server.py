"""An OpenAI-compatible labeler in a process of its own, with the bad habits of real servers.

    python labeler_server.py HABIT [NUMBER]

It prints its port and looks at the image that it is sent: P(yes) is the share of red in it. On HABIT: "well" always
answers; "busy" answers 429 and 500 to the first NUMBER requests; "dying" leaves without a word after NUMBER replies;
"silent" gives no log-probs; "locked" wants another key, and says which it was given; "other" is another model; "noisy"
moves every log-prob by up to an eighth, another way each time; "wrong" says NUMBER where a log-prob belongs.
"""

import base64
import hashlib
import io
import math
import os
import random
import sys
import threading
import time

from openai_server import Handler, serve
from PIL import Image

HABIT = sys.argv[1]
NUMBER = float(sys.argv[2]) if len(sys.argv) > 2 else 0
LOCK = threading.Lock()
SEEN: list[str] = []
IMAGES: list[tuple[str, str]] = []  # kind and digest of every image that came, with each request
ANSWERED: set[str] = set()
COLD: list[str] = []  # images of requests that came before the first about their image was answered
BUSY = {"now": 0, "most": 0, "refused": 0}


def probabilities(body: dict) -> dict[str, float]:
    red = Image.open(io.BytesIO(sent(body)[1])).convert("RGB").getpixel((0, 0))[0] / 255
    yes = 1 - red if " not " in body["messages"][0]["content"][1]["text"] else red
    if HABIT == "other":
        return {"Yes": 0.5 * yes, " yes": 0.15 * yes, "No": 0.65 * (1 - yes), "Maybe": 0.35}
    return {"Yes": 0.6 * yes, " yes": 0.2 * yes, "No": 0.8 * (1 - yes), "Maybe": 0.15, "Yesterday": 0.05}


def sent(body: dict) -> tuple[str, bytes]:
    """The kind and the bytes of the image in a request."""
    kind, data = body["messages"][0]["content"][0]["image_url"]["url"].split(";base64,")
    return kind, base64.b64decode(data)


class Labeler(Handler):
    """POST /v1/chat/completions; GET /seen tells what was asked and how many requests came at once."""

    def do_GET(self):
        self.reply(200, {"seen": SEEN, "images": IMAGES, "cold": COLD, **BUSY})

    def do_POST(self):
        body = self.body()
        kind, data = sent(body)
        image = hashlib.sha256(data).hexdigest()
        with LOCK:
            IMAGES.append((kind, image))
            COLD.extend([image] if image not in ANSWERED else [])
            BUSY["now"] += 1
            BUSY["most"] = max(BUSY["most"], BUSY["now"])
            number = len(SEEN) + BUSY["refused"]
            fails = HABIT == "busy" and number < NUMBER
            if fails:
                BUSY["refused"] += 1
            else:
                SEEN.append(body["messages"][0]["content"][1]["text"])
        if HABIT == "dying" and number >= NUMBER:
            os._exit(1)
        time.sleep(0.01)
        with LOCK:
            ANSWERED.add(image)
            BUSY["now"] -= 1  # before the reply goes out: its reader may send the next request before we go on
        if HABIT == "locked" and self.headers["Authorization"] != "Bearer right":
            self.reply(401, {"error": {"message": f"Incorrect API key {self.headers['Authorization']}"}})
        elif fails:
            self.reply(429 if number % 2 else 500, {"error": {"message": "later"}}, {"retry-after-ms": "5"})
        else:
            self.complete(body)

    def complete(self, body: dict):
        assert body["max_tokens"] == 1 and body["logprobs"] and body["top_logprobs"] == 20
        noise = random.uniform if HABIT == "noisy" else lambda *_: 0
        values = {t: min(0, math.log(max(p, 1e-9)) + noise(-1 / 8, 1 / 8)) for t, p in probabilities(body).items()}
        if HABIT == "wrong":
            values["Yes"] = NUMBER
        top = [{"token": token, "logprob": value, "bytes": None} for token, value in values.items()]
        logprobs = None if HABIT == "silent" else {"content": [{**top[0], "top_logprobs": top}]}
        self.say("Yes", body["model"], finish_reason="length", logprobs=logprobs)


if __name__ == "__main__":
    serve(Labeler)
