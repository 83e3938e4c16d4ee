"""An OpenAI-compatible judge in a process of its own, with the bad habits of real servers.

    python judge_server.py HABIT [NUMBER]

It prints its port, judges by fixed rules, and on HABIT: "well" always answers; "nonsense" talks of the weather;
"slow" takes longer than anyone waits; "broken" answers 500; "busy" answers 429 to the first NUMBER requests; "dying"
leaves without a word after NUMBER replies; "unknown" knows no model; "empty" says nothing; "html" is no judge at all;
"sometimes" talks nonsense about every request that it sees for the first time; "picky" takes no answer of NUMBER words.
"""

import json
import os
import re
import sys
import threading
import time

from openai_server import Handler, serve

HABIT = sys.argv[1]
NUMBER = int(sys.argv[2]) if len(sys.argv) > 2 else 0
LOCK = threading.Lock()
SEEN: list[str] = []


def judge(prompt: str) -> str:
    """Rate, compare or list by what the prompt asks for; the answer's own words decide."""
    if "[Beginning of the review text]" in prompt:
        return "The same count. [[C]]"
    if "Model B's answer" in prompt:
        answer = prompt.split("[Beginning of Model B's answer]")[1]
        return "B names more. [[B]]" if "good" in answer else "A is better. [[A]]"
    if "JSON list" in prompt:
        answer = prompt.split("### Answer")[1].split("###")[0].split("Take the answer")[0]
        words = [word for word in re.findall(r"[a-z]+", answer.lower()) if word in ("dog", "cat", "mug", "dogs")]
        return f"Here they are:\n{json.dumps(words)}"
    answer = prompt.split("### Answer of the assistant")[-1].split("###")[0].split("First explain")[0]
    return f"It is fine.\nRating: {len(answer.split()) % 7}"


class Judge(Handler):
    """POST /v1/chat/completions; GET /seen tells how many requests came."""

    def do_GET(self):
        self.reply(200, {"seen": len(SEEN)})

    def do_POST(self):
        body = self.body()
        prompt = "\n".join(message["content"] for message in body["messages"])
        with LOCK:
            first = prompt not in SEEN
            SEEN.append(prompt)
            number = len(SEEN)
        if HABIT == "dying" and number > NUMBER:
            os._exit(1)
        if HABIT == "slow":
            time.sleep(3)
        if HABIT == "broken":
            return self.reply(500, {"error": {"message": "out of luck"}})
        if HABIT == "busy" and number <= NUMBER:
            return self.reply(429, {"error": {"message": "slow down"}}, {"retry-after-ms": "5"})
        if HABIT == "unknown":
            return self.reply(404, {"error": {"message": f"no model {body['model']}"}})
        if HABIT == "picky" and prompt.count("word ") >= NUMBER:
            return self.reply(400, {"error": {"message": "the prompt is too long"}})
        if HABIT == "html":
            return self.send("<html>It works!</html>", "text/html", 200)
        text = judge(prompt)
        if HABIT == "nonsense" or (HABIT == "sometimes" and first):
            text = "Lovely weather today."
        if HABIT == "empty":
            text = ""
        self.say(text, body["model"])


if __name__ == "__main__":
    serve(Judge)
