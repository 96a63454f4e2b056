"""Whether another way to train is better than the preset `fast`: `python -m tests.benchmarks.recipes`.

Each recipe changes one thing. It trains on half of some rows and is measured on the other half, with the same halves,
order and initial weights as the preset, so the difference of the two macro-F1 has a standard error over the seeds.

`--rows pool`: the 450 labelled real tweets of `tests.benchmarks.labels`, after the sample; the 448 test tweets are not
used. `--rows jrte`: JRTE's training rows. Both lie beside the project and are no part of it.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.benchmarks.labels import LABELLED, LABELS, Bench, Tweets, numbers, say
from tests.benchmarks.training import JRTE
from training.config import TrainConfig, make_config
from training.data.dataset import Rows, read_rows, split_rows
from training.evaluation.metrics import metrics
from training.loop.fit import build_optimizer, build_scheduler
from training.loop.predict import loss_function, predict
from training.loop.sample_base import start_share
from training.model.base_model import STARTER, BaseModelFolder, resolve_base_model
from training.model.batching import pad, shuffled_batches
from training.model.classifier import Classifier, build_model, half_precision
from training.model.kernels import training_kernels
from training.text.tokenizer import TextEncoder, load_tokenizer

CPU = torch.device("cpu")
# The learning rate of a layer, relative to that of the layer above it.
LAYER_DECAY = 0.8
R_DROP_WEIGHT = 1.0
DROPOUT_SAMPLES = 4
FOCAL_GAMMA = 2.0
MIXUP_ALPHA = 0.4


@dataclass(frozen=True)
class Batch:
    ids: Tensor  # (B, T)
    mask: Tensor  # (B, T)
    targets: Tensor  # (B, K)
    loss_of: nn.Module

    def loss(self, logits: Tensor) -> Tensor:
        value: Tensor = self.loss_of(logits.float(), self.targets)
        return value


def plain(model: Classifier, batch: Batch) -> Tensor:
    return batch.loss(model(batch.ids, batch.mask))


def r_drop(model: Classifier, batch: Batch) -> Tensor:
    """Two passes with different dropout should agree: Liang et al. (2021), "R-Drop"."""
    first, second = model(batch.ids, batch.mask).float(), model(batch.ids, batch.mask).float()
    p, q = first.log_softmax(1), second.log_softmax(1)
    apart = functional.kl_div(p, q, reduction="batchmean", log_target=True)
    apart = apart + functional.kl_div(q, p, reduction="batchmean", log_target=True)
    return (batch.loss(first) + batch.loss(second)) / 2 + R_DROP_WEIGHT * apart / 2


def multi_sample_dropout(model: Classifier, batch: Batch) -> Tensor:
    """The mean loss of several dropout masks before the head: Inoue (2019), "Multi-Sample Dropout"."""
    pooled = _pooled(model, batch)
    losses = [batch.loss(_head(model, pooled)) for _ in range(DROPOUT_SAMPLES)]
    return torch.stack(losses).mean()


def focal(model: Classifier, batch: Batch) -> Tensor:
    """Rows that are right already count less: Lin et al. (2017), "Focal Loss"."""
    logs = (model(batch.ids, batch.mask).float().log_softmax(1) * batch.targets).sum(1)
    value: Tensor = -((1 - logs.exp()) ** FOCAL_GAMMA * logs).mean()
    return value


def mixup(model: Classifier, batch: Batch) -> Tensor:
    """Each row is mixed with the nearest other row of its batch, before the head: after Guo et al. (2019), "Augmenting
    Data with Mixup for Sentence Classification"."""
    pooled = _pooled(model, batch)
    near = functional.normalize(pooled.detach().float(), dim=1)
    other = (near @ near.T).fill_diagonal_(-2).argmax(1)
    share = torch.distributions.Beta(MIXUP_ALPHA, MIXUP_ALPHA).sample((len(pooled), 1))
    share = torch.maximum(share, 1 - share)
    logits = _head(model, share * pooled + (1 - share) * pooled[other])
    value: Tensor = batch.loss_of(logits.float(), share * batch.targets + (1 - share) * batch.targets[other])
    return value


