"""What sm_90 adds: mbarriers, bulk tensor copies, wgmma, matrices in shared memory, and what goes with them."""

import re

from tests.cuda_on_cpu.ptx.instructions import rule
from tests.cuda_on_cpu.ptx.operands import Context

_SHARED = r"\.shared(?:::cta)?"


def _exactly(count: int, operands: list[str]) -> list[str]:
    if len(operands) != count:
        raise ValueError(f"expected {count} operands")
    return operands


@rule(rf"mbarrier\.init{_SHARED}\.b64")
def _init(c: Context, m: re.Match[str], operands: list[str]) -> str:
    address, count = _exactly(2, operands)
    return f"mbarrier_init({c.shared_offset(address)}, {c.read(count, 'u32')});"


@rule(rf"mbarrier\.inval{_SHARED}\.b64")
def _inval(c: Context, m: re.Match[str], operands: list[str]) -> str:
    (address,) = operands
    return f"mbarrier_inval({c.shared_offset(address)});"


@rule(rf"mbarrier\.arrive(\.expect_tx)?{_SHARED}\.b64")
def _arrive(c: Context, m: re.Match[str], operands: list[str]) -> str:
    state, address, *rest = operands
    if state != "_" or len(rest) > 1 or (m[1] and not rest):
        raise ValueError("the state is not kept: `_, [address], count`")
    count = c.read(rest[0], "u32") if rest else "1"
    return f"mbarrier_arrive{'_expect_tx' if m[1] else ''}({c.shared_offset(address)}, {count});"


@rule(rf"mbarrier\.try_wait\.parity{_SHARED}\.b64")
def _wait(c: Context, m: re.Match[str], operands: list[str]) -> str:
    done, address, parity = _exactly(3, operands)
    return c.put(done, f"mbarrier_wait_parity({c.shared_offset(address)}, {c.read(parity, 'u32')})")


@rule(r"fence\.mbarrier_init\.release\.cluster")
def _fence_init(c: Context, m: re.Match[str], operands: list[str]) -> str:
    _exactly(0, operands)
    return "fence_mbarrier_init();"


@rule(r"fence\.proxy\.async(?:\.shared::cta)?")
def _fence_proxy(c: Context, m: re.Match[str], operands: list[str]) -> str:
    _exactly(0, operands)
    return "fence_async_proxy();"


def _map_and_start(c: Context, operand: str, rank: str) -> str:
    """`[map, {x, y}]` as a declaration of `start` and the map's address."""
    match = re.fullmatch(r"\[\s*(\S+?)\s*,\s*\{(.*)\}\s*\]", operand, re.S)
    if not match:
        raise ValueError(f"tensor {operand!r}")
    start = [c.read(part.strip(), "s32") for part in match[2].split(",")]
    if len(start) != int(rank):
        raise ValueError(f"{len(start)} coordinates for {rank} dimensions")
    return f"const int32_t start[] = {{{', '.join(start)}}}; const uint64_t map = {c.read(match[1], 'u64')};"


@rule(r"cp\.async\.bulk\.tensor\.([23])d\.shared::(?:cluster|cta)\.global(?:\.tile)?\.mbarrier::complete_tx::bytes")
def _bulk_load(c: Context, m: re.Match[str], operands: list[str]) -> str:
    to, source, mbarrier = _exactly(3, operands)
    call = f"bulk_load({c.shared_offset(to)}, map, {c.shared_offset(mbarrier)}, start, {m[1]}, {c.line});"
    return f"{_map_and_start(c, source, m[1])} {call}"


@rule(r"cp\.async\.bulk\.tensor\.([23])d\.global\.shared::cta(?:\.tile)?\.bulk_group")
def _bulk_store(c: Context, m: re.Match[str], operands: list[str]) -> str:
    target, source = _exactly(2, operands)
    return f"{_map_and_start(c, target, m[1])} bulk_store(map, {c.shared_offset(source)}, start, {m[1]}, {c.line});"


@rule(r"cp\.reduce\.async\.bulk\.tensor\.([23])d\.global\.shared::cta\.add(?:\.tile)?\.bulk_group")
def _bulk_add(c: Context, m: re.Match[str], operands: list[str]) -> str:
    target, source = _exactly(2, operands)
    return f"{_map_and_start(c, target, m[1])} bulk_add(map, {c.shared_offset(source)}, start, {m[1]}, {c.line});"


@rule(r"cp\.async\.bulk\.commit_group")
def _commit_bulk(c: Context, m: re.Match[str], operands: list[str]) -> str:
    _exactly(0, operands)
    return "bulk_commit_group();"


@rule(r"cp\.async\.bulk\.wait_group(\.read)?")
def _wait_bulk(c: Context, m: re.Match[str], operands: list[str]) -> str:
    (pending,) = operands
    return f"bulk_wait_group({int(pending)}, {'true' if m[1] else 'false'});"


