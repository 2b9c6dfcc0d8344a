"""A fake of llama-server: it knows the recorded help, and answers by a rule in place of a model.

The rule: without repacked weights it is one and a half times as fast, on huge pages twice as fast;
n-grams of three and drafts of four give two tokens a round to one request, and cost more than they
give to several; a model called `broken` cannot be loaded, one called `dies` ends in its third
answer; multi-token prediction is in no file; a draft model leaves 20 of 33 layers on the GPU. A
token of a prompt is a letter, and a prompt must fit its slot. FAKE_LOG names a file for what it is
started with, and what of the environment it sees; FAKE_PACE is the share of its seconds that it
waits.
"""

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TOKEN = 0.004  # seconds of a plain token of one request
SEEN = ("GOMP_SPINCOUNT", "LLAMA_API_KEY", "LLAMA_ARG_THREADS")

words = sys.argv[1:]
if words == ["--help"]:
    print(Path(__file__).with_name("llama_server_help.txt").read_text())
    sys.exit()
if words == ["--version"]:
    print("version: 7 (a fake)", file=sys.stderr)
    sys.exit()
if "FAKE_LOG" in os.environ:
    with open(os.environ["FAKE_LOG"], "a") as log:
        seen = {name: os.environ[name] for name in SEEN if name in os.environ}
        told = {"process": os.getpid(), "words": words, "seen": seen}
        told["tunables"] = os.environ.get("GLIBC_TUNABLES")
        print(json.dumps(told), file=log)


def value(option, default):
    return words[words.index(option) + 1] if option in words else default


model, kind, slots = value("--model", ""), value("--spec-type", ""), int(value("--parallel", 1))
if "broken" in model:
    print(f"0.00.004.204 E cmn  common_init_: failed to load model '{model}'")
    print("0.00.004.629 E srv  llama_server: exiting due to model loading error")
    sys.exit(1)
if kind == "draft-mtp":
    print("0.00.400.935 E srv    load_model: failed to create MTP context")
    sys.exit(1)
if "gpu" in model:
    some = 20 if "--spec-draft-model" in words else 33
    print(f"load_tensors: offloaded {some}/33 layers to GPU", flush=True)
good = value("--spec-ngram-simple-size-n", "12") == "3"
speed = 1.5 if "--no-repack" in words else 1.0
if "GLIBC_TUNABLES" in os.environ:
    speed *= 2.0
if kind:
    speed *= (2.0 if slots == 1 else 0.8) if good else 0.95
answered = 0


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def say(self, told, status=200):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(told).encode())

    def do_GET(self):
        self.say({"status": "ok"})

    def do_POST(self):
        global answered
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/apply-template":
            self.say({"prompt": "<user>" + asked["messages"][0]["content"]})
            return
        if self.path == "/tokenize":
            self.say({"tokens": [ord(letter) for letter in asked["content"]]})
            return
        assert asked["temperature"] == 0, asked
        assert not asked["cache_prompt"], asked
        answered += 1
        if "dies" in model and answered == 3:
            print("error: a bad thing", flush=True)
            os._exit(9)
        (prompt,), tokens = asked["prompt"], asked["n_predict"]
        if len(prompt) + tokens > int(value("--ctx-size", 0)) // slots:
            self.say({"error": "the request exceeds the available context size"}, 400)
            return
        seconds = TOKEN * tokens * slots**0.5 / speed
        time.sleep(seconds * float(os.environ.get("FAKE_PACE", "1")))
        drafted = tokens if kind and good else 0
        timings = {"prompt_n": len(prompt), "predicted_n": tokens, "predicted_ms": 1e3 * seconds}
        timings |= {"draft_n": drafted, "draft_n_accepted": drafted // 2}
        self.say({"index": 0, "timings": timings})


try:
    server = ThreadingHTTPServer(("127.0.0.1", int(value("--port", 0))), Handler)
except OSError:
    print(f"0.00.002.525 E srv start: couldn't bind HTTP server socket, port: {value('--port', 0)}")
    sys.exit(1)
server.serve_forever()
