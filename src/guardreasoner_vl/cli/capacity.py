"""The command that computes how many GPUs a guard needs."""
# No `from __future__ import annotations`: typer reads the annotations.

from typing import Annotated

import typer

from guardreasoner_vl.errors import InputError


def plan_capacity(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="3b, 7b, a Qwen2.5-VL folder or a hub id.")],
    per_day: Annotated[float, typer.Option(min=1, metavar="N", help="Exchanges to judge a day.")],
    prompt_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens of a prompt, the instruction included, images excluded.")
    ] = 350,
    completion_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens of an answer; about 2 in fast mode.")
    ] = 220,
    image_tokens: Annotated[
        int, typer.Option(min=0, metavar="N", help="Tokens of the images: one for 28 x 28 pixels.")
    ] = 0,
    cached_tokens: Annotated[
        int, typer.Option(min=0, metavar="N", help="Prompt tokens in the prefix cache; the instruction has about 118.")
    ] = 118,
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="A GPU, or its bf16 TFLOP/s, GB/s and GB such as 121,300,24; repeatable; default: all."
        ),
    ] = None,
    utilisation: Annotated[
        float, typer.Option(min=0.01, max=1, metavar="0..1", help="The share of the published peaks that is reached.")
    ] = 0.4,
    concurrency: Annotated[
        int, typer.Option(min=1, metavar="N", help="At most N exchanges at once on a GPU; vLLM's max_num_seqs.")
    ] = 256,
    peak: Annotated[
        float, typer.Option(min=1, metavar="X", help="The busiest second's rate, as a multiple of the average.")
    ] = 2.0,
    price: Annotated[
        float | None, typer.Option(min=0, metavar="USD", help="Price of a GPU hour, with exactly one --gpu.")
    ] = None,
) -> None:
    """Compute, without measuring anything, how many GPUs a guard needs: a roofline of published peaks."""
    from guardreasoner_vl.engines.model_files import check_folder, resolve_folder
    from guardreasoner_vl.evaluation.report import markdown_table
    from guardreasoner_vl.pipeline.capacity import (
        DEVICES,
        SHAPES,
        Work,
        capacity,
        device_of,
        gpus_for,
        shape_of,
    )

    if price is not None and len(gpu or ()) != 1:
        raise InputError("--price is that of one kind of GPU: give exactly one --gpu with it")
    work = Work(prompt_tokens, completion_tokens, image_tokens, cached_tokens)
    shape = SHAPES.get(model) or shape_of(check_folder(resolve_folder(model)))
    head = ["GPU", "at once", "exchanges/s", "GPUs", "bound by", "saturates first", "alone, s"]
    table = [[*head, *(["USD a day", "USD a million"] if price is not None else [])]]
    for name in gpu or DEVICES:
        estimate = capacity(shape, device_of(name), work, utilisation, concurrency)
        if estimate is None:
            table.append([name, "does not fit", *[""] * (len(table[0]) - 2)])
            continue
        gpus = gpus_for(estimate.per_second, per_day, peak)
        row = [
            name,
            str(estimate.batch),
            f"{estimate.per_second:,.3g}" if estimate.per_second < 100 else f"{estimate.per_second:,.0f}",
            f"{gpus:,}",
            estimate.bound,
            estimate.saturates,
            f"{estimate.alone:.2f}",
        ]
        if price is not None:
            cost = gpus * 24 * price
            row += [f"{cost:,.2f}", f"{cost / per_day * 1e6:,.2f}"]
        table.append(row)
    weights, rate = shape.weights / 1e9, per_day / 86_400
    typer.echo(
        f"computed, not measured: {weights:.2f} B weights in bf16, {per_day:,.0f} exchanges a day = {rate:,.1f}/s on "
        f"average, {rate * peak:,.1f}/s at the peak, {utilisation:.0%} of the published peaks"
    )
    typer.echo(markdown_table(table))


COMMANDS = (plan_capacity,)
