"""The sections about adversarial inputs: PGD, PGD through SGLD refinement, and distal adversarials (section 5.4)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jem_jax import energy, replay_buffer
from jem_jax.augment import to_float
from jem_jax.evaluation import adversarial, distal
from jem_jax.report import figures
from jem_jax.report.inputs import TITLES, Subject, chains_in_words, how_chains_pass
from jem_jax.report.result import Result, percent
from jem_jax.runs import image_grid
from jem_jax.training import quantities

Array = jax.Array
_NORMS = {"linf": "L∞", "l2": "L2"}
_ATTACK_STREAM, _DISTAL_STREAM = 102, 103
REFINEMENTS = (0, 1, 10)
"""SGLD steps before the JEM classifies, the most of them last"""
_CHECK = np.uint32(2**32 - 1)
"""folded into an example's key; the attack folds in smaller numbers"""
COPIES = 5
"""of each image, whose logits are averaged, as officially"""
_DISTAL_PER_CLASS = 5
_MAX_DISTAL = 50


def attack(subject: Subject) -> Result:
    """Accuracy under PGD over ε, of both models and, on fewer images, of the JEM through its own refinement."""
    settings, config = subject.settings, subject.facts.config
    result = Result(how={
        "attack": "PGD on the cross-entropy, steps of ε/4, random start, the strongest point of all visited",
        "steps": settings.attack_steps, "restarts": settings.attack_restarts, "images": settings.attack_images,
        "epsilon": "in [0, 1] pixels", "seed": config.seed, "refined_images": settings.refined_images,
        "refinement": "logits averaged over 5 chains from inputs with noise 0.03, SGLD as in training",
        "refinement_chains": how_chains_pass(config),
    })  # fmt: skip
    panels, accuracies = [], _plain(subject)
    for norm, epsilons in (("linf", settings.attack_linf), ("l2", settings.attack_l2)):
        lines = []
        for name in subject.models:
            values = accuracies(name, norm, epsilons)
            result.models.setdefault(name, {}).setdefault("pgd", {})[norm] = values
            style = "o-" if name == "jem" else "s--"
            heights = list(values.values())
            lines.append(figures.AttackLine(TITLES[name], figures.COLOURS[name], style, [0, *epsilons], heights))
        _accuracy_table(result, norm, epsilons, settings.attack_images)
        panels.append((f"PGD-{settings.attack_steps}, {_NORMS[norm]}", f"{_NORMS[norm]} ε, [0, 1] pixels", lines))
    result.plot(
        figures.curves(panels, subject.folder / "robustness.png"),
        "Accuracy of the attacked images against the attack's size; ε 0 is no attack.",
    )
    if subject.jem.buffer is not None and settings.refined_linf:
        _refined(subject, result)
    return result


def _plain(subject: Subject) -> Callable[[str, str, Sequence[float]], dict[str, float]]:
    """(model's name, norm, ε) -> ε -> accuracy under PGD, from ε 0; one program for all of them."""
    settings = subject.settings
    subset = subject.some_test(settings.attack_images)
    images, how = to_float(subset.images), {"num_steps": settings.attack_steps, "restarts": settings.attack_restarts}
    attack = subject.over_examples(
        lambda keys, logits_fn, _, x, labels, epsilon, norm: adversarial.pgd(
            keys, lambda _, x: logits_fn(x), x, labels, epsilon, norm=norm, until_all_fall=True, **how
        )[1]
    )
    key = jax.random.split(subject.key(_ATTACK_STREAM))[0]

    def accuracies(name: str, norm: str, epsilons: Sequence[float]) -> dict[str, float]:
        logits = subject.logits(name, images)
        standing = np.isfinite(logits).all(axis=-1) & (logits.argmax(axis=-1) == subset.labels)
        values = {"0": float(standing.mean())}
        norms = np.full(len(images), adversarial.NORMS.index(norm))
        runner_up, best = np.partition(logits, -2)[:, -2:].T
        lead = best - runner_up
        # An image that fell to a smaller ε falls to a larger one: the point that felled it is within reach.
        for epsilon in sorted(epsilons):
            rows = np.flatnonzero(standing)
            # A batch ends when all of it has fallen, so images that stand equally firmly go together.
            rows = rows[np.argsort(lead[rows])]
            if len(rows):
                sizes = np.full(len(rows), epsilon, np.float32)
                margins = attack(name, key, images[rows], subset.labels[rows], sizes, norms[rows], fill=len(images))
                standing[rows], lead[rows] = margins < 0, -margins
            values[f"{epsilon:g}"] = float(standing.mean())
        return {f"{epsilon:g}": values[f"{epsilon:g}"] for epsilon in (0, *epsilons)}

    return accuracies


def _accuracy_table(result: Result, norm: str, epsilons: Sequence[float], count: int) -> None:
    rows = [
        (TITLES[name], *(percent(value) for value in values["pgd"][norm].values()))
        for name, values in result.models.items()
    ]
    head = (f"{_NORMS[norm]} ε", *(f"{epsilon:g}" for epsilon in (0.0, *epsilons)))
    result.table(head, rows, f"accuracy under attack; at most {count} test images, ε in [0, 1] pixels")


