"""Composition of Experts, step 1: the category of a prompt, and whether the router is sure of it.

After Jain et al. (arXiv 2412.01868). The paper leaves open which classifier and which uncertainty. Here the classifier
is ridge regression or kNN on one-hot labels, whichever is right more often out of fold; a temperature turns its output
into calibrated probabilities (Guo et al., arXiv 1706.04599); the uncertainty is their entropy, as a share of the
greatest possible; and what is above a threshold is `general`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from signalbox.router import heads
from signalbox.router.artifact import Artifact, ArtifactError
from signalbox.router.category_map import cross_fitted
from signalbox.router.heads import PENALTIES, Data, Linear, RidgePath
from signalbox.router.knn import MAX_ROWS, Chosen, Smoother, choose_smoothers, load_smoother, nearest, weights_of
from signalbox.router.teaching import clearly_positive, difference_errors

Matrix = NDArray[Any]

GENERAL = "general"
MAX_CATEGORIES = 64
# Rarer tasks belong to `general`: five-fold cross-validation needs a few rows of each in every fold.
LEAST_ROWS = 20
CLUSTERS = (1, 2, 4, 8, 16, 32, 63)
# Clusters may be smaller: their qualities are shrunk, and nobody named them to be told apart.
LEAST_IN_CLUSTER = 8
# Temperatures of the softmax over regression outputs, which lie about in [0, 1].
TEMPERATURES = (0.005, 5.0)
# Share of the training prompts that count as remote from the others.
REMOTE = 0.02
UNLABELLED = -1
# An output far below all others (which lie about in [0, 1]), yet finite, as artifacts must be.
NEVER = -1e4


@dataclass(frozen=True)
class KnnVote:
    """Smoothed one-hot labels of similar rows: embeddings float32 [m, d], labels int [m] of `count` classes."""

    embeddings: Matrix
    labels: Matrix
    count: int
    smoother: Smoother

    def __call__(self, embeddings: Matrix) -> Matrix:
        """Votes float [n, C], about in [0, 1]."""
        out = np.empty((len(embeddings), self.count))
        for start in range(0, len(embeddings), 512):  # bounds the memory
            here = slice(start, start + 512)
            index, cosines = nearest(embeddings[here], self.embeddings, self.smoother.neighbours)
            out[here] = self.smoother(cosines, np.eye(self.count)[self.labels[index]])
        out[:, np.bincount(self.labels, minlength=self.count) == 0] = NEVER
        return out

    def tensors(self, prefix: str) -> dict[str, Matrix]:
        """What an artifact keeps."""
        return {
            f"{prefix}embeddings": self.embeddings.astype(np.float16),
            f"{prefix}labels": self.labels.astype(np.int32),
        }


@dataclass(frozen=True)
class CategoryRouter:
    """A classifier of embeddings into `names`, the last of which is `general`.

    threshold: entropy, as a share of log C, above which a prompt is `general`.
    """

    names: tuple[str, ...]
    classifier: Linear | KnnVote
    temperature: float
    threshold: float = 1.0
    figures: dict[str, Any] = field(default_factory=dict)

    def probabilities(self, embeddings: Matrix) -> Matrix:
        """Calibrated probabilities of the categories, float64 [n, C]."""
        return softmax(self.classifier(embeddings), self.temperature)

    def assign(self, probabilities: Matrix) -> NDArray[np.intp]:
        """The category of each row: the most probable, or `general` where the entropy is above the threshold."""
        return assigned(probabilities, self.threshold)

    def tensors(self, prefix: str) -> dict[str, Matrix]:
        """What an artifact keeps."""
        return self.classifier.tensors(prefix)

    def settings(self) -> dict[str, Any]:
        """What an artifact keeps beside the tensors."""
        knn = isinstance(self.classifier, KnnVote)
        return {
            "categories": list(self.names),
            "classifier": "knn" if knn else "ridge",
            "temperature": self.temperature,
            "threshold": self.threshold,
            **({"votes": self.classifier.smoother.figures()} if isinstance(self.classifier, KnnVote) else {}),
        }


def softmax(outputs: Matrix, temperature: float) -> Matrix:
    """Rows of probabilities, float64."""
    scaled = np.asarray(outputs, dtype=np.float64) / temperature
    exp = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return exp / exp.sum(axis=1, keepdims=True)


def entropy(probabilities: Matrix) -> Matrix:
    """Entropy [n] of each row as a share of the greatest possible, in [0, 1]; 0 where there is one category."""
    c = probabilities.shape[1]
    nats = -(probabilities * np.log(np.maximum(probabilities, 1e-300))).sum(axis=1)
    return nats / np.log(max(2, c))


def assigned(probabilities: Matrix, threshold: float) -> NDArray[np.intp]:
    """The most probable category, or the last (`general`) where the entropy is above the threshold: int [n]."""
    last = probabilities.shape[1] - 1
    return np.where(entropy(probabilities) > threshold, last, probabilities.argmax(axis=1))


# Categories


def task_categories(tasks: Sequence[str]) -> tuple[tuple[str, ...], Matrix] | None:
    """Category names, `general` last, and the label int [n] of each row; None without two tasks, or where all are rare.

    Rare tasks, and all but the `MAX_CATEGORIES` most frequent, are `general`. A row without a task is `UNLABELLED`:
    what it is, the classifier taught by the others will say.
    """
    names, counts = np.unique([task for task in tasks if task], return_counts=True)
    if len(names) < 2:
        return None
    common = [str(names[i]) for i in np.argsort(-counts, kind="stable") if counts[i] >= LEAST_ROWS]
    named = sorted(set(common[: MAX_CATEGORIES - 1]) - {GENERAL})
    if not named:
        return None
    place = {name: i for i, name in enumerate(named)}
    labels = np.array([place.get(task, len(named)) if task else UNLABELLED for task in tasks])
    return (*named, GENERAL), labels


def found_categories(
    embeddings: Matrix, scores: Matrix, folds: Matrix, seed: int
) -> tuple[tuple[str, ...], Matrix, dict[str, Any]]:
    """Categories by k-means on embeddings, for tables without tasks: names, labels int [n], figures.

    Their number is the least, unless another predicts the differences between experts better, out of fold, by more
    than a standard error. Clusters that are too small are `general`.
    """
    order = np.random.default_rng(seed).permutation(len(embeddings))[: heads.MAX_CLUSTERED]
    tried: dict[int, tuple[Matrix, Matrix]] = {}
    chosen = 1
    for count in CLUSTERS:
        if count * LEAST_IN_CLUSTER > len(embeddings):
            break
        centres = heads._k_means(embeddings[order].astype(np.float64), count)
        labels = ((centres**2).sum(axis=1) - 2 * embeddings @ centres.T).argmin(axis=1)
        tried[count] = labels, difference_errors(cross_fitted(scores, labels, count, folds), scores)
        gain = tried[chosen][1] - tried[count][1]
        if clearly_positive(gain, len(gain)):
            chosen = count
    labels = tried[chosen][0]
    common = np.flatnonzero((np.bincount(labels) >= LEAST_IN_CLUSTER) & (chosen > 1))
    place = np.full(chosen, len(common))
    place[common] = np.arange(len(common))
    names = (*(f"cluster {i + 1}" for i in range(len(common))), GENERAL)
    return names, place[labels], {str(k): float(errors.mean()) for k, (_, errors) in tried.items()}


# Fitting


def fit_category_router(
    names: tuple[str, ...],
    labels: Matrix,
    embeddings: Matrix,
    folds: Matrix,
    notify: Callable[[int, int], None] | None = None,
) -> tuple[CategoryRouter, Matrix]:
    """A router without a threshold yet, and the probabilities float64 [n, C] of rows that it did not see.

    Args:
        names: categories, `general` last.
        labels: int [n], `UNLABELLED` for rows that teach nothing.
        embeddings: unit vectors float32 [n, d].
        folds: int [n].
        notify: called with (folds done, folds).
    """
    taught = labels != UNLABELLED
    known, x, known_folds = labels[taught], embeddings[taught], folds[taught]
    # Nothing is learned of a category without rows (`general`, often): it is out of the classifier's reach.
    present = np.unique(known)
    classes, count = np.searchsorted(present, known), len(present)
    one_hot = np.eye(count)[classes]

    data = Data(x.astype(np.float64), one_hot, known_folds, plain=x.shape[1])
    centred = data.features - data.features.mean(axis=0)
    guesses = heads.out_of_fold(lambda _: centred, one_hot, data)
    best = int(((guesses - one_hot) ** 2).sum(axis=(1, 2)).argmin())
    path = RidgePath(data.features, one_hot)
    weight = path.weight(PENALTIES[best])
    linear = Linear(weight.astype(np.float32), (path.y_mean - path.x_mean @ weight).astype(np.float32))
    votes = choose_smoothers(x, one_hot, known_folds, [slice(0, None)], notify)
    accuracy = {
        "ridge": float((guesses[best].argmax(axis=1) == classes).mean()),
        "knn": float((votes.out_of_fold.argmax(axis=1) == classes).mean()),
    }
    classifier: Linear | KnnVote
    if accuracy["ridge"] >= accuracy["knn"]:
        classifier, outputs = linear, guesses[best]
    else:
        smoother, outputs = _wary(votes, one_hot)
        classifier = KnnVote(x, classes, count, smoother)

    def loss(log_temperature: float) -> float:
        found = softmax(outputs, float(np.exp(log_temperature)))
        return float(-np.log(np.maximum(found[np.arange(len(found)), classes], 1e-12)).mean())

    low, high = np.log(TEMPERATURES)
    temperature = float(np.exp(minimize_scalar(loss, bounds=(low, high), method="bounded").x))
    sure = softmax(outputs, temperature)
    figures = {
        "accuracy": accuracy,
        "log_loss": loss(np.log(temperature)),
        "mean_probability": float(sure.max(axis=1).mean()),
        "unlabelled": int((~taught).sum()),
    }
    router = CategoryRouter(names, _widened(classifier, present, len(names)), temperature, figures=figures)
    probabilities = router.probabilities(embeddings)  # of the unlabelled, from which nothing was learned
    probabilities[taught] = 0.0
    probabilities[np.ix_(taught, present)] = sure
    return router, probabilities


def _wary(votes: Chosen, one_hot: Matrix) -> tuple[Smoother, Matrix]:
    """The smoother whose prior weighs as much as the neighbours of the most remote prompts, and its votes [n, C].

    Among the training prompts a prior changes little, so cross-validation may find none. But with it, what is far
    from all of them has no votes to speak of: the greatest entropy, and not the opinion of remote neighbours.
    """
    best = votes.smoothers[0]
    k = best.neighbours
    weights = weights_of(votes.cosines[:, :k], best.bandwidth).sum(axis=1)
    smoother = replace(best, prior=max(best.prior, float(np.quantile(weights, REMOTE))))
    outputs = np.empty(one_hot.shape)
    for start in range(0, len(outputs), 512):  # bounds the memory
        here = slice(start, start + 512)
        outputs[here] = smoother(votes.cosines[here], one_hot[votes.index[here, :k]])
    return smoother, outputs


def _widened(classifier: Linear | KnnVote, present: Matrix, count: int) -> Linear | KnnVote:
    """The classifier with a place for the categories that have no rows, which it never chooses."""
    if isinstance(classifier, KnnVote):
        return replace(classifier, labels=present[classifier.labels], count=count)
    weight = np.zeros((classifier.weight.shape[0], count), dtype=np.float32)
    bias = np.full(count, NEVER, dtype=np.float32)
    weight[:, present], bias[present] = classifier.weight, classifier.bias
    return Linear(weight, bias)


def with_threshold(router: CategoryRouter, threshold: float, figures: dict[str, Any]) -> CategoryRouter:
    """The router, which says `general` above this entropy."""
    return replace(router, threshold=threshold, figures={**router.figures, **figures})


def load_category_router(artifact: Artifact, prefix: str, width: int) -> CategoryRouter:
    """The category router in an artifact. Raises `ArtifactError`."""
    where = artifact.path or "router artifact"
    settings = artifact.settings
    names = tuple(map(str, settings.get("categories") or ()))
    if not names or names[-1] != GENERAL or len(set(names)) != len(names) or len(names) > MAX_CATEGORIES:
        raise ArtifactError(f"{where}: `categories` is not a list that ends with {GENERAL}; train it again")
    try:
        temperature, threshold = float(settings["temperature"]), float(settings["threshold"])
    except (KeyError, TypeError, ValueError):
        temperature = threshold = np.nan
    if not (temperature > 0 and threshold >= 0):
        raise ArtifactError(f"{where}: `temperature` or `threshold` makes no sense; train it again")
    c = len(names)
    if settings.get("classifier") == "ridge":
        linear = Linear(artifact.tensor(f"{prefix}weight", width, c), artifact.tensor(f"{prefix}bias", c))
        return CategoryRouter(names, linear, temperature, threshold)
    if settings.get("classifier") != "knn":
        raise ArtifactError(f"{where}: unknown classifier {settings.get('classifier')!r}; train it again")
    labels = artifact.tensors.get(f"{prefix}labels", np.zeros(0, dtype=np.int32))
    if labels.dtype != np.int32 or labels.ndim != 1 or not 0 < labels.size <= MAX_ROWS:
        raise ArtifactError(f"{where}: {prefix}labels is not a list of labels; train it again")
    if labels.min() < 0 or labels.max() >= c:
        raise ArtifactError(f"{where}: {prefix}labels names a category that there is not; train it again")
    embeddings = artifact.tensor(f"{prefix}embeddings", labels.size, width)
    votes = KnnVote(embeddings, labels.astype(np.intp), c, load_smoother(artifact, "votes"))
    return CategoryRouter(names, votes, temperature, threshold)
