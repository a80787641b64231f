"""A plan as text, and its plot. No torch."""

from math import log

from llamatrain import words
from llamatrain.arithmetic import parameter_count
from llamatrain.errors import ConfigError
from llamatrain.planning.layouts import Choice, held
from llamatrain.planning.lifetime import LARGEST, SMALLEST, Size
from llamatrain.planning.plan import MOST_DOUBLINGS, Life, Plan, mfu, step_values

GIB, DAY = 2**30, 86_400
PARTS = {  # of the memory, where another name says more here
    "weights in use": "gathered layers, their buffers",
    "last gradient on its way": "buffers of a reduction",
    "hidden states between stages": "buffers between stages",
}
CHEAPEST, CHINCHILLA = "least in all", "Chinchilla's optimum"
TOLD_AS = {  # parts of a step, in their order
    "products": "matrix products",
    "repeated": "products repeated",
    "attention": "attention",
    "elementwise": "elementwise",
    "loss": "head and loss",
    "copies": "copies around gathers",
    "optimizer": "optimizer",
    "bubble": "pipeline idle",
    "slowed": "slowed by hidden traffic",
    "waiting": "waiting for the slowest node",
}


def told(plan: Plan) -> str:
    """The plan, a screen of it."""
    parts = [_head(plan), _memory(plan), _time(plan), _effort(plan), _layouts(plan)]
    if plan.life is not None:
        parts.append(_life(plan.life))
    return "\n\n".join(parts)


def _head(plan: Plan) -> str:
    config, asked = plan.config, plan.asked
    return (
        f"{parameter_count(config.model):,} parameters on {config.nodes} x {plan.cluster.gpus_per_node} "
        f"{plan.cluster.gpu.name}: {asked.world_size} GPUs\n"
        f"{plan.effort.tokens:,} tokens, {config.train.global_batch_tokens:,} a step, "
        f"{config.data.seq_len:,} a sequence\n"
        f"as asked for: {' '.join(asked.overrides())}"
    )


def _memory(plan: Plan) -> str:
    asked = plan.asked
    rows = [(PARTS.get(part, part), size / GIB) for part, size in asked.memory.items() if size]
    verdict = "fits" if plan.fits else "does not fit"
    lines = [f"memory of the fullest GPU, GiB, with recompute={asked.recompute}"]
    lines += [f"  {part:<32}{size:>9.3f}" for part, size in rows]
    usable = f"{plan.room / GIB:.1f} usable of {plan.cluster.gpu.memory / GIB:.1f}"
    lines.append(f"  {'in all':<32}{asked.bytes / GIB:>9.3f}   {usable}: {verdict}")
    ways = [
        f"{way} {parts['activations'] / GIB:.2f} of {sum(parts.values()) / GIB:.2f}"
        for way, parts in plan.by_recompute.items()
    ]
    lines.append(f"  activations, of all: {', '.join(ways)}")
    if plan.config.parallel.recompute_budget_gib is None:
        left = (plan.cluster.gpu.memory - plan.room) / GIB
        lines.append(f"  not usable are {left:.1f}, for CUDA's context, NCCL's buffers and gaps between allocations")
    return "\n".join(lines)


def _time(plan: Plan) -> str:
    values = step_values(plan.asked)
    total = values.pop("total")
    lines = ["time of a step" if plan.fits else "time of a step, if there were room for it"]
    for name, seconds in values.items():
        if seconds / total >= 5e-5:
            label = TOLD_AS.get(name, name.replace("exposed", "communication not hidden,"))
            lines.append(f"  {label:<32}{seconds:>9.4f} s {seconds / total:>6.1%}")
    lines.append(f"  {'in all':<32}{total:>9.4f} s")
    share = mfu(plan.config, plan.cluster, plan.asked)
    lines.append(f"  {plan.asked.rate:,.0f} tokens/s a GPU, MFU {share:.1%}")
    lines.append(f"  {_calibration(plan)}")
    return "\n".join(lines)


def _calibration(plan: Plan) -> str:
    """What the time rests on."""
    gpu = plan.cluster.gpu
    shares = f"{gpu.reached.products:.0%} of the peak in matrix products, {gpu.reached.attention:.0%} in attention"
    if gpu.fitted_on is None:
        return f"reckoned with {shares}, as set"
    own = gpu.name.startswith(gpu.fitted_on)
    return f"reckoned with {shares}: fitted to published runs on {gpu.fitted_on}{'' if own else f', not on {gpu.name}'}"


def _effort(plan: Plan) -> str:
    effort, config = plan.effort, plan.config
    found = effort.reliability
    once = effort.save_every_steps >= config.total_steps
    often = "once, at the end," if once else f"every {words.duration(found.interval_s)}"
    cost = f", cost {words.figure(effort.cost)} at {plan.cluster.price:g} a GPU-hour" if effort.cost is not None else ""
    return "\n".join(
        [
            "the run, saves and failures included",
            f"  {words.duration(effort.days * DAY)}, {words.figure(effort.gpu_hours)} GPU-hours{cost}",
            f"  {words.energy(effort.mwh)}, {words.emissions(effort.tonnes)} of CO2 equivalent "
            f"({plan.cluster.gpu.watts:g} W a GPU, PUE {config.pue:g}, {config.kg_per_kwh:g} kg/kWh)",
            f"  {words.figure(found.failures)} failures expected, one every {found.failure_s / 3600:,.1f} h; "
            f"a save holds up {found.save_s:.1f} s",
            f"  saving {often} loses least: "
            f"checkpoint.every_steps={effort.save_every_steps}; goodput {found.goodput:.1%}",
        ]
    )