def _pooled(model: Classifier, batch: Batch) -> Tensor:
    """The pooled output (B, H) of a BERT with its own head."""
    pooled: Tensor = model.network.base_model(input_ids=batch.ids, attention_mask=batch.mask).pooler_output  # type: ignore[operator]
    return pooled


def _head(model: Classifier, pooled: Tensor) -> Tensor:
    network: Any = model.network
    logits: Tensor = network.classifier(network.dropout(pooled))
    return logits


def layer_wise_rates(model: Classifier, config: TrainConfig) -> torch.optim.Optimizer:
    """A smaller learning rate for each lower layer: Howard and Ruder (2018), "Universal Language Model Fine-tuning"."""
    layers: int = model.encoder_config.num_hidden_layers
    groups: dict[int, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        depth = int(parts[parts.index("layer") + 1]) + 1 if "layer" in parts else 0 if "embeddings" in parts else layers
        groups.setdefault(layers - depth, []).append(parameter)
    rates = [{"params": group, "lr": config.learning_rate * LAYER_DECAY**below} for below, group in groups.items()]
    return torch.optim.AdamW(rates, weight_decay=config.weight_decay, fused=True)


@dataclass(frozen=True)
class Recipe:
    """One change of the preset: settings, the loss of a batch, or the optimizer."""

    settings: dict[str, Any] = field(default_factory=dict)
    loss: Callable[[Classifier, Batch], Tensor] = plain
    optimizer: Callable[[Classifier, TrainConfig], torch.optim.Optimizer] = build_optimizer


RECIPES = {
    "fast": Recipe(),
    "layer-wise rates": Recipe(optimizer=layer_wise_rates),
    "R-Drop": Recipe(loss=r_drop),
    "multi-sample dropout": Recipe(loss=multi_sample_dropout),
    "focal loss": Recipe(loss=focal),
    "mixup of near rows": Recipe(loss=mixup),
    "balanced class weights": Recipe({"class_weights": "balanced"}),
    "no dropout in the encoder": Recipe({"encoder_dropout": 0.0}),  # as after the sample, whose model keeps it so
    "dropout in the encoder": Recipe({"encoder_dropout": 0.1}),
    "half the learning rate": Recipe({"learning_rate": 5e-5}),
    "twice the learning rate": Recipe({"learning_rate": 2e-4}),
    "twice the epochs": Recipe({"epochs": 12, "row_passes": 30_000}),
    "without averaged weights": Recipe({"sample_share": 0.0}),
}


def trained(base: BaseModelFolder, tweets: Tweets, config: TrainConfig, recipe: Recipe) -> Classifier:
    """A model after the loop of `training.loop.fit`, without its validation: the last weights are kept."""
    config = config.for_rows(len(tweets))
    model = build_model(base, len(LABELS), config)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    tokenizer = load_tokenizer(base.folder)
    rows, targets = TextEncoder(tokenizer)(tweets.split.texts, config.max_length), torch.from_numpy(tweets.targets)
    lengths = [len(row) for row in rows]
    torch.manual_seed(config.seed)
    optimizer = recipe.optimizer(model, config)
    steps = len(shuffled_batches(lengths, config.train_batch_size, config.seed))
    scheduler = build_scheduler(optimizer, config, steps)
    loss_of = loss_function(config, tweets.targets)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=half_precision(CPU, config.precision))
    with training_kernels(model, CPU):
        for epoch in range(1, config.epochs + 1):
            model.train()
            for index in shuffled_batches(lengths, config.train_batch_size, config.seed + epoch):
                ids, mask = pad([rows[i] for i in index], tokenizer.pad_token_id)
                with autocast:
                    loss = recipe.loss(model, Batch(ids, mask, targets[index], loss_of))
                loss.backward()  # type: ignore[no-untyped-call]
                if config.max_grad_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                scheduler.step()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.lerp_(start[name], start_share(base, model.config))
    return model.eval()


