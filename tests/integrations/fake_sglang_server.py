"""A fake of SGLang's server: rounds of drafts take longer the more requests there are.

It answers /generate as SGLang does, with `completion_tokens`, `prompt_tokens`, `e2e_latency` and,
where it drafts, `spec_verify_ct` in `meta_info`. It waits for a tenth of the seconds that it tells.
"""

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = 0.004  # seconds of a plain round

words = sys.argv[1:]


def value(option, default):
    return words[words.index(option) + 1] if option in words else default


active = []  # requests under way
steps = int(value("--speculative-num-steps", 0))


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        tokens = asked["sampling_params"]["max_new_tokens"]
        rounds = tokens // 2 if steps else tokens
        active.append(None)
        most = 0
        for _ in range(rounds):
            time.sleep(0.1 * TOKEN)
            most = max(most, len(active))
        active.pop()
        seconds = TOKEN * rounds * (1 + 0.2 * most * steps)
        meta = {"completion_tokens": tokens, "prompt_tokens": 9}
        meta |= {"e2e_latency": seconds}
        meta |= {"spec_verify_ct": rounds} if steps else {}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"text": "", "meta_info": meta}).encode())


ThreadingHTTPServer(("127.0.0.1", int(value("--port", 0))), Handler).serve_forever()
