"""A plan as text, as YAML for LightningCLI, and as numbers for JSON."""

from __future__ import annotations

from typing import Any

from lightning_ulysses.planning.plan import Choice, Plan

_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"))


def amount(number: float) -> str:
    """Bytes for people."""
    for size, name in _UNITS:
        if number >= size:
            return f"{number / size:.1f} {name}"
    return f"{number:.0f} B"


def tokens(number: int) -> str:
    """A length for people: 1M is 1,048,576 tokens, as in the arguments of the command."""
    for size, name in ((2**20, "M"), (2**10, "K")):
        if number >= size:
            return f"{number / size:.4g}{name}"
    return str(number)


def numbers(plan: Plan) -> dict[str, Any]:
    """A plan for JSON. Bytes of a GPU are those of one, bytes of a host those of one machine."""
    best = plan.best
    return {
        "model": plan.facts.name,
        "parameters": plan.facts.numel,
        "seq_len": plan.seq_len,
        "fits": best.limit is None,
        "limit": None if best.limit is None else vars(best.limit),
        "peak_gpu_bytes": best.peak_gpu_bytes,
        "peak_host_bytes": best.peak_host_bytes,
        "longest_seq_len": best.longest_seq_len,
        "tokens_per_second": best.tokens_per_second,
        "parts": best.parts,
        "yaml": yaml_of(plan, best),
        "choices": [_choice(plan, choice) for choice in plan.choices],
    }


def _choice(plan: Plan, choice: Choice) -> dict[str, Any]:
    return {
        "sp_size": choice.sp_size,
        "gather": choice.gather,
        "dp_size": choice.dp_size,
        "stage": choice.sharding.stage,
        "offload_optimizer": choice.sharding.offload_optimizer,
        "offload_parameters": choice.sharding.offload_parameters,
        "parts": choice.parts,
        "fits": choice.limit is None,
        "is_estimate": choice.is_estimate,
        "gpu_bytes": choice.gpu,
        "host_bytes": choice.host,
        "longest_seq_len": choice.longest_seq_len,
        "seconds": choice.time.total,
        "tokens_per_second": choice.tokens_per_second,
        "exchange_bytes": choice.exchange_bytes,
        "gathered_bytes": choice.gathered_bytes,
        "flops": choice.flops,
        "yaml": yaml_of(plan, choice),
    }


def yaml_of(plan: Plan, choice: Choice) -> str:
    """The trainer's part of a config of LightningCLI."""
    machine, sharding = plan.machine, choice.sharding
    lines = [
        "trainer:",
        "  accelerator: gpu",
        f"  devices: {machine.neighbours}",
        f"  num_nodes: {-(-machine.gpus // machine.gpus_per_node)}",
        "  precision: bf16-true",
        "  strategy:",
        "    class_path: lightning_ulysses.UlyssesDeepSpeedStrategy",
        "    init_args:",
        f"      sp_size: {_sizes(choice)}",
        f"      stage: {sharding.stage}",
    ]
    lines += ["      offload_optimizer: true"] if sharding.offload_optimizer else []
    lines += ["      offload_parameters: true"] if sharding.offload_parameters else []
    if choice.parts:
        lines.append("      memory:")
        lines += [f"        {key}: {_scalar(value)}" for key, value in choice.parts.items()]
    return "\n".join(lines) + "\n"


def _sizes(choice: Choice) -> str:
    ulysses = choice.sp_size // choice.gather
    return str(choice.sp_size) if choice.gather == 1 else f"{{ulysses: {ulysses}, gather: {choice.gather}}}"


def _scalar(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def text_of(plan: Plan) -> str:
    """A plan for people."""
    best, machine = plan.best, plan.machine
    lines = [
        f"{plan.facts.name}, {plan.facts.numel / 1e9:.2f}B parameters, S={tokens(plan.seq_len)}, "
        f"{machine.gpus} GPUs of {amount(machine.gpu_memory)}, {amount(machine.host_memory)} for each "
        f"{machine.neighbours} of them",
        "",
        _verdict(best),
        "",
        "One GPU at the peak:",
        *_rows(best.gpu, machine.gpu_memory),
    ]
    if best.host:
        lines += ["One machine:", *_rows(best.host, machine.host_memory)]
    lines += [
        "",
        f"A step: {best.time.total:.3g} s, of which kernels {best.time.compute:.3g} s and exchanges "
        f"{best.time.exchange:.3g} s; {best.tokens_per_second:.3g} tokens/s; {best.flops:.3g} operations on each GPU",
        _volume(best),
        "",
        "  P x dp  stage  parts                                              fits  longest S  tokens/s",
        *(_line(choice) for choice in plan.choices),
        "",
        yaml_of(plan, best).rstrip(),
    ]
    return "\n".join(line for line in lines if line is not None)


def _verdict(best: Choice) -> str:
    ways = f"sp_size={_sizes(best)}, {_stage(best)}, {_parts(best)}"
    if best.limit is None:
        return f"Fits: {ways}. The longest sequence is {tokens(best.longest_seq_len)}."
    limit = best.limit
    return (
        f"Does not fit. {limit.name} memory is the first limit: {amount(limit.needed)} of {amount(limit.available)}, "
        f"{amount(limit.needed - limit.available)} too much, with {ways}. "
        f"The longest sequence is {tokens(best.longest_seq_len)}."
    )


def _volume(best: Choice) -> str:
    if best.sp_size == 1:
        return "Nothing is exchanged."
    line = f"Exchanges: each GPU sends {amount(best.exchange_bytes)}"
    if best.gather > 1:
        return f"{line}, keys and values to gather among them"
    if best.gathered_bytes < best.exchange_bytes:
        return (
            f"{line}. Gathered keys and values, or a ring, would send less: {amount(best.gathered_bytes)}. "
            "There is no ring here, and under a causal mask gathering swaps queries as well."
        )
    return f"{line}; gathered keys and values, or a ring, would send {amount(best.gathered_bytes)}"


def _rows(causes: dict[str, int], available: int) -> list[str]:
    rows = [f"  {amount(number):>10}  {cause}" for cause, number in sorted(causes.items(), key=lambda each: -each[1])]
    return [*rows, f"  {amount(sum(causes.values())):>10}  of {amount(available)}"]


def _stage(choice: Choice) -> str:
    sharding = choice.sharding
    rest = ["optimizer"] * sharding.offload_optimizer + ["parameters"] * sharding.offload_parameters
    return f"stage {sharding.stage}" + (f" with {' and '.join(rest)} on the host" if rest else "")


def _parts(choice: Choice) -> str:
    return ", ".join(f"{key}={value}" for key, value in choice.parts.items()) or "no parts"


def _line(choice: Choice) -> str:
    marks = "o" * choice.sharding.offload_optimizer + "p" * choice.sharding.offload_parameters
    parts = "+".join(
        key if value is True else f"{value}" if key == "checkpoint" else key for key, value in choice.parts.items()
    )
    parts = "+".join([f"gather {choice.gather}"] * (choice.gather > 1) + [parts] * bool(parts))
    return (
        f"{choice.sp_size:>3} x {choice.dp_size:<4} {choice.sharding.stage}{marks:<3}  {parts or 'none':<66} "
        f"{'yes' if choice.limit is None else 'no':<4} {tokens(choice.longest_seq_len):>9}  "
        f"{choice.tokens_per_second:.3g}"
    )