@rule(r"prefetch\.tensormap")
def _prefetch(c: Context, m: re.Match[str], operands: list[str]) -> str:
    base, offset = c.split_address(*_exactly(1, operands))
    return f"prefetch_tensor_map({c.read(base, 'u64')} + {offset});"


@rule(r"wgmma\.(fence|commit_group)\.sync\.aligned")
def _wgmma_mark(c: Context, m: re.Match[str], operands: list[str]) -> str:
    _exactly(0, operands)
    return f"wgmma_{m[1]}();"


@rule(r"wgmma\.wait_group\.sync\.aligned")
def _wgmma_wait(c: Context, m: re.Match[str], operands: list[str]) -> str:
    (pending,) = operands
    return f"wgmma_wait_group({int(pending)});"


@rule(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(16|32)\.f32\.(bf16\.bf16|e4m3\.e4m3)")
def _wgmma(c: Context, m: re.Match[str], operands: list[str]) -> str:
    columns, depth, bf16 = int(m[1]), int(m[2]), m[3].startswith("bf16")
    if columns % 8 or not 8 <= columns <= 256 or depth != (16 if bf16 else 32):
        raise ValueError(f"no such shape: m64n{columns}k{depth} of {m[3]}")
    sums, a, b, accumulate, *immediates = _exactly(8 if bf16 else 6, operands)
    registers = c.vector(sums)
    if len(set(registers)) != columns // 2 or not c.registers.issuperset(registers):
        raise ValueError(f"needs {columns // 2} different accumulators")
    if any(sign not in ("1", "-1") for sign in immediates[:2]) or any(t not in ("0", "1") for t in immediates[2:]):
        raise ValueError(f"immediates {immediates}")
    flags = [sign == "-1" for sign in immediates[:2]] + [t == "1" for t in (immediates[2:] or ["0", "0"])]
    shape = f"{{MmaType::{'bf16' if bf16 else 'e4m3'}, {columns}, {', '.join(str(flag).lower() for flag in flags)}}}"
    pointers = ", ".join(f"reinterpret_cast<float*>(&{c.name(register)})" for register in registers)
    descriptors = f"{c.read(a, 'b64')}, {c.read(b, 'b64')}"
    call = f"wgmma({shape}, {descriptors}, {c.read(accumulate, 'pred')}, registers, {c.line});"
    return f"float* const registers[] = {{{pointers}}}; {call}"


@rule(rf"stmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?{_SHARED}\.b16")
def _store_matrices(c: Context, m: re.Match[str], operands: list[str]) -> str:
    address, registers = _exactly(2, operands)
    values = [c.read(register, "b32") for register in c.vector(registers)]
    if len(values) != int(m[1]):
        raise ValueError(f"{len(values)} registers for {m[1]} matrices")
    call = f"store_matrices({c.shared_offset(address)}, values, {m[1]}, {'true' if m[2] else 'false'}, {c.line});"
    return f"const uint32_t values[] = {{{', '.join(values)}}}; {call}"


@rule(rf"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?{_SHARED}\.b16")
def _load_matrices(c: Context, m: re.Match[str], operands: list[str]) -> str:
    registers, address = _exactly(2, operands)
    targets = c.vector(registers)
    if len(targets) != int(m[1]):
        raise ValueError(f"{len(targets)} registers for {m[1]} matrices")
    call = f"load_matrices({c.shared_offset(address)}, values, {m[1]}, {'true' if m[2] else 'false'}, {c.line});"
    return f"uint32_t values[{m[1]}]; {call} " + " ".join(c.put(t, f"values[{i}]") for i, t in enumerate(targets))


@rule(r"setmaxnreg\.(inc|dec)\.sync\.aligned\.u32")
def _set_registers(c: Context, m: re.Match[str], operands: list[str]) -> str:
    (count,) = operands
    return f"set_max_registers({int(count)}, {'true' if m[1] == 'inc' else 'false'});"


@rule(r"bar\.arrive")
def _barrier_arrive(c: Context, m: re.Match[str], operands: list[str]) -> str:
    barrier, count = _exactly(2, operands)
    return f"block_arrive({c.read(barrier, 's32')}, {c.read(count, 's32')});"


@rule(r"elect\.sync")
def _elect(c: Context, m: re.Match[str], operands: list[str]) -> str:
    targets, mask = _exactly(2, operands)
    leader, predicate = targets.split("|")
    call = f"uint32_t leader; const bool elected = elect({c.read(mask, 'u32')}, leader);"
    return f"{call} {c.put(leader, 'leader')} {c.put(predicate, 'elected')}"


@rule(r"griddepcontrol\.(?:wait|launch_dependents)")
def _grid_dependency(c: Context, m: re.Match[str], operands: list[str]) -> str:
    _exactly(0, operands)
    return "static_cast<void>(0);"  # launches run one after another
