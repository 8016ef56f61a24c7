"""The fused forms of AdamW are the rule; what does not run here is refused with the reason."""

import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from k25sys.errors import BackendError
from k25sys.optim import fused_adamw
from k25sys.optim.fused_adamw import AdamWPieces, choose, listing
from k25sys.optim.muon_clip import MuonClipConfig

CPU = torch.device("cpu")
CONFIG = MuonClipConfig(weight_decay=0.07, adam_betas=(0.8, 0.95), adam_epsilon=1e-6)


def make_pieces(lengths: list[int], dtype: torch.dtype, seed: int) -> AdamWPieces:
    """Slices of flat shards, as ZeroOptimizer has them."""
    generator = torch.Generator().manual_seed(seed)
    masters = torch.randn(sum(lengths), generator=generator, dtype=torch.float64).to(dtype)
    flats = [masters, torch.zeros_like(masters), torch.zeros_like(masters), torch.zeros_like(masters)]
    return AdamWPieces(*(flat.split(lengths) for flat in flats))


def run(backend: str, pieces: AdamWPieces, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        for gradient in pieces.gradients:
            size = 10.0 ** torch.randint(-6, 2, (), generator=generator)
            gradient.copy_(torch.randn(len(gradient), generator=generator, dtype=torch.float64) * size)
        choose(backend, CPU, pieces.masters[0].dtype)(pieces, step, 0.03 / step, CONFIG)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=4), st.integers(0, 1000))
def test_torchs_kernel_is_the_rule(lengths: list[int], seed: int) -> None:
    for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        expected, got = make_pieces(lengths, dtype, seed), make_pieces(lengths, dtype, seed)
        run("reference", expected, 8, seed)
        run("torch", got, 8, seed)
        for one, other in (
            (got.masters, expected.masters), (got.exp_avgs, expected.exp_avgs), (got.exp_avg_sqs, expected.exp_avg_sqs),
        ):  # fmt: skip
            error = (torch.cat(list(one)) - torch.cat(list(other))).norm() / torch.cat(list(other)).norm()
            assert float(error) <= bound


def test_what_runs_here() -> None:
    found = {(backend.name, backend.device): backend for backend in listing()}
    assert len(found) == 6
    assert found["reference", "cpu"].available
    assert found["torch", "cpu"].available
    assert found["apex", "cpu"].reason == "its kernels run on CUDA only"
    for name in ("reference", "torch", "apex"):
        if not torch.cuda.is_available():
            assert found[name, "cuda"].reason == "torch sees no CUDA device"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("apex", "AdamW: backend: got 'apex', accepted 'reference', 'torch', 'apex' (unavailable: its kernels run on"),
        ("fused", "AdamW: backend: got 'fused'"),
    ],
)
def test_other_names_are_refused(name: str, text: str) -> None:
    with pytest.raises(BackendError) as error:
        choose(name, CPU, torch.float32)
    assert text in str(error.value)


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules with apex's signatures, which compute on the CPU what apex's kernel computes."""

    def multi_tensor_adam(
        chunk: int, overflow: torch.Tensor, lists: list[list[torch.Tensor]], lr: float, beta1: float, beta2: float,
        epsilon: float, step: int, mode: int, bias_correction: int, decay: float,
    ) -> None:  # fmt: skip
        assert (overflow.dtype, mode, bias_correction) == (torch.int32, 1, 1)
        for g, p, m, v in zip(*lists, strict=True):
            m.copy_(beta1 * m + (1 - beta1) * g)
            v.copy_(beta2 * v + (1 - beta2) * g * g)
            denominator = (v / (1 - beta2**step)).sqrt() + epsilon
            p.sub_(lr * (m / (1 - beta1**step) / denominator + decay * p))

    modules = {name: ModuleType(name) for name in ("apex", "apex.multi_tensor_apply", "amp_C")}
    modules["amp_C"].multi_tensor_adam = multi_tensor_adam  # pyright: ignore[reportAttributeAccessIssue]
    modules["apex.multi_tensor_apply"].multi_tensor_applier = (  # pyright: ignore[reportAttributeAccessIssue]
        lambda op, overflow, lists, *constants: op(65536, overflow, lists, *constants)
    )
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(fused_adamw, "_apex_reason", lambda device: "")


def test_apex_is_called_as_it_takes_its_arguments(apex: None) -> None:
    expected, got = make_pieces([50, 7], torch.float32, 3), make_pieces([50, 7], torch.float32, 3)
    run("reference", expected, 5, 4)
    run("apex", got, 5, 4)
    for one, other in zip(got.masters, expected.masters, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-7)
    with pytest.raises(BackendError, match="'apex' with float64, accepted 'reference' or 'torch'"):
        choose("apex", CPU, torch.float64)


def test_apex_is_missed_by_name() -> None:
    assert "No module named 'apex'; build apex with its CUDA extensions" in fused_adamw._apex_reason("cuda")
