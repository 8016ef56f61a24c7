"""A plan as a table for people; every line of figures is labelled as simulated."""

from k25sys.planner.plan import Plan


def table(plan: Plan) -> str:
    """The plan in a screenful."""
    request = plan.request
    lines = [
        f"simulated: {request.preset} on {request.gpus} {request.hardware.name}, pp {request.pp} x vpp {request.vpp}, "
        f"dp {request.data}, cp {request.cp}, tp {request.tp}, ep {request.ep}; {request.schedule}, "
        f"{request.microbatches} micro-batches of {request.sequence} tokens; vision {request.vision}",
        "",
        f"  step            {plan.step_seconds:10.3f} s    = " + " + ".join(
            f"{name} {value:.3f}" for name, value in plan.seconds.items()
        ),
        f"  throughput      {plan.tokens_per_second_per_gpu:10.1f} tokens/s/GPU",
        f"  MFU             {plan.mfu:10.1%}      {plan.flops_per_token / 1e9:.1f} GFLOP a token",
        f"  bubble          {plan.bubble:10.2%}      of the step",
        f"  against text    {plan.efficiency_vs_text:10.3f}      at {plan.token_share:.1%} media tokens",
    ]  # fmt: skip
    if plan.dep is not None:
        lines.append(
            f"  encoder balance {plan.dep.max_over_mean:10.3f}      max/mean, lower bound {plan.dep.lower_bound:.3f}; "
            f"efficiency with perfect balance {plan.dep.ceiling:.3f}"
        )
    lines += [f"  binds           {plan.binds:>10}", "", "  GB on one GPU of each pipeline rank"]
    names = ("weights", "gradients", "optimizer", "activations", "embeddings", "buffers", "total")
    lines.append("  rank" + "".join(f"{name:>12}" for name in names))
    for rank, stage in enumerate(plan.stages):
        lines.append(f"  {rank:4}" + "".join(f"{getattr(stage.memory, name) / 1e9:12.2f}" for name in names))
    lines += ["", *(f"  change: {line}" for line in plan.advice), "  assumed:"]
    return "\n".join([*lines, *(f"    {line}" for line in plan.assumptions)])