def f1(base: BaseModelFolder, fitted: Tweets, held_out: Tweets, config: TrainConfig, recipe: Recipe) -> float:
    """Macro-F1 on the held-out rows."""
    model, tokenizer = trained(base, fitted, config, recipe), load_tokenizer(base.folder)
    rows = TextEncoder(tokenizer)(held_out.split.texts, config.max_length)
    found = predict(model, rows, held_out.targets, config, 64, tokenizer.pad_token_id, CPU)
    return metrics(held_out.targets, found.probabilities, LABELS, "single_label")["f1_macro", ""]


def halves(tweets: Tweets, seed: int) -> tuple[Tweets, Tweets]:
    order = [int(i) for i in np.random.default_rng(seed).permutation(len(tweets))]
    return tweets.take(order[: len(order) // 2]), tweets.take(order[len(order) // 2 :])


def measure(tweets: Tweets, recipes: Sequence[str], seeds: Sequence[int], bench: Bench | None) -> list[list[float]]:
    """Macro-F1 by seed and recipe. With `bench`, each model has learned the sample."""
    starter = resolve_base_model(STARTER, None, [Path("/")])
    found = []
    for seed in seeds:
        fitted, held_out = halves(tweets, seed)
        values = []
        for name in recipes:
            recipe = RECIPES[name]
            config = make_config("fast", seed=seed, **recipe.settings)
            if bench is None:
                values.append(f1(starter, fitted, held_out, config, recipe))
            else:
                data = split_rows(Rows(fitted.texts, fitted.labels, list(range(len(fitted)))), config)
                plain_config = make_config("fast", seed=seed)  # every recipe starts from the same weights
                with (
                    tempfile.TemporaryDirectory(dir=bench.scratch) as folder,
                    bench.learned(data, plain_config, folder) as base,
                ):
                    values.append(f1(base, fitted, held_out, config, recipe))
            say(f"seed {seed}, {name}: {values[-1]:.4f}")
        found.append(values)
    return found


def table(recipes: Sequence[str], found: Sequence[Sequence[float]]) -> str:
    """A Markdown table: means, and the mean difference from the first recipe with its standard error."""
    lines = ["| recipe | macro-F1 | difference |", "|---|---|---|"]
    for column, name in enumerate(recipes):
        values = [row[column] for row in found]
        apart = [row[column] - row[0] for row in found]
        error = statistics.stdev(apart) / sqrt(len(apart)) if column and len(apart) > 1 else None
        shown = f"{statistics.mean(apart):+.3f} ± {error:.3f}" if error is not None else ""
        lines.append(f"| {name} | {statistics.mean(values):.3f} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", choices=("pool", "jrte"), default="pool")
    parser.add_argument("--recipes", default=",".join(RECIPES), help="some of them; the first is compared with")
    parser.add_argument("--seeds", type=numbers, default=[1, 2, 3, 4, 5])
    given = parser.parse_args()
    needed = LABELLED if given.rows == "pool" else JRTE / "jrte-train.csv"
    if not needed.is_file():
        sys.exit(f"{needed} is missing: this benchmark needs labelled rows, which are no part of the project")
    recipes = given.recipes.split(",")
    with tempfile.TemporaryDirectory() as scratch:
        if given.rows == "pool":
            bench = Bench(resolve_base_model(STARTER, None, [Path("/")]), {}, Path(scratch))
            print(table(recipes, measure(bench.pool, recipes, given.seeds, bench)))
        else:
            rows = read_rows(needed)
            print(table(recipes, measure(Tweets(rows.texts, rows.labels), recipes, given.seeds, None)))


if __name__ == "__main__":
    main()
