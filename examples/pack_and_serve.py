"""Prune, pack, and answer requests from the packed model by OpenAI's protocol.

python examples/pack_and_serve.py [MODEL] [TEXT]

Needs the extra `serve`: pip install "besa-llm[serve]".
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import besa


def main(model: str = "smollm2", text: str = "c4", seqlen: int = 512, port: int = 8766) -> str:
    """Serve a model that is half as large in its linears; returns what it wrote.

    Args:
        model: whatever `besa.compress` takes by name.
        text: to calibrate on: an embedded one, or a file.
        seqlen: tokens of a sequence.
        port: to listen on, of this machine alone.
    """
    besa.compress(model, "wanda", text, out="pruned", dtype="bfloat16", samples=16, seqlen=seqlen)
    packing = besa.pack("pruned", "packed")
    print(f"The linears take {packing.packed_bytes / packing.dense_bytes:.2f} of their bytes.")

    program = Path(sys.executable).parent / "transformers"
    server = subprocess.Popen([program, "serve", "packed", "--device", "cpu", "--port", str(port)])
    try:
        return complete("The city lies on the river", f"http://127.0.0.1:{port}", server)
    finally:
        server.terminate()
        server.wait()


def complete(prompt: str, address: str, server: subprocess.Popen[bytes]) -> str:
    """What the served model writes after a prompt, once it listens."""
    while server.poll() is None:
        try:
            urlopen(f"{address}/health")
            break
        except URLError:
            time.sleep(0.1)
    body = {"model": "packed", "prompt": prompt, "max_tokens": 12, "temperature": 0}
    request = Request(f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    written: str = json.load(urlopen(request))["choices"][0]["text"]
    print(prompt + written)
    return written


if __name__ == "__main__":
    main(*sys.argv[1:])
