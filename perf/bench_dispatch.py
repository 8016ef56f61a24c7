"""Expert parallelism over gloo processes: bytes, the all-to-all's share, and efficiency, in virtual time.

python perf/bench_dispatch.py [--ranks N ...] [--rounds N] [--json FILE]

Virtual time is the CPU time of all threads of a rank, gloo's included: what a rank computes and copies, without what it
waits for. Of several ranks the slowest counts, in each round, because they wait for each other. Cases:

dispatch_combine: tokens to their experts' ranks and back, with gradients, and no experts between; the peer is the same
    from index_select, torch's all-to-all with autograd, and index_add, with sums in float32 as ours.
layer: the whole layer with experts. The peer is one process on all tokens, over the number of ranks: the ratio is the
    efficiency of the ranks, the balance of the experts' load included.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.multiprocessing.spawn import start_processes
from torch.utils.benchmark import Measurement, TaskSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from k25sys import ops
from k25sys.parallel import GridSizes, RankGrid, WeightGradStore
from k25sys.parallel.expert import ExpertParallel, Transports
from k25sys.parallel.payload import PAYLOADS, row_bytes
from k25sys.parallel.transport import TorchTransport, Transfer
from perf import harness
from perf.harness import Comparison
from perf.routing import default_text, embed, router_logits, token_ids

TOKENS, DIM, WIDTH, NUM_EXPERTS, TOP_K = 512, 1024, 256, 32, 4
K25_DIM, K25_TOP_K = 7168, 8


class SynchronousTransport(TorchTransport):
    """Waits at once, so that the CPU time between start and end is the exchange's alone."""

    seconds = 0.0

    def start(self, rows_MB: Tensor, send: Any, receive: Any) -> Transfer:
        """As in Transport."""
        begin = time.process_time()
        transfer = super().start(rows_MB, send, receive)
        rows = transfer.wait()
        self.seconds += time.process_time() - begin
        done = TorchTransport(None)
        return done.start(rows, [], [])


class Experts(nn.Module):
    """A layer's experts, the same on every rank."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        gate_up = torch.randn(NUM_EXPERTS, 2 * WIDTH, DIM, generator=generator) * DIM**-0.5
        down = torch.randn(NUM_EXPERTS, DIM, WIDTH, generator=generator) * WIDTH**-0.5
        self.gate_up_proj = nn.Parameter(gate_up.bfloat16())
        self.down_proj = nn.Parameter(down.bfloat16())


class NoExperts(ExpertParallel):
    """Rows come back as they went."""

    def _experts(self, x_ND: Tensor, *_: object) -> Tensor:
        return x_ND


def routed_tokens(num_ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of all ranks from a real text, with the weights and experts of a random router."""
    x_TD = embed(token_ids(default_text(), TOKENS * num_ranks), DIM)
    weights_TK, experts_TK = ops.route_tokens(
        router_logits(x_TD, NUM_EXPERTS, "real"), torch.zeros(NUM_EXPERTS), top_k=TOP_K, scale=1.0
    )
    return x_TD.bfloat16(), weights_TK, experts_TK


