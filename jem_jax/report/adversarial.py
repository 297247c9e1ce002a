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

_NORMS = {"linf": "L∞", "l2": "L2"}
_ATTACK_STREAM, _DISTAL_STREAM = 102, 103
REFINEMENTS = (0, 1, 10)
"""SGLD steps before the JEM classifies"""
COPIES = 5
"""of each image, whose logits are averaged, as officially"""
Defence = Callable[[jax.Array, energy.LogitsFunction, energy.LogitsFunction, jax.Array], jax.Array]
"""(keys [b], logits_fn, chain_logits_fn, x [b, ...]) -> logits [b, K]"""
Attack = Callable[[str, Sequence[float], int], dict[str, float]]
"""(model's name, ε, images) -> ε -> accuracy, from ε 0"""
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
    panels = []
    for norm, epsilons in (("linf", settings.attack_linf), ("l2", settings.attack_l2)):
        lines = []
        run = _attack(subject, _undefended, norm)
        for name in subject.models:
            values = run(name, epsilons, settings.attack_images)
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


def _undefended(_: Any, logits_fn: energy.LogitsFunction, __: Any, x: jax.Array) -> jax.Array:
    return logits_fn(x)


def _attack(subject: Subject, defence: Defence, norm: str, chains: int = 0) -> Attack:
    """The accuracy under PGD of any of the models behind a defence, by one program for all ε and models."""
    settings = subject.settings

    def strongest(
        keys: jax.Array,
        logits_fn: energy.LogitsFunction,
        chain_logits_fn: energy.LogitsFunction,
        x: jax.Array,
        labels: jax.Array,
        epsilon: jax.Array,
    ) -> jax.Array:
        classifier = lambda keys, x: defence(keys, logits_fn, chain_logits_fn, x)  # noqa: E731
        how = {"num_steps": settings.attack_steps, "restarts": settings.attack_restarts}
        return adversarial.pgd(keys, classifier, x, labels, epsilon, norm=norm, **how)[0]

    attack = subject.over_examples(strongest, chains)
    is_right = subject.over_examples(
        lambda keys, logits_fn, chain_logits_fn, x, labels: (
            adversarial.margin(defence(keys, logits_fn, chain_logits_fn, x), labels) < 0
        ),
        chains,
    )

    def accuracies(name: str, epsilons: Sequence[float], count: int) -> dict[str, float]:
        some = subject.some_test(count)
        images, labels = to_float(some.images), some.labels
        attack_key, check_key = jax.random.split(subject.key(_ATTACK_STREAM))
        attack_key = jax.random.fold_in(attack_key, 0)
        values = {}
        for epsilon in (0.0, *epsilons):
            size = np.full(len(images), epsilon, np.float32)
            # At ε 0 there is nowhere to go.
            points = attack(name, attack_key, images, labels, size) if epsilon else images
            values[f"{epsilon:g}"] = float(is_right(name, check_key, points, labels).mean())
        return values

    return accuracies


def _accuracy_table(result: Result, norm: str, epsilons: Sequence[float], count: int) -> None:
    rows = [
        (TITLES[name], *(percent(value) for value in values["pgd"][norm].values()))
        for name, values in result.models.items()
    ]
    head = (f"{_NORMS[norm]} ε", *(f"{epsilon:g}" for epsilon in (0.0, *epsilons)))
    result.table(head, rows, f"accuracy under attack; at most {count} test images, ε in [0, 1] pixels")


def _refined(subject: Subject, result: Result) -> None:
    settings, chain = subject.settings, quantities.sgld_settings(subject.facts.config.sampler)
    rows, found = [], {}
    for steps in REFINEMENTS:
        for backpropagate in (False, True) if steps else (False,):
            how = {"num_steps": steps, "copies": COPIES, "backpropagate": backpropagate, **chain}
            defence = functools.partial(_refine, how)
            values = _attack(subject, defence, "linf", COPIES)("jem", settings.refined_linf, settings.refined_images)
            mode = "backpropagated" if backpropagate else "straight_through"
            found[f"jem_{steps}_{mode}"] = values
            attack = "" if not steps else ", attack through the chain" if backpropagate else ", official attack"
            rows.append((f"JEM-{steps}{attack}", *(percent(value) for value in values.values())))
    result.models["jem"]["pgd"]["refined_linf"] = found
    result.text(
        "JEM-n classifies after n SGLD steps from a noisy copy of the input, averaged over 5 chains. The official "
        "attack takes its gradient at the chain's end and passes it straight to the input; an attack through the chain "
        "knows more. A defence is worth what the stronger of the two leaves."
        + chains_in_words(subject.facts.config, "The chains of different images")
    )
    head = ("L∞ ε", *(f"{epsilon:g}" for epsilon in (0.0, *settings.refined_linf)))
    count = min(settings.refined_images, len(subject.test))
    result.table(head, rows, f"accuracy of the JEM through refinement; {count} test images")


def _refine(
    how: dict[str, Any],
    keys: jax.Array,
    logits_fn: energy.LogitsFunction,
    chain_logits_fn: energy.LogitsFunction,
    x: jax.Array,
) -> jax.Array:
    return adversarial.refined(keys, logits_fn, x, chain_logits_fn=chain_logits_fn, **how)


def climb(subject: Subject) -> Result:
    """What each classifier takes for a class with 90 % confidence when one starts from noise."""
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
