"""Tokens a second of a server through HTTP, by the number of clients.

Starts ``sparse-bitnet serve`` (or ``vllm serve``) of a model directory, lets so many clients ask at
once for answers of a fixed length, and measures what all get together, and the server's processor
time for a token, which says more on a busy machine (not vLLM's, whose engine is another process);
then the first token of a new client beside a long stream, and the server's memory before and after.

    python benchmarks/serve_clients.py runs/demo/packed-two-bit --clients 1 8 --out serve.json
    python benchmarks/serve_clients.py packed --clients 1 32 --vllm="--max-model-len 8192"
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests

PROMPT = "def main():\n    return"
SECONDS_TO_START = 300


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def ask(url: str, tokens: int, stream: bool = False) -> requests.Response:
    body = {"prompt": PROMPT, "max_tokens": tokens, "stream": stream, "temperature": 0}
    answer = requests.post(f"{url}/v1/completions", json=body, stream=stream, timeout=600)
    answer.raise_for_status()
    return answer


def processor_seconds(pid: int) -> float:
    times = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")


def throughput(url: str, pid: int, clients: int, tokens: int) -> dict[str, Any]:
    """Tokens a second of all clients together, each of which asks once."""
    before = processor_seconds(pid)
    with ThreadPoolExecutor(clients) as pool:
        started = time.perf_counter()
        answers = list(pool.map(lambda _: ask(url, tokens).json(), range(clients)))
        seconds = time.perf_counter() - started
    made = sum(answer["usage"]["completion_tokens"] for answer in answers)
    busy = processor_seconds(pid) - before
    return {
        "clients": clients,
        "tokens": made,
        "tokens_per_second": round(made / seconds, 1),
        "processor_ms_per_token": round(1e3 * busy / made, 3),
    }


def first_token_beside(url: str, tokens: int) -> float:
    """Seconds to the first token of a new client while a long stream is under way."""
    with ask(url, tokens, stream=True) as long:
        lines = long.iter_lines()
        for _ in range(40):
            next(lines)
        started = time.perf_counter()
        with ask(url, 8, stream=True) as other:
            next(other.iter_lines())
        return time.perf_counter() - started


def resident_mib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) >> 10
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=200, help="of each answer")
    parser.add_argument("--stream", type=int, default=6000, help="tokens of the long stream")
    parser.add_argument("--repeats", type=int, default=5, help="the median counts")
    parser.add_argument("--vllm", metavar="OPTIONS", help="vllm serve, with its own options")
    parser.add_argument("--out", type=Path)
    parsed = parser.parse_args()
    port = free_port()
    url = f"http://localhost:{port}"
    module = "sparse_bitnet" if parsed.vllm is None else "vllm.entrypoints.cli.main"
    command = [sys.executable, "-m", module, "serve", str(parsed.directory), "--port", str(port)]
    server = subprocess.Popen([*command, *shlex.split(parsed.vllm or "")])
    try:
        for _ in range(SECONDS_TO_START):
            try:
                requests.get(f"{url}/health", timeout=5)
                break
            except requests.ConnectionError:
                if server.poll() is not None:
                    sys.exit("the server did not start")
                time.sleep(1)
        else:
            sys.exit(f"the server did not start within {SECONDS_TO_START} s")
        ask(url, parsed.tokens)
        before = resident_mib(server.pid)
        rounds: dict[int, list[dict[str, Any]]] = {count: [] for count in parsed.clients}
        for _ in range(parsed.repeats):  # interleaved: a busy machine is so for all alike
            for count in parsed.clients:
                rounds[count].append(throughput(url, server.pid, count, parsed.tokens))
        rows = []
        for rounds_of_one in rounds.values():
            medians = {
                name: statistics.median(row[name] for row in rounds_of_one)
                for name in ("tokens_per_second", "processor_ms_per_token")
            }
            rows.append(rounds_of_one[0] | medians)
            print(json.dumps(rows[-1]), flush=True)
        result: dict[str, Any] = {"rows": rows}
        if parsed.out:  # a stream longer than the model's context would lose them
            parsed.out.write_text(json.dumps(result, indent=1) + "\n")
        firsts = [first_token_beside(url, parsed.stream) for _ in range(parsed.repeats)]
        result |= {
            "first_token_beside_a_stream_s": round(statistics.median(firsts), 3),
            "worst_first_token_s": round(max(firsts), 3),
            "resident_mib": [before, resident_mib(server.pid)],
        }
        print(json.dumps(result))
        if parsed.out:
            parsed.out.write_text(json.dumps(result, indent=1) + "\n")
    finally:
        server.terminate()
        try:
            server.wait(timeout=60)
        except subprocess.TimeoutExpired:
            server.kill()


if __name__ == "__main__":
    main()
