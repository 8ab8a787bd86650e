"""Shows what keeping evicted KV blocks in host memory saves.

    python -m examples.prefix_reuse --out demo-results

Several long prefixes take turns, and the engine's device cache holds fewer of them. Alone, the
engine has to compute a prefix again whenever it returns; with the connector its blocks come back
from host memory. The same requests go to a server without and to one with the connector. A third
one has little host memory and a disk tier, and is stopped and started anew before the last round:
its prefixes come back from disk. The tokens of all must be equal: the demo fails when they aren't.

The model is a random one made on the spot, served in float32: a prompt computed whole and the same
prompt continued from a cache differ in rounding, which in bfloat16 can change a token of a random
model on any server.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from http.client import HTTPException
from pathlib import Path

from benchmarks.checkpoint import DEMO, TINY, ModelShape, write_checkpoint
from examples import _disk
from examples._client import Answer, complete, read_cache_use
from examples._disk import DiskRuns
from examples._report import Run, differing, saving, speedup, table, write_json, write_plot
from examples._server import ServerError, VllmServer
from examples._workload import BLOCK_TOKENS, OUTPUT_TOKENS, Kind, Request, Workload

MODEL_NAME = "demo"

MIN_ROUNDS = 2
"""One of returns from disk, and one after the restart."""

NOISE_LIMIT = 1.25
"""Cold times of the two servers that differ by a larger factor are called noise."""

DYNAMO, NONE = "DynamoConnector", "none"
CONNECTORS: dict[str, dict[str, str] | None] = {
    DYNAMO: {
        "kv_connector": DYNAMO,
        "kv_role": "kv_both",
        "kv_connector_module_path": "kvbm_connectors.vllm",
        "kv_load_failure_policy": "recompute",
    },
    NONE: None,
}


@dataclass(frozen=True)
class Scale:
    """A model and a workload that fit each other."""

    shape: ModelShape
    workload: Workload


FULL = Scale(
    DEMO,
    Workload(prefixes=5, prefix_tokens=24 * BLOCK_TOKENS, return_rounds=3, prompts_on_device=2),
)
QUICK = Scale(
    TINY,
    Workload(prefixes=4, prefix_tokens=12 * BLOCK_TOKENS, return_rounds=2, prompts_on_device=2),
)


def main() -> int:
    """Run all servers, show and write what they did; return the exit status."""
    arguments = _parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    arguments.out.mkdir(parents=True, exist_ok=True)
    scale = _scale(arguments)
    try:
        model = write_checkpoint(arguments.out / "checkpoint", scale.shape)
        baseline = _run_baseline(model, scale.workload, arguments)
        cached = _run_cached(model, scale.workload, arguments)
        disk = _run_disk(model, scale.workload, arguments)
    except ServerError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 128 + signal.SIGINT
    _report(arguments.out, scale, baseline, cached, disk)
    return _verdict(arguments.connector, baseline, cached, disk)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.prefix_reuse", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("demo-results"), help="folder for results and server logs")
    add("--connector", choices=CONNECTORS, default=DYNAMO, help="of the second server")
    add("--cpu-cache-gb", type=float, default=4, help="host memory for KV blocks, without a disk")
    add("--rounds", type=int, help=f"how often each prefix returns; at least {MIN_ROUNDS}")
    add("--quick", action="store_true", help="tiny model, short prefixes: checks, shows little")
    return parser.parse_args()


def _scale(arguments: argparse.Namespace) -> Scale:
    """Return the scale asked for."""
    scale = QUICK if arguments.quick else FULL
    if arguments.rounds is None:
        return scale
    rounds = max(MIN_ROUNDS, arguments.rounds)
    return replace(scale, workload=replace(scale.workload, return_rounds=rounds))


def _run_baseline(model: Path, workload: Workload, arguments: argparse.Namespace) -> Run:
    server = _server("no connector", NONE, {}, model, workload, arguments.out)
    return _run("no connector", server, workload.requests())


def _run_cached(model: Path, workload: Workload, arguments: argparse.Namespace) -> Run:
    connector = arguments.connector
    name = "no connector" if connector == NONE else connector
    environment = {"DYN_KVBM_CPU_CACHE_GB": f"{arguments.cpu_cache_gb:g}"}
    server = _server(name, connector, environment, model, workload, arguments.out)
    return _run(name, server, workload.requests())


def _run_disk(model: Path, workload: Workload, arguments: argparse.Namespace) -> DiskRuns | None:
    """Ask a server with a disk tier all but the last round, and the next one on its files that."""
    if arguments.connector == NONE:
        return None
    name, requests = f"{arguments.connector}, disk", workload.requests()
    print(f"{name}: {_disk.FILTER_NOTE}", flush=True)
    runs = []
    with tempfile.TemporaryDirectory(dir=arguments.out, prefix="disk-cache-") as directory:
        environment = _disk.environment(workload, Path(directory).resolve())
        parts = {"": requests[: -workload.prefixes], ", restarted": requests[-workload.prefixes :]}
        for suffix, part in parts.items():
            about = arguments.connector, environment, model, workload, arguments.out
            run = _run(name + suffix, _server(name + suffix, *about), part)
            runs.append(_disk.named(replace(run, name=name)))
    return DiskRuns(*runs)


def _server(
    name: str,
    connector: str,
    environment: dict[str, str],
    model: Path,
    workload: Workload,
    out: Path,
) -> VllmServer:
    log = out / f"server-{name.replace(',', '').replace(' ', '-')}.log"
    return VllmServer(model, _server_options(connector, workload), environment, log)


def _run(name: str, server: VllmServer, requests: Sequence[Request]) -> Run:
    """Start the server, send it the requests, stop it."""
    started = time.monotonic()
    print(f"{name}: starting vLLM (log: {server.log}) ...", flush=True)
    with server:
        print(f"{name}: up after {time.monotonic() - started:.0f} s", flush=True)
        complete(server.port, MODEL_NAME, "warm up", OUTPUT_TOKENS)
        before = read_cache_use(server.port)
        answers = _ask_all(server, requests)
        use = read_cache_use(server.port).since(before)
    return Run(name, requests, answers, use, server.summary(), server.moved_blocks())


def _server_options(connector: str, workload: Workload) -> list[str]:
    """Return the options of `vllm serve`."""
    options = [
        *("--served-model-name", MODEL_NAME),
        *("--dtype", "float32", "--enforce-eager", "--seed", "0"),
        *("--block-size", str(BLOCK_TOKENS)),
        *("--num-gpu-blocks-override", str(workload.device_blocks)),
        *("--max-model-len", str(workload.max_model_len)),
        *("--max-num-batched-tokens", str(workload.max_model_len)),
        *("--max-num-seqs", "4", "--enable-prefix-caching"),
        *("--enable-prompt-tokens-details", "--disable-uvicorn-access-log"),
    ]
    transfer = CONNECTORS[connector]
    return options if transfer is None else [*options, "--kv-transfer-config", json.dumps(transfer)]


def _ask_all(server: VllmServer, requests: Sequence[Request]) -> list[Answer]:
    """Send the requests one after the other and print a line about each."""
    answers = []
    for number, request in enumerate(requests, start=1):
        answer = _ask(server, request)
        cached = f"{answer.cached_tokens:,} of {answer.prompt_tokens:,} prompt tokens cached"
        about = f"{number:2}/{len(requests)} prefix {request.prefix + 1} {request.kind.value:<7}"
        print(f"  {about}{answer.ttft_s:7.3f} s, {cached}", flush=True)
        answers.append(answer)
    return answers


def _ask(server: VllmServer, request: Request) -> Answer:
    try:
        return complete(server.port, MODEL_NAME, request.prompt, OUTPUT_TOKENS)
    except (OSError, HTTPException, RuntimeError) as error:
        server.check_alive()
        raise ServerError(f"a request failed: {error}; the log is {server.log}") from error


def _report(out: Path, scale: Scale, baseline: Run, cached: Run, disk: DiskRuns | None) -> None:
    """Print the table; write the JSON file and the plot."""
    workload = scale.workload
    title = (
        f"{workload.prefixes} prefixes of {workload.prefix_tokens:,} tokens in rotation; "
        f"the device cache holds {workload.prompts_on_device}"
    )
    print(f"\n{title}\n\n{table(baseline, cached)}\n")
    write_json(out / "prefix_reuse.json", asdict(scale), baseline, cached)
    runs, restart = [baseline, cached], None
    if disk is not None:
        print(f"{_disk.table(baseline, disk)}\n\n{_disk.FILTER_NOTE}\n")
        _disk.write_json(out / "prefix_reuse.json", baseline, disk)
        runs.append(disk.both)
        restart = len(disk.before.requests)
    write_plot(out / "prefix_reuse.png", title, runs, restart)
    print(f"written: {out / 'prefix_reuse.json'}, {out / 'prefix_reuse.png'}")


def _verdict(connector: str, baseline: Run, cached: Run, disk: DiskRuns | None) -> int:
    """Say whether the demo showed what it is for; return the exit status."""
    problems = []
    if wrong := differing(baseline, cached):
        problems.append(f"the servers gave different tokens for requests {wrong}")
    if connector != NONE and not cached.cache.host_hits:
        problems.append("no prompt token came from the host cache")
    if disk is not None:
        problems += _disk.problems(baseline, disk)
    for problem in problems:
        print(f"FAILED: {problem}")
    if problems:
        return 1
    print(f"all {len(baseline.answers)} answers have the same tokens on every server")
    if connector != NONE:
        _explain(baseline, cached)
    if disk is not None:
        print(f"back from disk: {saving(disk.both):.1f}x faster than cold on the same server")
    return 0


def _explain(baseline: Run, cached: Run) -> None:
    """Say how much faster a returning prefix was, and whether noise spoils it."""
    across, within = speedup(baseline, cached, Kind.RETURN), saving(cached)
    print(f"first token of a returning prefix: {across:.1f}x faster than without the connector,")
    print(f"{within:.1f}x faster than a cold one on the same server")
    noise = speedup(baseline, cached, Kind.FIRST)
    factor = max(noise, 1 / noise)
    if factor > NOISE_LIMIT:
        print(f"note: cold prefixes differ {factor:.1f}x between the servers, and no cache speeds")
        print("those up: the machine was busy, so believe the smaller number, or run again")


if __name__ == "__main__":
    sys.exit(main())
