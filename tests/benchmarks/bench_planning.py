"""The planner's predictions beside published throughputs, and the fit of its calibration that they judge.

    python -m tests.benchmarks.bench_planning [--plot FILE.svg] [--parts] [--constants]

For each kind of GPU two shares of its peak are fitted (products, attention), by the mean absolute error of the
logarithm. A row is predicted by a fit that has not seen any row of its publication: what a group has of its own, its
software, its network, its way to measure, cannot leak into its prediction. The rows of LLaMA are in no fit at all, nor
are those of GPUs at 500 W, which are reckoned as an H100 whose clock goes with the cube root of the power.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from typing import Any

import yaml

from llamatrain.arithmetic import flops_per_token
from llamatrain.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from llamatrain.config.build import build
from llamatrain.config.cluster import ClusterConfig, HardwareConfig
from llamatrain.planning import roofline
from llamatrain.planning.hardware import CALIBRATION, Calibration, Cluster, cluster_of
from llamatrain.planning.roofline import Habits, StepTime, step_time

PUBLISHED = Path(__file__).with_name("published.yaml")
SXM = {"A100": "NVIDIA A100-SXM4-80GB", "H100": "NVIDIA H100 80GB HBM3", "H200": "NVIDIA H200"}
UNSEEN = ("llama", "titan_h100")  # in no fit
CONSTANTS = ("STREAMED", "LINKED", "NETWORKED", "SHARED", "SPREAD", "HOP_S", "TILE_M", "FILLING_K")  # of the roofline
HABITS = {"flat_copies": "flat", "optimizer_shared": "zero-1", "tensor_hidden": "tp hidden"}  # as layouts tell them
PRODUCTS = [0.50 + 0.01 * step for step in range(36)]
ATTENTION = [0.10 + 0.02 * step for step in range(21)]


@dataclass(frozen=True)
class Row:
    """A published throughput, and what it was measured with."""

    publication: str
    model: str
    config: RunConfig
    world_size: int
    watts: float
    cluster: Cluster
    habits: Habits
    rate: float  # tokens a second on each GPU

    @property
    def kind(self) -> str:
        """Of the GPU's calibration."""
        assert self.cluster.gpu.fitted_on is not None
        return self.cluster.gpu.fitted_on

    def time(self, reached: Calibration) -> StepTime:
        clock = (self.watts / self.cluster.gpu.watts) ** (1 / 3)
        slower = Calibration(reached.products * clock, reached.attention * clock)
        cluster = replace(self.cluster, gpu=replace(self.cluster.gpu, reached=slower))
        recompute = self.config.parallel.recompute
        return step_time(self.config, recompute, cluster, world_size=self.world_size, habits=self.habits)

    def predicted(self, reached: Calibration) -> float:
        """Tokens a second on each GPU."""
        return self.config.train.global_batch_tokens / self.time(reached).total / self.world_size

    def error(self, reached: Calibration) -> float:
        return self.predicted(reached) / self.rate - 1

    def mfu(self, rate: float) -> float:
        return rate * flops_per_token(self.config.model, self.config.data.seq_len) / self.cluster.gpu.peak


def published(which: str = "rows") -> list[Row]:
    """All of published.yaml; those that came `later` are others."""
    file = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))
    return [
        _row(name, {**publication["common"], **row}, file["shapes"])
        for name, publication in file["publications"].items()
        for row in publication.get(which, [])
    ]


def sources() -> dict[str, str]:
    """Of each publication."""
    file = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))
    return {name: publication["source"] for name, publication in file["publications"].items()}


