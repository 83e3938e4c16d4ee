"""An OpenAI-compatible server in a process of its own that fails in the way which the address names.

    python failing_server.py        http://127.0.0.1:PORT/WAY/v1

WAY: "locked" answers 401 and "broken" 500, both with the key that came; "echo" puts the key into its answer; "garbage"
sends broken JSON, "empty" no body; "words" and "null" are log-probs that are no numbers, "sure" some that add up to
more than 1; "hanging" never answers, "gone" closes the connection; "elsewhere" sends the request to another address;
"renamed" answers as another model.
"""

import time

from openai_server import Handler, serve


class Failing(Handler):
    """POST /WAY/v1/chat/completions."""

    def do_POST(self):
        model, key = self.body()["model"], self.headers["Authorization"]
        way = self.path.split("/")[1]
        if way in ("locked", "broken"):
            self.reply(401 if way == "locked" else 500, {"error": {"message": f"your key is {key}", "param": key}})
        elif way in ("garbage", "empty"):
            self.send('{"choices": [' if way == "garbage" else "", "application/json", 200)
        elif way == "hanging":
            time.sleep(60)
        elif way == "gone":
            self.connection.close()
        elif way == "elsewhere":
            self.reply(307, {}, {"Location": f"http://localhost:{self.server.server_port}/echo/v1/chat/completions"})
        else:
            logprob = {"words": "likely", "null": None}.get(way, -0.1)
            top = [{"token": token, "logprob": logprob, "bytes": None} for token in ("Yes", "No")]
            top[1:] = [] if way != "sure" else top[1:]
            said, name = (
                (f"My key is {key}", model) if way == "echo" else ("Yes", "other" if way == "renamed" else model)
            )
            self.say(said, name, logprobs={"content": [{**top[0], "token": said, "top_logprobs": top}]})


if __name__ == "__main__":
    serve(Failing)