def torch_dispatch_combine(x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    """The peer: what a trainer writes without a library."""
    num_ranks = group.size()
    flat_M = experts_TK.flatten().long()
    order_M = flat_M.argsort(stable=True)
    sent_R = flat_M.bincount(minlength=NUM_EXPERTS).view(num_ranks, -1).sum(1)
    received_R = torch.empty_like(sent_R)
    dist.all_to_all_single(received_R, sent_R, group=group)
    send, receive = sent_R.tolist(), received_R.tolist()
    token_M = order_M // TOP_K
    rows = all_to_all_single_autograd(x_TD.index_select(0, token_M), receive, send, group)
    back_MD = all_to_all_single_autograd(rows, send, receive, group)
    weighted_MD = back_MD * weights_TK.flatten()[order_M, None]
    return torch.zeros(x_TD.shape).index_add(0, token_M, weighted_MD).to(x_TD.dtype)


def measured(run: Callable[[], Any]) -> float:
    """CPU seconds of all threads of this process."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


def forward_backward(layer: Callable[..., Tensor], inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """One pass; the gradients of the inputs are dropped."""
    x, weights, experts = inputs
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    y = layer(x, weights, experts)
    y.backward(torch.ones_like(y))
    return y.detach()


def run_rank(rank: int, num_ranks: int, rounds: int, folder: str) -> None:
    """One process: all candidates in turn, `rounds` times; figures go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks, timeout=timedelta(minutes=5)
    )
    grid, store = RankGrid.create(GridSizes(data=num_ranks, expert=num_ranks)), WeightGradStore()
    group = grid.group("expert")
    assert group is not None
    x, weights, experts = routed_tokens(num_ranks)
    own = slice(rank * TOKENS, (rank + 1) * TOKENS)
    inputs = (x[own], weights[own], experts[own])
    candidates: dict[str, Callable[..., Tensor]] = {}
    transports: dict[str, SynchronousTransport] = {}
    for payload in PAYLOADS:
        for name, kind in (("layer", ExpertParallel), ("dispatch_combine", NoExperts)):
            transports[f"{name}/{payload}"] = moved = SynchronousTransport(group)
            both = Transports(moved, TorchTransport(None))
            candidates[f"{name}/{payload}"] = kind(Experts(), grid, store, transport=both, payload=payload)
    candidates["torch_alltoall"] = partial(torch_dispatch_combine, group=group)
    outputs = {name: forward_backward(candidate, inputs) for name, candidate in candidates.items()}
    check(outputs, inputs, x, weights, experts, own)
    for moved in transports.values():
        moved.bytes_sent, moved.seconds = 0, 0.0
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            dist.barrier()
            seconds[name].append(measured(lambda candidate=candidate: forward_backward(candidate, inputs)))
    figures = {
        "seconds": seconds,
        "bytes_sent": {name: moved.bytes_sent // rounds for name, moved in transports.items()},
        "transport_seconds": {name: moved.seconds / rounds for name, moved in transports.items()},
        "rows_computed": int((experts // (NUM_EXPERTS // num_ranks) == rank).sum()),
    }
    Path(folder, f"rank{rank}.json").write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


def check(
    outputs: dict[str, Tensor], inputs: tuple[Tensor, ...], x: Tensor, weights: Tensor, experts: Tensor, own: slice
) -> None:
    """Raises unless all candidates compute the same, up to their payload's rounding."""
    whole = Experts()
    with torch.no_grad():
        layer = ops.expert_mlp(x, whole.gate_up_proj, whole.down_proj, weights, experts)[own].double()
    returned = (inputs[0].double() * inputs[1].double().sum(1, keepdim=True)).double()
    for name, y in outputs.items():
        expected = layer if name.startswith("layer") else returned
        error = float((y.double() - expected).norm() / expected.norm())
        if error > (0.06 if name.endswith("fp8") else 0.01):
            raise SystemExit(f"{name} computes something else: relative difference {error:.1e}")


def measurement(seconds: list[float]) -> Measurement:
    """Virtual seconds of the rounds."""
    return Measurement(number_per_run=1, raw_times=seconds, task_spec=TaskSpec(stmt="", setup="", num_threads=1))


def one_process(num_ranks: int, rounds: int) -> list[float]:
    """Virtual seconds of the layer on the tokens of all ranks."""
    torch.set_num_threads(1)
    whole, inputs = Experts(), routed_tokens(num_ranks)

    def layer(x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        return ops.expert_mlp(x, whole.gate_up_proj, whole.down_proj, weights, experts)

    forward_backward(layer, inputs)
    return [measured(lambda: forward_backward(layer, inputs)) for _ in range(rounds)]


def bench(num_ranks: int, rounds: int) -> list[Comparison]:
    """All cases of one number of ranks."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(run_rank, (num_ranks, rounds, folder), nprocs=num_ranks, start_method="spawn")
        ranks = [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in range(num_ranks)]

    def slowest(name: str) -> Measurement:
        return measurement([max(times) for times in zip(*(rank["seconds"][name] for rank in ranks), strict=True)])

    alone = measurement([seconds / num_ranks for seconds in one_process(num_ranks, rounds)])
    rows = [rank["rows_computed"] for rank in ranks]
    comparisons = []
    for kind, peers in (
        ("dispatch_combine", {"torch_alltoall": slowest("torch_alltoall")}),
        ("layer", {"one_process_over_ranks": alone}),
    ):
        for payload in PAYLOADS:
            name = f"{kind}/{payload}"
            total = sum(sum(rank["seconds"][name]) for rank in ranks) / rounds
            fields = {
                "allocator": harness.allocator(),
                "label": "virtual time",
                "all_to_all_share": sum(rank["transport_seconds"][name] for rank in ranks) / total,
                "bytes_sent_per_rank": [rank["bytes_sent"][name] for rank in ranks],
                "rows_max_over_mean": max(rows) / (sum(rows) / num_ranks),
                "k25_bytes_out_per_token": K25_TOP_K * row_bytes(payload, K25_DIM, torch.bfloat16),
                "peak_bytes": None,
                "peers_peak_bytes": {},
            }
            case = f"{kind}/ranks={num_ranks}/payload={payload}"
            comparisons.append(Comparison(name=case, ours=slowest(name), peers=peers, fields=fields))
    return comparisons


def describe(case: dict[str, Any]) -> str:
    """A case as lines for a reader."""
    sent = case["bytes_sent_per_rank"]
    details = [
        f"all-to-all {case['all_to_all_share']:.1%} of virtual time; rows of the busiest rank "
        f"{case['rows_max_over_mean']:.2f} of the mean",
        f"MB sent by a rank, forward and backward: {min(sent) / 1e6:.2f} to {max(sent) / 1e6:.2f}; a token of K2.5 out "
        f"to {K25_TOP_K} experts (calculated): {case['k25_bytes_out_per_token'] / 1e3:.1f} kB",
    ]
    if case["name"].startswith("layer"):
        details.append(f"efficiency of the ranks in virtual time {case['ratio']:.1%}")
    return harness.describe(case, details)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help=f"divisors of {NUM_EXPERTS} above 1")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of which the median counts")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    arguments = parser.parse_args()
    if any(count < 2 or NUM_EXPERTS % count for count in arguments.ranks):
        parser.error(f"--ranks: got {arguments.ranks}, accepted divisors of {NUM_EXPERTS} above 1")
    if arguments.rounds < 1:
        parser.error(f"--rounds: got {arguments.rounds}, accepted at least 1")
    return arguments


def main() -> None:
    """Runs the cases, prints each, and writes the JSON."""
    arguments = parse_arguments()
    sizes = f"{TOKENS} bfloat16 tokens of {DIM} a rank to {TOP_K} of {NUM_EXPERTS} experts of width {WIDTH}"
    print(f"{sizes}\n{harness.machine()}", flush=True)
    cases = []
    for num_ranks in arguments.ranks:
        for comparison in bench(num_ranks, arguments.rounds):
            cases.append(comparison.as_json())
            print(describe(cases[-1]), flush=True)
    if arguments.json:
        backends = {"expert_mlp": "native", "dispatch": "native", "combine": "native", "transport": "torch (gloo)"}
        harness.write_json(arguments.json, "dispatch", backends, cases)


if __name__ == "__main__":
    main()