def _row(publication: str, given: dict[str, Any], shapes: dict[str, Any]) -> Row:
    model = build(ModelConfig, {**shapes[given["shape"]], "max_seq_len": given["seq"], "attention": "sdpa"})
    tp, pp = given.get("tp", 1), given.get("pp", 1)
    ranks = given["gpus"] // (tp * pp)
    shard = given.get("dp", ranks)
    config = RunConfig(
        model=model,
        data=DataConfig(seq_len=given["seq"]),
        train=TrainConfig(
            micro_batch=given["micro_batch"],
            global_batch_tokens=given["seq"] * given["micro_batch"] * ranks * given.get("accumulate", 1),
            precision="bf16",
            compile=given["compile"],
        ),
        parallel=ParallelConfig(
            tp=tp,
            pp=pp,
            dp_shard=shard,
            dp_replicate=ranks // shard,
            recompute=given["recompute"],
            sharding=given.get("sharding", "fsdp2"),
            reduce_dtype=given.get("reduce_dtype", "fp32"),
            reshard_after_forward=given.get("reshard", "always"),
        ),
    )
    cluster = cluster_of(
        ClusterConfig(
            name=publication,
            accelerator=given.get("board", SXM[given["gpu"]]),
            gpus_per_node=given.get("gpus_per_node", 8),
            hardware=HardwareConfig(network_gb_s=given["network_gb_s"]),
        )
    )
    return Row(
        publication=publication,
        model=given["shape"],
        config=config,
        world_size=given["gpus"],
        watts=given.get("watts", cluster.gpu.watts),
        cluster=cluster,
        habits=build(Habits, given["habits"]),
        rate=given.get("rate") or given["tflops"] * 1e12 / megatron_flops(model, given["seq"]),
    )


def megatron_flops(model: ModelConfig, seq_len: int) -> float:
    """Of a token, as Megatron-LM counts them."""
    d, layers = model.dim, model.n_layers
    return 72 * layers * d**2 * (1 + seq_len / (6 * d) + model.vocab_size / (12 * d * layers))


def fit(rows: Sequence[Row]) -> Calibration:
    """The shares with the least mean absolute error of the logarithm: along one, then along the other."""

    def loss(reached: Calibration) -> float:
        return statistics.mean(abs(log(1 + row.error(reached))) for row in rows)

    best = Calibration(products=0.70, attention=0.30)
    while True:
        before = best
        best = min((replace(best, products=round(share, 2)) for share in PRODUCTS), key=loss)
        best = min((replace(best, attention=round(share, 2)) for share in ATTENTION), key=loss)
        if best == before:
            return best


def fitted(rows: Sequence[Row], kind: str, *, without: str = "") -> Calibration:
    """To the rows of a kind of GPU, those of one publication left out."""
    return fit([row for row in rows if row.kind == kind and row.publication not in (*UNSEEN, without)])


def held_out(rows: Sequence[Row], known: Sequence[Row]) -> Iterator[tuple[str, Calibration, list[Row]]]:
    """The rows of each publication with the calibration to the `known` ones of others."""
    for publication in dict.fromkeys(row.publication for row in rows):
        own = [row for row in rows if row.publication == publication]
        yield publication, fitted(known, own[0].kind, without=publication), own


def layout_of(row: Row) -> str:
    """In a few characters."""
    parallel, train = row.config.parallel, row.config.train
    axes = {"copies": parallel.dp_replicate, "tp": parallel.tp, "pp": parallel.pp}
    told = [f"{axis} {size}" for axis, size in axes.items() if size > 1]
    again = row.habits.repeated if row.habits.repeated is not None else parallel.recompute
    told += [f"mb {train.micro_batch}", f"again {again}", *([] if train.compile else ["eager"])]
    told += [parallel.sharding] if parallel.sharding != "fsdp2" else []
    told += ["bf16 sums"] if parallel.reduce_dtype == "bf16" else []
    return ", ".join(told + [name for habit, name in HABITS.items() if getattr(row.habits, habit)])


def mfus(rows: Sequence[tuple[Row, float]]) -> tuple[list[float], list[float]]:
    """Published and predicted."""
    return [row.mfu(row.rate) for row, _ in rows], [row.mfu(rate) for row, rate in rows]


