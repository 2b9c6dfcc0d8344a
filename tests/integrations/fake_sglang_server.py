"""A fake of SGLang's server: rounds of drafts take longer the more requests there are.

It answers /generate as SGLang does, with `completion_tokens`, `prompt_tokens` and, where it
drafts, `spec_verify_ct` in `meta_info`; and with the seconds that it would have taken.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

TOKEN = 0.004  # seconds of a plain round

words = sys.argv[1:]


def value(option, default):
    return words[words.index(option) + 1] if option in words else default


steps = int(value("--speculative-num-steps", 0))


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        count, tokens = len(asked["text"]), asked["sampling_params"]["max_new_tokens"]
        rounds = tokens // 2 if steps else tokens
        seconds = TOKEN * rounds * (1 + 0.2 * count * steps)
        meta = {"completion_tokens": tokens, "prompt_tokens": 9, "seconds": seconds}
        meta |= {"spec_verify_ct": rounds} if steps else {}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps([{"text": "", "meta_info": meta}] * count).encode())


HTTPServer(("127.0.0.1", int(value("--port", 0))), Handler).serve_forever()
