"""An OpenAI-compatible labeler in a process of its own, with the bad habits of real servers.

    python labeler_server.py HABIT [NUMBER]

It prints its port and looks at the image that it is sent: P(yes) is the share of red in it. On HABIT: "well" always
answers; "busy" answers 429 and 500 to the first NUMBER requests; "dying" leaves without a word after NUMBER replies;
"silent" gives no log-probs; "locked" wants another key.
"""

import base64
import io
import math
import os
import sys
import threading
import time

from openai_server import Handler, serve
from PIL import Image

HABIT = sys.argv[1]
NUMBER = int(sys.argv[2]) if len(sys.argv) > 2 else 0
LOCK = threading.Lock()
SEEN: list[str] = []
BUSY = {"now": 0, "most": 0, "refused": 0}


def probabilities(body: dict) -> dict[str, float]:
    picture, question = body["messages"][0]["content"]
    data = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))
    red = Image.open(io.BytesIO(data)).convert("RGB").getpixel((0, 0))[0] / 255
    yes = 1 - red if " not " in question["text"] else red
    return {"Yes": 0.6 * yes, " yes": 0.2 * yes, "No": 0.8 * (1 - yes), "Maybe": 0.15, "Yesterday": 0.05}


class Labeler(Handler):
    """POST /v1/chat/completions; GET /seen tells what was asked and how many requests came at once."""

    def do_GET(self):
        self.reply(200, {"seen": SEEN, **BUSY})

    def do_POST(self):
        body = self.body()
        with LOCK:
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
            BUSY["now"] -= 1  # before the reply goes out: its reader may send the next request before we go on
        if HABIT == "locked" and self.headers["Authorization"] != "Bearer right":
            self.reply(401, {"error": {"message": "Incorrect API key provided"}})
        elif fails:
            self.reply(429 if number % 2 else 500, {"error": {"message": "later"}}, {"retry-after-ms": "5"})
        else:
            self.complete(body)

    def complete(self, body: dict):
        assert body["max_tokens"] == 1 and body["logprobs"] and body["top_logprobs"] == 20
        top = [{"token": t, "logprob": math.log(max(p, 1e-9)), "bytes": None} for t, p in probabilities(body).items()]
        logprobs = None if HABIT == "silent" else {"content": [{**top[0], "top_logprobs": top}]}
        self.say("Yes", body["model"], finish_reason="length", logprobs=logprobs)


if __name__ == "__main__":
    serve(Labeler)
