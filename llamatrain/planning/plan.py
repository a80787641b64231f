"""A plan: all that is foretold of a run, and of the layouts it might have instead. No torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from llamatrain.arithmetic import SAVED_BYTES, carbon, flops_per_token, parameter_count
from llamatrain.config import ModelConfig, ParallelConfig, validate
from llamatrain.config.parallel import RECOMPUTE, check_parallel
from llamatrain.config.plan import PlanConfig
from llamatrain.errors import ConfigError
from llamatrain.memory import memory_by_part
from llamatrain.planning.hardware import Cluster, cluster_of
from llamatrain.planning.layouts import Choice, as_asked, fitting, held, settled, usable
from llamatrain.planning.lifetime import FITS, Fit, Lifetime, Prices, Size, lifetime
from llamatrain.planning.reliability import Reliability, reliability

LEAST_SAVE_S = 1.0  # that ranks take to agree on a save
MOST_DOUBLINGS = 8  # of the nodes, in search of what fits


@dataclass(frozen=True)
class Effort:
    """What a choice takes, with what failures and saves add."""

    tokens: int
    days: float
    gpu_hours: float
    cost: float | None
    mwh: float
    tonnes: float  # CO2eq
    reliability: Reliability
    save_every_steps: int


@dataclass(frozen=True)
class Plan:
    config: PlanConfig  # settled
    cluster: Cluster
    asked: Choice
    effort: Effort
    fits: bool
    room: float  # bytes of a GPU that a run may take
    by_recompute: dict[str, dict[str, float]]  # memory of the layout as asked for
    best: list[Choice]
    nearest: Choice | None  # to a layout that does not fit, at so many nodes or more
    life: "Life | None"


@dataclass(frozen=True)
class Life:
    """The answer to serve.tokens."""

    fit: Fit
    served: float
    found: Lifetime
    asked: Size | None  # the run as it is planned; None: another loss was asked for than its own
    unit: str  # of the costs
    presets: list[tuple[str, float, float]]  # name, parameters, tokens with which it reaches the loss


def plan(config: PlanConfig, presets: Mapping[str, ModelConfig]) -> Plan:
    """Of `presets`, models by name, the one nearest to the cheapest over its life is told.

    Raises ConfigError for what cannot be planned at all; what does not fit is a plan that says so.
    """
    config = _settled(config)
    cluster, world = cluster_of(config.cluster), config.processes
    try:
        validate(config, world_size=world)
    except ConfigError as error:
        raise ConfigError(f"{error}{_way_out(config, cluster, world)}") from None
    asked = as_asked(config, cluster, world_size=world)
    room = usable(config, cluster)
    fits = asked.bytes <= room
    best = fitting(config, cluster, world_size=world)
    spent = effort(config, cluster, asked)
    return Plan(
        config=config,
        cluster=cluster,
        asked=asked,
        effort=spent,
        fits=fits,
        room=room,
        by_recompute={way: memory_by_part(config, way, world_size=world) for way in RECOMPUTE},
        best=best,
        nearest=None if fits else _nearest(config, cluster, asked, best),
        life=_life(config, cluster, spent, presets) if config.serve.tokens is not None else None,
    )


def _settled(config: PlanConfig) -> PlanConfig:
    done = settled(config)
    assert isinstance(done, PlanConfig)
    return done


def _way_out(config: PlanConfig, cluster: Cluster, world: int) -> str:
    """The fastest layout for a run that is refused for that which it has; nothing if that is not the reason."""
    try:
        check_parallel(config.parallel)
        validate(replace(config, parallel=ParallelConfig()), world_size=1)
        best = fitting(config, cluster, world_size=world)
        for choice in best[:1]:
            validate(choice.config, world_size=world)
            return f"; or keep all that and have another layout: {' '.join(choice.overrides())}"
    except ConfigError:
        return ""
    kept = " ".join(held(config))
    return f"; no other layout for {world:,} GPUs keeps that batch and fits{f', with {kept} as set' if kept else ''}"


def effort(config: PlanConfig, cluster: Cluster, chosen: Choice) -> Effort:
    """Of the whole run."""
    steps = config.total_steps
    training_s = steps * chosen.time.total
    hours = config.checkpoint.hours_between_failures
    written_s = SAVED_BYTES * parameter_count(config.model) / (config.storage_gb_s * 1e9)
    staged_s = max(bytes_saved(chosen) / (config.save_gb_s * 1e9), LEAST_SAVE_S)
    found = reliability(
        training_s,
        failure_s=cluster.failure_s / chosen.world_size if hours is None else 3600 * hours,
        save_s=staged_s if config.checkpoint.asynchronous else staged_s + written_s,
        written_s=written_s,
        restart_s=60 * config.restart_minutes,
    )
    if not found.goodput:
        raise ConfigError(
            f"a failure every {found.failure_s / 60:.1f} min and restart_minutes={config.restart_minutes:g} after "
            "each: such a run never gets on; fewer nodes, or faster restarts"
        )
    wall_s = training_s / found.goodput
    gpu_hours = wall_s * chosen.world_size / 3600
    mwh, tonnes = carbon(gpu_hours, watts=cluster.gpu.watts, pue=config.pue, kg_per_kwh=config.kg_per_kwh)
    return Effort(
        tokens=steps * config.train.global_batch_tokens,
        days=wall_s / 86_400,
        gpu_hours=gpu_hours,
        cost=None if cluster.price is None else cluster.price * gpu_hours,
        mwh=mwh,
        tonnes=tonnes,
        reliability=found,
        save_every_steps=max(1, round(found.interval_s / chosen.time.total)),
    )


def bytes_saved(chosen: Choice) -> float:
    """Of the fullest GPU: weights and moments."""
    return chosen.memory["weights"] + chosen.memory["optimizer state"]


def mfu(config: PlanConfig, cluster: Cluster, chosen: Choice) -> float:
    """By the PaLM convention, as metrics have it."""
    return chosen.rate * flops_per_token(config.model, config.data.seq_len) / cluster.gpu.peak


def _nearest(config: PlanConfig, cluster: Cluster, asked: Choice, best: list[Choice]) -> Choice | None:
    """What fits with the fewest changes; on twice the nodes, four times, …, if nothing does on so many."""
    typed, world = set(asked.overrides()), asked.world_size
    for doublings in range(MOST_DOUBLINGS + 1):
        found = best if doublings == 0 else fitting(config, cluster, world_size=world * 2**doublings)
        if found:
            return min(found, key=lambda choice: (len(set(choice.overrides()) - typed), 1 / choice.rate))
    return None


# the model's life


def _life(config: PlanConfig, cluster: Cluster, spent: Effort, presets: Mapping[str, ModelConfig]) -> Life:
    fit, serve, parameters = FITS[config.serve.fit], config.serve, parameter_count(config.model)
    assert serve.tokens is not None
    loss = fit.loss(parameters, spent.tokens) if serve.loss is None else serve.loss
    prices = _prices(config, cluster, spent)
    asked = Size(
        parameters, spent.tokens, prices.training(parameters, spent.tokens), prices.serving(parameters, serve.tokens)
    )
    try:
        found = lifetime(fit, loss, prices, served=serve.tokens)
    except ValueError as error:
        raise ConfigError(f"serve.loss={loss:g}: {error}; ask for a higher one") from None
    unit = "GPU-hours" if cluster.price is None else f"at {cluster.price:g} a GPU-hour"
    sizes = {name: float(parameter_count(model)) for name, model in presets.items()}
    reaching = [
        (name, size, fit.tokens(size, loss)) for name, size in sizes.items() if fit.tokens(size, loss) < math.inf
    ]
    return Life(fit, serve.tokens, found, asked if serve.loss is None else None, unit, reaching)


def _prices(config: PlanConfig, cluster: Cluster, spent: Effort) -> Prices:
    """Of training what the plan's own run costs, all included; in GPU-hours where those have no price."""
    parameters, flops = parameter_count(config.model), flops_per_token(config.model, config.data.seq_len)
    per_hour = 1.0 if cluster.price is None else cluster.price
    return Prices(
        train_flop=per_hour * spent.gpu_hours / (spent.tokens * flops),
        serve_flop=per_hour / (3600 * config.serve.utilisation * cluster.gpu.peak),
        attention=(flops - 6 * parameters) / parameters ** (2 / 3),
    )


