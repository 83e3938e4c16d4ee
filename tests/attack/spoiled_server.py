"""`labeler_server.py` at a given port, with a habit that begins after so many replies.

    python spoiled_server.py PORT HABIT AFTER

On HABIT, after AFTER replies (the key that came is said wherever there is a place for it): "nan" gives NaN as log-prob,
"refuse" answers 401, "broken" 500, "elsewhere" sends on to another host, "garbage" is no JSON, "empty" is nothing,
"cut" ends in the middle, "text" has no log-probs, "slow" never answers; "well" answers.
"""

import json
import sys
import threading
import time
from http.server import ThreadingHTTPServer

PORT, HABIT, AFTER = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
sys.argv[1:] = ["well"]
from labeler_server import Labeler, probabilities  # noqa: E402

COUNT, LOCK = iter(range(10**9)), threading.Lock()


class Spoiled(Labeler):
    def complete(self, body: dict):
        with LOCK:
            spoiled = next(COUNT) >= AFTER
        key = str(self.headers["Authorization"])
        if not spoiled or HABIT == "well":
            super().complete(body)
        elif HABIT == "nan":
            top = [{"token": token, "logprob": float("nan"), "bytes": None} for token in probabilities(body)]
            self.say("Yes", body["model"], logprobs={"content": [{**top[0], "top_logprobs": top}]})
        elif HABIT in ("refuse", "broken"):
            self.reply(401 if HABIT == "refuse" else 500, {"error": {"message": f"Incorrect API key {key}"}})
        elif HABIT == "elsewhere":
            self.send(key, "text/plain", 307, {"Location": f"http://127.0.0.1:{PORT}/v1/elsewhere?key={key[7:]}"})
        elif HABIT in ("garbage", "empty"):
            self.send(f"<html>{key}</html>" if HABIT == "garbage" else "", "application/json", 200)
        elif HABIT == "cut":
            self.send(json.dumps({"error": key})[:-2], "application/json", 200)
            self.close_connection = True
        elif HABIT == "text":
            self.say(key, body["model"], logprobs=None)
        else:
            time.sleep(60)


if __name__ == "__main__":
    ThreadingHTTPServer.request_queue_size = 128  # with Python's 5 a busy machine loses connections
    server = ThreadingHTTPServer(("127.0.0.1", PORT), Spoiled)
    print(server.server_port, flush=True)
    server.serve_forever()
