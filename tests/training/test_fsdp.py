"""torch's own FSDP2 as an oracle: the plain model under fully_shard has the losses and gradients of data ranks here."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from k25sys.models import KimiK25, KimiK25Config
from k25sys.optim import MuonClipConfig, ZeroOptimizer
from k25sys.parallel import GridSizes, RankGrid
from k25sys.parallel.layout import local_part
from k25sys.training.microbatch import MicroBatch
from tests.parallel.processes import run_ranks
from tests.training.batches import build_model, make_microbatches, reference, run_plain, small_config
from tests.training.test_grids import MICROBATCHES, GridCase, build, rounding_errors


def fully_sharded(config: KimiK25Config, dtype: torch.dtype) -> KimiK25:
    """The plain model under FSDP2: each decoder layer a group, the rest with the root.

    The encoder is in the root's group because text-only micro-batches do not call it: as a group of its own it would be
    gathered on some ranks and not on others, and FSDP2 would wait for ever. Gradients are sums here, not means.
    """
    model = build_model(config, dtype=dtype)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*model.language_model.model.layers.values(), model):
        fully_shard(module, mesh=mesh)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # a factor is a reduction that gloo does not have
    register_fsdp_forward_method(model, "hidden_states")
    return model


def under_fsdp(
    config: KimiK25Config, batches: list[MicroBatch], dtype: torch.dtype
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of this rank's micro-batches, and the whole gradients of all ranks'.

    Gradients are reduced after the last micro-batch: FSDP2 reduces those that a rank has, and ranks whose micro-batch
    has no image have none of the encoder's. Over all micro-batches every rank has.
    """
    model = fully_sharded(config, dtype)
    assert isinstance(model, FSDPModule)
    losses: list[float] = []
    for number, batch in enumerate(batches):
        model.set_requires_gradient_sync(number == len(batches) - 1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nobody writes into it
            run_plain(model, [batch], losses)
    gradients = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        assert parameter.to_local().numel() <= parameter.numel() // dist.get_world_size() + parameter[:1].numel()
        if parameter.grad is not None:
            assert isinstance(parameter.grad, DTensor)
            gradients[name] = parameter.grad.full_tensor()
    return losses, gradients


def _check(dtype: torch.dtype) -> dict[str, float]:
    torch.set_num_threads(1)
    ranks, bound = dist.get_world_size(), {torch.float32: 1e-6, torch.float64: 1e-13}[dtype]
    config = small_config()
    batches = make_microbatches(data_ranks=ranks, per_rank=MICROBATCHES, dtype=dtype)
    losses, gradients = under_fsdp(config, batches[dist.get_rank()], dtype)
    flat = [batch for each in batches for batch in each]
    rounding = rounding_errors(config, flat, reference(config, flat, dtype=dtype)) if dtype == torch.float32 else {}
    worst = {}
    for sizes in (GridSizes(data=ranks), GridSizes(data=ranks, expert=ranks)):
        case, grid = GridCase(sizes=sizes), RankGrid.create(sizes)
        runtime, model = build(case, config, dtype, grid)
        encoder = [name for name in model.parameters if not name.startswith("language_model.")]
        optimizer = ZeroOptimizer(
            model.parameters, model.layouts, grid, MuonClipConfig(), bucket_bytes=20_000, irregular=encoder
        )
        optimizer.expect_gradients(MICROBATCHES)
        found = [float(loss) for loss in runtime.step(batches[grid.rank]).losses]
        assert found == pytest.approx(losses, rel=bound, abs=0.0)
        assert set(gradients) == set(model.parameters)
        worst[str(case)] = 0.0
        for bucket, shard in zip(optimizer.gradients.buckets, optimizer.gradients.reduced(), strict=True):
            for piece in bucket.pieces():
                name = piece.slot.name
                wanted = local_part(gradients[name], piece.slot.layout, sizes, grid.rank).flatten()
                difference = shard[piece.shard] - wanted[piece.begin : piece.end]
                error = float(difference.norm() / gradients[name].norm())
                # Experts elsewhere see tokens of several ranks at once: another order of summation than FSDP2's.
                allowed = bound if sizes.expert == 1 else max(bound, 2 * rounding.get(name, 0.0))
                assert error <= allowed, (str(case), name, error)
                worst[str(case)] = max(worst[str(case)], error)
    return worst


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_losses_and_gradients_are_those_of_fully_shard(ranks: int, dtype: torch.dtype) -> None:
    """Against ZeRO-1's reduced shards, with the experts on every rank and spread over all."""
    worst = run_ranks(ranks, _check, dtype, timeout=100)
    print({key: f"{max(each[key] for each in worst):.1e}" for key in worst[0]})