def _refined(subject: Subject, result: Result) -> None:
    """The JEM behind its own refinement."""
    settings, accuracy = subject.settings, _behind_refinement(subject)
    rows, by_steps = [], {}
    for steps in REFINEMENTS:
        clean = accuracy(steps, 0.0)
        for backpropagate in (False, True) if steps else (False,):
            attacked = {f"{epsilon:g}": accuracy(steps, epsilon, backpropagate) for epsilon in settings.refined_linf}
            values = {"0": clean} | attacked
            mode = "backpropagated" if backpropagate else "straight_through"
            by_steps[f"jem_{steps}_{mode}"] = values
            said = "" if not steps else ", attack through the chain" if backpropagate else ", official attack"
            rows.append((f"JEM-{steps}{said}", *(percent(value) for value in values.values())))
    result.models["jem"]["pgd"]["refined_linf"] = by_steps
    result.text(
        "JEM-n classifies after n SGLD steps from a noisy copy of the input, averaged over 5 chains. The official "
        "attack takes its gradient at the chain's end and passes it straight to the input; an attack through the chain "
        "knows more. A defence is worth what the stronger of the two leaves."
        + chains_in_words(subject.facts.config, "The chains of different images")
    )
    head = ("L∞ ε", *(f"{epsilon:g}" for epsilon in (0.0, *settings.refined_linf)))
    count = min(settings.refined_images, len(subject.test))
    result.table(head, rows, f"accuracy of the JEM through refinement; {count} test images")


def _behind_refinement(subject: Subject) -> Callable[..., float]:
    """(n, ε, backpropagate=False) -> accuracy of the JEM behind n steps of refinement under PGD.

    The attacked points are judged under noise that the attack did not see.
    """
    settings, chain = subject.settings, quantities.sgld_settings(subject.facts.config.sampler)
    subset = subject.some_test(settings.refined_images)
    images = to_float(subset.images)

    def attacked(
        backpropagate: bool, keys: Array, logits_fn: energy.LogitsFunction, chain_logits_fn: energy.LogitsFunction,
        x: Array, labels: Array, epsilon: Array, *, until: Array, attack_steps: Array,
    ) -> tuple[Array, Array]:  # fmt: skip
        """The attacked points, and their margins under fresh noise."""

        def classifier(keys: Array, x: Array) -> Array:
            return adversarial.refined(
                keys, logits_fn, x, chain_logits_fn=chain_logits_fn, num_steps=REFINEMENTS[-1], until=until,
                copies=COPIES, backpropagate=backpropagate, **chain,
            )  # fmt: skip

        points, margins = adversarial.pgd(
            keys, classifier, x, labels, epsilon, norm="linf", num_steps=attack_steps, restarts=settings.attack_restarts
        )
        if not backpropagate:
            check_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, _CHECK)
            margins = adversarial.margin(classifier(check_keys, points), labels)
        return points, margins

    # The official program judges the points of either attack: a second chain in the other would compile longer.
    official, through = (
        subject.over_examples(functools.partial(attacked, backpropagate), COPIES) for backpropagate in (False, True)
    )
    key = jax.random.split(subject.key(_ATTACK_STREAM))[0]

    def accuracy(num_steps: int, epsilon: float, backpropagate: bool = False) -> float:
        points = images
        for attack, size in ((through, epsilon), (official, 0.0)) if backpropagate else ((official, epsilon),):
            points, margins = attack(
                "jem", key, points, subset.labels, np.full(len(images), size, np.float32), until=np.int32(num_steps),
                # At ε 0 there is nowhere to go.
                attack_steps=np.int32(settings.attack_steps if size else 0),
            )  # fmt: skip
        return float((margins < 0).mean())

    return accuracy


def climb(subject: Subject) -> Result:
    """Noise that gradient ascent has turned into images of a class with 90 % confidence, for each classifier."""
    names = subject.facts.class_names[: max(1, _MAX_DISTAL // _DISTAL_PER_CLASS)]
    classes = np.repeat(np.arange(len(names), dtype=np.int32), _DISTAL_PER_CLASS)
    shape = subject.facts.image_shape
    ascend = subject.over_examples(
        lambda keys, logits_fn, _, classes: distal.ascend(
            logits_fn, replay_buffer.uniform(keys, len(classes), shape), classes
        )
    )
    result = Result(how={"start": "U(-1, 1)", "confidence": 0.9, "step": "0.1 long (L2, [-1, 1] units)",
                         "max_steps": 400, "images": len(classes)})  # fmt: skip
    for name in subject.models:
        ends = ascend(name, subject.key(_DISTAL_STREAM), classes)
        other = next((key for key in subject.models if key != name), None)
        values: dict[str, Any] = {
            "reached": float(np.mean(ends.confidence >= 0.9)),
            "median_steps": float(np.median(ends.steps)),
        }
        if other is not None:
            values["taken_for_the_class_by_the_other"] = float(
                np.mean(subject.logits(other, ends.images).argmax(axis=-1) == classes)
            )
        result.models[name] = {"distal": values}
        rows = list(ends.images.reshape(len(names), _DISTAL_PER_CLASS, *shape))
        agreed = values.get("taken_for_the_class_by_the_other")
        result.images(
            image_grid.save(image_grid.grid(rows, names), subject.folder / f"distal_{name}.png"),
            f"{TITLES[name]}: from noise until it is 90 % sure of the row's class; {percent(values['reached'])} got "
            f"there, in {values['median_steps']:.0f} steps (median)."
            + (f" The {TITLES[other]} agrees on {percent(agreed)}." if other and agreed is not None else ""),
        )
    return result