def _layouts(plan: Plan) -> str:
    if not plan.best:
        return "layouts: none fits on so many nodes"
    lines = ["layouts, the fastest first"]
    lines += [_layout(plan, choice) for choice in plan.best[: plan.config.layouts]]
    return "\n".join(lines)


def _layout(plan: Plan, choice: Choice) -> str:
    share = mfu(plan.config, plan.cluster, choice)
    return (
        f"  {choice.rate:>9,.0f} tokens/s {share:>6.1%} {choice.bytes / GIB:>6.1f} GiB  {' '.join(choice.overrides())}"
    )


def refusal(plan: Plan) -> str:
    """Why the run as asked for cannot be, and the nearest that can."""
    needs = f"{plan.asked.bytes / GIB:.1f} GiB on a GPU are needed, {plan.room / GIB:.1f} are usable"
    per_node = plan.cluster.gpus_per_node
    if plan.nearest is None:
        most = plan.asked.world_size * 2**MOST_DOUBLINGS // per_node
        pinned = held(plan.config)
        kept, ways = (f"with {' '.join(pinned)} as set, ", "leave those open, or have ") if pinned else ("", "")
        return f"{needs}; {kept}no layout fits on up to {most} nodes: {ways}a shorter data.seq_len or a smaller model"
    nodes = plan.nearest.world_size // per_node
    more = "" if nodes == plan.config.nodes else f"nodes={nodes} "
    return f"{needs}; the nearest that fits: {more}{' '.join(plan.nearest.overrides())}"


def _life(life: Life) -> str:
    found = life.found
    lines = [
        f"over its life, {life.served:.3g} tokens served: the models that reach a loss of {found.loss:.4f}",
        f"  {'':<22}{'parameters':>11} {'tokens':>9} {'a parameter':>11} {'training':>10} {'serving':>10} "
        f"{'in all':>10}  ({life.unit})",
        *([] if life.asked is None else [_size("as asked for", life.asked)]),
        *(_size(label, size) for label, size in ((CHEAPEST, found.cheapest), (CHINCHILLA, found.chinchilla))),
    ]
    edges = [name for name, size in ((CHEAPEST, found.cheapest), (CHINCHILLA, found.chinchilla)) if size.at_the_edge]
    if edges:
        span = f"{SMALLEST:.0e} to {LARGEST:.0e} parameters"
        lines.append(f"  at the edge of what is looked at, {span}; the least may lie beyond: {', '.join(edges)}")
    near = min(life.presets, key=lambda preset: abs(log(preset[1] / found.cheapest.parameters)), default=None)
    if near is not None:
        lines.append(f"  nearest at hand: model={near[0]} train.tokens={near[2]:.3g}")
    lines.append(f"  by {life.fit.source}: a fit to one data set and tokenizer, far from its runs an extrapolation")
    return "\n".join(lines)


def _size(label: str, size: Size) -> str:
    return (
        f"  {label:<22}{size.parameters:>11.3g} {size.tokens:>9.3g} {words.figure(size.tokens_per_parameter):>11} "
        f"{size.training:>10.3g} {size.serving:>10.3g} {size.cost:>10.3g}"
    )


def draw(life: Life, path: str) -> None:
    """Cost over size, of training, of serving and of both. Raises ConfigError where it cannot be drawn or written."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("serve.plot needs matplotlib: pip install 'llamatrain[plots]'") from None
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    found = life.found
    sizes = [size.parameters for size in found.curve]
    axes.plot(sizes, [size.cost for size in found.curve], color="black", label="both")
    axes.plot(sizes, [size.training for size in found.curve], color="tab:blue", label="training")
    axes.plot(sizes, [size.serving for size in found.curve], color="tab:orange", label="serving")
    for label, size, marker in ((CHEAPEST, found.cheapest, "o"), (CHINCHILLA, found.chinchilla, "s")):
        told = f"{label}: {size.parameters / 1e9:.3g}B on {size.tokens / 1e12:.3g}T tokens"
        axes.plot([size.parameters], [size.cost], marker=marker, linestyle="none", color="black", label=told)
    axes.set(xscale="log", xlabel="parameters", ylabel=f"cost, {life.unit}", ylim=(0, 2.5 * found.chinchilla.cost))
    ticks = [digit * 10.0**power for power in range(6, 14) for digit in (1, 2, 5)]
    axes.set_xticks(ticks, [f"{tick / 1e9:g}B" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(min(sizes), max(sizes))
    axes.set_title(f"Loss {found.loss:.3f}, {life.served:.3g} tokens served ({life.fit.source})", fontsize=9)
    axes.legend(fontsize=9, loc="upper center")  # where the curves are low
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"serve.plot={path}: cannot be written ({error})") from None