# as plain values


def as_values(plan: Plan) -> dict[str, Any]:
    """For format=json: bytes, seconds and what is told, under names that stay."""
    config, cluster, asked, effort = plan.config, plan.cluster, plan.asked, plan.effort
    found = effort.reliability
    values: dict[str, Any] = {
        "parameters": parameter_count(config.model),
        "gpus": asked.world_size,
        "fits": plan.fits,
        "memory_bytes": {"usable": plan.room, "total": asked.bytes, "parts": asked.memory},
        "memory_bytes_by_recompute": {way: sum(parts.values()) for way, parts in plan.by_recompute.items()},
        "step_seconds": step_values(asked),
        "tokens_per_s_per_gpu": asked.rate,
        "mfu": mfu(config, cluster, asked),
        "calibration": {**vars(cluster.gpu.reached), "fitted_on": cluster.gpu.fitted_on},
        "tokens": effort.tokens,
        "days": effort.days,
        "gpu_hours": effort.gpu_hours,
        "cost": effort.cost,
        "energy_mwh": effort.mwh,
        "co2eq_tonnes": effort.tonnes,
        "failures": found.failures,
        "seconds_between_failures": found.failure_s,
        "save_seconds": found.save_s,
        "save_interval_seconds": found.interval_s,
        "save_every_steps": effort.save_every_steps,
        "goodput": found.goodput,
        "asked": asked.overrides(),
        "layouts": [layout_values(config, cluster, choice) for choice in plan.best[: config.layouts]],
        "nearest": None if plan.nearest is None else layout_values(config, cluster, plan.nearest),
    }
    if plan.life is not None:
        life = plan.life
        values["life"] = {
            "fit": life.fit.source,
            "loss": life.found.loss,
            "served_tokens": life.served,
            "asked": None if life.asked is None else size_values(life.asked),
            "cheapest": size_values(life.found.cheapest),
            "chinchilla": size_values(life.found.chinchilla),
            "presets": [{"model": name, "parameters": n, "tokens": d} for name, n, d in life.presets],
        }
    return values


def step_values(choice: Choice) -> dict[str, float]:
    """Seconds of a step by part, communication that nothing hides as `exposed AXIS`."""
    time = choice.time
    parts = {name: value for name, value in vars(time).items() if name != "exposed"}
    exposed = {f"exposed {axis}": seconds for axis, seconds in time.exposed.items()}
    return {"total": time.total, **parts, **exposed}


def layout_values(config: PlanConfig, cluster: Cluster, choice: Choice) -> dict[str, Any]:
    return {
        "overrides": choice.overrides(),
        "nodes": choice.world_size // cluster.gpus_per_node,
        "tokens_per_s_per_gpu": choice.rate,
        "mfu": mfu(config, cluster, choice),
        "memory_bytes": choice.bytes,
    }


def size_values(size: Size) -> dict[str, float | bool]:
    more = {"cost": size.cost, "tokens_per_parameter": size.tokens_per_parameter, "at_the_edge": size.at_the_edge}
    return {**vars(size), **more}