def draw(rows: Sequence[tuple[Row, float]], later: Sequence[tuple[Row, float]], path: str) -> None:
    """Predicted over published MFU."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 5.2), layout="constrained")
    axes = figure.subplots()
    line = [0.2, 0.75]
    axes.plot(line, line, color="black", linewidth=0.8)
    axes.fill_between(line, [0.9 * x for x in line], [1.1 * x for x in line], color="0.9", label="within 10 %")
    for number, publication in enumerate(dict.fromkeys(row.publication for row, _ in rows)):
        own = [pair for pair in rows if pair[0].publication == publication]
        axes.scatter(*mfus(own), s=26, marker="o^sDvP*Xdph"[number], alpha=0.8, label=publication)
    axes.scatter(*mfus(later), s=6, color="0.45", zorder=0.5, label=f"{len(later)} that came later")
    axes.set(xlabel="published MFU", ylabel="predicted MFU, its publication held out", xlim=line, ylim=line)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path)


def foretell(
    rows: Sequence[Row], known: Sequence[Row], by: Callable[[Row], str] = lambda row: row.publication
) -> list[tuple[Row, float]]:
    """Each with its prediction by what others published; tells how good those are, sort by sort."""
    print("\n| rows | GPU | number | fit without them: products, attention | median error | median of its size |")
    print("|---|---|---|---|---|---|")
    predicted: list[tuple[Row, float]] = []
    for _, reached, published_together in held_out(rows, known):
        for sort in dict.fromkeys(map(by, published_together)):
            own = [row for row in published_together if by(row) == sort]
            errors = [row.error(reached) for row in own]
            predicted += [(row, row.predicted(reached)) for row in own]
            size = statistics.median(map(abs, errors))
            told = f"{own[0].kind} | {len(own)} | {reached.products:.2f}, {reached.attention:.2f}"
            print(f"| {sort} | {told} | {statistics.median(errors):+.1%} | {size:.1%} |")
    errors = [rate / row.rate - 1 for row, rate in predicted]
    sizes = [abs(error) for error in errors]
    within = sum(size <= 0.1 for size in sizes)
    told = f"median error {statistics.median(sizes):.1%} ({statistics.median(errors):+.1%} with its sign)"
    print(f"\n{len(sizes)} rows held out: {told}, {within} within 10 %")
    return predicted


def by_length(row: Row) -> str:
    """The publication, and what decides how well it is foretold."""
    length = row.config.data.seq_len
    span = "up to 2,048" if length < 4096 else "4,096 and 8,192" if length < 16_384 else "16,384 and more"
    return f"{row.publication}, {span} tokens{', tp' if row.config.parallel.tp > 1 else ''}"


def tell_each(predicted: Sequence[tuple[Row, float]], *, parts: bool) -> None:
    """A line for each row."""
    print("\n| publication | model | sequence | GPUs | layout | published | predicted | error |")
    print("|---|---|---|---|---|---|---|---|")
    for row, rate in predicted:
        place = f"{row.publication} | {row.model} | {row.config.data.seq_len} | {row.world_size} | {layout_of(row)}"
        print(f"| {place} | {row.rate:,.0f} | {rate:,.0f} | {rate / row.rate - 1:+.1%} |")
        if parts:
            print(row.time(CALIBRATION[row.kind]))


def tell_constants(rows: Sequence[Row]) -> None:
    """How much hangs on what is not fitted: the median with each constant of the roofline moved, and new fits."""
    for name in CONSTANTS:
        own = getattr(roofline, name)
        for factor in (2 / 3, 4 / 3):
            setattr(roofline, name, own * factor)
            errors = [abs(row.error(reached)) for _, reached, some in held_out(rows, rows) for row in some]
            print(f"{name} {own:g} x {factor:.2f}: median error {statistics.median(errors):.1%}", flush=True)
        setattr(roofline, name, own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", help="file for predicted over published")
    parser.add_argument("--parts", action="store_true", help="what each step's time goes to")
    parser.add_argument(
        "--constants", action="store_true", help="instead, what moving each constant does to the median"
    )
    arguments = parser.parse_args()
    rows = published()
    if arguments.constants:
        tell_constants(rows)
        return
    for kind in CALIBRATION:
        print(f"{kind}, all rows but those of {' and '.join(UNSEEN)}: {fitted(rows, kind)}")
    predicted = foretell(rows, rows)
    tell_each(predicted, parts=arguments.parts)
    print("\nRows that came later:")
    later = foretell(published("later"), rows, by_length)
    tell_each(later, parts=arguments.parts)
    if arguments.plot:
        draw(predicted, later, arguments.plot)


if __name__ == "__main__":
    main()
